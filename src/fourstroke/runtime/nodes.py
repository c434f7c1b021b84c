"""The operations of networks as OpenVINO's nodes, by the name that torch gives the function: `EMITTERS`.

Each function gets what traces (`graph.Tracer`), the shape of the result (or of the results), and torch's own arguments,
and gives the node (or nodes). Where OpenVINO has a slower and a faster way, the faster is taken here: see `_conv2d`,
`_group_norm` and `_chunk`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from openvino import Model as Graph
from openvino import Type
from openvino import opset15 as ops
from torch import Tensor

from .marks import insert, precise

if TYPE_CHECKING:
    from .graph import Tracer

SHORT_CUTS = ("doubling", "group_norm", "chunk")
"""What is not done as torch does it, for speed; each can be left out."""
PHASES = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))
"""How the taps of a convolution of width 3 behind a nearest-neighbour doubling add up to those of a transposed one of
width 4 and stride 2 in front of it: 16 multiplications a pixel in place of 36."""


PADDINGS: Mapping[str, str] = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
"""Modes of padding: torch's names -> OpenVINO's."""


class Unsupported(NotImplementedError):
    """The network does something that has no node here; the caller lets torch run it."""


def ints(*values: int) -> Any:
    """A constant vector of whole numbers."""
    return ops.constant(np.array(values, dtype=np.int64))


def scalar(value: float) -> Any:
    """A constant number, float32."""
    return ops.constant(np.float32(value))


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _per_channel(t: Tracer, bias: Tensor, ndim: int) -> Any:
    return ops.reshape(t.node(bias), ints(1, -1, *[1] * (ndim - 2)), False)


def _conv2d(t: Tracer, out: Tensor, x: Any, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0,
            dilation: Any = 1, groups: int = 1) -> Any:  # fmt: skip
    if groups != 1 or isinstance(padding, str):
        raise Unsupported("a convolution in groups, or with its padding by name")
    pads, stride, name = _pair(padding), _pair(stride), t.names.get(id(weight), "")
    if (
        "doubling" not in t.plain
        and id(x) in t.doubled
        and weight.shape[2:] == (3, 3)
        and stride == [1, 1]
        and pads == [1, 1]
    ):
        source, kernel = t.layer(t.doubled[id(x)], transposed_kernel(weight), 1, name, turned=True)
        y = ops.convolution_backprop_data(source, kernel, [2, 2], None, [1, 1], [1, 1], [1, 1])
    else:
        y = ops.convolution(*t.layer(x, weight, 1, name), stride, pads, pads, _pair(dilation))
    return y if bias is None else ops.add(y, _per_channel(t, bias, 4))


def transposed_kernel(weight: Tensor) -> Tensor:
    """The kernel of a transposed convolution of stride 2 that does the work of doubling and ``weight``.

    Args:
        weight: (C_out, C_in, 3, 3) of a convolution with padding 1.

    Returns:
        (C_out, C_in, 4, 4) in float32, for padding 1.
    """
    phases = torch.tensor(PHASES, dtype=torch.float32, device=weight.device)
    return torch.einsum("ai,bj,ocij->ocab", phases, phases, weight.detach().float())


def _linear(t: Tracer, out: Any, x: Any, weight: Tensor, bias: Any = None) -> Any:
    t.linears[id(out)] = (x, weight, bias)
    name = t.makers[id(out)] = t.names.get(id(weight), "")
    return _product(t, x, weight, bias, name)


def _product(t: Tracer, x: Any, weight: Tensor, bias: Any, name: str) -> Any:
    y = ops.matmul(*t.layer(x, weight, -1, name), False, True)
    return y if bias is None else ops.add(y, t.node(bias))


def _group_norm(
    t: Tracer, out: Tensor, x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    """A scale and a shift a channel, from the channels' means and norms.

    OpenVINO's own GroupNormalization wants another memory layout than convolutions, and the two conversions cost more
    than the rest of it.
    """
    if "group_norm" in t.plain:
        return ops.group_normalization(t.node(x), t.node(weight), t.node(bias), groups, eps)
    rows, channels, pixels = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    axes, node = ints(*range(2, x.ndim)), t.node(x)
    given = [ops.reduce_mean(node, axes, True), ops.reduce_l2(node, axes, True), t.node(weight), t.node(bias)]
    shape = ints(rows, channels, *[1] * (x.ndim - 2))
    # The reshapes keep the big multiplication apart from what must stay float32.
    scale, shift = (
        ops.reshape(value, shape, False) for value in insert(statistics(rows, channels, pixels, groups, eps), given)
    )
    return ops.add(ops.multiply(node, scale), shift)


@functools.lru_cache(maxsize=256)
def statistics(rows: int, channels: int, pixels: int, groups: int, eps: float) -> Graph:
    """From channels' means and L2 norms (rows, channels, 1, 1), weight and bias (channels,) to scale and shift of group
    normalisation (Wu & He 2018), (rows, groups, channels / groups).

    All of it stays float32: in bfloat16 the difference E[x^2] - E[x]^2 would lose what it is about.
    """
    apart = (groups, channels // groups)
    parameters = [ops.parameter(shape, Type.f32) for shape in ([rows, channels, 1, 1],) * 2 + ([channels],) * 2]
    mean, norm, weight, bias = (
        ops.reshape(value, ints(size, *apart), False)
        for value, size in zip(parameters, (rows, rows, 1, 1), strict=True)
    )
    mean = ops.reduce_mean(mean, ints(2), True)
    minus = ops.multiply(mean, scalar(-1))
    square = ops.reduce_mean(ops.multiply(ops.multiply(norm, scalar(1 / pixels)), norm), ints(2), True)
    variance = ops.relu(ops.add(square, ops.multiply(mean, minus)))
    scale = ops.multiply(ops.power(ops.add(variance, scalar(eps)), scalar(-0.5)), weight)
    shift = ops.add(bias, ops.multiply(minus, scale))
    return precise([scale, shift], parameters)


def _layer_norm(
    t: Tracer, out: Tensor, x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    y = ops.mvn(t.node(x), ints(*range(-len(shape), 0)), True, eps, "inside_sqrt")
    y = y if weight is None else ops.multiply(y, t.node(weight))
    return y if bias is None else ops.add(y, t.node(bias))


def _attention(t: Tracer, out: Tensor, q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0,
               is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Any:  # fmt: skip
    if attn_mask is not None or enable_gqa or dropout_p or scale is not None:
        raise Unsupported("attention with a mask, shared heads, dropout or a scale of its own")
    # Few keys gain nothing, and those of a text are uneven: its first token's are far larger than the others.
    factors = None if is_causal or q.shape != k.shape else t.factors(q, k)
    if factors is not None:
        logits = ops.multiply(ops.matmul(*factors, False, True), scalar(q.shape[-1] ** -0.5))
        return ops.matmul(ops.softmax(logits, -1), t.node(v), False, False)
    return ops.scaled_dot_product_attention(t.node(q), t.node(k), t.node(v), causal=is_causal)


def _interpolate(
    t: Tracer, out: Tensor, x: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest", **_: Any
) -> Any:
    if mode != "nearest":
        raise Unsupported(f"interpolation of the mode {mode!r}")
    if all(after == 2 * before for before, after in zip(x.shape[2:], out.shape[2:], strict=True)):
        t.doubled[id(out)] = x
    return ops.interpolate(
        t.node(x), ints(*out.shape[2:]), "nearest", "sizes", axes=ints(*range(2, out.ndim)),
        coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip


def _pad(t: Tracer, out: Tensor, x: Any, pad: Sequence[int], mode: str = "constant", value: Any = None) -> Any:
    sides = [(0, 0)] * (x.ndim - len(pad) // 2) + [(pad[i], pad[i + 1]) for i in range(len(pad) - 2, -1, -2)]
    if mode not in PADDINGS:
        raise Unsupported(f"padding of the mode {mode!r}")
    before, after = (ints(*(side[i] for side in sides)) for i in (0, 1))
    return ops.pad(t.node(x), before, after, PADDINGS[mode], scalar(value or 0))


def _cat(t: Tracer, out: Tensor, tensors: Sequence[Any], dim: int = 0) -> Any:
    return ops.concat([t.node(tensor) for tensor in tensors], dim)


def _chunk(t: Tracer, out: Any, x: Any, chunks: int, dim: int = 0) -> Any:
    if "chunk" not in t.plain and id(x) in t.linears and dim in (-1, x.ndim - 1):
        # Parts of a product are products with parts of the weight, which need not be cut out of anything.
        source, weight, bias = t.linears[id(x)]
        biases = [None] * len(out) if bias is None else bias.chunk(chunks)
        name = t.names.get(id(weight), "")
        return [_product(t, source, *part, name) for part in zip(weight.chunk(chunks), biases, strict=True)]
    return ops.variadic_split(t.node(x), dim, ints(*(part.shape[dim] for part in out))).outputs()


def _same_values(t: Tracer, out: Tensor, x: Any) -> None:
    if id(x) in t.makers:
        t.makers[id(out)] = t.makers[id(x)]


def _reshape(t: Tracer, out: Tensor, x: Any, *_: Any, **__: Any) -> Any:
    _same_values(t, out, x)
    return ops.reshape(t.node(x), ints(*out.shape), False)


def _transpose(t: Tracer, out: Tensor, x: Any, first: int, second: int) -> Any:
    _same_values(t, out, x)
    order = list(range(x.ndim))
    order[first], order[second] = order[second], order[first]
    return ops.transpose(t.node(x), ints(*order))


def _permute(t: Tracer, out: Tensor, x: Any, *dims: Any) -> Any:
    _same_values(t, out, x)
    return ops.transpose(t.node(x), ints(*(dims[0] if isinstance(dims[0], Sequence) else dims)))


def _expand(t: Tracer, out: Tensor, x: Any, *_: Any) -> Any:
    return ops.broadcast(t.node(x), ints(*out.shape))


def _getitem(t: Tracer, out: Tensor, x: Any, index: Any) -> Any:
    """Slices of whole dimensions, and new dimensions."""
    parts = index if isinstance(index, tuple) else (index,)
    y, dim = t.node(x), 0
    for part in parts:
        if part is None:
            continue
        if not isinstance(part, slice) or part.step not in (None, 1):
            raise Unsupported(f"the index {index}")
        start, stop, _ = part.indices(x.shape[dim])
        if (start, stop) != (0, x.shape[dim]):
            y = ops.slice(y, ints(start), ints(stop), ints(1), ints(dim))
        dim += 1
    return ops.reshape(y, ints(*out.shape), False)


def _binary(make: Callable[..., Any], swapped: bool = False) -> Callable[..., Any]:
    def emit(t: Tracer, out: Tensor, a: Any, b: Any) -> Any:
        first, second = (value if isinstance(value, (int, float)) else t.node(value) for value in (a, b))
        first, second = (scalar(v) if isinstance(v, (int, float)) else v for v in (first, second))
        return make(second, first) if swapped else make(first, second)

    return emit


def _unary(make: Callable[..., Any]) -> Callable[..., Any]:
    return lambda t, out, x, inplace=False: make(t.node(x))


def _gelu(t: Tracer, out: Tensor, x: Any, approximate: str = "none") -> Any:
    return ops.gelu(t.node(x), "tanh" if approximate == "tanh" else "erf")


def _cast(t: Tracer, out: Tensor, x: Any, *_: Any, **__: Any) -> Any:
    if not out.is_floating_point():
        raise Unsupported(f"a conversion to {out.dtype}")
    return t.node(x)


def _mean(t: Tracer, out: Tensor, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    axes = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    return ops.reduce_mean(t.node(x), ints(*axes), keepdim)


EMITTERS: Mapping[str, Callable[..., Any]] = {
    "conv2d": _conv2d,
    "linear": _linear,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "scaled_dot_product_attention": _attention,
    "interpolate": _interpolate,
    "pad": _pad,
    "cat": _cat,
    "chunk": _chunk,
    "flatten": _reshape,
    "unflatten": _reshape,
    "reshape": _reshape,
    "view": _reshape,
    "unsqueeze": _reshape,
    "squeeze": _reshape,
    "transpose": _transpose,
    "permute": _permute,
    "expand": _expand,
    "__getitem__": _getitem,
    "mean": _mean,
    "add": _binary(ops.add),
    "__add__": _binary(ops.add),
    "__radd__": _binary(ops.add),
    "sub": _binary(ops.subtract),
    "__sub__": _binary(ops.subtract),
    "__rsub__": _binary(ops.subtract, swapped=True),
    "mul": _binary(ops.multiply),
    "__mul__": _binary(ops.multiply),
    "__rmul__": _binary(ops.multiply),
    "div": _binary(ops.divide),
    "__truediv__": _binary(ops.divide),
    "silu": _unary(lambda x: ops.swish(x)),
    "relu": _unary(ops.relu),
    "tanh": _unary(ops.tanh),
    "sigmoid": _unary(ops.sigmoid),
    "gelu": _gelu,
    "to": _cast,
    "float": _cast,
    "contiguous": _cast,
}
