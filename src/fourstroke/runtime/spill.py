"""Tensors in files: memory that the system may empty onto the disk, where there is little of it."""

from __future__ import annotations

import contextlib
import itertools
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

    def take(self, tensor: Tensor) -> Tensor:
        """``tensor``, contiguous, with its values in a file: a copy, unless they are in one already.

        Raises:
            OSError: the disk is full, or not to be written to; the message says how much is wanted, and where.
        """
        tensor = tensor.detach().contiguous()
        if tensor.nbytes < SMALL or not tensor.untyped_storage().resizable():
            return tensor
        path = self._own / str(next(self._numbers))
        try:
            # Written to the file, and not to memory that is mapped from it: far faster, and a full disk is an error.
            path.write_bytes(tensor.view(-1).view(torch.uint8).numpy().data)
            taken = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
        except OSError as error:
            raise OSError(
                f"{tensor.nbytes >> 20} MB cannot be put into {path.parent} ({error.strerror}); make room there, point "
                "XDG_CACHE_HOME at another disk, or leave offload out."
            ) from error
        finally:
            # The memory stays mapped; Windows does not let go of the name before the end.
            with contextlib.suppress(OSError):
                path.unlink()
        return taken.view(tensor.shape)
