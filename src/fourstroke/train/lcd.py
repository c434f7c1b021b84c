"""Latent consistency distillation as pure functions (Luo et al. 2023, "LCM", arXiv 2310.04378; LoRA form: 2311.05556).

The student learns a function ``f(x_t, t)`` that jumps from any point of a diffusion trajectory to its picture. It is
taught by agreement with itself: what it says at ``t`` must be what it says at an earlier ``s = t - k``, where the point
at ``s`` is found by one guided solver step of the teacher. With an LCM-LoRA the student is the teacher plus low-rank
pairs, and the guidance is distilled in with no input for its scale (2311.05556, sec. 3.1).

A training step, for latents ``x0``, timesteps ``t`` and ``s`` from `draw_timesteps` and text ``c``::

    x_t = add_noise(x0, noise, alphas[t])
    with torch.no_grad():
        x_s = teacher_step(teacher(x_t, t, c), teacher(x_t, t, empty), x_t, t, s, w, alphas)
        target = consistency(student(x_s, s, c), x_s, s, alphas)
    loss = pseudo_huber(consistency(student(x_t, t, c), x_t, t, alphas), target).mean()

Tensors: samples and outputs are (B, C, h, w); timesteps are (B,) int64; ``alphas`` is the schedule's cumulative product
of ``1 - beta``, (T,), in float32 or float64; ``w`` is ``guidance_scale - 1``, (B,). Give float32 or float64 samples:
differences between neighbouring timesteps are lost in half precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..schedulers.ddim import ddim_step
from ..schedulers.lcm import boundary_scalings, training_grid
from ..schedulers.noise import predict_epsilon, predict_x0

HUBER_C = 1e-3


def draw_timesteps(
    count: int, *, num_train_timesteps: int = 1000, original_inference_steps: int = 50,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Pairs ``(t, s)`` of neighbours on the grid that `LCMScheduler` samples on: ``t = i k - 1`` and ``s = t - k``.

    The pair below the first grid point ends at timestep 0 (LCM, sec. 4.3: skipping k timesteps at once).

    Returns:
        two int64 tensors (count,), on the generator's device.
    """
    grid = torch.from_numpy(training_grid(num_train_timesteps, original_inference_steps))
    device = "cpu" if generator is None else generator.device
    chosen = torch.randint(len(grid), (count,), generator=generator, device=device)
    later = grid.to(device)[chosen]
    return later, (later - num_train_timesteps // original_inference_steps).clamp(min=0)


def draw_guidance(count: int, low: float, high: float, generator: torch.Generator | None = None) -> Tensor:
    """``w = guidance_scale - 1`` for guidance scales uniform in [low, high] (LCM, alg. 1), float32 (count,).

    Raises:
        ValueError: not ``1 <= low <= high``.
    """
    if not 1 <= low <= high:
        raise ValueError(f"The guidance range is [{low}, {high}]; it must be 1 <= low <= high (1 is no guidance).")
    device = "cpu" if generator is None else generator.device
    return low - 1 + (high - low) * torch.rand(count, generator=generator, device=device)


def guided(conditional: Tensor, unconditional: Tensor, w: Tensor) -> Tensor:
    """``(1 + w) conditional - w unconditional`` (LCM, eq. 8; Ho & Salimans 2022, eq. 6)."""
    return conditional + _wide(w, conditional) * (conditional - unconditional)


def teacher_step(
    conditional: Tensor, unconditional: Tensor, sample: Tensor, timesteps: Tensor, earlier: Tensor, w: Tensor,
    alphas: Tensor, prediction_type: str = "epsilon",
) -> Tensor:  # fmt: skip
    """The guided solver step ``x_t -> x_s`` of the augmented ODE by DDIM (LCM, eq. 8-11 and app. B).

    Guidance acts on the predicted picture and on the predicted noise alike, which for epsilon prediction is guidance of
    the network's output.

    Args:
        conditional, unconditional: the teacher's outputs at ``timesteps``, with the text and with the empty text.
        earlier: ``s``, below ``timesteps``.
    """
    alpha, sigma = _alpha_sigma(alphas, timesteps, sample)
    output = guided(conditional, unconditional, w)
    x0 = predict_x0(output, sample, alpha, sigma, prediction_type)
    epsilon = predict_epsilon(output, sample, alpha, sigma, prediction_type)
    return ddim_step(x0, epsilon, _at(alphas, timesteps, sample), _at(alphas, earlier, sample))


def consistency(
    output: Tensor, sample: Tensor, timesteps: Tensor, alphas: Tensor, prediction_type: str = "epsilon",
    timestep_scaling: float = 10.0,
) -> Tensor:  # fmt: skip
    """``f(x_t, t) = c_skip(t) x_t + c_out(t) x0`` (LCM, eq. 7), with the boundary scalings that `LCMScheduler` uses.

    Args:
        output: the student's output at ``timesteps``.
        timestep_scaling: as in the scheduler's configuration.
    """
    alpha, sigma = _alpha_sigma(alphas, timesteps, sample)
    c_skip, c_out = boundary_scalings(timesteps.to(alphas.dtype), timestep_scaling)
    x0 = predict_x0(output, sample, alpha, sigma, prediction_type)
    return _wide(c_skip, sample) * sample + _wide(c_out, sample) * x0


def pseudo_huber(value: Tensor, target: Tensor, c: float = HUBER_C) -> Tensor:
    """``sqrt((value - target)^2 + c^2) - c`` of every element: L2 near zero, L1 away from it (the d of LCM, eq. 12)."""
    return ((value - target).square() + c * c).sqrt() - c


def _at(alphas: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
    return _wide(alphas.to(timesteps.device)[timesteps], like)


def _alpha_sigma(alphas: Tensor, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    chosen = _at(alphas, timesteps, like)
    return chosen.sqrt(), (1 - chosen).sqrt()


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) on the device and in the dtype of ``like``."""
    return values.to(like).reshape(-1, *[1] * (like.dim() - 1))
