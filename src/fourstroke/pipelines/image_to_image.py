"""Image to image: a start picture, of which ``strength`` says how much may change.

Signatures and defaults are diffusers'. Each ``__call__`` hands its arguments to `fourstroke.pipelines.arguments`, which
makes a `GenerateRequest` of them; what an argument means is said there. Sizes are in pixels. Every ``__call__`` raises
ValueError or TypeError for arguments that break a rule, before any network runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..request import Generators, Prompt, Size
from .arguments import StepCallback
from .run import PipelineOutput
from .stable_diffusion import LatentConsistencyModelPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline


class StableDiffusionImg2ImgPipeline(StableDiffusionPipeline):
    """SDEdit (Meng et al. 2021) with Stable Diffusion."""

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        prompt: Prompt = None,
        image: Any = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: Prompt = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
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
        """Repaint ``image`` by ``prompt``; the last ``strength`` part of the schedule runs, one step at least."""
        return self._run(locals())


class StableDiffusionXLImg2ImgPipeline(StableDiffusionXLPipeline):
    """SDEdit with SDXL; also its refiner, which reads an aesthetic score."""

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
        requires_aesthetics_score: bool = False,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ):
        self._assemble(locals())

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        prompt: Prompt = None,
        prompt_2: Prompt = None,
        image: Any = None,
        strength: float = 0.3,
        num_inference_steps: int = 50,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        denoising_start: float | None = None,
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
        aesthetic_score: float = 6.0,
        negative_aesthetic_score: float = 2.5,
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **kwargs: Any,
    ) -> PipelineOutput | tuple[Any, ...]:
        """Repaint ``image`` by ``prompt``; ``denoising_start`` takes latents that another model left half-way."""
        return self._run(locals())


class LatentConsistencyModelImg2ImgPipeline(LatentConsistencyModelPipeline):
    """SDEdit with full latent consistency models; ``strength`` shortens the noise range, all steps run."""

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        prompt: Prompt = None,
        image: Any = None,
        num_inference_steps: int = 4,
        strength: float = 0.8,
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
        """Repaint ``image`` by ``prompt``."""
        return self._run(locals(), strength_mode="noise", decode_denoised=True)
