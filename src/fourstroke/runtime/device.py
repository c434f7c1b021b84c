"""Devices: which there are, and what runs on them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from .openvino import accelerated
from .widening import is_widened


def check_device(device: torch.device) -> None:
    """Check that ``device`` is here.

    Raises:
        RuntimeError: it is not.
    """
    available = {"cpu": True, "meta": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, True):
        raise RuntimeError(f'There is no {device.type!r} device here; use .to("cpu").')


def accelerator(what: str, index: int | None = None, device: torch.device | str | None = None) -> torch.device:
    """The accelerator that ``what`` is asked to use.

    Args:
        what: who asks, for the message.
        index: which of several.
        device: the kind, or one of several; default the one that this computer has.

    Raises:
        RuntimeError: there is none, or not this one.
        ValueError: ``index`` and ``device`` name two.
    """
    if device is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if found is None:
            raise RuntimeError(
                f'{what} moves networks to an accelerator, and there is none here; use .to("cpu") instead of it.'
            )
        device = found.type
    device = torch.device(device)
    check_device(device)
    if index is not None and device.index is not None and index != device.index:
        raise ValueError(f"{what} is given the device {str(device)!r} and the number {index}; give one of the two.")
    return torch.device(device.type, index) if index is not None and device.type != "cpu" else device


def avoid_half_on_cpu_(networks: Sequence[nn.Module], device: torch.device) -> None:
    """Turn float16 networks into float32 ones, with a warning, when they are to run on the CPU.

    Few CPUs compute in float16, and then slowly. This is done before the first run and not at loading, because most
    pipelines are moved to a GPU in between. Networks that OpenVINO runs are only kept in float16, as their files are,
    and so are those that `widen_` acts on; where there is one of the first, the others become float32 without a
    warning.
    """
    if device.type != "cpu":
        return
    halves = [network for network in networks if any(value.dtype == torch.float16 for value in network.parameters())]
    if not halves:
        return
    elsewhere = [network for network in networks if accelerated(network)]
    halves = [network for network in halves if network not in elsewhere and not is_widened(network)]
    if halves and not elsewhere:
        warnings.warn(
            "float16 is for GPUs, and this pipeline is on the CPU: float32 runs instead. Load it with "
            'torch_dtype=torch.float32, or move it with .to("cuda") before the first picture.',
            stacklevel=2,
        )
    for network in halves:
        network.to(torch.float32)
