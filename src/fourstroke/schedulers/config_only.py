"""A scheduler that is not run here, but whose configuration another can take over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from ..config import UnsupportedConfig
from .base import Scheduler, SchedulerConfig


class ConfigOnly(Scheduler):
    """What a repository's scheduler loads as when it is not run here.

    It can be saved, and `LCMScheduler.from_config(pipe.scheduler.config)` works; running it raises `UnsupportedConfig`.

    Args:
        config: the mapping in its ``scheduler_config.json``; ``_class_name`` is the name of its class.
        reason: why it is not run, when the class itself would be.
        options: further entries of the configuration.
    """

    def __init__(self, config: Mapping[str, Any] | None = None, reason: str = "", **options: Any):
        own = {} if type(self) is ConfigOnly else {"_class_name": type(self).__name__}
        self.config = SchedulerConfig({**(config or {}), **options, **own})
        self.reason = reason

    @property
    def class_name(self) -> str:
        """The name of the class that the configuration was made for."""
        return self.config.get("_class_name", "a scheduler without a _class_name")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Keep all of ``config``, with ``kwargs`` in place of its entries."""
        scheduler = cls({**config, **kwargs})
        return (scheduler, {}) if return_unused_kwargs else scheduler

    def _explain(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise `UnsupportedConfig`, which names the class and how to swap it."""
        why = f": {self.reason.rstrip('.')}" if self.reason else ""
        raise UnsupportedConfig(
            f"{self.class_name} is not run here{why}. Swap it: pipe.scheduler = "
            "LCMScheduler.from_config(pipe.scheduler.config) with an LCM-LoRA, or DPMSolverMultistepScheduler, "
            "EulerDiscreteScheduler or DDIMScheduler without."
        )

    set_timesteps = step = scale_model_input = add_noise = get_velocity = set_begin_index = _explain

    def __len__(self) -> int:
        return self.config.get("num_train_timesteps", 1000)


# The schedulers that people put into Stable Diffusion pipelines and that are not run here, so that code which only
# hands their configuration on needs no change.


class DDPMScheduler(ConfigOnly):
    """diffusers' scheduler of this name, as a configuration that others can take over."""


class PNDMScheduler(ConfigOnly):
    """diffusers' scheduler of this name, as a configuration that others can take over."""


class LMSDiscreteScheduler(ConfigOnly):
    """diffusers' scheduler of this name, as a configuration that others can take over."""


class HeunDiscreteScheduler(ConfigOnly):
    """diffusers' scheduler of this name, as a configuration that others can take over."""


class DPMSolverSinglestepScheduler(ConfigOnly):
    """diffusers' scheduler of this name, as a configuration that others can take over."""


class KDPM2DiscreteScheduler(ConfigOnly):
    """diffusers' scheduler of this name, as a configuration that others can take over."""


class KDPM2AncestralDiscreteScheduler(ConfigOnly):
    """diffusers' scheduler of this name, as a configuration that others can take over."""


class DEISMultistepScheduler(ConfigOnly):
    """diffusers' scheduler of this name, as a configuration that others can take over."""


class UniPCMultistepScheduler(ConfigOnly):
    """diffusers' scheduler of this name, as a configuration that others can take over."""


class DPMSolverSDEScheduler(ConfigOnly):
    """diffusers' scheduler of this name, as a configuration that others can take over."""


class EDMEulerScheduler(ConfigOnly):
    """diffusers' scheduler of this name, as a configuration that others can take over."""
