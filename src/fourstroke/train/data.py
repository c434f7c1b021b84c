"""What is trained on: pictures with captions, from a folder or from webdataset shards, or prompts alone.

`open_source` looks at every file once, in threads, and names all that are bad before any work is done; what it returns
holds no pixels; `Picture.open` reads them.

Captions of a picture ``fox.png``, the first that there are: ``fox.txt`` or ``fox.caption`` (each line is a caption of
its own, of which one is drawn at every visit); its entry in a ``metadata.jsonl`` or ``metadata.csv`` of the same folder
(``file_name`` and ``text``); the caption for all; the words of a kohya folder (``10_red fox``, whose pictures are also
shown ten times as often).
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import os
import re
import tarfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import PIL.Image
import PIL.ImageOps

from ..request import option

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# Pictures that Pillow does not read by itself; they are refused by name, not passed over.
OTHER_PICTURES = (".heic", ".heif", ".avif", ".jxl", ".svg", ".psd", ".jp2")
CAPTIONS = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv")
TEXT_FIELDS = ("text", "caption", "prompt")
CROPS = ("center", "random")
LATENTS = ("mean", "sample")
REPEATS = r"(\d+)_(.+)"  # kohya's folder names
SMALLEST = 16  # pixels; a shorter side is an icon's or a tracker's, not a picture's
THREADS = min(8, os.cpu_count() or 1)


class DataError(ValueError):
    """The data cannot be trained on; the message names every file at fault."""


@dataclass(frozen=True)
class DataOptions:
    """How pictures and captions become examples.

    Raises:
        ValueError: a value breaks a rule; the message names value and rule.
    """

    resolution: int | None = option(
        None, "Size in pixels: pictures are resized to about RESOLUTION x RESOLUTION; the model's own if not given."
    )
    buckets: bool = option(
        True, "Keep the pictures' shapes, as far as 5:2, one shape a batch; otherwise all are cut to squares."
    )
    crop: str = option("center", "What is kept where a picture juts out of its shape: center or random.")
    crops: int = option(1, "Random crops a picture that are encoded, of which one is drawn at every visit.")
    flip: bool = option(False, "Show half of the pictures mirrored.")
    latents: str = option("mean", "Of what the VAE says of a picture: mean, or a new sample at every visit.")
    clip_skip: int | None = option(None, "Text encoder layers to skip from the end.")
    images_per_prompt: int = option(1, "Without pictures: how many the teacher paints of each prompt.")
    teacher_steps: int = option(25, "Without pictures: the teacher's steps.")
    teacher_guidance: float = option(7.5, "Without pictures: the teacher's guidance.")

    def __post_init__(self) -> None:
        for name, known in (("crop", CROPS), ("latents", LATENTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}.")
        for name in ("crops", "images_per_prompt", "teacher_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.crops > 1 and self.crop == "center":
            raise ValueError(f"crops is {self.crops}, but there is one central crop; set crop to random.")
        if self.resolution is not None and self.resolution < SMALLEST:
            raise ValueError(f"resolution is {self.resolution}; it must be at least {SMALLEST} pixels.")


@dataclass(frozen=True)
class Picture:
    """A picture that can be read, and what is known of it without its pixels.

    Attributes:
        name: as messages call it: its path in the folder, or ``shard.tar: name``.
        file: the file that it lies in, from byte ``offset`` on, ``length`` bytes long (None: to the end).
        captions: at least one.
        repeats: how often it is shown where others are shown once.
        height, width: in pixels, upright.
        digest: of the bytes, 32 hexadecimal digits.
    """

    name: str
    file: Path
    captions: tuple[str, ...] = ()
    repeats: int = 1
    offset: int = 0
    length: int | None = None
    height: int = 0
    width: int = 0
    digest: str = ""

    def read(self) -> bytes:
        """The picture's file."""
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            return stream.read(-1 if self.length is None else self.length)

    def open(self) -> PIL.Image.Image:
        """The picture as RGB, upright as its EXIF data says, and on white where it is transparent."""
        with PIL.Image.open(io.BytesIO(self.read())) as image:
            return plain(image)


@dataclass(frozen=True)
class Source:
    """What `open_source` found: ``pictures``, or ``prompts`` for pictures that the teacher will paint."""

    place: str
    pictures: tuple[Picture, ...] = ()
    prompts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pictures) or len(self.prompts)


def plain(image: PIL.Image.Image) -> PIL.Image.Image:
    """``image`` in RGB, upright as its EXIF data says, on white where it is transparent; 16 bits become 8."""
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = PIL.Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image)
    return image.convert("RGB")


# Where examples come from.


def open_source(place: str | os.PathLike[str] | Source, caption: str | None = None) -> Source:
    """Find the pictures and captions, or the prompts, at ``place``, and look at every file once.

    Args:
        place: a folder (with its subfolders); a webdataset: one ``.tar``, or several as ``shards-{000..041}.tar`` or
            ``shards-*.tar``; or a file of prompts: ``.txt`` with one a line, ``.jsonl`` or ``.csv`` with one in the
            field ``text``. A `Source` is returned as it is.
        caption: for pictures that have none. With ``{}`` in it, it is put around every caption:
            ``"{}, in flat style"``.

    Raises:
        FileNotFoundError: there is nothing.
        DataError: files cannot be read, are too small, or have no caption; all are named.
    """
    if isinstance(place, Source):
        return place
    text = os.fspath(place)
    if "://" in text:
        raise DataError(f"{text} is an address; download the files first and give their folder.")
    path = Path(text).expanduser()
    if path.is_dir():
        found, problems = _in_folder(path)
    elif re.search(r"\.(tar(\.\w+)?|tgz)$", text):
        found, problems = _in_shards(text)
    elif path.is_file():
        return Source(text, prompts=_prompts(path, caption))
    else:
        raise FileNotFoundError(
            f"There is no {text!r}; give a folder of pictures, webdataset shards (.tar), or a file of prompts."
        )
    found = _captioned(found, caption, problems)
    pictures, more = _examined(found)
    problems += more
    if problems:
        what = "is 1 file" if len(problems) == 1 else f"are {len(problems)} files"
        raise DataError(f"{text}: there {what} to mend or to remove: {'; '.join(problems)}.")
    if not pictures:
        raise DataError(f"{text} holds no pictures; {', '.join(PICTURES)} are read.")
    return Source(text, tuple(pictures))


def _in_folder(folder: Path) -> tuple[list[Picture], list[str]]:
    """The pictures in a folder with what captions they have, and what is wrong."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path.relative_to(folder)))
    told: dict[Path, tuple[str, ...]] = {}
    problems: list[str] = []
    for path in files:
        if path.name in METADATA:
            told |= _metadata(path, folder, problems)
    found, used = [], set()
    names = set(files)
    for path in files:
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() not in (*PICTURES, *OTHER_PICTURES):
            continue
        beside = [path.with_suffix(suffix) for suffix in CAPTIONS if path.with_suffix(suffix) in names]
        used.update(beside)
        if path.suffix.lower() in OTHER_PICTURES:
            problems.append(f"{name} (this kind is not read; convert it to PNG or JPEG)")
            continue
        captions: tuple[str, ...] = ()
        if beside:
            captions = _lines(beside[0].read_bytes(), beside[0].relative_to(folder).as_posix(), problems)
        repeats, words = _kohya(path, folder)
        captions = captions or told.get(path, ())
        found.append(Picture(name, path, captions or words, repeats))
    lone = [path for path in files if path.suffix.lower() in CAPTIONS and path not in used]
    if lone:
        names_of_lone = ", ".join(path.relative_to(folder).as_posix() for path in lone)
        warnings.warn(f"No picture has the name of {names_of_lone}; nothing is read from there.", stacklevel=3)
    return found, problems


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _kohya(path: Path, folder: Path) -> tuple[int, tuple[str, ...]]:
    """How often a picture is shown, and its caption, where it lies in a folder ``10_red fox``; else (1, ())."""
    parent = path.parent if path.parent != folder else folder.absolute()
    found = re.fullmatch(REPEATS, parent.name)
    return (max(int(found[1]), 1), (found[2].replace("_", " "),)) if found else (1, ())


def _lines(data: bytes, name: str, problems: list[str]) -> tuple[str, ...]:
    """The captions in a text file; what is wrong with it goes to ``problems``."""
    try:
        lines = tuple(line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip())
    except UnicodeDecodeError:
        problems.append(f"{name} (not UTF-8)")
        return ("",)
    return lines


def _metadata(path: Path, folder: Path, problems: list[str]) -> dict[Path, tuple[str, ...]]:
    """Picture -> captions, from one metadata file."""
    name = path.relative_to(folder).as_posix()
    told: dict[Path, tuple[str, ...]] = {}
    for number, row in _rows(path, name, problems):
        file, captions = row.get("file_name"), _texts(row)
        if not file or not captions:
            problems.append(
                f"{name} line {number} (must have file_name and text; it has {', '.join(row) or 'nothing'})"
            )
            continue
        picture = path.parent / str(file)
        if not picture.is_file():
            problems.append(f"{name} line {number} (there is no {file})")
        told[picture] = captions
    return told


def _rows(path: Path, name: str, problems: list[str]) -> Iterator[tuple[int, Mapping[str, object]]]:
    """The objects of a ``.jsonl`` or the rows of a ``.csv`` file, with their line numbers."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        problems.append(f"{name} (not UTF-8)")
        return
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text))
        yield from ((reader.line_num, row) for row in reader)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                yield number, row
            else:
                problems.append(f"{name} line {number} (not a JSON object)")


def _texts(row: Mapping[str, object]) -> tuple[str, ...]:
    """The captions of a row: the first field there is of `TEXT_FIELDS`, a text or a list of texts."""
    value = next((row[name] for name in TEXT_FIELDS if row.get(name)), ())
    texts = [value] if isinstance(value, str) else value
    return tuple(str(text).strip() for text in texts if str(text).strip()) if isinstance(texts, Sequence) else ()


def _in_shards(pattern: str) -> tuple[list[Picture], list[str]]:
    """The pictures in webdataset shards, and what is wrong."""
    found: list[Picture] = []
    problems: list[str] = []
    for path in _shards(pattern):
        if path.suffix != ".tar":
            problems.append(
                f"{path.name} (compressed; unpack it to a plain .tar, for its pictures are read in any order)"
            )
            continue
        groups: dict[str, dict[str, tarfile.TarInfo]] = {}
        try:
            with tarfile.open(path, "r:") as shard:
                for member in shard:
                    folder, base = os.path.split(member.name)
                    if member.isfile() and not base.startswith("."):
                        key, _, suffix = base.partition(".")
                        groups.setdefault(f"{folder}/{key}" if folder else key, {})[f".{suffix.lower()}"] = member
        except (tarfile.TarError, OSError, EOFError) as error:
            problems.append(f"{path.name} ({error})")
        for key, members in groups.items():
            picture = _member(path, key, members, problems)
            if picture is not None:
                found.append(picture)
    return found, problems


def _member(path: Path, key: str, members: Mapping[str, tarfile.TarInfo], problems: list[str]) -> Picture | None:
    """One sample of a shard; None when it holds no picture."""
    suffix = next((suffix for suffix in PICTURES if suffix in members), None)
    name = f"{path.name}: {key}"
    if suffix is None:
        if not {".txt", ".json", ".caption"}.isdisjoint(members):
            problems.append(f"{name} (no picture; it has {', '.join(members)})")
        return None
    captions: tuple[str, ...] = ()
    for kind in (*CAPTIONS, ".json"):
        if kind in members and not captions:
            data = Picture(name, path, offset=members[kind].offset_data, length=members[kind].size).read()
            captions = _json_texts(data, name, problems) if kind == ".json" else _lines(data, name + kind, problems)
    return Picture(name, path, captions, offset=members[suffix].offset_data, length=members[suffix].size)


def _json_texts(data: bytes, name: str, problems: list[str]) -> tuple[str, ...]:
    try:
        row = json.loads(data)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        problems.append(f"{name}.json (not a JSON object)")
        return ("",)
    return _texts(row)


def _shards(pattern: str) -> list[Path]:
    """The files that a brace or glob pattern stands for.

    Raises:
        FileNotFoundError: some are not there; all of them are named.
    """
    paths: list[Path] = []
    missing: list[str] = []
    for name in braces(str(Path(pattern).expanduser())):
        found = sorted(glob.glob(name)) if glob.has_magic(name) else [name] if Path(name).is_file() else []
        paths += map(Path, found)
        missing += [] if found else [name]
    if missing:
        raise FileNotFoundError(f"There is no {', '.join(missing)}.")
    return paths


def braces(pattern: str) -> list[str]:
    """What a pattern with ``{a,b}`` and ``{000..041}`` stands for, in order, as a shell expands it."""
    found = re.search(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        step = 1 if last >= first else -1
        digits = len(numbers[1]) if numbers[1].startswith("0") else 0
        parts = [f"{value:0{digits}}" for value in range(first, last + step, step)]
    else:
        parts = found[1].split(",")
    return [text for part in parts for text in braces(pattern[: found.start()] + part + pattern[found.end() :])]


def _prompts(path: Path, caption: str | None) -> tuple[str, ...]:
    problems: list[str] = []
    if path.suffix in (".jsonl", ".csv"):
        texts = tuple(text for _, row in _rows(path, path.name, problems) for text in _texts(row))
    elif path.suffix in (".txt", ".caption", ".prompts", ""):
        texts = _lines(path.read_bytes(), path.name, problems)
    else:
        raise DataError(
            f"{path} is no file of prompts; those are .txt with one a line, .jsonl or .csv with text fields."
        )
    if problems:
        raise DataError(f"{path}: {'; '.join(problems)}.")
    if not texts:
        raise DataError(f"{path} holds no prompts; write one a line.")
    return tuple(_worded(text, caption) for text in texts)


def _worded(text: str, caption: str | None) -> str:
    return caption.replace("{}", text) if caption is not None and "{}" in caption else text


def _captioned(found: list[Picture], caption: str | None, problems: list[str]) -> list[Picture]:
    """The pictures with captions; those that have none go to ``problems``."""
    for_all = (caption,) if caption is not None and "{}" not in caption else ()
    done = []
    for picture in found:
        captions = tuple(_worded(text, caption) for text in picture.captions) or for_all
        if not captions:
            stem = PurePosixPath(picture.name).stem
            problems.append(f"{picture.name} (no caption: write {stem}.txt, or give one caption for all)")
        done.append(replace(picture, captions=captions))
    return done


def _examined(found: list[Picture]) -> tuple[list[Picture], list[str]]:
    """The pictures with size and digest, after all of them have been decoded, and what is wrong."""
    # Around all threads: in each of them it would leave behind what another one had set.
    with warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool:
        warnings.simplefilter("ignore")  # of damaged EXIF data and the like, which does no harm here
        results = list(pool.map(_examine, found, chunksize=16))
    problems = [
        f"{picture.name} ({result})" for picture, result in zip(found, results, strict=True) if isinstance(result, str)
    ]
    return [result for result in results if isinstance(result, Picture)], problems


def _examine(picture: Picture) -> Picture | str:
    """The picture with its size and digest, or what is wrong with it."""
    try:
        data = picture.read()
        with PIL.Image.open(io.BytesIO(data)) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            width, height = image.size[::-1] if turned else image.size
            image.draft("RGB", (max(width // 8, 1), max(height // 8, 1)))  # JPEG: all of the data, at an eighth
            image.load()
    except PIL.UnidentifiedImageError:
        return "no picture that can be read"
    except Exception as error:  # Pillow raises most kinds, struct.error and SyntaxError among them
        return " ".join(str(error).split()) or type(error).__name__
    if min(height, width) < SMALLEST:
        return f"{width} x {height} pixels; the shorter side must be at least {SMALLEST}"
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    return replace(picture, height=height, width=width, digest=digest)
