"""Merging adapters into weights: the pure function, and a model's weights that are merged into and given back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..loading import WeightError
from ..parts import cast, in_rows
from .keys import parameter_places
from .pairs import AdapterWeights, LoraError, LoraPair, like, misfit

Terms = tuple[tuple[AdapterWeights, float], ...]


def merge_weight(base: Tensor, terms: Iterable[tuple[AdapterWeights, float]]) -> Tensor:
    """Return ``base + sum(delta_i)``, accumulated in float32 (float64 for a float64 base) and rounded once.

    Each term is ``(weights, factor)``; for a low-rank pair its delta is ``factor * alpha / rank * up @ down``
    (LoRA, arXiv 2106.09685, equation 3). Terms whose factor is 0 are left out, so their sum is ``base`` to the bit.

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
        if isinstance(weights, LoraPair) and weights.mid is None:  # one pass over memory instead of three
            up, down = like(weights.up, wide).flatten(1), like(weights.down, wide).flatten(1)
            total = torch.addmm(total.flatten(1), up, down, alpha=factor * weights.scale).view(base.shape)
        else:
            total = total + weights.delta(wide, factor)
    return total.to(base.dtype)


@torch.no_grad()
def merge_(weight: Tensor, base: Tensor, formats: Iterable[torch.dtype], terms: Terms) -> None:
    """Write ``base``, rounded to each of ``formats`` in turn, and what ``terms`` add (`merge_weight`) to ``weight``.

    On a CPU products of two matrices are added to some rows after the other, in memory that is used again.
    """
    pairs = [(pair, factor) for pair, factor in terms if isinstance(pair, LoraPair) and pair.mid is None]
    if weight.device.type != "cpu" or not terms or len(pairs) < len(terms):
        for dtype in formats:
            base = base.to(weight.device, dtype)
        weight.copy_(merge_weight(base, terms))
        return
    wide = torch.promote_types(weight.dtype, torch.float32)
    parts = [(pair.up.to("cpu", wide).flatten(1), pair.down.to("cpu", wide).flatten(1), pair.scale * factor)
             for pair, factor in pairs]  # fmt: skip
    narrow = [dtype for before, dtype in pairwise((base.dtype, *formats)) if dtype not in (before, wide)]
    for rows, total in in_rows(base, wide):
        for dtype in narrow:
            total.copy_(total.to(dtype))
        for up, down, factor in parts:
            total.addmm_(up[rows], down, alpha=factor)
        weight[rows].copy_(total.view(weight[rows].shape))


@dataclass
class Slot:
    """What was done to one parameter: where it lives, how to get its base back, and what was merged into it.

    Attributes:
        copy: the base; None where it is read from the model's file.
        mapped: ``copy`` is no copy but what the parameter's memory was, mapped from a file.
    """

    module: nn.Module
    attribute: str
    parameter: nn.Parameter
    dtype: torch.dtype
    copy: Tensor | None
    mapped: bool
    version: int
    applied: Terms = ()
    applied_dtype: torch.dtype | None = None

    def intact(self) -> bool:
        """Whether nobody else replaced or overwrote the parameter, or changed its dtype."""
        parameter = self.parameter
        return (
            self.module._parameters.get(self.attribute) is parameter
            and self.version == write_count(parameter)
            and parameter.dtype == (self.applied_dtype or self.dtype)
        )


class Bases:
    """One model's parameters that adapters have touched, and the way back to their base."""

    def __init__(self, component: str, model: nn.Module, settle: Callable[[Tensor], Tensor] | None = None):
        self.component = component
        self.model = model
        self.settle = settle
        self.source: Any = getattr(model, "source", None)
        self.slots: dict[str, Slot] = {}
        self.stamp: Any = None

    def intact(self) -> bool:
        """Whether nobody else wrote into any of the parameters."""
        return all(slot.intact() for slot in self.slots.values())

    @torch.no_grad()
    def apply(self, terms: Mapping[str, Terms]) -> int:
        """Rewrite the parameters whose terms are not those applied; first look at all of them, then write."""
        if not terms and not self.slots:
            return 0
        places = parameter_places(self.model)
        wanted: dict[str, Terms] = {}
        first_name = {id(parameter): name for name, (_, _, parameter) in reversed(places.items())}
        for name, own in terms.items():  # a parameter shared by several modules gets the terms of all its names
            shared = first_name[id(places[name][2])] if name in places else name
            wanted[shared] = wanted.get(shared, ()) + own
        for name in [*self.slots]:
            self._check_slot(name, places)
        for name in [name for name in wanted if name not in self.slots]:
            self.slots[name] = self._open(name, places, wanted[name])
        return sum(self._write(name, wanted.get(name, ())) for name in [*self.slots])

    def _check_slot(self, name: str, places: Mapping[str, tuple[nn.Module, str, nn.Parameter]]) -> None:
        """Forget a parameter that is not the one we know."""
        slot = self.slots[name]
        same = name in places and places[name][2] is slot.parameter and slot.version == write_count(slot.parameter)
        if same and (slot.applied or slot.dtype == slot.parameter.dtype):
            return
        if slot.applied:
            where = f"{self.component}.{name}"
            warnings.warn(f"{where} was overwritten while adapters acted on it; it is the new base", stacklevel=4)
        del self.slots[name]

    def _open(self, name: str, places: Mapping[str, tuple[nn.Module, str, nn.Parameter]], terms: Terms) -> Slot:
        """Note how to get the base of a parameter that nothing acts on yet."""
        where = f"{self.component}.{name}"
        module, attribute, parameter = places.get(name, (None, "", None))
        if module is None or parameter is None or not is_plain(parameter):
            raise LoraError(f"{where} holds no floating-point weight (quantised?); apply adapters before quantising")
        if parameter.is_meta:
            raise LoraError(f"{where} is not in memory (meta device); load the weights first")
        for weights, _ in terms:
            if reason := misfit(weights, parameter.shape):
                raise LoraError(f"{where}: the LoRA {reason}")
        mapped, copy = is_mapped(parameter), parameter.detach()
        if not mapped:
            stored = _read(self.source, name)
            same = (
                stored is not None
                and stored.data_ptr() != parameter.data_ptr()  # else merging would change the source itself
                and same_bits(cast(stored.to(parameter.device), parameter.dtype), parameter)
            )
            copy = None if same else copy.clone()
        return Slot(module, attribute, parameter, parameter.dtype, copy, mapped, write_count(parameter))

    def _write(self, name: str, terms: Terms) -> bool:
        slot = self.slots[name]
        parameter = slot.parameter
        if slot.applied == terms and slot.applied_dtype in (None, parameter.dtype):
            return False
        stored = self.source.read(name) if slot.copy is None else slot.copy
        if slot.mapped and not terms and (stored.device, stored.dtype) == (parameter.device, parameter.dtype):
            parameter.data = stored
        else:
            fresh = slot.mapped and stored.data_ptr() == parameter.data_ptr()
            if fresh:
                # Memory that is mapped from a file would be copied page by page when it is written, far slower.
                parameter.data = torch.empty_like(parameter)
            # First the dtype in which the base was seen, then today's: the rounding of ``model.to`` without adapters.
            merge_(parameter, stored, (slot.dtype, parameter.dtype), terms)
            if fresh and self.settle is not None:
                parameter.data = self.settle(parameter.data)
        slot.applied, slot.version = terms, write_count(parameter)
        slot.applied_dtype = parameter.dtype if terms else None
        if not terms and (slot.copy is not None or slot.dtype != parameter.dtype):
            del self.slots[name]  # the parameter itself is the base again
        return True


def _read(source: Any, name: str) -> Tensor | None:
    """Return a pristine weight; None when the file does not hold it or is gone."""
    try:
        return None if source is None else source.read(name)
    except (KeyError, WeightError):
        return None


def is_mapped(parameter: Tensor) -> bool:
    """Whether a parameter's memory is that of a file, or of something else than torch."""
    storage = parameter.untyped_storage()
    return parameter.device.type == "cpu" and not storage.resizable() and not storage.is_shared()


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one dtype have one shape and the same bits; in half formats torch.equal is far slower."""
    if first.shape != second.shape:
        return False
    first, second = (tensor.detach().flatten() for tensor in (first, second))
    kind = torch.int32 if first.nbytes % 4 == 0 and first.storage_offset() * first.itemsize % 4 == 0 else torch.uint8
    return torch.equal(first.view(kind), second.view(kind))


def write_count(parameter: nn.Parameter) -> int:
    """Counter of in-place writes; 0 where torch keeps none."""
    return 0 if parameter.is_inference() else parameter._version


def is_plain(parameter: nn.Parameter) -> bool:
    """Whether a parameter holds its values as they are: no subclass, no packed or quantised form."""
    return type(parameter.data) is Tensor and parameter.is_floating_point() and parameter.dtype.itemsize > 1
