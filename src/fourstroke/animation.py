"""The mathematics of long and of steady animations: windows of frames (FreeNoise) and noise of two rounds (FreeInit).

Tensors of animations are (N, C, F, h, w), F being their number of frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WEIGHTINGS = ("pyramid", "flat", "delayed_reverse_sawtooth")
NOISES = ("shuffle_context", "repeat_context", "random")
FILTERS = ("butterworth", "gaussian", "ideal")


def windows(frames: int, length: int = 16, stride: int = 4) -> list[tuple[int, int]]:
    """The overlapping windows that an animation is painted in (Qiu et al. 2023, FreeNoise, arXiv 2310.15169).

    Args:
        frames: of the animation, at least 1.
        length: frames of a window; an animation of no more than these is one window.
        stride: frames from one window to the next, ``1 <= stride <= length``. The last window ends with the animation,
            so it may begin less than a stride after the one before.

    Returns:
        (start, stop) of each window in frames, ascending; together they hold every frame, and all have one length.

    Raises:
        ValueError: no frames, or a stride that would leave frames out.
    """
    _check_windows(frames, length, stride)
    length = min(length, frames)
    starts = list(range(0, frames - length + 1, stride))
    if starts[-1] + length < frames:
        starts.append(frames - length)
    return [(start, start + length) for start in starts]


def window_weights(length: int, scheme: str = "pyramid", device: torch.device | str | None = None) -> Tensor:
    """How much each frame of a window counts where windows overlap (FreeNoise, eq. 9).

    Args:
        length: of the window in frames.
        scheme: ``pyramid`` (1, 2, 3, 2, 1), ``flat`` (1, 1, 1, 1, 1) or ``delayed_reverse_sawtooth``
            (0.01, 0.01, 3, 2, 1), in which the first half hardly counts.
        device: of the result.

    Returns:
        (length,) float32, all positive; only their ratios matter.

    Raises:
        ValueError: another scheme.
    """
    _one_of("weighting scheme", scheme, WEIGHTINGS)
    place = torch.arange(length, device=device)
    if scheme == "flat":
        return torch.ones(length, device=device)
    if scheme == "pyramid":
        return torch.minimum(place + 1, length - place).float()
    half = (length + 1) // 2
    return torch.where(place < half - 1, 0.01, (length - place).clamp(max=half).float())


def fuse(
    predict: Callable[[slice], Tensor],
    frames: int,
    length: int = 16,
    stride: int = 4,
    weights: Tensor | None = None,
) -> Tensor:
    """Predict a long animation window by window, and average where windows overlap.

    FreeNoise averages after each temporal attention; here the whole network runs on one window after another, so that
    ``predict`` needs the memory of one window only, however long the animation is.

    Args:
        predict: a slice of frames -> the prediction for these frames, (N, C, frames of the slice, h, w).
        frames, length, stride: as for `windows`.
        weights: (length,) of a window's frames; default is `window_weights`.

    Returns:
        (N, C, frames, h, w) in the dtype of the predictions, averaged in float32 (float64 for float64). An animation of
        one window is predicted at once and nothing is averaged.

    Raises:
        ValueError: see `windows`; or ``weights`` has another shape.
    """
    spans = windows(frames, length, stride)
    if weights is not None and weights.shape != (length,):
        raise ValueError(f"weights has the shape {tuple(weights.shape)}; a window of {length} frames has ({length},).")
    prediction = predict(slice(*spans[0]))
    if len(spans) == 1:
        return prediction
    device, wide = prediction.device, torch.promote_types(prediction.dtype, torch.float32)
    weights = window_weights(length, device=device) if weights is None else weights
    weigh = weights.to(device, wide)[:, None, None]  # (length, 1, 1)
    total = prediction.new_zeros((*prediction.shape[:2], frames, *prediction.shape[3:]), dtype=wide)
    norm = total.new_zeros((frames, 1, 1))
    for start, stop in spans:
        if start > 0:
            prediction = predict(slice(start, stop))
        total[:, :, start:stop] += prediction * weigh
        norm[start:stop] += weigh
    return (total / norm).to(prediction.dtype)


def shuffled_noise(
    noise: Tensor,
    length: int = 16,
    stride: int = 4,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    kind: str = "shuffle_context",
    frames: int | None = None,
) -> Tensor:
    """Start noise whose distant frames are correlated, so that windows agree (FreeNoise, "noise rescheduling").

    Args:
        noise: (N, C, F, h, w) standard normal numbers, of all frames or of the first ``length`` only. Not changed.
        length: frames that are independent.
        stride: frames that are shuffled together, ``1 <= stride <= length``.
        generator: where the shuffles are drawn, after the noise, as diffusers does; or one an animation. None is
            torch's global one.
        kind: ``shuffle_context``: frames from ``length`` on repeat those ``length`` before, ``stride`` of them at a
            time in another order; ``repeat_context``: in the same order; ``random``: the noise stays as it is.
        frames: of the result; default is those of ``noise``.

    Returns:
        (N, C, frames, h, w), every frame one of ``noise``.

    Raises:
        ValueError: another kind, a stride out of range, as many generators as there are not animations, or noise of
            another number of frames.
    """
    _one_of("kind of noise", kind, NOISES)
    given = noise.shape[2]
    frames = given if frames is None else frames
    _check_windows(frames, length, stride)
    if given != frames and (given != length or kind == "random"):
        raise ValueError(
            f"The noise has {given} frames; give those of the whole animation ({frames})"
            + ("." if kind == "random" else f" or of one window ({length}).")
        )
    if kind == "random" or frames <= length:
        return noise[:, :, :frames]
    if kind == "repeat_context":
        return noise[:, :, torch.arange(frames, device=noise.device) % length]
    if isinstance(generator, Sequence) and len(generator) == 1:
        generator = generator[0]
    if not isinstance(generator, Sequence):
        return noise[:, :, _shuffled(frames, length, stride, generator).to(noise.device)]
    if len(generator) != len(noise):
        raise ValueError(f"{len(generator)} generators for {len(noise)} animations: give one an animation.")
    orders = [_shuffled(frames, length, stride, one).to(noise.device) for one in generator]
    return torch.stack([one[:, order] for one, order in zip(noise, orders, strict=True)])


def _shuffled(frames: int, length: int, stride: int, generator: torch.Generator | None) -> Tensor:
    """The frame of the first ``length`` that each of ``frames`` repeats: (frames,) int64."""
    device = "cpu" if generator is None else generator.device
    order = torch.arange(frames, device=device)
    for start in range(length, frames, stride):
        source = order[start - length : start - length + stride]
        order[start : start + stride] = source[torch.randperm(stride, generator=generator, device=device)][
            : frames - start
        ]
    return order


def free_init_steps(steps: int, iteration: int, iterations: int = 3, fast: bool = False) -> int:
    """Denoising steps of one FreeInit round (Wu et al. 2023, arXiv 2312.07537, "coarse-to-fine sampling").

    Args:
        steps: of the last round.
        iteration: the round, counted from 0.
        iterations: number of rounds.
        fast: let the number of steps grow from round to round in place of being the same in all.

    Returns:
        At least 1.

    Raises:
        ValueError: there is no such round.
    """
    if not 0 <= iteration < iterations:
        raise ValueError(f"There is no round {iteration} among {iterations}, counted from 0.")
    return max(1, int(steps / iterations * (iteration + 1))) if fast else steps


def free_init_filter(
    shape: Sequence[int],
    method: str = "butterworth",
    order: float = 4,
    spatial_stop: float = 0.25,
    temporal_stop: float = 0.25,
    device: torch.device | str | None = None,
) -> Tensor:
    """The low-pass filter that FreeInit splits noise with (Wu et al. 2023, "noise reinitialization").

    A frequency's distance from zero is measured with the band from -1 to 1 in each direction, time stretched by
    ``spatial_stop / temporal_stop``.

    Args:
        shape: (…, F, h, w), of the tensors to filter; only the last three count.
        method: ``butterworth``, ``gaussian`` or ``ideal``.
        order: of the Butterworth filter; the higher, the steeper.
        spatial_stop, temporal_stop: stop frequencies in [0, 1]; with a 0 nothing passes.
        device: of the result.

    Returns:
        (F, h, w) float32 in [0, 1], the zero frequency in the middle (as after ``fftshift``).

    Raises:
        ValueError: another method, or a stop frequency out of range.
    """
    _one_of("method", method, FILTERS)
    for name, value in (("spatial_stop", spatial_stop), ("temporal_stop", temporal_stop)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; a stop frequency is a fraction of the band, 0 to 1.")
    if spatial_stop == 0 or temporal_stop == 0:
        return torch.zeros(*shape[-3:], device=device)
    time, row, column = (2 * torch.arange(size, dtype=torch.float64) / size - 1 for size in shape[-3:])
    time = spatial_stop / temporal_stop * time
    squared = time[:, None, None] ** 2 + row[:, None] ** 2 + column**2  # (F, h, w)
    if method == "butterworth":
        passed = 1 / (1 + (squared / spatial_stop**2) ** order)
    elif method == "gaussian":
        passed = torch.exp(-squared / (2 * spatial_stop**2))
    else:
        # As in the authors' code: the square is compared with twice the stop frequency, not with the stop's square.
        passed = squared <= 2 * spatial_stop
    return passed.float().to(device)


def mix_frequencies(latents: Tensor, noise: Tensor, low_pass: Tensor) -> Tensor:
    """Low frequencies of ``latents`` and high ones of ``noise``, over frames, height and width (Wu et al. 2023).

    Args:
        latents, noise: (N, C, F, h, w) of one shape.
        low_pass: (F, h, w) from `free_init_filter`.

    Returns:
        (N, C, F, h, w) in the dtype of ``latents``; computed in float32 (float64 for float64).
    """
    wide = torch.promote_types(latents.dtype, torch.float32)
    # low * x + (1 - low) * n = low * (x - n) + n: one transform in place of two.
    spectrum = torch.fft.fftn(latents.to(wide) - noise.to(wide), dim=(-3, -2, -1))
    kept = torch.fft.ifftn(spectrum * torch.fft.ifftshift(low_pass), dim=(-3, -2, -1)).real
    return (kept + noise.to(wide)).to(latents.dtype)


def _check_windows(frames: int, length: int, stride: int) -> None:
    if frames < 1:
        raise ValueError(f"An animation has at least one frame, not {frames}.")
    if not 1 <= stride <= length:
        raise ValueError(f"Windows of {length} frames cannot start {stride} apart: 1 <= stride <= length.")


def _one_of(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{what} {value!r} is not known; it is one of {', '.join(known)}.")
