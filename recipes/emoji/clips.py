"""Moving pictures for the motion adapter and its LoRAs: emoji that bounce or sway, and a camera that zooms or pans.

A motion is a function that gives `Poses`: where, how large and how turned a picture is drawn in each of 16
frames. Latents of the clips are computed once with the frozen encoder and kept in ``.cache/train``.

Every emoji has one motion, that of its kind, and always begins at rest. Captions do not name it, as the text encoder
was trained on no such word. If motions were drawn at random, the likeliest picture at the noisiest timesteps, from
which few steps begin, would be the mean of all: one that stands still. So it came out with eight motions at random, and
with seven, one for each group of emoji, in 350 steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from data import CACHE, PACKAGES, fetch, load, to_floats
from latents import cached
from loop import say, write
from torch import Tensor
from train_vae import trained

LENGTH = 16  # frames of a clip, as many as the adapter has positions for
ROOM = 0.85  # a moving picture is drawn smaller than a still one, so that it stays inside
BASE = 0.9  # height of the ground that things stand on: half pictures below the centre
# Of the two LoRAs. A frame's pose depends on its number alone, so that short animations are the beginning of long ones.
ZOOM_FROM, ZOOM_RATE = 0.62, 0.048  # 1.4 times as large after 8 frames, 2.05 times after 16
PAN_RATE = 0.05  # half pictures a frame, that is 3.2 pixels of 128


@dataclass(frozen=True)
class Poses:
    """How a picture is drawn in each frame. Lengths are in half pictures, x to the right and y downwards.

    ``size`` (F, 2) stretches about ``pivot`` (2,), then ``angle`` (F,) in radians turns about it, clockwise, then
    ``shift`` (F, 2) moves.
    """

    size: Tensor
    angle: Tensor
    shift: Tensor
    pivot: Tensor

    def affine(self) -> Tensor:
        """(F, 2, 3) for `torch.nn.functional.affine_grid`: from a place in the frame to one in the picture.

        The forward map is q = R S (p - pivot) + pivot + shift; this is its inverse.
        """
        cos, sin = self.angle.cos(), self.angle.sin()
        back = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2) / self.size[:, :, None]
        offset = self.pivot - (back @ (self.pivot + self.shift)[:, :, None])[:, :, 0]
        return torch.cat([back, offset[:, :, None]], -1)


Motion = Callable[[], Poses]


def still(size: float = ROOM, base: float = 0.0) -> Poses:
    """No motion: the picture at ``size``, about the point ``base`` below its centre."""
    return Poses(
        torch.full((LENGTH, 2), size), torch.zeros(LENGTH), torch.zeros(LENGTH, 2), torch.tensor([0.0, base])
    )  # fmt: skip


def angles() -> Tensor:
    """Two turns in 16 frames, (16,) radians: eight frames, too, end where they began."""
    return 4 * math.pi * torch.arange(LENGTH) / LENGTH


def bounce() -> Poses:
    """Up and down as |sin|, squashed when it meets the ground; the area stays."""
    rise = (angles() / 2).sin().abs()
    squash = 1 - 0.15 * (1 - rise) ** 3
    up = torch.stack([torch.zeros(LENGTH), -0.3 * rise], -1)
    return replace(still(base=BASE), size=ROOM * torch.stack([1 / squash, squash], -1), shift=up)


def sway() -> Poses:
    """To the right and to the left about its base."""
    return replace(still(base=BASE), angle=0.25 * angles().sin())


def zoom_in() -> Poses:
    """The camera comes nearer, in every clip alike."""
    size = ZOOM_FROM * (ZOOM_RATE * torch.arange(LENGTH)).exp()
    return replace(still(), size=size[:, None].expand(-1, 2))


def pan_left() -> Poses:
    """The camera turns to the left, so that what it sees moves to the right, in every clip alike."""
    steps = PAN_RATE * (torch.arange(LENGTH) - (LENGTH - 1) / 2)
    return replace(still(), shift=torch.stack([steps, torch.zeros(LENGTH)], -1))


# emojibase's group -> how its things move: faces, people, nature, food; travel, activities, objects, symbols
HABITS: Mapping[int, Motion] = {0: bounce, 1: bounce, 3: bounce, 4: bounce, 5: sway, 6: sway, 7: sway, 8: sway}
CAMERA: Mapping[str, Motion] = {"zoom-in": zoom_in, "pan-left": pan_left}


def drawn(picture: Tensor, poses: Poses) -> Tensor:
    """Frames (F, 3, H, W) in -1..1 of a picture (3, H, W) on white; drawn twice as large and averaged down."""
    count, (height, width) = len(poses.angle), picture.shape[1:]
    grid = F.affine_grid(poses.affine(), [count, 3, 2 * height, 2 * width], align_corners=False)
    dark = (picture - 1).expand(count, -1, -1, -1)
    return F.avg_pool2d(F.grid_sample(dark, grid, align_corners=False), 2).add(1).clamp(-1, 1)


@dataclass(frozen=True)
class Clips:
    """``latents`` (N, 16, 4, 16, 16), times ``scaling_factor``, and the index (N,) of each clip's picture."""

    latents: Tensor
    pictures: Tensor

    def draw(self, count: int, frames: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The first ``frames`` frames of ``count`` clips (count, frames, 4, 16, 16), and their pictures (count,)."""
        chosen = torch.randint(len(self.latents), (count,), generator=generator)
        return self.latents[chosen, :frames].float(), self.pictures[chosen]


def habits() -> list[Motion]:
    """The motion of each picture of the base's list."""
    entries = json.loads((fetch(PACKAGES["emojibase"], CACHE / "npm") / "en/data.json").read_text())
    groups = {entry["hexcode"]: entry.get("group") for entry in entries}
    return [HABITS[groups[emoji.hexcode]] for emoji in load()[1]]


@torch.no_grad()
def compute(motions: Sequence[Motion], count: int, seed: int = 0) -> Clips:
    """Draw and encode ``count`` clips of pictures at random, each in its motion."""
    vae, factor, pictures = trained(), cached().scaling_factor, load()[0]
    chosen = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))[:count]
    found = []
    for index in chosen.tolist():
        frames = drawn(to_floats(pictures[index]), motions[index]())
        with torch.autocast("cpu", torch.bfloat16):
            found.append((vae.encode(frames).mean.float() * factor).half())
        if len(found) % 100 == 0:
            say(f"clips: {len(found)}/{count}")
    return Clips(torch.stack(found), chosen)


def clips(name: str, count: int) -> Clips:
    """The clips from ``.cache/train/<name>-latents.pt``, computed first when they are missing.

    ``name`` is one of CAMERA, or ``motion``: every emoji in its own.
    """
    path = CACHE / "train" / f"{name}-latents.pt"
    if not path.exists():
        motions = [CAMERA[name]] * len(load()[1]) if name in CAMERA else habits()
        found = compute(motions, count)
        write(path, {"latents": found.latents, "pictures": found.pictures})
    return Clips(**torch.load(path, weights_only=True))
