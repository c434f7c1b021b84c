"""Merging adapters into weights: the pure function that training and inference share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fourstroke.lora.weights import AdapterWeights


def merge_weight(base: Tensor, terms: Iterable[tuple[AdapterWeights, float]]) -> Tensor:
    """Return ``base + sum(delta_i)``, accumulated in float32 (float64 for a float64 base) and rounded once.

    Each term is ``(weights, factor)``; for a low-rank pair its delta is ``factor * alpha / rank * up @ down``
    (LoRA, arXiv 2106.09685, equation 3). Terms whose factor is 0 are left out, so their sum is ``base`` itself to the bit.

    Args:
        base: pristine parameter of any shape and floating dtype; not changed.
        terms: adapters of this parameter with their factors.

    Returns:
        A tensor of the shape, dtype and device of ``base``; differentiable in the adapters' tensors. It is ``base``
        itself when no term is left.
    """
    terms = [(weights, factor) for weights, factor in terms if factor != 0]
    if not terms:
        return base
    wide = base.to(torch.promote_types(base.dtype, torch.float32))
    total = wide
    for weights, factor in terms:
        total = total + weights.delta(wide, factor)
    return total.to(base.dtype)
