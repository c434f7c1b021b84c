"""Pictures in and out: rounding, types, grids, files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from fourstroke.images import (
    adapter_to_tensor,
    control_to_tensor,
    crop_region,
    default_size,
    mask_to_tensor,
    paste_back,
    postprocess,
    read_pictures,
    size_of,
    to_tensor,
)
from fourstroke.utils import load_image, make_image_grid


def test_postprocess_maps_minus_one_to_one_onto_the_bytes() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0])
    pictures = values.reshape(1, 1, 1, 6).expand(1, 3, 1, 6)
    exact = np.round((np.clip(values.double().numpy() / 2 + 0.5, 0, 1)) * 255)
    (image,) = postprocess(pictures, "pil")
    assert np.array_equal(np.asarray(image)[0, :, 0], exact)
    assert np.allclose(postprocess(pictures, "np")[0, 0, :, 0] * 255, exact, atol=0.51)
    assert postprocess(pictures, "pt").shape == pictures.shape
    assert postprocess(pictures, "latent") is pictures


def test_an_unknown_output_type_is_named() -> None:
    with pytest.raises(ValueError, match="output_type is 'gif'"):
        postprocess(torch.zeros(1, 3, 2, 2), "gif")


WHITE = PIL.Image.new("RGB", (24, 16), "white")
FLOATS = np.full((16, 24, 3), 0.25, np.float32)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("cat.png", TypeError, r"image is 'cat.png' of type str; it must be a PIL image.*load_image"),
        (None, TypeError, "image is one of type NoneType"),
        ([WHITE, None], TypeError, "image is one of type NoneType"),
        ([WHITE, FLOATS], TypeError, r"several types \(Image, ndarray\)"),
        ([], ValueError, "image is an empty list"),
        (np.zeros((16, 24, 3), np.uint8), TypeError, "array of uint8; it must hold floats.*divide it by 255"),
        (torch.zeros(3, 16, 24, dtype=torch.long), TypeError, "array of torch.int64"),
        (torch.zeros(24), ValueError, r"shape \(24,\)"),
        (torch.zeros(1, 2, 3, 16, 24), ValueError, r"shape \(1, 2, 3, 16, 24\)"),
        (np.zeros((0, 16, 24, 3)), ValueError, "not empty"),
    ],
)
def test_what_is_no_picture_is_named(image: object, error: type[Exception], message: str) -> None:
    for read in (read_pictures, to_tensor, control_to_tensor, adapter_to_tensor):
        with pytest.raises(error, match=message):
            read(image)


def test_pictures_are_read_without_copying() -> None:
    assert read_pictures(WHITE) == [WHITE]
    assert read_pictures((WHITE, WHITE)) == [WHITE, WHITE]
    batch = torch.rand(2, 3, 8, 8)
    first, second = read_pictures(batch)
    assert first.data_ptr() == batch.data_ptr() and torch.equal(second, batch[1])


def test_values_and_channels_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="values up to 63.75; they must lie in .0, 1.: divide it by 255"):
        to_tensor(FLOATS * 255)
    with pytest.raises(ValueError, match="5 channels"):
        to_tensor(torch.zeros(5, 16, 24))
    with pytest.raises(ValueError, match="4 channels"):
        to_tensor(np.zeros((16, 24, 4)))
    with pytest.raises(ValueError, match="mask_image has 3 channels"):
        mask_to_tensor(np.zeros((1, 16, 24, 3)))
    with pytest.raises(ValueError, match="3 channels, but its in_channels is 1"):
        adapter_to_tensor(FLOATS, channels=1)
    with pytest.raises(ValueError, match=r"shapes \[\(16, 24, 3\), \(24, 16, 3\)\]"):
        to_tensor([FLOATS, FLOATS.transpose(1, 0, 2)])


def test_bad_sizes_and_modes_are_named() -> None:
    with pytest.raises(ValueError, match="24 x 7 pixels is too small; give at least 8 x 8"):
        to_tensor(WHITE, height=7)
    with pytest.raises(ValueError, match="24 x 16 pixels is too small; give at least 64 x 64"):
        default_size(WHITE, 64)
    with pytest.raises(ValueError, match="resize_mode is 'stretch'; it must be one of 'default', 'crop', 'fill'"):
        to_tensor(WHITE, resize_mode="stretch")
    with pytest.raises(ValueError, match="Only PIL images can be cropped"):
        to_tensor(FLOATS, crops_coords=(0, 0, 8, 8))
    with pytest.raises(ValueError, match="Only PIL images can be cropped"):
        to_tensor(FLOATS, resize_mode="fill")


def test_grey_pictures_become_what_the_network_reads() -> None:
    grey = FLOATS[..., 0]
    assert torch.equal(to_tensor(grey), to_tensor(FLOATS))
    assert torch.equal(to_tensor(torch.from_numpy(grey)), to_tensor(FLOATS))
    assert torch.equal(control_to_tensor(grey), control_to_tensor(FLOATS))
    assert torch.equal(adapter_to_tensor(grey), adapter_to_tensor(FLOATS))
    assert adapter_to_tensor(grey, channels=1).shape == (1, 1, 16, 24)
    assert torch.equal(adapter_to_tensor(WHITE, channels=1), torch.ones(1, 1, 16, 24))
    assert torch.equal(adapter_to_tensor(WHITE.convert("L")), torch.ones(1, 3, 16, 24))


def test_the_callers_pictures_stay_as_they_are() -> None:
    signed, mask = torch.rand(1, 3, 16, 24) - 0.5, np.linspace(0, 1, 16 * 24, dtype=np.float32).reshape(16, 24)
    copies = signed.clone(), mask.copy()
    to_tensor(signed)
    mask_to_tensor(mask)
    assert torch.equal(signed, copies[0]) and np.array_equal(mask, copies[1])


@pytest.mark.parametrize(
    ("image", "size"),
    [
        (WHITE, (16, 24)),
        ([WHITE, WHITE.rotate(90, expand=True)], (16, 24)),
        (FLOATS, (16, 24)),
        (FLOATS[None], (16, 24)),
        (FLOATS[..., 0], (16, 24)),
        (np.zeros((5, 16, 24)), (16, 24)),
        (torch.zeros(3, 16, 24), (16, 24)),
        ([torch.zeros(1, 3, 16, 24)], (16, 24)),
    ],
)
def test_sizes(image: object, size: tuple[int, int]) -> None:
    assert size_of(image) == size


def test_bits_are_masks_too() -> None:
    bits = np.zeros((16, 24), bool)
    bits[:8] = True
    for mask in (bits, torch.from_numpy(bits), PIL.Image.fromarray(bits)):
        grown = mask_to_tensor(mask, 32, 48)
        assert torch.equal(grown, torch.from_numpy(bits).float().kron(torch.ones(2, 2))[None, None])


def test_nothing_to_repaint_and_sizes_that_differ_are_named() -> None:
    with pytest.raises(ValueError, match="The mask is black all over"):
        crop_region(PIL.Image.new("L", (8, 8)), 8, 8)
    mask = PIL.Image.new("L", (24, 16))
    with pytest.raises(ValueError, match=r"mask's size \(16, 24\) differs from the picture's \(24, 16\)"):
        paste_back(mask.transpose(PIL.Image.Transpose.ROTATE_90), WHITE, WHITE)
    with pytest.raises(ValueError, match=r"painted picture's size \(8, 8\) differs.*crops_coords"):
        paste_back(mask, WHITE, WHITE.resize((8, 8)))


def test_a_grid_holds_each_picture_in_its_cell() -> None:
    colours = ["red", "green", "blue", "white", "black", "yellow"]
    grid = make_image_grid([PIL.Image.new("RGB", (4, 2), colour) for colour in colours], rows=2, cols=3)
    assert grid.size == (12, 4)
    for i, colour in enumerate(colours):
        assert grid.getpixel((i % 3 * 4 + 1, i // 3 * 2 + 1)) == PIL.ImageColor.getrgb(colour)
    assert make_image_grid([grid, grid], rows=1, cols=2, resize=8).size == (16, 8)
    with pytest.raises(ValueError, match="6 pictures do not fill 2 rows of 2"):
        make_image_grid([grid] * 6, rows=2, cols=2)


def test_load_image_turns_pictures_upright_and_to_rgb(tmp_path: Path) -> None:
    picture = PIL.Image.new("L", (6, 3))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    picture.save(tmp_path / "a.jpg", exif=exif)
    upright = load_image(tmp_path / "a.jpg")
    assert (upright.mode, upright.size) == ("RGB", (3, 6))
    assert load_image(picture, lambda image: image.resize((1, 1))).size == (1, 1)


def test_load_image_names_what_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no picture 'missing.png'"):
        load_image("missing.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"text\.png cannot be read as a picture"):
        load_image(tmp_path / "text.png")
