"""Control pictures out of ordinary ones: edges, line drawings, depth and poses, for ControlNets and T2I-Adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import PIL.Image

ANNOTATORS = "lllyasviel/Annotators"
"""The hub's repository of the networks behind `lineart`, `depth` and `pose`."""


def canny(image: PIL.Image.Image, low_threshold: float = 100, high_threshold: float = 200) -> PIL.Image.Image:
    """White edges on black (Canny 1986), an RGB picture of the same size.

    Args:
        image: any picture.
        low_threshold, high_threshold: gradients above the second are edges, and those above the first that touch one.

    Raises:
        TypeError: ``image`` is not a PIL image.
        ImportError: the extra ``controls`` is not installed.
    """
    pixels = np.asarray(_rgb(image))
    try:
        import cv2
    except ImportError as error:
        raise ImportError("canny needs OpenCV: pip install 'fourstroke[controls]'.") from error
    return PIL.Image.fromarray(cv2.Canny(pixels, low_threshold, high_threshold)).convert("RGB")


def lineart(image: PIL.Image.Image) -> PIL.Image.Image:
    """White lines on black, as if drawn by hand, an RGB picture of the same size.

    Raises:
        TypeError, ImportError, OSError: see `depth`.
    """
    return _annotated("lineart", "LineartDetector", image)


def depth(image: PIL.Image.Image) -> PIL.Image.Image:
    """Depth from one picture (MiDaS), near is white and far is black, an RGB picture of the same size.

    The network is downloaded when it is first used, and read anew in each call.

    Raises:
        TypeError: ``image`` is not a PIL image.
        ImportError: the extra ``annotators`` is not installed.
        OSError: the network cannot be downloaded.
    """
    return _annotated("depth", "MidasDetector", image)


def pose(image: PIL.Image.Image) -> PIL.Image.Image:
    """Coloured skeletons of the people in a picture on black (OpenPose), an RGB picture of the same size.

    OpenPose's network is licensed for non-commercial research only.

    Raises:
        TypeError, ImportError, OSError: see `depth`.
    """
    return _annotated("pose", "OpenposeDetector", image)


DETECTORS: Mapping[str, Callable[[PIL.Image.Image], PIL.Image.Image]] = {
    "canny": canny,
    "lineart": lineart,
    "depth": depth,
    "pose": pose,
}


def _annotated(name: str, detector: str, image: PIL.Image.Image) -> PIL.Image.Image:
    picture = _rgb(image)
    try:
        import controlnet_aux  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"{name} needs controlnet-aux: pip install 'fourstroke[annotators]'.") from error
    network = getattr(controlnet_aux, detector).from_pretrained(ANNOTATORS)
    # It looks at 512 pixels, which its networks were trained for, and rounds the size of its answer to multiples of 64.
    found = network(picture, detect_resolution=512, image_resolution=min(picture.size))
    return found.convert("RGB").resize(picture.size)


def _rgb(image: Any) -> PIL.Image.Image:
    if not isinstance(image, PIL.Image.Image):
        raise TypeError(f"A {type(image).__name__} is no PIL image; open files with fourstroke.utils.load_image.")
    return image.convert("RGB")
