"""Text to image with the names, signatures and defaults of diffusers: Stable Diffusion, SDXL, full LCM.

Each ``__call__`` only fills a `GenerateRequest`. Arguments that are not described here are described there; all
sizes are in pixels. Every ``__call__`` raises ValueError or TypeError for arguments that break a rule, before
any network runs, and NotImplementedError for IP-Adapter arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..conditioning import encode_text
from ..loading import warn_unknown
from ..request import GenerateRequest, Generators, Prompt
from .pipeline import DiffusionPipeline, PipelineOutput, StepCallback


class StableDiffusionPipeline(DiffusionPipeline):
    """Stable Diffusion 1.5 and 2.x and their fine-tunes (Rombach et al. 2022)."""

    component_names = (
        "vae",
        "text_encoder",
        "tokenizer",
        "unet",
        "scheduler",
        "safety_checker",
        "feature_extractor",
        "image_encoder",
    )

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
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        self.requires_safety_checker = requires_safety_checker

    @property
    def settings(self) -> dict[str, Any]:
        """The entries of ``model_index.json`` that are no components."""
        return {"requires_safety_checker": self.requires_safety_checker}

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

    def __call__(
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
        """Paint pictures of ``prompt``.

        Args:
            cross_attention_kwargs: ``{"scale": s}`` multiplies the weight of every active LoRA.
            callback_on_step_end: called as ``f(pipe, step, timestep, tensors)`` after each step; the tensors that it
                returns replace the loop's.
            callback_on_step_end_tensor_inputs: names of the tensors to hand to it.
            return_dict: return a `PipelineOutput` instead of a plain tuple.

        Returns:
            The pictures, prompts outermost, and the safety checker's verdicts (None without a checker).
        """
        refuse_ip_adapter(ip_adapter_image, ip_adapter_image_embeds)
        request = GenerateRequest(
            prompt=prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt or 1,
            eta=eta,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type=output_type or "pil",
            guidance_rescale=guidance_rescale,
            clip_skip=clip_skip,
        )
        return self._call(
            request,
            cross_attention_kwargs=cross_attention_kwargs,
            callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
            return_dict=return_dict,
            unknown=kwargs,
        )


class StableDiffusionXLPipeline(DiffusionPipeline):
    """SDXL, SSD-1B and their fine-tunes (Podell et al. 2023; Gupta et al. 2024)."""

    component_names = (
        "vae",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "unet",
        "scheduler",
        "image_encoder",
        "feature_extractor",
    )

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
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self.force_zeros_for_empty_prompt = force_zeros_for_empty_prompt
        if add_watermarker:
            warn_unknown("StableDiffusionXLPipeline (no watermark is put into pictures)", {"add_watermarker": True})

    @property
    def settings(self) -> dict[str, Any]:
        """The entries of ``model_index.json`` that are no components."""
        return {"force_zeros_for_empty_prompt": self.force_zeros_for_empty_prompt}

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

    def __call__(
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
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = (0, 0),
        negative_target_size: tuple[int, int] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **kwargs: Any,
    ) -> PipelineOutput | tuple[Any, ...]:
        """Paint pictures of ``prompt``; see `StableDiffusionPipeline.__call__` and `GenerateRequest`."""
        refuse_ip_adapter(ip_adapter_image, ip_adapter_image_embeds)
        request = GenerateRequest(
            prompt=prompt,
            prompt_2=prompt_2,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            denoising_end=denoising_end,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            num_images_per_prompt=num_images_per_prompt or 1,
            eta=eta,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            output_type=output_type or "pil",
            guidance_rescale=guidance_rescale,
            original_size=original_size,
            crops_coords_top_left=crops_coords_top_left,
            target_size=target_size,
            negative_original_size=negative_original_size,
            negative_crops_coords_top_left=negative_crops_coords_top_left,
            negative_target_size=negative_target_size,
            clip_skip=clip_skip,
        )
        return self._call(
            request,
            cross_attention_kwargs=cross_attention_kwargs,
            callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
            return_dict=return_dict,
            unknown=kwargs,
        )


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
        """Paint pictures of ``prompt``; see `StableDiffusionPipeline.__call__` and `GenerateRequest`.

        Raises:
            ValueError: the UNet has no guidance embedding, so that it is not a full LCM.
        """
        refuse_ip_adapter(ip_adapter_image, ip_adapter_image_embeds)
        if self.unet.config.time_cond_proj_dim is None:
            raise ValueError(
                "This UNet has no guidance embedding (time_cond_proj_dim), so it is not a full LCM; run it with "
                "StableDiffusionPipeline and, for few steps, an LCM-LoRA."
            )
        request = GenerateRequest(
            prompt=prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            original_inference_steps=original_inference_steps,
            timesteps=timesteps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt or 1,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            output_type=output_type or "pil",
            clip_skip=clip_skip,
        )
        return self._call(
            request,
            cross_attention_kwargs=cross_attention_kwargs,
            callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
            return_dict=return_dict,
            unknown=kwargs,
            decode_denoised=True,
        )


def refuse_ip_adapter(image: Any, embeds: Any) -> None:
    """Raise NotImplementedError when an IP-Adapter's picture is given: those are not run yet."""
    if image is not None or embeds is not None:
        raise NotImplementedError(
            "IP-Adapter is not supported: leave ip_adapter_image and ip_adapter_image_embeds out."
        )
