"""Pictures on their way in, to the bit as diffusers' processors prepare them; files on their way out."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import cv2
import diffusers.utils
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.t2i_adapter.pipeline_stable_diffusion_adapter import _preprocess_adapter_image
from hypothesis import given
from hypothesis import strategies as st

from fourstroke import images, utils

PROCESSOR = VaeImageProcessor(vae_scale_factor=8, do_convert_rgb=True)
MASKS = VaeImageProcessor(vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
CONTROLS = VaeImageProcessor(vae_scale_factor=8, do_convert_rgb=True, do_normalize=False)


def pil(width: int = 37, height: int = 29, mode: str = "RGB", seed: int = 0) -> PIL.Image.Image:
    """Noise with a gradient, so that every pixel and every edge matters; some transparency in RGBA."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width, dtype=np.uint8)
    return PIL.Image.fromarray(pixels, "RGBA" if mode == "RGBA" else None).convert(mode)


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


PICTURES: dict[str, Any] = {
    "pil": pil(),
    "pil-grey": pil(mode="L"),
    "pil-rgba": pil(mode="RGBA"),
    "pil-palette": pil(mode="P"),
    "pil-list": [pil(), pil(51, 64, seed=1), pil(16, 16, seed=2)],
    "np": floats(29, 37, 3),
    "np-batch": floats(2, 29, 37, 3),
    "np-double": floats(29, 37, 3).astype(np.float64),
    "np-list": [floats(29, 37, 3), floats(29, 37, 3, seed=1)],
    "np-list-of-batches": [floats(1, 29, 37, 3), floats(2, 29, 37, 3, seed=1)],
    "pt": tensor(3, 29, 37),
    "pt-batch": tensor(2, 3, 29, 37),
    "pt-half": tensor(3, 29, 37).half(),
    "pt-list": [tensor(3, 29, 37), tensor(3, 29, 37, seed=1)],
    "pt-list-of-batches": [tensor(1, 3, 29, 37), tensor(2, 3, 29, 37, seed=1)],
    "pt-signed": tensor(2, 3, 29, 37) * 2 - 1,
}
SIZES = [(None, None), (40, None), (None, 24), (64, 48), (50, 61)]


def theirs(processor: VaeImageProcessor, *arguments: Any, **keywords: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # signed values, lists of batches
        return processor.preprocess(*arguments, **keywords).float()


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == torch.float32
    assert ours.shape == theirs.shape
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("kind", PICTURES)
def test_pictures(kind: str, height: int | None, width: int | None) -> None:
    image = PICTURES[kind]
    same(images.to_tensor(image, height, width), theirs(PROCESSOR, image, height, width))
    same(images.control_to_tensor(image, height, width), theirs(CONTROLS, image, height, width))


@pytest.mark.parametrize("mode", ["crop", "fill"])
@pytest.mark.parametrize("size", [(40, 24), (24, 40), (32, 32), (16, 128), (24, 24)])
@pytest.mark.parametrize("own", [(37, 29), (29, 37), (32, 32), (24, 40), (200, 9)])
def test_resize_modes(own: tuple[int, int], size: tuple[int, int], mode: str) -> None:
    for image in (pil(*own), pil(*own, mode="L"), pil(*own, mode="RGBA")):
        same(images.to_tensor(image, *size, resize_mode=mode), theirs(PROCESSOR, image, *size, mode))
    same(images.mask_to_tensor(pil(*own), *size, resize_mode=mode), theirs(MASKS, pil(*own), *size, mode))


@pytest.mark.parametrize("box", [(3, 5, 30, 20), (-4, 0, 20, 29), (10, 10, 18, 18)])
def test_cut_out_parts(box: tuple[int, int, int, int]) -> None:
    for size in ((None, None), (24, 40)):
        for ours, processor in (
            (images.to_tensor, PROCESSOR),
            (images.control_to_tensor, CONTROLS),
            (images.mask_to_tensor, MASKS),
        ):
            expected = theirs(processor, pil(), *size, "fill", box)
            same(ours(pil(), *size, resize_mode="fill", crops_coords=box), expected)


MASK_KINDS: dict[str, Any] = {
    "pil": pil(mode="L"),
    "pil-rgb": pil(),
    "pil-bits": pil(mode="1"),
    "pil-list": [pil(mode="L"), pil(mode="L", seed=1)],
    "np": floats(29, 37),
    "np-channel": floats(29, 37, 1),
    "np-several": floats(3, 29, 37),
    "np-batch": floats(2, 29, 37, 1),
    "np-list": [floats(29, 37), floats(29, 37, seed=1)],
    "np-bytes": (floats(29, 37) > 0.5).astype(np.uint8) * 255,
    "pt": tensor(29, 37),
    "pt-channel": tensor(1, 29, 37),
    "pt-several": tensor(3, 29, 37),
    "pt-batch": tensor(2, 1, 29, 37),
    "pt-list": [tensor(1, 29, 37), tensor(1, 29, 37, seed=1)],
    "pt-half-way": torch.full((1, 29, 37), 0.5),
}


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_masks(kind: str, height: int | None, width: int | None) -> None:
    mask = MASK_KINDS[kind]
    copy = mask.copy() if hasattr(mask, "copy") else mask.clone()
    same(images.mask_to_tensor(mask, height, width), theirs(MASKS, copy, height, width))


@pytest.mark.parametrize("kind", ["pil", "pt", "pt-batch", "np-batch"])
def test_latents_and_default_sizes(kind: str) -> None:
    latents = torch.randn(2, 4, 5, 7)
    assert torch.equal(images.to_tensor(latents, 64, 64), PROCESSOR.preprocess(latents, 64, 64))
    assert torch.equal(images.to_tensor(latents[0]), PROCESSOR.preprocess(latents[0]))
    image = PICTURES[kind]
    batched = image[None] if kind == "pt" else image
    assert images.default_size(image) == PROCESSOR.get_default_height_width(batched)
    assert images.default_size(image, 16) == VaeImageProcessor(vae_scale_factor=16).get_default_height_width(batched)


@pytest.mark.parametrize("kind", ["pil", "pil-grey", "pil-list", "pt-batch", "pt-list", "pt-list-of-batches"])
def test_adapter_pictures(kind: str) -> None:
    image = PICTURES[kind]
    grey = kind == "pil-grey"
    size = (64, 48) if kind.startswith("pil") else (29, 37)
    expected = _preprocess_adapter_image(image, *size)
    same(images.adapter_to_tensor(image, *size, channels=1 if grey else 3, factor=1), expected)
    assert expected.shape[1] == (1 if grey else 3)


boxes = st.tuples(*[st.integers(0, 39)] * 4)
sides = st.integers(1, 8).map(lambda eighths: 8 * eighths)


@given(boxes, st.integers(1, 40), st.integers(1, 40), sides, sides, st.integers(0, 50))
def test_crop_regions(
    box: tuple[int, int, int, int], mask_width: int, mask_height: int, width: int, height: int, pad: int
) -> None:
    mask = np.zeros((mask_height, mask_width), np.uint8)
    left, top, right, bottom = box
    mask[top % mask_height, left % mask_width] = 1
    mask[bottom % mask_height, right % mask_width] = 255
    picture = PIL.Image.fromarray(mask)
    expected = PROCESSOR.get_crop_region(picture, width, height, pad)
    assert images.crop_region(picture, width, height, pad) == expected


@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
@pytest.mark.parametrize("box", [None, (3, 5, 30, 20), (0, 0, 37, 29)])
def test_pasting_back(box: tuple[int, int, int, int] | None, mode: str) -> None:
    mask = pil(mode=mode, seed=3)
    for original in (pil(), pil(mode="RGBA"), pil(mode="L")):
        painted = pil(seed=1) if box is None else pil(64, 48, seed=1)
        ours = images.paste_back(mask, original, painted, box)
        expected = PROCESSOR.apply_overlay(mask, original, painted, box)
        assert (ours.mode, ours.size) == ("RGB", original.size)
        assert np.array_equal(np.asarray(ours), np.asarray(expected))


@pytest.mark.parametrize("fps", [1, 8, 10, 30])
def test_gifs(fps: int, tmp_path: Path) -> None:
    frames = [pil(seed=seed) for seed in range(4)]
    utils.export_to_gif(frames, tmp_path / "ours.gif", fps)
    diffusers.utils.export_to_gif(frames, str(tmp_path / "theirs.gif"), fps)
    assert (tmp_path / "ours.gif").read_bytes() == (tmp_path / "theirs.gif").read_bytes()


@pytest.mark.parametrize("fps", [8, 12.5])
def test_another_decoder_reads_the_videos(fps: float, tmp_path: Path) -> None:
    frames = [pil(64, 48, seed=seed).resize((8, 6)).resize((64, 48)) for seed in range(7)]
    film = cv2.VideoCapture(utils.export_to_video(frames, tmp_path / "a.mp4", fps, quality=10))
    assert film.get(cv2.CAP_PROP_FPS) == fps
    for frame in frames:
        there, pixels = film.read()
        assert there
        assert np.abs(pixels[..., ::-1].astype(float) - np.asarray(frame)).mean() < 4
    assert not film.read()[0]
    film.release()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "F"])
def test_loaded_pictures(mode: str, tmp_path: Path) -> None:
    path = str(tmp_path / ("a.tiff" if mode in ("CMYK", "F") else "a.png"))
    (pil().convert("P") if mode == "P" else pil(mode=mode)).save(path)
    ours, theirs = utils.load_image(path), diffusers.utils.load_image(path)
    assert ours.mode == theirs.mode == "RGB"
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
