"""Noise schedulers: LCM first, and those that people compare it with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import UnsupportedConfig
from .base import Scheduler, SchedulerConfig, SchedulerOutput
from .config_only import ConfigOnly
from .ddim import DDIMScheduler, DDIMSchedulerOutput
from .dpmpp import DPMSolverMultistepScheduler
from .euler import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, EulerSchedulerOutput
from .lcm import LCMScheduler, LCMSchedulerOutput, boundary_scalings, lcm_step, lcm_timesteps
from .tcd import TCDScheduler, TCDSchedulerOutput

__all__ = [
    "ConfigOnly",
    "DDIMScheduler",
    "DDIMSchedulerOutput",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerSchedulerOutput",
    "LCMScheduler",
    "LCMSchedulerOutput",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerOutput",
    "TCDScheduler",
    "TCDSchedulerOutput",
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


def load_scheduler(class_name: str, config: Mapping[str, Any]) -> Scheduler:
    """The scheduler ``class_name`` with ``config``; a `ConfigOnly` when its class, or an option of it, is not run here.

    Args:
        class_name: of diffusers, as in ``model_index.json``.
        config: the mapping in ``scheduler_config.json``.
    """
    named = {**config, "_class_name": class_name}
    if class_name not in _CLASSES:
        return ConfigOnly(named)
    try:
        return _CLASSES[class_name].from_config(named)
    except UnsupportedConfig as error:
        return ConfigOnly(named, reason=str(error))
