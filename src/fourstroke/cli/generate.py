"""``fourstroke generate``: from the command line to files."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options, pictures
from .console import did_you_mean, note, one_line, warnings_as_notes, without_network
from .options import ANIMATION, CONTROL, LORA, MODEL, OUTPUT, RUNTIME, SIZE, option

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from ..denoise import DenoiseState
    from ..engine import Engine
    from ..request import GenerateRequest, GenerateResult
    from .output import Target
    from .preview import Preview

# Option -> those of which one must be given for it to have an effect.
BELONGING: Mapping[str, tuple[str, ...]] = {
    "strength": ("image",),
    "ip_adapter": ("ip_image",),
    "detect": ("control", "adapter"),
    "windows": ("num_frames",),
    "window_length": ("num_frames",),
    "fps": ("num_frames",),
}
# Fields of the request that the engine sets as model and LoRAs want them, unless they are typed.
KNOWN_BETTER = {"num_inference_steps", "guidance_scale", "eta"}


def command() -> Any:
    """The verb with all its options, those of `GenerateRequest` among them, as typer's command object."""
    single = typer.Typer(add_completion=False, rich_markup_mode="rich")
    single.command("generate")(options.with_request_options(generate))
    return typer.main.get_command(single)


def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What the picture should show.")],
    *,
    size: Annotated[str | None, option(SIZE, "Both at once: 768x512, or 512 for a square.", metavar="WxH")] = None,
    control: Annotated[
        list[str] | None,
        option(
            CONTROL,
            "ControlNet and its picture, such as canny:photo.png:0.8; without a number it counts fully. NAME is canny, "
            "depth, pose or lineart, if there is one for the model, or a hub id, folder or file. May be repeated.",
            metavar="NAME:PICTURE:SCALE",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        option(CONTROL, "T2I-Adapter and its picture, likewise. May be repeated.", metavar="NAME:PICTURE:SCALE"),
    ] = None,
    detect: Annotated[
        bool | None,
        option(
            CONTROL,
            "Whether to draw edges, depth, pose or lines from the pictures first; if not given, all but those that are "
            "white lines on black already.",
            "--detect/--no-detect",
        ),
    ] = None,
    ip_image: Annotated[
        list[str] | None,
        option(CONTROL, "Picture to prompt with, by an IP-Adapter. May be repeated.", metavar="PICTURE:SCALE"),
    ] = None,
    ip_adapter: Annotated[
        str | None,
        option(CONTROL, "IP-Adapter: base, plus, plus-face, full-face, or hub id and file.", metavar="NAME"),
    ] = None,
    lora: Annotated[
        list[str] | None,
        option(
            LORA,
            "LoRA to add, such as style.safetensors:0.8; without a number at its usual weight. One that is known for "
            "few steps (Hyper-SD, Lightning, TCD, …) brings its scheduler, steps and guidance. May be repeated.",
            metavar="NAME:WEIGHT",
            complete=options.complete_loras,
        ),
    ] = None,
    lcm: Annotated[
        bool,
        option(
            LORA,
            "Set up for few steps: as model or LoRAs are known to want it, else by the LCM scheduler and the LCM-LoRA "
            "of the model's family. Without it give --steps 25 --guidance 7.5 or so.",
        ),
    ] = True,
    motion: Annotated[
        str | None, option(ANIMATION, "Motion adapter in place of the usual one.", metavar="NAME")
    ] = None,
    windows: Annotated[
        bool, option(ANIMATION, "Paint in overlapping windows, for more frames than the adapter can.", "--windows")
    ] = False,
    window_length: Annotated[
        int | None, option(ANIMATION, "Frames a window, 16 if not given; needs no --windows.")
    ] = None,
    fps: Annotated[float, option(ANIMATION, "Frames a second.", min=0.1, max=100)] = 10.0,
    model: Annotated[
        str,
        option(
            MODEL,
            "Shipped name, hub id, folder, or single-file checkpoint (.safetensors).",
            *("--model", "-m"),
            complete=options.complete_models,
        ),
    ] = "emoji",
    scheduler: Annotated[
        str | None,
        option(
            MODEL,
            f"Noise scheduler in place of the one that fits: {', '.join(options.SAMPLERS)}.",
            complete=options.complete_schedulers,
        ),
    ] = None,
    device: Annotated[str | None, option(MODEL, "cpu, cuda, cuda:1, mps; the GPU if there is one.")] = None,
    dtype: Annotated[
        str | None,
        option(
            MODEL,
            "float32, bfloat16 or float16; if not given, float16 on a GPU, and on a CPU float32, or what OpenVINO is "
            "fastest in.",
            complete=options.complete_dtypes,
        ),
    ] = None,
    backend: Annotated[
        str,
        option(
            RUNTIME,
            "What runs the networks: eager (torch), openvino, compile, cudagraph; auto is the fastest that is there.",
            complete=options.complete_choices("backend"),
        ),
    ] = "auto",
    quantize: Annotated[
        str | None,
        option(
            RUNTIME,
            "int8: UNet and decoder in 8 bits, on a CPU with OpenVINO.",
            complete=options.complete_choices("quantize"),
        ),
    ] = None,
    vae: Annotated[
        str,
        option(
            RUNTIME,
            "What decodes: full, tiny (faster, less detail) or tiled (large pictures in little memory).",
            complete=options.complete_choices("vae"),
        ),
    ] = "full",
    offload: Annotated[
        bool,
        option(
            RUNTIME,
            "Keep networks in memory while they do not work on the GPU; on a CPU, weights on the disk.",
            "--offload",
        ),
    ] = False,
    offline: Annotated[bool, option(MODEL, "Use what is in the hub's cache; ask no network.", "--offline")] = False,
    output: Annotated[
        str | None,
        option(
            OUTPUT,
            "Where to save, as PNG, JPEG or WebP; animations as GIF, WebP or MP4. A file that exists is replaced; "
            "several pictures of fox.png are fox-1.png, fox-2.png, … Without it the name is made from prompt and seed, "
            "and nothing is replaced.",
            *("--output", "-o"),
            metavar="FILE|FOLDER",
        ),
    ] = None,
    grid: Annotated[bool, option(OUTPUT, "Save several pictures as one, too; of fox.png it is fox.png itself.")] = True,
    preview: Annotated[bool, option(OUTPUT, "Show the picture in the terminal as it comes, if it can.")] = True,
    as_json: Annotated[bool, option(OUTPUT, "Print one JSON object instead of paths.", "--json")] = False,
    debug: Annotated[bool, option(OUTPUT, "Show the traceback of an error.", "--debug")] = False,
    **fields: Any,
) -> None:
    """Paint and save; every option is described by its help text."""
    from ..request import Windows
    from .output import Target

    given = typed(context)
    frames = fields["num_frames"]
    target = Target.parse(output, animated=frames is not None)
    steering = {"controls": control, "adapters": adapter, "ip_adapter_image": ip_image}
    shown = pictures.parse({**fields, **steering}, ip_adapter)
    fields = {name: value for name, value in fields.items() if name not in (*pictures.FLAGS, *(KNOWN_BETTER - given))}
    fields |= options.picture_size(size, fields.pop("width"), fields.pop("height"))
    if windows or window_length is not None:
        length = 16 if window_length is None else window_length
        fields["windows"] = Windows(length, min(Windows.stride, length))
    sampler = None if scheduler is None else options.find_sampler(scheduler)[:2]
    # After what can be told without torch.
    from ..engine import Engine, where_to_run
    from ..families import look_at
    from ..runtime.options import RuntimeOptions

    with warnings_as_notes(options.in_flags), field_names_as_flags(), without_network(offline):
        options.check_choices(backend=backend, quantize=quantize, vae=vae)
        runtime = RuntimeOptions(backend, quantize, vae, offload)
        place, kind = where_to_run(device, options.find_dtype(dtype))
        where = {"device": place, "dtype": None if dtype is None else kind}
        pictures.open_all(shown, frames, offline)
        request = make_request(prompt, fields | pictures.request_fields(shown))
        started = time.perf_counter()
        with quiet_loading(model, lora or []):
            base = look_at(model)
            base.check(request)
            fields |= pictures.prepare(shown, base, fields, detect)
            how: Any = {"lcm": lcm, "motion": motion, "scheduler": sampler, **where, "runtime": runtime}
            engine = Engine(base, loras=lora or [], **how)
            request = engine.request(prompt, **fields, **pictures.request_fields(shown))
            engine.load(request)
        loaded = time.perf_counter()
        result = run(engine, request, preview=preview)
        done = time.perf_counter()
    settings = settings_of(engine, result, fps) | pictures.told(shown)
    paths = write(target, result, settings, grid=grid)
    seconds = {"load": round(loaded - started, 3), "generate": round(done - loaded, 3)}
    report(paths, settings, result, seconds, as_json)


# Before the work.


def typed(context: typer.Context) -> set[str]:
    """The parameters that are on the command line, after a check that none of them needs another (see `BELONGING`).

    Raises:
        ValueError: one is given without those that it belongs to.
    """
    given = {name for name in context.params if context.get_parameter_source(name).name != "DEFAULT"}  # pyright: ignore
    flags = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    for name, others in BELONGING.items():
        if name in given and not given & {*others}:
            raise ValueError(f"{flags[name]} has no effect without {' or '.join(flags[other] for other in others)}.")
    return given


@contextlib.contextmanager
def field_names_as_flags() -> Iterator[None]:
    """Errors about the request inside speak of ``--steps`` where the library says ``num_inference_steps``.

    Raises:
        ValueError: one was raised inside; its text is in the command line's words.
    """
    try:
        yield
    except ValueError as error:
        text = options.in_flags(str(error))
        if text == str(error):
            raise
        raise ValueError(text) from error


def make_request(prompt: str, fields: dict[str, Any]) -> GenerateRequest:
    """The request, checked as far as that goes without a model.

    Raises:
        ValueError, TypeError: a field breaks a rule of `GenerateRequest`, or of the command line.
    """
    from ..request import GenerateRequest

    request = GenerateRequest(prompt=prompt, **fields)
    if request.seed is not None and not 0 <= request.seed <= 2**63 - request.batch_size:
        raise ValueError(f"--seed is {request.seed}; it must be from 0 to 2**63 - 1. Leave it out for a random one.")
    if not math.isfinite(request.guidance_scale):
        raise ValueError(f"--guidance is {request.guidance_scale}; it must be a number.")
    return request


@contextlib.contextmanager
def quiet_loading(model: str, loras: list[str]) -> Iterator[None]:
    """Keep the progress bars of loading out of a stderr that nobody watches, and suggest other names.

    Raises:
        FileNotFoundError: one was raised inside; its text goes on with a similar name, where there is one.
    """
    try:
        with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
            yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{similar(model, [lora.partition(':')[0] for lora in loras])}") from error


def similar(model: str, loras: list[str]) -> str:
    """`` Did you mean …?`` for the first of the names that stands for nothing on this machine."""
    from .. import hub

    for name, complete in ((model, options.complete_models), *((lora, options.complete_loras) for lora in loras)):
        if hub.local_folder(name) is None and not Path(name).expanduser().is_file():
            folder = name.rpartition("/")[0]
            return did_you_mean(name, complete("") + complete(folder + "/" if folder else ""))
    return ""


# The work.


def run(engine: Engine, request: GenerateRequest, *, preview: bool) -> GenerateResult:
    """Paint, with a progress bar and a preview on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr)
    screen, painter = open_preview(engine, console) if preview else (None, None)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Refreshed after each step, not by a thread of its own, which would draw over the preview.
    plain: dict[str, Any] = {
        "transient": True,
        "auto_refresh": False,
        "redirect_stdout": False,
        "redirect_stderr": False,
    }
    with Progress(*columns, console=console, disable=not sys.stderr.isatty(), **plain) as progress:
        task = progress.add_task("steps", total=request.num_inference_steps)
        progress.refresh()

        def on_step(state: DenoiseState) -> None:
            if screen is not None and painter is not None:
                screen.show(painter(stills(state.latents if state.denoised is None else state.denoised)))
            progress.update(task, completed=state.index + 1, total=len(state.timesteps), refresh=True)

        result = engine.generate(request, on_step=on_step)
    if screen is not None:
        screen.show([image[len(image) // 2] if isinstance(image, list) else image for image in result.images])
    return result


def stills(latents: Tensor) -> Tensor:
    """Latents of pictures as they are, and of animations those of their middle frames: (N, 4, h, w)."""
    return latents if latents.ndim == 4 else latents[:, :, latents.shape[2] // 2]


def open_preview(engine: Engine, console: Console) -> tuple[Preview | None, Callable[..., Any] | None]:
    """The place for previews and what makes them, or None twice where they cannot be shown."""
    from .preview import Preview, previewer

    screen = Preview.on(sys.stderr, os.environ, console.color_system == "truecolor")
    return (screen, previewer(engine)) if screen is not None else (None, None)


# After the work.


def write(target: Target, result: GenerateResult, settings: Mapping[str, Any], *, grid: bool) -> list[Path]:
    """Save the pictures or animations; return the paths, the grid's last."""
    from .output import encode, encode_animation, make_grid, save

    images, seeds = result.images, list(result.seeds or ())
    grid = grid and len(images) > 1 and "fps" not in settings
    paths = target.paths(str(result.request.prompt), seeds, grid)
    for path, image, seed in zip(paths, images, seeds, strict=False):
        if isinstance(image, list):
            save(path, encode_animation(image, path.suffix, settings["fps"]))
        else:
            # What makes this picture alone, so that it does not matter how many were asked for.
            save(path, encode(image, path.suffix, {**settings, "seed": seed, "num_images_per_prompt": 1}))
    if grid:
        save(paths[-1], encode(make_grid(images), paths[-1].suffix, settings))
    return paths


def settings_of(engine: Engine, result: GenerateResult, fps: float) -> dict[str, Any]:
    """Everything that a picture depends on, but the pictures that it was made from."""
    import platform

    import torch

    from .. import __version__

    request, pipeline = result.request, engine.pipeline
    images = result.images[0] if request.num_frames is not None else result.images
    karras = {"use_karras_sigmas": True} if pipeline.scheduler.config.get("use_karras_sigmas") else {}
    values = {
        "prompt": request.prompt,
        **{field.name: getattr(request, field.name) for field in options.request_fields() if field.type != "Any"},
        "strength": None if request.image is None else request.change,
        "timesteps": request.timesteps,
        "width": images[0].width,
        "height": images[0].height,
        "model": engine.base.name,
        "loras": [{"name": file.name, "weight": file.weight} for file in engine.plan.loras],
        "scheduler": type(pipeline.scheduler).__name__,
        "scheduler_options": {**karras, **engine.scheduler_options},
        "device": pipeline.device.type,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "versions": {"fourstroke": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    if request.num_frames is not None:
        windows = request.windows and [request.windows.length, request.windows.stride]
        values |= {"motion": engine.plan.motion, "fps": fps, "windows": windows}
    return {name: value for name, value in values.items() if value is not None}


def report(
    paths: list[Path], settings: dict[str, Any], result: GenerateResult, seconds: dict[str, float], as_json: bool
) -> None:
    """Tell what there is now: paths (or everything, as JSON) on stdout, remarks on stderr."""
    seeds = list(result.seeds or ())
    flagged = [seed for seed, flag in zip(seeds, result.nsfw_content_detected or (), strict=False) if flag]
    if flagged:
        note(f"The model's safety checker blacked out the picture of seed {', '.join(map(str, flagged))}.")
    if as_json:
        single, grid = paths[: len(seeds)], paths[len(seeds) :]
        what = {
            "paths": list(map(str, single)),
            "grid": str(grid[0]) if grid else None,
            "seeds": seeds,
            "nsfw_content_detected": result.nsfw_content_detected,
            "settings": settings,
            "seconds": seconds,
        }
        typer.echo(json.dumps(what, ensure_ascii=False))
        return
    if sys.stderr.isatty():
        span = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        typer.secho(
            one_line(
                f"seed {span}, {settings['width']}x{settings['height']}, {seconds['generate']:.2f} s after "
                f"{seconds['load']:.2f} s of loading"
            ),
            dim=True,
            err=True,
        )
    for path in paths:
        typer.echo(str(path))
