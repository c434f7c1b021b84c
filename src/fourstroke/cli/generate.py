"""``fourstroke generate``: from the command line to files."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .console import did_you_mean, note, one_line, warnings_as_notes, without_network
from .options import MODEL, OUTPUT

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from ..denoise import DenoiseState
    from ..engine import Engine
    from ..request import GenerateRequest, GenerateResult
    from .preview import Preview


def command() -> Any:
    """The verb with all its options, those of `GenerateRequest` among them, as typer's command object."""
    single = typer.Typer(add_completion=False, rich_markup_mode="rich")
    single.command("generate")(options.with_request_options(generate))
    return typer.main.get_command(single)


def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture should show.")],
    *,
    size: Annotated[
        str | None,
        typer.Option(metavar="WxH", help="Both at once: 768x512, or 512 for a square.", rich_help_panel="Size"),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="Shipped name, hub id, folder, or single-file checkpoint (.safetensors).",
            rich_help_panel=MODEL,
            autocompletion=options.complete_models,
        ),
    ] = "emoji",
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:WEIGHT",
            help="LoRA to add, such as style.safetensors:0.8; without a number its weight is 1. May be repeated.",
            rich_help_panel=MODEL,
            autocompletion=options.complete_loras,
        ),
    ] = None,
    lcm: Annotated[
        bool,
        typer.Option(
            help="Run with the LCM scheduler and, for a shipped model, its LCM-LoRA. Without it give --steps 25 "
            "--guidance 7.5 or so.",
            rich_help_panel=MODEL,
        ),
    ] = True,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help=f"Noise scheduler in place of LCM's or the model's own: {', '.join(options.SAMPLERS)}.",
            rich_help_panel=MODEL,
            autocompletion=options.complete_schedulers,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:1, mps; the GPU if there is one.", rich_help_panel=MODEL),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; float16 on a GPU and float32 on a CPU if not given.",
            rich_help_panel=MODEL,
            autocompletion=options.complete_dtypes,
        ),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Use what is in the hub's cache; ask no network.", rich_help_panel=MODEL)
    ] = False,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE|FOLDER",
            help="Where to save, as PNG, JPEG or WebP. A file that exists is replaced; several pictures of fox.png are "
            "fox-1.png, fox-2.png, … Without it the name is made from prompt and seed, and nothing is replaced.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    grid: Annotated[
        bool,
        typer.Option(
            help="Save several pictures as one, too; of fox.png it is fox.png itself.", rich_help_panel=OUTPUT
        ),
    ] = True,
    preview: Annotated[
        bool,
        typer.Option(help="Show the picture in the terminal as it comes, if it can.", rich_help_panel=OUTPUT),
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of paths.", rich_help_panel=OUTPUT)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=OUTPUT)
    ] = False,
    **fields: Any,
) -> None:
    """Paint and save; every option is described by its help text."""
    from .output import Target

    target = Target.parse(output)
    fields |= options.picture_size(size, fields.pop("width"), fields.pop("height"))
    sampler = None if scheduler is None else options.find_sampler(scheduler)
    with warnings_as_notes(options.in_flags), field_names_as_flags(), without_network(offline):
        request = make_request(prompt, fields)
        places = {"device": find_device(device), "dtype": None if dtype is None else options.find_dtype(dtype)}
        started = time.perf_counter()
        engine = load(model, lora or [], lcm=lcm, **places)
        if sampler is not None:
            use(engine, sampler)
        loaded = time.perf_counter()
        result = run(engine, request, preview=preview)
        done = time.perf_counter()
    paths, settings = write(target, engine, result, grid=grid)
    seconds = {"load": round(loaded - started, 3), "generate": round(done - loaded, 3)}
    report(paths, settings, result, seconds, as_json)


# Before the work.


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


def find_device(name: str | None) -> torch.device | None:
    """The device called ``name``, if it is here.

    Raises:
        ValueError: there is no such kind of device, or none of it here.
    """
    import torch

    if name is None:
        return None
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in here:
        raise ValueError(f"--device is {name!r}; it is one of {', '.join(here)}, cuda:1.{did_you_mean(name, here)}")
    if (device.index or 0) >= here[device.type]:
        raise ValueError(f"--device is {name!r}, but there is no such device here; use --device cpu.")
    return device


def load(model: str, loras: list[str], *, lcm: bool, device: torch.device | None, dtype: str | None) -> Engine:
    """The engine.

    Raises:
        ValueError, FileNotFoundError: see `Engine`; of names that are not found, the message suggests similar ones.
    """
    import torch

    from ..engine import Engine, parse_lora

    wanted = [parse_lora(text) for text in loras]
    for text, (name, weight) in zip(loras, wanted, strict=True):
        if not math.isfinite(weight):
            raise ValueError(f"--lora {text}: the weight must be a finite number.")
        if name.endswith(".safetensors") and not Path(name).expanduser().is_file():
            raise FileNotFoundError(f"--lora {text}: there is no such file.{similar(model, [name])}")
    if dtype == "float16" and (device or torch.device("cuda" if torch.cuda.is_available() else "cpu")).type == "cpu":
        note("float16 is for GPUs: float32 runs on the CPU instead.")
        dtype = "float32"
    try:
        with quiet_unless_terminal():
            return Engine(model, loras=loras, lcm=lcm, device=device, dtype=getattr(torch, dtype) if dtype else None)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{similar(model, [name for name, _ in wanted])}") from error


def similar(model: str, loras: list[str]) -> str:
    """`` Did you mean …?`` for the first of the names that stands for nothing on this machine."""
    from .. import hub

    for name, complete in ((model, options.complete_models), *((lora, options.complete_loras) for lora in loras)):
        if hub.local_folder(name) is None and not Path(name).expanduser().is_file():
            folder = name.rpartition("/")[0]
            return did_you_mean(name, complete("") + complete(folder + "/" if folder else ""))
    return ""


@contextlib.contextmanager
def quiet_unless_terminal() -> Iterator[None]:
    """Keep the progress bars of loading out of a stderr that nobody watches."""
    if sys.stderr.isatty():
        yield
    else:
        with contextlib.redirect_stderr(io.StringIO()):
            yield


def use(engine: Engine, sampler: options.Sampler) -> None:
    """Put another scheduler into the pipeline."""
    from .. import schedulers

    kind = getattr(schedulers, sampler.scheduler)
    engine.pipeline.scheduler = kind.from_config(engine.pipeline.scheduler.config, **sampler.options)


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
                screen.show(painter(state.latents if state.denoised is None else state.denoised))
            progress.update(task, completed=state.index + 1, total=len(state.timesteps), refresh=True)

        result = engine.generate(request, on_step=on_step)
    if screen is not None:
        screen.show(result.images)
    return result


def open_preview(engine: Engine, console: Console) -> tuple[Preview | None, Callable[..., Any] | None]:
    """The place for previews and what makes them, or None twice where they cannot be shown."""
    from .preview import Preview, previewer

    screen = Preview.on(sys.stderr, os.environ, console.color_system == "truecolor")
    return (screen, previewer(engine)) if screen is not None else (None, None)


# After the work.


def write(target: Any, engine: Engine, result: GenerateResult, *, grid: bool) -> tuple[list[Path], dict[str, Any]]:
    """Save the pictures; return the paths (the grid's last) and the settings."""
    from .output import encode, make_grid, save

    images, seeds = result.images, list(result.seeds or ())
    settings = settings_of(engine, result.request, images[0].size)
    grid = grid and len(images) > 1
    paths = target.paths(str(result.request.prompt), seeds, grid)
    for path, image, seed in zip(paths, images, seeds, strict=False):
        # What makes this picture alone, so that it does not matter how many were asked for.
        save(path, encode(image, path.suffix, {**settings, "seed": seed, "num_images_per_prompt": 1}))
    if grid:
        save(paths[-1], encode(make_grid(images), paths[-1].suffix, settings))
    return paths, settings


def settings_of(engine: Engine, request: GenerateRequest, size: tuple[int, int]) -> dict[str, Any]:
    """Everything that a picture depends on."""
    import platform

    import torch

    from .. import __version__

    pipeline = engine.pipeline
    config = pipeline.scheduler.config
    return {
        "prompt": request.prompt,
        **{field.name: getattr(request, field.name) for field in options.request_fields()},
        "width": size[0],
        "height": size[1],
        "model": engine.model,
        "loras": [{"name": name, "weight": weight} for name, weight in engine.loras],
        "scheduler": type(pipeline.scheduler).__name__,
        "scheduler_options": {name: True for name in ("use_karras_sigmas",) if config.get(name)},
        "device": pipeline.device.type,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "versions": {"fourstroke": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


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
