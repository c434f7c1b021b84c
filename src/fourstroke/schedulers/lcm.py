"""The latent consistency sampler: from noise to a picture in one to eight network calls (Luo et al. 2023, "LCM")."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..random import randn_tensor
from .base import Scheduler, SchedulerOutput, records_config
from .noise import check_prediction_type, dynamic_threshold, predict_x0

SIGMA_DATA = 0.5  # standard deviation of the data that the boundary condition assumes


def training_grid(num_train_timesteps: int, original_inference_steps: int, strength: float = 1.0) -> np.ndarray:
    """The timesteps that an LCM was distilled on, up to ``strength`` of them: ``i k - 1`` for i = 1, 2, ... (LCM, 4.3).

    k is ``num_train_timesteps // original_inference_steps``, 20 for the published models.

    Returns:
        ascending int64, (int(original_inference_steps * strength),).

    Raises:
        ValueError: more original steps than training timesteps, or strength not in (0, 1].
    """
    if not 1 <= original_inference_steps <= num_train_timesteps:
        raise ValueError(
            f"original_inference_steps is {original_inference_steps}; it must be 1 to {num_train_timesteps}, the "
            "number of timesteps that the model was trained with."
        )
    check_strength(strength)
    k = num_train_timesteps // original_inference_steps
    return np.arange(1, int(original_inference_steps * strength) + 1) * k - 1


def check_strength(strength: float) -> None:
    """Raise ValueError unless 0 < strength <= 1."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}; it must be above 0 and at most 1.")


def lcm_timesteps(
    num_inference_steps: int,
    *,
    num_train_timesteps: int = 1000,
    original_inference_steps: int = 50,
    strength: float = 1.0,
) -> list[int]:
    """``num_inference_steps`` timesteps, descending, spread evenly over the training grid (LCM, sec. 4.3).

    ``strength`` shortens the grid and not the schedule: 4 steps are 999 759 499 259 at strength 1, and 599 459 299 159
    at 0.6.

    Raises:
        ValueError: a number is out of range, or the grid has fewer timesteps than asked for.
    """
    grid = training_grid(num_train_timesteps, original_inference_steps, strength)
    return pick_evenly(grid, num_inference_steps, num_train_timesteps, strength)


def pick_evenly(grid: np.ndarray, count: int, num_train_timesteps: int, strength: float) -> list[int]:
    """``count`` timesteps from an ascending ``grid``, descending, the first being the grid's last.

    Raises:
        ValueError: count is below 1 or above the grid's length.
    """
    if not 1 <= count <= num_train_timesteps:
        raise ValueError(
            f"num_inference_steps is {count}; it must be 1 to {num_train_timesteps}, the number of timesteps that the "
            "model was trained with."
        )
    if count > len(grid):
        raise ValueError(
            f"num_inference_steps is {count}, but the distillation schedule has {len(grid)} timesteps at strength "
            f"{strength}. Take at most {len(grid)} steps, or raise strength or original_inference_steps."
        )
    places = np.floor(np.linspace(0, len(grid), count, endpoint=False)).astype(np.int64)
    return grid[::-1][places].tolist()


def custom_timesteps(
    timesteps: Sequence[int], grid: np.ndarray, num_train_timesteps: int, longest: int, strength: float
) -> list[int]:
    """The caller's own ``timesteps``, checked; of these, the last ``int(n * strength)`` (at least one).

    Warns when the first is not the last training timestep (at strength 1), when others to run are not in ``grid`` (the
    timesteps that the model was distilled on), or when there are more than ``longest``.

    Raises:
        ValueError: none given, not descending, beyond the training timesteps, or strength not in (0, 1].
    """
    check_strength(strength)
    steps = [int(t) for t in timesteps]
    if not steps:
        raise ValueError("timesteps is empty; give at least one timestep.")
    if any(later >= earlier for earlier, later in zip(steps, steps[1:], strict=False)):
        raise ValueError(f"timesteps must be in descending order, each once, but are {steps}.")
    if steps[0] >= num_train_timesteps or steps[-1] < 0:
        raise ValueError(f"timesteps must be 0 to {num_train_timesteps - 1} (the model's training), but are {steps}.")
    chosen = steps[-max(1, int(len(steps) * strength)) :]
    known = {*grid.tolist(), steps[0]}
    unknown = [t for t in chosen if t not in known]
    doubts = []
    if strength == 1 and steps[0] != num_train_timesteps - 1:
        doubts.append(f"begin at {steps[0]}, not at {num_train_timesteps - 1} where the samples are pure noise")
    if unknown:
        doubts.append(f"contain {unknown}, which are not timesteps that the model was distilled on")
    if len(steps) > longest:
        doubts.append(f"are {len(steps)}, more than the {longest} that the model was distilled on")
    for doubt in doubts:
        warnings.warn(f"The custom timesteps {doubt}; the picture may suffer.", stacklevel=3)
    return chosen


def boundary_scalings(
    timestep: Tensor, timestep_scaling: float = 10.0, sigma_data: float = SIGMA_DATA
) -> tuple[Tensor, Tensor]:
    """``c_skip`` and ``c_out``, for which a consistency function is the identity at timestep 0 (LCM, sec. 4.1).

    ``c_skip = d^2 / ((s t)^2 + d^2)`` and ``c_out = s t / sqrt((s t)^2 + d^2)`` for scaling s and sigma_data d, in the
    shape and dtype of ``timestep`` (a float tensor).
    """
    scaled = timestep * timestep_scaling
    square = scaled**2 + sigma_data**2
    return sigma_data**2 / square, scaled / square**0.5


class LCMCoefficients(NamedTuple):
    """The numbers of one step, (1,) each."""

    alpha: Tensor  # sqrt(a_t): how much of the picture is in the sample
    sigma: Tensor  # sqrt(1 - a_t): how much noise
    c_skip: Tensor
    c_out: Tensor
    alpha_prev: Tensor  # the same two at the next timestep
    sigma_prev: Tensor


def lcm_step(
    output: Tensor,
    sample: Tensor,
    c: LCMCoefficients,
    *,
    prediction_type: str = "epsilon",
    noise: Tensor | None = None,
    clip: float | None = None,
    threshold: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of multistep consistency sampling (LCM, alg. 3; Song et al. 2023, alg. 1).

    Denoise: ``f = c_skip x_t + c_out x_0(output)``. Noise again: ``x_s = sqrt(a_s) f + sqrt(1 - a_s) z``.

    Args:
        output, sample: the network's output and its input x_t, (B, ...).
        c: the numbers of this step.
        noise: z, the shape of ``sample``; None on the last step, which adds none.
        clip: clip x_0 to [-clip, clip].
        threshold: ratio and max_value of `dynamic_threshold`, which then replaces clipping.

    Returns:
        ``(x_s, f)``; the same tensor twice without noise.
    """
    x0 = predict_x0(output, sample, c.alpha, c.sigma, prediction_type)
    if threshold is not None:
        x0 = dynamic_threshold(x0, *threshold)
    elif clip is not None:
        x0 = x0.clamp(-clip, clip)
    denoised = c.c_out * x0 + c.c_skip * sample
    if noise is None:
        return denoised, denoised
    return c.alpha_prev * denoised + c.sigma_prev * noise, denoised


@dataclass(frozen=True)
class LCMSchedulerOutput(SchedulerOutput):
    """``prev_sample`` and ``denoised``, the picture as this step sees it (for a preview, or to decode at the end)."""

    denoised: Tensor


class LCMScheduler(Scheduler):
    """`lcm_timesteps` and `lcm_step` behind diffusers' interface.

    Nothing in `step` depends on a tensor's value: the place in the schedule is an int, and the coefficients of all
    steps lie on the device since `set_timesteps`. (The first step looks its timestep up, which waits for the device,
    unless `set_begin_index` was called.) ``steps_offset`` and ``timestep_spacing`` are accepted and do not matter here.
    """

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
        """Choose the timesteps to run.

        Args:
            num_inference_steps: how many (`lcm_timesteps`); or
            timesteps: which ones, descending, off the training grid only with a warning.
            device: where ``timesteps`` and the coefficients go; should be the samples' device.
            original_inference_steps: in place of the configured one.
            strength: above 0 and at most 1; see `lcm_timesteps` and `custom_timesteps`.

        Raises:
            ValueError: both or neither of the first two given, or what those functions raise.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Give exactly one of num_inference_steps and timesteps.")
        c = self.config
        original = c.original_inference_steps if original_inference_steps is None else original_inference_steps
        grid = training_grid(c.num_train_timesteps, original, 1.0 if num_inference_steps is None else strength)
        if timesteps is not None:
            chosen = custom_timesteps(timesteps, grid, c.num_train_timesteps, original, strength)
        else:
            chosen = pick_evenly(grid, num_inference_steps or 0, c.num_train_timesteps, strength)
        self.custom_timesteps = timesteps is not None
        self._start(chosen, device, torch.long)
        self._coefficients = self._make_coefficients(torch.tensor(chosen)).to(self.timesteps.device)

    def _make_coefficients(self, timesteps: Tensor) -> Tensor:
        """`LCMCoefficients` of all steps, (n, 6, 1) float32; not being 0-dimensional, they lift float16 to float32."""
        alphas = self.alphas_cumprod.cpu()[timesteps]
        previous = torch.cat([alphas[1:], alphas[-1:]])
        c_skip, c_out = boundary_scalings(timesteps.float(), self.config.timestep_scaling)
        rows = [alphas.sqrt(), (1 - alphas).sqrt(), c_skip, c_out, previous.sqrt(), (1 - previous).sqrt()]
        return torch.stack(rows, dim=1)[..., None]

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput | tuple[Tensor, Tensor]:
        """Take the sample one step on.

        Args:
            model_output: the network's output at ``sample``, (B, ...).
            timestep: the timestep of ``sample``; used on the first step, to find its place.
            sample: (B, ...).
            generator: one for the batch or a list with one a sample, for the noise of all steps but the last.
            return_dict: False returns the tuple ``(prev_sample, denoised)``.

        Raises:
            ValueError: no schedule, a timestep that is not in it, or a step too many.
        """
        self._require_schedule()
        index = self._enter(timestep)
        if self._coefficients.device != sample.device:
            self._coefficients = self._coefficients.to(sample.device)
        c = self.config
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        noise = None
        if index < len(self.timesteps) - 1:
            noise = randn_tensor(model_output.shape, generator, device=model_output.device, dtype=dtype)
        result = lcm_step(
            model_output,
            sample,
            LCMCoefficients(*self._coefficients[index].unbind()),
            prediction_type=c.prediction_type,
            noise=noise,
            clip=c.clip_sample_range if c.clip_sample else None,
            threshold=(c.dynamic_thresholding_ratio, c.sample_max_value) if c.thresholding else None,
        )
        self.step_index = index + 1
        prev_sample, denoised = (value.to(dtype) for value in result)
        return LCMSchedulerOutput(prev_sample, denoised) if return_dict else (prev_sample, denoised)
