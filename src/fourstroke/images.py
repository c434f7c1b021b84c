"""Pictures as tensors, arrays and PIL images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import PIL.Image

if TYPE_CHECKING:
    from torch import Tensor

OutputType = Literal["pil", "np", "pt", "latent"]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def postprocess(pictures: Tensor, output_type: str = "pil") -> Any:
    """Turn decoded pictures into what the caller asked for.

    Args:
        pictures: (N, 3, H, W), nominally in [-1, 1].
        output_type: ``"pil"`` (list of RGB images), ``"np"`` (N, H, W, 3) float32 in [0, 1], ``"pt"`` (N, 3, H, W) in
            [0, 1], or ``"latent"`` (the input itself).

    Raises:
        ValueError: another ``output_type``.
    """
    check_output_type(output_type)
    if output_type == "latent":
        return pictures
    unit = (pictures * 0.5 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return unit
    array = unit.cpu().permute(0, 2, 3, 1).float().numpy()
    return array if output_type == "np" else to_pil(array)


def check_output_type(output_type: str) -> None:
    """Raise a ValueError unless ``output_type`` is one of `OUTPUT_TYPES`."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type is {output_type!r}; it must be one of {', '.join(map(repr, OUTPUT_TYPES))}.")


def to_pil(array: np.ndarray) -> list[PIL.Image.Image]:
    """(N, H, W, C) in [0, 1], C = 3 or 1 -> N images, rounded to 8 bits."""
    pixels = (array * 255).round().astype(np.uint8)
    return [PIL.Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture) for picture in pixels]
