"""What steers the network besides the timestep: text, guidance, picture sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .models.clip import CLIPTextModel
from .models.unet import UNet2DConditionModel
from .models.vae import AutoencoderKL
from .models.vae_tiny import AutoencoderTiny
from .request import GenerateRequest
from .text import TextEncoding, Tokenizer, encode_prompts


@dataclass(frozen=True)
class Components:
    """The modules that one generation uses. SDXL is told from SD by the UNet's configuration.

    Attributes:
        tokenizers, text_encoders: one (SD), two (SDXL), or none when embeddings are given.
        force_zeros_for_empty_prompt: SDXL base was trained with zeros, not with the encoding of "", as no text.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL | AutoencoderTiny
    scheduler: Any
    tokenizers: Sequence[Tokenizer]
    text_encoders: Sequence[CLIPTextModel]
    force_zeros_for_empty_prompt: bool = False

    @property
    def xl(self) -> bool:
        """Whether the UNet takes SDXL's pooled text and sizes."""
        return self.unet.config.addition_embed_type == "text_time"

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
    device, dtype = parts.unet.device, parts.text_encoders[-1].dtype if parts.text_encoders else parts.unet.dtype
    # Models without pooled conditioning never read it; an empty one keeps the type simple.
    pooled = embeds.new_zeros(embeds.shape[0], 0) if pooled is None else pooled
    return TextEncoding(embeds.to(device, dtype), pooled.to(device))


def _encode(parts: Components, request: GenerateRequest, name: str, clip_skip: int | None) -> TextEncoding:
    first = request.texts(name) or [""] * request.prompt_count
    second = request.texts(f"{name}_2") or first
    # A model with only the second encoder (SDXL's refiner) reads the first text.
    texts = [first] if len(parts.text_encoders) == 1 else [first, second][: len(parts.text_encoders)]
    return encode_prompts(texts, parts.tokenizers, parts.text_encoders, penultimate=parts.xl, clip_skip=clip_skip)


def size_ids(
    original_size: tuple[int, int], crops_coords_top_left: tuple[int, int], target_size: tuple[int, int]
) -> tuple[int, ...]:
    """SDXL's micro-conditioning (Podell et al. 2023, sec. 2.2): (height, width, top, left, height, width)."""
    return (*original_size, *crops_coords_top_left, *target_size)


def micro_conditioning(request: GenerateRequest, size: tuple[int, int], guided: bool, dtype: torch.dtype) -> Tensor:
    """`size_ids` of every row of the network's batch, unconditional rows first: (N or 2N, 6)."""
    ids = size_ids(request.original_size or size, request.crops_coords_top_left, request.target_size or size)
    rows = torch.tensor([ids], dtype=dtype).repeat(request.batch_size, 1)
    if not guided:
        return rows
    negative = ids
    if request.negative_original_size is not None and request.negative_target_size is not None:
        negative = size_ids(
            request.negative_original_size, request.negative_crops_coords_top_left, request.negative_target_size
        )
    return torch.cat([torch.tensor([negative], dtype=dtype).repeat(request.batch_size, 1), rows])


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
