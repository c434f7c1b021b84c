"""T2I-Adapters (Mou et al. 2023): light control networks that run once a picture.

Signatures and defaults are diffusers'. Each ``__call__`` hands its arguments to `fourstroke.pipelines.arguments`, which
makes a `GenerateRequest` of them; what an argument means is said there. Sizes are in pixels. Every ``__call__`` raises
ValueError or TypeError for arguments that break a rule, before any network runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..request import Generators, Prompt, Size
from .run import PipelineOutput
from .stable_diffusion import StableDiffusionPipeline, StableDiffusionXLPipeline


class StableDiffusionAdapterPipeline(StableDiffusionPipeline):
    """Text to image under T2I-Adapters, with Stable Diffusion."""

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        adapter: Any,
        scheduler: Any,
        safety_checker: Any,
        feature_extractor: Any,
        requires_safety_checker: bool = True,
    ):
        self._assemble(locals())

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        prompt: Prompt = None,
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: Prompt = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        callback: Any = None,
        callback_steps: int = 1,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        adapter_conditioning_scale: float | Sequence[float] = 1.0,
        clip_skip: int | None = None,
    ) -> PipelineOutput | tuple[Any, ...]:
        """Paint ``prompt`` under the control picture ``image``."""
        return self._run(locals())


class StableDiffusionXLAdapterPipeline(StableDiffusionXLPipeline):
    """Text to image under T2I-Adapters, with SDXL."""

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        unet: Any,
        adapter: Any,
        scheduler: Any,
        force_zeros_for_empty_prompt: bool = True,
        feature_extractor: Any = None,
        image_encoder: Any = None,
    ):
        self._assemble(locals())

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        prompt: Prompt = None,
        prompt_2: Prompt = None,
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        denoising_end: float | None = None,
        guidance_scale: float = 5.0,
        negative_prompt: Prompt = None,
        negative_prompt_2: Prompt = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Sequence[Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        callback: Any = None,
        callback_steps: int = 1,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        negative_original_size: Size | None = None,
        negative_crops_coords_top_left: Size = (0, 0),
        negative_target_size: Size | None = None,
        adapter_conditioning_scale: float | Sequence[float] = 1.0,
        adapter_conditioning_factor: float = 1.0,
        clip_skip: int | None = None,
    ) -> PipelineOutput | tuple[Any, ...]:
        """Paint ``prompt`` under the control picture ``image``."""
        return self._run(locals())
