"""The weights that a network is trained with: its frozen ones, changed by pairs.

Where the frozen weights are float32, the change is added to them once for every pass: no layer computes more than
before. Half precision cannot hold such sums: a bfloat16 has eight bits, and what a training adds to each weight is long
less than half of the last one. There the pair stays beside its weight, ``h = W x + alpha / rank * up (down x)`` (LoRA,
arXiv 2106.09685, eq. 3): in the output the changes of a row have added up, and no second copy of the weights is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..lora.layers import effective_weights
from ..lora.merge import merge_weight
from ..lora.pairs import LoraPair


def adapted_weights(model: nn.Module, pairs: Mapping[str, LoraPair]) -> dict[str, Tensor]:
    """The changed parameters by name, for ``torch.func.functional_call(model, weights, args)``.

    Differentiable in the pairs; the model's own parameters are detached and never changed.

    Raises:
        LoraError: a pair names no parameter of the model.
    """
    parameters = dict(model.named_parameters())
    whole = {name: pair for name, pair in pairs.items() if name not in parameters or _wide(parameters[name])}
    weights = effective_weights(model, whole)
    return {name: weights[name] if name in weights else Beside(parameters[name], pairs[name]) for name in pairs}


def _wide(parameter: Tensor) -> bool:
    return parameter.dtype.itemsize >= 4


class Beside(Tensor):
    """A frozen weight with a pair beside it, in the place of a parameter; linear layers and convolutions keep them
    apart, anything else gets their sum."""

    frozen: Tensor
    pair: LoraPair

    @staticmethod
    def __new__(cls, weight: Tensor, pair: LoraPair) -> Beside:
        """``weight`` (out, in, …) of any dtype, which is not changed, and a pair of its shape."""
        found = weight.detach().as_subclass(cls)
        found.frozen, found.pair = weight.detach(), pair
        return found

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called by torch in place of ``func`` when one of its arguments is of this class."""
        kwargs = kwargs or {}
        if func in (F.linear, F.conv2d) and len(args) > 1 and isinstance(args[1], Beside):
            return _layer(func, *args, **kwargs)
        if getattr(func, "__name__", "") == "__get__":  # an attribute: dtype, device, shape
            return super().__torch_function__(func, types, args, kwargs)
        return func(*map(_summed, args), **{name: _summed(value) for name, value in kwargs.items()})


def _layer(
    func: Callable[..., Tensor], x: Tensor, weight: Beside, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """``func(x, W) + alpha / rank * up(down(x))``; ``down`` moves over ``x`` as ``W`` does, ``up`` has no extent."""
    pair = weight.pair
    down, up = (half if torch.is_autocast_enabled(x.device.type) else half.to(x) for half in (pair.down, pair.up))
    inner = func(x, down, None, *args, **kwargs)
    return func(x, weight.frozen, bias, *args, **kwargs) + func(inner, up) * pair.scale


def _summed(value: Any) -> Any:
    return merge_weight(value.frozen, [(value.pair, 1.0)]) if isinstance(value, Beside) else value
