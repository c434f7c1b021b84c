"""From a built network to an OpenVINO graph: one call of the network on shapes alone, each operation noted as a node.

`trace` calls the network with meta tensors under a `torch.overrides.TorchFunctionMode`, so that models need no second
description, and whatever is attached to them (motion modules, IP-Adapters) is part of the graph. Three kinds of values
are told apart:

- *constants*, such as weights: real tensors, whose memory the graph shares.
- *host values*, which depend on nothing but the arguments named in ``host`` (timestep, picture sizes): their
  operations run in torch, before the graph (`Program.run_host`). Sines of large timesteps do not survive bfloat16, and
  what depends on the timestep alone need be computed only once.
- all others: nodes.
"""

from __future__ import annotations

import inspect
import itertools
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from openvino import Model as Graph
from openvino import Node, Type
from openvino import Tensor as Memory
from openvino import opset15 as ops
from openvino.op import Constant
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from .calls import Arguments, map_tensors, tensors_in
from .marks import widened
from .nodes import EMITTERS, Unsupported, ints
from .quantize import LAYERS, LEVELS, RESULT, Range, eight_bits
from .spill import Spill

READERS = frozenset(
    ("item", "tolist", "numpy", "allclose", "__bool__", "__int__", "__float__", "__index__", "__array__")
)
"""Functions that make of a tensor's values something that is none."""

WRITERS = frozenset(("__setitem__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"))
"""Functions that change their first argument, but those whose names tell it (``add_``, which ``+=`` is too)."""


class Slot(NamedTuple):
    """The place of a host value."""

    index: int


class HostCall(NamedTuple):
    """One operation of torch's on constants and host values."""

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    result: int


@dataclass
class Program:
    """A traced network.

    Attributes:
        graph: what OpenVINO compiles; its inputs and results are float32.
        inputs: for each of the graph's inputs, the number of its tensor among the call's, or the slot of a host value.
        structure: of what the call returns, whose leaves are the graph's last results.
        observed: names of the layers whose inputs' least and greatest values are the first results, two a layer.
        host_inputs: the number of a tensor among the call's -> its slot.
        host_calls: what torch runs before the graph.
        memory: tensors whose memory the graph's constants are; it must outlive what is compiled.
    """

    graph: Any = None
    memory: list[Tensor] = field(default_factory=list)
    inputs: list[int | Slot] = field(default_factory=list)
    structure: Any = None
    observed: list[str] = field(default_factory=list)
    host_inputs: dict[int, int] = field(default_factory=dict)
    host_calls: list[HostCall] = field(default_factory=list)

    @torch.no_grad()
    def run_host(self, tensors: Sequence[Tensor]) -> dict[int, Tensor]:
        """The host values of a call: slot -> tensor."""
        values: dict[int, Any] = {slot: tensors[number] for number, slot in self.host_inputs.items()}
        for call in self.host_calls:
            args, kwargs = tree_map_only(Slot, lambda slot: values[slot.index], (call.args, call.kwargs), is_slot)
            values[call.result] = call.function(*args, **kwargs)
        return values


def is_slot(value: Any) -> bool:
    """Whether ``value`` is a leaf although it is a tuple."""
    return isinstance(value, Slot)


def trace(
    network: nn.Module,
    arguments: Arguments,
    *,
    host: Sequence[str] = (),
    ranges: Mapping[str, Range] | None = None,
    observe: bool = False,
    plain: Collection[str] = (),
    spill: Spill | None = None,
) -> Program:
    """The program that computes what ``network``'s class does with ``arguments``.

    Args:
        network: whose forward; tensors, perhaps nested, are what it returns.
        arguments: those of an example call. Shapes hold for this call alone; whatever is no tensor is fixed.
        host: arguments whose tensors are host values; others may be missing.
        ranges: layers (convolutions, linear layers) that run in 8 bits: name -> the range of their input.
        observe: let the graph tell the range of every such layer's input.
        plain: those of `nodes.SHORT_CUTS` that are left out.
        spill: where constants lie that were computed; in memory by default.

    Raises:
        Unsupported: an operation has no node here.
    """
    args, kwargs = arguments
    function = types.MethodType(type(network).forward, network)
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    on_host = {id(tensor) for name in host for tensor in tensors_in(given.get(name))}
    names = {id(part.weight): name for name, part in network.named_modules() if isinstance(part, LAYERS)}
    tracer = Tracer(names, ranges or {}, observe, plain, spill)
    # In order, not by id: a tensor that is given twice in this call may be two in the next.
    numbers = itertools.count()
    args, kwargs = map_tensors(arguments, lambda tensor: tracer.input(tensor, next(numbers), id(tensor) in on_host))
    with torch.no_grad(), tracer:
        return tracer.finish(function(*args, **kwargs))


class Tracer(TorchFunctionMode):
    """Notes what a network does to stand-ins; the functions in `nodes` ask it for the nodes that hold their arguments.

    Attributes:
        names: of the layers, by their weights' ids.
        plain: short cuts that are not taken.
        doubled: what nearest-neighbour doubling made -> what it was made from.
        linears: what a linear layer made -> its input, weight and bias.
        makers: what a linear layer made, turned around or not -> the layer's name, or "".
    """

    def __init__(
        self,
        names: Mapping[int, str],
        ranges: Mapping[str, Range],
        observe: bool,
        plain: Collection[str],
        spill: Spill | None,
    ):
        super().__init__()
        self.program = Program()
        self.names, self.ranges, self.observe, self.plain, self.spill = names, ranges, observe, plain, spill
        self.observers: list[Node] = []
        self.parameters: list[Node] = []
        self.nodes: dict[int, Any] = {}  # stand-in -> node
        self.slots: dict[int, Slot] = {}  # stand-in -> host value
        self.doubled: dict[int, Tensor] = {}
        self.linears: dict[int, Any] = {}
        self.makers: dict[int, str] = {}
        self.kept: list[Any] = []  # a stand-in is known by its id, which must stay its own
        self.shapes: dict[int, Tensor] = {}  # constant -> its shape alone

    # Values.

    def input(self, tensor: Tensor, number: int, on_host: bool) -> Tensor:
        """The stand-in of an argument."""
        stand_in = shape_of(tensor)
        if on_host:
            self.program.host_inputs[number] = self._new_slot(stand_in).index
        else:
            self.nodes[id(stand_in)] = self._parameter(tensor.shape, number)
        self.kept.append(stand_in)
        return stand_in

    def _parameter(self, shape: Sequence[int], source: int | Slot) -> Node:
        self.parameters.append(ops.parameter(list(shape), Type.f32))
        self.program.inputs.append(source)
        return self.parameters[-1]

    def _new_slot(self, stand_in: Tensor) -> Slot:
        slot = self.slots[id(stand_in)] = Slot(len(self.slots))
        return slot

    def known(self, value: Any) -> bool:
        """Whether ``value`` stands for something that is computed in each call."""
        return isinstance(value, Tensor) and (id(value) in self.nodes or id(value) in self.slots)

    def node(self, tensor: Any) -> Node:
        """The float32 node that holds ``tensor``.

        Raises:
            Unsupported: it is no tensor, or one without values.
        """
        if not isinstance(tensor, Tensor):
            raise Unsupported(f"{tensor!r} stands where only a tensor has a node")
        key = id(tensor)
        if key not in self.nodes:
            self.kept.append(tensor)
            if key in self.slots:
                self.nodes[key] = self._parameter(tensor.shape, self.slots[key])
            else:
                self.nodes[key] = self.constant(tensor)
        return self.nodes[key]

    def constant(self, tensor: Tensor) -> Node:
        """A float32 node that shares the memory of ``tensor`` if it can.

        Raises:
            Unsupported: it has no values.
        """
        refuse_lost(tensor)
        node = self._shared(tensor.detach())
        return node if tensor.dtype == torch.float32 else widened(node)

    def _shared(self, tensor: Tensor) -> Node:
        """A node of the format of ``tensor``, whose memory it shares if that is in order."""
        tensor = tensor.contiguous() if self.spill is None else self.spill.take(tensor)
        self.program.memory.append(tensor)
        return Constant(shared_memory(tensor), shared_memory=True)

    def layer(self, x: Tensor, weight: Tensor, axis: int, name: str, turned: bool = False) -> tuple[Node, Node]:
        """The input and the weight of a convolution or linear layer, in 8 bits if its range is known.

        Args:
            x: its input.
            weight: (C_out, C_in, …).
            axis: that of the input's channels.
            name: the layer's.
            turned: give the weight as (C_in, C_out, …).
        """
        node = self.node(x)
        if name:
            self._watch(name, node, [i for i in range(x.ndim) if i != axis % x.ndim])
        found = self.ranges.get(name)
        if found is None:
            return node, self.constant(weight.transpose(0, 1)) if turned else self.node(weight)
        shape = [1] * x.ndim
        shape[axis] = -1
        smooth, found = found.smoothed(weight)
        # Bounds a channel would divide by ``smooth`` in passing, but OpenVINO gets them wrong behind a norm of tokens.
        smaller = ops.multiply(node, self.constant((1 / smooth).view(shape)))
        whole, scale = eight_bits(weight, smooth)
        if turned:
            whole, scale = whole.transpose(0, 1), scale.transpose(0, 1)
        # Not `widened`: OpenVINO would not see that these are weights of 8 bits.
        weights = ops.multiply(ops.convert(self._shared(whole), "f32"), self.constant(scale))
        # OpenVINO has no transposed convolution of 8 bits with a zero point.
        return self._rounded(smaller, found, x.ndim, symmetric=turned), weights

    def factors(self, q: Tensor, k: Tensor) -> tuple[Node, Node] | None:
        """What attention multiplies, in 8 bits; None unless layers made both and the ranges of both are known."""
        found: list[Node] = []
        for x in (q, k):
            layer = self.makers.get(id(x))
            if layer:
                name, node = layer + RESULT, self.node(x)
                self._watch(name, node, range(x.ndim))
                if name in self.ranges:
                    found.append(self._rounded(node, self.ranges[name], x.ndim, symmetric=True))
        return (found[0], found[1]) if len(found) == 2 else None

    def _watch(self, name: str, node: Node, axes: Sequence[int]) -> None:
        """Let the graph tell the least and the greatest value of ``node`` over ``axes``, if that is wanted."""
        if self.observe and name not in self.program.observed:
            self.program.observed.append(name)
            self.observers += [reduce(node, ints(*axes), False) for reduce in (ops.reduce_min, ops.reduce_max)]

    def _rounded(self, node: Node, found: Range, ndim: int, symmetric: bool) -> Node:
        """``node``, of ``ndim`` dimensions, in 256 levels."""
        limits = [self.constant(bound.view([1] * ndim)) for bound in found.limits(symmetric)]
        return ops.fake_quantize(node, *limits, *limits, LEVELS)

    def _shape_alone(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "meta":
            return tensor
        if id(tensor) not in self.shapes:
            self.shapes[id(tensor)] = shape_of(tensor)
            self.kept.append(tensor)
        return self.shapes[id(tensor)]

    # One operation.

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name == "__get__":  # shape, dtype, device, …
            return func(*args, **kwargs)
        if not any(map(self.known, given)):
            # Made from constants alone. What was asked for on a stand-in's device is wanted for real.
            if torch.device("meta") == kwargs.get("device"):
                kwargs = {**kwargs, "device": "cpu"}
            return func(*args, **kwargs)
        if name in READERS:
            raise Unsupported(f"{name} reads values, which a graph has not before it runs")
        if in_place(name, kwargs):
            raise Unsupported(f"{name} writes into a tensor")
        for tensor in given:
            if not self.known(tensor):
                refuse_lost(tensor)
        if all(id(tensor) in self.slots for tensor in given if self.known(tensor)):
            return self._note(name, func, args, kwargs)
        return self._emit(name, func, args, kwargs)

    def _result(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, self._shape_alone, (args, kwargs))
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": "meta"}
        try:
            result = func(*args, **kwargs)
        except NotImplementedError as error:
            raise Unsupported(f"{name} does not run on shapes alone") from error
        return map_tensors(result, lambda tensor: tensor if is_plain(tensor) else shape_of(tensor))

    def _note(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        result = self._result(name, func, args, kwargs)
        if not isinstance(result, Tensor):
            if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
                raise Unsupported(f"{name} makes several tensors of what depends on the timestep alone")
            return result
        if id(result) in self.slots:
            return result
        args, kwargs = tree_map_only(Tensor, lambda tensor: self.slots.get(id(tensor), tensor), (args, kwargs))
        self.program.host_calls.append(HostCall(func, args, kwargs, self._new_slot(result).index))
        self.kept.append(result)
        return result

    def _emit(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        result = self._result(name, func, args, kwargs)
        if isinstance(result, Tensor) and id(result) in self.nodes:
            if name == "float":  # a network that asks for float32 by name (SD 2.x: large logits) does not want 8 bits
                self.makers.pop(id(result), None)
            return result  # a conversion to what it was already
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            return result
        emit = EMITTERS.get(name)
        if emit is None:
            raise Unsupported(f"there is no node for {name}")
        try:
            inspect.signature(emit).bind(self, result, *args, **kwargs)
        except TypeError as error:
            raise Unsupported(f"there is no node for this call of {name}: {error}") from error
        nodes = emit(self, result, *args, **kwargs)
        results = [result] if isinstance(result, Tensor) else result
        for tensor, node in zip(results, [nodes] if isinstance(result, Tensor) else nodes, strict=True):
            self.nodes[id(tensor)] = node
            self.kept.append(tensor)
        return result

    def finish(self, result: Any) -> Program:
        """The program whose call returns what ``result`` stands for."""
        leaves, self.program.structure = tree_flatten(result)
        # OpenVINO computes them in this order: observed values that came last would have to be kept until then.
        results = [*self.observers, *map(self.node, leaves)]
        self.program.graph = Graph([ops.result(node) for node in results], self.parameters)  # pyright: ignore[reportGeneralTypeIssues]
        return self.program


def in_place(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function of torch's changes one of its arguments: a node could not, and others may have seen it."""
    if kwargs.get("inplace") or kwargs.get("out") is not None:
        return True
    return name in WRITERS or (name.endswith("_") and not name.endswith("__"))


def refuse_lost(tensor: Tensor) -> None:
    """Raise unless a tensor that is no stand-in has values.

    Raises:
        Unsupported: it has none: something made it of a stand-in unseen.
    """
    if tensor.is_meta:
        raise Unsupported(f"a tensor of the shape {tuple(tensor.shape)} comes from something that has no node")


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor may be a stand-in: nodes are float32 whatever the weights are stored in."""
    return tensor.dtype == torch.float32 or not tensor.is_floating_point()


def shape_of(tensor: Tensor) -> Tensor:
    """A stand-in of the shape of ``tensor``."""
    return torch.empty_like(tensor, device="meta", dtype=tensor.dtype if is_plain(tensor) else torch.float32)


def shared_memory(tensor: Tensor) -> Memory:
    """OpenVINO's view of a contiguous tensor."""
    if tensor.dtype == torch.bfloat16:  # numpy has no such type
        return Memory(tensor.view(torch.int16).numpy(), list(tensor.shape), Type.bf16)
    return Memory(tensor.numpy(), shared_memory=True)
