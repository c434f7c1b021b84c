"""Which timesteps a request runs: the two published meanings of strength, and the parts of a schedule."""

from __future__ import annotations

import PIL.Image
import pytest
import torch

from fourstroke import DDIMScheduler, EulerDiscreteScheduler, GenerateRequest, LCMScheduler
from fourstroke.denoise import make_schedule
from tests.unit import tiny

PICTURE = PIL.Image.new("RGB", (32, 32))


def run(scheduler: object, **fields: object) -> list[float]:
    request = GenerateRequest(prompt="fox", **fields)  # type: ignore[arg-type]
    return make_schedule(scheduler, request, torch.device("cpu")).tolist()


def lcm_range(strength: float, steps: int) -> list[int]:
    """Luo et al. 2023, sec. 4.3: ``steps`` of the grid 20 i - 1 below ``strength``, evenly from its top."""
    grid = [20 * i - 1 for i in range(1, int(50 * strength) + 1)][::-1]
    return [grid[int(i * len(grid) / steps)] for i in range(steps)]


@pytest.mark.parametrize("strength", [1.0, 0.8, 0.6, 0.5, 0.2])
def test_strength_shortens_the_noise_range_and_all_steps_run(strength: float) -> None:
    assert run(tiny.scheduler(), image=PICTURE, strength=strength) == lcm_range(strength, 4)


@pytest.mark.parametrize(("strength", "kept"), [(1.0, 4), (0.8, 3), (0.6, 2), (0.5, 2), (0.3, 1), (0.1, 1), (0.0, 1)])
@pytest.mark.parametrize("kind", [LCMScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_trimming_runs_the_last_part_of_the_schedule_and_one_step_at_least(
    kind: type, strength: float, kept: int
) -> None:
    scheduler = kind.from_config(tiny.scheduler().config)
    whole = run(scheduler)
    assert run(scheduler, image=PICTURE, strength=strength, strength_mode="trim") == whole[-kept:]
    assert scheduler.begin_index == 4 - kept


@pytest.mark.parametrize("mode", ["noise", "extend"])
def test_schedulers_without_a_short_range_run_the_end_of_a_longer_schedule(mode: str) -> None:
    scheduler = DDIMScheduler.from_config(tiny.scheduler().config)
    longer = run(scheduler, num_inference_steps=6)
    assert run(scheduler, image=PICTURE, strength=0.6, strength_mode=mode) == longer[-4:]


@pytest.mark.parametrize("strength", [0.001, 0.01, 0.02, 0.05])
def test_a_small_strength_runs_the_steps_that_its_range_has(strength: float) -> None:
    timesteps = run(tiny.scheduler(), image=PICTURE, strength=strength)
    assert timesteps == lcm_range(max(strength, 0.02), max(1, int(50 * strength)))


def test_a_mask_changes_everything_unless_it_is_told_otherwise() -> None:
    mask = PIL.Image.new("L", (32, 32), 255)
    assert run(tiny.scheduler(), image=PICTURE, mask_image=mask) == lcm_range(1.0, 4)
    assert run(tiny.scheduler(), image=PICTURE) == lcm_range(0.8, 4)


def test_the_parts_of_a_schedule_meet_without_a_gap() -> None:
    scheduler = EulerDiscreteScheduler.from_config(tiny.scheduler().config)
    whole = run(scheduler, num_inference_steps=10)
    first = run(scheduler, num_inference_steps=10, denoising_end=0.6)
    second = run(scheduler, num_inference_steps=10, image=PICTURE, denoising_start=0.6)
    assert first + second == whole and len(first) == 6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strength": 1.2, "image": PICTURE}, "strength is 1.2; it must be a number from 0 to 1"),
        ({"strength_mode": "cut"}, "strength_mode is 'cut'; it must be one of 'noise', 'trim', 'extend'"),
        ({"mask_image": PICTURE}, "mask_image is given without a picture; pass image as well"),
        ({"padding_mask_crop": 8, "image": PICTURE}, "padding_mask_crop is given without a mask"),
        ({"denoising_start": 0.5}, "denoising_start is given without a picture"),
        ({"denoising_start": 0.7, "denoising_end": 0.5, "image": PICTURE}, "nothing lies between them"),
        ({"num_frames": 0}, "num_frames is 0; it must be at least 1"),
        ({"decode_chunk_size": 0}, "decode_chunk_size is 0"),
    ],
)
def test_a_broken_rule_is_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerateRequest(prompt="fox", **fields)  # type: ignore[arg-type]
