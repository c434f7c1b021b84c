"""The sampler of trajectory consistency distillation (Zheng et al. 2024, "TCD"), which Hyper-SD's LoRAs want too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..random import randn_tensor
from .base import Scheduler, SchedulerOutput, records_config
from .lcm import check_strength, custom_timesteps, pick_evenly, training_grid
from .noise import check_prediction_type, predict_epsilon, predict_x0


def tcd_step(x0: Tensor, epsilon: Tensor, alphas_s: Tensor, alphas_next: Tensor, noise: Tensor | None) -> tuple:
    """Strategic stochastic sampling (TCD, alg. 4): denoise to a timestep s below the next, then noise up to the next.

    Args:
        x0, epsilon: predicted picture and noise, (B, ...).
        alphas_s, alphas_next: cumulative alphas at s and at the next timestep.
        noise: None goes no further than s.

    Returns:
        the sample at the next timestep, and the one at s.
    """
    at_s = alphas_s.sqrt() * x0 + (1 - alphas_s).sqrt() * epsilon
    if noise is None:
        return at_s, at_s
    kept = alphas_next / alphas_s
    return kept.sqrt() * at_s + (1 - kept).sqrt() * noise, at_s


@dataclass(frozen=True)
class TCDSchedulerOutput(SchedulerOutput):
    """``prev_sample`` and ``pred_noised_sample``, the sample at the timestep s to which the network's output led."""

    pred_noised_sample: Tensor


class TCDScheduler(Scheduler):
    """`tcd_step` behind diffusers' interface. The clipping and thresholding options do not matter here."""

    @records_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: np.ndarray | Sequence[float] | None = None,
        original_inference_steps: int = 50,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        timestep_scaling: float = 10.0,
        rescale_betas_zero_snr: bool = False,
    ):
        check_prediction_type(prediction_type)
        self._init_schedule()
        self.final_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]
        self.custom_timesteps = False

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        original_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        strength: float = 1.0,
    ) -> None:
        """Choose the timesteps to run, as `LCMScheduler.set_timesteps`.

        With ``original_inference_steps`` given they come from all training timesteps, not only from the distilled ones.

        Raises:
            ValueError: as there.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Give exactly one of num_inference_steps and timesteps.")
        c = self.config
        if original_inference_steps is None:
            original = c.original_inference_steps
            grid = training_grid(c.num_train_timesteps, original, 1.0 if num_inference_steps is None else strength)
        else:
            check_strength(strength)
            original = original_inference_steps
            grid = np.arange(int(c.num_train_timesteps * (1.0 if num_inference_steps is None else strength)))
        if timesteps is not None:
            chosen = custom_timesteps(timesteps, grid, c.num_train_timesteps, original, strength)
        else:
            chosen = pick_evenly(grid, num_inference_steps or 0, c.num_train_timesteps, strength)
            if len(chosen) > original:
                raise ValueError(
                    f"num_inference_steps is {len(chosen)}, more than original_inference_steps, {original}; raise that."
                )
        self.custom_timesteps = timesteps is not None
        self._start(chosen, device, torch.long)
        self._steps = chosen
        self._alphas = self.alphas_cumprod.cpu()  # 0-dimensional CPU tensors mix with any device's without a copy

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.3,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> TCDSchedulerOutput | tuple[Tensor, Tensor]:
        """Take the sample one step on.

        Args:
            model_output: the network's output at ``sample``, (B, ...).
            timestep: the timestep of ``sample``; used on the first step, to find its place.
            sample: (B, ...).
            eta: TCD's gamma, 0 to 1: 0 is deterministic, 1 is the LCM way of denoising all the way first.
            generator: one for the batch or a list with one a sample, for the noise of all steps but the last.
            return_dict: False returns the tuple ``(prev_sample, pred_noised_sample)``.

        Raises:
            ValueError: eta out of range, no schedule, a timestep that is not in it, or a step too many.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}; it must be 0 to 1.")
        self._require_schedule()
        index = self._enter(timestep)
        last = index == len(self._steps) - 1
        t, following = self._steps[index], 0 if last else self._steps[index + 1]
        s = int(np.floor(np.float32(1 - eta) * np.float32(following)))  # float32, lest a whole number be missed
        alphas = self._alphas[t]
        alpha, sigma = alphas.sqrt(), (1 - alphas).sqrt()
        prediction = self.config.prediction_type
        x0 = predict_x0(model_output, sample, alpha, sigma, prediction)
        epsilon = predict_epsilon(model_output, sample, alpha, sigma, prediction)
        noise = None
        if eta > 0 and not last:
            noise = randn_tensor(model_output.shape, generator, device=model_output.device, dtype=x0.dtype)
        result = tcd_step(x0, epsilon, self._alphas[s], self._alphas[following], noise)
        self.step_index = index + 1
        return TCDSchedulerOutput(*result) if return_dict else result
