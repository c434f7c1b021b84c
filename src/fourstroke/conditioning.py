"""What steers the network besides the timestep: text, guidance, picture sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .images import Box, adapter_to_tensor, control_to_tensor
from .models.clip import CLIPTextModel
from .models.controlnet import ControlNetModel
from .models.motion import MotionModule
from .models.t2i_adapter import T2IAdapter
from .models.unet import UNet2DConditionModel
from .models.vae import AutoencoderKL
from .models.vae_tiny import AutoencoderTiny
from .request import GenerateRequest
from .runtime.offload import Offload
from .runtime.widening import result_dtype
from .text import TextEncoding, Tokenizer, encode_prompts


@dataclass(frozen=True)
class Components:
    """The modules that one generation uses. SDXL is told from SD by the UNet's configuration.

    Attributes:
        tokenizers, text_encoders: one (SD), two (SDXL), or none when embeddings are given.
        force_zeros_for_empty_prompt: SDXL base was trained with zeros, not with the encoding of "", as no text.
        requires_aesthetics_score: SDXL's refiner reads an aesthetic score in place of the target size.
        controlnets, t2i_adapters: one a control picture of the request.
        offload: what keeps the networks on the CPU while they do not work; None leaves them where they are.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL | AutoencoderTiny
    scheduler: Any
    tokenizers: Sequence[Tokenizer]
    text_encoders: Sequence[CLIPTextModel]
    force_zeros_for_empty_prompt: bool = False
    requires_aesthetics_score: bool = False
    controlnets: Sequence[ControlNetModel] = ()
    t2i_adapters: Sequence[T2IAdapter] = ()
    offload: Offload | None = None

    @property
    def device(self) -> torch.device:
        """Where the networks work."""
        return self.unet.device if self.offload is None else self.offload.device

    def bring(self, *networks: nn.Module) -> None:
        """Say which networks work next; with an ``offload`` they, and no others, are on the device then."""
        if self.offload is not None:
            self.offload.bring(*networks)

    @property
    def xl(self) -> bool:
        """Whether the UNet takes SDXL's pooled text and sizes."""
        return self.unet.config.addition_embed_type == "text_time"

    @property
    def motion_frames(self) -> int | None:
        """How many frames the UNet's motion modules can relate; None without any."""
        slots = [block.motion_modules for block in (*self.unet.down_blocks, *self.unet.up_blocks)]
        found = [cast(MotionModule, slot[0]).length for slot in slots if isinstance(slot, nn.ModuleList)]
        return min(found) if found else None

    def guided(self, guidance_scale: float) -> bool:
        """Whether the network runs twice a step: guidance above 1, and no guidance embedding that replaces it."""
        return guidance_scale > 1 and self.unet.config.time_cond_proj_dim is None


def encode_text(parts: Components, request: GenerateRequest, guided: bool) -> tuple[TextEncoding, TextEncoding | None]:
    """The prompts' and, when ``guided``, the negative prompts' encodings, one row a picture.

    Raises:
        ValueError: embeddings are given without the pooled ones that SDXL needs.
    """
    positive = _given(parts, request.prompt_embeds, request.pooled_prompt_embeds, "")
    if positive is None:
        positive = _encode(parts, request, "prompt", request.clip_skip)
    negative = None
    if guided:
        negative = _given(parts, request.negative_prompt_embeds, request.negative_pooled_prompt_embeds, "negative_")
        if negative is None and request.negative_prompt is None and parts.force_zeros_for_empty_prompt:
            negative = TextEncoding(torch.zeros_like(positive.embeds), torch.zeros_like(positive.pooled))
        elif negative is None:
            negative = _encode(parts, request, "negative_prompt", None)
    times = request.num_images_per_prompt
    return positive.repeat(times), None if negative is None else negative.repeat(times)


def _given(parts: Components, embeds: Tensor | None, pooled: Tensor | None, prefix: str) -> TextEncoding | None:
    if embeds is None:
        return None
    if parts.xl and pooled is None:
        raise ValueError(
            f"{prefix}prompt_embeds needs {prefix}pooled_prompt_embeds beside it, for SDXL reads both; "
            "encode_prompt() gives the two."
        )
    device, dtype = parts.device, result_dtype(parts.text_encoders[-1] if parts.text_encoders else parts.unet)
    # Models without pooled conditioning never read it; an empty one keeps the type simple.
    pooled = embeds.new_zeros(embeds.shape[0], 0) if pooled is None else pooled
    return TextEncoding(embeds.to(device, dtype), pooled.to(device))


def _encode(parts: Components, request: GenerateRequest, name: str, clip_skip: int | None) -> TextEncoding:
    first = request.texts(name) or [""] * request.prompt_count
    second = request.texts(f"{name}_2") or first
    # A model with only the second encoder (SDXL's refiner) reads the first text.
    texts = [first] if len(parts.text_encoders) == 1 else [first, second][: len(parts.text_encoders)]
    parts.bring(*parts.text_encoders)
    return encode_prompts(texts, parts.tokenizers, parts.text_encoders, penultimate=parts.xl, clip_skip=clip_skip)


def size_ids(
    original_size: tuple[int, int], crops_coords_top_left: tuple[int, int], target_size: tuple[int, int]
) -> tuple[int, ...]:
    """SDXL's micro-conditioning (Podell et al. 2023, sec. 2.2): (height, width, top, left, height, width)."""
    return (*original_size, *crops_coords_top_left, *target_size)


def micro_conditioning(
    parts: Components, request: GenerateRequest, size: tuple[int, int], guided: bool, dtype: torch.dtype
) -> Tensor:
    """`size_ids` of every row of the network's batch, unconditional rows first: (N or 2N, 6).

    A refiner's are (height, width, top, left, aesthetic score): (N or 2N, 5).
    """
    original, target = request.original_size or size, request.target_size or size
    negative = request.negative_original_size or original, request.negative_target_size or target
    crops = request.crops_coords_top_left
    changed = request.negative_original_size is not None or request.negative_target_size is not None
    negative_crops = request.negative_crops_coords_top_left if changed else crops
    ids, negative_ids = size_ids(original, crops, target), size_ids(negative[0], negative_crops, negative[1])
    if parts.requires_aesthetics_score:
        ids = (*ids[:4], request.aesthetic_score)
        negative_ids = (*negative_ids[:4], request.negative_aesthetic_score)
    rows = torch.tensor([ids], dtype=dtype).repeat(request.batch_size, 1)
    if not guided:
        return rows
    return torch.cat([torch.tensor([negative_ids], dtype=dtype).repeat(request.batch_size, 1), rows])


def guidance_embedding(guidance_scale: float, batch: int, dim: int) -> Tensor:
    """Sinusoidal embedding of w = guidance_scale - 1 (Luo et al. 2023, sec. 4.2): (batch, dim) float32.

    Unlike a timestep's, its frequencies are divided by dim / 2 - 1, and w is scaled by 1000.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10_000.0) / (half - 1)))
    angles = torch.full((batch, 1), guidance_scale - 1, dtype=torch.float32) * 1000.0 * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, dim % 2))


def guide(prediction: Tensor, guidance_scale: float, guidance_rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6).

    Args:
        prediction: (2N, C, h, w), the unconditional half first.
        guidance_scale: w >= 1; 1 gives the conditional half.
        guidance_rescale: phi in [0, 1], mixes in a result with the conditional half's standard deviation, against
            overexposure (Lin et al. 2023, eq. 15 and 16).

    Returns:
        (N, C, h, w).
    """
    unconditional, conditional = prediction.chunk(2)
    guided = unconditional + guidance_scale * (conditional - unconditional)
    if guidance_rescale <= 0:
        return guided
    dims = list(range(1, guided.ndim))
    rescaled = guided * (conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True))
    return guidance_rescale * rescaled + (1 - guidance_rescale) * guided


def per_row(values: Tensor, request: GenerateRequest, what: str) -> Tensor:
    """Repeat ``values`` (n, …) to one a picture of the batch, or, for animations, one a frame: (N F, …).

    One value serves all; one a prompt serves that prompt's pictures; one a frame serves every animation.

    Raises:
        ValueError: another number of values.
    """
    count, rows, frames = len(values), request.batch_size, request.num_frames
    if frames is None:
        if count == rows:
            return values
        if count == 1:
            return values.expand(rows, *values.shape[1:])
        if count == request.prompt_count:
            return values.repeat_interleave(request.num_images_per_prompt, dim=0)
        raise ValueError(f"{count} {what}s for {request.prompt_count} prompts: give one, or one a prompt.")
    if count == rows * frames:
        return values
    if count == 1:
        return values.expand(rows * frames, *values.shape[1:])
    if count == frames:
        return values.repeat(rows, *[1] * (values.ndim - 1))
    raise ValueError(f"{count} {what}s for an animation of {frames} frames: give one, or one a frame.")


def with_frames(values: Tensor, frames: int | None) -> Tensor:
    """(N F, C, h, w) -> (N, C, F, h, w); pictures stay as they are."""
    return values if frames is None else values.unflatten(0, (-1, frames)).transpose(1, 2)


def without_frames(values: Tensor) -> Tensor:
    """(N, C, F, h, w) -> (N F, C, h, w); pictures stay as they are."""
    return values if values.ndim == 4 else values.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class Steering:
    """A control network or an adapter with everything that does not change from step to step.

    Attributes:
        start, end: fractions of the schedule between which it acts.
        net, condition, scale: a ControlNet, its embedded pictures (rows, C0, h, w) and the factor on its residuals.
        features: a T2I-Adapter's features in place of these, already scaled: a tensor a down block, (rows, C, h, w).
    """

    start: float
    end: float
    net: ControlNetModel | None = None
    condition: Tensor | None = None
    scale: float = 1.0
    features: tuple[Tensor, ...] = ()

    def acts(self, index: int, steps: int) -> bool:
        """Whether it acts in step ``index`` of ``steps``."""
        if self.net is None:
            return index < int(steps * self.end)
        return index / steps >= self.start and (index + 1) / steps <= self.end


def guesses(parts: Components, request: GenerateRequest) -> bool:
    """Whether ControlNets run in guess mode: asked for, or what the first was trained for (global pooling)."""
    return request.guess_mode or any(net.config.global_pool_conditions for net in parts.controlnets[:1])


def check_controls(parts: Components, request: GenerateRequest, size: tuple[int, int]) -> None:
    """Hold the control pictures against the networks that read them.

    Raises:
        ValueError: there is not one picture for each, or an adapter cannot read the ``size`` (height, width in pixels).
    """
    for what, controls, nets in (
        ("ControlNet", request.controls, parts.controlnets),
        ("T2I-Adapter", request.adapters, parts.t2i_adapters),
    ):
        if len(controls) != len(nets):
            raise ValueError(
                f"{len(controls)} control pictures for {len(nets)} {what}s: give one picture (or one list) each."
            )
    for adapter in parts.t2i_adapters:
        factor = adapter.downscale_factor
        if size[0] % factor or size[1] % factor:
            raise ValueError(
                f"The T2I-Adapter reads pictures whose sides are multiples of {factor}, and this one is to be "
                f"{size[1]} x {size[0]}; ask for {max(1, size[1] // factor) * factor} x "
                f"{max(1, size[0] // factor) * factor}."
            )


def steer(
    parts: Components, request: GenerateRequest, size: tuple[int, int], guided: bool, box: Box | None
) -> list[Steering]:
    """Run what ControlNets and T2I-Adapters compute once a request: embedded conditions and features.

    Args:
        parts, request: the model and what is asked of it.
        size: height and width in pixels.
        guided: whether the network's batch has unconditional rows.
        box: part of the pictures that is painted, when that is not all; see ``padding_mask_crop``.
    """
    halves = 2 if guided else 1
    mode = "default" if box is None else "fill"
    found = []
    for control, net in zip(request.controls, parts.controlnets, strict=True):
        pictures = control_to_tensor(control.image, *size, resize_mode=mode, crops_coords=box)
        parts.bring(*parts.controlnets)
        condition = per_row(net.embed_condition(pictures.to(net.device, net.dtype)), request, "control picture")
        condition = condition.repeat(1 if guesses(parts, request) else halves, 1, 1, 1)
        found.append(Steering(control.start, control.end, net, condition, control.scale))
    for control, adapter in zip(request.adapters, parts.t2i_adapters, strict=True):
        channels = adapter.config.in_channels
        pictures = adapter_to_tensor(control.image, *size, channels=channels, resize_mode=mode, crops_coords=box)
        parts.bring(adapter)
        pictures = pictures.to(adapter.device, adapter.dtype)
        features = (per_row(value, request, "control picture") * control.scale for value in adapter(pictures))
        found.append(
            Steering(control.start, control.end, features=tuple(value.repeat(halves, 1, 1, 1) for value in features))
        )
    return found
