"""`fourstroke bench`: ways in turn, each in its own process, as a table, CSV and JSON; what cannot run is told."""

from __future__ import annotations

import csv
import importlib
import io
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fourstroke.cli import app
from fourstroke.runtime.options import RuntimeOptions

bench = importlib.import_module("fourstroke.cli.bench")  # in the package the name is the verb's


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_every_way_is_a_runtime() -> None:
    for fields in bench.WAYS.values():
        RuntimeOptions(**fields)
    assert set(bench.USUAL) <= set(bench.WAYS)


def test_ways_take_turns_and_are_told(tmp_path: Path) -> None:
    file = tmp_path / "speed.csv"
    ways = ("--way", "eager", "--way", "cudagraph")
    told = run("emoji", *ways, "--steps", "1", "--repeats", "2", "-o", str(file), "--json")
    rows = json.loads(told.strip().splitlines()[-1])["rows"]
    assert [row["way"] for row in rows] == ["eager"]
    assert "needs an NVIDIA GPU" in told
    row = rows[0]
    assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"] and row["load_s"] > 0 and row["first_s"] > 0
    assert row["peak_mb"] > 100 and row["dtype"] == "float32"
    written = [*csv.DictReader(file.read_text().splitlines())]
    assert [line["way"] for line in written] == ["eager"] and float(written[0]["median_s"]) == row["median_s"]


def test_a_way_that_is_none() -> None:
    assert "--way is 'fast'" in run("--way", "fast", code=2)


def test_no_way_runs() -> None:
    assert "Nothing of it could run" in run("--way", "cudagraph", code=1)


def test_the_table_compares_with_the_first_way() -> None:
    from rich.console import Console

    row = {"way": "a", "median_s": 2.0, "min_s": 2.0, "max_s": 2.5, "first_s": 3.0, "load_s": 1.0, "peak_mb": 2048}
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(bench.table_of([row, {**row, "way": "b", "median_s": 0.5}]))
    first, second = [line for line in console.export_text().splitlines() if "2.0 GB" in line]
    assert "1.00x" in first and "4.00x" in second
    assert first.count("█") == bench.BAR and second.count("█") == round(bench.BAR / 4)


@pytest.mark.parametrize(("name", "device", "can"), [("eager", "cpu", True), ("cudagraph", "cpu", False)])
def test_what_is_made_for_what_is_here(name: str, device: str, can: bool) -> None:
    assert bench.can_run(name, device) is can
