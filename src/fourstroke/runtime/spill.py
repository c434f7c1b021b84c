"""Tensors in files: memory that the system may empty onto the disk, where there is little of it."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SMALL = 1 << 18
"""Bytes below which a tensor is not worth a file."""


class Spill:
    """Makes tensors in files of a folder of its own, on the CPU. They are used as any others.

    A file's space is free again when its tensor is gone, also after a crash; on Windows, when the process ends.

    Args:
        folder: made where it is missing; it must lie on a disk, not in memory.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._own = Path(tempfile.mkdtemp(dir=folder))
        weakref.finalize(self, shutil.rmtree, self._own, ignore_errors=True)
        self._numbers = itertools.count()

    def __reduce__(self) -> tuple[Any, ...]:
        return Spill, (self._own.parent,)

    def empty_like(self, tensor: Tensor) -> Tensor:
        """A contiguous tensor of this shape and dtype, whose values are zeros or anything.

        Raises:
            OSError: the disk is full.
        """
        if tensor.nbytes < SMALL:
            return torch.empty_like(tensor, memory_format=torch.contiguous_format)
        path = self._own / str(next(self._numbers))
        try:
            reserve(path, tensor.nbytes)
            made = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
        finally:
            # The memory stays mapped; Windows does not let go of the name before the end.
            with contextlib.suppress(OSError):
                path.unlink()
        return made.view(tensor.shape)

    def take(self, tensor: Tensor) -> Tensor:
        """``tensor``, contiguous, with its values in a file: a copy, unless they are in one already."""
        tensor = tensor.contiguous()
        if tensor.nbytes < SMALL or not tensor.untyped_storage().resizable():
            return tensor
        made = self.empty_like(tensor)
        made.copy_(tensor)
        return made


def reserve(path: Path, size: int) -> None:
    """Make a file of ``size`` bytes that a full disk cannot fail later, when a write would end the process.

    Raises:
        OSError: there is no room; the message says how much is wanted, and where.
    """
    with path.open("wb") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError as error:
            raise OSError(
                f"There is no room for {size >> 20} MB more in {path.parent} ({error.strerror}); free some, point "
                "XDG_CACHE_HOME at another disk, or leave offload out."
            ) from error
