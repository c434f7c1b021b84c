"""Gradient checkpointing, put on a network from outside."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from ..models.layers import BasicTransformerBlock, ResnetBlock2D

BLOCKS = (ResnetBlock2D, BasicTransformerBlock)


def checkpointing_(network: nn.Module, enabled: bool = True) -> None:
    """Let the blocks of ``network`` keep their inputs only, and compute the rest a second time for gradients.

    The result is the same to the bit (Chen et al. 2016, arXiv 1604.06174). Passes without gradients are as before.

    Args:
        network: is changed in place: its residual and transformer blocks get a ``forward`` of their own.
        enabled: False undoes it.
    """
    for block in network.modules():
        if isinstance(block, BLOCKS):
            vars(block).pop("forward", None)
            if enabled:
                vars(block)["forward"] = functools.partial(_twice, block)


def _twice(block: nn.Module, *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return type(block).forward(block, *args)
    # Those of now: under functional_call they are not the block's own any more when it is computed again.
    weights = dict(block.named_parameters())
    return checkpoint(_run, block, weights, *args, use_reentrant=False, preserve_rng_state=False)


def _run(block: nn.Module, weights: dict[str, Tensor], *args: Any) -> Any:
    given = {f"block.{name}": weight for name, weight in weights.items()}
    return functional_call(_Plain(block), given, args, tie_weights=False)


class _Plain(nn.Module):
    """A block with the ``forward`` of its class."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, *args: Any) -> Any:
        """What the block computes."""
        return type(self.block).forward(self.block, *args)
