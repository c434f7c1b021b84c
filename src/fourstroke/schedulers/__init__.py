"""Noise schedulers: LCM first, and those that people compare it with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import UnsupportedConfig
from .base import Scheduler, SchedulerConfig, SchedulerOutput
from .config_only import (
    ConfigOnly,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverSDEScheduler,
    DPMSolverSinglestepScheduler,
    EDMEulerScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from .ddim import DDIMScheduler, DDIMSchedulerOutput
from .dpmpp import DPMSolverMultistepScheduler
from .euler import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, EulerSchedulerOutput
from .lcm import LCMScheduler, LCMSchedulerOutput, boundary_scalings, lcm_step, lcm_timesteps
from .tcd import TCDScheduler, TCDSchedulerOutput

__all__ = [
    "ConfigOnly",
    "DDIMScheduler",
    "DDIMSchedulerOutput",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerSchedulerOutput",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LCMSchedulerOutput",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerOutput",
    "TCDScheduler",
    "TCDSchedulerOutput",
    "UniPCMultistepScheduler",
    "boundary_scalings",
    "lcm_step",
    "lcm_timesteps",
    "load_scheduler",
]

_CLASSES: Mapping[str, type[Scheduler]] = {
    kind.__name__: kind
    for kind in (
        LCMScheduler,
        TCDScheduler,
        DDIMScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        DPMSolverMultistepScheduler,
    )
}

_KEPT: Mapping[str, type[ConfigOnly]] = {kind.__name__: kind for kind in ConfigOnly.__subclasses__()}


def load_scheduler(class_name: str, config: Mapping[str, Any]) -> Scheduler:
    """The scheduler ``class_name`` with ``config``; a `ConfigOnly` when its class, or an option of it, is not run here.

    Args:
        class_name: of diffusers, as in ``model_index.json``.
        config: the mapping in ``scheduler_config.json``.
    """
    named = {**config, "_class_name": class_name}
    if class_name not in _CLASSES:
        return _KEPT.get(class_name, ConfigOnly)(named)
    try:
        return _CLASSES[class_name].from_config(named)
    except UnsupportedConfig as error:
        return ConfigOnly(named, reason=str(error))
