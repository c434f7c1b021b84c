"""How pictures of all sizes become batches of one shape: buckets of like proportions, resizing, cropping."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import PIL.Image

MAX_RATIO = 2.5  # of a bucket's sides; what is longer is cropped


@dataclass(frozen=True)
class Frame:
    """How a picture is resized and cropped; all in pixels, height (top) first.

    Attributes:
        original: the picture's own size.
        scaled: what it is resized to; at least ``target`` in both directions, and no more than rounding in one of them.
        corner: top and left of what is kept, in the resized picture.
        target: size of what is kept.
    """

    original: tuple[int, int]
    scaled: tuple[int, int]
    corner: tuple[int, int]
    target: tuple[int, int]

    def cut(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """The part of ``image`` that is kept, resized by a Lanczos filter."""
        (height, width), (top, left) = self.target, self.corner
        if image.size != self.scaled[::-1]:
            image = image.resize((self.scaled[1], self.scaled[0]), PIL.Image.Resampling.LANCZOS)
        return image.crop((left, top, left + width, top + height))

    @property
    def time_ids(self) -> tuple[int, ...]:
        """SDXL's micro-conditioning (Podell et al. 2023, sec. 2.2)."""
        return (*self.original, *self.corner, *self.target)


def frame(original: tuple[int, int], target: tuple[int, int], where: tuple[float, float] = (0.5, 0.5)) -> Frame:
    """Resize to cover ``target``, then keep what lies at ``where``: 0 is the top (left), 1 the bottom (right)."""
    scale = max(target[0] / original[0], target[1] / original[1])
    scaled = [max(round(side * scale), wanted) for side, wanted in zip(original, target, strict=True)]
    top, left = (round(at * (side - wanted)) for at, side, wanted in zip(where, scaled, target, strict=True))
    return Frame(original, (scaled[0], scaled[1]), (top, left), target)


@functools.lru_cache(maxsize=16)
def bucket_shapes(resolution: int, step: int, max_ratio: float = MAX_RATIO) -> tuple[tuple[int, int], ...]:
    """The shapes (height, width) of batches: multiples of ``step`` with at most ``resolution``^2 pixels, at most
    ``max_ratio`` to 1, each as high as its width lets it be. A resolution below ``step`` gives one square.
    """
    side = max(round(resolution / step), 1)
    area = max(resolution * resolution, (side * step) ** 2)
    shapes = {(side * step, side * step)}
    for columns in range(1, math.floor(side * math.sqrt(max_ratio)) + 1):
        rows = int(area / (columns * step * step))
        if columns <= rows <= columns * max_ratio:
            shapes |= {(rows * step, columns * step), (columns * step, rows * step)}
    return tuple(sorted(shapes))


def bucket(size: tuple[int, int], resolution: int, step: int, *, square: bool = False) -> tuple[int, int]:
    """The shape (height, width) for a picture of ``size``: the one of most like proportions."""
    if square:
        side = max(round(resolution / step), 1) * step
        return side, side
    wanted = math.log(size[0] / size[1])
    return min(bucket_shapes(resolution, step), key=lambda shape: abs(math.log(shape[0] / shape[1]) - wanted))
