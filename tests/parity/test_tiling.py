"""Tiles and slices of autoencoders against diffusers', and against the whole."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from fourstroke import AutoencoderKL, AutoencoderTiny
from fourstroke.latents import decode
from fourstroke.runtime.tiling import fade_
from tests.parity.oracles import assert_close, randomise

KL: dict[str, Any] = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 4,
    "sample_size": 64,
}
TINY: dict[str, Any] = {
    "encoder_block_out_channels": (8,) * 4,
    "decoder_block_out_channels": (8,) * 4,
    "num_encoder_blocks": (1, 1, 1, 1),
    "num_decoder_blocks": (1, 1, 1, 1),
}
# Height and width of latents around a tile of 8: whole tiles, tiny rests, one direction only, no tiling at all.
SIZES = [(16, 24), (13, 15), (9, 8), (8, 20), (7, 8)]


def pair(kind: str) -> tuple[AutoencoderKL | AutoencoderTiny, nn.Module]:
    if kind == "kl":
        oracle = randomise(diffusers.AutoencoderKL(**KL))
        ours: Any = AutoencoderKL.from_config(dict(oracle.config))
    else:
        oracle = randomise(diffusers.AutoencoderTiny(**TINY))
        ours = AutoencoderTiny.from_config(dict(oracle.config))
    ours.eval().requires_grad_(False).load_state_dict(oracle.state_dict())
    return ours, oracle


def small_tiles(*autoencoders: Any) -> None:
    for autoencoder in autoencoders:
        autoencoder.tile_sample_min_size, autoencoder.tile_latent_min_size = 64, 8
        autoencoder.tile_overlap_factor = 0.25


@pytest.mark.parametrize("kind", ["kl", "tiny"])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_decoded_and_blended_as_the_peer_does(kind: str, size: tuple[int, int]) -> None:
    ours, oracle = pair(kind)
    small_tiles(ours, oracle)
    ours.enable_tiling()
    oracle.enable_tiling()
    z = torch.randn(2, 4, *size)
    assert_close(ours.decode(z), oracle.decode(z).sample)


@pytest.mark.parametrize("kind", ["kl", "tiny"])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_encoded_and_blended_as_the_peer_does(kind: str, size: tuple[int, int]) -> None:
    ours, oracle = pair(kind)
    small_tiles(ours, oracle)
    ours.enable_tiling()
    oracle.enable_tiling()
    x = torch.rand(2, 3, 8 * size[0], 8 * size[1]) * 2 - 1
    found, wanted = ours.encode(x), oracle.encode(x)
    if kind == "tiny":
        assert_close(found, wanted.latents)
        return
    assert_close(found.mean, wanted.latent_dist.mean)
    assert_close(found.logvar, wanted.latent_dist.logvar)


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_sides_and_overlap_of_tiles_are_the_peers(kind: str) -> None:
    ours, oracle = pair(kind)
    ours.enable_tiling()
    for name in ("tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor"):
        assert getattr(ours, name) == getattr(oracle, name)


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_slices_change_nothing_and_run_one_by_one(kind: str) -> None:
    ours, _ = pair(kind)
    z, x = torch.randn(3, 4, 8, 8), torch.rand(3, 3, 64, 64)
    whole, encoded = ours.decode(z), ours.encode(x)
    ours.enable_slicing()
    batches: list[int] = []
    ours.decoder.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    ours.encoder.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    torch.testing.assert_close(ours.decode(z), whole)
    again = ours.encode(x)
    pairs = [(again, encoded)] if kind == "tiny" else [(again.mean, encoded.mean), (again.logvar, encoded.logvar)]
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted)
    assert batches == [1] * 6


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_tiles_and_slices_go_together_and_off_again(kind: str) -> None:
    ours, oracle = pair(kind)
    small_tiles(ours, oracle)
    z = torch.randn(2, 4, 16, 16)
    whole = ours.decode(z)
    for autoencoder in (ours, oracle):
        autoencoder.enable_tiling()  # type: ignore[operator]
        autoencoder.enable_slicing()  # type: ignore[operator]
    tiled = ours.decode(z)
    assert_close(tiled, oracle.decode(z).sample)
    assert (tiled - whole).abs().mean() > 1e-3, "tiles must see less than the whole"
    ours.disable_slicing()
    assert_close(ours.decode(z), tiled)
    ours.disable_tiling()
    assert torch.equal(ours.decode(z), whole)
    assert not {"encode", "decode"} & vars(ours).keys()


def test_the_loops_decoder_works_in_tiles_and_a_copy_is_its_own() -> None:
    ours, oracle = pair("kl")
    small_tiles(ours, oracle)
    ours.enable_tiling()
    oracle.enable_tiling()
    latents = torch.randn(1, 4, 16, 16)
    wanted = oracle.decode(latents / oracle.config.scaling_factor).sample
    assert_close(decode(ours, latents), wanted)
    other = copy.deepcopy(ours)
    nn.init.zeros_(other.decoder.conv_out.weight)
    nn.init.zeros_(other.decoder.conv_out.bias)
    assert not other.decode(latents).any()
    assert_close(decode(ours, latents), wanted)


def test_fading_follows_the_formula() -> None:
    before, after = torch.full((1, 1, 6, 2), 3.0), torch.full((1, 1, 6, 2), 7.0)
    fade_(before, after, 4, dim=2)
    wanted = [3 * (1 - i / 4) + 7 * i / 4 for i in range(4)] + [7.0, 7.0]
    torch.testing.assert_close(after[0, 0, :, 0], torch.tensor(wanted))
