"""CUDA graphs: a network's kernels recorded once a shape, and launched together from then on.

A few-step picture of a small network, or on a fast GPU, waits for Python and for kernel launches rather than for the
GPU. A graph launches all kernels of one evaluation at once::

    cudagraph_(unet)         # captures when a shape comes for the first time, then replays
    uncudagraph_(unet)       # the off switch

The kernels are the eager ones, so the results are too. A graph reads its weights where they lay when it was captured:
adapters are merged into that very memory, so they switch without a new capture; when weights move (``.to``, offload),
all graphs are dropped.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .calls import (
    Arguments,
    Forward,
    describe,
    map_tensors,
    replace_forward_,
    restore_forward_,
    tensors_in,
    weight_places,
)

WARMUPS = 3
"""Runs before a capture: libraries choose their algorithms and allocate their workspaces in the first ones."""
PAYS = 16
"""Replays that make up for a capture and its warm-ups."""
PATIENCE = 8
"""Eager runs after weights have moved too early for their graphs to pay."""


class Recording(Protocol):
    """A captured run: ``replay`` runs it anew on whatever its inputs hold by then, and writes into ``output``."""

    output: Any

    def replay(self) -> None:
        """Launch it; does not wait."""
        ...

    def drop(self) -> None:
        """Give its memory back."""
        ...


Capture = Callable[[Callable[[], Any], torch.device], Recording]
"""Warm up and record a function without arguments on a device."""


def cudagraph_(network: nn.Module, *, buckets: int = 8, memory: GraphMemory | None = None) -> Graphs:
    """Run this one object from CUDA graphs whenever its weights and inputs are on a GPU.

    For UNets and ControlNets, and for the ``decoder`` of an autoencoder (``vae.decode`` then runs it, tiled or not).
    Called again on the same network it starts anew with the new settings. Nothing is captured before the first call.
    The network must not run in two threads on two streams at once, whose calls would share the graph's buffers.

    Args:
        network: any module; its forward takes and gives tensors in tuples, lists and mappings, never reads one back,
            and takes other arguments by value.
        buckets: shapes whose graphs are kept; of more, those that were used last.
        memory: that of another network's `Graphs` (``graphs.memory``) to share its working memory; both must always
            run on the same stream.

    Returns:
        The graphs; also ``network.forward`` from now on.

    Raises:
        ValueError: ``buckets`` is below 1.
        RuntimeError: another backend runs ``network`` already.
    """
    memory = memory or GraphMemory()
    graphs = Graphs(network, memory.capture, buckets=buckets, memory=memory)
    present = vars(network).get("forward")
    replace_forward_(network, graphs)
    if isinstance(present, Graphs):
        present.clear()
    return graphs


def uncudagraph_(network: nn.Module) -> None:
    """Undo `cudagraph_`: drop the graphs and let the class's own forward run again. Without graphs it does nothing."""
    present = vars(network).get("forward")
    restore_forward_(network, Graphs)
    if isinstance(present, Graphs):
        present.clear()


class _Bucket(NamedTuple):
    """A captured run and the arguments that it reads."""

    inputs: Arguments
    recording: Recording


def _fill(inputs: Arguments, arguments: Arguments) -> None:
    """Copy ``arguments`` to where a graph reads them; without waiting, in the order of the stream."""
    for own, given in zip(tensors_in(inputs), tensors_in(arguments), strict=True):
        own.copy_(given, non_blocking=True)


class Graphs(Forward):
    """The captured runs of one network, one a *bucket*: shapes, dtypes and structure of its arguments.

    Eager stays: what is not on ``device_type``, what needs gradients, and what runs under autocast, whose cached casts
    a graph would freeze.

    Args:
        network: whose runs.
        capture: records one; injected by tests, which have no GPU.
        buckets: how many are kept.
        device_type: where it captures.
        memory: what a second network can share.

    Raises:
        ValueError: ``buckets`` is below 1.
    """

    def __init__(
        self,
        network: nn.Module,
        capture: Capture,
        *,
        buckets: int = 8,
        device_type: str = "cuda",
        memory: GraphMemory | None = None,
    ):
        if buckets < 1:
            raise ValueError(f"buckets is {buckets}; at least 1 graph must be kept. uncudagraph_ switches them off.")
        super().__init__(network)
        self.buckets = buckets
        self.memory = memory
        self._capture = capture
        self._device_type = device_type
        self._kept: OrderedDict[Any, _Bucket] = OrderedDict()
        self._places: Any = None
        self._replays = 0  # since the weights moved
        self._patience = 0  # eager runs that the weights must stay for until something is captured
        self._wait = 0  # how many of them are left
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or unpickled network has the same settings and captures for itself."""
        return _anew, (self.network, self.buckets)

    @property
    def captured(self) -> int:
        """Graphs that are held."""
        return len(self._kept)

    def clear(self) -> None:
        """Drop all graphs; the next call captures anew.

        Call it after changing, on the network, anything that its forward reads and that is neither a parameter, a
        buffer nor an IP-Adapter's scale.
        """
        while self._kept:
            self._kept.popitem()[1].recording.drop()
        self._replays = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One evaluation; the arguments and the result are those of the network's own forward."""
        network, arguments = self.network, self.arguments(args, kwargs)
        with self._lock:
            device = self._device(network, arguments)
            if device is None:
                return self.plain(arguments)
            self._look_after_weights(network)
            bucket = self._bucket(arguments, device)
            if bucket is None:
                return self.plain(arguments)
            _fill(bucket.inputs, arguments)
            bucket.recording.replay()
            self._replays += 1
            # A copy, because the next replay writes into the same memory, and because the working memory is shared:
            # another bucket's replay writes there too.
            return map_tensors(bucket.recording.output, Tensor.clone)

    def _device(self, network: nn.Module, arguments: Arguments) -> torch.device | None:
        """Where to capture; None for a call that runs eagerly."""
        weight = next(network.parameters(), None)
        if weight is None or weight.device.type != self._device_type:
            self.clear()  # the network has left
            return None
        if torch.is_autocast_enabled(self._device_type):
            return None
        tensors = [*tensors_in(arguments)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*tensors, *network.parameters())):
            return None
        # Numbers, such as a timestep on the CPU, are copied to the device as eager code would; where anything else lies
        # elsewhere, eager code gives the error.
        there = all(tensor.device == weight.device or tensor.ndim == 0 for tensor in tensors)
        return weight.device if there else None

    def _look_after_weights(self, network: nn.Module) -> None:
        """Drop the graphs when weights have moved; when that happens too often to pay, capture nothing for a while.

        Offloading moves them once a picture: a capture each would take longer than the picture.
        """
        places = weight_places(network)
        if places == self._places:
            return
        if self._kept:
            wasted = self._replays < PAYS * len(self._kept)
            self._patience = max(PATIENCE, 2 * self._patience) if wasted else 0
        self._places, self._wait = places, self._patience
        self.clear()

    def _bucket(self, arguments: Arguments, device: torch.device) -> _Bucket | None:
        """The graph for these arguments; None while none is to be captured."""
        key = describe(arguments)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if self._wait > 0:
            self._wait -= 1
            return None
        while len(self._kept) >= self.buckets:
            self._kept.popitem(last=False)[1].recording.drop()
        bucket = self._kept[key] = self._record(arguments, device)
        return bucket

    def _record(self, arguments: Arguments, device: torch.device) -> _Bucket:
        # Tensors made in inference mode could not be written to outside. Leaving it, torch switches gradients on.
        with torch.inference_mode(False), torch.no_grad():
            inputs = map_tensors(arguments, lambda tensor: torch.empty_like(tensor, device=device))
            _fill(inputs, arguments)
            try:
                return _Bucket(inputs, self._capture(lambda: self.plain(inputs), device))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise RuntimeError(
                    f"This {type(self.network).__name__} cannot be captured in a CUDA graph: {error}\nSomething in it "
                    "waits for the GPU, or allocates memory past torch. Run it without: uncudagraph_(network)."
                ) from error


def _anew(network: nn.Module, buckets: int) -> Graphs:
    memory = GraphMemory()
    return Graphs(network, memory.capture, buckets=buckets, memory=memory)


class _CudaRecording:
    """A `torch.cuda.CUDAGraph` and the output that it writes."""

    def __init__(self, graph: Any, output: Any, device: torch.device):
        self.graph = graph
        self.output = output
        self.device = device

    def replay(self) -> None:
        self.graph.replay()

    def drop(self) -> None:
        # A replay may still be running, in the memory that is given back here.
        torch.cuda.synchronize(self.device)
        self.output = None
        self.graph.reset()


class GraphMemory:
    """The pool from which graphs take their working memory, so that several need that of the largest, not the sum.

    That is right because they run one after another: what a graph leaves there is copied out before the next one runs.
    """

    def __init__(self) -> None:
        self._device: torch.device | None = None
        self._stream: Any = None
        self._pool: Any = None
        self._live: weakref.WeakSet[_CudaRecording] = weakref.WeakSet()

    def capture(self, run: Callable[[], Any], device: torch.device) -> Recording:
        """Warm ``run`` up and record it, on a stream of its own.

        Raises:
            RuntimeError: CUDA refuses to record something in ``run``.
        """
        with torch.cuda.device(device):
            if device != self._device:
                self._device, self._stream, self._pool = device, torch.cuda.Stream(), None
            if self._pool is None or not any(recording.output is not None for recording in self._live):
                # A pool dies with its last graph, and its name with it.
                self._pool = torch.cuda.graph_pool_handle()
            stream, current = self._stream, torch.cuda.current_stream()
            stream.wait_stream(current)
            # Warm-ups and capture share the stream, so that the graph uses the libraries' workspaces that these made.
            with torch.cuda.stream(stream):
                for _ in range(WARMUPS):
                    run()
                graph = torch.cuda.CUDAGraph()
                # Other threads may go on using the GPU meanwhile.
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                    output = run()
            current.wait_stream(stream)
        recording = _CudaRecording(graph, output, device)
        self._live.add(recording)
        return recording
