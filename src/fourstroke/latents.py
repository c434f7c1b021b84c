"""Latents: their size, their start, pictures into them and out of them again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .animation import shuffled_noise
from .conditioning import Components, per_row, with_frames, without_frames
from .images import Box, crop_region, default_size, mask_to_tensor, size_of, to_tensor
from .models.vae import AutoencoderKL, DiagonalGaussian
from .models.vae_tiny import AutoencoderTiny
from .random import randn_tensor
from .request import GenerateRequest, Generators

VAE = AutoencoderKL | AutoencoderTiny


@dataclass
class StartLatents:
    """What a run starts from.

    Attributes:
        latents: (N, 4, h, w), for animations (N, 4, F, h, w), in the scheduler's scale; all others have this layout.
        noise: what was drawn, when a mask needs it again.
        image_latents: the clean start picture, when a mask is given to a 4-channel network.
        mask: (N, 1, …) in {0, 1}, 1 where the picture is painted anew.
        masked_image_latents: the start picture without the masked part, 9-channel networks only.
    """

    latents: Tensor
    noise: Tensor | None = None
    image_latents: Tensor | None = None
    mask: Tensor | None = None
    masked_image_latents: Tensor | None = None


def picture_size(parts: Components, request: GenerateRequest) -> tuple[int, int]:
    """Height and width in pixels: as asked for, else those of the start or control picture, else the model's own.

    Raises:
        ValueError: not a positive multiple of the VAE's factor.
    """
    factor = parts.vae.downscale
    own = _picture_size(parts, request, factor)
    size = request.height or own[0], request.width or own[1]
    for name, value in zip(("height", "width"), size, strict=True):
        if value <= 0 or value % factor:
            down, up = value // factor * factor, (value // factor + 1) * factor
            raise ValueError(
                f"{name} is {value}; it must be a multiple of {factor}, such as {max(down, factor)} or {up}."
            )
    return size


def _picture_size(parts: Components, request: GenerateRequest, factor: int) -> tuple[int, int]:
    image: Any = request.image
    if _is_latent(image):
        return image.shape[-2] * factor, image.shape[-1] * factor
    if image is not None:
        return default_size(image, factor)
    if request.controls:
        return default_size(request.controls[0].image, factor)
    if request.adapters:
        return default_size(request.adapters[0].image, parts.t2i_adapters[0].downscale_factor)
    own = parts.unet.config.sample_size or (128 if parts.xl else 64)
    height, width = own if isinstance(own, tuple) else (own, own)
    return height * factor, width * factor


def _is_latent(image: Any) -> bool:
    return isinstance(image, Tensor) and image.ndim >= 4 and image.shape[1] == 4


def start_latents(
    parts: Components,
    request: GenerateRequest,
    size: tuple[int, int],
    timestep: Tensor,
    generator: Generators,
    dtype: torch.dtype,
) -> StartLatents:
    """Draw the start noise and, where there is a start picture, mix it in.

    Random numbers are drawn in diffusers' order: the start picture's latents, the noise, the masked picture's latents.

    Args:
        parts, request: the model and what is asked of it.
        size: height and width in pixels.
        timestep: (1,) the first that will run.
        generator: one for all or one a picture.
        dtype: of the latents.

    Raises:
        ValueError: latents, picture or mask do not fit the request.
    """
    factor, device, scheduler = parts.vae.downscale, parts.device, parts.scheduler
    layout = () if request.num_frames is None else (request.num_frames,)
    shape = (request.batch_size, parts.vae.config.latent_channels, *layout, size[0] // factor, size[1] // factor)
    given = request.latents
    if given is not None and given.shape != shape:
        raise ValueError(f"latents are {tuple(given.shape)}; this request needs {shape}.")
    given = None if given is None else given.to(device)
    if request.image is None:
        noise = randn_tensor(shape, generator, device=device, dtype=dtype) if given is None else given
        if request.windows is not None and request.num_frames is not None and given is None:
            noise = shuffled_noise(
                noise, request.windows.length, request.windows.stride, generator, request.windows.noise
            )
        return StartLatents(noise * scheduler.init_noise_sigma)
    if request.mask_image is not None:
        return _masked_start(parts, request, shape, size, timestep, generator, dtype, given)
    if given is not None:
        return StartLatents(given)
    clean = encode_pictures(parts, request, to_tensor(request.image, *size), generator, dtype)
    if request.denoising_start is not None:
        return StartLatents(clean)
    if request.num_frames is None:
        noise = randn_tensor(clean.shape, generator, device=device, dtype=dtype)
    else:
        # diffusers' video-to-video draws frame by frame.
        noise = randn_tensor(clean.transpose(1, 2).shape, generator, device=device, dtype=dtype).transpose(1, 2)
    return StartLatents(scheduler.add_noise(clean, noise, timestep))


def crop_box(request: GenerateRequest, size: tuple[int, int]) -> Box | None:
    """The part of the picture that ``padding_mask_crop`` chooses, in its pixels."""
    if request.padding_mask_crop is None:
        return None
    return crop_region(request.mask_image, size[1], size[0], request.padding_mask_crop)


def _masked_start(
    parts: Components,
    request: GenerateRequest,
    shape: tuple[int, ...],
    size: tuple[int, int],
    timestep: Tensor,
    generator: Generators,
    dtype: torch.dtype,
    given: Tensor | None,
) -> StartLatents:
    scheduler, device, frames = parts.scheduler, parts.device, request.num_frames
    box = crop_box(request, size)
    mode = "default" if box is None else "fill"
    picture = to_tensor(request.image, *size, resize_mode=mode, crops_coords=box)
    mask = mask_to_tensor(request.mask_image, *size, resize_mode=mode, crops_coords=box)
    fresh = request.change == 1 and request.denoising_start is None
    nine = parts.unet.config.in_channels == 9
    clean = None
    if not nine or (given is None and not fresh):
        clean = encode_pictures(parts, request, picture, generator, dtype)
    noise = randn_tensor(shape, generator, device=device, dtype=dtype) if given is None else given
    if given is not None or fresh:
        latents = noise * scheduler.init_noise_sigma
    elif request.denoising_start is not None:
        latents = clean
    else:
        latents = scheduler.add_noise(clean, noise, timestep)
    assert latents is not None
    small = F.interpolate(mask, size=shape[-2:]).to(device, dtype)
    rows = with_frames(per_row(small, request, "mask"), frames)
    if not nine:
        # diffusers encodes the masked picture here as well, unless it is latents already, and leaves it unused; its
        # random numbers come before those of the steps.
        if picture.shape[1] != shape[1]:
            _draw_unused(parts, request, (len(picture), *shape[1:2], *shape[-2:]), generator, dtype)
        return StartLatents(latents, noise, clean, rows)
    if request.masked_image_latents is not None:
        hidden = per_row(request.masked_image_latents.to(device, dtype), request, "masked picture")
        hidden = with_frames(hidden, frames)
    else:
        hidden = encode_pictures(parts, request, picture * (mask < 0.5), generator, dtype)
    return StartLatents(latents, mask=rows, masked_image_latents=hidden)


def _draw_unused(
    parts: Components, request: GenerateRequest, shape: Sequence[int], generator: Generators, dtype: torch.dtype
) -> None:
    if isinstance(parts.vae, AutoencoderTiny) or request.masked_image_latents is not None:
        return
    count = len(generator) if isinstance(generator, Sequence) else shape[0]
    randn_tensor((count, *shape[1:]), generator, device=parts.device, dtype=dtype)


@torch.no_grad()
def encode_pictures(
    parts: Components, request: GenerateRequest, pictures: Tensor, generator: Generators, dtype: torch.dtype
) -> Tensor:
    """Pictures (n, 3, H, W) in [-1, 1] -> scaled latents, one a row of the batch; latents pass through.

    Each row is a sample of its picture's distribution, drawn from its own generator where there is one a row.

    Returns:
        (N, 4, h, w), or (N, 4, F, h, w) for animations.
    """
    vae, frames, device = parts.vae, request.num_frames, parts.device
    if pictures.shape[1] == 4:
        return with_frames(per_row(pictures.to(device, dtype), request, "picture"), frames)
    chunk = request.decode_chunk_size if frames is not None else len(pictures)
    parts.bring(vae)
    with upcast(vae, parts.xl) as vae_dtype:
        encoded = [vae.encode(part.to(device, vae_dtype)) for part in pictures.split(chunk)]
    latents = _sample(encoded, request, generator).to(dtype)
    return with_frames(_normalise(vae, latents), frames)


def _sample(encoded: list[Any], request: GenerateRequest, generator: Generators) -> Tensor:
    """A row of the batch each, (N F, 4, h, w): what a tiny VAE gave, or samples of what a full one gave."""

    def draw(one: Any) -> Tensor:
        return torch.cat([part if isinstance(part, Tensor) else part.sample(one) for part in encoded])

    if not isinstance(generator, Sequence):
        return per_row(draw(generator), request, "picture")
    if request.num_frames is None and not isinstance(encoded[0], Tensor):
        moments = [per_row(value, request, "picture") for value in (encoded[0].mean, encoded[0].logvar)]
        return DiagonalGaussian(*moments).sample(list(generator))
    if request.num_frames is None:
        return per_row(draw(None), request, "picture")
    # One animation after the other, each with its own generator.
    frames = request.num_frames
    rows = (per_row(draw(own), request, "picture") for own in generator)
    return torch.cat([row[i * frames : (i + 1) * frames] for i, row in enumerate(rows)])


def _normalise(vae: VAE, latents: Tensor) -> Tensor:
    mean, std = _statistics(vae, latents)
    if mean is None or std is None:
        return latents * vae.config.scaling_factor
    return (latents - mean) * vae.config.scaling_factor / std


def _denormalise(vae: VAE, latents: Tensor) -> Tensor:
    mean, std = _statistics(vae, latents)
    if mean is None or std is None:
        return latents / vae.config.scaling_factor
    return latents * std / vae.config.scaling_factor + mean


def _statistics(vae: VAE, latents: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The channels' mean and deviation, (1, 4, 1, 1), where the configuration has them."""
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or std is None:
        return None, None
    return latents.new_tensor(mean).view(1, -1, 1, 1), latents.new_tensor(std).view(1, -1, 1, 1)


@contextmanager
def upcast(vae: VAE, wanted: bool) -> Iterator[torch.dtype]:
    """Run the VAE in float32 inside, when it is in float16 and asks for it (``force_upcast``: SDXL's overflows there).

    Yields:
        The dtype that its inputs must have.
    """
    dtype = vae.dtype
    if not (wanted and dtype == torch.float16 and vae.config.force_upcast):
        yield dtype
        return
    # float16 -> float32 -> float16 changes no weight.
    vae.to(torch.float32)
    try:
        yield torch.float32
    finally:
        vae.to(dtype)


@torch.no_grad()
def decode(vae: VAE, latents: Tensor, *, upcast_half: bool = False, chunk: int | None = None) -> Tensor:
    """Latents in the UNet's scale, (N, 4, h, w) or (N, 4, F, h, w) -> pictures (N or N F, 3, 8h, 8w), about [-1, 1].

    Args:
        vae: its ``scaling_factor`` and, where the configuration has them, mean and deviation are undone.
        latents: what the loop left.
        upcast_half: decode in float32 when a half-precision VAE asks for it; see `upcast`.
        chunk: pictures at a time; all if not given.
    """
    flat = _denormalise(vae, without_frames(latents))
    with upcast(vae, upcast_half) as dtype:
        return torch.cat([vae.decode(part.to(dtype)) for part in flat.split(chunk or len(flat))])


def check_pictures(parts: Components, request: GenerateRequest) -> None:
    """Check start picture and mask against the model.

    Raises:
        ValueError: the mask is not of the picture's size, or an inpainting model is asked for anything else.
    """
    channels = parts.unet.config.in_channels
    if channels not in (4, 9):
        raise ValueError(f"The UNet takes {channels} channels; 4 (pictures) and 9 (inpainting) are supported.")
    if channels == 9 and request.mask_image is None:
        raise ValueError("This is an inpainting model: pass image and mask_image, or use the model it was made from.")
    latent = _is_latent(request.image)
    if channels == 9 and latent and request.masked_image_latents is None:
        raise ValueError(
            "An inpainting model reads the picture without its masked part, which latents do not tell: pass "
            "masked_image_latents, or a picture as image."
        )
    if request.image is None or request.mask_image is None or latent:
        return
    picture, mask = size_of(request.image), size_of(request.mask_image)
    if picture != mask:
        raise ValueError(
            f"The mask is {mask[1]} x {mask[0]} and the picture {picture[1]} x {picture[0]} pixels; resize one to the "
            "other's size."
        )
