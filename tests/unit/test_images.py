"""Pictures in and out: rounding, types, grids, files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from fourstroke.images import postprocess
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
