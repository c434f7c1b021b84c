"""Windows of frames and noise of two rounds: against diffusers' code and against the formulas written out as loops."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from diffusers.models.attention import FreeNoiseTransformerBlock
from diffusers.pipelines.free_init_utils import FreeInitMixin
from diffusers.pipelines.free_noise_utils import AnimateDiffFreeNoiseMixin
from diffusers.schedulers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fourstroke.animation import (
    free_init_filter,
    free_init_steps,
    fuse,
    mix_frequencies,
    shuffled_noise,
    window_weights,
    windows,
)


def block(length: int, stride: int = 4) -> Any:
    return FreeNoiseTransformerBlock(4, 1, 4, context_length=length, context_stride=stride)


@pytest.mark.parametrize(
    ("frames", "length", "stride"), [(24, 16, 4), (25, 16, 4), (16, 16, 4), (64, 16, 16), (9, 4, 3)]
)
def test_windows_are_those_of_free_noise(frames: int, length: int, stride: int) -> None:
    expected = block(length, stride)._get_frame_indices(frames)
    if expected[-1][1] != frames:  # its forward() adds this one
        expected.append((frames - length, frames))
    assert windows(frames, length, stride) == expected


@given(frames=st.integers(1, 80), length=st.integers(1, 20), data=st.data())
def test_windows_hold_every_frame(frames: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    found = windows(frames, length, stride)
    assert {frame for start, stop in found for frame in range(start, stop)} == set(range(frames))
    assert {stop - start for start, stop in found} == {min(length, frames)}
    assert all(0 < b[0] - a[0] <= stride for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("function", [windows, lambda *args: fuse(lambda _: torch.ones(1), *args)])
def test_impossible_windows(function: Any) -> None:
    with pytest.raises(ValueError, match="at least one frame, not 0"):
        function(0, 16, 4)
    for length, stride in ((16, 0), (4, 5), (0, 1)):
        with pytest.raises(ValueError, match=f"Windows of {length} frames cannot start {stride} apart"):
            function(32, length, stride)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16])
@pytest.mark.parametrize("scheme", ["pyramid", "flat", "delayed_reverse_sawtooth"])
def test_weights(scheme: str, length: int) -> None:
    expected = block(length)._get_frame_weights(length, scheme)
    if scheme == "delayed_reverse_sawtooth" and length % 2:
        del expected[0]  # it returns one too many; its comment shows one less: [0.01, 0.01, 3, 2, 1]
    found = window_weights(length, scheme)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


def test_unknown_weights() -> None:
    with pytest.raises(ValueError, match="weighting scheme 'gauss' is not known; it is one of pyramid, flat, "):
        window_weights(4, "gauss")


@pytest.mark.parametrize(("frames", "length", "stride"), [(24, 16, 4), (11, 4, 3), (5, 4, 1), (8, 4, 4)])
@pytest.mark.parametrize("scheme", ["pyramid", "flat", "delayed_reverse_sawtooth"])
def test_fuse_is_a_weighted_mean(scheme: str, frames: int, length: int, stride: int) -> None:
    spans = windows(frames, length, stride)
    predictions = {start: torch.randn(2, 3, length, 2, 2) for start, _ in spans}
    weights = window_weights(length, scheme)
    asked = []

    def predict(window: slice) -> Tensor:
        asked.append((window.start, window.stop))
        return predictions[window.start]

    found = fuse(predict, frames, length, stride, None if scheme == "pyramid" else weights)
    assert asked == spans
    assert found.shape == (2, 3, frames, 2, 2)
    for frame in range(frames):
        total, norm = torch.zeros(2, 3, 2, 2, dtype=torch.float64), 0.0
        for start, stop in spans:
            if start <= frame < stop:
                weight = float(weights[frame - start])
                total, norm = total + weight * predictions[start][:, :, frame - start].double(), norm + weight
        torch.testing.assert_close(found[:, :, frame].double(), total / norm, rtol=1e-5, atol=1e-5)


def test_fuse_of_equal_predictions_and_of_one_window() -> None:
    whole = torch.randn(1, 4, 20, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(fuse(lambda window: whole[:, :, window], 20), whole, rtol=1e-14, atol=1e-14)
    half = whole.half()
    fused = fuse(lambda window: half[:, :, window], 20)
    assert fused.dtype == torch.float16
    torch.testing.assert_close(fused, half)
    assert fuse(lambda window: whole[:, :, window], 16).data_ptr() == whole.data_ptr()
    assert torch.equal(fuse(lambda window: whole[:, :, window], 7), whole[:, :, :7])
    with pytest.raises(ValueError, match=r"shape \(8,\); a window of 16 frames has \(16,\)"):
        fuse(lambda window: whole[:, :, window], 20, weights=torch.ones(8))


class FreeNoise(AnimateDiffFreeNoiseMixin):
    """What diffusers' mixin needs of a pipeline."""

    vae_scale_factor = 1

    def __init__(self, length: int, stride: int, kind: str):
        self._free_noise_context_length, self._free_noise_context_stride = length, stride
        self._free_noise_noise_type = kind

    def noise(self, shape: tuple[int, ...], generator: torch.Generator, latents: Tensor | None = None) -> Tensor:
        frames = shape[2] if latents is None else 11
        return self._prepare_latents_free_noise(
            *shape[:2], frames, *shape[3:], torch.float32, torch.device("cpu"), generator, latents
        )


@pytest.mark.parametrize(("frames", "length", "stride"), [(24, 16, 4), (27, 16, 4), (16, 16, 4), (11, 4, 3), (9, 4, 4)])
@pytest.mark.parametrize("kind", ["shuffle_context", "random"])
def test_noise_is_that_of_free_noise(kind: str, frames: int, length: int, stride: int) -> None:
    shape = (2, 4, frames, 3, 5)
    theirs, ours = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    expected = FreeNoise(length, stride, kind).noise(shape, theirs)
    drawn = torch.randn(shape, generator=ours)
    before = drawn.clone()
    assert torch.equal(shuffled_noise(drawn, length, stride, ours, kind), expected)
    assert torch.equal(drawn, before)
    assert torch.equal(torch.rand(3, generator=ours), torch.rand(3, generator=theirs))


def test_repeated_noise() -> None:
    """diffusers repeats noise that is given; its own it draws for all frames by mistake, and so repeats nothing."""
    window = torch.randn(2, 4, 4, 3, 3)
    expected = FreeNoise(4, 3, "repeat_context").noise((2, 4, 11, 3, 3), torch.Generator(), window)
    assert torch.equal(shuffled_noise(window, 4, 3, kind="repeat_context", frames=11), expected)
    whole = torch.cat([window, torch.randn(2, 4, 7, 3, 3)], dim=2)
    assert torch.equal(shuffled_noise(whole, 4, 3, kind="repeat_context"), expected)


def test_noise_of_one_window_is_enough() -> None:
    whole = torch.randn(2, 4, 11, 3, 3)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    expected = shuffled_noise(whole, 4, 3, generators[0])
    assert torch.equal(shuffled_noise(whole[:, :, :4], 4, 3, generators[1], frames=11), expected)


def test_each_animation_has_its_own_generator() -> None:
    noise = torch.randn(3, 4, 24, 2, 2)

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (5, 6, 5)]

    found = shuffled_noise(noise, generator=generators())
    for i, generator in enumerate(generators()):
        assert torch.equal(found[i : i + 1], shuffled_noise(noise[i : i + 1], generator=generator))
    assert torch.equal(shuffled_noise(noise[:1], generator=generators()[:1]), found[:1])
    with pytest.raises(ValueError, match="2 generators for 3 animations"):
        shuffled_noise(noise, generator=generators()[:2])


def test_the_global_generator_is_used_without_another() -> None:
    noise = torch.randn(1, 4, 24, 2, 2)
    torch.manual_seed(9)
    found = shuffled_noise(noise)
    torch.manual_seed(9)
    assert torch.equal(found, shuffled_noise(noise))
    assert torch.equal(found, shuffled_noise(noise, generator=torch.Generator().manual_seed(9)))


def test_noise_errors() -> None:
    noise = torch.randn(1, 4, 8, 2, 2)
    with pytest.raises(ValueError, match="kind of noise 'pink' is not known; it is one of shuffle_context, "):
        shuffled_noise(noise, kind="pink")
    with pytest.raises(
        ValueError, match=r"has 8 frames; give those of the whole animation \(24\) or of one window \(16"
    ):
        shuffled_noise(noise, frames=24)
    with pytest.raises(ValueError, match=r"has 8 frames; give those of the whole animation \(24\)\."):
        shuffled_noise(noise, length=8, kind="random", frames=24)
    with pytest.raises(ValueError, match="cannot start 9 apart"):
        shuffled_noise(noise, length=4, stride=9)


FILTERS = [
    ("butterworth", 4, 0.25, 0.25),
    ("butterworth", 2, 0.5, 0.3),
    ("gaussian", 4, 0.25, 0.25),
    ("gaussian", 4, 0.4, 0.7),
    ("ideal", 4, 0.25, 0.25),
    ("ideal", 4, 0.4, 0.3),
    ("gaussian", 4, 0.0, 0.25),
    ("ideal", 4, 0.25, 0.0),
]


@pytest.mark.parametrize(("method", "order", "spatial", "temporal"), FILTERS)
@pytest.mark.parametrize("size", [(16, 8, 8), (4, 6, 10), (5, 7, 3), (1, 2, 2)], ids=str)
def test_filter(size: tuple[int, ...], method: str, order: int, spatial: float, temporal: float) -> None:
    expected = FreeInitMixin()._get_free_init_freq_filter((1, *size), "cpu", method, order, spatial, temporal)
    found = free_init_filter((2, 4, *size), method, order, spatial, temporal)
    assert found.shape == size and found.dtype == torch.float32
    torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=1e-6)


def test_filters_differ_and_pass_the_mean() -> None:
    """A guard of the test above: its filters are neither all nor nothing, and each parameter counts."""
    found = [free_init_filter((16, 8, 8), *parameters) for parameters in FILTERS[:6]]
    for one, other in itertools.combinations(found, 2):
        assert (one - other).abs().max() > 0.01
    for each in found:
        assert each[8, 4, 4] == 1
        assert 0.001 < each.mean() < 0.9
    assert free_init_filter((16, 8, 8))[8, 4, 6] == pytest.approx(1 / (1 + (0.5**2 / 0.25**2) ** 4))
    assert free_init_filter((16, 8, 8), "gaussian")[8, 4, 6] == pytest.approx(math.exp(-(0.5**2) / (2 * 0.25**2)))


def test_filter_errors() -> None:
    with pytest.raises(ValueError, match="method 'box' is not known; it is one of butterworth, gaussian, ideal"):
        free_init_filter((4, 4, 4), "box")
    with pytest.raises(ValueError, match=r"temporal_stop is 1\.5; .* 0 to 1"):
        free_init_filter((4, 4, 4), temporal_stop=1.5)
    with pytest.raises(ValueError, match=r"spatial_stop is -0\.1; .* 0 to 1"):
        free_init_filter((4, 4, 4), spatial_stop=-0.1)


@pytest.mark.parametrize("size", [(16, 8, 8), (5, 7, 3)], ids=str)
def test_mixed_frequencies(size: tuple[int, ...]) -> None:
    latents, noise = torch.randn(2, 4, *size), torch.randn(2, 4, *size)
    low_pass = free_init_filter(size)
    expected = FreeInitMixin()._apply_freq_filter(latents, noise, low_pass)
    torch.testing.assert_close(mix_frequencies(latents, noise, low_pass), expected, rtol=1e-5, atol=1e-5)
    assert (expected - noise).abs().mean() > 1e-3 and (expected - latents).abs().mean() > 1e-3
    half = mix_frequencies(latents.half(), noise.half(), low_pass)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(mix_frequencies(latents, noise, torch.ones(size)), latents)
    torch.testing.assert_close(mix_frequencies(latents, noise, torch.zeros(size)), noise)


def test_a_round_of_free_init() -> None:
    """The pieces put together as the pipelines do, against diffusers' whole round with its random numbers."""
    pipe: Any = FreeInitMixin()
    pipe.scheduler = DDIMScheduler()
    pipe.enable_free_init(use_fast_sampling=True)
    start, result = torch.randn(2, 4, 8, 4, 4), torch.randn(2, 4, 8, 4, 4)
    theirs, ours = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    options = (torch.device("cpu"), torch.float32, theirs)
    for iteration, latents in enumerate((start, result, 2 * result)):
        expected, timesteps = pipe._apply_free_init(latents, iteration, 5, *options)
        assert len(timesteps) == free_init_steps(5, iteration, 3, fast=True)
        if iteration > 0:
            last = torch.full((2,), 999)
            noised = pipe.scheduler.add_noise(latents, start, last)
            fresh = torch.randn(latents.shape, generator=ours)
            latents = mix_frequencies(noised, fresh, free_init_filter(latents.shape))
        torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
def test_steps_of_a_round(iterations: int, steps: int) -> None:
    pipe: Any = FreeInitMixin()
    pipe.scheduler = DDIMScheduler()
    latents = torch.zeros(1, 4, 2, 2, 2)
    for fast in (True, False):
        pipe.enable_free_init(iterations, fast)
        for iteration in range(iterations):
            _, timesteps = pipe._apply_free_init(latents, iteration, steps, latents.device, latents.dtype, None)
            assert len(timesteps) == free_init_steps(steps, iteration, iterations, fast)
    with pytest.raises(ValueError, match=f"no round {iterations} among {iterations}"):
        free_init_steps(steps, iterations, iterations)
