"""Pictures as tensors, arrays and PIL images.

In: `to_tensor`, `mask_to_tensor`, `control_to_tensor`, `adapter_to_tensor`, from whatever `read_pictures` takes, with
`size_of` and `default_size` to plan by; `crop_region` and `paste_back` to repaint a part. Out: `postprocess`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import PIL.Image
import PIL.ImageOps

if TYPE_CHECKING:
    from torch import Tensor

OutputType = Literal["pil", "np", "pt", "latent"]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
ResizeMode = Literal["default", "crop", "fill"]
RESIZE_MODES = ("default", "crop", "fill")
Box: TypeAlias = tuple[int, int, int, int]

LATENT_CHANNELS = 4
# Floats may overshoot 1 a little (a sharpened picture does), but no picture in [0, 1] comes near this.
TOO_BRIGHT = 2.0
_BYTES_MEND = "divide it by 255, or pass PIL.Image.fromarray(...)"


def to_tensor(
    image: Any,
    height: int | None = None,
    width: int | None = None,
    *,
    resize_mode: str = "default",
    crops_coords: Box | None = None,
) -> Tensor:
    """Make pictures ready for the VAE: (N, 3, height, width) float32 in [-1, 1].

    Args:
        image: see `read_pictures`. Arrays and tensors lie in [0, 1]; where any value is negative they are taken to lie
            in [-1, 1] already. A (N, 4, h, w) or (4, h, w) tensor is taken for latents and only given a batch axis.
        height, width: the size in pixels, rounded down to a multiple of 8; the first picture's own if not given. PIL
            images are resized with a Lanczos window, the others by the nearest pixel.
        resize_mode: ``"default"`` stretches, ``"crop"`` keeps the ratio and cuts what juts out, ``"fill"`` keeps it
            and fills the margin with the edge's colours; PIL images only, like ``crops_coords``.
        crops_coords: (left, top, right, bottom) in pixels, cut out before the resizing.

    Raises:
        TypeError, ValueError: see `read_pictures`; or a bad size or mode, a number of channels that is not 1 or 3, or
            values far above 1.
    """
    pictures = read_pictures(image)
    if _are_latents(pictures[0]):
        return _stack(pictures)
    batch = _three_channels(_fit(pictures, height, width, "RGB", resize_mode, crops_coords))
    return (batch if batch.min() < 0 else 2.0 * batch - 1.0).float()


def mask_to_tensor(
    mask: Any,
    height: int | None = None,
    width: int | None = None,
    *,
    resize_mode: str = "default",
    crops_coords: Box | None = None,
) -> Tensor:
    """Make masks ready for inpainting: (N, 1, height, width) float32, 1 where there is to be painted and 0 elsewhere.

    Args:
        mask: PIL images of any mode, (H, W), (N, H, W) or (N, H, W, 1) arrays, or (H, W), (N, H, W) or (N, 1, H, W)
            tensors, of any dtype; what is at least 0.5 (PIL: 128) is painted.
        height, width, resize_mode, crops_coords: as for `to_tensor`.

    Raises:
        TypeError, ValueError: see `to_tensor`; or the mask has several channels.
    """
    if getattr(mask, "ndim", None) == 3:
        # A batch of masks without channels; only (H, W, 1) is one mask.
        mask = list(mask) if not isinstance(mask, np.ndarray) or mask.shape[-1] != 1 else mask[None]
    batch = _fit(read_pictures(mask, "mask_image", floats_only=False), height, width, "L", resize_mode, crops_coords)
    if batch.shape[1] != 1:
        raise ValueError(f"mask_image has {batch.shape[1]} channels; it must have one, such as its mean over them.")
    return (batch >= 0.5).float()


def control_to_tensor(
    image: Any,
    height: int | None = None,
    width: int | None = None,
    *,
    resize_mode: str = "default",
    crops_coords: Box | None = None,
) -> Tensor:
    """Make a ControlNet's pictures ready: (N, 3, height, width) float32 in [0, 1]; arguments as for `to_tensor`.

    Raises:
        TypeError, ValueError: see `to_tensor`.
    """
    return _three_channels(_fit(read_pictures(image), height, width, "RGB", resize_mode, crops_coords)).float()


def adapter_to_tensor(
    image: Any,
    height: int | None = None,
    width: int | None = None,
    *,
    channels: int = 3,
    factor: int = 8,
    resize_mode: str = "default",
    crops_coords: Box | None = None,
) -> Tensor:
    """Make a T2I-Adapter's pictures ready: (N, channels, height, width) float32 in [0, 1].

    Args:
        image: see `read_pictures`.
        height, width: as for `to_tensor`, rounded down to a multiple of ``factor``.
        channels: the adapter's ``in_channels``; 1 makes PIL images grey (sketch and Canny adapters of SD 1.5), any
            other makes them RGB.
        factor: the adapter's ``downscale_factor``.
        resize_mode, crops_coords: as for `to_tensor`.

    Raises:
        TypeError, ValueError: see `to_tensor`; or arrays have another number of channels than ``channels``.
    """
    mode = "L" if channels == 1 else "RGB"
    batch = _fit(read_pictures(image), height, width, mode, resize_mode, crops_coords, factor)
    if channels == 3:
        batch = _three_channels(batch)
    if batch.shape[1] != channels:
        raise ValueError(f"The adapter's picture has {batch.shape[1]} channels, but its in_channels is {channels}.")
    return batch.float()


def read_pictures(image: Any, name: str = "image", *, floats_only: bool = True) -> list[Any]:
    """``image`` as a list of single pictures of one kind, after a look at their types.

    Args:
        image: a PIL image, a (H, W), (H, W, C) or (N, H, W, C) float array, a (H, W), (C, H, W) or (N, C, H, W) float
            tensor, or a list of such of one kind. Nothing is copied.
        name: what error messages call it.
        floats_only: refuse arrays of integers, whose values are most likely in 0..255.

    Returns:
        PIL images, (H, W[, C]) arrays or ([C,] H, W) tensors.

    Raises:
        TypeError: a picture is of another type, or they are of several, or an array is not of floats.
        ValueError: there are no pictures, or an array has another number of axes.
    """
    import torch

    items = list(image) if isinstance(image, (list, tuple)) else [image]
    if not items:
        raise ValueError(f"{name} is an empty list; give at least one picture.")
    kinds = (PIL.Image.Image, np.ndarray, torch.Tensor)
    for item in items:
        if not isinstance(item, kinds):
            hint = " Open files with fourstroke.utils.load_image." if isinstance(item, str) else ""
            shown = repr(item) if isinstance(item, (str, int, float)) else "one"
            raise TypeError(
                f"{name} is {shown} of type {type(item).__name__}; it must be a PIL image, a NumPy array, a tensor, or "
                f"a list of one of them.{hint}"
            )
    if not any(all(isinstance(item, kind) for item in items) for kind in kinds):
        found = ", ".join(sorted({type(item).__name__ for item in items}))
        raise TypeError(f"{name} is a list of several types ({found}); convert its pictures to one.")
    if isinstance(items[0], PIL.Image.Image):
        return items
    for item in items:
        _check_array(item, name, floats_only)
    return [picture for item in items for picture in (item if item.ndim == 4 else [item])]


def _check_array(array: Any, name: str, floats_only: bool) -> None:
    if array.ndim not in (2, 3, 4) or 0 in array.shape:
        axes = (
            "(H, W), (H, W, C) or (N, H, W, C)" if isinstance(array, np.ndarray) else "(H, W), (C, H, W), (N, C, H, W)"
        )
        raise ValueError(f"{name} has the shape {tuple(array.shape)}; it must be {axes}, and not empty.")
    if not floats_only:
        return
    is_float = array.dtype.kind == "f" if isinstance(array, np.ndarray) else array.is_floating_point()
    if not is_float:
        raise TypeError(f"{name} is an array of {array.dtype}; it must hold floats in [0, 1]: {_BYTES_MEND}.")


def size_of(image: Any) -> tuple[int, int]:
    """(height, width) in pixels of a picture or mask, the first one's where there are several (see `read_pictures`)."""
    while isinstance(image, (list, tuple)):
        image = image[0]
    if isinstance(image, PIL.Image.Image):
        return image.height, image.width
    shape = tuple(image.shape)
    # A 3-axes array is a picture with its channels last, or else a batch of masks.
    last = isinstance(image, np.ndarray) and (len(shape) == 4 or len(shape) == 3 and shape[2] in (1, 3, 4))
    return shape[-3:-1] if last else shape[-2:]


def default_size(
    image: Any, factor: int = 8, *, height: int | None = None, width: int | None = None
) -> tuple[int, int]:
    """(height, width) in pixels of ``image``, or those given, each rounded down to a multiple of ``factor``.

    Raises:
        ValueError: a side is shorter than ``factor``.
    """
    own = size_of(image)
    height, width = own[0] if height is None else height, own[1] if width is None else width
    if min(height, width) < factor:
        raise ValueError(f"A picture of {width} x {height} pixels is too small; give at least {factor} x {factor}.")
    return height - height % factor, width - width % factor


def _are_latents(picture: Any) -> bool:
    shape = getattr(picture, "shape", ())
    return len(shape) == 3 and shape[0] == LATENT_CHANNELS and not isinstance(picture, np.ndarray)


def _fit(
    pictures: list[Any],
    height: int | None,
    width: int | None,
    mode: str,
    resize_mode: str = "default",
    crops_coords: Box | None = None,
    factor: int = 8,
) -> Tensor:
    """Pictures -> (N, C, height, width) in their own range and float type; PIL images are converted to ``mode``."""
    import torch

    if resize_mode not in RESIZE_MODES:
        raise ValueError(f"resize_mode is {resize_mode!r}; it must be one of {', '.join(map(repr, RESIZE_MODES))}.")
    if not isinstance(pictures[0], PIL.Image.Image):
        if resize_mode != "default" or crops_coords is not None:
            raise ValueError("Only PIL images can be cropped, or resized with resize_mode 'crop' or 'fill'.")
        batch = _stack(pictures)
        size = default_size(batch, factor, height=height, width=width)
        if batch.shape[2:] == size:
            return batch
        batch = batch if batch.is_floating_point() else batch.float()
        return torch.nn.functional.interpolate(batch, size=size)
    images = [picture.crop(crops_coords) if crops_coords else picture for picture in pictures]
    size = default_size(images, factor, height=height, width=width)
    # The mode is changed after the resizing, as diffusers does it: that decides how transparent edges blend.
    images = [_resize(picture, *size, resize_mode).convert(mode) for picture in images]
    return _stack([np.asarray(picture, dtype=np.float32) / 255.0 for picture in images])


def _stack(pictures: list[Any]) -> Tensor:
    """Arrays or tensors of single pictures -> (N, C, H, W), with C = 1 where they have no channels."""
    import torch

    shapes = {tuple(picture.shape) for picture in pictures}
    if len(shapes) > 1:
        raise ValueError(f"The arrays in one list have the shapes {sorted(shapes)}; they must all have one shape.")
    if isinstance(pictures[0], np.ndarray):
        array = np.stack(pictures)
        return torch.from_numpy((array[..., None] if array.ndim == 3 else array).transpose(0, 3, 1, 2))
    batch = torch.stack(pictures)
    return batch.unsqueeze(1) if batch.ndim == 3 else batch


def _three_channels(batch: Tensor) -> Tensor:
    if batch.shape[1] not in (1, 3):
        raise ValueError(
            f"The picture has {batch.shape[1]} channels; it must have three (RGB) or one (grey), last in an array and "
            "first in a tensor."
        )
    if batch.max() > TOO_BRIGHT:
        raise ValueError(f"The picture has values up to {batch.max():g}; they must lie in [0, 1]: {_BYTES_MEND}.")
    return batch.expand(-1, 3, -1, -1)


def _resize(image: PIL.Image.Image, height: int, width: int, resize_mode: str) -> PIL.Image.Image:
    """Stretch to (height, width), or keep the ratio: "crop" covers the whole frame, "fill" lies inside it."""
    if resize_mode == "default":
        return image.resize((width, height), resample=PIL.Image.Resampling.LANCZOS)
    wanted, own = width / height, image.width / image.height
    if own >= wanted if resize_mode == "crop" else own <= wanted:
        size = (max(image.width * height // image.height, 1), height)
    else:
        size = (width, max(image.height * width // image.width, 1))
    resized = image.resize(size, resample=PIL.Image.Resampling.LANCZOS)
    frame = PIL.Image.new("RGB", (width, height))
    left, top = width // 2 - size[0] // 2, height // 2 - size[1] // 2
    frame.paste(resized, (left, top))
    if left > 0:
        _fill(frame, resized, (0, 0), (left, height), (0, 0, 0, height))
        _fill(frame, resized, (left + size[0], 0), (left, height), (size[0], 0, size[0], height))
    if top > 0:
        _fill(frame, resized, (0, 0), (width, top), (0, 0, width, 0))
        _fill(frame, resized, (0, top + size[1]), (width, top), (0, size[1], width, size[1]))
    return frame


def _fill(
    frame: PIL.Image.Image, resized: PIL.Image.Image, corner: tuple[int, int], size: tuple[int, int], edge: Box
) -> None:
    """Spread the ``edge`` of ``resized``, a box without area, over the margin of ``size`` at ``corner``."""
    frame.paste(resized.resize(size, box=edge), corner)


def crop_region(mask: PIL.Image.Image, width: int, height: int, pad: int = 0) -> Box:
    """The part of a picture to repaint at ``width`` x ``height`` pixels so that a small mask gets all of them.

    Args:
        mask: where it is not black there is to be painted.
        width, height: the size at which the part will be painted; its ratio is kept as far as the picture allows.
        pad: pixels of surroundings on each side.

    Returns:
        (left, top, right, bottom) in pixels of the mask.

    Raises:
        ValueError: the mask is black all over.
    """
    painted = np.asarray(mask.convert("L")) != 0
    columns, rows = np.flatnonzero(painted.any(axis=0)), np.flatnonzero(painted.any(axis=1))
    if not len(columns):
        raise ValueError("The mask is black all over; make it white where there is to be painted.")
    left, right = max(int(columns[0]) - pad, 0), min(int(columns[-1]) + 1 + pad, mask.width)
    top, bottom = max(int(rows[0]) - pad, 0), min(int(rows[-1]) + 1 + pad, mask.height)
    ratio = width / height
    if (right - left) / (bottom - top) > ratio:
        top, bottom = _widened(top, bottom, (right - left) / ratio, mask.height)
    else:
        left, right = _widened(left, right, (bottom - top) * ratio, mask.width)
    return left, top, right, bottom


def _widened(low: int, high: int, wanted: float, limit: int) -> tuple[int, int]:
    """[low, high) made ``wanted`` long about its middle, pushed into [0, limit) and cut where it is too long for it."""
    growth = int(wanted - (high - low))
    low, high = low - growth // 2, high + growth - growth // 2
    if high > limit:
        low, high = low - (high - limit), limit
    return (0, min(high - low, limit)) if low < 0 else (low, high)


def paste_back(
    mask: PIL.Image.Image,
    original: PIL.Image.Image,
    generated: PIL.Image.Image,
    crops_coords: Box | None = None,
) -> PIL.Image.Image:
    """Put a repainted picture, or the part of it at ``crops_coords``, under the original where the mask is black.

    Args:
        mask: of the original's size; grey blends.
        original: the picture that was repainted.
        generated: what was painted: of the original's size, or of any size with ``crops_coords``.
        crops_coords: what `crop_region` gave.

    Returns:
        An RGB picture of the original's size.

    Raises:
        ValueError: the sizes do not fit.
    """
    if mask.size != original.size:
        raise ValueError(f"The mask's size {mask.size} differs from the picture's {original.size}; resize one of them.")
    if crops_coords is None and generated.size != original.size:
        raise ValueError(
            f"The painted picture's size {generated.size} differs from the original's {original.size}; resize it, or "
            "give the crops_coords that it was painted for."
        )
    kept = PIL.Image.new("RGBa", original.size)
    kept.paste(original.convert("RGBA").convert("RGBa"), mask=PIL.ImageOps.invert(mask.convert("L")))
    if crops_coords is not None:
        left, top, right, bottom = crops_coords
        whole = PIL.Image.new("RGBA", original.size)
        whole.paste(_resize(generated, bottom - top, right - left, "crop"), (left, top))
        generated = whole.convert("RGB")
    result = generated.convert("RGBA")
    result.alpha_composite(kept.convert("RGBA"))
    return result.convert("RGB")


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
