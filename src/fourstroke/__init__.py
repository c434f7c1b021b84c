"""Fourstroke: Stable Diffusion pictures in one to eight steps.

The public names are imported when they are first used, so that ``import fourstroke`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module that has it.
_EXPORTS = {
    "AnimateDiffControlNetPipeline": "pipelines.animatediff",
    "AnimateDiffPipeline": "pipelines.animatediff",
    "AnimateDiffSDXLPipeline": "pipelines.animatediff",
    "AnimateDiffVideoToVideoControlNetPipeline": "pipelines.animatediff",
    "AnimateDiffVideoToVideoPipeline": "pipelines.animatediff",
    "AutoPipelineForImage2Image": "pipelines.auto",
    "AutoPipelineForInpainting": "pipelines.auto",
    "AutoPipelineForText2Image": "pipelines.auto",
    "AutoencoderKL": "models.vae",
    "AutoencoderTiny": "models.vae_tiny",
    "CLIPImageProcessor": "models.clip_vision",
    "CLIPTextModel": "models.clip",
    "CLIPTextModelWithProjection": "models.clip",
    "CLIPVisionModelWithProjection": "models.clip_vision",
    "Control": "request",
    "ControlNetModel": "models.controlnet",
    "DDIMScheduler": "schedulers",
    "DDPMScheduler": "schedulers",
    "DEISMultistepScheduler": "schedulers",
    "DPMSolverMultistepScheduler": "schedulers",
    "DPMSolverSDEScheduler": "schedulers",
    "DPMSolverSinglestepScheduler": "schedulers",
    "DiffusionPipeline": "pipelines.pipeline",
    "EDMEulerScheduler": "schedulers",
    "Engine": "engine",
    "EulerAncestralDiscreteScheduler": "schedulers",
    "EulerDiscreteScheduler": "schedulers",
    "FreeInit": "request",
    "GenerateRequest": "request",
    "GenerateResult": "request",
    "HeunDiscreteScheduler": "schedulers",
    "KDPM2AncestralDiscreteScheduler": "schedulers",
    "KDPM2DiscreteScheduler": "schedulers",
    "LCMScheduler": "schedulers",
    "LMSDiscreteScheduler": "schedulers",
    "LatentConsistencyModelImg2ImgPipeline": "pipelines.image_to_image",
    "LatentConsistencyModelPipeline": "pipelines.stable_diffusion",
    "MotionAdapter": "models.motion",
    "MultiAdapter": "models.t2i_adapter",
    "MultiControlNetModel": "models.controlnet",
    "PNDMScheduler": "schedulers",
    "StableDiffusionAdapterPipeline": "pipelines.adapter",
    "StableDiffusionControlNetImg2ImgPipeline": "pipelines.controlnet",
    "StableDiffusionControlNetInpaintPipeline": "pipelines.controlnet",
    "StableDiffusionControlNetPipeline": "pipelines.controlnet",
    "StableDiffusionImg2ImgPipeline": "pipelines.image_to_image",
    "StableDiffusionInpaintPipeline": "pipelines.inpaint",
    "StableDiffusionPipeline": "pipelines.stable_diffusion",
    "StableDiffusionSafetyChecker": "models.safety",
    "StableDiffusionXLAdapterPipeline": "pipelines.adapter",
    "StableDiffusionXLControlNetImg2ImgPipeline": "pipelines.controlnet_xl",
    "StableDiffusionXLControlNetInpaintPipeline": "pipelines.controlnet_xl",
    "StableDiffusionXLControlNetPipeline": "pipelines.controlnet_xl",
    "StableDiffusionXLImg2ImgPipeline": "pipelines.image_to_image",
    "StableDiffusionXLInpaintPipeline": "pipelines.inpaint",
    "StableDiffusionXLPipeline": "pipelines.stable_diffusion",
    "T2IAdapter": "models.t2i_adapter",
    "TCDScheduler": "schedulers",
    "Tokenizer": "text",
    "UNet2DConditionModel": "models.unet",
    "UniPCMultistepScheduler": "schedulers",
    "UnsupportedConfig": "config",
    "Windows": "request",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from .config import UnsupportedConfig
    from .engine import Engine
    from .models.clip import CLIPTextModel, CLIPTextModelWithProjection
    from .models.clip_vision import CLIPImageProcessor, CLIPVisionModelWithProjection
    from .models.controlnet import ControlNetModel, MultiControlNetModel
    from .models.motion import MotionAdapter
    from .models.safety import StableDiffusionSafetyChecker
    from .models.t2i_adapter import MultiAdapter, T2IAdapter
    from .models.unet import UNet2DConditionModel
    from .models.vae import AutoencoderKL
    from .models.vae_tiny import AutoencoderTiny
    from .pipelines.adapter import StableDiffusionAdapterPipeline, StableDiffusionXLAdapterPipeline
    from .pipelines.animatediff import (
        AnimateDiffControlNetPipeline,
        AnimateDiffPipeline,
        AnimateDiffSDXLPipeline,
        AnimateDiffVideoToVideoControlNetPipeline,
        AnimateDiffVideoToVideoPipeline,
    )
    from .pipelines.auto import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image
    from .pipelines.controlnet import (
        StableDiffusionControlNetImg2ImgPipeline,
        StableDiffusionControlNetInpaintPipeline,
        StableDiffusionControlNetPipeline,
    )
    from .pipelines.controlnet_xl import (
        StableDiffusionXLControlNetImg2ImgPipeline,
        StableDiffusionXLControlNetInpaintPipeline,
        StableDiffusionXLControlNetPipeline,
    )
    from .pipelines.image_to_image import (
        LatentConsistencyModelImg2ImgPipeline,
        StableDiffusionImg2ImgPipeline,
        StableDiffusionXLImg2ImgPipeline,
    )
    from .pipelines.inpaint import StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline
    from .pipelines.pipeline import DiffusionPipeline
    from .pipelines.stable_diffusion import (
        LatentConsistencyModelPipeline,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    )
    from .request import Control, FreeInit, GenerateRequest, GenerateResult, Windows
    from .schedulers import (
        DDIMScheduler,
        DDPMScheduler,
        DEISMultistepScheduler,
        DPMSolverMultistepScheduler,
        DPMSolverSDEScheduler,
        DPMSolverSinglestepScheduler,
        EDMEulerScheduler,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        KDPM2AncestralDiscreteScheduler,
        KDPM2DiscreteScheduler,
        LCMScheduler,
        LMSDiscreteScheduler,
        PNDMScheduler,
        TCDScheduler,
        UniPCMultistepScheduler,
    )
    from .text import Tokenizer


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        from .left_out import NAMES, PAGE

        if name in NAMES:
            # An AttributeError would become "cannot import name" in an import statement, without the way out.
            raise ImportError(f"fourstroke has no {name}, which diffusers has: {NAMES[name]}. See {PAGE}.")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
