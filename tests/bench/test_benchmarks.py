"""Every benchmark runs at a tiny size and writes well-formed tables. What they say of speed is not tested."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import BENCHMARKS

WHERE = ["date", "threads", "machine", "versions"]
TIMES = ["median_s", "min_s", "max_s", "runs"]


def run(name: str, output: Path, *arguments: str) -> list[dict[str, str]]:
    """The rows that a benchmark writes."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--tiny", "--threads", "1", "--output", str(output)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = output.glob("*.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    page = (output / "README.md").read_text()
    assert f"## {path.stem}" in page
    assert list(rows[0])[-4:] == WHERE
    assert all(row[name] for row in rows for name in WHERE)
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows)
    assert len({line.count("|") for line in table}) == 1
    return rows


def timed(rows: list[dict[str, str]]) -> bool:
    return all(0 < float(row["min_s"]) <= float(row["median_s"]) <= float(row["max_s"]) for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["import_time", "first_picture"])
def test_whole_commands(name: str, tmp_path: Path) -> None:
    rows = run(name, tmp_path)
    assert timed(rows)
    assert {"fourstroke", "diffusers"} <= {row["command"] for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sdxl-4", "img2img", "controlnet", "animation"])
def test_both_libraries_paint_the_same_picture(case: str, cache: Path, tmp_path: Path) -> None:
    rows = run("pictures", tmp_path, "--cache", str(cache), "--cases", case, "--peers", "diffusers", "fourstroke-fp32")
    assert timed(rows)
    assert [row["peer"] for row in rows] == ["diffusers", "fourstroke-fp32"] * (len(rows) // 2)
    assert all(float(row["psnr_db"]) > 60 and float(row["ssim"]) > 0.999 for row in rows)
    assert all(float(row[f"{part}_s"]) > 0 for row in rows for part in ("text", "unet", "vae"))
    assert bool(rows[0]["control_s"]) == (case == "controlnet")


@pytest.mark.slow
def test_openvino_peers_paint_nearly_the_same_picture(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino_genai")
    pytest.importorskip("openvino_tokenizers")
    peers = ["openvino-fp32", "openvino-bf16", "openvino-genai"]
    rows = run("pictures", tmp_path, "--cache", str(cache), "--cases", "sdxl-4", "--peers", *peers)
    assert timed(rows)
    assert [float(row["psnr_db"]) > least for row, least in zip(rows, (45, 25, 25), strict=True)] == [True] * 3


@pytest.mark.slow
def test_streamdiffusion_paints_where_it_is_installed(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("streamdiffusion")
    arguments = ["--cache", str(cache), "--cases", "sd15-tiny-vae", "--peers", "diffusers", "streamdiffusion"]
    rows = run("pictures", tmp_path, *arguments)
    assert timed(rows)
    # Its pictures are of other noise.
    assert [row["psnr_db"] != "" for row in rows] == [True, False]
    assert all(float(row[f"{part}_s"]) > 0 for row in rows for part in ("text", "unet", "vae"))


@pytest.mark.slow
def test_a_peer_that_cannot_run_is_a_note(cache: Path, tmp_path: Path) -> None:
    arguments = ["--cache", str(cache), "--cases", "sd15-1", "--live", "1"]
    first, second = run("pictures", tmp_path, *arguments, "--peers", "fourstroke-fp32", "sdcpp-q8_0")
    assert float(first["ratio"]) == 1 and first["note"] == ""
    assert second["median_s"] == "" and second["note"] != ""


@pytest.mark.slow
def test_parts(cache: Path, tmp_path: Path) -> None:
    rows = run("parts", tmp_path, "--cache", str(cache), "--peers", "fourstroke-fp32", "diffusers")
    assert timed(rows)
    assert [row["part"] for row in rows] == ["text", "unet", "vae"] * 2 + ["tiny vae"] * 2
    assert all(float(row["share_of_half"]) > 0 for row in rows if row["part"] == "unet")


@pytest.mark.slow
def test_optimisations(tmp_path: Path) -> None:
    rows = run("optimisations", tmp_path, "--repeats", "1")
    assert timed(rows)
    in_torch = {"VAE decoder in torch", "text encoder, the same prompt"}
    assert {row["case"] for row in rows} == {"UNet step", "VAE decoder"} | in_torch
    assert len({(row["case"], row["variant"]) for row in rows}) == len(rows) == 20
    # Only rounding separates the variants.
    assert all(float(row["psnr_db"]) > 25 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "tiny"), [("sd15", "tiny"), ("sdxl", "tiny-xl")])
def test_loras(model: str, tiny: str, cache: Path, tmp_path: Path) -> None:
    rows = run("loras", tmp_path, "--cache", str(cache), "--models", model)
    assert timed(rows)
    assert {row["model"] for row in rows} == {tiny}
    ours = [row for row in rows if row["library"] == "fourstroke"]
    assert {row["exact"] for row in ours if row["what"] == "switch back to A"} == {"True"}
    assert len(ours) == len(rows) / 2


@pytest.mark.slow
def test_overhead(cache: Path, tmp_path: Path) -> None:
    rows = run("overhead", tmp_path, "--cache", str(cache), "--peers", "diffusers", "fourstroke-fp32")
    assert timed(rows)


@pytest.mark.slow
def test_growth(cache: Path, tmp_path: Path) -> None:
    arguments = ["--peers", "fourstroke-fp32", "--axes", "batch", "loras", "frames"]
    rows = run("growth", tmp_path, "--cache", str(cache), *arguments)
    assert timed(rows)
    assert list(dict.fromkeys(row["axis"] for row in rows)) == ["batch", "loras", "frames"]
    # Two points lie on a law of two terms.
    (first, second) = (row for row in rows if row["axis"] == "batch")
    assert float(first["law_median_s"]) == pytest.approx(float(first["median_s"]), rel=1e-2)
    assert float(second["law_median_s"]) == pytest.approx(float(second["median_s"]), rel=1e-2)
    assert (tmp_path / "growth_emoji.png").stat().st_size > 10_000


@pytest.mark.slow
def test_memory(cache: Path, tmp_path: Path) -> None:
    rows = run("memory", tmp_path, "--cache", str(cache), "--peers", "fourstroke-fp32")
    assert [row["what"] for row in rows] == [*["load float16", "load float32"] * 2, "pictures"]
    assert all(float(row["peak_mb"]) > 0 for row in rows)
    assert 0 < float(rows[-1]["private_mb"]) < float(rows[-1]["peak_mb"])
