"""Long and steady animations, under diffusers' names: each function here is a method of every pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..left_out import PAGE
from ..request import FreeInit, Windows

if TYPE_CHECKING:
    from .pipeline import DiffusionPipeline


def enable_free_noise(
    pipe: DiffusionPipeline,
    context_length: int | None = 16,
    context_stride: int = 4,
    weighting_scheme: str = "pyramid",
    noise_type: str = "shuffle_context",
    prompt_interpolation_callback: Any = None,
) -> None:
    """Paint animations in windows of ``context_length`` frames (default: the adapter's limit); see `Windows`.

    The whole network runs window by window, in one window's memory; diffusers windows temporal attention alone.

    Raises:
        NotImplementedError: ``prompt_interpolation_callback`` is given; prompts do not change along the frames.
    """
    if prompt_interpolation_callback is not None:
        raise NotImplementedError(f"Prompts that change along an animation are left out; see {PAGE}.")
    most = pipe._parts().motion_frames or 16
    pipe._windows = Windows(context_length or most, context_stride, weighting_scheme, noise_type)


def enable_free_noise_split_inference(
    pipe: DiffusionPipeline, spatial_split_size: int = 256, temporal_split_size: int = 16
) -> None:
    """Does nothing: with windows the network never sees more frames at once than one of them has."""


def disable_free_noise(pipe: DiffusionPipeline) -> None:
    """Undo `enable_free_noise`."""
    pipe._windows = None


def enable_free_init(
    pipe: DiffusionPipeline,
    num_iters: int = 3,
    use_fast_sampling: bool = False,
    method: str = "butterworth",
    order: int = 4,
    spatial_stop_frequency: float = 0.25,
    temporal_stop_frequency: float = 0.25,
) -> None:
    """Repaint animations from noise that keeps their low frequencies; see `FreeInit`."""
    pipe._free_init = FreeInit(
        num_iters, use_fast_sampling, method, order, spatial_stop_frequency, temporal_stop_frequency
    )


def disable_free_init(pipe: DiffusionPipeline) -> None:
    """Undo `enable_free_init`."""
    pipe._free_init = None
