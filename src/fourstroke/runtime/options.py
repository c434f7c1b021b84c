"""How networks run: the one value that says it, and the function that puts it onto them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn

from . import openvino
from .compile import Compiled, compile_, uncompile_
from .cudagraph import cudagraph_, uncudagraph_
from .memory_format import channels_last_
from .quantize import Range
from .spill import Spill

BACKENDS = ("auto", "eager", "compile", "cudagraph", "openvino")
QUANTIZATIONS = ("int8",)
VAES = ("full", "tiny", "tiled")
WIDE = 256
"""Channels of a UNet's first level from which on it takes longer to run than to compile for OpenVINO."""


@dataclass(frozen=True)
class RuntimeOptions:
    """How a pipeline's networks run; none of it changes what they compute, beyond rounding.

    Attributes:
        backend: ``"eager"`` is torch as it is; ``"openvino"`` runs UNet, ControlNets and autoencoder with OpenVINO, in
            bfloat16 where the CPU has it; ``"compile"`` with torch.compile; ``"cudagraph"`` replays CUDA graphs.
            ``"auto"`` is ``"openvino"`` for large models on a CPU, if it is installed, ``"cudagraph"`` on an NVIDIA
            GPU, and ``"eager"`` elsewhere.
        quantize: ``"int8"`` runs UNet and decoder in 8 bits (OpenVINO only), after a calibration on some pictures,
            once a model.
        vae: ``"tiny"`` decodes with the family's tiny autoencoder, ``"tiled"`` in overlapping tiles.
        offload: let networks wait in the computer's memory while they do not work on the GPU; on a CPU (OpenVINO only)
            let what they are compiled from wait on the disk, from where the system takes it back if it is needed.
    """

    backend: str = field(default="auto", metadata={"choices": BACKENDS})
    quantize: str | None = field(default=None, metadata={"choices": QUANTIZATIONS})
    vae: str = field(default="full", metadata={"choices": VAES})
    offload: bool = False

    def __post_init__(self) -> None:
        for each in fields(self):
            value, choices = getattr(self, each.name), each.metadata.get("choices")
            if choices is not None and value not in (each.default, *choices):
                known = ", ".join(repr(choice) for choice in dict.fromkeys((each.default, *choices)))
                raise ValueError(f"{each.name} is {value!r}; it is one of {known}.")
        if self.quantize and self.backend not in ("auto", "openvino"):
            raise ValueError(f"quantize={self.quantize!r} needs backend='openvino'; backend is {self.backend!r}.")

    def resolved(self, device: torch.device, channels: int) -> RuntimeOptions:
        """These options with a backend that is not ``"auto"``.

        Args:
            device: where the networks are to run.
            channels: of the UNet's first level; small networks are done before a graph is compiled.

        Raises:
            ValueError: what is asked for does not run on this device.
            ImportError: OpenVINO is asked for and not installed.
        """
        backend = "openvino" if self.quantize else self.backend
        if backend == "auto" and device.type == "cuda" and not self.offload:
            backend = "cudagraph"
        elif backend == "auto" and device.type == "cpu" and openvino.available() and (channels >= WIDE or self.offload):
            backend = "openvino"
        elif backend == "auto":
            backend = "eager"
        if backend == "openvino" and device.type != "cpu":
            raise ValueError(f"backend 'openvino' (and quantize) run on the CPU; the device is {str(device)!r}.")
        if backend == "cudagraph" and device.type != "cuda":
            raise ValueError(f"backend 'cudagraph' needs an NVIDIA GPU; the device is {str(device)!r}.")
        if backend == "openvino":
            openvino.require()
        if self.offload and device.type == "cpu" and backend != "openvino":
            raise ValueError(
                "offload moves networks to a GPU while they work, or on a CPU their weights to the disk with "
                f"backend='openvino'; the device is 'cpu' and the backend {backend!r}."
            )
        return replace(self, backend=backend)


def run_with_(
    networks: Iterable[nn.Module],
    backend: str,
    *,
    precision: str | None = None,
    ranges: Mapping[str, Range] | None = None,
    spill: Spill | None = None,
) -> None:
    """Let networks run with ``backend``; whatever ran them before is undone first.

    Args:
        networks: UNet, ControlNets, autoencoders; of these encoder and decoder are what runs.
        backend: one of `BACKENDS` but ``"auto"``; ``"eager"`` is how they were built.
        precision: of OpenVINO; by default the best one that the CPU has.
        ranges: layers that OpenVINO runs in 8 bits.
        spill: where OpenVINO's constants lie.

    Raises:
        ValueError: there is no such backend.
        ImportError: OpenVINO is not installed.
    """
    if backend not in BACKENDS or backend == "auto":
        raise ValueError(f"backend is {backend!r}; it is one of {', '.join(BACKENDS[1:])}.")
    for part in (part for network in networks for part in parts_of(network)):
        if isinstance(vars(part).get("forward"), Compiled):
            channels_last_(part, on=False)
        for undo in (openvino.unopenvino_, uncompile_, uncudagraph_):
            undo(part)
        if backend == "openvino":
            openvino.openvino_(part, precision or openvino.best_precision(), ranges, spill=spill)
        elif backend == "compile":
            # Without a compiler torch's GroupNorm turns every feature map back, and nothing is won.
            channels_last_(part)
            compile_(part)
        elif backend == "cudagraph":
            cudagraph_(part)


def parts_of(network: Any) -> list[nn.Module]:
    """What of a network is run by a backend: an autoencoder's encoder and decoder, or all of it, or each of several."""
    if hasattr(network, "decoder"):
        return [network.encoder, network.decoder]
    nets = getattr(network, "nets", None)
    return [network] if nets is None else [*nets]
