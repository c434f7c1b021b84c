"""Networks that wait on the CPU and are on the accelerator only while they work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``."""
    return tensor.to(device)


class _Home(NamedTuple):
    """One tensor of a module that is on the device: whose it is, what it is called, and where it waits otherwise."""

    owner: nn.Module
    name: str
    tensor: Tensor


class Offload:
    """Keeps on the device those networks that work at the moment, and no others.

    The tensors on the CPU are never given up: on the device works a copy, which is dropped afterwards instead of being
    copied back. So nobody may change weights of a network that is on the device; call `rest` before.

    Args:
        device: where networks work.
        pin: page-lock the tensors on the CPU when they are first copied (CUDA only), for the sake of the copies; the
            memory that they take can no longer be swapped out, nor shared with a mapped file.
        copy: what makes the copy.
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        pin: bool = False,
        copy: Callable[[Tensor, torch.device], Tensor] = copy_to,
    ):
        self.device = torch.device(device)
        self.pin = pin
        self._copy = copy
        self._homes: dict[nn.Module, list[_Home]] = {}

    @property
    def resident(self) -> tuple[nn.Module, ...]:
        """The networks that are on the device."""
        return tuple(self._homes)

    def bring(self, *networks: nn.Module) -> None:
        """Let these networks, and no others, be on the device."""
        for network in [network for network in self._homes if network not in networks]:
            self._leave(network)
        for network in networks:
            if network not in self._homes:
                self._homes[network] = [self._enter(*place) for place in _places(network)]

    def rest(self) -> None:
        """Let no network be on the device."""
        self.bring()

    def _enter(self, owner: nn.Module, name: str) -> _Home:
        parameter = owner._parameters.get(name)
        tensor = owner._buffers[name] if parameter is None else parameter.data
        assert tensor is not None
        if self.pin and tensor.device.type == "cpu" and self.device.type == "cuda":
            tensor = tensor.pin_memory()
        if parameter is None:
            owner._buffers[name] = self._copy(tensor, self.device)
        else:
            # The parameter itself stays, for whoever keeps it.
            parameter.data = self._copy(tensor, self.device)
        return _Home(owner, name, tensor)

    def _leave(self, network: nn.Module) -> None:
        for owner, name, tensor in self._homes.pop(network):
            parameter = owner._parameters.get(name)
            if parameter is None:
                owner._buffers[name] = tensor
            else:
                parameter.data = tensor


def _places(network: nn.Module) -> Iterable[tuple[nn.Module, str]]:
    """Owner and name of every parameter and buffer of ``network``, each tensor once."""
    seen: set[int] = set()
    for module in network.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield module, name
