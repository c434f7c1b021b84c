"""Random numbers: where they are drawn, from which generator, and which seed belongs to which picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def randn_tensor(
    shape: Sequence[int],
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Standard normal numbers, drawn on the generator's device and then moved to ``device``.

    Args:
        shape: shape of the result; with a list of generators ``shape[0]`` is their number.
        generator: one for all, or one a sample (each draws ``(1, *shape[1:])``), or None for torch's global one.
        device, dtype: of the result.

    Raises:
        ValueError: a CUDA generator is used for a tensor on another device, or the list has another length.
    """
    device = torch.device(device or "cpu")
    if isinstance(generator, Sequence) and len(generator) == 1:
        generator = generator[0]
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}: give one a sample.")
        return torch.cat([randn_tensor((1, *shape[1:]), g, device=device, dtype=dtype) for g in generator])
    source = device if generator is None else generator.device
    if source.type != device.type and source.type != "cpu":
        raise ValueError(
            f"A generator on {source} cannot draw for a tensor on {device}; make it with torch.Generator('cpu')."
        )
    noise = torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype)
    return noise.to(device, non_blocking=device.type == "cuda")  # queued behind the GPU's work, not waiting for it


def generators_for_seeds(seed: int, count: int) -> list[torch.Generator]:
    """One CPU generator a picture: picture ``i`` has the seed ``seed + i``, whatever the batch that it runs in."""
    return [torch.Generator("cpu").manual_seed(seed + i) for i in range(count)]
