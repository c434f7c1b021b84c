"""Text to image: Stable Diffusion, SDXL, full latent consistency models.

Signatures and defaults are diffusers'. Each ``__call__`` hands its arguments to `fourstroke.pipelines.arguments`, which
makes a `GenerateRequest` of them; what an argument means is said there. Sizes are in pixels. Every ``__call__`` raises
ValueError or TypeError for arguments that break a rule, before any network runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..conditioning import encode_text
from ..request import GenerateRequest, Generators, Prompt, Size
from .arguments import StepCallback
from .pipeline import DiffusionPipeline
from .run import PipelineOutput


class StableDiffusionPipeline(DiffusionPipeline):
    """Stable Diffusion 1.5 and 2.x and their fine-tunes (Rombach et al. 2022)."""

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        scheduler: Any,
        safety_checker: Any,
        feature_extractor: Any,
        image_encoder: Any = None,
        requires_safety_checker: bool = True,
    ):
        self._assemble(locals())

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: Prompt,
        device: torch.device | str | None,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: Prompt = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The prompts' and the negative prompts' embeddings, (prompts * images, L, D) each, on ``device``.

        The second is None without guidance.
        """
        request = GenerateRequest(
            prompt=prompt,
            num_images_per_prompt=num_images_per_prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            clip_skip=clip_skip,
        )
        self.merge_adapters(1.0 if lora_scale is None else lora_scale)
        positive, negative = encode_text(self._parts(), request, do_classifier_free_guidance)
        device = device or self.device
        return positive.embeds.to(device), None if negative is None else negative.embeds.to(device)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        prompt: Prompt = None,
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
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Sequence[Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **kwargs: Any,
    ) -> PipelineOutput | tuple[Any, ...]:
        """Paint pictures of ``prompt``."""
        return self._run(locals())


class StableDiffusionXLPipeline(DiffusionPipeline):
    """SDXL, SSD-1B and their fine-tunes (Podell et al. 2023; Gupta et al. 2024)."""

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        unet: Any,
        scheduler: Any,
        image_encoder: Any = None,
        feature_extractor: Any = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ):
        self._assemble(locals())

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: Prompt,
        prompt_2: Prompt = None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: Prompt = None,
        negative_prompt_2: Prompt = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Embeddings (prompts * images, L, D) of the prompts and negative prompts, then the pooled ones (…, P).

        The negative ones are None without guidance.
        """
        request = GenerateRequest(
            prompt=prompt,
            prompt_2=prompt_2,
            num_images_per_prompt=num_images_per_prompt,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            clip_skip=clip_skip,
        )
        self.merge_adapters(1.0 if lora_scale is None else lora_scale)
        positive, negative = encode_text(self._parts(), request, do_classifier_free_guidance)
        device = device or self.device
        embeds, pooled = positive.embeds.to(device), positive.pooled.to(device)
        if negative is None:
            return embeds, None, pooled, None
        return embeds, negative.embeds.to(device), pooled, negative.pooled.to(device)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        prompt: Prompt = None,
        prompt_2: Prompt = None,
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
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        negative_original_size: Size | None = None,
        negative_crops_coords_top_left: Size = (0, 0),
        negative_target_size: Size | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **kwargs: Any,
    ) -> PipelineOutput | tuple[Any, ...]:
        """Paint pictures of ``prompt``."""
        return self._run(locals())


class LatentConsistencyModelPipeline(StableDiffusionPipeline):
    """Full latent consistency models (Luo et al. 2023): guidance is an input of the UNet, not a second evaluation."""

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        prompt: Prompt = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 4,
        original_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        guidance_scale: float = 8.5,
        num_images_per_prompt: int | None = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Sequence[Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **kwargs: Any,
    ) -> PipelineOutput | tuple[Any, ...]:
        """Paint pictures of ``prompt``.

        Raises:
            ValueError: the UNet has no guidance embedding, so that it is not a full LCM.
        """
        arguments = locals()
        if self.unet.config.time_cond_proj_dim is None:
            raise ValueError(
                "This UNet has no guidance embedding (time_cond_proj_dim), so it is not a full LCM; run it with "
                "StableDiffusionPipeline and, for few steps, an LCM-LoRA."
            )
        return self._run(arguments, decode_denoised=True)
