"""Autoencoders that work in pieces: large pictures in overlapping tiles, batches one picture at a time.

Both are put onto a built autoencoder from outside, under the names that diffusers gives to its switches: the functions
here replace ``vae.encode`` and ``vae.decode`` of that one object, and read their settings from it at each call:

- ``use_tiling``, ``use_slicing``: what is switched on.
- ``tile_sample_min_size``, ``tile_latent_min_size``: side of a tile in pixels and in latents; what is not larger runs
  whole (an `AutoencoderTiny` blends in any case, which changes nothing then).
- ``tile_overlap_factor``: the fraction of a tile that it shares with the next.

A tile sees nothing beyond its rim, so a tiled picture is not quite that of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..models.vae import AutoencoderKL, DiagonalGaussian
from ..models.vae_tiny import AutoencoderTiny

Autoencoder = AutoencoderKL | AutoencoderTiny

TINY_TILE, TINY_OVERLAP = 512, 0.125
KL_OVERLAP = 0.25


def set_pieces_(vae: Autoencoder, *, tiling: bool | None = None, slicing: bool | None = None) -> None:
    """Switch tiles, or one picture at a time, on or off; None leaves a switch as it is.

    The sides and the overlap of the tiles are set where ``vae`` has none yet: the size that an `AutoencoderKL` was
    trained on (``config.sample_size``) and a quarter, for an `AutoencoderTiny` 512 pixels and an eighth.
    """
    own: Any = vae
    tiny = isinstance(vae, AutoencoderTiny)
    side = TINY_TILE if tiny else vae.config.sample_size
    defaults = {
        "use_tiling": False,
        "use_slicing": False,
        "tile_sample_min_size": side,
        "tile_latent_min_size": side // vae.downscale,
        "tile_overlap_factor": TINY_OVERLAP if tiny else KL_OVERLAP,
    }
    for name, value in defaults.items():
        if not hasattr(own, name):
            setattr(own, name, value)
    own.use_tiling = own.use_tiling if tiling is None else tiling
    own.use_slicing = own.use_slicing if slicing is None else slicing
    for name in ("encode", "decode"):
        vars(own).pop(name, None)
    if own.use_tiling or own.use_slicing:
        own.encode, own.decode = partial(encode_in_pieces, vae), partial(decode_in_pieces, vae)


def decode_in_pieces(vae: Autoencoder, z: Tensor) -> Tensor:
    """``vae.decode`` in the pieces that ``vae`` is set to: latents (N, C, h, w) -> pictures (N, 3, H, W)."""
    own: Any = vae

    def run(part: Tensor) -> Tensor:
        if not own.use_tiling:
            return type(vae).decode(own, part)
        if isinstance(vae, AutoencoderTiny):
            return tiled_decode_tiny(vae, part)
        return tiled_decode(vae, part)

    return _each(run, z, own.use_slicing)


def encode_in_pieces(vae: Autoencoder, x: Tensor) -> Any:
    """``vae.encode`` in the pieces that ``vae`` is set to: pictures (N, 3, H, W) -> what ``vae.encode`` gives."""
    own: Any = vae
    if isinstance(vae, AutoencoderTiny):
        return _each(partial(tiled_encode_tiny if own.use_tiling else type(vae).encode, vae), x, own.use_slicing)
    run = partial(tiled_moments, vae) if own.use_tiling else vae.moments
    return DiagonalGaussian.of(_each(run, x, own.use_slicing))


def _each(run: Callable[[Tensor], Tensor], values: Tensor, one_by_one: bool) -> Tensor:
    return torch.cat([run(part) for part in values.split(1)]) if one_by_one and len(values) > 1 else run(values)


def tiled_decode(vae: AutoencoderKL, z: Tensor) -> Tensor:
    """Latents (N, C, h, w) -> pictures (N, 3, H, W), tile by tile; whole when ``z`` is no larger than a tile."""
    own: Any = vae
    size, pixels, overlap = own.tile_latent_min_size, own.tile_sample_min_size, own.tile_overlap_factor
    run = partial(type(vae).decode, vae)
    return _mosaic(run, z, size, int(size * (1 - overlap)), int(pixels * overlap), pixels)


def tiled_moments(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """`AutoencoderKL.moments` of pictures (N, 3, H, W), tile by tile; whole when they are no larger than a tile."""
    own: Any = vae
    size, latents, overlap = own.tile_sample_min_size, own.tile_latent_min_size, own.tile_overlap_factor
    return _mosaic(vae.moments, x, size, int(size * (1 - overlap)), int(latents * overlap), latents)


def _mosaic(
    run: Callable[[Tensor], Tensor], values: Tensor, size: int, stride: int, blend: int, result_size: int
) -> Tensor:
    """Run tiles of ``size``, one every ``stride``, and join the results, of which ``blend`` fade into the next.

    Raises:
        ValueError: the results would not meet.
    """
    height, width = values.shape[-2:]
    if height <= size and width <= size:
        return run(values)
    keep = result_size - blend
    if stride < 1 or stride * result_size != keep * size:
        raise ValueError(
            f"Tiles of {size} that give {result_size} cannot be {stride} apart and overlap by {blend} in the result: "
            "choose tile_latent_min_size and tile_overlap_factor so that their product is a whole number, and "
            "tile_sample_min_size as many times larger as pictures are than their latents."
        )
    rows: list[Tensor] = []
    above: list[Tensor] = []
    for top in range(0, height, stride):
        row: list[Tensor] = []
        for left in range(0, width, stride):
            tile = run(values[:, :, top : top + size, left : left + size])
            if above:
                fade_(above[len(row)], tile, blend, dim=2)
            if row:
                fade_(row[-1], tile, blend, dim=3)
            row.append(tile)
        rows.append(torch.cat([tile[:, :, :keep, :keep] for tile in row], dim=3))
        above = row
    return torch.cat(rows, dim=2)


def fade_(before: Tensor, after: Tensor, width: int, dim: int) -> None:
    """Let the end of ``before`` fade over the beginning of ``after``, in place, linearly along ``dim``."""
    width = min(width, before.shape[dim], after.shape[dim])
    shape = [1] * after.ndim
    shape[dim] = width
    ramp = (torch.arange(width, device=after.device, dtype=torch.float32) / max(width, 1)).to(after.dtype).view(shape)
    start = after.narrow(dim, 0, width)
    start.copy_(torch.lerp(before.narrow(dim, before.shape[dim] - width, width), start, ramp))


def tiled_decode_tiny(vae: AutoencoderTiny, z: Tensor) -> Tensor:
    """Latents (N, C, h, w) -> pictures (N, 3, H, W), tile by tile."""
    own: Any = vae
    factor = vae.downscale
    overlap = int(own.tile_latent_min_size * own.tile_overlap_factor)
    out = z.new_zeros(len(z), vae.config.out_channels, *(side * factor for side in z.shape[-2:]))
    for top, left, tile in _tiles(z, own.tile_latent_min_size, overlap):
        _lay_(out, type(vae).decode(vae, tile), top * factor, left * factor, overlap * factor)
    return out


def tiled_encode_tiny(vae: AutoencoderTiny, x: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) -> latents (N, C, h, w), tile by tile."""
    own: Any = vae
    factor = vae.downscale
    overlap = int(own.tile_sample_min_size * own.tile_overlap_factor)
    out = x.new_zeros(len(x), vae.config.latent_channels, *(side // factor for side in x.shape[-2:]))
    for top, left, tile in _tiles(x, own.tile_sample_min_size, overlap):
        _lay_(out, type(vae).encode(vae, tile), top // factor, left // factor, overlap // factor)
    return out


def _tiles(values: Tensor, size: int, overlap: int) -> list[tuple[int, int, Tensor]]:
    starts = [range(0, side, size - overlap) for side in values.shape[-2:]]
    return [(top, left, values[..., top : top + size, left : left + size]) for top in starts[0] for left in starts[1]]


def _lay_(out: Tensor, tile: Tensor, top: int, left: int, overlap: int) -> None:
    """Lay ``tile`` over what is in ``out`` already; along its upper and left rim it fades in over ``overlap``."""
    place = out[..., top : top + tile.shape[-2], left : left + tile.shape[-1]]
    rims = [_rim(tile, dim, at, overlap) for dim, at in ((-2, top), (-1, left))]
    place.copy_(torch.lerp(place, tile[..., : place.shape[-2], : place.shape[-1]], rims[0] * rims[1]))


def _rim(tile: Tensor, dim: int, at: int, overlap: int) -> Tensor:
    """How much a tile that begins ``at`` counts along ``dim``: a ramp from 0 to 1, or 1 at the picture's own rim."""
    ramp = torch.arange(tile.shape[dim], device=tile.device, dtype=torch.float32) / max(overlap - 1, 1)
    ramp = (torch.ones_like(ramp) if at == 0 else ramp.clamp(0, 1)).to(tile.dtype)
    return ramp.view(-1, 1) if dim == -2 else ramp
