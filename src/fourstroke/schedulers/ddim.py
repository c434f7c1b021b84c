"""DDIM: the deterministic many-step sampler (Song et al. 2021), which is also the teacher's solver in distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..random import randn_tensor
from .base import Scheduler, SchedulerOutput, records_config
from .noise import check_prediction_type, dynamic_threshold, predict_epsilon, predict_x0, spaced_timesteps


def ddim_step(
    x0: Tensor, epsilon: Tensor, alphas: Tensor, alphas_prev: Tensor, eta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """The sample at an earlier timestep, from what the network says of this one (DDIM, eq. 12 and 16).

    Args:
        x0, epsilon: predicted picture and noise, (B, ...).
        alphas, alphas_prev: cumulative alphas at this timestep and at the earlier one, broadcastable.
        eta: 0 is deterministic, 1 has the variance of DDPM.
        noise: needed when eta is above 0.
    """
    variance = (1 - alphas_prev) / (1 - alphas) * (1 - alphas / alphas_prev)
    deviation = eta * variance**0.5
    direction = (1 - alphas_prev - deviation**2).clamp(min=0) ** 0.5  # rounding can leave it just below 0
    sample = alphas_prev**0.5 * x0 + direction * epsilon
    return sample if noise is None else sample + deviation * noise


@dataclass(frozen=True)
class DDIMSchedulerOutput(SchedulerOutput):
    """``prev_sample`` and ``pred_original_sample``, the picture as this step sees it."""

    pred_original_sample: Tensor


class DDIMScheduler(Scheduler):
    """`ddim_step` behind diffusers' interface. A step depends on its timestep alone, which may be off the schedule."""

    @records_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | Sequence[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
    ):
        check_prediction_type(prediction_type)
        self._init_schedule()
        self.final_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose ``num_inference_steps`` timesteps, spaced as configured (`noise.spaced_timesteps`).

        Raises:
            ValueError: fewer than 1, or more than the training timesteps.
        """
        c = self.config
        if num_inference_steps > c.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}; it must be 1 to {c.num_train_timesteps}, the number of "
                "timesteps that the model was trained with."
            )
        chosen = spaced_timesteps(c.timestep_spacing, num_inference_steps, c.num_train_timesteps, c.steps_offset)
        self._start(chosen.round(), device, torch.long)
        self.num_inference_steps = num_inference_steps
        alphas = self.alphas_cumprod.cpu()
        stride = c.num_train_timesteps // num_inference_steps
        previous = torch.cat([self.final_alpha_cumprod.expand(stride), alphas[: len(alphas) - stride]])
        self._alphas = torch.stack([alphas, previous], dim=1)[..., None].to(self.timesteps.device)  # (T, 2, 1)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Take the sample from ``timestep`` to the one a stride earlier.

        Args:
            model_output: the network's output at ``sample``, (B, ...).
            timestep: an integer, or a 0-dimensional integer tensor (which is not read back to the host).
            sample: (B, ...).
            eta: see `ddim_step`.
            use_clipped_model_output: work the noise out anew from the clipped picture.
            generator: for the noise when eta is above 0; or
            variance_noise: that noise itself.
            return_dict: False returns the tuple ``(prev_sample, pred_original_sample)``.

        Raises:
            ValueError: no schedule, or both generator and variance_noise.
        """
        self._require_schedule()
        c = self.config
        if eta > 0 and variance_noise is not None and generator is not None:
            raise ValueError("Give generator or variance_noise, not both.")
        alphas, alphas_prev = self._alphas_for(timestep, sample.device)
        alpha, sigma = alphas**0.5, (1 - alphas) ** 0.5
        x0 = predict_x0(model_output, sample, alpha, sigma, c.prediction_type)
        epsilon = predict_epsilon(model_output, sample, alpha, sigma, c.prediction_type)
        if c.thresholding:
            x0 = dynamic_threshold(x0, c.dynamic_thresholding_ratio, c.sample_max_value)
        elif c.clip_sample:
            x0 = x0.clamp(-c.clip_sample_range, c.clip_sample_range)
        if use_clipped_model_output:
            epsilon = (sample - alpha * x0) / sigma
        noise = variance_noise if eta > 0 else None
        if eta > 0 and noise is None:
            noise = randn_tensor(model_output.shape, generator, device=model_output.device, dtype=model_output.dtype)
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        prev_sample = ddim_step(x0, epsilon, alphas, alphas_prev, eta, noise).to(dtype)
        x0 = x0.to(dtype)
        return DDIMSchedulerOutput(prev_sample, x0) if return_dict else (prev_sample, x0)

    def _alphas_for(self, timestep: int | Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._alphas.device != device:
            self._alphas = self._alphas.to(device)
        if isinstance(timestep, Tensor):  # index_select, because a tensor between brackets would be read back
            row = self._alphas.index_select(0, timestep.to(device, torch.long).reshape(1))[0]
        else:
            row = self._alphas[timestep]
        return row[0], row[1]
