"""Helpers for scripts, under diffusers' names: loading pictures and laying them out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import PIL.Image
import PIL.ImageOps

__all__ = ["load_image", "make_image_grid"]


def load_image(
    image: str | os.PathLike[str] | PIL.Image.Image,
    convert_method: Callable[[PIL.Image.Image], PIL.Image.Image] | None = None,
) -> PIL.Image.Image:
    """Open a picture from a path, a ``http(s)`` URL or a PIL image, turned upright by its EXIF tag.

    Args:
        image: where the picture is.
        convert_method: what to do with it; conversion to RGB if not given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a picture, or is too large to be one.
        OSError: the URL cannot be read.
    """
    picture = image if isinstance(image, PIL.Image.Image) else _open(str(image))
    picture = PIL.ImageOps.exif_transpose(picture)
    return picture.convert("RGB") if convert_method is None else convert_method(picture)


def _open(place: str) -> PIL.Image.Image:
    if place.startswith(("http://", "https://")):
        import io
        import urllib.request

        with urllib.request.urlopen(place, timeout=60) as response:
            source = io.BytesIO(response.read())
    elif Path(place).is_file():
        source = place
    else:
        raise FileNotFoundError(f"There is no picture {place!r}; give the path of a file or a URL.")
    try:
        picture = PIL.Image.open(source)
        picture.load()
    except (PIL.UnidentifiedImageError, PIL.Image.DecompressionBombError, OSError) as error:
        raise ValueError(f"{place} cannot be read as a picture: {error}.") from None
    return picture


def make_image_grid(
    images: Sequence[PIL.Image.Image], rows: int, cols: int, resize: int | None = None
) -> PIL.Image.Image:
    """Lay ``rows * cols`` pictures out in one, row by row, in cells of the first one's size.

    Args:
        images: the pictures.
        rows, cols: the layout.
        resize: side in pixels to which every picture is resized first.

    Raises:
        ValueError: there are more or fewer pictures than cells.
    """
    if len(images) != rows * cols:
        raise ValueError(f"{len(images)} pictures do not fill {rows} rows of {cols}; give rows * cols of them.")
    if resize is not None:
        images = [image.resize((resize, resize)) for image in images]
    width, height = images[0].size
    grid = PIL.Image.new("RGB", (cols * width, rows * height))
    for i, image in enumerate(images):
        grid.paste(image, (i % cols * width, i // cols * height))
    return grid
