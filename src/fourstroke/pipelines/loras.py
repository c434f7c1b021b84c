"""LoRAs of pipelines by name, under diffusers' names: each function here is a method of every pipeline.

What they do is done by `fourstroke.lora.adapter_set.AdapterSet`; weights change when a picture is painted, not before.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..lora.reading import read_lora
from ..lora.weights import save_lora
from .components import LORA_NAME, lora_file

if TYPE_CHECKING:
    from .pipeline import DiffusionPipeline


def load_lora_weights(
    pipe: DiffusionPipeline,
    pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor],
    adapter_name: str | None = None,
    hotswap: bool = False,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    **where: Any,
) -> None:
    """Load a LoRA in any published dialect and activate it.

    Args:
        pretrained_model_name_or_path_or_dict: hub id, shipped name, folder, ``.safetensors`` file, or tensors.
        adapter_name: what `set_adapters` will call it; ``default_0``, ``default_1``, … if not given.
        hotswap: put it in the place of the adapter with this name.
        weight_name: the file in the repository; not needed when there is one only.
        subfolder: folder inside the repository.
        where: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.

    Raises:
        LoraError: a tensor fits nothing in these networks; all of them are named.
        ValueError: the name is taken (without ``hotswap``).
    """
    source: Any = pretrained_model_name_or_path_or_dict
    if not isinstance(source, Mapping):
        source = lora_file(source, weight_name, subfolder, where)
    name = adapter_name or next(n for i in itertools.count() if (n := f"default_{i}") not in pipe.adapters.names)
    lora = read_lora(source, pipe.adapters.models)
    pipe.adapters.add(name, lora, hotswap=hotswap)


def set_adapters(
    pipe: DiffusionPipeline,
    adapter_names: str | Sequence[str],
    adapter_weights: float | Mapping[str, Any] | Sequence[Any] | None = None,
) -> None:
    """Activate these LoRAs and no others at these weights: 1.0 if not given, a number, or a mapping by block."""
    pipe.adapters.set(adapter_names, adapter_weights)


def set_lora_device(
    pipe: DiffusionPipeline, adapter_names: str | Sequence[str], device: torch.device | str | int
) -> None:
    """Keep the tensors of these LoRAs on ``device``; they act wherever they are."""
    pipe.adapters.move(adapter_names, device)


def enable_lora_hotswap(pipe: DiffusionPipeline, **options: Any) -> None:
    """Does nothing: replacing a LoRA by another (``hotswap=True``), of any rank, never compiles anew here."""


def get_active_adapters(pipe: DiffusionPipeline) -> list[str]:
    """The names of the active LoRAs."""
    return list(pipe.adapters.active)


def get_list_adapters(pipe: DiffusionPipeline) -> dict[str, list[str]]:
    """For each network, the names of the LoRAs that change it."""
    return pipe.adapters.list()


def disable_lora(pipe: DiffusionPipeline) -> None:
    """Run without any LoRA until `enable_lora`."""
    pipe.adapters.disable()


def enable_lora(pipe: DiffusionPipeline) -> None:
    """Undo `disable_lora`."""
    pipe.adapters.enable()


def delete_adapters(pipe: DiffusionPipeline, adapter_names: str | Sequence[str]) -> None:
    """Forget these LoRAs."""
    pipe.adapters.delete(adapter_names)


def fuse_lora(
    pipe: DiffusionPipeline,
    components: Sequence[str] | None = None,
    lora_scale: float = 1.0,
    safe_fusing: bool = False,
    adapter_names: Sequence[str] | None = None,
) -> None:
    """Make the LoRAs part of the base, so that `unload_lora_weights` keeps their effect.

    ``safe_fusing`` is always on here: a weight that is not finite is refused when it is loaded.
    """
    pipe.adapters.fuse(adapter_names, scale=lora_scale, components=components)


def unfuse_lora(pipe: DiffusionPipeline, components: Sequence[str] | None = None) -> None:
    """Undo `fuse_lora`, exact to the bit."""
    pipe.adapters.unfuse(components=components)


def unload_lora_weights(pipe: DiffusionPipeline) -> None:
    """Forget all LoRAs; what is not fused leaves no trace."""
    pipe.adapters.clear()


def save_lora_weights(
    pipe: DiffusionPipeline, save_directory: str | os.PathLike[str], adapter_name: str, *, weight_name: str = LORA_NAME
) -> None:
    """Write a loaded LoRA in the layout that diffusers reads."""
    save_lora(Path(save_directory) / weight_name, pipe.adapters[adapter_name])
