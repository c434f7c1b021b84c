"""Fourstroke: Stable Diffusion pictures in one to eight steps.

The public names are imported when they are first used, so that ``import fourstroke`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module that has it.
_EXPORTS = {
    "AutoPipelineForText2Image": "pipelines.auto",
    "AutoencoderKL": "models.vae",
    "AutoencoderTiny": "models.vae_tiny",
    "CLIPTextModel": "models.clip",
    "CLIPTextModelWithProjection": "models.clip",
    "DDIMScheduler": "schedulers",
    "DPMSolverMultistepScheduler": "schedulers",
    "DiffusionPipeline": "pipelines.pipeline",
    "Engine": "engine",
    "EulerAncestralDiscreteScheduler": "schedulers",
    "EulerDiscreteScheduler": "schedulers",
    "GenerateRequest": "request",
    "GenerateResult": "request",
    "LCMScheduler": "schedulers",
    "LatentConsistencyModelPipeline": "pipelines.stable_diffusion",
    "MotionAdapter": "models.motion",
    "StableDiffusionPipeline": "pipelines.stable_diffusion",
    "StableDiffusionXLPipeline": "pipelines.stable_diffusion",
    "TCDScheduler": "schedulers",
    "Tokenizer": "text",
    "UNet2DConditionModel": "models.unet",
    "UnsupportedConfig": "config",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from .config import UnsupportedConfig
    from .engine import Engine
    from .models.clip import CLIPTextModel, CLIPTextModelWithProjection
    from .models.motion import MotionAdapter
    from .models.unet import UNet2DConditionModel
    from .models.vae import AutoencoderKL
    from .models.vae_tiny import AutoencoderTiny
    from .pipelines.auto import AutoPipelineForText2Image
    from .pipelines.pipeline import DiffusionPipeline
    from .pipelines.stable_diffusion import (
        LatentConsistencyModelPipeline,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    )
    from .request import GenerateRequest, GenerateResult
    from .schedulers import (
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        LCMScheduler,
        TCDScheduler,
    )
    from .text import Tokenizer


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
