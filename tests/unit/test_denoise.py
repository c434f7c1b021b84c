"""The loop: what it checks, what it may be told, and that a picture depends on its own request alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fourstroke import DDIMScheduler, GenerateRequest
from fourstroke.conditioning import guidance_embedding, guide, size_ids
from fourstroke.denoise import denoise, prepare
from fourstroke.latents import decode, picture_size
from tests.unit import tiny


def test_image_i_of_a_batch_is_the_image_of_its_seed_alone() -> None:
    pipe = tiny.sd()
    batch = pipe.generate(GenerateRequest(prompt="a red fox", num_images_per_prompt=3, seed=7, output_type="np"))
    assert batch.seeds == (7, 8, 9)
    for i, seed in enumerate(batch.seeds):
        single = pipe.generate(GenerateRequest(prompt="a red fox", seed=seed, output_type="np"))
        assert np.abs(single.images[0] - batch.images[i]).max() <= 1 / 255
    assert np.abs(batch.images[0] - batch.images[1]).mean() > 1 / 255


def test_prompts_run_outermost_in_a_batch() -> None:
    pipe = tiny.xl()
    request = GenerateRequest(
        prompt=["a red fox", "x y z"], num_images_per_prompt=2, seed=3, guidance_scale=1.5, output_type="np"
    )
    batch = pipe.generate(request).images
    second = pipe.generate(
        GenerateRequest(prompt="x y z", num_images_per_prompt=2, seed=5, guidance_scale=1.5, output_type="np")
    ).images
    assert np.abs(batch[2:] - second).max() <= 1 / 255


@pytest.mark.parametrize("size", [{"height": 30}, {"width": 33}, {"height": -8}])
def test_a_size_that_does_not_fit_is_named_with_one_that_does(size: dict[str, int]) -> None:
    (name, value), *_ = size.items()
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be a multiple of 8, such as"):
        picture_size(tiny.sd()._parts(), GenerateRequest(prompt="fox", **size))


def test_latents_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"latents are \(1, 4, 5, 5\); this request needs \(1, 4, 4, 4\)"):
        prepare(tiny.sd()._parts(), GenerateRequest(prompt="fox", latents=torch.zeros(1, 4, 5, 5)))


def test_the_callers_latents_are_not_changed() -> None:
    latents = torch.randn(1, 4, 4, 4)
    before = latents.clone()
    tiny.sd().generate(GenerateRequest(prompt="fox", latents=latents, seed=0))
    assert torch.equal(latents, before)


def test_custom_schedules_that_a_scheduler_does_not_take_are_named() -> None:
    pipe = tiny.sd()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="DDIMScheduler takes no timesteps"):
        pipe.generate(GenerateRequest(prompt="fox", timesteps=[999, 499]))
    with pytest.raises(ValueError, match="LCMScheduler takes no sigmas"):
        tiny.sd().generate(GenerateRequest(prompt="fox", sigmas=[14.0, 1.0]))


def test_denoising_end_leaves_the_last_part_of_the_schedule_out() -> None:
    pipe = tiny.xl()
    state = prepare(pipe._parts(), GenerateRequest(prompt="fox", num_inference_steps=4, denoising_end=0.5))
    assert (state.timesteps >= 500).all() and 0 < len(state.timesteps) < 4


def test_whoever_drives_the_loop_may_change_its_state() -> None:
    pipe = tiny.sd()
    parts = pipe._parts()
    state = prepare(parts, GenerateRequest(prompt="fox", seed=0))
    seen = []
    for step in denoise(parts, state):
        seen.append((step.index, int(step.timestep), step.latents.clone()))
        step.latents = torch.zeros_like(step.latents)
    assert [index for index, _, _ in seen] == [0, 1, 2, 3]
    again = prepare(parts, GenerateRequest(prompt="fox", seed=0))
    untouched = [step.latents.clone() for step in denoise(parts, again)]
    assert torch.equal(seen[0][2], untouched[0]) and not torch.equal(seen[1][2], untouched[1])


def test_high_guidance_with_the_lcm_scheduler_warns() -> None:
    with pytest.warns(UserWarning, match=r"guidance_scale is 4.0: with an LCM-LoRA values above 2"):
        tiny.sd().generate(GenerateRequest(prompt="fox", guidance_scale=4.0, num_inference_steps=1))


def test_guide_is_the_published_formula() -> None:
    prediction = torch.randn(4, 4, 3, 3, dtype=torch.float64)
    unconditional, conditional = prediction[:2], prediction[2:]
    expected = unconditional + 1.7 * (conditional - unconditional)
    torch.testing.assert_close(guide(prediction, 1.7), expected, rtol=1e-12, atol=0)
    ratio = conditional.flatten(1).std(1) / expected.flatten(1).std(1)
    rescaled = expected * ratio[:, None, None, None]
    torch.testing.assert_close(guide(prediction, 1.7, 0.4), 0.4 * rescaled + 0.6 * expected, rtol=1e-12, atol=0)


def test_guidance_embedding_against_float64() -> None:
    dim, w = 16, 7.5
    frequencies = np.exp(-math.log(10_000) * np.arange(dim // 2) / (dim // 2 - 1))
    angles = (w - 1) * 1000 * frequencies
    expected = np.concatenate([np.sin(angles), np.cos(angles)])
    assert np.allclose(guidance_embedding(w, 2, dim).numpy(), np.stack([expected, expected]), atol=2e-3)
    assert guidance_embedding(w, 1, 9).shape == (1, 9)


def test_size_ids_are_original_crop_target() -> None:
    assert size_ids((1, 2), (3, 4), (5, 6)) == (1, 2, 3, 4, 5, 6)


def test_a_half_precision_vae_that_overflows_is_decoded_in_float32_and_is_left_as_it_was() -> None:
    vae = tiny.vae()
    latents = torch.randn(1, 4, 4, 4)
    exact = decode(vae, latents)
    half = vae.to(torch.float16)
    weights = {name: tensor.clone() for name, tensor in half.state_dict().items()}
    upcast = decode(half, latents.half(), upcast_half=True)
    assert upcast.dtype == torch.float32 and half.dtype == torch.float16
    assert (upcast - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in half.state_dict().items())


def test_latent_statistics_are_undone_where_the_configuration_has_them() -> None:
    vae = tiny.vae()
    mean, std = (0.1, 0.2, 0.3, 0.4), (1.0, 2.0, 3.0, 4.0)
    latents = torch.randn(1, 4, 4, 4)
    from dataclasses import replace

    plain = vae.decode(
        latents * torch.tensor(std).view(1, 4, 1, 1) / vae.config.scaling_factor + torch.tensor(mean).view(1, 4, 1, 1)
    )
    vae.config = replace(vae.config, latents_mean=mean, latents_std=std)
    torch.testing.assert_close(decode(vae, latents), plain, rtol=1e-5, atol=1e-5)
