"""The pictures of a command line: from ``canny:photo.png:0.8`` to what a request holds, and what is told of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..families import Base

# Field of the request -> option. The first two hold one picture, the others a picture a network.
FLAGS: Mapping[str, str] = {
    "image": "--image",
    "mask_image": "--mask",
    "controls": "--control",
    "adapters": "--adapter",
    "ip_adapter_image": "--ip-image",
}
STEERING = ("controls", "adapters")
# Names whose pictures are drawings on black. In these most pixels are dark, and few lie between dark and bright.
DRAWINGS = ("canny", "lineart")
DARK, BRIGHT, MOSTLY_DARK, FEW_BETWEEN = 32, 223, 0.5, 0.1


@dataclass
class Picture:
    """A picture that was typed.

    Attributes:
        field: of the request, a key of `FLAGS`.
        place: path or URL.
        model: name of the network that is to see it.
        scale: how much it counts.
        image: what lies at ``place``: a PIL image, or a list of them for an animation.
        detector: what has drawn ``image`` from it.
    """

    field: str
    place: str
    model: str | None = None
    scale: float = 1.0
    image: Any = None
    detector: str | None = None

    @property
    def flag(self) -> str:
        """The option that it was given with."""
        return FLAGS[self.field]

    @property
    def told(self) -> dict[str, Any]:
        """What the settings of a finished picture say of it."""
        values = {"model": self.model, "picture": self.place, "scale": self.scale, "detector": self.detector}
        return {name: value for name, value in values.items() if value is not None}


def parse(fields: Mapping[str, Any], ip_adapter: str | None) -> list[Picture]:
    """Read the values of all options of `FLAGS`, by field; nothing is opened.

    Raises:
        ValueError: one is not of the form that its option has.
    """
    single = [Picture(name, fields[name]) for name in ("image", "mask_image") if fields.get(name)]
    steering = [_steering(name, text) for name in STEERING for text in fields.get(name) or ()]
    return [
        *single,
        *steering,
        *(_weighted("ip_adapter_image", text, ip_adapter) for text in fields.get("ip_adapter_image") or ()),
    ]


def _steering(field: str, text: str) -> Picture:
    model, _, rest = text.partition(":")
    if not model or not rest or rest.startswith("//") or rest.replace(".", "", 1).isdigit():
        raise ValueError(
            f"{FLAGS[field]} {text!r}: write NAME:PICTURE or NAME:PICTURE:SCALE, such as canny:photo.png:0.8."
        )
    return _weighted(field, rest, model)


def _weighted(field: str, text: str, model: str | None) -> Picture:
    from ..plan import split_weight

    place, scale = split_weight(text, FLAGS[field])
    return Picture(field, place, model, 1.0 if scale is None else scale)


def open_all(pictures: Sequence[Picture], frames: int | None, offline: bool) -> None:
    """Open the pictures; for an animation of ``frames`` so many of a GIF, WebP or video, or one for all.

    Raises:
        FileNotFoundError, OSError: there is no such picture.
        ValueError: one cannot be read, has too few frames, or is a mask of another size than the start picture.
    """
    from ..images import size_of

    for picture in pictures:
        moving = picture.field == "image" or picture.field in STEERING
        picture.image = _open(picture, frames if moving else None, offline)
    sizes = {picture.field: size_of(picture.image) for picture in pictures}
    start, mask = sizes.get("image"), sizes.get("mask_image")
    if start and mask and start != mask:
        raise ValueError(
            f"--mask is {mask[1]}x{mask[0]} and --image {start[1]}x{start[0]} pixels; resize one to the other's size."
        )


def _open(picture: Picture, frames: int | None, offline: bool) -> Any:
    from ..utils import ANIMATION_SUFFIXES, load_image, load_video

    flag, place = picture.flag, picture.place
    if offline and place.startswith(("http://", "https://")):
        raise ValueError(f"{flag} {place} lies on the network, which --offline leaves alone; give a file.")
    try:
        if frames is None or Path(place).suffix.lower() not in ANIMATION_SUFFIXES:
            return load_image(Path(place).expanduser() if place.startswith("~") else place)
        found: Any = load_video(place)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{flag}: {error}") from error
    except ImportError as error:
        raise ValueError(f"{flag}: {error}") from error
    if 1 < len(found) < frames:
        raise ValueError(f"{flag} {place} has {len(found)} frames, but --frames is {frames}; ask for at most those.")
    return found[:frames] if len(found) > 1 else found[0]


def prepare(pictures: Sequence[Picture], base: Base, fields: Mapping[str, Any], wanted: bool | None) -> dict[str, int]:
    """Choose the size to paint at, where a picture tells it, and `detect` at that size.

    Returns:
        Height and width, as fields of the request; see `Base.fitting_size`.
    """
    from ..images import size_of

    source = next((picture for picture in pictures if picture.field in ("image", *STEERING)), None)
    if source is None:
        return {}
    own, given = size_of(source.image), (fields.get("height"), fields.get("width"))
    # SDXL's T2I-Adapters halve a picture once more than the other networks.
    factor = 16 if any(picture.field == "adapters" for picture in pictures) else 8
    height, width = base.fitting_size(own, *given, factor)
    resized = max(abs(height - own[0]), abs(width - own[1])) >= factor  # and not only rounded down
    if given == (None, None) and resized:
        warnings.warn(
            f"{source.place} has {own[1]}x{own[0]} pixels, and {base.name} is made for {base.size[1]}x{base.size[0]}: "
            f"it is painted at {width}x{height}; --size sets another size.",
            stacklevel=2,
        )
    # What is cut out of the start picture is cut out of the controls, so they must be of its size.
    cut = fields.get("padding_mask_crop") is not None
    detect(pictures, (own[1], own[0]) if cut else (width, height), wanted)
    return {"height": height, "width": width}


def detect(pictures: Sequence[Picture], size: tuple[int, int], wanted: bool | None) -> None:
    """Draw the edges, lines, depths or poses that the controls are to show.

    Args:
        pictures: those that a detector is known for get what it draws.
        size: (width, height) in pixels to draw at.
        wanted: True for all, False for none, None for all that do not look like a drawing on black already.

    Raises:
        ValueError: a library that it needs is not installed.
    """
    from ..controls import DETECTORS
    from ..families import ALIASES

    for picture in pictures:
        name = ALIASES.get(picture.model or "", picture.model or "")
        if picture.field not in STEERING or wanted is False or name not in DETECTORS:
            continue
        frames = picture.image if isinstance(picture.image, list) else [picture.image]
        if wanted is None and name in DRAWINGS and all(map(is_drawing, frames)):
            message = f"{picture.flag} {picture.place} is white on black already, and is used as it is (--no-detect)."
            warnings.warn(message, stacklevel=2)
            continue
        try:
            drawn = [DETECTORS[name](frame.resize(size)) for frame in frames]
        except ImportError as error:
            raise ValueError(f"{picture.flag}: {error} If the picture is one already, give --no-detect.") from error
        picture.image = drawn if isinstance(picture.image, list) else drawn[0]
        picture.detector = name


def is_drawing(picture: Any) -> bool:
    """Whether a PIL picture is one of white lines on black, as edge detectors draw them."""
    import numpy as np

    pixels = np.asarray(picture.convert("RGB")).astype(int)
    light = pixels.mean(axis=-1)
    between = (light >= DARK) & (light <= BRIGHT)
    grey = np.ptp(pixels, axis=-1).max() <= DARK
    return bool(grey and (light < DARK).mean() >= MOSTLY_DARK and between.mean() <= FEW_BETWEEN)


def request_fields(pictures: Sequence[Picture]) -> dict[str, Any]:
    """The fields of the request that ``pictures`` are for."""
    from ..request import Control

    return _by_field(pictures, lambda picture: picture.image, lambda it: Control(it.image, it.scale, model=it.model))


def told(pictures: Sequence[Picture]) -> dict[str, Any]:
    """What the settings of a finished picture say of those that it was made from, by field of the request."""
    return _by_field(pictures, lambda picture: picture.place, lambda picture: picture.told)


def _by_field(pictures: Sequence[Picture], single: Callable[[Picture], Any], one: Callable[[Picture], Any]) -> Any:
    values: dict[str, Any] = {}
    for picture in pictures:
        if picture.field in ("image", "mask_image"):
            values[picture.field] = single(picture)
        else:
            values.setdefault(picture.field, []).append(one(picture))
    return values
