"""Networks that OpenVINO runs, on CPUs: faster than torch there, with weights that can still be changed.

::

    openvino_(unet)          # compiles when a shape comes for the first time
    unopenvino_(unet)        # the off switch

The network keeps its weights, and whatever changes them in place (LoRAs above all) acts at the next call; only writes
through ``parameter.data``, which torch does not count, go unnoticed. What OpenVINO cannot run, torch runs. This is the
edge at which OpenVINO is imported: ``pip install fourstroke[cpu]``.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from ..parts import release_free_memory
from .calls import (
    Arguments,
    Keeping,
    describe,
    remember,
    replace_forward_,
    restore_forward_,
    tensors_in,
)
from .quantize import Range
from .spill import Spill

PRECISIONS = ("bf16", "f32")
HOST = ("timestep", "added_cond_kwargs", "timestep_cond", "conditioning_scale")
"""Arguments of networks that `graph.trace` takes for host values."""
HOST_RESULTS = 64
"""Sets of host values that are kept: those of so many different timesteps."""


class Compiled(NamedTuple):
    """A graph that is ready to run.

    Attributes:
        program: what was traced.
        request: OpenVINO's, with the memory that its operations need.
        host: host values by the bytes of the arguments that they were computed from.
    """

    program: Any
    request: Any
    host: OrderedDict[bytes, dict[int, Tensor]]


class Accelerated(Keeping):
    """A network's runs by OpenVINO; see `openvino_`, which has the arguments.

    Attributes:
        precision, ranges, shapes, without, spill: as given.
        observed: when this is a dictionary, every run joins the ranges of its layers' inputs to it.
    """

    def __init__(
        self,
        network: nn.Module,
        precision: str = "bf16",
        ranges: Mapping[str, Range] | None = None,
        shapes: int = 2,
        without: Collection[str] = (),
        spill: Spill | None = None,
    ):
        super().__init__(network)
        self.precision = precision
        self.ranges = ranges
        self.shapes = shapes
        self.without = without
        self.spill = spill
        self.observed: dict[str, Range] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or unpickled network has the same settings and compiles for itself."""
        return openvino_, (self.network, self.precision, self.ranges, self.shapes, self.without, self.spill)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One evaluation; the arguments and the result are those of the network's own forward."""
        network, arguments = self.network, self.arguments(args, kwargs)
        tensors = [*tensors_in(arguments)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*tensors, *network.parameters())):
            return self.plain(arguments)
        if network_device(network).type != "cpu":
            return self.plain(arguments)
        if not self._look_after_weights(network):
            warnings.warn(
                f"{type(network).__name__} runs in torch, without OpenVINO: its weights were made in "
                "torch.inference_mode, where changes of them go unnoticed. Load the model outside of it.",
                stacklevel=3,
            )
            return self.plain(arguments)
        key = self.observed is not None, describe(arguments)
        found = remember(self._kept, key, self.shapes, lambda: self._compile(network, arguments))
        return self.plain(arguments) if found is None else self._run(found, tensors, network)

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """As `Forward.arguments`; a ``conditioning_scale`` is a tensor too, so that each has not a graph of its own."""
        scale = kwargs.get("conditioning_scale")
        if isinstance(scale, (int, float)):
            kwargs = {**kwargs, "conditioning_scale": torch.tensor(float(scale))}
        return super().arguments(args, kwargs)

    def _compile(self, network: nn.Module, arguments: Arguments) -> Compiled | None:
        from .graph import Unsupported, trace

        observe = self.observed is not None
        release_free_memory()  # of merging LoRAs; what is compiled takes as much as the weights once more
        try:
            program = trace(
                network, arguments, host=HOST, ranges=self.ranges, observe=observe, plain=self.without, spill=self.spill
            )
        except Unsupported as error:
            warnings.warn(f"{type(network).__name__} runs in torch, without OpenVINO: {error}.", stacklevel=4)
            return None
        settings = {
            "INFERENCE_PRECISION_HINT": self.precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        release_free_memory()  # of rounding weights
        request = core().compile_model(program.graph, "CPU", settings).create_infer_request()
        program.graph = None
        return Compiled(program, request, OrderedDict())

    @torch.no_grad()
    def _run(self, compiled: Compiled, tensors: list[Tensor], network: nn.Module) -> Any:
        program = compiled.program
        values = host_values(compiled, tensors)
        inputs = [tensors[source] if isinstance(source, int) else values[source.index] for source in program.inputs]
        arrays = [value.detach().to(torch.float32).contiguous().numpy() for value in inputs]
        found = compiled.request.infer(arrays, share_inputs=True, share_outputs=True)
        results = [torch.from_numpy(found[i]) for i in range(len(found))]
        observed = len(results) - program.structure.num_leaves
        if self.observed is not None:
            bounds = iter(results[:observed])
            for name, low, high in zip(program.observed, bounds, bounds, strict=True):
                seen = Range(low.clone(), high.clone())
                self.observed[name] = seen.joined(self.observed.get(name, seen))
        dtype = next(network.parameters()).dtype
        # A copy, for OpenVINO writes into the same memory at the next run.
        return tree_unflatten([result.to(dtype, copy=True) for result in results[observed:]], program.structure)


def host_values(compiled: Compiled, tensors: list[Tensor]) -> dict[int, Tensor]:
    """The host values for these arguments, computed or known."""
    program, known = compiled.program, compiled.host
    given = [tensors[number] for number in program.host_inputs]
    key = b"".join(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() for tensor in given)
    return remember(known, key, HOST_RESULTS, lambda: program.run_host(tensors))


def openvino_(
    network: nn.Module,
    precision: str = "bf16",
    ranges: Mapping[str, Range] | None = None,
    shapes: int = 2,
    without: Collection[str] = (),
    spill: Spill | None = None,
) -> Accelerated:
    """Let OpenVINO run the forward of this one object; called again on the same network it starts anew.

    Nothing is compiled before the first call. On another device than the CPU, and where gradients are wanted, torch
    runs the network as ever.

    Args:
        network: a UNet, a ControlNet, the ``decoder`` or ``encoder`` of an autoencoder; tensors in tuples, lists and
            mappings are what it takes and gives.
        precision: ``"bf16"`` or ``"f32"``: what OpenVINO computes in, whatever the dtype of the weights.
        ranges: the layers that run in 8 bits: name -> range of the input; see `fourstroke.runtime.quantize`.
        shapes: graphs that are kept, for as many shapes; each holds all weights.
        without: those of ``nodes.SHORT_CUTS`` that are not to be taken.
        spill: where the constants of the graphs lie that are no weights as they are; in memory by default.

    Returns:
        What runs it; also ``network.forward`` from now on.

    Raises:
        ImportError: OpenVINO is not installed.
        ValueError: there is no such precision, or no such short cut.
        RuntimeError: another backend runs ``network`` already.
    """
    require()
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it is one of {', '.join(PRECISIONS)}.")
    from .nodes import SHORT_CUTS

    for name in without:
        if name not in SHORT_CUTS:
            raise ValueError(f"without names {name!r}; there are the short cuts {', '.join(SHORT_CUTS)}.")
    forward = Accelerated(network, precision, ranges, shapes, without, spill)
    replace_forward_(network, forward)
    return forward


def unopenvino_(network: nn.Module) -> None:
    """Undo `openvino_`: the class's own forward runs again. Without it this does nothing."""
    restore_forward_(network, Accelerated)


def accelerated(network: nn.Module) -> dict[str, Accelerated]:
    """What OpenVINO runs of a network: path of the part -> what runs it; the path of the whole is ``""``."""
    found = ((path, vars(part).get("forward")) for path, part in network.named_modules())
    return {path: forward for path, forward in found if isinstance(forward, Accelerated)}


@functools.lru_cache(maxsize=1)
def available() -> bool:
    """Whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


def require() -> None:
    """Check that OpenVINO is installed.

    Raises:
        ImportError: it is not; the message says how to get it.
    """
    if not available():
        raise ImportError("The backend 'openvino' needs OpenVINO: pip install 'fourstroke[cpu]'.")


@functools.lru_cache(maxsize=1)
def core() -> Any:
    """OpenVINO's runtime, one for all networks."""
    from openvino import Core

    return Core()


def best_precision() -> str:
    """``"bf16"`` where the CPU multiplies in it, else ``"f32"``."""
    return "bf16" if "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"


def network_device(network: nn.Module) -> torch.device:
    """The device of the parameters."""
    return next(network.parameters()).device
