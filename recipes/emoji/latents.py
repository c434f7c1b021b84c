"""Latents of every picture, plain and in shifted and scaled copies, computed once from the frozen encoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from data import CACHE, load, to_floats
from loop import say, write
from torch import Tensor
from train_vae import trained

COPIES = 7  # shifted and scaled copies a picture, beside the plain one
SHIFT, SCALE = 6, 0.08  # pixels, and relative size, at most


@dataclass(frozen=True)
class Latents:
    """``plain`` (N, 4, 16, 16) and ``copies`` (COPIES, N, 4, 16, 16), both already times ``scaling_factor``."""

    plain: Tensor
    copies: Tensor
    scaling_factor: float

    def draw(self, pictures: Tensor, generator: torch.Generator, plain: float) -> Tensor:
        """Latents (B, 4, 16, 16) of the given pictures: the plain ones at probability ``plain``, else a copy."""
        which = torch.randint(len(self.copies), (len(pictures),), generator=generator)
        keep = torch.rand(len(pictures), generator=generator) < plain
        return torch.where(keep[:, None, None, None], self.plain[pictures], self.copies[which, pictures])


def moved(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Float pictures (N, 3, H, W), each shifted and scaled a little at random on white."""
    count, size = len(pictures), pictures.shape[-1]
    zoom = 1 + SCALE * (2 * torch.rand(count, generator=generator) - 1)
    shift = SHIFT / size * 2 * (2 * torch.rand(count, 2, generator=generator) - 1)
    affine = torch.zeros(count, 2, 3)
    affine[:, 0, 0] = affine[:, 1, 1] = 1 / zoom
    affine[:, :, 2] = shift
    grid = F.affine_grid(affine, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures - 1, grid, mode="bicubic", align_corners=False).add(1).clamp(-1, 1)


@torch.no_grad()
def compute() -> Latents:
    """Encode everything with the trained encoder; ``scaling_factor`` makes the latents' spread one."""
    vae = trained()
    pictures = to_floats(load()[0])
    generator = torch.Generator().manual_seed(0)

    def encode(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.cat([vae.encode(part).mean.float() for part in batch.split(32)])

    plain = encode(pictures)
    copies = torch.stack([encode(moved(pictures, generator)) for _ in range(COPIES)])
    factor = 1 / plain.std().item()
    return Latents(plain * factor, copies * factor, factor)


def cached() -> Latents:
    """The latents from the cache, computed first when they are missing."""
    path = CACHE / "train" / "latents.pt"
    if not path.exists():
        found = compute()
        write(path, {"plain": found.plain, "copies": found.copies, "scaling_factor": found.scaling_factor})
        say(f"latents: {len(found.plain)} pictures, scaling factor {found.scaling_factor:.4f}")
    return Latents(**torch.load(path, weights_only=True))


if __name__ == "__main__":
    cached()
