"""The schedulers by themselves: their equations in float64, their configurations, their errors."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fourstroke import schedulers
from fourstroke.config import UnsupportedConfig
from fourstroke.random import generators_for_seeds, randn_tensor
from fourstroke.schedulers import (
    ConfigOnly,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
    boundary_scalings,
    lcm_step,
    lcm_timesteps,
    load_scheduler,
)
from fourstroke.schedulers import noise as noise_
from fourstroke.schedulers.ddim import ddim_step
from fourstroke.schedulers.dpmpp import dpmpp_step
from fourstroke.schedulers.euler import ancestral_sigmas, euler_step
from fourstroke.schedulers.lcm import LCMCoefficients, training_grid
from fourstroke.schedulers.tcd import tcd_step

ALL = (
    LCMScheduler,
    TCDScheduler,
    DDIMScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    DPMSolverMultistepScheduler,
)
# Stable Diffusion's noise schedule, worked out independently in float64.
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
ALPHAS = np.cumprod(1 - BETAS)


def f64(*values: float) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([value], dtype=torch.float64) for value in values)


# -- LCM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "strength", "expected"),
    [  # the published schedule: floor(i * 50 / n) from 999 down in strides of 20
        (1, 1.0, [999]),
        (2, 1.0, [999, 499]),
        (4, 1.0, [999, 759, 499, 259]),
        (8, 1.0, [999, 879, 759, 639, 499, 379, 259, 139]),
        (4, 0.6, [599, 459, 299, 159]),
        (4, 0.2, [199, 159, 99, 59]),
    ],
)
def test_lcm_timesteps(count: int, strength: float, expected: list[int]) -> None:
    assert lcm_timesteps(count, strength=strength) == expected


def test_every_lcm_schedule_descends_from_the_top_of_a_shortened_grid() -> None:
    for strength in (0.1, 0.5, 0.77, 1.0):
        grid = training_grid(1000, 50, strength).tolist()
        assert grid == [20 * i - 1 for i in range(1, int(50 * strength) + 1)]
        for count in range(1, len(grid) + 1):
            steps = lcm_timesteps(count, strength=strength)
            assert len(steps) == count and steps[0] == grid[-1] and set(steps) <= set(grid)
            assert steps == sorted(set(steps), reverse=True)


def test_boundary_scalings_are_the_identity_at_zero_and_forget_the_sample_at_the_end() -> None:
    timesteps = torch.arange(0, 1000, 37, dtype=torch.float64)
    c_skip, c_out = boundary_scalings(timesteps)
    for t, skip, out in zip(timesteps.tolist(), c_skip.tolist(), c_out.tolist(), strict=True):
        assert skip == pytest.approx(0.25 / ((10 * t) ** 2 + 0.25), rel=1e-14)
        assert out == pytest.approx(10 * t / math.sqrt((10 * t) ** 2 + 0.25), rel=1e-14)
    assert (c_skip[0], c_out[0]) == (1, 0)
    assert c_skip[-1] < 1e-8 and c_out[-1] == pytest.approx(1)
    scaled = boundary_scalings(timesteps, timestep_scaling=1.0, sigma_data=2.0)
    torch.testing.assert_close(scaled[0] + scaled[1] ** 2, torch.ones_like(timesteps))  # d^2/s + t^2/s = 1


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_lcm_step_in_float64(prediction_type: str) -> None:
    """A network that knows the noise exactly is led to the picture, and then to the next timestep of the same noise."""
    x0, eps, z = torch.randn(3, 2, 4, 3, 3, dtype=torch.float64)
    t, s = 759, 499
    a, b = math.sqrt(ALPHAS[t]), math.sqrt(1 - ALPHAS[t])
    sample = a * x0 + b * eps
    output = {"epsilon": eps, "sample": x0, "v_prediction": a * eps - b * x0}[prediction_type]
    skip, out = 0.25 / ((10 * t) ** 2 + 0.25), 10 * t / math.sqrt((10 * t) ** 2 + 0.25)
    a_s, b_s = math.sqrt(ALPHAS[s]), math.sqrt(1 - ALPHAS[s])
    c = LCMCoefficients(*f64(a, b, skip, out, a_s, b_s))
    following, denoised = lcm_step(output, sample, c, prediction_type=prediction_type, noise=z)
    expected = out * x0 + skip * sample
    torch.testing.assert_close(denoised, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(following, a_s * expected + b_s * z, rtol=1e-12, atol=1e-12)
    last, denoised = lcm_step(output, sample, c, prediction_type=prediction_type)
    assert last is denoised


def test_the_scheduler_runs_these_equations() -> None:
    scheduler = LCMScheduler()
    scheduler.set_timesteps(3)
    x0, eps = torch.randn(2, 1, 4, 3, 3, dtype=torch.float64)
    steps = scheduler.timesteps.tolist()
    sample = math.sqrt(ALPHAS[steps[0]]) * x0 + math.sqrt(1 - ALPHAS[steps[0]]) * eps
    for index, t in enumerate(steps):
        noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
        exact = (sample - math.sqrt(ALPHAS[t]) * x0) / math.sqrt(1 - ALPHAS[t])
        result = scheduler.step(exact, t, sample, torch.Generator().manual_seed(index))
        torch.testing.assert_close(result.denoised, x0, rtol=0, atol=1e-4)  # float32 coefficients
        if index < 2:
            later = steps[index + 1]
            expected = math.sqrt(ALPHAS[later]) * x0 + math.sqrt(1 - ALPHAS[later]) * noise
            torch.testing.assert_close(result.prev_sample, expected, rtol=0, atol=1e-4)
        sample = result.prev_sample
    assert torch.equal(sample, result.denoised)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of num_inference_steps and timesteps"),
        ({"num_inference_steps": 51}, "51, but the distillation schedule has 50 timesteps at strength 1.0"),
        ({"num_inference_steps": 6, "strength": 0.1}, "Take at most 5 steps, or raise strength"),
        ({"num_inference_steps": 1001}, "num_inference_steps is 1001; it must be 1 to 1000"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; it must be 1 to 1000"),
        ({"num_inference_steps": 4, "strength": 1.5}, "strength is 1.5; it must be above 0 and at most 1"),
        ({"timesteps": [259, 499]}, r"descending order, each once, but are \[259, 499\]"),
        ({"timesteps": [1000]}, r"timesteps must be 0 to 999 .*but are \[1000\]"),
        ({"timesteps": []}, "timesteps is empty"),
    ],
)
def test_schedule_errors_name_value_rule_and_mend(options: dict[str, Any], message: str) -> None:
    for kind in (LCMScheduler, TCDScheduler):
        with pytest.raises(ValueError, match=message):
            kind().set_timesteps(**options)


def test_original_inference_steps_out_of_range() -> None:
    for original in (0, 1001):
        with pytest.raises(ValueError, match=f"original_inference_steps is {original}; it must be 1 to 1000"):
            LCMScheduler().set_timesteps(4, original_inference_steps=original)
    with pytest.raises(ValueError, match="num_inference_steps is 9, more than original_inference_steps, 8"):
        TCDScheduler().set_timesteps(9, original_inference_steps=8)
    with pytest.raises(ValueError, match="eta is 1.5; it must be 0 to 1"):
        TCDScheduler().step(torch.zeros(1), 999, torch.zeros(1), eta=1.5)


# -- pure functions ------------------------------------------------------------------------------------------------


def test_noising_and_prediction_are_inverse_in_float64() -> None:
    x0, eps = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    alphas = torch.tensor(ALPHAS[[3, 500, 999]])
    sample, velocity = noise_.add_noise(x0, eps, alphas), noise_.get_velocity(x0, eps, alphas)
    a, b = alphas.sqrt()[:, None, None], (1 - alphas).sqrt()[:, None, None]
    for output, kind in ((eps, "epsilon"), (x0, "sample"), (velocity, "v_prediction")):
        torch.testing.assert_close(noise_.predict_x0(output, sample, a, b, kind), x0, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(noise_.predict_epsilon(output, sample, a, b, kind), eps, rtol=1e-9, atol=1e-9)
    for function in (noise_.predict_x0, noise_.predict_epsilon):
        with pytest.raises(UnsupportedConfig, match="'flow'.*epsilon, sample or v_prediction"):
            function(eps, sample, a, b, "flow")


def test_half_precision_noising_rounds_once() -> None:
    x0, eps = torch.randn(2, 3, 4, 5).half()
    alphas = torch.tensor(ALPHAS[[3, 500, 999]])
    exact = noise_.add_noise(x0.double(), eps.double(), alphas)
    result = noise_.add_noise(x0, eps, alphas)
    assert result.dtype == torch.float16
    assert (result.double() - exact).abs().max() <= torch.finfo(torch.float16).eps / 2 * exact.abs().max()


def test_zero_terminal_snr() -> None:
    betas = noise_.rescale_zero_terminal_snr(torch.tensor(BETAS))
    alphas = torch.cumprod(1 - betas, 0)
    assert alphas[-1].abs() < 1e-12
    assert alphas[0].item() == pytest.approx(ALPHAS[0], rel=1e-9)


def test_sigma_conversions() -> None:
    sigmas = noise_.sigmas_of(torch.tensor(ALPHAS))
    alpha, sigma = noise_.alpha_sigma(sigmas)
    torch.testing.assert_close(alpha**2, torch.tensor(ALPHAS))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000, dtype=torch.float64))
    train = sigmas.numpy()
    np.testing.assert_allclose(noise_.sigma_to_timestep(train[[0, 31, 999]], train), [0, 31, 999], atol=1e-9)
    np.testing.assert_allclose(noise_.sigma_to_timestep(np.array([1e-20, 1e9]), train), [0, 999])
    karras = noise_.karras_sigmas(0.03, 14.6, 9)
    assert karras[0] == pytest.approx(14.6) and karras[-1] == pytest.approx(0.03)
    np.testing.assert_allclose(np.diff(karras ** (1 / 7)), np.diff(karras ** (1 / 7))[0])
    exponential = noise_.exponential_sigmas(0.03, 14.6, 9)
    np.testing.assert_allclose(exponential[1:] / exponential[:-1], exponential[1] / exponential[0])


def test_spacings() -> None:
    assert noise_.spaced_timesteps("leading", 4, 1000, 1).tolist() == [751, 501, 251, 1]
    assert noise_.spaced_timesteps("trailing", 4, 1000).tolist() == [999, 749, 499, 249]
    assert noise_.spaced_timesteps("linspace", 4, 1000).tolist() == [999, 666, 333, 0]
    assert len(noise_.spaced_timesteps("linspace", 4, 1000, extra=1)) == 4
    with pytest.raises(ValueError, match="num_inference_steps is 0"):
        noise_.spaced_timesteps("leading", 0, 1000)
    with pytest.raises(UnsupportedConfig, match="timestep_spacing 'even'"):
        noise_.spaced_timesteps("even", 4, 1000)


def test_thresholding_leaves_small_pictures_alone_and_scales_the_rest_to_one() -> None:
    small, large = torch.rand(1, 3, 4, 4) - 0.5, torch.randn(1, 3, 4, 4) * 5
    both = noise_.dynamic_threshold(torch.cat([small, large]), 0.9, 100.0)
    assert torch.equal(both[:1], small)
    limit = torch.quantile(large.abs(), 0.9)
    torch.testing.assert_close(both[1:], large.clamp(-limit, limit) / limit)


def test_solvers_follow_an_exact_network_from_noise_to_the_picture() -> None:
    """With the true x_0 at every step the ODE is a straight line, on which every solver is exact."""
    x0, eps = torch.randn(2, 1, 4, 3, dtype=torch.float64)
    a, b = (torch.tensor(ALPHAS[t]) for t in (700, 300))
    there = b.sqrt() * x0 + (1 - b).sqrt() * eps
    torch.testing.assert_close(ddim_step(x0, eps, a, b), there)
    sigmas = noise_.sigmas_of(torch.tensor(ALPHAS[[300, 700, 800, 900]]))
    torch.testing.assert_close(euler_step(x0 + sigmas[1] * eps, x0, sigmas[1], sigmas[0]), x0 + sigmas[0] * eps)
    here = a.sqrt() * x0 + (1 - a).sqrt() * eps
    for order in (1, 2, 3):
        for solver in ("midpoint", "heun"):
            torch.testing.assert_close(dpmpp_step(here, [x0] * order, sigmas[: order + 1], solver), there)
    torch.testing.assert_close(tcd_step(x0, eps, b, b, None)[0], there)


def test_stochastic_steps_arrive_at_the_right_variance() -> None:
    a, b = (torch.tensor(ALPHAS[t]) for t in (700, 300))
    zero = torch.zeros(1, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)

    def variance(step: Any) -> float:
        """Of a sample of pure noise, the deviations of whose two independent sources add up in squares."""
        return (step(one, zero) ** 2 + step(zero, one) ** 2).item()

    for eta in (0.3, 1.0):
        assert variance(lambda eps, z, eta=eta: ddim_step(zero, eps, a, b, eta, z)) == pytest.approx(1 - b)
    assert variance(lambda eps, z: tcd_step(zero, eps, torch.tensor(ALPHAS[200]), b, z)[0]) == pytest.approx(1 - b)
    sigmas = noise_.sigmas_of(torch.stack([b, a]))
    down, up = ancestral_sigmas(sigmas[1], sigmas[0])
    assert (down**2 + up**2).item() == pytest.approx(sigmas[0].item() ** 2)
    start = (1 - a).sqrt()
    assert variance(lambda eps, z: dpmpp_step(start * eps, [zero], sigmas, "midpoint", z)) == pytest.approx(1 - b)


# -- behaviour of all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_a_loop_reads_no_tensor_back(kind: Any) -> None:
    """On the meta device there are no values: a branch on one, a lookup, an item() would raise."""
    stochastic = {"algorithm_type": "sde-dpmsolver++"} if kind is DPMSolverMultistepScheduler else {}
    options = {"eta": 0.5} if kind in (DDIMScheduler, TCDScheduler) else {}
    options = {"s_churn": 2.0} if kind is EulerDiscreteScheduler else options
    scheduler = kind(prediction_type="v_prediction", **stochastic)
    scheduler.set_timesteps(4, device="meta")
    scheduler.set_begin_index(0)
    sample = torch.empty(2, 4, 8, 8, device="meta") * scheduler.init_noise_sigma
    clean = torch.empty_like(sample)
    for timestep in scheduler.timesteps:
        output = scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(output, timestep, sample, **options).prev_sample
        scheduler.add_noise(clean, output, timestep[None])
    assert sample.shape == clean.shape and sample.device.type == "meta"


@pytest.mark.parametrize("kind", [LCMScheduler, DDIMScheduler])
def test_the_coefficients_follow_the_samples_device(kind: Any) -> None:
    scheduler = kind()
    scheduler.set_timesteps(2)  # no device given
    scheduler.set_begin_index(0)
    sample = torch.empty(1, 4, 2, 2, device="meta")
    assert scheduler.step(sample, 999, sample).prev_sample.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ALL)
def test_a_loop_on_a_gpu_neither_syncs_nor_differs(kind: Any) -> None:
    results = []
    for device in ("cpu", "cuda"):
        scheduler = kind()
        scheduler.set_timesteps(4, device=device)
        scheduler.set_begin_index(0)
        sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(device)
        sample = sample * scheduler.init_noise_sigma
        generator = torch.Generator().manual_seed(2)
        try:
            torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
            for timestep in scheduler.timesteps:
                output = torch.sin(scheduler.scale_model_input(sample, timestep))
                sample = scheduler.step(output, timestep, sample, generator=generator).prev_sample
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append(sample.cpu())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ALL)
def test_compatibles_and_repr(kind: Any) -> None:
    scheduler = kind()
    assert set(ALL) <= set(scheduler.compatibles) and ConfigOnly not in scheduler.compatibles
    assert repr(scheduler).startswith(kind.__name__ + " {") and '"beta_schedule"' in repr(scheduler)


def test_previous_timestep() -> None:
    scheduler = LCMScheduler()
    assert scheduler.previous_timestep(999).item() == 998
    scheduler.set_timesteps(3)
    steps = scheduler.timesteps
    assert [scheduler.previous_timestep(t).item() for t in steps] == [*steps[1:].tolist(), -1]


def test_velocity_of_sigma_schedulers_is_that_of_the_timestep() -> None:
    """diffusers' Euler reads the alphas at the timestep's place in the schedule instead of at the timestep."""
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(4)
    x0, eps = torch.randn(2, 1, 4, 3, 3, dtype=torch.float64)
    got = scheduler.get_velocity(x0, eps, scheduler.timesteps[1:2])
    alpha = ALPHAS[int(scheduler.timesteps[1])]
    torch.testing.assert_close(got, math.sqrt(alpha) * eps - math.sqrt(1 - alpha) * x0, rtol=1e-4, atol=1e-4)


# -- configurations ------------------------------------------------------------------------------------------------


def test_a_config_is_an_immutable_mapping_with_attributes() -> None:
    config = LCMScheduler(beta_end=0.02).config
    assert isinstance(config, dict) and config["beta_end"] == config.beta_end == config.get("beta_end") == 0.02
    assert "beta_end" in config and not hasattr(config, "nothing") and config.get("nothing") is None
    with pytest.raises(AttributeError, match="no 'nothing'; it has: num_train_timesteps"):
        _ = config.nothing
    for change in (
        lambda: config.update(beta_end=1),
        lambda: config.__setitem__("beta_end", 1),
        lambda: setattr(config, "beta_end", 1),
        lambda: config.pop("beta_end"),
        lambda: config.clear(),
        lambda: config.__ior__({"beta_end": 1}),
        lambda: config.__delitem__("beta_end"),
    ):
        with pytest.raises(TypeError, match="cannot be changed"):
            change()
    assert config.beta_end == 0.02


@pytest.mark.parametrize("kind", ALL)
def test_schedulers_are_copied_and_pickled_with_their_place(kind: Any) -> None:
    scheduler = kind()
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(1)
    for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert other.config == scheduler.config and other.config is not scheduler.config
        assert torch.equal(other.timesteps, scheduler.timesteps) and other.begin_index == 1


def test_flow_matching_shift_is_refused() -> None:
    with pytest.raises(UnsupportedConfig, match="mu, a shift for flow-matching"):
        DPMSolverMultistepScheduler().set_timesteps(4, mu=1.0)


def test_misspelt_options() -> None:
    with pytest.raises(TypeError, match="LCMScheduler: .*unexpected keyword argument 'beta_strat'"):
        LCMScheduler(beta_strat=0.1)  # type: ignore[call-arg]
    with pytest.warns(UserWarning, match="no option 'use_karas_sigmas'.* Did you mean 'use_karras_sigmas'"):
        EulerDiscreteScheduler.from_config({}, use_karas_sigmas=True)
    scheduler, unused = LCMScheduler.from_config({"odd": 1, "beta_end": 0.02}, return_unused_kwargs=True, other=2)
    assert unused == {"odd": 1, "other": 2} and scheduler.config.odd == 1 and scheduler.config.beta_end == 0.02
    with pytest.raises(TypeError, match="takes a mapping.*from_pretrained"):
        LCMScheduler.from_config("runwayml/stable-diffusion-v1-5")


def test_unknown_keys_survive_any_number_of_swaps_and_files(tmp_path: Path) -> None:
    scheduler: Any = LCMScheduler.from_config(
        {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "extra": [1, {"a": 2}]}
    )
    for kind in ALL:
        scheduler = kind.from_config(scheduler.config)
        scheduler.save_pretrained(tmp_path)
        scheduler = kind.from_pretrained(tmp_path)
        assert (scheduler.config.skip_prk_steps, scheduler.config.extra) == (True, [1, {"a": 2}])
        assert scheduler.config["_class_name"] == kind.__name__


def test_saving_and_loading_from_folders(tmp_path: Path) -> None:
    LCMScheduler(trained_betas=np.full(10, 0.1), num_train_timesteps=10).save_config(tmp_path / "pipe" / "scheduler")
    again = LCMScheduler.from_pretrained(tmp_path / "pipe", subfolder="scheduler", original_inference_steps=5)
    assert again.betas.tolist() == torch.full((10,), 0.1).tolist() and again.config.original_inference_steps == 5
    with pytest.raises(FileNotFoundError, match="scheduler_config.json"):
        LCMScheduler.from_pretrained(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        LCMScheduler.from_pretrained("nobody/nothing", local_files_only=True, cache_dir=tmp_path / "cache")
    file = tmp_path / "scheduler_config.json"
    with pytest.raises(ValueError, match="upload_folder"):
        again.save_config(tmp_path, push_to_hub=True)
    file.write_text("{")
    with pytest.raises(NotADirectoryError, match="is a file"):
        again.save_config(file)
    with pytest.raises(ValueError, match="not a JSON file"):
        LCMScheduler.from_pretrained(tmp_path)


def test_from_pretrained_reads_a_repository_in_the_hub_cache(tmp_path: Path) -> None:
    """What huggingface_hub leaves behind after a download, read with no network."""
    repository = tmp_path / "models--owner--name"
    folder = repository / "snapshots" / "0123" / "scheduler"
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    (folder / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler", "beta_end": 0.5}))
    scheduler = LCMScheduler.from_pretrained(
        "owner/name", subfolder="scheduler", cache_dir=tmp_path, local_files_only=True
    )
    assert scheduler.config.beta_end == 0.5


def test_config_only_says_what_it_is_and_how_to_swap_it() -> None:
    scheduler: Any = load_scheduler("PNDMScheduler", {"skip_prk_steps": True, "beta_end": 0.012})
    assert isinstance(scheduler, ConfigOnly) and scheduler.class_name == "PNDMScheduler" and len(scheduler) == 1000
    for call in (
        lambda: scheduler.set_timesteps(4),
        lambda: scheduler.step(None, 0, None),
        lambda: scheduler.scale_model_input(None, 0),
        lambda: scheduler.add_noise(None, None, None),
    ):
        with pytest.raises(
            UnsupportedConfig, match=r"PNDMScheduler is not run here. Swap it: .*LCMScheduler.from_config"
        ):
            call()
    assert LCMScheduler.from_config(scheduler.config).config.beta_end == 0.012
    again, unused = ConfigOnly.from_config(scheduler.config, return_unused_kwargs=True, beta_end=1.0)
    assert again.config == {**scheduler.config, "beta_end": 1.0} and unused == {}
    assert copy.deepcopy(again).config == again.config


def test_load_scheduler_runs_what_it_can_and_keeps_the_rest_with_the_reason() -> None:
    for kind in ALL:
        loaded = load_scheduler(kind.__name__, {"beta_end": 0.02})
        assert type(loaded) is kind and loaded.config.beta_end == 0.02
    kept: Any = load_scheduler("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"})
    with pytest.raises(
        UnsupportedConfig, match="DPMSolverMultistepScheduler is not run here: algorithm_type 'dpmsolver'"
    ):
        kept.set_timesteps(4)
    assert LCMScheduler.from_config(kept.config).config.algorithm_type == "dpmsolver"


def test_public_names_are_there() -> None:
    assert all(hasattr(schedulers, name) for name in schedulers.__all__)


# -- random numbers ------------------------------------------------------------------------------------------------


def test_every_picture_has_its_own_seed() -> None:
    batch = randn_tensor((3, 4, 2, 2), generators_for_seeds(10, 3))
    for i in range(3):
        assert torch.equal(batch[i : i + 1], randn_tensor((1, 4, 2, 2), generators_for_seeds(10 + i, 1)))


def test_random_numbers_need_a_generator_a_sample() -> None:
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        randn_tensor((3, 4), generators_for_seeds(0, 2))
