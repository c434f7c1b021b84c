"""Calls of a network: a forward in the place of its own, what it is called with, and where its weights lie.

A backend is a `Forward` that is put into one object's ``__dict__``, as `torch.nn.Module` looks it up there first: the
module itself, its class, its parameters and their names stay, and taking the entry away undoes it exactly.
"""

from __future__ import annotations

import inspect
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..models.ip_adapter import ImageAttention

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a call."""
ValueT = TypeVar("ValueT")


class Forward:
    """What runs in the place of a network's own forward.

    The network is not kept: it holds this object, and a circle would keep its memory until a garbage collection.
    """

    def __init__(self, network: nn.Module):
        self._network = weakref.ref(network)
        self.__signature__ = inspect.signature(types.MethodType(type(network).forward, network))

    @property
    def network(self) -> nn.Module:
        """Whose forward this is.

        Raises:
            ReferenceError: it is gone.
        """
        network = self._network()
        if network is None:
            raise ReferenceError(f"The network that this {type(self).__name__} runs is gone; keep it, not its forward.")
        return network

    def plain(self, arguments: Arguments) -> Any:
        """What the network's class would answer."""
        args, kwargs = arguments
        network = self.network
        return type(network).forward(network, *args, **kwargs)

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """The arguments of a call in one form, however they were passed, and a ``timestep`` always a tensor.

        A number would be part of a graph or of compiled code, each timestep of another.
        """
        bound = self.__signature__.bind(*args, **kwargs)
        timestep = bound.arguments.get("timestep")
        if isinstance(timestep, (int, float)):
            bound.arguments["timestep"] = torch.tensor(timestep)
        return bound.args, bound.kwargs


class Keeping(Forward):
    """A forward that keeps what it made of the weights, until they are written in place, moved or replaced."""

    def __init__(self, network: nn.Module):
        super().__init__(network)
        self._kept: OrderedDict[Any, Any] = OrderedDict()
        self._weights: Any = None

    def clear(self) -> None:
        """Drop what is kept, and its memory; the next call makes it anew."""
        self._kept.clear()

    def _look_after_weights(self, network: nn.Module) -> bool:
        """Drop what was made of weights that have changed; False where they may change unnoticed."""
        counts = versions(network)
        if counts is None:
            return False
        weights = weight_places(network), counts
        if weights != self._weights:
            self.clear()
            self._weights = weights
        return True


def replace_forward_(network: nn.Module, forward: Forward) -> None:
    """Let this one object run ``forward``; another of the same type is replaced.

    Raises:
        RuntimeError: something else stands there already.
    """
    present = vars(network).get("forward")
    if present is not None and type(present) is not type(forward):
        raise RuntimeError(
            f"The forward of this {type(network).__name__} is a {type(present).__name__} already, and a "
            f"{type(forward).__name__} would replace it: a network has one backend. Undo the other one first."
        )
    vars(network)["forward"] = forward


def restore_forward_(network: nn.Module, kind: type[Forward]) -> None:
    """Let ``network`` run its class's forward again, if it is a ``kind`` that stands in its place."""
    if isinstance(vars(network).get("forward"), kind):
        del vars(network)["forward"]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in (nested) tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``change(tensor)`` in the place of each tensor that `tensors_in` finds."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: map_tensors(part, change) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [map_tensors(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def describe(value: Any, *, shapes: bool = True) -> Hashable:
    """What tells calls apart that need code of their own: structure, dtypes and shapes of tensors, all else by value.

    Args:
        value: tensors, numbers and strings, in (nested) tuples, lists and mappings.
        shapes: False leaves the shapes out, and keeps the numbers of dimensions.

    Raises:
        TypeError: something else, which cannot be compared by value.
    """
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape) if shapes else value.ndim
    if isinstance(value, Mapping):
        return "mapping", tuple((name, describe(part, shapes=shapes)) for name, part in value.items())
    if isinstance(value, (tuple, list)):
        return type(value), tuple(describe(part, shapes=shapes) for part in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        # With its type: 1, 1.0 and True are equal.
        return type(value), value
    raise TypeError(
        f"A network was called with a {type(value).__name__}; a graph takes tensors, numbers, strings and None, in "
        "tuples, lists and mappings. Undo the graph to run it anyway."
    )


def weight_places(network: nn.Module) -> tuple[Hashable, ...]:
    """Where all parameters and buffers lie, and in which form; equal as long as a recorded run of it stays right.

    Weights that are written in place, as adapters are merged, leave it as it is; moving, converting or replacing one
    changes it. All of them are looked at, since a single module can be replaced (an IP-Adapter, motion modules), in
    one walk over the modules: half of what ``network.parameters()`` takes, 0.6 ms for the 686 parameters of SD 1.5's
    UNet on a slow CPU. Two numbers (the first and the last address) would be cheaper and miss that.
    """
    places: list[Hashable] = []
    modules: list[nn.Module] = [network]
    while modules:
        module = modules.pop()
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                places += (tensor.data_ptr(), tensor.dtype, tensor.stride())
        if isinstance(module, ImageAttention):
            # The one number that a forward reads and that can be changed on a built network.
            places += module.scales
        modules += (child for child in module._modules.values() if child is not None)
    return tuple(places)


def versions(network: nn.Module) -> tuple[int, ...] | None:
    """How often each parameter was written in place; None where torch does not count (`torch.inference_mode`)."""
    parameters = [*network.parameters()]
    if any(value.is_inference() for value in parameters):
        return None
    return tuple(value._version for value in parameters)


def remember(kept: OrderedDict[Any, ValueT], key: Any, most: int, make: Callable[[], ValueT]) -> ValueT:
    """What is kept under ``key``, made if it is not there; of more than ``most`` those used last stay."""
    if key not in kept:
        while len(kept) >= most:
            kept.popitem(last=False)
        kept[key] = make()
    kept.move_to_end(key)
    return kept[key]
