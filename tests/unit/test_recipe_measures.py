"""The recipe's measures against pictures and videos whose truth is known."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

MEASURES = Path(__file__).parents[2] / "recipes" / "emoji" / "measures.py"
SIZE = 128
FRAMES = 8


@pytest.fixture(scope="module")
def measures() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("recipe_measures", MEASURES)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def thing(zoom: float = 1.0, right: float = 0.0, turn: float = 0.0, seed: int = 0) -> Tensor:
    """A drawing (3, 128, 128) in -1..1 on white; ``right`` in widths, ``turn`` in radians about its middle."""
    axis = torch.linspace(-1, 1, SIZE)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    x, y = (x - 2 * right) / zoom, y / zoom
    x, y = math.cos(turn) * x + math.sin(turn) * y, math.cos(turn) * y - math.sin(turn) * x
    generator = torch.Generator().manual_seed(seed)
    spots = torch.rand(6, 2, generator=generator) * 0.7 - 0.35
    ink = torch.sigmoid((0.5 - (x.square() + 1.4 * y.square()).sqrt()) * 60) * 0.6
    for left, top in spots.tolist():
        ink = ink + torch.sigmoid((0.08 - ((x - left).square() + (y - top).square()).sqrt()) * 60) * 0.4
    return 1 - 2 * ink.clamp(max=1).expand(3, -1, -1)


def noised(video: Tensor, level: float) -> Tensor:
    return video + level * torch.randn(video.shape, generator=torch.Generator().manual_seed(1))


# Videos


@pytest.mark.parametrize("rate", [0.97, 1.0, 1.02, 1.05])
@pytest.mark.parametrize("level", [0.0, 0.05])
def test_zoom(measures: ModuleType, rate: float, level: float) -> None:
    video = noised(torch.stack([thing(0.7 * rate**frame) for frame in range(FRAMES)]), level)
    assert measures.zoom(video) == pytest.approx(rate ** (FRAMES - 1), rel=0.02)


def test_zoom_past_the_edges(measures: ModuleType) -> None:
    """Twice as large at the end, when the drawing no longer fits in."""
    video = torch.stack([thing(1.3 * 1.06**frame) for frame in range(13)])
    assert measures.zoom(video) == pytest.approx(1.06**12, rel=0.05)


def test_zoom_is_not_fooled_by_turning_and_shifting(measures: ModuleType) -> None:
    video = torch.stack([thing(0.8, right=0.01 * frame, turn=0.06 * frame) for frame in range(FRAMES)])
    assert measures.zoom(video) == pytest.approx(1.0, abs=0.02)


def test_zoom_of_empty_frames_is_unknown(measures: ModuleType) -> None:
    assert math.isnan(measures.zoom(torch.ones(4, 3, SIZE, SIZE)))


@pytest.mark.parametrize("right", [-0.02, 0.0, 0.015, 0.025])
@pytest.mark.parametrize("level", [0.0, 0.05])
def test_pan(measures: ModuleType, right: float, level: float) -> None:
    places = [right * (frame - (FRAMES - 1) / 2) for frame in range(FRAMES)]
    video = noised(torch.stack([thing(0.6, right=place) for place in places]), level)
    assert measures.pan(video) == pytest.approx(right * (FRAMES - 1), abs=0.015)


def test_steady_motion_is_smooth_and_shaking_is_not(measures: ModuleType) -> None:
    steady = torch.stack([thing(0.6, right=0.015 * frame) for frame in range(FRAMES)])
    shaking = torch.stack([thing(0.6, right=0.015 * (frame % 2)) for frame in range(FRAMES)])
    strangers = torch.stack([thing(0.6, seed=frame) for frame in range(FRAMES)])
    assert measures.smoothness(steady) > 0.85
    assert measures.smoothness(shaking) < 0.15
    assert measures.smoothness(strangers) < 0.5
    assert math.isnan(measures.smoothness(thing().expand(FRAMES, -1, -1, -1)))


def test_flow_and_movement_are_in_pixels(measures: ModuleType) -> None:
    video = torch.stack([thing(0.8, right=2 * frame / SIZE * (SIZE - 1) / SIZE) for frame in range(4)])
    drawn = video[0].amin(0) < 0
    flow = measures.flows(video)[0][drawn.numpy()]
    assert np.median(flow[:, 0]) == pytest.approx(2.0, abs=0.3)
    assert abs(np.median(flow[:, 1])) < 0.2
    assert measures.movement(video) == pytest.approx(2.0, abs=0.4)
    assert measures.movement(thing().expand(3, -1, -1, -1)) == pytest.approx(0.0, abs=1e-3)


# Edges


def lines(*columns: int) -> Tensor:
    edges = torch.zeros(1, 32, 32, dtype=torch.bool)
    for column in columns:
        edges[:, :, column] = True
    return edges


@pytest.mark.parametrize(
    ("given", "found", "tolerance", "expected"),
    [
        (lines(5), lines(5), 0, 1.0),
        (lines(5), lines(6), 0, 0.0),
        (lines(5), lines(6), 1, 1.0),
        (lines(5), lines(7), 1, 0.0),
        (lines(5), lines(7), 2, 1.0),
        (lines(5, 15), lines(5), 1, 2 / 3),  # precision 1, recall 1/2
        (lines(5), lines(5, 15, 25), 1, 1 / 2),  # precision 1/3, recall 1
        (lines(5), lines(), 1, 0.0),
        (lines(), lines(), 1, 1.0),
    ],
)
def test_edge_f1(measures: ModuleType, given: Tensor, found: Tensor, tolerance: int, expected: float) -> None:
    torch.testing.assert_close(measures.edge_f1(given, found, tolerance), torch.tensor([expected]))


# Pictures


def test_psnr_counts_where_it_is_told_to(measures: ModuleType) -> None:
    first = torch.zeros(2, 3, 16, 16)
    second = first.clone()
    second[0, :, :, 8:] = 1.0
    second[:, :, :, :8] += 0.02
    where = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    where[..., :8] = True
    expected = 10 * math.log10(4 / 0.02**2)
    torch.testing.assert_close(measures.psnr(first, second, where), torch.full((2,), expected), rtol=1e-4, atol=0)
    everywhere = measures.psnr(first, second, torch.ones_like(where))
    assert everywhere[0] < 10 < expected < everywhere[1]
    assert (measures.psnr(first, first, where) == measures.EXACT).all()


def test_frechet_of_normal_distributions(measures: ModuleType) -> None:
    """Diagonal covariances: the squared distance of the means and of the spreads."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    base = (base - base.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(base.T))).T
    moved = base * torch.tensor([2.0, 1.0, 0.5]) + torch.tensor([1.0, 0.0, -2.0])
    assert measures.frechet(base, moved) == pytest.approx(1 + 4 + 1 + 0.25, rel=1e-6)
    assert measures.frechet(moved, moved) == pytest.approx(0.0, abs=1e-6)


def test_sharpness_falls_with_blur_and_rises_with_noise(measures: ModuleType) -> None:
    picture = thing()[None]
    blurred = F.avg_pool2d(picture, 5, stride=1, padding=2, count_include_pad=False)
    own = measures.sharpness(picture)
    assert measures.sharpness(blurred) < 0.7 * own < own < measures.sharpness(noised(picture, 0.1))
