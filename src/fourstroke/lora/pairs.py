"""Adapter weights of one parameter, as values: a low-rank pair and its relatives.

Each class knows one formula, ``delta(base, factor)``: the change of the parameter when the adapter acts with weight
``factor``, in the shape, dtype and device of ``base``. ``matrix_shape`` is the shape of that change with everything
behind the output dimension flattened; asking for it checks that the tensors agree with each other. ``tensors`` gives
them under the names that kohya's and LyCORIS' files use.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor


class LoraError(ValueError):
    """A LoRA cannot be read, does not fit the model, or is asked for something it cannot do."""


class AdapterWeights(Protocol):
    """What an adapter knows about one parameter."""

    @property
    def rank(self) -> int | None:
        """Inner dimension, if there is one."""
        ...

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape of the change, flattened behind the first dimension; raises `LoraError` when the tensors disagree."""
        ...

    def delta(self, base: Tensor, factor: float = 1.0) -> Tensor:
        """Return the change of ``base`` when applied with weight ``factor``."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by their name in kohya's layout."""
        ...


def like(tensor: Tensor, base: Tensor) -> Tensor:
    """Return ``tensor`` on the device and in the dtype of ``base``."""
    return tensor.to(device=base.device, dtype=base.dtype)


def _agree(equal: bool, *tensors: Tensor | None) -> None:
    if not equal:
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors if tensor is not None)
        raise LoraError(f"tensors of shape {shapes} do not multiply")


def _alpha(alpha: float | None) -> dict[str, Tensor]:
    return {} if alpha is None else {"alpha": torch.tensor(float(alpha))}


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

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """See `AdapterWeights`."""
        up, down, mid = self.up, self.down, self.mid
        columns = math.prod(down.shape[1:])
        if mid is None:
            _agree(up.ndim > 1 and down.ndim > 1 and up[0].numel() == down.shape[0], up, down)
        else:
            _agree(mid.ndim > 2 and mid.shape[:2] == (up[0].numel(), down.shape[0]), up, mid, down)
            columns *= math.prod(mid.shape[2:])
        return up.shape[0], columns

    def folded(self) -> LoraPair:
        """Return the pair without ``mid`` that makes the same change, computed in float32."""
        if self.mid is None:
            return self
        down = _fold(self.mid.float(), self.down.float()).to(self.down.dtype)
        return LoraPair(down, self.up, self.alpha)

    def delta(self, base: Tensor, factor: float = 1.0) -> Tensor:
        """Return ``factor * scale * up @ down`` in the shape of ``base``."""
        up, down = like(self.up, base), like(self.down, base)
        if self.mid is not None:
            down = _fold(like(self.mid, base), down)
        return (up.flatten(1) @ down.flatten(1)).reshape(base.shape) * (factor * self.scale)

    def tensors(self) -> dict[str, Tensor]:
        """See `AdapterWeights`."""
        mid = {} if self.mid is None else {"lora_mid.weight": self.mid}
        alpha = _alpha(self.rank if self.alpha is None else self.alpha)
        return {"lora_down.weight": self.down, "lora_up.weight": self.up, **mid, **alpha}


def _fold(mid: Tensor, down: Tensor) -> Tensor:
    """``mid (rank, rank, *kernel)`` after the 1x1 ``down (rank, in)``, as one convolution ``(rank, in, *kernel)``."""
    return torch.einsum("ij...,jc->ic...", mid, down.flatten(1))


@dataclass(frozen=True, eq=False)
class LoHa:
    """A Hadamard product of two low-rank products, ``alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b)``.

    LyCORIS (arXiv 2309.14859), section 3.2; from FedPara (arXiv 2108.06098). With ``t1`` and ``t2`` each factor is
    Tucker-decomposed: ``t (rank, rank, *kernel)``, ``w_a (rank, out)``, ``w_b (rank, in)``.
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None = None
    t2: Tensor | None = None
    alpha: float | None = None

    @property
    def rank(self) -> int:
        """Inner dimension of each factor."""
        return self.w1_b.shape[0]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """See `AdapterWeights`."""
        first = _factor_shape(self.w1_a, self.w1_b, self.t1)
        _agree(first == _factor_shape(self.w2_a, self.w2_b, self.t2), self.w1_a, self.w1_b, self.w2_a, self.w2_b)
        return first

    def delta(self, base: Tensor, factor: float = 1.0) -> Tensor:
        """Return the scaled Hadamard product in the shape of ``base``."""
        first = _factor(self.w1_a, self.w1_b, self.t1, base)
        product = first * _factor(self.w2_a, self.w2_b, self.t2, base)
        return product.reshape(base.shape) * (factor * (1.0 if self.alpha is None else self.alpha / self.rank))

    def tensors(self) -> dict[str, Tensor]:
        """See `AdapterWeights`."""
        return _fields(self, "hada_") | _alpha(self.rank if self.alpha is None else self.alpha)


@dataclass(frozen=True, eq=False)
class LoKr:
    """A Kronecker product ``alpha / rank * w1 (x) w2`` whose factors are full or low-rank.

    LyCORIS (arXiv 2309.14859), section 3.3. The scale is 1 when neither factor is decomposed. ``w2`` of a convolution
    is ``(out_2, in_2, *kernel)``, or ``w2_a (out_2, rank) @ w2_b (rank, in_2 * kernel)``, or Tucker-decomposed with
    ``t2 (rank, rank, *kernel)``, ``w2_a (rank, out_2)``, ``w2_b (rank, in_2)``.
    """

    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        for name, full, a, b in (("w1", self.w1, self.w1_a, self.w1_b), ("w2", self.w2, self.w2_a, self.w2_b)):
            if (full is None) == (a is None or b is None) or (a is None) != (b is None):
                raise LoraError(f"LoKr needs either lokr_{name} or both lokr_{name}_a and lokr_{name}_b")

    @property
    def rank(self) -> int | None:
        """Inner dimension of the decomposed factor; None when both are full."""
        inner = self.w1_b if self.w1_b is not None else self.w2_b
        return None if inner is None else inner.shape[0]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """See `AdapterWeights`."""
        rows, columns = _factor_shape(self.w1_a, self.w1_b, None, self.w1)
        inner_rows, inner_columns = _factor_shape(self.w2_a, self.w2_b, self.t2, self.w2)
        return rows * inner_rows, columns * inner_columns

    def delta(self, base: Tensor, factor: float = 1.0) -> Tensor:
        """Return the scaled Kronecker product in the shape of ``base``."""
        w1 = _factor(self.w1_a, self.w1_b, None, base, self.w1)  # (out_1, in_1)
        w2 = _factor(self.w2_a, self.w2_b, self.t2, base, self.w2)  # (out_2, in_2 * kernel)
        scale = 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank
        return torch.kron(w1, w2).reshape(base.shape) * (factor * scale)

    def tensors(self) -> dict[str, Tensor]:
        """See `AdapterWeights`."""
        return _fields(self, "lokr_") | _alpha((self.rank or 1) if self.alpha is None else self.alpha)


def _factor_shape(
    a: Tensor | None, b: Tensor | None, core: Tensor | None, full: Tensor | None = None
) -> tuple[int, int]:
    if full is not None:
        return full.shape[0], math.prod(full.shape[1:])
    assert a is not None and b is not None
    if core is None:
        _agree(a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0], a, b)
        return a.shape[0], b.shape[1]
    _agree(a.ndim == b.ndim == 2 and core.ndim > 2 and core.shape[:2] == (a.shape[0], b.shape[0]), core, a, b)
    return a.shape[1], b.shape[1] * math.prod(core.shape[2:])


def _factor(
    a: Tensor | None, b: Tensor | None, core: Tensor | None, base: Tensor, full: Tensor | None = None
) -> Tensor:
    if full is not None:
        return like(full, base).flatten(1)
    assert a is not None and b is not None
    a, b = like(a, base), like(b, base)
    return a @ b if core is None else torch.einsum("ij...,io,jc->oc...", like(core, base), a, b).flatten(1)


@dataclass(frozen=True, eq=False)
class Diff:
    """A full-rank change: ``scale * change``, of a weight or a bias (``.diff``, ``.diff_b``)."""

    change: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> None:
        """A full change has no rank."""
        return None

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """See `AdapterWeights`."""
        return self.change.shape[0], math.prod(self.change.shape[1:])

    def delta(self, base: Tensor, factor: float = 1.0) -> Tensor:
        """Return ``factor * scale * change``."""
        return like(self.change, base).reshape(base.shape) * (factor * self.scale)

    def tensors(self) -> dict[str, Tensor]:
        """See `AdapterWeights`; a bias is renamed by whoever knows that it is one."""
        return {"diff": self.change if self.scale == 1.0 else self.change * self.scale}


@dataclass(frozen=True, eq=False)
class Dora:
    """Weight decomposition around another change: ``m * (W + dW) / ||W + dW||`` (DoRA, arXiv 2402.09353, equation 5).

    Attributes:
        change: the change ``dW``; the adapter's weight scales it before the norm is taken, as in peft.
        magnitude: ``m``, of the parameter's rank: ``(out, 1, …)`` norms each row (peft and today's LyCORIS),
            ``(1, in, 1, …)`` norms each input column over outputs and kernel (older LyCORIS files).
    """

    change: LoraPair | LoHa | LoKr
    magnitude: Tensor

    @property
    def rank(self) -> int | None:
        """Rank of the change."""
        return self.change.rank

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape of the change; `misfit` looks at the magnitude."""
        return self.change.matrix_shape

    def delta(self, base: Tensor, factor: float = 1.0) -> Tensor:
        """Return the rescaled sum minus ``base``."""
        moved = base + self.change.delta(base, factor)
        magnitude = like(self.magnitude, base)
        magnitude = magnitude.reshape(*magnitude.shape[:2], *[1] * (base.ndim - min(2, magnitude.ndim)))
        axes = [axis for axis in range(base.ndim) if magnitude.shape[axis] == 1]
        norm = torch.linalg.vector_norm(moved, dim=axes, keepdim=True).clamp_min(1e-12)  # a row of zeros stays zero
        return moved * (magnitude / norm) - base

    def tensors(self) -> dict[str, Tensor]:
        """See `AdapterWeights`."""
        return self.change.tensors() | {"dora_scale": self.magnitude}


def _fields(weights: LoHa | LoKr, prefix: str) -> dict[str, Tensor]:
    values = {field.name: getattr(weights, field.name) for field in dataclasses.fields(weights)}
    return {prefix + name: value for name, value in values.items() if isinstance(value, Tensor)}


def misfit(weights: AdapterWeights, shape: torch.Size) -> str | None:
    """Tell why ``weights`` cannot change a parameter of ``shape``; None when they can."""
    try:
        found = weights.matrix_shape
    except LoraError as error:
        return str(error)
    if found != (shape[0], math.prod(shape[1:])):
        return f"makes a change of shape {found}, the parameter has {tuple(shape)}"
    if isinstance(weights, Dora):
        size = weights.magnitude.shape
        per_row = size[0] == size.numel() == shape[0]
        per_column = len(size) > 1 and len(shape) > 1 and size[1] == size.numel() == shape[1]
        if not per_row and not per_column:
            return f"has a magnitude of shape {tuple(size)}, the parameter has {tuple(shape)}"
    return None


WeightsT = TypeVar("WeightsT", bound=AdapterWeights)


def map_tensors(weights: WeightsT, function: Callable[[Tensor], Tensor]) -> WeightsT:
    """Return a copy of ``weights`` with ``function`` applied to each of its tensors."""
    changes = {}
    for field in dataclasses.fields(weights):  # type: ignore[arg-type]
        value = getattr(weights, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = function(value)
        elif dataclasses.is_dataclass(value):
            changes[field.name] = map_tensors(value, function)  # type: ignore[type-var]
    return dataclasses.replace(weights, **changes)  # type: ignore[type-var]
