"""Eight bits: what convolutions and linear layers are rounded to, and how that is kept small.

Weights are symmetric, a scale an output channel. Activations have one range a layer, taken from the model's own
trajectories; where some channels are far larger than others, part of that is moved into the weights (SmoothQuant, Xiao
et al. 2023, arXiv 2211.10438).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..loading import open_tensors, save_tensors
from ..parts import in_rows

LAYERS = (nn.Conv2d, nn.Linear)
OUTERMOST = ("conv_in", "conv_out")
UNEVEN = (".conv_shortcut", "samplers.", ".ff.net.2")
"""Parts of the names of layers whose input no norm has evened out: what residual blocks add up, and products of gates
(GEGLU)."""
NORMLESS = "layers."
"""How the names of a tiny autoencoder's layers begin; it has no norm at all."""
RESULT = ".result"
"""Behind the name of a layer: what it makes, where attention multiplies that; one range for all its channels."""
OBSERVED = "inputs of layers, factors of attention"
"""What ranges are learnt of; kept ones that were learnt of less are learnt anew."""
LEVELS = 256
SMOOTHING = 0.25
"""How much of the channels' differences goes into the weights; alpha of SmoothQuant's equation 4. With the usual half,
channels that were quiet for the pictures of the calibration are enlarged most, and cut off for others."""
HEADROOM = 2.0
"""How much further than what was seen a range goes: other prompts reach further, and a value that is cut off costs more
than one bit less for all."""


class Range(NamedTuple):
    """The least and the greatest value that each input channel of a layer takes, both (C,) float32."""

    low: Tensor
    high: Tensor

    def joined(self, other: Range) -> Range:
        """The range that holds both."""
        return Range(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))

    def limits(self, symmetric: bool = False) -> tuple[Tensor, Tensor]:
        """The least and the greatest of 256 levels, both (), that hold all channels alike.

        ``symmetric`` values are those of int8 times one step, -128 to 127; otherwise zero is any of the levels.
        """
        low, high = HEADROOM * self.low.min().clamp(max=0), HEADROOM * self.high.max().clamp(min=1e-6)
        # Zero is one of the levels: convolutions pad with it, and a zero point must be a whole number.
        if symmetric:
            below = torch.tensor(LEVELS / 2)
            step = torch.maximum(-low / below, high / (below - 1))
        else:
            step = (high - low) / (LEVELS - 1)
            below = (-low / step).round()
        return -below * step, (LEVELS - 1 - below) * step

    def smoothed(self, weight: Tensor) -> tuple[Tensor, Range]:
        """Factors s of the channels, (C,), and the range of the channels divided by s.

        ``weight`` (C_out, C, …) is to be multiplied by s; s = max|x|^a / max|w|^(1 - a), around 1.
        """
        size = torch.maximum(self.low.abs(), self.high.abs()).clamp(min=1e-6)
        weights = torch.full(size.shape, 1e-6)
        for _, rows in in_rows(weight.detach()):
            # Dimension by dimension, and not by aminmax: torch is far faster so.
            torch.maximum(weights, rows.abs_().amax(0).view(len(size), -1).amax(1), out=weights)
        smooth = size**SMOOTHING / weights ** (1 - SMOOTHING)
        smooth = smooth / smooth.log().mean().exp()
        return smooth, Range(self.low / smooth, self.high / smooth)


def eight_bits(weight: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (C_out, C, …), its input channels times ``smooth`` (C,), as int8 and scales (C_out, 1, …) in float32."""
    whole = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight), *[1] * (weight.ndim - 1))
    for rows, values in in_rows(weight.detach()):
        values.view(len(values), len(smooth), -1).mul_(smooth.view(1, -1, 1))
        scale = torch.maximum(-values.amin(1, True), values.amax(1, True)).clamp_(min=1e-12).div_(127)
        scales[rows] = scale.view(scales[rows].shape)
        whole[rows] = values.div_(scale).round_().view(whole[rows].shape)
    return whole, scales


def in_eight_bits(ranges: Mapping[str, Range]) -> dict[str, Range]:
    """The ranges of those layers, and results of layers, that run in 8 bits.

    That is all but the first and the last, small ones that all depends on, and those whose input is uneven: few large
    values would leave a handful of levels to the others, and one prompt reaches ten times as far as another. They are
    little of the arithmetic and would be nearly all of the error.
    """

    def even(name: str) -> bool:
        return not name.startswith(NORMLESS) and not any(part in name for part in UNEVEN)

    return {name: found for name, found in ranges.items() if name not in OUTERMOST and even(name)}


def fingerprint(files: Iterable[Path], *more: object) -> str:
    """A name for what ``files`` hold (told by their sizes and times) and ``more``: 32 hexadecimal digits."""
    told = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(set(files))]
    return hashlib.sha256(repr((told, more)).encode()).hexdigest()[:32]


def save_ranges(path: Path, ranges: Mapping[str, Range]) -> None:
    """Write ``ranges`` as a .safetensors file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(
        path, {f"{name}.{end}": getattr(found, end) for name, found in ranges.items() for end in Range._fields}
    )


def load_ranges(path: Path) -> dict[str, Range] | None:
    """What `save_ranges` wrote; None when it did not."""
    if not path.is_file():
        return None
    file = open_tensors(path)
    names = dict.fromkeys(key.rpartition(".")[0] for key in file.keys())  # noqa: SIM118 - not a mapping
    return {name: Range(*(file.get_tensor(f"{name}.{end}").clone() for end in Range._fields)) for name in names}
