"""Several devices that train together, one process each, through accelerate; or one, without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from .base import choose_device

WAIT = timedelta(days=1)  # for each other: the first encodes the data, and paints the samples


class Devices:
    """The processes of a training.

    Attributes:
        count, rank: how many there are, and which this one is.
        device: of this one.
    """

    def __init__(self, device: torch.device, accelerator: Any = None):
        self._accelerator = accelerator
        self.device = device
        self.count: int = 1 if accelerator is None else accelerator.num_processes
        self.rank: int = 0 if accelerator is None else accelerator.process_index

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean over all devices into each of ``tensors``, float32, in one exchange."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        mean = self._accelerator.reduce(flat, reduction="mean")
        for tensor, part in zip(tensors, mean.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process does what is inside before the others do."""
        if self._accelerator is None:
            yield
        else:
            with self._accelerator.main_process_first():
                yield

    def wait(self) -> None:
        """Wait for the others."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()


def open_devices(device: str | None) -> Devices:
    """This process alone on ``device``, or, when torchrun or ``accelerate launch`` started several, all of them.

    Raises:
        ImportError: several were started, and accelerate is not installed.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_torchelastic_launched():
        return Devices(choose_device(device))
    try:
        from accelerate import Accelerator, InitProcessGroupKwargs
    except ImportError as error:
        raise ImportError("Several processes need accelerate: pip install 'fourstroke[accelerate]'.") from error
    patient = InitProcessGroupKwargs(timeout=WAIT)
    accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=[patient])
    return Devices(accelerator.device, accelerator)
