"""Whole commands side by side: interleaved runs, medians, and a row in a CSV file for each comparison."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


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


def report(benchmark: str, seconds: Mapping[str, Sequence[float]], packages: str, threads: int) -> None:
    """Print the medians and append them to ``results/{benchmark}.csv``; ratios are to the first command."""
    base = statistics.median(next(iter(seconds.values())))
    print(f"{benchmark}: {packages}, {threads} threads, {len(next(iter(seconds.values())))} runs each")
    path = RESULTS / f"{benchmark}.csv"
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(
                ["date", "command", "median_s", "min_s", "max_s", "runs", "ratio", "threads", "machine", "versions"]
            )
        for name, values in seconds.items():
            median = statistics.median(values)
            print(f"  {name:<24} {median:7.3f} s  ({min(values):.3f} to {max(values):.3f})  x{median / base:.2f}")
            row = [f"{median:.4f}", f"{min(values):.4f}", f"{max(values):.4f}", len(values), f"{median / base:.3f}"]
            date = datetime.date.today().isoformat()
            writer.writerow([date, name, *row, threads, machine(), packages])


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
