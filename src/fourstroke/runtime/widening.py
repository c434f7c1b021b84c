"""Networks that compute in float32 and keep their weights in float16, in which few CPUs can compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from .calls import Forward, replace_forward_, restore_forward_

LAYERS = (nn.Linear, nn.Embedding, nn.LayerNorm)


class Widened(Forward):
    """A layer's forward in float32, whose weights are converted for the time of a call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Widened, (self.network,)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's result, float32."""
        if isinstance(self.network, nn.Embedding):  # some rows of a large table
            return self.plain((args, kwargs)).float()
        with InFloat32():
            return self.plain((args, kwargs))


class InFloat32(TorchFunctionMode):
    """Gives every function of torch's its tensors in float32; within a linear layer or a norm all are numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs or {}))
        return func(*args, **kwargs)


def widen_(network: nn.Module) -> None:
    """Let a network of linear layers, embeddings and layer norms, such as a text encoder, compute in float32.

    Its weights stay as they are, mapped from a file perhaps; the results are those of a network whose weights were
    converted, to the bit, and every call converts them anew.
    """
    for layer in network.modules():
        if isinstance(layer, LAYERS):
            replace_forward_(layer, Widened(layer))


def unwiden_(network: nn.Module) -> None:
    """Undo `widen_`."""
    for layer in network.modules():
        restore_forward_(layer, Widened)


def is_widened(network: nn.Module) -> bool:
    """Whether `widen_` acts on ``network``."""
    return any(isinstance(vars(layer).get("forward"), Widened) for layer in network.modules())


def result_dtype(network: Any) -> torch.dtype:
    """The dtype of a network's results: float32 where float16 weights are only kept, as on every CPU."""
    dtype: torch.dtype = network.dtype
    return torch.float32 if dtype == torch.float16 and network.device.type == "cpu" else dtype
