"""How pipelines need less memory, under diffusers' names: each function here is a method of every pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ..left_out import PAGE
from ..runtime.device import accelerator
from ..runtime.offload import Offload

if TYPE_CHECKING:
    from .pipeline import DiffusionPipeline


# The VAE in pieces.


def enable_vae_tiling(pipe: DiffusionPipeline) -> None:
    """Encode and decode large pictures in overlapping tiles; see `fourstroke.runtime.tiling`."""
    pipe.vae.enable_tiling()


def disable_vae_tiling(pipe: DiffusionPipeline) -> None:
    """Undo `enable_vae_tiling`."""
    pipe.vae.disable_tiling()


def enable_vae_slicing(pipe: DiffusionPipeline) -> None:
    """Encode and decode a batch one picture at a time."""
    pipe.vae.enable_slicing()


def disable_vae_slicing(pipe: DiffusionPipeline) -> None:
    """Undo `enable_vae_slicing`."""
    pipe.vae.disable_slicing()


def upcast_vae(pipe: DiffusionPipeline) -> None:
    """Keep the VAE in float32; one whose configuration says so (``force_upcast``) runs in it anyway."""
    pipe.vae.to(torch.float32)


# Networks that wait on the CPU.


def enable_model_cpu_offload(
    pipe: DiffusionPipeline,
    gpu_id: int | None = None,
    device: torch.device | str | None = None,
    *,
    pin_memory: bool = False,
) -> None:
    """Let every network wait on the CPU, and be on the accelerator only while it works; see `Offload`.

    It holds for whole runs: text encoders, VAE, ControlNets, UNet with ControlNets, VAE, safety checker take turns. A
    network that is called directly (``pipe.vae.decode``) runs where it waits. ``pipe.to("cpu")`` changes nothing.

    Args:
        pipe: whose networks.
        gpu_id: which of several accelerators.
        device: the kind of it; default the one that this computer has.
        pin_memory: page-lock the weights for the copies (CUDA); they cannot be swapped out then.

    Raises:
        RuntimeError: there is no accelerator.
        ValueError: ``gpu_id`` and ``device`` name two.
    """
    place = accelerator("enable_model_cpu_offload", gpu_id, device)
    pipe.reset_device_map()
    pipe._offload = Offload(place, pin=pin_memory)


def enable_sequential_cpu_offload(
    pipe: DiffusionPipeline, gpu_id: int | None = None, device: torch.device | str | None = None
) -> None:
    """The same as `enable_model_cpu_offload`: one network at a time, where diffusers moves layer by layer.

    Raises:
        RuntimeError, ValueError: as there.
    """
    place = accelerator("enable_sequential_cpu_offload", gpu_id, device)
    pipe.reset_device_map()
    pipe._offload = Offload(place)


def maybe_free_model_hooks(pipe: DiffusionPipeline) -> None:
    """Take all networks from the accelerator if they are offloaded; every run ends with it."""
    if pipe._offload is not None:
        pipe._offload.rest()


def remove_all_hooks(pipe: DiffusionPipeline) -> None:
    """End `enable_model_cpu_offload`; the networks stay on the CPU."""
    pipe.maybe_free_model_hooks()
    pipe._offload = None


def reset_device_map(pipe: DiffusionPipeline) -> None:
    """End `enable_model_cpu_offload`, and put all networks on the CPU."""
    pipe.remove_all_hooks()
    pipe.to("cpu")


# What makes no difference here: attention is computed by torch's scaled_dot_product_attention, whose memory does not
# grow with the square of the picture's size, and the weights of queries, keys and values stay apart, so that LoRAs fit.


def enable_attention_slicing(pipe: DiffusionPipeline, slice_size: str | int | None = "auto") -> None:
    """Does nothing: attention needs no more memory here than with slices."""


def disable_attention_slicing(pipe: DiffusionPipeline) -> None:
    """Does nothing, as `enable_attention_slicing`."""


def set_attention_slice(pipe: DiffusionPipeline, slice_size: int | None) -> None:
    """Does nothing, as `enable_attention_slicing`."""


def enable_xformers_memory_efficient_attention(
    pipe: DiffusionPipeline, attention_op: Callable[..., Any] | None = None
) -> None:
    """Does nothing: torch's own attention, which runs here, is as sparing and needs no xFormers."""


def disable_xformers_memory_efficient_attention(pipe: DiffusionPipeline) -> None:
    """Does nothing, as `enable_xformers_memory_efficient_attention`."""


def set_use_memory_efficient_attention_xformers(
    pipe: DiffusionPipeline, valid: bool, attention_op: Callable[..., Any] | None = None
) -> None:
    """Does nothing, as `enable_xformers_memory_efficient_attention`."""


def fuse_qkv_projections(pipe: DiffusionPipeline, unet: bool = True, vae: bool = True) -> None:
    """Does nothing: queries, keys and values are computed one after the other; the picture is the same."""


def unfuse_qkv_projections(pipe: DiffusionPipeline, unet: bool = True, vae: bool = True) -> None:
    """Does nothing, as `fuse_qkv_projections`."""


# What would change the picture.


def enable_freeu(pipe: DiffusionPipeline, s1: float, s2: float, b1: float, b2: float) -> NoReturn:
    """Raise NotImplementedError: FreeU (Si et al. 2023) is left out."""
    raise NotImplementedError(f"FreeU is left out, and pictures would differ without it; see {PAGE}.")


def disable_freeu(pipe: DiffusionPipeline) -> None:
    """Does nothing, for FreeU is never on."""
