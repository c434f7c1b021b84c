"""What the benchmarks compute themselves: similarity, operations, laws, groups, random weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import cases
import growth
import numpy as np
import parts
import pictures
import pytest
import torch
import weights
from safetensors import safe_open
from torch.nn.functional import avg_pool2d


def test_psnr_and_ssim() -> None:
    rng = np.random.default_rng(0)
    picture = rng.uniform(0, 255, (1, 32, 40, 3))
    assert pictures.psnr(picture, picture) == 99
    assert pictures.psnr(picture, picture + 5) == pytest.approx(20 * math.log10(255 / 5))
    assert pictures.ssim(picture, picture) == pytest.approx(1)
    other = picture + rng.normal(0, 40, picture.shape)
    x, y = (torch.tensor(a.mean(-1))[:, None] for a in (picture, other))

    def mean(values: torch.Tensor) -> torch.Tensor:
        return avg_pool2d(values, 8, 4)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    both = (2 * mean(x) * mean(y) + c1) * (2 * (mean(x * y) - mean(x) * mean(y)) + c2)
    each = (mean(x) ** 2 + mean(y) ** 2 + c1) * (mean(x**2) - mean(x) ** 2 + mean(y**2) - mean(y) ** 2 + c2)
    assert pictures.ssim(picture, other) == pytest.approx(float((both / each).mean()))


def test_operations_of_a_step() -> None:
    """Convolutions and linear layers have the published 338.5 G multiplications; the rest are products in attention."""
    attention = 0
    for tokens, width, blocks in ((4096, 320, 5), (1024, 640, 5), (256, 1280, 5), (64, 1280, 1)):
        attention += blocks * 4 * width * tokens * (tokens + 77)
    assert parts.unet_flops(cases.Case("sd15")) == pytest.approx(2 * 338.5e9 + attention, rel=0.005)


def test_laws_are_found_again() -> None:
    rows = [{"value": x, "median_s": 1 + 2 * x, "peak_mb": 100 + 10 * x} for x in (1, 2, 4, 8)]
    growth.add_laws("batch", growth.LINEAR, rows)
    assert [row["law_median_s"] for row in rows] == pytest.approx([3, 5, 9, 17])
    assert [row["law_peak_mb"] for row in rows] == pytest.approx([110, 120, 140, 180])
    assert [row["ratio"] for row in rows] == pytest.approx([1, 5 / 3, 3, 17 / 3], rel=1e-3)


@pytest.mark.parametrize(
    ("live", "expected"),
    [(1, ["a", "b", "c", "d"]), (2, ["ab", "ac", "ad"]), (3, ["abc", "ad"]), (4, ["abcd"]), (9, ["abcd"])],
)
def test_the_first_peer_is_in_every_group(live: int, expected: list[str]) -> None:
    assert ["".join(group) for group in pictures.groups("abcd", live)] == expected


def test_every_case_has_a_peer_and_a_tiny_form() -> None:
    for case in (case for group in cases.CASES.values() for case in group):
        assert cases.PEERS[cases.REFERENCE].can(case)
        assert case.shrunk().model in ("tiny", "tiny-xl", "emoji")


def test_unknown_models_and_parts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no repository of 'sd3'"):
        weights.find("sd3", "repository", tmp_path)
    with pytest.raises(ValueError, match="There is no part 'refiner'"):
        weights.find("tiny", "refiner", tmp_path)


def test_the_lora_has_the_published_rank_and_targets(cache: Path) -> None:
    path = weights.find("tiny", "lcm-lora", cache)
    with safe_open(path, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert float(file.get_tensor(next(name for name in shapes if name.endswith(".alpha")))) == 8
    assert {shape[0] for name, shape in shapes.items() if "lora_down" in name} == {64}
    modules = {name.partition(".")[0] for name in shapes}
    for end in (
        "attn2_to_k",
        "ff_net_0_proj",
        "proj_in",
        "conv1",
        "conv_shortcut",
        "upsamplers_0_conv",
        "time_emb_proj",
    ):
        assert any(module.endswith(end) for module in modules), end
    assert not any(module.endswith(("conv_in", "conv_out", "linear_1")) for module in modules)


def test_weights_are_the_same_every_time(tmp_path: Path, cache: Path) -> None:
    first, second = (weights.find("tiny", "tiny-vae", folder) for folder in (cache, tmp_path))
    assert (first / weights.WEIGHTS).read_bytes() == (second / weights.WEIGHTS).read_bytes()
    assert json.loads((first / "config.json").read_text())["_class_name"] == "AutoencoderTiny"
