"""The mathematics that the schedulers share, as pure functions: noise schedules, timestep grids, kinds of prediction.

Notation: a noisy sample is ``x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps`` with ``a_t`` the cumulative product of
``1 - beta`` up to the timestep ``t`` (Ho et al. 2020, "DDPM", eq. 4). The same sample divided by ``sqrt(a_t)`` is
``x_0 + sigma_t eps`` with ``sigma_t = sqrt((1 - a_t) / a_t)`` (Karras et al. 2022, "EDM", table 1), which is what the
Euler solvers work with. Schedule tensors are float32, shape (T,) for T training timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..config import UnsupportedConfig

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def make_betas(schedule: str, start: float, end: float, count: int, trained: Sequence[float] | None = None) -> Tensor:
    """The variances ``beta_t`` of the forward process.

    Args:
        schedule: ``linear`` (DDPM, sec. 4), ``scaled_linear`` (linear in the square root: latent diffusion's own) or
            ``squaredcos_cap_v2`` (`cosine_betas`).
        start, end: first and last beta; not used by the cosine schedule.
        count: T, the number of training timesteps.
        trained: the betas themselves, in place of all the above.

    Returns:
        (T,) float32.

    Raises:
        UnsupportedConfig: the schedule has another name.
    """
    if trained is not None:
        return torch.tensor(np.asarray(trained), dtype=torch.float32)
    if schedule == "linear":
        return torch.linspace(start, end, count, dtype=torch.float32)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    if schedule == "squaredcos_cap_v2":
        return cosine_betas(count)
    raise UnsupportedConfig(
        f"beta_schedule {schedule!r} is not supported; choose linear, scaled_linear or squaredcos_cap_v2, or give the "
        "betas themselves as trained_betas."
    )


def cosine_betas(count: int, largest: float = 0.999) -> Tensor:
    """Betas for which ``a_t = cos^2(((t/T + 0.008) / 1.008) pi/2)`` (Nichol & Dhariwal 2021, eq. 17), (T,) float32."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    ratios = [alpha_bar((i + 1) / count) / alpha_bar(i / count) for i in range(count)]
    return torch.tensor([min(1 - ratio, largest) for ratio in ratios], dtype=torch.float32)


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas whose last timestep is nothing but noise: ``a_T = 0`` and ``a_1`` as it was (Lin et al. 2023, alg. 1)."""
    roots = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    products = ((roots - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([products[:1], products[1:] / products[:-1]])


def sigmas_of(alphas_cumprod: Tensor) -> Tensor:
    """``sigma_t = sqrt((1 - a_t) / a_t)`` (EDM, table 1): the noise beside a sample that is not scaled down."""
    return ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5


def alpha_sigma(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The pair ``(sqrt(a_t), sqrt(1 - a_t))`` that belongs to ``sigma_t``."""
    alpha = 1 / ((sigma**2 + 1) ** 0.5)
    return alpha, sigma * alpha


def add_noise(original: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """``x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps`` (DDPM, eq. 4).

    Args:
        original, noise: (B, ...), one dtype; the result has it too. Half precision is worked out in float32.
        alphas_cumprod: ``a_t``, (B,) or (1,), on their device.
    """
    alphas = _beside(alphas_cumprod, original)
    return (alphas**0.5 * original + (1 - alphas) ** 0.5 * noise).to(original.dtype)


def get_velocity(original: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """``v_t = sqrt(a_t) eps - sqrt(1 - a_t) x_0`` (Salimans & Ho 2022, app. D); arguments as for `add_noise`."""
    alphas = _beside(alphas_cumprod, original)
    return (alphas**0.5 * noise - (1 - alphas) ** 0.5 * original).to(original.dtype)


def _beside(values: Tensor, sample: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1), in the sample's precision, though never below float32."""
    dtype = torch.promote_types(sample.dtype, torch.float32)
    return values.to(dtype).reshape(-1, *[1] * (sample.dim() - 1))


def predict_x0(output: Tensor, sample: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """The picture ``x_0`` that a network's output implies.

    Args:
        output, sample: the network's output and its input ``x_t``, (B, ...).
        alpha, sigma: ``sqrt(a_t)`` and ``sqrt(1 - a_t)``, broadcastable.
        prediction_type: ``epsilon`` (DDPM, eq. 15), ``sample`` (the output is x_0) or ``v_prediction``
            (Salimans & Ho 2022, app. D).
    """
    check_prediction_type(prediction_type)
    if prediction_type == "sample":
        return output
    if prediction_type == "v_prediction":
        return alpha * sample - sigma * output
    return (sample - sigma * output) / alpha


def predict_epsilon(output: Tensor, sample: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """The noise that a network's output implies; arguments as for `predict_x0`."""
    check_prediction_type(prediction_type)
    if prediction_type == "sample":
        return (sample - alpha * output) / sigma
    if prediction_type == "v_prediction":
        return alpha * output + sigma * sample
    return output


def check_prediction_type(prediction_type: str, known: Sequence[str] = PREDICTION_TYPES) -> None:
    """Raise `UnsupportedConfig` unless ``prediction_type`` is one of ``known``."""
    if prediction_type not in known:
        raise UnsupportedConfig(f"prediction_type {prediction_type!r} is not supported; it must be {_either(known)}.")


def check_option(name: str, value: object, *known: object) -> None:
    """Raise `UnsupportedConfig` unless the option ``name`` has one of the ``known`` values."""
    if value not in known:
        choices = _either([repr(choice) for choice in known if choice is not None])
        raise UnsupportedConfig(f"{name} {value!r} is not supported; it must be {choices}.")


def dynamic_threshold(x0: Tensor, ratio: float, max_value: float) -> Tensor:
    """Clip each picture at the ``ratio`` quantile s of its absolute values, divide by s (Saharia et al. 2022, 2.3).

    Args:
        x0: (B, ...), any float dtype; quantiles are taken in float32 or better.
        ratio: the quantile, 0 to 1.
        max_value: the largest s; the smallest is 1, at which this is plain clipping to [-1, 1].
    """
    flat = x0.reshape(len(x0), -1).to(torch.promote_types(x0.dtype, torch.float32))
    limit = torch.quantile(flat.abs(), ratio, dim=1, keepdim=True).clamp(min=1, max=max_value)
    return (torch.clamp(flat, -limit, limit) / limit).reshape(x0.shape).to(x0.dtype)


def spaced_timesteps(
    spacing: str, count: int, train_count: int, offset: int = 0, *, last: int | None = None, extra: int = 0
) -> np.ndarray:
    """``count`` descending timesteps in 0..train_count - 1 (Lin et al. 2023, table 2).

    Args:
        spacing: ``linspace`` (both ends included), ``leading`` (starts at 0, whole strides) or ``trailing`` (ends at
            the last timestep).
        count, train_count: timesteps to make, and T.
        offset: added to ``leading`` timesteps (``steps_offset`` of SD's configurations).
        last: use the first ``last`` of the T timesteps only.
        extra: points more at the low end, not returned (DPM-Solver++ keeps one for the end of its last step).

    Returns:
        (count,) float64, not rounded for ``linspace``.

    Raises:
        ValueError: count is below 1.
        UnsupportedConfig: the spacing has another name.
    """
    if count < 1:
        raise ValueError(f"num_inference_steps is {count}; it must be at least 1.")
    points, last = count + extra, train_count if last is None else last
    if spacing == "linspace":
        return np.linspace(0, last - 1, points)[::-1][:count].copy()
    if spacing == "leading":
        return (np.arange(points, dtype=np.float64) * (last // points))[::-1][:count] + offset
    if spacing == "trailing":
        return np.arange(last, 0, -train_count / count).round() - 1
    raise UnsupportedConfig(f"timestep_spacing {spacing!r} is not supported; choose linspace, leading or trailing.")


def karras_sigmas(smallest: float, largest: float, count: int, rho: float = 7.0) -> np.ndarray:
    """``count`` descending sigmas, evenly spaced in ``sigma^(1/rho)`` (EDM, eq. 5), float64."""
    low, high = smallest ** (1 / rho), largest ** (1 / rho)
    return (high + np.linspace(0, 1, count) * (low - high)) ** rho


def exponential_sigmas(smallest: float, largest: float, count: int) -> np.ndarray:
    """``count`` descending sigmas, evenly spaced in their logarithm, float64."""
    return np.exp(np.linspace(math.log(largest), math.log(smallest), count))


def sigma_to_timestep(sigmas: np.ndarray, train_sigmas: np.ndarray) -> np.ndarray:
    """The fractional timesteps whose sigmas are ``sigmas``, by interpolation of log sigma; clipped to the schedule.

    Args:
        sigmas: any shape.
        train_sigmas: ascending, (T,).
    """
    logs = np.log(np.maximum(sigmas, 1e-10))
    return np.interp(logs, np.log(train_sigmas), np.arange(len(train_sigmas)))


def _either(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
