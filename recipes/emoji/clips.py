"""Moving pictures for the motion adapter and its LoRAs: emoji that bounce, sway, spin, turn, pulse, blink or drift.

A motion is a function from a random generator to `Poses`: where, how large, how turned and how faint a picture is
drawn in each of 16 frames. Latents of the clips are computed once with the frozen encoder and kept in ``.cache/train``.

Captions stay those of the picture. "bouncing" and its like occur in no caption that the text encoder was trained on, so
they would be spelled in pieces that mean nothing to it: the adapter draws motions at random, and the LoRAs choose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from data import CACHE, load, to_floats
from latents import cached
from loop import say, write
from torch import Tensor
from train_vae import trained

LENGTH = 16  # frames of a clip, as many as the adapter has positions for
ROOM = 0.85  # a moving picture is drawn smaller than a still one, so that it stays inside
BASE = 0.9  # height of the ground that things stand on: half pictures below the centre
THIN = 0.12  # a card seen from its edge keeps this much of its width
# Of the two LoRAs. A frame's pose depends on its number alone, so that short animations are the beginning of long ones.
ZOOM_FROM, ZOOM_RATE = 0.62, 0.048  # 1.4 times as large after 8 frames, 2.05 times after 16
PAN_RATE = 0.05  # half pictures a frame, that is 3.2 pixels of 128


@dataclass(frozen=True)
class Poses:
    """How a picture is drawn in each frame. Lengths are in half pictures, x to the right and y downwards.

    ``size`` (F, 2) stretches about ``pivot`` (2,), then ``angle`` (F,) in radians turns about it, clockwise, then
    ``shift`` (F, 2) moves; ``ink`` (F,) is 1 for the picture as it is and 0 for white.
    """

    size: Tensor
    angle: Tensor
    shift: Tensor
    pivot: Tensor
    ink: Tensor

    def affine(self) -> Tensor:
        """(F, 2, 3) for `torch.nn.functional.affine_grid`: from a place in the frame to one in the picture.

        The forward map is q = R S (p - pivot) + pivot + shift; this is its inverse.
        """
        cos, sin = self.angle.cos(), self.angle.sin()
        back = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2) / self.size[:, :, None]
        offset = self.pivot - (back @ (self.pivot + self.shift)[:, :, None])[:, :, 0]
        return torch.cat([back, offset[:, :, None]], -1)


Motion = Callable[[torch.Generator], Poses]


def still(size: float = ROOM, base: float = 0.0) -> Poses:
    """No motion: the picture at ``size``, about the point ``base`` below its centre."""
    return Poses(
        torch.full((LENGTH, 2), size), torch.zeros(LENGTH), torch.zeros(LENGTH, 2), torch.tensor([0.0, base]),
        torch.ones(LENGTH),
    )  # fmt: skip


def between(low: float, high: float, generator: torch.Generator) -> float:
    """A uniform random number."""
    return low + (high - low) * torch.rand((), generator=generator).item()


def sign(generator: torch.Generator) -> int:
    """-1 or 1."""
    return 2 * int(torch.randint(2, (), generator=generator)) - 1


def angles(generator: torch.Generator) -> Tensor:
    """One turn or two in 16 frames from a random start, (16,) radians: the clip ends where it began."""
    turns = 1 + int(torch.randint(2, (), generator=generator))
    return 2 * math.pi * (turns * torch.arange(LENGTH) / LENGTH + between(0, 1, generator))


def bounce(generator: torch.Generator) -> Poses:
    """Up and down as |sin|, squashed when it meets the ground; the area stays."""
    pose, rise = still(base=BASE), (angles(generator) / 2).sin().abs()
    squash = 1 - between(0.1, 0.2, generator) * (1 - rise) ** 3
    up = torch.stack([torch.zeros(LENGTH), -between(0.2, 0.4, generator) * rise], -1)
    return replace(pose, size=ROOM * torch.stack([1 / squash, squash], -1), shift=up)


def sway(generator: torch.Generator) -> Poses:
    """To the left and to the right about its base."""
    return replace(still(base=BASE), angle=between(0.15, 0.35, generator) * angles(generator).sin())


def spin(generator: torch.Generator) -> Poses:
    """Round about its centre, either way."""
    return replace(still(), angle=sign(generator) * angles(generator))


def turn(generator: torch.Generator) -> Poses:
    """Round about its upright axis like a card; its back is its mirror image."""
    width = angles(generator).cos()
    width = torch.where(width < 0, width.clamp(max=-THIN), width.clamp(min=THIN))
    return replace(still(), size=ROOM * torch.stack([width, torch.ones(LENGTH)], -1))


def pulse(generator: torch.Generator) -> Poses:
    """Larger and smaller."""
    size = ROOM * (1 + between(0.08, 0.18, generator) * angles(generator).sin())
    return replace(still(), size=size[:, None].expand(-1, 2))


def blink(generator: torch.Generator) -> Poses:
    """Fainter and back, as a lamp; where faces have their eyes is not known."""
    return replace(still(), ink=1 - between(0.6, 0.8, generator) * angles(generator).sin().clamp(min=0) ** 2)


def drift(generator: torch.Generator) -> Poses:
    """Straight on in any direction, through the centre at the middle of the clip."""
    way, speed = between(0, 2 * math.pi, generator), between(0.02, 0.05, generator)
    steps = speed * (torch.arange(LENGTH) - (LENGTH - 1) / 2)
    return replace(still(), shift=steps[:, None] * torch.tensor([math.cos(way), math.sin(way)]))


def zoom(generator: torch.Generator) -> Poses:
    """The camera comes nearer or goes away, at a steady rate."""
    rate = sign(generator) * between(0.02, ZOOM_RATE, generator)
    size = ROOM * (rate * (torch.arange(LENGTH) - (LENGTH - 1) / 2)).exp()
    return replace(still(), size=size[:, None].expand(-1, 2))


def zoom_in(generator: torch.Generator) -> Poses:
    """The camera comes nearer, in every clip alike."""
    size = ZOOM_FROM * (ZOOM_RATE * torch.arange(LENGTH)).exp()
    return replace(still(), size=size[:, None].expand(-1, 2))


def pan_left(generator: torch.Generator) -> Poses:
    """The camera turns to the left, so that what it sees moves to the right, in every clip alike."""
    steps = PAN_RATE * (torch.arange(LENGTH) - (LENGTH - 1) / 2)
    return replace(still(), shift=torch.stack([steps, torch.zeros(LENGTH)], -1))


MOTIONS: Mapping[str, Motion] = {
    "bounce": bounce, "sway": sway, "spin": spin, "turn": turn, "pulse": pulse, "blink": blink, "drift": drift,
    "zoom": zoom,
}  # fmt: skip
CAMERA: Mapping[str, Motion] = {"zoom-in": zoom_in, "pan-left": pan_left}


def drawn(picture: Tensor, poses: Poses) -> Tensor:
    """Frames (F, 3, H, W) in -1..1 of a picture (3, H, W) on white; drawn twice as large and averaged down."""
    count, (height, width) = len(poses.ink), picture.shape[1:]
    grid = F.affine_grid(poses.affine(), [count, 3, 2 * height, 2 * width], align_corners=False)
    dark = (picture - 1).expand(count, -1, -1, -1) * poses.ink[:, None, None, None]
    return F.avg_pool2d(F.grid_sample(dark, grid, align_corners=False), 2).add(1).clamp(-1, 1)


@dataclass(frozen=True)
class Clips:
    """``latents`` (N, 16, 4, 16, 16), times ``scaling_factor``, and the index (N,) of each clip's picture."""

    latents: Tensor
    pictures: Tensor

    def draw(self, count: int, frames: int, generator: torch.Generator, from_start: bool) -> tuple[Tensor, Tensor]:
        """``count`` stretches of ``frames`` frames (count, frames, 4, 16, 16), and their pictures (count,).

        A stretch begins with its clip, or at a random frame of it.
        """
        chosen = torch.randint(len(self.latents), (count,), generator=generator)
        starts = torch.randint(1 if from_start else LENGTH - frames + 1, (count,), generator=generator)
        found = [self.latents[clip, start : start + frames] for clip, start in zip(chosen, starts, strict=True)]
        return torch.stack(found).float(), self.pictures[chosen]


@torch.no_grad()
def compute(motions: Mapping[str, Motion], count: int, seed: int = 0) -> Clips:
    """Draw and encode ``count`` clips of pictures at random, the motions in turn."""
    vae, factor, pictures = trained(), cached().scaling_factor, load()[0]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(pictures), generator=generator)[:count]
    moves = list(motions.values())
    found = []
    for index, picture in enumerate(to_floats(pictures[chosen])):
        frames = drawn(picture, moves[index % len(moves)](generator))
        with torch.autocast("cpu", torch.bfloat16):
            found.append((vae.encode(frames).mean.float() * factor).half())
        if index % 100 == 99:
            say(f"clips: {index + 1}/{count}")
    return Clips(torch.stack(found), chosen)


def clips(name: str, motions: Mapping[str, Motion], count: int) -> Clips:
    """The clips from ``.cache/train/<name>-latents.pt``, computed first when they are missing."""
    path = CACHE / "train" / f"{name}-latents.pt"
    if not path.exists():
        found = compute(motions, count)
        write(path, {"latents": found.latents, "pictures": found.pictures})
    return Clips(**torch.load(path, weights_only=True))
