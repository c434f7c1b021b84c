"""``fourstroke bench``: how fast one's own model is on one's own machine, in every way that it can run there."""

from __future__ import annotations

import csv
import io
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .console import note, warnings_as_notes, without_network
from .options import LORA, MODEL, OUTPUT, option

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from rich.table import Table

# What is compared: name -> fields of `RuntimeOptions`; the first is torch as it is.
WAYS: Mapping[str, Mapping[str, Any]] = {
    "eager": {"backend": "eager"},
    "eager, tiny VAE": {"backend": "eager", "vae": "tiny"},
    "openvino": {"backend": "openvino"},
    "openvino, int8": {"quantize": "int8"},
    "openvino, int8, tiny VAE": {"quantize": "int8", "vae": "tiny"},
    "compile": {"backend": "compile"},
    "cudagraph": {"backend": "cudagraph"},
    "cudagraph, tiny VAE": {"backend": "cudagraph", "vae": "tiny"},
}
USUAL = ("eager", "openvino", "openvino, int8", "cudagraph")
BAR = 30  # characters of the slowest way's bar


def command() -> Any:
    """The verb with its options, as typer's command object."""
    single = typer.Typer(add_completion=False, rich_markup_mode="rich")
    single.command("bench")(bench)
    return typer.main.get_command(single)


def bench(
    model: Annotated[
        str,
        typer.Argument(
            help="Shipped name, hub id, folder, or single-file checkpoint.", autocompletion=options.complete_models
        ),
    ] = "emoji",
    *,
    way: Annotated[
        list[str] | None,
        option(
            MODEL,
            f"A way to run it: {'; '.join(WAYS)}. May be repeated; if not given, those of {', '.join(USUAL)} that can "
            "run here.",
            metavar="NAME",
            complete=lambda incomplete: [name for name in WAYS if name.startswith(incomplete)],
        ),
    ] = None,
    steps: Annotated[int, option(MODEL, "Steps a picture.", min=1)] = 4,
    size: Annotated[str | None, option(MODEL, "The model's own if not given.", metavar="WxH")] = None,
    repeats: Annotated[int, option(MODEL, "Pictures in each way, which take turns.", min=1)] = 3,
    lora: Annotated[
        list[str] | None,
        option(LORA, "LoRA to add. May be repeated.", metavar="NAME:WEIGHT", complete=options.complete_loras),
    ] = None,
    device: Annotated[str | None, option(MODEL, "cpu, cuda, cuda:1, mps; the GPU if there is one.")] = None,
    offline: Annotated[bool, option(MODEL, "Use what is in the hub's cache; ask no network.", "--offline")] = False,
    output: Annotated[
        str | None, option(OUTPUT, "Write the table as CSV, too.", *("--output", "-o"), metavar="FILE.csv")
    ] = None,
    as_json: Annotated[bool, option(OUTPUT, "Print one JSON object instead of a table.", "--json")] = False,
    debug: Annotated[bool, option(OUTPUT, "Show the traceback of an error.", "--debug")] = False,
) -> None:
    """Measure; every option is described by its help text.

    Raises:
        ValueError: there is no such way, or a size that is none.
        RuntimeError: none of the ways runs.
    """
    for name in way or ():
        if name not in WAYS:
            raise ValueError(f"--way is {name!r}; it is one of {'; '.join(WAYS)}.")
    fields: dict[str, Any] = {"num_inference_steps": steps}
    if size is not None:
        fields["width"], fields["height"] = options.parse_size(size)
    with warnings_as_notes(), without_network(offline):
        names = way or [name for name in USUAL if can_run(name, device)]
        task = {"model": model, "loras": lora or [], "device": device, "fields": fields, "offline": offline}
        rows = measure(names, task, repeats)
    if not rows:
        raise RuntimeError("Nothing of it could run; the notes above say why.")
    if output is not None:
        write_csv(Path(output), rows)
    if as_json:
        typer.echo(json.dumps({"model": model, "rows": rows}))
    else:
        show(rows)


def can_run(name: str, device: str | None) -> bool:
    """Whether a way is made for what is here."""
    from ..engine import where_to_run
    from ..runtime.openvino import available

    kind = where_to_run(device, None)[0].type
    if name.startswith("openvino"):
        return kind == "cpu" and available()
    return kind == "cuda" if name.startswith("cudagraph") else True


def measure(names: list[str], task: Mapping[str, Any], repeats: int) -> list[dict[str, Any]]:
    """Seconds and memory of each way, in a process of its own; they take turns, one at a time.

    Returns:
        A row a way that runs; the others are told as notes.

    Raises:
        RuntimeError: a way that ran once does so no more.
    """
    context = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Any, Connection]] = {}
    rows: dict[str, dict[str, Any]] = {}
    try:
        for name in names:
            here, there = context.Pipe()
            process = context.Process(target=work, args=(there, {**task, "runtime": WAYS[name]}), daemon=True)
            process.start()
            there.close()
            workers[name] = process, here
            answer = receive(here)
            if "error" in answer:
                note(f"{name}: {answer['error']}")
                process.join()
                del workers[name]
            else:
                rows[name] = {"way": name, **answer}
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(repeats):
            for name, (_, here) in workers.items():
                here.send("paint")
                answer = receive(here)
                if "error" in answer:
                    raise RuntimeError(f"{name}: {answer['error']}")
                seconds[name].append(answer["seconds"])
                rows[name]["peak_mb"] = answer["peak_mb"]
    finally:
        for process, here in workers.values():
            here.close()
            process.join(timeout=10)
            process.terminate()
    for name, values in seconds.items():
        rows[name] |= {"median_s": statistics.median(values), "min_s": min(values), "max_s": max(values)}
    return [rows[name] for name in seconds]


def receive(connection: Connection) -> dict[str, Any]:
    """A worker's answer; that it died is an error like others."""
    try:
        return connection.recv()
    except EOFError:
        return {"error": "the process ended, perhaps for want of memory"}


def work(connection: Connection, task: Mapping[str, Any]) -> None:
    """What runs in a process: load, paint once, then once more for every message."""
    try:
        with without_network(task["offline"]):  # the parent's is its own
            for answer in answers(task):
                connection.send(answer)
                connection.recv()
    except EOFError:
        return
    except Exception as error:  # told by the parent
        connection.send({"error": str(error)})


def answers(task: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """First what loading and the first picture take, then the seconds of each further picture."""
    import torch

    from ..engine import Engine
    from ..runtime.options import RuntimeOptions

    def paint(seed: int) -> float:
        start = time.perf_counter()
        # A prompt of its own, so that reading it counts.
        engine.generate(f"a red fox in the snow, number {seed}", seed=seed, **task["fields"])
        return time.perf_counter() - start

    start = time.perf_counter()
    runtime = RuntimeOptions(**task["runtime"])
    engine = Engine(task["model"], loras=task["loras"], device=task["device"], runtime=runtime)
    loaded = time.perf_counter() - start
    cuda = engine.pipeline.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    yield {"load_s": loaded, "first_s": paint(0), "dtype": str(engine.pipeline.dtype).removeprefix("torch.")}
    for seed in itertools.count(1):
        seconds = paint(seed)
        peak = torch.cuda.max_memory_allocated() if cuda else peak_memory()
        yield {"seconds": seconds, "peak_mb": round(peak / 2**20)}


def peak_memory() -> int:
    """The most memory that this process has had, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    import sys

    # Linux counts kilobytes, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write ``rows``, atomically."""
    from ..loading import write_atomically

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda temporary: temporary.write_text(text.getvalue(), encoding="utf-8"))


def show(rows: list[dict[str, Any]]) -> None:
    """Print ``rows`` as a table with bars."""
    from rich.console import Console

    Console().print(table_of(rows))


def table_of(rows: list[dict[str, Any]]) -> Table:
    """The table: seconds a picture, spread, how many times faster than the first way, and a bar of the seconds."""
    from rich.table import Table

    table = Table("way", "s a picture", "spread", "faster", "first picture", "load", "memory", "")
    base, slowest = rows[0]["median_s"], max(row["median_s"] for row in rows)
    for row in rows:
        table.add_row(
            row["way"],
            f"{row['median_s']:.2f}",
            f"{row['min_s']:.2f}-{row['max_s']:.2f}",
            f"{base / row['median_s']:.2f}x",
            f"{row['first_s']:.1f} s",
            f"{row['load_s']:.1f} s",
            f"{row['peak_mb'] / 1024:.1f} GB",
            "█" * max(1, round(BAR * row["median_s"] / slowest)),
        )
    return table
