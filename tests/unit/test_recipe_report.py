"""The recipe's report: which bars hold is decided by the figures, and what is missing is named."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPORT = Path(__file__).parents[2] / "recipes" / "emoji" / "report.py"
Row = dict[str, Any]


@pytest.fixture(scope="module")
def report() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("recipe_report", REPORT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def few_steps(**top1: float) -> dict[str, list[Row]]:
    """A section's rows: name -> top-1, with steps, guidance and network calls as the name says."""
    rows = []
    for what, top in top1.items():
        steps = int(what.split(",")[0].split()[-1])
        guidance = 4.0 if "guidance 4" in what else 1.0
        rows.append({
            "what": what, "steps": steps, "guidance": guidance, "calls": steps * (2 if guidance > 1 else 1),
            "top1": top, "top5": top, "frechet": 0.1 * (1 - top), "sharpness": top, "style": 1.0,
        })  # fmt: skip
    return {"rows": rows}


def base(**changes: float) -> dict[str, list[Row]]:
    rows = {
        "DDIM 50, guidance 4": 0.95, "LCM-LoRA 1": 0.8, "LCM-LoRA 2": 0.85, "LCM-LoRA 4": 0.9, "LCM-LoRA 8": 0.92,
        "DDIM 4": 0.3, "DDIM 2, guidance 4": 0.2, "DDIM 4, guidance 4": 0.5, "DDIM 1, trailing": 0.1,
        "DDIM 4, trailing": 0.6, "DDIM 2, guidance 4, trailing": 0.7, "Euler 8, trailing": 0.9,
        "DPM++ 2M 2, trailing": 0.4,
    }  # fmt: skip
    return few_steps(**{**rows, **changes})


def holds(bars: list[tuple[str, str, bool]], words: str) -> bool:
    (found,) = [bar for bar in bars if words in bar[0]]
    return found[2]


def test_all_bars_of_few_steps_hold(report: ModuleType) -> None:
    assert all(bar[2] for bar in report.base_bars(base()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"LCM-LoRA 4": 0.85}, "at least 0.9"),
        ({"DDIM 4, trailing": 0.75}, "at least 1.3"),
        ({"DDIM 4": 0.75}, "at least 1.3"),
        ({"DDIM 2, guidance 4, trailing": 0.91}, "no lower than DDIM 2"),
        ({"DDIM 2, guidance 4": 0.91}, "no lower than DDIM 2"),
        ({"Euler 8, trailing": 0.93}, "above the best of"),
        ({"DDIM 50, guidance 4": 0.8}, "50 guided DDIM steps: at least 0.85"),
    ],
)
def test_a_bar_that_is_not_reached_is_missed(report: ModuleType, changes: dict[str, float], words: str) -> None:
    """Each against the better of the two spacings of timesteps."""
    assert not holds(report.base_bars(base(**changes)), words)


def test_curves_hold_trailing_baselines_by_network_calls(report: ModuleType) -> None:
    assert report.curves(base()) == {
        "LCM-LoRA": {1: 0.8, 2: 0.85, 4: 0.9, 8: 0.92},
        "DDIM": {1: 0.1, 4: 0.6},
        "DDIM, guidance 4": {4: 0.7},
        "Euler": {8: 0.9},
        "DPM++ 2M": {2: 0.4},
    }


def styles(top1: float, style: float) -> dict[str, list[Row]]:
    row = {"top1": top1, "top5": top1, "style": style}
    return {"rows": [{"what": "[1.0, 0]", "weight": 0.0, **row, "style": 0.0}, {"what": "", "weight": 0.8, **row}]}


@pytest.mark.parametrize(("first", "second"), [(0.81, 0.79), (0.79, 0.81)])
def test_a_style_needs_both(report: ModuleType, first: float, second: float) -> None:
    assert [bar[2] for bar in report.style_bars(styles(first, second), "flat")] == [second >= 0.8, first >= 0.8]


@pytest.mark.parametrize(("free", "expected"), [(0.3, True), (0.301, False)])
def test_control_doubles_the_edges(report: ModuleType, free: float, expected: bool) -> None:
    rows = [{"what": "with control", "f1_1": 0.6}, {"what": "without", "f1_1": free}]
    assert [bar[2] for bar in report.control_bars({"rows": rows}, "ControlNet")] == [expected]


def inpainting(**changes: float) -> dict[str, list[Row]]:
    value = {"put_back": 99.0, "own": 36.0, "inside": 0.7, "painted": 1.0, **changes}
    return {"rows": [
        {"what": "inpainted, LCM-LoRA 4", "psnr": value["own"], "inside": value["inside"], "top1": 0.5},
        {"what": "inpainted, padding_mask_crop", "psnr": value["put_back"], "inside": 0.7, "top1": 0.5},
        {"what": "text to image, LCM-LoRA 4", "psnr": None, "inside": 0.9, "top1": value["painted"]},
    ]}  # fmt: skip


def test_inpainting_bars(report: ModuleType) -> None:
    assert [bar[2] for bar in report.inpainting_bars(inpainting())] == [True, True, True]
    assert [bar[2] for bar in report.inpainting_bars(inpainting(put_back=34, own=35, inside=0.69))] == [False] * 3
    assert report.inpainting_bars(inpainting())[0][1] == "exact"


def motion(zoomed: float = 1.4, plain: float = 1.0, smooth: float = 0.8) -> dict[str, Any]:
    def row(what: str, zoom: float, smoothness: float) -> Row:
        return {"what": what, "zoom": zoom, "pan": 0.0, "smoothness": smoothness, "movement": 1.0, "top1": 0.9}

    rows = [row("animation", plain, smooth), row("animation, zoom-in LoRA", zoomed, smooth)]
    return {"rows": [*rows, row("frames one by one", 1.0, 0.4)], "videos": 24, "frames": 16, "steps": 5}


def test_motion_bars(report: ModuleType) -> None:
    assert all(bar[2] for bar in report.motion_bars(motion()))
    assert [bar[2] for bar in report.motion_bars(motion(1.15, 1.06, 0.3))] == [False] * 3


def test_the_report_shows_what_there_is_and_names_what_there_is_not(report: ModuleType, tmp_path: Path) -> None:
    sections = {
        "base": base(), "guidance": few_steps(**{"LCM-LoRA 4": 0.9}), "flat": styles(0.9, 0.7), "motion": motion(),
        "inpainting": inpainting(),
    }  # fmt: skip
    for row in sections["flat"]["rows"]:
        row.update(frechet=0.1, sharpness=1.0)
    left_out = {"xl": "there is no emoji/xl yet"}
    (tmp_path / "curves.png").touch()
    text = report.render({"prompts": 204, "seeds": [0], "left_out": left_out, "sections": sections}, tmp_path)
    assert "- xl: there is no emoji/xl yet" in text
    assert "## The SDXL-shaped base" not in text and "## Animation" in text
    assert "| flat LoRA at [1.0, 0.8]: pictures in the style at least 0.8 | 0.700 | **missed** |" in text
    assert "![curves](pictures/curves.png)" in text
    assert "pictures/base.png" not in text  # no sheet was painted
    assert "| animation, zoom-in LoRA | 1.40 |" in text


def test_curves_are_plotted(report: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.plot({"base": base(), "guidance": few_steps(**{"LCM-LoRA 4": 0.9}), "flat": styles(0.9, 0.7)}, tmp_path)
    plots = sorted(tmp_path.iterdir())
    assert [path.name for path in plots] == ["curves-guidance.png", "curves-styles.png", "curves.png"]
    assert all(path.read_bytes()[1:4] == b"PNG" for path in plots)


def test_bars_are_grouped_by_the_part_of_the_family(report: ModuleType) -> None:
    found = report.bars({"flat": styles(0.9, 0.9), "line": styles(0.9, 0.9), "motion": motion()})
    assert {part: len(bars) for part, bars in found.items()} == {"styles": 4, "motion": 3}
