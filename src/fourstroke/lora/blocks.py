"""Weights a block, as diffusers' ``set_adapters`` takes them, turned into one factor a parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from .keys import unwrap
from .pairs import LoraError

BLOCK_KEYS = ("down", "mid", "up")

AdapterWeight = float | Mapping[str, Any]
"""A number, or numbers for components and blocks; see `component_weight` and `block_weights`."""

BlockWeights = Mapping[str, float]
"""Path of an attention (``down_blocks.1.attentions.0``) -> its weight."""


def component_weight(weight: AdapterWeight | None, component: str) -> AdapterWeight:
    """Return the part of an adapter's weight that concerns ``component``; 1 where nothing is said.

    ``{"text_encoder": 0.5, "unet": {"down": 0.9}}`` and, shorter, ``{"text_encoder": 0.5, "down": 0.9}`` are the same.
    """
    if weight is None:
        return 1.0
    if not isinstance(weight, Mapping):
        return finite(weight)
    if component in weight:
        part = weight[component]
        return part if isinstance(part, Mapping) else component_weight(part, component)
    if component == "unet" and any(key in weight for key in BLOCK_KEYS):
        return {key: weight[key] for key in BLOCK_KEYS if key in weight}
    return 1.0


def unknown_parts(weight: AdapterWeight | None, components: Mapping[str, Any]) -> list[str]:
    """Return the keys of an adapter's weight that name neither a component nor a part of the UNet."""
    keys = weight if isinstance(weight, Mapping) else ()
    return [key for key in keys if key not in components and key not in BLOCK_KEYS]


def finite(weight: Any) -> float:
    """Return a weight as a float; raises `LoraError` for anything but a finite number."""
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise LoraError(f"an adapter's weight must be a finite number, got {weight!r}")
    return float(weight)


def block_weights(weight: AdapterWeight, model: nn.Module) -> float | dict[str, float]:
    """Turn a weight for a UNet into a number, or into a number for each attention.

    Args:
        weight: a number, or ``{"down": …, "mid": …, "up": …}`` where a part may be a number, a list with a number for
            each attention of a block, or ``{"block_1": number or list, …}``. What is left out weighs 1.
        model: the UNet; only its block structure is read.

    Raises:
        LoraError: a block that is not there or has no attention, or a list of another length.
    """
    if not isinstance(weight, Mapping):
        return finite(weight)
    if unknown := [key for key in weight if key not in BLOCK_KEYS]:
        raise LoraError(f"unknown block {', '.join(map(repr, unknown))}; use {', '.join(map(repr, BLOCK_KEYS))}")
    if not hasattr(unwrap(model), "down_blocks"):
        raise LoraError(f"{type(unwrap(model)).__name__} has no blocks; give it one number")
    found: dict[str, float] = {}
    for part, value in weight.items():
        if part == "mid":
            found |= _block("mid", "mid_block", value, model)
            continue
        counts = _attentions(model, f"{part}_blocks")
        blocks = value if isinstance(value, Mapping) else {f"block_{index}": value for index in counts}
        for name, numbers in blocks.items():
            index = int(name[6:]) if name.startswith("block_") and name[6:].isdigit() else None
            if index not in counts:
                known = ", ".join(f"block_{index}" for index in counts) or "none"
                raise LoraError(f"{part}.{name} does not exist or has no attention; there are {known}")
            found |= _block(f"{part}.{name}", f"{part}_blocks.{index}", numbers, model)
    return found


def _attentions(model: nn.Module, blocks: str) -> dict[int, int]:
    """Number of attentions by block, of the blocks that have any."""
    found = enumerate(getattr(unwrap(model), blocks))
    return {index: len(block.attentions) for index, block in found if getattr(block, "attentions", None)}


def _block(label: str, path: str, value: Any, model: nn.Module) -> dict[str, float]:
    count = len(getattr(unwrap(model).get_submodule(path), "attentions", None) or ())
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    if not count:
        raise LoraError(f"{label} has no attention in this model; leave it out")
    if len(numbers) not in (1, count):
        raise LoraError(f"{label} has {count} attentions, got {len(numbers)} weights")
    return {f"{path}.attentions.{i}": finite(numbers[i % len(numbers)]) for i in range(count)}


def factor_of(weights: float | BlockWeights, name: str) -> float:
    """Return the factor of the parameter ``name``.

    A residual block or sampler weighs what the attention of its number in the same block does, and 1 where there is
    none: that is what diffusers does with a LoRA that has such layers.
    """
    if not isinstance(weights, Mapping):
        return weights
    parts = name.split(".")
    if parts[0] == "mid_block":
        return weights.get("mid_block.attentions.0", 1.0) if parts[1] == "attentions" else 1.0
    return weights.get(f"{parts[0]}.{parts[1]}.attentions.{parts[3]}", 1.0) if len(parts) > 3 else 1.0
