"""What the canny ControlNet and the canny T2I-Adapter are trained on and looked at with: strongly moved pictures, their
edges by the product's own detector, and how well the edges of a painted picture agree with those that were asked for.

A base model knows where an emoji stands and how large it is; a moved copy's place can be learnt from the edges alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from data import CACHE, load, save_grid, to_floats
from latents import Latents
from loop import say, write
from measures import edge_f1
from PIL import Image
from torch import Tensor
from train_vae import trained as trained_vae

from fourstroke.controls import canny

COPIES = 4  # strongly moved copies a picture, beside the plain one
SMALLEST, LARGEST = 0.55, 1.05
TURN, SHIFT = 0.5, 0.35  # radians; of the picture's free width
TOLERANCE = 1  # pixels by which edges may miss each other and still agree
PLAIN = 0.25  # the share of unmoved pictures
CASES = 32


def moved(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Float pictures (N, 3, H, W) in -1..1, each scaled, turned, shifted and perhaps mirrored at random on white."""
    count = len(pictures)
    zoom = SMALLEST + (LARGEST - SMALLEST) * torch.rand(count, generator=generator)
    angle = TURN * (2 * torch.rand(count, generator=generator) - 1)
    shift = SHIFT * (2 * torch.rand(count, 2, generator=generator) - 1)
    mirror = 1 - 2.0 * (torch.rand(count, generator=generator) < 0.5)
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    affine = torch.stack([mirror * cos, -mirror * sin, sin, cos], 1).view(count, 2, 2)
    affine = torch.cat([affine, shift[:, :, None]], 2)
    grid = F.affine_grid(affine, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures - 1, grid, mode="bicubic", align_corners=False).add(1).clamp(-1, 1)


def edges(pictures: Tensor) -> Tensor:
    """Edges of float pictures (N, 3, H, W) in -1..1 by `fourstroke.controls.canny`: bool (N, H, W)."""
    arrays = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    found = [np.array(canny(Image.fromarray(array)))[:, :, 0] > 127 for array in arrays]
    return torch.from_numpy(np.stack(found))


def as_picture(found: Tensor) -> Tensor:
    """Edges as control networks read them: (N, 3, H, W) float32 in 0..1."""
    return found.float()[:, None].expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class Controlled:
    """``latents`` (1 + COPIES, N, 4, 16, 16) fp16, scaled, the plain pictures' first; ``bits`` (1 + COPIES, N, 2048)
    uint8 holds their edges, eight pixels a byte."""

    latents: Tensor
    bits: Tensor

    def draw(self, chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents (B, 4, 16, 16) and edges as pictures (B, 3, 128, 128) for pictures by index."""
        which = torch.randint(1, len(self.latents), (len(chosen),), generator=generator)
        which[torch.rand(len(chosen), generator=generator) < PLAIN] = 0
        rows = np.unpackbits(self.bits[which, chosen].numpy(), axis=1)
        side = int(rows.shape[1] ** 0.5)
        return self.latents[which, chosen].float(), as_picture(torch.from_numpy(rows).view(-1, side, side))


@torch.no_grad()
def controlled(latents: Latents) -> Controlled:
    """From the cache, computed first when missing."""
    path = CACHE / "train" / "edges.pt"
    if not path.exists():
        vae = trained_vae().to(memory_format=torch.channels_last)
        pictures, generator = to_floats(load()[0]), torch.Generator().manual_seed(0)
        encoded, bits = [latents.plain.half()], [packed(edges(pictures))]
        for copy in range(COPIES):
            made = moved(pictures, generator)
            bits.append(packed(edges(made)))
            parts = made.contiguous(memory_format=torch.channels_last).split(32)
            with torch.autocast("cpu", torch.bfloat16):
                means = torch.cat([vae.encode(part).mean.float() for part in parts])
            encoded.append((means * latents.scaling_factor).half())
            say(f"edges: {copy + 1} of {COPIES} moved copies encoded")
        write(path, {"latents": torch.stack(encoded), "bits": torch.stack(bits)})
    return Controlled(**torch.load(path, weights_only=True))


def packed(found: Tensor) -> Tensor:
    """Edge maps (N, H, W) as bits, uint8 (N, H * W / 8)."""
    return torch.from_numpy(np.packbits(found.flatten(1).numpy(), axis=1))


class Cases:
    """Moved copies that training did not see, to look at: ``names``, ``edges`` (bool) and ``control`` (0..1)."""

    def __init__(self, scaling_factor: float):
        pictures, emojis = load()
        chosen = torch.arange(5, len(emojis), len(emojis) // CASES)[:CASES]
        self.names = [emojis[i].name for i in chosen.tolist()]
        self.edges = edges(moved(to_floats(pictures[chosen]), torch.Generator().manual_seed(12345)))
        self.control = as_picture(self.edges)
        self.vae, self.scaling_factor = trained_vae(), scaling_factor

    @torch.no_grad()
    def show(self, title: str, file: str, ways: Sequence[tuple[str, Callable[[], Tensor]]]) -> None:
        """Paint in several ways (name, function -> latents); print each one's edge F1 and save all as one sheet."""
        rows, scores = [self.control * 2 - 1], []
        for what, paint in ways:
            made = torch.cat([self.vae.decode(part / self.scaling_factor) for part in paint().float().split(16)])
            rows.append(made)
            scores.append(f"{what} {edge_f1(self.edges, edges(made), TOLERANCE).mean():.3f}")
        say(f"{title}: edge F1: {', '.join(scores)}")
        save_grid(torch.cat(rows), CACHE / "samples" / f"{file}.png", columns=16)
