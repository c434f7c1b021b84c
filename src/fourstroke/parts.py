"""Large tensors in parts that stay in a CPU's caches: fresh memory for all of one takes longer than the arithmetic.

And what such work leaves behind: see `release_free_memory`.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 1 << 21
"""Values of a part; 8 MB in float32."""


def in_rows(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of ``tensor`` after the other.

    Args:
        tensor: (rows, …), with at least one value a row.
        dtype: what they are converted to.

    Yields:
        Which rows, and their values (of these rows, all else), in memory that the next ones overwrite.
    """
    rows, columns = len(tensor), math.prod(tensor.shape[1:])
    step = max(1, min(rows, BLOCK // columns))
    scratch = torch.empty(step, columns, dtype=dtype)
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        values = scratch[: part.stop - first]
        values.copy_(tensor[part].reshape(values.shape))
        yield part, values


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``; between the half formats by way of float32, which torch does far faster."""
    if tensor.device.type != "cpu" or {tensor.dtype, dtype} != {torch.float16, torch.bfloat16} or not tensor.numel():
        return tensor.to(dtype)
    result = torch.empty(tensor.shape, dtype=dtype)
    flat = result.view(-1)
    for part, values in in_rows(tensor.flatten()):
        flat[part] = values[:, 0]
    return result


def release_free_memory() -> None:
    """Give back to the system what the C library holds of freed memory.

    glibc keeps freed pieces of some megabytes between others for later, gigabytes of them after a merge into SDXL. This
    is for rare moments: memory that is taken again soon is slower to get back.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none, and keeps nothing
        if trim is not None:
            trim(0)
