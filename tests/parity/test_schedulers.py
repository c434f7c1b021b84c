"""Every scheduler beside diffusers' class of the same name: schedules, steps, whole loops, configurations, errors."""

from __future__ import annotations

import inspect
import itertools
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor as peer_randn_tensor
from torch import Tensor

import fourstroke.schedulers as ours
from fourstroke.config import UnsupportedConfig
from fourstroke.random import randn_tensor

NAMES = (
    "LCMScheduler",
    "TCDScheduler",
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (3, 4, 6, 5)


@pytest.fixture(autouse=True)
def _quiet_peer() -> Iterator[None]:
    """diffusers reports by logging; keep it out of the way, and let its deprecations be its own business."""
    diffusers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"diffusers\.")
        yield


def pair(name: str, **options: Any) -> tuple[Any, Any]:
    return getattr(ours, name)(**options), getattr(diffusers, name)(**options)


def network(sample: Tensor, timestep: Tensor | float, scale: float = 1.0) -> Tensor:
    """Stands in for the UNet: smooth, bounded, depends on everything it is given."""
    return torch.sin(1.3 * sample.flip(-1) + 0.002 * float(timestep)) * scale


def trajectory(
    scheduler: Any,
    schedule: dict[str, Any],
    step: dict[str, Any] | None = None,
    *,
    skip: int = 0,
    dtype: torch.dtype = torch.float32,
    seeds: int | list[int] = 7,
    scale: float = 1.0,
) -> list[Tensor]:
    """All that a loop of ``scheduler`` computes, step by step."""
    scheduler.set_timesteps(**schedule)
    timesteps = scheduler.timesteps[skip:]
    if skip or scheduler.timesteps[:1].equal(scheduler.timesteps[1:2]):  # a repeated timestep cannot be looked up
        scheduler.set_begin_index(skip)
    sample = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)).to(dtype) * scheduler.init_noise_sigma
    made = [torch.Generator().manual_seed(seed) for seed in ([seeds] if isinstance(seeds, int) else seeds)]
    step = dict(step or {})
    if "generator" in inspect.signature(scheduler.step).parameters and "variance_noise" not in step:
        step["generator"] = made[0] if isinstance(seeds, int) else made
    tensors = [timesteps]
    for timestep in timesteps:
        output = network(scheduler.scale_model_input(sample, timestep), timestep, scale)
        result = scheduler.step(output.to(dtype), timestep, sample, **step, return_dict=False)
        sample = result[0]
        tensors += result
    return tensors


def assert_same(left: list[Tensor], right: list[Tensor], rtol: float = 1e-5, atol: float = 2e-6) -> None:
    assert len(left) == len(right)
    for ours_, theirs in zip(left, right, strict=True):
        assert ours_.dtype == theirs.dtype
        torch.testing.assert_close(ours_, theirs, rtol=rtol, atol=atol)


def compare(name: str, options: dict[str, Any], schedule: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    mine, theirs = (trajectory(each, schedule, *args, **kwargs) for each in pair(name, **options))
    assert_same(mine, theirs)


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or that it refuses."""
    try:
        return call()
    except (ValueError, IndexError, ZeroDivisionError):
        return "refused"


# -- signatures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_signatures_have_the_peers_arguments_order_and_defaults(name: str) -> None:
    def plain(function: Any) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    mine, theirs = getattr(ours, name), getattr(diffusers, name)
    for method in ("__init__", "set_timesteps", "step", "add_noise", "get_velocity", "set_begin_index"):
        if hasattr(theirs, method):
            assert plain(getattr(mine, method)) == plain(getattr(theirs, method)), method


@pytest.mark.parametrize("name", NAMES)
def test_public_attributes_match_before_and_after_set_timesteps(name: str) -> None:
    mine, theirs = pair(name)
    for _ in range(2):
        for attribute in ("betas", "alphas", "alphas_cumprod", "timesteps"):
            torch.testing.assert_close(getattr(mine, attribute), getattr(theirs, attribute), rtol=1e-6, atol=0)
        torch.testing.assert_close(torch.as_tensor(mine.init_noise_sigma), torch.as_tensor(theirs.init_noise_sigma))
        assert (len(mine), mine.order, mine.num_inference_steps) == (1000, theirs.order, theirs.num_inference_steps)
        mine.set_timesteps(5)
        theirs.set_timesteps(5)


# -- noise schedules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_schedules(name: str, schedule: str, zero_snr: bool) -> None:
    mine, theirs = pair(name, beta_schedule=schedule, rescale_betas_zero_snr=zero_snr, num_train_timesteps=600)
    torch.testing.assert_close(mine.betas, theirs.betas, rtol=1e-6, atol=0)
    torch.testing.assert_close(mine.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-6, atol=1e-9)


def test_trained_betas() -> None:
    betas = np.linspace(1e-3, 0.02, 1000)
    mine, theirs = pair("LCMScheduler", trained_betas=betas)
    assert torch.equal(mine.alphas_cumprod, theirs.alphas_cumprod)
    with pytest.raises(UnsupportedConfig, match="beta_schedule 'sigmoid'"):
        ours.LCMScheduler(beta_schedule="sigmoid")


# -- LCM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("original", [None, 10, 25, 37, 100, 1000])
@pytest.mark.parametrize("strength", [1.0, 0.8, 0.6, 0.5, 0.3, 0.2, 0.05])
@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_every_schedule_of_the_distilled_samplers(name: str, strength: float, original: int | None) -> None:
    mine, theirs = pair(name)
    for count in range(1, 61) if original is None else (1, 2, 3, 4, 7, 8, 20, 37, 50, 60):

        def schedule(scheduler: Any, count: int = count) -> list[int]:
            scheduler.set_timesteps(count, original_inference_steps=original, strength=strength)
            return scheduler.timesteps.tolist()

        assert outcome(lambda: schedule(mine)) == outcome(lambda: schedule(theirs)), count


LCM_OPTIONS: list[dict[str, Any]] = [
    {},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample"},
    {"clip_sample": True},
    {"clip_sample": True, "clip_sample_range": 0.4},
    {"thresholding": True, "sample_max_value": 2.5},
    {
        "thresholding": True,
        "sample_max_value": 0.5,
        "dynamic_thresholding_ratio": 0.7,
        "prediction_type": "v_prediction",
    },
    {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    {"beta_schedule": "squaredcos_cap_v2", "clip_sample": True},
    {"timestep_scaling": 0.01},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"original_inference_steps": 100, "num_train_timesteps": 800},
    {"set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "trailing"},
]


@pytest.mark.parametrize("options", LCM_OPTIONS, ids=str)
@pytest.mark.parametrize("count", [1, 2, 4, 8, 50])
def test_lcm_loops(options: dict[str, Any], count: int) -> None:
    compare("LCMScheduler", options, {"num_inference_steps": count})


@pytest.mark.parametrize("strength", [0.9, 0.6, 0.2])
def test_lcm_loops_with_its_own_strength(strength: float) -> None:
    compare("LCMScheduler", {}, {"num_inference_steps": 4, "strength": strength})


@pytest.mark.parametrize("skip", [1, 2, 3])
def test_lcm_loops_that_begin_inside_the_schedule(skip: int) -> None:
    compare("LCMScheduler", {}, {"num_inference_steps": 4}, skip=skip)


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_custom_timesteps(name: str) -> None:
    compare(name, {}, {"timesteps": [999, 759, 499, 259]})
    with pytest.warns(UserWarning) as caught:
        compare(name, {}, {"timesteps": [900, 701, 33]})
    assert "begin at 900" in str(caught[0].message) and "[701, 33]" in str(caught[1].message)


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_strength_cuts_custom_timesteps_and_the_last_step_is_still_the_last(name: str) -> None:
    mine, theirs = pair(name)
    for each in (mine, theirs):
        each.set_timesteps(timesteps=[999, 759, 499, 259], strength=0.5)
    assert mine.timesteps.tolist() == theirs.timesteps.tolist() == [499, 259]
    # diffusers leaves num_inference_steps at 4, so that it adds noise to the finished picture.
    assert mine.num_inference_steps == 2
    mine.set_timesteps(timesteps=[999, 759, 499, 259], strength=0.1)
    assert mine.timesteps.tolist() == [259]
    sample = torch.randn(SHAPE)
    result = mine.step(sample, 259, sample, return_dict=False)
    assert torch.equal(result[0], result[1])


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
@pytest.mark.parametrize(
    "schedule",
    [
        {},
        {"num_inference_steps": 4, "timesteps": [999]},
        {"num_inference_steps": 1001},
        {"num_inference_steps": 51},
        {"num_inference_steps": 0},
        {"num_inference_steps": 20, "strength": 0.2},
        {"num_inference_steps": 4, "strength": 0.0},
        {"timesteps": [999, 999]},
        {"timesteps": [499, 999]},
        {"timesteps": [1000, 500]},
        {"timesteps": []},
    ],
    ids=str,
)
def test_both_refuse_the_same_schedules(name: str, schedule: dict[str, Any]) -> None:
    for each in pair(name):
        assert outcome(lambda each=each: each.set_timesteps(**schedule)) == "refused"


def test_lcm_refuses_more_original_steps_than_timesteps() -> None:
    for each in pair("LCMScheduler"):
        assert outcome(lambda each=each: each.set_timesteps(4, original_inference_steps=1001)) == "refused"


def test_warns_of_long_custom_schedules_as_the_peer_does(caplog: pytest.LogCaptureFixture) -> None:
    timesteps = list(range(999, 999 - 60, -1))
    mine, theirs = pair("LCMScheduler")
    diffusers.logging.set_verbosity_warning()
    with caplog.at_level(logging.WARNING), pytest.warns(UserWarning) as caught:
        diffusers.logging.enable_propagation()
        theirs.set_timesteps(timesteps=timesteps)
        mine.set_timesteps(timesteps=timesteps)
    diffusers.logging.disable_propagation()
    assert len(caught) == len({record.getMessage() for record in caplog.records}) == 2
    assert "are 60, more than the 50" in str(caught[1].message)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_other_precisions(name: str, dtype: torch.dtype) -> None:
    """Ours rounds once a step where diffusers may round at each operation: a few units in the last place apart."""
    mine, theirs = pair(name, **SD)
    step = 4 * max(torch.finfo(dtype).eps, 1e-7)
    left, right = (trajectory(each, {"num_inference_steps": 4}, dtype=dtype, scale=0.5) for each in (mine, theirs))
    for got, wanted in zip(left, right, strict=True):
        assert got.dtype == wanted.dtype
        assert (got.double() - wanted.double()).abs().max() <= 4 * step * max(1.0, float(wanted.abs().max()))


# -- TCD -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("count", [1, 4, 8, 50])
def test_tcd_loops(count: int, prediction_type: str, eta: float) -> None:
    compare("TCDScheduler", {"prediction_type": prediction_type}, {"num_inference_steps": count}, {"eta": eta})


def test_tcd_reaches_the_peers_lower_timestep_for_every_eta() -> None:
    """floor((1 - eta) t) goes wrong by one where the rounding differs, which a loop would hardly show."""
    for eta in np.linspace(0, 1, 11).tolist():
        mine, theirs = pair("TCDScheduler")
        for following in range(19, 980, 40):
            step = torch.floor((1 - eta) * torch.tensor(following)).long()
            mine.set_timesteps(timesteps=[999, following])
            theirs.set_timesteps(timesteps=[999, following])
            sample = torch.ones(1, 1, 1, 1)
            results = [
                each.step(sample, each.timesteps[0], sample, eta=eta, generator=torch.Generator().manual_seed(0))
                for each in (mine, theirs)
            ]
            torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-6, msg=f"{eta} {step}")


def test_tcd_skips_the_training_grid_when_original_steps_are_given() -> None:
    compare("TCDScheduler", {}, {"num_inference_steps": 8, "original_inference_steps": 200})
    for each in pair("TCDScheduler"):
        assert outcome(lambda each=each: each.set_timesteps(9, original_inference_steps=8)) == "refused"


# -- DDIM ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_loops(spacing: str, prediction_type: str, eta: float) -> None:
    options = {**SD, "timestep_spacing": spacing, "prediction_type": prediction_type, "clip_sample": False}
    for count in (1, 7, 50):
        for more in (
            {},
            {"set_alpha_to_one": False, "steps_offset": 1},
            {"rescale_betas_zero_snr": spacing == "linspace"},
        ):
            # The last timestep has no signal after rescaling: predicting x_0 from noise divides by zero there, and at
            # eta 1 diffusers takes the root of a number that rounding has left below 0.
            if more.get("rescale_betas_zero_snr") and (prediction_type == "epsilon" or eta == 1):
                continue
            compare("DDIMScheduler", {**options, **more}, {"num_inference_steps": count}, {"eta": eta})


@pytest.mark.parametrize(
    "options",
    [
        {"clip_sample": True},
        {"clip_sample": True, "clip_sample_range": 0.3},
        {"thresholding": True, "sample_max_value": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("clipped", [False, True])
def test_ddim_clipping(options: dict[str, Any], clipped: bool) -> None:
    compare("DDIMScheduler", options, {"num_inference_steps": 10}, {"use_clipped_model_output": clipped, "eta": 0.2})


def test_ddim_variance_noise_and_timesteps_off_the_schedule() -> None:
    mine, theirs = pair("DDIMScheduler", **SD)
    sample, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    for each in (mine, theirs):
        each.set_timesteps(10)
    for timestep in (999, 512, 37, 1, torch.tensor(640)):
        steps = [
            each.step(sample, timestep, sample, eta=0.5, variance_noise=noise, return_dict=False)
            for each in (mine, theirs)
        ]
        assert_same(list(steps[0]), list(steps[1]))
    with pytest.raises(ValueError, match="not both"):
        mine.step(sample, 1, sample, eta=0.5, variance_noise=noise, generator=torch.Generator())
    with pytest.raises(ValueError, match="1001; it must be 1 to 1000"):
        mine.set_timesteps(1001)


# -- Euler ---------------------------------------------------------------------------------------------------------


EULER_OPTIONS: list[dict[str, Any]] = [
    {},
    {"use_karras_sigmas": True},
    {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 20.0},
    {"use_exponential_sigmas": True},
    {"use_exponential_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0},
    {"interpolation_type": "log_linear"},
    {"final_sigmas_type": "sigma_min"},
    {"rescale_betas_zero_snr": True},
    {"steps_offset": 1},
]


@pytest.mark.parametrize("options", EULER_OPTIONS, ids=str)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_euler_loops(options: dict[str, Any], spacing: str, prediction_type: str) -> None:
    options = {**SD, **options, "timestep_spacing": spacing, "prediction_type": prediction_type}
    for count in (1, 4, 30):
        compare("EulerDiscreteScheduler", options, {"num_inference_steps": count})


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_euler_churn(prediction_type: str) -> None:
    churn = {"s_churn": 8.0, "s_tmin": 0.1, "s_tmax": 10.0, "s_noise": 1.05}
    compare("EulerDiscreteScheduler", {**SD, "prediction_type": prediction_type}, {"num_inference_steps": 12}, churn)


def test_euler_custom_timesteps_and_sigmas() -> None:
    compare("EulerDiscreteScheduler", SD, {"timesteps": [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]})
    compare("EulerDiscreteScheduler", SD, {"sigmas": [14.615, 6.475, 3.861, 2.697, 1.886, 0.399, 0.152, 0.0]})


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_euler_ancestral_loops(spacing: str, prediction_type: str, zero_snr: bool) -> None:
    options = {
        **SD,
        "timestep_spacing": spacing,
        "prediction_type": prediction_type,
        "rescale_betas_zero_snr": zero_snr,
    }
    for count in (1, 4, 30):
        compare("EulerAncestralDiscreteScheduler", options, {"num_inference_steps": count})


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_euler_input_and_refusals(name: str) -> None:
    mine, theirs = pair(name, **SD)
    sample = torch.randn(SHAPE)
    for each in (mine, theirs):
        each.set_timesteps(4)
    for timestep in mine.timesteps:
        inputs = [each.scale_model_input(sample, timestep) for each in (mine, theirs)]
        assert_same(*[[each] for each in inputs])
    for timestep in (3, torch.tensor(999)):
        with pytest.raises(ValueError, match="is an index"):
            mine.step(sample, timestep, sample)
    mine.set_timesteps(4)
    with pytest.warns(UserWarning, match="before scale_model_input"):
        mine.step(sample, mine.timesteps[0], sample)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EulerDiscreteScheduler", {"use_beta_sigmas": True}),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}),
        ("EulerDiscreteScheduler", {"interpolation_type": "cubic"}),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "small"}),
        ("EulerAncestralDiscreteScheduler", {"prediction_type": "sample"}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}),
        ("DPMSolverMultistepScheduler", {"solver_type": "bogus"}),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
        ("DPMSolverMultistepScheduler", {"use_beta_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"use_dynamic_shifting": True}),
        ("DPMSolverMultistepScheduler", {"variance_type": "learned"}),
        ("DPMSolverMultistepScheduler", {"solver_order": 4}),
        ("LCMScheduler", {"prediction_type": "flow_prediction"}),
        ("TCDScheduler", {"prediction_type": "flow_prediction"}),
        ("DDIMScheduler", {"prediction_type": "flow_prediction"}),
    ],
)
def test_unsupported_options_are_named(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedConfig) as caught:
        getattr(ours, name)(**options)
    ((option, value),) = options.items()
    assert option in str(caught.value) and repr(value) in str(caught.value)


# -- DPM-Solver++ --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_dpmpp_loops(algorithm: str, order: int, solver: str, prediction_type: str) -> None:
    options = {**SD, "algorithm_type": algorithm, "solver_order": order, "solver_type": solver}
    if order == 3 and algorithm == "sde-dpmsolver++":
        with pytest.raises(UnsupportedConfig, match="solver_order 3"):
            ours.DPMSolverMultistepScheduler(**options)
        return
    for count in (1, 2, 3, 8, 25):
        compare(
            "DPMSolverMultistepScheduler",
            {**options, "prediction_type": prediction_type},
            {"num_inference_steps": count},
        )


@pytest.mark.parametrize(
    "options",
    [
        {"use_karras_sigmas": True},
        {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
        {"use_exponential_sigmas": True},
        {"timestep_spacing": "leading", "steps_offset": 1},
        {"timestep_spacing": "trailing"},
        {"lower_order_final": False},
        {"euler_at_final": True},
        {"final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        {"thresholding": True, "sample_max_value": 2.0},
        {"algorithm_type": "deis", "solver_type": "logrho", "final_sigmas_type": "sigma_min"},
        {"solver_type": "bh2", "variance_type": "fixed_small"},
    ],
    ids=str,
)
@pytest.mark.parametrize("order", [2, 3])
def test_dpmpp_options(options: dict[str, Any], order: int) -> None:
    for count in (4, 10, 20):
        compare("DPMSolverMultistepScheduler", {**SD, **options, "solver_order": order}, {"num_inference_steps": count})


def test_dpmpp_custom_timesteps_and_variance_noise() -> None:
    compare("DPMSolverMultistepScheduler", SD, {"timesteps": [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]})
    noise = torch.randn(SHAPE)
    compare(
        "DPMSolverMultistepScheduler",
        {**SD, "algorithm_type": "sde-dpmsolver++"},
        {"num_inference_steps": 5},
        {"variance_noise": noise},
    )


@pytest.mark.parametrize("name", NAMES)
def test_both_refuse_contradictory_schedules(name: str) -> None:
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = []
    if name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
        cases += [({"use_karras_sigmas": True, "use_exponential_sigmas": True}, {"num_inference_steps": 4})]
        cases += [
            ({option: True}, {"timesteps": [999, 499]}) for option in ("use_karras_sigmas", "use_exponential_sigmas")
        ]
        cases += [({}, {}), ({}, {"num_inference_steps": 4, "timesteps": [999]})]
    if name == "EulerDiscreteScheduler":
        cases += [({}, {"timesteps": [999], "sigmas": [3.0, 0.0]})]
    for options, schedule in cases:
        for library in (ours, diffusers):
            make = getattr(library, name)
            assert outcome(lambda make=make: make(**options).set_timesteps(**schedule)) == "refused"  # noqa: B023


# -- for all -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_list_of_generators_gives_every_sample_its_own_noise(name: str) -> None:
    options = {**SD, "algorithm_type": "sde-dpmsolver++"} if name.startswith("DPM") else SD
    step = {"eta": 0.5} if name in ("DDIMScheduler", "TCDScheduler") else {}
    step = {"s_churn": 3.0} if name == "EulerDiscreteScheduler" else step
    compare(name, options, {"num_inference_steps": 4}, step, seeds=[1, 2, 3])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("skip", [2, 5])
def test_begin_index_and_add_noise_as_image_to_image_uses_them(name: str, skip: int) -> None:
    mine, theirs = pair(name, **SD)
    original, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    results = []
    for each in (mine, theirs):
        each.set_timesteps(8)
        first = each.timesteps[skip : skip + 1]
        made = [each.add_noise(original, noise, first)]  # found by the timestep
        if hasattr(each, "set_begin_index"):
            each.set_begin_index(skip)
        made.append(each.add_noise(original, noise, first.repeat(3)))
        sample = made[0]
        for timestep in each.timesteps[skip:]:
            output = network(each.scale_model_input(sample, timestep), timestep)
            sample = each.step(output, timestep, sample, generator=torch.Generator().manual_seed(1))[0]
            made.append(sample)
        results.append(made)
    assert_same(*results)
    if skip == 2 and name.startswith(("Euler", "DPM")):
        # Inside a loop they noise to where the loop is, whatever the timestep (4-channel inpainting).
        made = []
        for each in (mine, theirs):
            each.set_timesteps(8)
            each.set_begin_index(1)
            each.scale_model_input(original, each.timesteps[1])
            each.step(original, each.timesteps[1], original)
            made.append([each.add_noise(original, noise, each.timesteps[2:3])])
        assert_same(*made)


def test_a_repeated_timestep_is_found_at_its_second_place() -> None:
    for name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
        for each in pair(name, **SD):
            schedule = torch.tensor([999.0, 500.0, 500.0, 3.0])
            assert [each.index_for_timestep(t, schedule) for t in schedule] == [0, 2, 2, 3]
            assert each.index_for_timestep(500.0, schedule) == 2


@pytest.mark.parametrize("name", ["LCMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_add_noise_and_get_velocity_at_any_timestep(name: str, dtype: torch.dtype) -> None:
    mine, theirs = pair(name, **SD)
    original, noise = torch.randn(SHAPE, dtype=dtype), torch.randn(SHAPE, dtype=dtype)
    timesteps = torch.tensor([0, 400, 999])
    for method in ("add_noise", "get_velocity"):
        results = [getattr(each, method)(original, noise, timesteps) for each in (mine, theirs)]
        assert_same([results[0]], [results[1]])


@pytest.mark.parametrize("name", NAMES)
def test_a_step_needs_a_schedule_with_its_timestep_and_is_not_taken_twice(name: str) -> None:
    scheduler = getattr(ours, name)(**SD)
    sample = torch.randn(SHAPE)
    if not name.startswith("Euler"):  # which start with the full schedule, as diffusers' do
        with pytest.raises(ValueError, match=f"{name} has no schedule yet: call set_timesteps"):
            scheduler.step(sample, 999, sample)
    if name == "DDIMScheduler":  # keeps no place
        return
    scheduler.set_timesteps(2)
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(sample, timestep)
        scheduler.step(sample, timestep, sample)
    assert scheduler.step_index == 2
    with pytest.raises(ValueError, match="all 2 steps have been taken"):
        scheduler.step(sample, scheduler.timesteps[-1], sample)
    scheduler.set_timesteps(2)
    assert scheduler.step_index is None and scheduler.begin_index is None
    if not name.startswith("DPM"):
        with pytest.raises(ValueError, match="timestep 123 is not in the schedule"):
            scheduler.index_for_timestep(123)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_read_by_name_place_and_unpacking(name: str) -> None:
    mine, theirs = pair(name, **SD)
    sample = torch.randn(SHAPE)
    results = []
    for each in (mine, theirs):
        each.set_timesteps(2)
        each.scale_model_input(sample, each.timesteps[0])
        results.append(each.step(sample, each.timesteps[0], sample, generator=torch.Generator().manual_seed(0)))
    got, wanted = results
    assert list(got.keys()) == list(wanted.keys())
    assert_same(list(got.to_tuple()), list(wanted.to_tuple()))
    assert_same(list(got.values()), list(wanted.values()))
    assert got[0] is got.prev_sample is got["prev_sample"] is list(got)[0]
    assert dict(got).keys() == dict(wanted).keys()
    assert len(got[:1]) == 1


@pytest.mark.parametrize("shape", [(3, 2, 4), (1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("how", ["global", "one", "list of one", "list"])
def test_random_numbers_are_drawn_as_the_peer_draws_them(shape: tuple[int, ...], dtype: torch.dtype, how: str) -> None:
    def draw(function: Any) -> Tensor:
        torch.manual_seed(5)
        made: Any = {"global": None, "one": torch.Generator().manual_seed(5)}.get(how, [])
        if how.startswith("list"):
            count = 1 if how == "list of one" else shape[0]
            made = [torch.Generator().manual_seed(5 + i) for i in range(count)]
        return torch.stack([function(shape, made, device=torch.device("cpu"), dtype=dtype) for _ in range(2)])

    assert torch.equal(draw(randn_tensor), draw(peer_randn_tensor))


# -- configurations ------------------------------------------------------------------------------------------------


def visible(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


OPTIONS: dict[str, dict[str, Any]] = {
    "LCMScheduler": {"original_inference_steps": 25, "beta_schedule": "linear", "prediction_type": "v_prediction"},
    "TCDScheduler": {"beta_end": 0.02, "trained_betas": [0.1, 0.2]},
    "DDIMScheduler": {"timestep_spacing": "trailing", "clip_sample": False, "rescale_betas_zero_snr": True},
    "EulerDiscreteScheduler": {"use_karras_sigmas": True, "sigma_max": 30.0},
    "EulerAncestralDiscreteScheduler": {"steps_offset": 1},
    "DPMSolverMultistepScheduler": {"solver_order": 3, "lambda_min_clipped": -5.1, "solver_type": "heun"},
}


@pytest.mark.parametrize("name", NAMES)
def test_configurations_are_exchanged_with_diffusers_both_ways(name: str, tmp_path: Path) -> None:
    mine, theirs = pair(name, **OPTIONS[name])
    assert visible(mine.config) == visible(theirs.config)
    assert set(mine.config["_use_default_values"]) == set(theirs.config["_use_default_values"])
    mine.save_pretrained(tmp_path / "mine")
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "mine" / "scheduler_config.json").is_file()
    read = [
        getattr(diffusers, name).from_pretrained(tmp_path / "mine"),
        getattr(ours, name).from_pretrained(tmp_path / "theirs"),
        getattr(ours, name).from_pretrained(tmp_path, subfolder="mine"),
        getattr(ours, name).from_pretrained(tmp_path / "mine" / "scheduler_config.json"),
        getattr(diffusers, name).from_config(mine.config),
        getattr(ours, name).from_config(theirs.config),
    ]
    for scheduler in read:
        assert visible(scheduler.config) == visible(mine.config)
        assert type(scheduler).__name__ == name == scheduler.config["_class_name"]
    assert "_use_default_values" not in read[2].config


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(NAMES, 2)))
def test_from_config_between_classes_keeps_and_forgets_what_the_peer_does(first: str, second: str) -> None:
    mine, theirs = pair(first, **OPTIONS[first])
    for extra in ({}, {"beta_start": 0.001}):
        try:
            wanted = getattr(diffusers, second).from_config(theirs.config, **extra)
        except (ValueError, NotImplementedError):
            continue
        got = getattr(ours, second).from_config(mine.config, **extra)
        assert visible(got.config) == visible(wanted.config)
        assert set(got.config["_use_default_values"]) == set(wanted.config["_use_default_values"])
        back, wanted_back = (getattr(o, first).from_config(c.config) for o, c in ((ours, got), (diffusers, wanted)))
        assert visible(back.config) == visible(wanted_back.config)
        if not extra:
            assert visible(back.config) == visible(mine.config)  # the round trip loses nothing


PNDM = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_of_a_scheduler_that_we_do_not_run_can_be_taken_over(name: str, tmp_path: Path) -> None:
    """The first line of the LCM-LoRA guide, on Stable Diffusion 1.5's own file."""
    (tmp_path / "scheduler_config.json").write_text(json.dumps(PNDM))
    kept = ours.load_scheduler("PNDMScheduler", PNDM)
    assert isinstance(kept, ours.ConfigOnly)
    got = getattr(ours, name).from_config(kept.config)
    wanted = getattr(diffusers, name).from_config(diffusers.PNDMScheduler.from_pretrained(tmp_path).config)
    assert visible(got.config) == visible(wanted.config)
    assert got.config["skip_prk_steps"] is True and got.config["_diffusers_version"] == "0.6.0"
    kept.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "scheduler_config.json").read_text()) == PNDM
    assert visible(diffusers.PNDMScheduler.from_pretrained(tmp_path / "again").config).items() >= visible(PNDM).items()
