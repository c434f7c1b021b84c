"""Where pictures go and what is written into them: file names, metadata that other tools read, atomic files."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
from PIL.PngImagePlugin import PngInfo

from .console import did_you_mean
from .options import sampler_label

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_STEM = 48  # of the characters of a prompt in a file name; some file systems end at 255 bytes
# Tags of EXIF 2.3: the main directory's place for it, and the entries that are filled.
EXIF_DIRECTORY, USER_COMMENT, SOFTWARE, DESCRIPTION = 0x8769, 0x9286, 0x0131, 0x010E


@dataclass(frozen=True)
class Target:
    """Where the pictures go.

    Attributes:
        folder: where.
        stem, suffix: of the file's name; without a stem it is made from the prompt and the seed, and is then never
            that of a file that exists.
    """

    folder: Path
    stem: str | None = None
    suffix: str = ".png"

    @classmethod
    def parse(cls, output: str | None, *, animated: bool = False) -> Target:
        """Read the value of ``--output``: a file, or a folder (one that exists, or a name that ends in a slash).

        Raises:
            ValueError: pictures or animations cannot be written there; better now than after the work.
        """
        usual = ".gif" if animated else ".png"
        if output is None:
            target = cls(Path(), suffix=usual)
        elif output.endswith(("/", os.sep)) or Path(output).expanduser().is_dir():
            target = cls(Path(output).expanduser(), suffix=usual)
        else:
            target = cls._file(Path(output).expanduser(), animated)
        existing = next(folder for folder in (target.folder, *target.folder.absolute().parents) if folder.exists())
        if not existing.is_dir():
            raise ValueError(f"--output {output}: {existing} is a file, not a folder.")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise ValueError(f"--output {output or '.'}: you may not write into {existing.absolute()}.")
        return target

    @classmethod
    def _file(cls, path: Path, animated: bool) -> Target:
        from ..utils import ANIMATION_SUFFIXES, VIDEO_FORMATS

        if path.name == "-":
            raise ValueError("--output is '-'; pictures are written to files only, so give a file name.")
        if path.exists() and not path.is_file():
            raise ValueError(f"--output {path} is not an ordinary file; give another name.")
        what, known = ("animations", ANIMATION_SUFFIXES) if animated else ("pictures", SUFFIXES)
        suffix = path.suffix.lower() or known[0]
        if suffix not in known:
            mend = " --frames makes an animation." if suffix in ANIMATION_SUFFIXES else did_you_mean(suffix, known)
            raise ValueError(f"--output {path}: {what} are written as {', '.join(known)}, not {suffix}.{mend}")
        if suffix in VIDEO_FORMATS and importlib.util.find_spec("av") is None:
            raise ValueError(
                f"--output {path}: videos need PyAV, pip install 'fourstroke[video]'; .gif and .webp work without it."
            )
        return cls(path.parent, path.stem, path.suffix or known[0])

    def paths(self, prompt: str, seeds: Sequence[int], grid: bool) -> list[Path]:
        """One path a seed; with ``grid`` one more, for all pictures in one.

        Several pictures of ``fox.png`` are ``fox-1.png``, ``fox-2.png``, …, and their grid is ``fox.png``.
        """
        if self.stem is None:
            stem = slug(prompt)
            names = [f"{stem}-{seed}" for seed in seeds] + ([f"{stem}-{seeds[0]}-grid"] if grid else [])
            return [unused(self.folder / (name + self.suffix)) for name in names]
        if len(seeds) == 1:
            names = [self.stem]
        else:
            digits = len(str(len(seeds)))
            names = [f"{self.stem}-{i:0{digits}}" for i in range(1, len(seeds) + 1)]
        return [self.folder / (name + self.suffix) for name in [*names, *([self.stem] if grid else [])]]


def slug(prompt: str) -> str:
    """A file name of the words of ``prompt``."""
    words = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")
    return words[:MAX_STEM].rstrip("-") or "picture"


def unused(path: Path) -> Path:
    """``path``, or with ``-2``, ``-3``, … at its end when it exists."""
    candidate, number = path, 2
    while candidate.exists():
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
    return candidate


def make_grid(images: Sequence[PIL.Image.Image]) -> PIL.Image.Image:
    """Lay pictures of one size out in a nearly square one, row by row; cells that are left over are white."""
    from ..utils import make_image_grid

    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    rest = [PIL.Image.new("RGB", images[0].size, "white")] * (rows * columns - len(images))
    return make_image_grid([*images, *rest], rows, columns)


def parameters_text(settings: Mapping[str, Any]) -> str:
    """``settings`` in the form of the ``parameters`` text of AUTOMATIC1111's web UI, which many tools read."""
    entries = {
        "Steps": settings["num_inference_steps"],
        "Sampler": sampler_label(settings["scheduler"]),
        "Schedule type": "Karras" if settings["scheduler_options"].get("use_karras_sigmas") else None,
        "CFG scale": f"{settings['guidance_scale']:g}",
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": Path(settings["model"]).stem if settings["model"].endswith(".safetensors") else settings["model"],
        # Layers are counted from the end there: 1 is the last one, 2 skips one.
        "Clip skip": settings["clip_skip"] + 1 if settings.get("clip_skip") else None,
        "Denoising strength": f"{settings['strength']:g}" if "strength" in settings else None,
        **{f"ControlNet {i}": _control(control) for i, control in enumerate(settings.get("controls", ()))},
        "Lora": ", ".join(f"{lora['name']}: {lora['weight']:g}" for lora in settings["loras"]) or None,
        "Version": f"fourstroke {settings['versions']['fourstroke']}",
    }
    lines = [settings["prompt"]]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in entries.items() if value is not None))
    return "\n".join(lines)


def _control(control: Mapping[str, Any]) -> str:
    """As the web UI's ControlNet extension writes it."""
    module = control.get("detector", "none")
    return f"Module: {module}, Model: {control['model']}, Weight: {control['scale']:g}"


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\n]', text) else text


def encode(image: PIL.Image.Image, suffix: str, settings: Mapping[str, Any]) -> bytes:
    """The file for ``image``, with its settings inside: nothing else, so that equal work gives equal bytes.

    A PNG has them as text chunks, ``parameters`` (see `parameters_text`) and ``fourstroke`` (JSON); other formats have
    the same two texts in the EXIF entries UserComment and ImageDescription.
    """
    buffer = io.BytesIO()
    parameters, everything = parameters_text(settings), json.dumps(settings, sort_keys=True)
    if suffix.lower() == ".png":
        info = PngInfo()
        info.add_text("parameters", parameters)
        info.add_text("fourstroke", everything)
        image.save(buffer, "PNG", pnginfo=info)
        return buffer.getvalue()
    exif = PIL.Image.Exif()
    exif[SOFTWARE], exif[DESCRIPTION] = f"fourstroke {settings['versions']['fourstroke']}", everything
    exif.get_ifd(EXIF_DIRECTORY)[USER_COMMENT] = b"UNICODE\0" + parameters.encode("utf-16-be")
    if suffix.lower() == ".webp":
        image.save(buffer, "WEBP", lossless=True, exif=exif)
    else:
        image.save(buffer, "JPEG", quality=95, subsampling=0, exif=exif)
    return buffer.getvalue()


def encode_animation(frames: Sequence[PIL.Image.Image], suffix: str, fps: float) -> bytes:
    """The file for an animation, in the format that ``suffix`` names."""
    from ..utils import save_animation

    with tempfile.TemporaryDirectory() as folder:
        return Path(save_animation(list(frames), Path(folder, "animation" + suffix), fps)).read_bytes()


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings inside a picture that `encode` made; None for any other file."""
    try:
        with PIL.Image.open(path) as image:
            text = image.info.get("fourstroke") or image.getexif().get(DESCRIPTION)
    except (OSError, PIL.Image.DecompressionBombError):
        return None
    try:
        settings = json.loads(text or "null")
    except ValueError:
        return None
    return settings if isinstance(settings, dict) and "prompt" in settings else None


def save(path: Path, data: bytes) -> None:
    """Write a file so that it is either whole or not there; a link keeps pointing where it does."""
    from ..loading import write_atomically

    target = path.resolve() if path.is_symlink() else path

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_atomically(target, write)
