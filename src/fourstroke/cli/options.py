"""The options of ``fourstroke generate``: those that `GenerateRequest` describes itself, and the values people type."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from .console import did_you_mean

# Everyday names of the request's fields; the others are called as the field is.
FLAGS: Mapping[str, tuple[str, ...]] = {
    "num_inference_steps": ("--steps",),
    "guidance_scale": ("--guidance",),
    "num_images_per_prompt": ("--num", "-n"),
    "negative_prompt": ("--negative",),
    "mask_image": ("--mask",),
    "padding_mask_crop": ("--mask-crop",),
    "num_frames": ("--frames",),
}
# What people who come from other tools type -> the option here.
OTHER_NAMES: Mapping[str, str] = {
    **{"--" + field.replace("_", "-"): flags[0] for field, flags in FLAGS.items()},
    **{"--" + field: flags[0] for field, flags in FLAGS.items()},
    **dict.fromkeys(("--cfg", "--cfg-scale", "--cfg_scale"), "--guidance"),
    **dict.fromkeys(("--n_samples", "--count", "--batch", "--batch-size", "--images"), "--num"),
    **dict.fromkeys(("--sampler", "--sampling-method"), "--scheduler"),
    **dict.fromkeys(("--W", "-W", "--w"), "--width"),
    **dict.fromkeys(("--H", "-H"), "--height"),
    **dict.fromkeys(("--out", "--outdir", "--file", "--save"), "--output"),
    **dict.fromkeys(("--negative_prompt", "--neg"), "--negative"),
    **dict.fromkeys(("--init-image", "--init_image", "--init-img", "--input", "-i"), "--image"),
    **dict.fromkeys(("--denoise", "--denoising-strength", "--denoising"), "--strength"),
    **dict.fromkeys(("--controlnet", "--control-image"), "--control"),
    **dict.fromkeys(("--t2i-adapter", "--t2i"), "--adapter"),
    **dict.fromkeys(("--ip-adapter-image", "--image-prompt"), "--ip-image"),
    **dict.fromkeys(("--motion-adapter", "--motion-module"), "--motion"),
    "--ckpt": "--model",
    "--taesd": "--vae",
    **dict.fromkeys(("--lowvram", "--medvram", "--low-vram", "--cpu-offload"), "--offload"),
    "--fp16": "--dtype",
}
PICTURE, SIZE, START, CONTROL, ANIMATION = "Picture", "Size", "Start picture", "Control", "Animation"
LORA, MODEL, RUNTIME, OUTPUT = "LoRA", "Model", "Runtime", "Output"
PANELS: Mapping[str, str] = {
    **dict.fromkeys(("height", "width"), SIZE),
    **dict.fromkeys(("image", "strength", "mask_image", "padding_mask_crop"), START),
    "num_frames": ANIMATION,
}
# What the library's messages say -> how it is said here.
SAID: Mapping[str, str] = {
    r"\blcm=False": "--no-lcm",
    r"\bmotion=…": "--motion",
    r"^device is ": "--device is ",
    r"; use 'cpu'\.": "; use --device cpu.",
    r"\bwindows=Windows\(length=(\d+)\)": r"--window-length \1",
    r"\bpass image\b": "pass --image",
    r"^quantize='(\w+)' needs backend='(\w+)'; backend is ": r"--quantize \1 needs --backend \2; --backend is ",
    r"^backend '(\w+)' ": r"--backend \1 ",
    r"\(and quantize\)": "(and --quantize)",
    r"^offload ": "--offload ",
    r"\bwith backend='openvino'": "with --backend openvino",
    r"; leave vae='full'\.": "; leave --vae out.",
}
# Annotation of a field -> type of the option's value; what may be anything is a picture, given by its path.
TYPES: Mapping[str, Any] = {
    "Any": str | None,
    "int": int,
    "int | None": int | None,
    "float": float,
    "float | None": float | None,
    "bool": bool,
    "str": str,
    "str | None": str | None,
    "Prompt": str | None,
}
DTYPES: Mapping[str, str] = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}


class Sampler(NamedTuple):
    """A noise scheduler as people name it: its class, the options that make the difference, and A1111's name for it."""

    scheduler: str
    options: Mapping[str, Any]
    label: str


SAMPLERS: Mapping[str, Sampler] = {
    "lcm": Sampler("LCMScheduler", {}, "LCM"),
    "tcd": Sampler("TCDScheduler", {}, "TCD"),
    "ddim": Sampler("DDIMScheduler", {}, "DDIM"),
    "euler": Sampler("EulerDiscreteScheduler", {}, "Euler"),
    "euler-a": Sampler("EulerAncestralDiscreteScheduler", {}, "Euler a"),
    "dpmpp": Sampler("DPMSolverMultistepScheduler", {}, "DPM++ 2M"),
    "dpmpp-karras": Sampler("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "DPM++ 2M"),
}


def request_fields() -> list[dataclasses.Field[Any]]:
    """The fields of `GenerateRequest` that are options: those with a help text."""
    from ..request import GenerateRequest

    return [field for field in dataclasses.fields(GenerateRequest) if "help" in field.metadata]


def flags_of(name: str) -> tuple[str, ...]:
    """The option strings of the request's field ``name``, the main one first."""
    return FLAGS.get(name, ("--" + name.replace("_", "-"),))


def in_flags(text: str) -> str:
    """The library's ``text`` with the options' names for the fields': ``--guidance`` for ``guidance_scale``."""
    names = [field.name for field in request_fields()]
    # A field whose name is an everyday word is meant where a message begins with it.
    compound, plain = "|".join(name for name in names if "_" in name), "|".join(names)
    text = re.sub(rf"\b({compound})\b|^({plain})(?= is )", lambda found: flags_of(found[0])[0], text)
    for pattern, here in SAID.items():
        text = re.sub(pattern, here, text)
    return text


def request_parameters() -> Iterator[inspect.Parameter]:
    """A keyword parameter for each option of the request, annotated as typer wants it.

    Raises:
        TypeError: a field has a type that `TYPES` does not know.
    """
    from rich.markup import escape

    for field in request_fields():
        if field.type not in TYPES:
            raise TypeError(
                f"GenerateRequest.{field.name} is {field.type!r}: add the type to fourstroke.cli.options.TYPES."
            )
        made = typer.Option(
            *flags_of(field.name),
            help=escape(field.metadata["help"]),
            rich_help_panel=PANELS.get(field.name, PICTURE),
            show_default=field.default is not None,
            metavar="PATH|URL" if field.type == "Any" else None,
        )
        kind, annotation = inspect.Parameter.KEYWORD_ONLY, Annotated[TYPES[str(field.type)], made]
        yield inspect.Parameter(field.name, kind, default=field.default, annotation=annotation)


def option(panel: str, help: str, *flags: str, complete: Callable[[str], list[str]] | None = None, **more: Any) -> Any:
    """An option in a ``panel`` of the help text."""
    return typer.Option(*flags, help=help, rich_help_panel=panel, autocompletion=complete, **more)


def with_request_options(verb: Callable[..., None]) -> Callable[..., None]:
    """``verb(context, prompt, *, …, **fields)`` with the request's options for ``fields``, right after ``prompt``."""

    @functools.wraps(verb)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        verb(*args, **kwargs)

    own = list(inspect.signature(verb, eval_str=True).parameters.values())[:-1]
    parameters = [*own[:2], *request_parameters(), *own[2:]]
    vars(wrapper)["__signature__"] = inspect.Signature(parameters)
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


def parse_size(text: str) -> tuple[int, int]:
    """``768x512`` (width, height) or ``512`` (a square) in pixels.

    Raises:
        ValueError: it is neither.
    """
    found = re.fullmatch(r"(\d+)(?:[xX×*](\d+))?", text.strip())
    if found is None:
        raise ValueError(f"--size is {text!r}; write WIDTHxHEIGHT such as 768x512, or one number for a square.")
    return int(found[1]), int(found[2] or found[1])


def check_side(flag: str, pixels: int | None) -> None:
    """Raise a ValueError unless ``pixels`` is a positive multiple of 8 (a model may want a larger factor)."""
    if pixels is not None and (pixels < 8 or pixels % 8):
        down = max(pixels // 8 * 8, 8)
        raise ValueError(f"{flag} is {pixels}; it must be a multiple of 8, such as {down} or {down + 8}.")


def picture_size(size: str | None, width: int | None, height: int | None) -> dict[str, int]:
    """What was said about the size, as fields of the request.

    Raises:
        ValueError: it is said twice, or is no multiple of 8.
    """
    if size is not None:
        if width is not None or height is not None:
            raise ValueError("--size and --width or --height are both given; give one of them.")
        width, height = parse_size(size)
        for pixels in (width, height):
            check_side("--size", pixels)
    check_side("--width", width)
    check_side("--height", height)
    return {name: pixels for name, pixels in (("width", width), ("height", height)) if pixels is not None}


def find_sampler(name: str) -> Sampler:
    """The scheduler called ``name`` (a key of `SAMPLERS`, or the name of a class).

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name.lower() in SAMPLERS:
        return SAMPLERS[name.lower()]
    classes = {sampler.scheduler: sampler for sampler in reversed([*SAMPLERS.values()])}
    if name in classes:
        return classes[name]
    mend = did_you_mean(name, [*SAMPLERS, *classes])
    raise ValueError(f"--scheduler is {name!r}; it is one of {', '.join(SAMPLERS)}.{mend}")


def sampler_label(class_name: str) -> str:
    """A1111's name for a scheduler class, or the class's own name when there is none."""
    labels = {sampler.scheduler: sampler.label for sampler in SAMPLERS.values()}
    return labels.get(class_name, class_name)


def find_dtype(name: str | None) -> Any:
    """Torch's dtype that people call ``name``; None for none.

    Raises:
        ValueError: there is none.
    """
    if name is None:
        return None
    if name.lower() not in DTYPES:
        mend = did_you_mean(name, DTYPES)
        raise ValueError(f"--dtype is {name!r}; it is one of {', '.join(dict.fromkeys(DTYPES.values()))}.{mend}")
    import torch

    return getattr(torch, DTYPES[name.lower()])


def check_choices(**values: str | None) -> None:
    """Check the values of options that are fields of `RuntimeOptions`.

    Raises:
        ValueError: one is none of the field's choices; the message lists them.
    """
    for field, value in values.items():
        known = choices(field)
        if value is not None and value not in known:
            mend = did_you_mean(value, known)
            raise ValueError(f"--{field} is {value!r}; it is one of {', '.join(known)}.{mend}")


def choices(field: str) -> Sequence[str]:
    """The values that the ``field`` of `RuntimeOptions` can have."""
    from ..runtime.options import RuntimeOptions

    return {each.name: each.metadata.get("choices", ()) for each in dataclasses.fields(RuntimeOptions)}[field]


# Completions.


def complete_models(incomplete: str) -> list[str]:
    """Shipped and cached models, and files, that begin with ``incomplete``."""
    from .. import hub
    from .report import cached_names, is_pipeline

    shipped = [name for name in hub.shipped() if is_pipeline(hub.ZOO / name)]
    return _beginning(incomplete, [*hub.ALIASES, *shipped, *cached_names()])


def complete_loras(incomplete: str) -> list[str]:
    """Shipped LoRAs, cached repositories, and files, that begin with ``incomplete``."""
    from .. import hub
    from .report import cached_names, is_lora

    return _beginning(incomplete, [*(name for name in hub.shipped() if is_lora(hub.ZOO / name)), *cached_names()])


def complete_anything(incomplete: str) -> list[str]:
    """Everything shipped or cached, and files, that begin with ``incomplete``."""
    from .. import hub
    from .report import cached_names

    return _beginning(incomplete, [*hub.ALIASES, *hub.shipped(), *cached_names()])


def complete_schedulers(incomplete: str) -> list[str]:
    """The schedulers that begin with ``incomplete``."""
    return [name for name in SAMPLERS if name.startswith(incomplete)]


def complete_choices(field: str) -> Callable[[str], list[str]]:
    """What completes an option that is the ``field`` of `RuntimeOptions`."""

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices(field) if choice.startswith(incomplete)]

    return complete


def complete_dtypes(incomplete: str) -> list[str]:
    """The dtypes that begin with ``incomplete``."""
    return [name for name in DTYPES if name.startswith(incomplete)]


def _beginning(incomplete: str, names: list[str]) -> list[str]:
    prefix, slash, stem = incomplete.rpartition("/")
    folder = Path(prefix + slash).expanduser()
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [
        prefix + slash + path.name + ("/" if path.is_dir() else "")
        for path in inside
        if path.name.startswith(stem) and not path.name.startswith(".")
        if path.is_dir() or path.suffix == ".safetensors"
    ]
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete)] + files
