"""Adapter weights as values: low-rank pairs and their relatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class LoraError(ValueError):
    """A LoRA cannot be read, does not fit the model, or is asked for something it cannot do."""


class AdapterWeights(Protocol):
    """What an adapter knows about one parameter: the change it makes to it."""

    def delta(self, base: Tensor, factor: float = 1.0) -> Tensor:
        """Return the change of ``base`` (shape, dtype and device of ``base``) when applied with weight ``factor``."""
        ...


@dataclass(frozen=True, eq=False)
class LoraPair:
    """A low-rank change ``alpha / rank * up @ down`` (LoRA, arXiv 2106.09685, section 4.1).

    Attributes:
        down: ``(rank, in)`` for linear layers, ``(rank, in, *kernel)`` for convolutions.
        up: ``(out, rank)`` or ``(out, rank, 1, 1)``.
        alpha: numerator of the scale; ``None`` means that the scale is 1.
        mid: ``(rank, rank, *kernel)`` core of a Tucker-decomposed convolution whose ``down`` is 1x1, or ``None``.
    """

    down: Tensor
    up: Tensor
    alpha: float | None = None
    mid: Tensor | None = None

    @property
    def rank(self) -> int:
        """Inner dimension of the product."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """``alpha / rank``, or 1 without alpha."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def delta(self, base: Tensor, factor: float = 1.0) -> Tensor:
        """Return ``factor * scale * up @ down`` in the shape, dtype and device of ``base``."""
        up, down = like(self.up, base).flatten(1), like(self.down, base).flatten(1)
        if self.mid is None:
            product = up @ down  # (out, in * kernel)
        else:
            product = torch.einsum("oi,ij...,jc->oc...", up, like(self.mid, base), down)
        return product.reshape(base.shape) * (factor * self.scale)


def like(tensor: Tensor, base: Tensor) -> Tensor:
    """Return ``tensor`` on the device and in the dtype of ``base``."""
    return tensor.to(device=base.device, dtype=base.dtype)
