"""What all benchmarks share: medians, interleaved commands, and the one writer of tables.

Every benchmark is a list of rows. `write` puts them into ``results/{benchmark}.csv``, where they replace those of its
last run, and draws all such files as Markdown tables in ``results/README.md``.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("diffusers", "transformers", "peft", "openvino", "openvino-genai")
PACKAGES = ("torch", "fourstroke", *LIBRARIES, "stable-diffusion-cpp-python", "streamdiffusion")
# Columns that say where and when: one line above a table.
CIRCUMSTANCES = ("date", "threads", "machine", "versions")
Row = dict[str, Any]


def arguments(description: str | None, repeats: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats, help=f"measured runs of each; default {repeats}")
    parser.add_argument("--threads", type=int, default=2, help="of each process; default 2")
    parser.add_argument(
        "--output", type=Path, help="folder of the tables; default results/ (a temporary one with --tiny)"
    )
    parser.add_argument("--tiny", action="store_true", help="one run of tiny models: does it work?")
    return parser


def interleave(commands: Mapping[str, Sequence[str]], repeats: int, env: Mapping[str, str]) -> dict[str, list[float]]:
    """Seconds of every run of every command. One unmeasured round warms the disk's cache; then the commands take turns.

    Raises:
        RuntimeError: a command fails; its standard error is in the message.
    """
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for i in range(repeats + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            run = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)
            elapsed = time.perf_counter() - start
            if run.returncode != 0:
                raise RuntimeError(f"{name} exited with {run.returncode}:\n{run.stderr}")
            if i:
                seconds[name].append(elapsed)
    return seconds


def versions(*packages: str) -> str:
    """The versions in one line; ``-`` for what is not installed."""
    found = []
    for package in ("python", *packages):
        try:
            found.append(f"{package} {platform.python_version() if package == 'python' else version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} -")
    return ", ".join(found)


def summary(seconds: Sequence[float], base: float | None = None) -> Row:
    """Median and spread of some runs, and the ratio of the median to ``base``, that of what they are held against."""
    median = statistics.median(seconds)
    row: Row = {"median_s": round(median, 5), "min_s": round(min(seconds), 5), "max_s": round(max(seconds), 5)}
    row |= {"runs": len(seconds), "ratio": round(median / (base or median), 4)}
    return row


def report(benchmark: str, seconds: Mapping[str, Sequence[float]], options: argparse.Namespace) -> None:
    """Print and write the medians of interleaved commands; ratios are to the first command."""
    base = statistics.median(next(iter(seconds.values())))
    write(benchmark, [{"command": name} | summary(values, base) for name, values in seconds.items()], options)


def write(benchmark: str, rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Print ``rows``, write them to ``{benchmark}.csv`` and draw all tables of that folder anew."""
    where: Row = {"date": datetime.date.today().isoformat(), "threads": options.threads}
    where |= {"machine": machine(), "versions": versions(*PACKAGES)}
    columns = list(dict.fromkeys(name for row in rows for name in row))
    folder = output_of(options)
    with (folder / f"{benchmark}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *where])
        writer.writeheader()
        writer.writerows({**row, **where} for row in rows)
    print("\n".join(section(folder / f"{benchmark}.csv")), flush=True)
    intro = "# Results\n\nWritten by the benchmarks; `make bench` runs all of them.\n"
    tables = ["\n".join(section(path)) for path in sorted(folder.glob("*.csv"))]
    (folder / "README.md").write_text("\n".join([intro, *tables]))


def output_of(options: argparse.Namespace) -> Path:
    """The folder of the tables; trials do not touch the real ones."""
    trial = Path(tempfile.gettempdir()) / "fourstroke-bench"
    folder: Path = options.output or (trial if options.tiny else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def section(path: Path) -> list[str]:
    """A CSV file as the lines of a Markdown section: where it was measured, the table, and a plot if there is one."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    where = {name: sorted({row.get(name) or "-" for row in rows}) for name in CIRCUMSTANCES}
    columns = [name for name in rows[0] if name not in CIRCUMSTANCES]
    lines = [f"## {path.stem}", "", f"{'; '.join(where['machine'])}, {', '.join(where['threads'])} threads, "]
    lines[-1] += f"{', '.join(where['date'])}. {'; '.join(where['versions'])}."
    lines += ["", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(row[name] or '' for name in columns)} |" for row in rows]
    if path.with_suffix(".png").exists():
        lines += ["", f"![{path.stem}]({path.stem}.png)"]
    return [*lines, ""]


def machine() -> str:
    """The processor and the number of its cores that may be used."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model} x{cores}"


def python(script: str, *arguments: str) -> list[str]:
    """The command that runs ``script`` in this interpreter."""
    return [sys.executable, "-c", script, *arguments]
