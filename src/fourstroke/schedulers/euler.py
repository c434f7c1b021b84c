"""Euler's method on the probability flow, plain and ancestral (Karras et al. 2022; as in k-diffusion)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..random import randn_tensor
from .base import Scheduler, SchedulerOutput, records_config
from .noise import (
    check_option,
    check_prediction_type,
    exponential_sigmas,
    karras_sigmas,
    sigma_to_timestep,
    sigmas_of,
    spaced_timesteps,
)


def sigma_predict_x0(output: Tensor, sample: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """The picture that the network's output implies, for samples ``x_0 + sigma eps`` (EDM, table 1; k-diffusion).

    Args:
        output: of the network at ``sample / sqrt(sigma^2 + 1)``, (B, ...).
        sample: (B, ...).
        sigma: 0-dimensional.
        prediction_type: ``epsilon``, ``v_prediction``, or ``sample`` (also called ``original_sample``).
    """
    if prediction_type == "epsilon":
        return sample - sigma * output
    if prediction_type == "v_prediction":
        return output * (-sigma / (sigma**2 + 1) ** 0.5) + sample / (sigma**2 + 1)
    return output


def euler_step(sample: Tensor, x0: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """``x + (x - x_0) / sigma * (sigma_next - sigma)`` (EDM, alg. 1 without its correction)."""
    return sample + (sample - x0) / sigma * (sigma_next - sigma)


def ancestral_sigmas(sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    """How far down to go, and how much noise to add, for a variance of ``sigma_next^2`` (DDPM's posterior, eq. 7)."""
    up = (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5
    return (sigma_next**2 - up**2) ** 0.5, up


@dataclass(frozen=True)
class EulerSchedulerOutput(SchedulerOutput):
    """``prev_sample`` and ``pred_original_sample``, the picture as this step sees it."""

    pred_original_sample: Tensor


class EulerDiscreteScheduler(Scheduler):
    """`euler_step` behind diffusers' interface."""

    @records_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        interpolation_type: str = "linear",
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        timestep_spacing: str = "linspace",
        timestep_type: str = "discrete",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        final_sigmas_type: str = "zero",
    ):
        check_prediction_type(prediction_type, ("epsilon", "v_prediction", "sample", "original_sample"))
        check_option("timestep_type", timestep_type, "discrete")
        check_option("use_beta_sigmas", use_beta_sigmas, False, None)
        check_option("interpolation_type", interpolation_type, "linear", "log_linear")
        check_option("final_sigmas_type", final_sigmas_type, "zero", "sigma_min")
        if use_karras_sigmas and use_exponential_sigmas:
            raise ValueError("Only one of use_karras_sigmas and use_exponential_sigmas can be used.")
        self._init_schedule(finite_sigma=True)
        self._set_sigmas(sigmas_of(self.alphas_cumprod).flip(0).tolist(), 0.0)
        self.timesteps = self.timesteps.float()

    def _set_sigmas(self, sigmas: Sequence[float] | np.ndarray, last: float) -> None:
        self.sigmas = torch.from_numpy(np.append(sigmas, last).astype(np.float32))
        self.is_scale_input_called = False

    @property
    def init_noise_sigma(self) -> Tensor:
        """The standard deviation of the first sample, 0-dimensional float32 on the CPU."""
        return _init_noise_sigma(self)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """``sample / sqrt(sigma^2 + 1)``, the network's input; must be called before every `step`."""
        return _scale_model_input(self, sample, timestep)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``x_0 + sigma eps``, (B, ...), at timesteps (B,) of the schedule, or where a loop with begin_index is."""
        return original_samples + noise * self._sigmas_at(timesteps, original_samples)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Choose the timesteps to run: how many, spaced as configured; or which ones; or at which sigmas.

        Args:
            num_inference_steps: how many.
            device: where ``timesteps`` go.
            timesteps: descending.
            sigmas: descending, one more than steps, the last being where the loop ends (0, as a rule).

        Raises:
            ValueError: not exactly one of the three given, or timesteps together with a configured choice of sigmas.
        """
        if sum(given is not None for given in (num_inference_steps, timesteps, sigmas)) != 1:
            raise ValueError("Give exactly one of num_inference_steps, timesteps and sigmas.")
        c = self.config
        if timesteps is not None and (c.use_karras_sigmas or c.use_exponential_sigmas):
            raise ValueError("timesteps cannot be given when use_karras_sigmas or use_exponential_sigmas chooses them.")
        train_sigmas = sigmas_of(self.alphas_cumprod).cpu().numpy()
        last = float(train_sigmas[0]) if c.final_sigmas_type == "sigma_min" else 0.0
        if sigmas is not None:
            levels, last = np.asarray(sigmas[:-1], dtype=np.float32), sigmas[-1]
            steps = sigma_to_timestep(levels, train_sigmas)
        elif timesteps is not None:
            steps, levels = self._interpolate(np.asarray(timesteps), train_sigmas)
        else:
            spaced = spaced_timesteps(
                c.timestep_spacing, num_inference_steps or 0, c.num_train_timesteps, c.steps_offset
            )
            steps, levels = self._interpolate(spaced, train_sigmas)
        self._start(np.asarray(steps, dtype=np.float32), device, torch.float32)
        self._set_sigmas(levels, last)

    def _interpolate(self, steps: np.ndarray, train_sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The timesteps, and a sigma for each, as the configuration wants them."""
        c, count = self.config, len(steps)
        steps = steps.astype(np.float32)
        levels = np.interp(steps, np.arange(len(train_sigmas)), train_sigmas)
        if c.interpolation_type == "log_linear":
            ends = torch.from_numpy(np.log(train_sigmas[[-1, 0]]))
            levels = torch.linspace(float(ends[0]), float(ends[1]), count + 1).exp().numpy()
        if not (c.use_karras_sigmas or c.use_exponential_sigmas):
            return steps, levels
        smallest = float(levels[-1]) if c.sigma_min is None else c.sigma_min
        largest = float(levels[0]) if c.sigma_max is None else c.sigma_max
        levels = (karras_sigmas if c.use_karras_sigmas else exponential_sigmas)(smallest, largest, count)
        return sigma_to_timestep(levels, train_sigmas), levels

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> EulerSchedulerOutput | tuple[Tensor, Tensor]:
        """Take the sample one step on.

        Args:
            model_output: the network's output at ``scale_model_input(sample)``, (B, ...).
            timestep: one of ``timesteps``; used on the first step, to find its place.
            sample: (B, ...).
            s_churn, s_tmin, s_tmax, s_noise: noise added before the step where s_tmin <= sigma <= s_tmax (EDM, alg. 2).
            generator: for that noise; one for the batch or a list with one a sample.
            return_dict: False returns the tuple ``(prev_sample, pred_original_sample)``.

        Raises:
            ValueError: an integer timestep, no schedule, a timestep that is not in it, or a step too many.
        """
        index = _enter(self, timestep)
        sample = sample.float()
        sigma, sigma_next = self.sigmas[index], self.sigmas[index + 1]
        gamma = min(s_churn / (len(self.sigmas) - 1), 2**0.5 - 1) if s_tmin <= sigma <= s_tmax else 0.0
        raised = sigma * (gamma + 1)
        if gamma > 0:
            noise = randn_tensor(model_output.shape, generator, device=model_output.device, dtype=model_output.dtype)
            sample = sample + noise * s_noise * (raised**2 - sigma**2) ** 0.5
        prediction = self.config.prediction_type
        seen = sigma if prediction == "v_prediction" else raised  # a velocity belongs to the sigma the network was told
        x0 = sigma_predict_x0(model_output, sample, seen, prediction)
        prev_sample = euler_step(sample, x0, raised, sigma_next).to(model_output.dtype)
        self.step_index = index + 1
        return EulerSchedulerOutput(prev_sample, x0) if return_dict else (prev_sample, x0)


class EulerAncestralDiscreteScheduler(Scheduler):
    """`euler_step` down to `ancestral_sigmas`, and noise up from there, behind diffusers' interface."""

    @records_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ):
        check_prediction_type(prediction_type, ("epsilon", "v_prediction"))
        self._init_schedule(finite_sigma=True)
        self._set_sigmas(sigmas_of(self.alphas_cumprod).flip(0).tolist())
        self.timesteps = self.timesteps.double()

    def _set_sigmas(self, sigmas: Sequence[float] | np.ndarray) -> None:
        self.sigmas = torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32))
        self.is_scale_input_called = False

    @property
    def init_noise_sigma(self) -> Tensor:
        """The standard deviation of the first sample, 0-dimensional float32 on the CPU."""
        return _init_noise_sigma(self)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """``sample / sqrt(sigma^2 + 1)``, the network's input; must be called before every `step`."""
        return _scale_model_input(self, sample, timestep)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """As `EulerDiscreteScheduler.add_noise`."""
        return original_samples + noise * self._sigmas_at(timesteps, original_samples)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose ``num_inference_steps`` timesteps, spaced as configured; ValueError when fewer than 1."""
        c = self.config
        steps = spaced_timesteps(c.timestep_spacing, num_inference_steps, c.num_train_timesteps, c.steps_offset)
        steps = steps.astype(np.float32)
        train_sigmas = sigmas_of(self.alphas_cumprod).cpu().numpy()
        self._start(steps, device, torch.float32)
        self._set_sigmas(np.interp(steps, np.arange(len(train_sigmas)), train_sigmas))

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> EulerSchedulerOutput | tuple[Tensor, Tensor]:
        """Take the sample one step on; arguments and errors as for `EulerDiscreteScheduler.step`.

        Noise is drawn on the last step too, though none of it is used, as diffusers does.
        """
        index = _enter(self, timestep)
        sample = sample.float()
        sigma = self.sigmas[index]
        down, up = ancestral_sigmas(sigma, self.sigmas[index + 1])
        x0 = sigma_predict_x0(model_output, sample, sigma, self.config.prediction_type)
        noise = randn_tensor(model_output.shape, generator, device=model_output.device, dtype=model_output.dtype)
        prev_sample = (euler_step(sample, x0, sigma, down) + noise * up).to(model_output.dtype)
        self.step_index = index + 1
        return EulerSchedulerOutput(prev_sample, x0) if return_dict else (prev_sample, x0)


Euler = EulerDiscreteScheduler | EulerAncestralDiscreteScheduler


def _init_noise_sigma(scheduler: Euler) -> Tensor:
    largest = scheduler.sigmas.max()
    whole = scheduler.config.timestep_spacing in ("linspace", "trailing")
    return largest if whole else (largest**2 + 1) ** 0.5


def _scale_model_input(scheduler: Euler, sample: Tensor, timestep: float | Tensor) -> Tensor:
    index = scheduler._enter(timestep)
    scheduler.is_scale_input_called = True
    return sample / (scheduler.sigmas[index] ** 2 + 1) ** 0.5


def _enter(scheduler: Euler, timestep: float | Tensor) -> int:
    whole = not timestep.is_floating_point() if isinstance(timestep, Tensor) else isinstance(timestep, int)
    if whole:
        raise ValueError(f"timestep {timestep} is an index; pass one of scheduler.timesteps, which are floats.")
    if not scheduler.is_scale_input_called:
        warnings.warn("step was called before scale_model_input, without which the pictures are wrong.", stacklevel=3)
    return scheduler._enter(timestep)
