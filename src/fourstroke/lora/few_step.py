"""Few-step adapters and checkpoints that are known by name, and how their authors run them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any


@dataclass(frozen=True)
class Settings:
    """How to run a few-step adapter or checkpoint.

    Attributes:
        method: its common name.
        scheduler: class name of the noise scheduler, in `fourstroke.schedulers`.
        num_inference_steps: number of steps.
        guidance_scale: 1 is no guidance; authors write 0 for that.
        scheduler_options: arguments for ``Scheduler.from_config``.
        timesteps: what to run in place of the scheduler's own ``num_inference_steps`` timesteps, or None.
        eta: stochasticity of DDIM and TCD.
        weight: of the adapter.
    """

    method: str
    scheduler: str
    num_inference_steps: int
    guidance_scale: float = 1.0
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    timesteps: tuple[int, ...] | None = None
    eta: float = 0.0
    weight: float = 1.0


_TRAILING = {"timestep_spacing": "trailing"}
_PCM = {**_TRAILING, "clip_sample": False, "set_alpha_to_one": False}

KNOWN: tuple[tuple[str, Settings], ...] = (
    # wangfuyun/AnimateLCM
    (r"animate-?lcm", Settings("AnimateLCM", "LCMScheduler", 6, 2.0, {"beta_schedule": "linear"}, weight=0.8)),
    # ByteDance/Hyper-SD; those named CFG were trained to keep guidance of 5 to 8
    (r"hyper-?sd(?!3).*\b1-?step-unet", Settings("Hyper-SD", "LCMScheduler", 1, timesteps=(800,))),
    (r"hyper-?sd(?!3).*\b1-?step", Settings("Hyper-SD", "TCDScheduler", 1, eta=1.0)),
    (r"hyper-?sd(?!3).*cfg", Settings("Hyper-SD (CFG preserved)", "DDIMScheduler", 8, 5.0, _TRAILING)),
    (r"hyper-?sd(?!3)", Settings("Hyper-SD", "DDIMScheduler", 4, 1.0, _TRAILING)),
    # ByteDance/AnimateDiff-Lightning
    (
        r"animate-?diff-?lightning",
        Settings("AnimateDiff-Lightning", "EulerDiscreteScheduler", 4, 1.0, {**_TRAILING, "beta_schedule": "linear"}),
    ),
    # ByteDance/SDXL-Lightning; its model of one step predicts the sample
    (
        r"xl-?lightning.*\b1-?step",
        Settings("SDXL-Lightning", "EulerDiscreteScheduler", 1, 1.0, {**_TRAILING, "prediction_type": "sample"}),
    ),
    (
        r"xl-?lightning|\blightning-?\d+-?step",
        Settings("SDXL-Lightning", "EulerDiscreteScheduler", 4, 1.0, _TRAILING),
    ),
    # tianweiy/DMD2
    (r"\bdmd2\b.*\b1-?step", Settings("DMD2", "LCMScheduler", 1, timesteps=(399,))),
    (r"\bdmd2\b", Settings("DMD2", "LCMScheduler", 4, timesteps=(999, 749, 499, 249))),
    # h1t/TCD-SDXL-LoRA
    (r"\btcd\b", Settings("TCD", "TCDScheduler", 4, eta=0.3)),
    # wangfuyun/PCM_Weights; normalcfg wants guidance of 2.5 to 3.5 at 4 steps and of 3 to 6 at 8, smallcfg of 1 to 2
    (r"\bpcm\b.*lcm-?like", Settings("PCM (like LCM)", "LCMScheduler", 4)),
    (r"\bpcm\b.*normal-?cfg", Settings("PCM (normal CFG)", "DDIMScheduler", 4, 3.0, _PCM)),
    (r"\bpcm\b", Settings("PCM", "DDIMScheduler", 4, 1.0, _PCM)),
    # stabilityai/sdxl-turbo and sd-turbo
    (r"\bsd-?(xl-?)?turbo\b", Settings("Turbo", "EulerAncestralDiscreteScheduler", 1, 1.0, _TRAILING)),
    # SimianLuo/LCM_Dreamshaper_v7, latent-consistency/lcm-sdxl and lcm-ssd-1b: guidance is an input of these UNets
    (r"\blcm-(dreamshaper|sdxl|ssd)(?!.*lora)", Settings("LCM", "LCMScheduler", 4, 8.0)),
    # latent-consistency/lcm-lora-sdv1-5, -sdxl, -ssd-1b
    (r"\blcm\b", Settings("LCM-LoRA", "LCMScheduler", 4)),
)
"""Pattern over a name in lower case with hyphens for underscores and spaces -> how to run it; the first match holds.
The values are those of the model cards of the repositories named beside them."""

NAMING = ("modelspec.title", "ss_output_name", "name", "title")
"""Header entries that may name the method."""

_NAMELESS = r"(pytorch_lora_weights|adapter_model|diffusion_pytorch_model|model)(\.\w+)?\.safetensors"


def recommended(name: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> Settings | None:
    """Return how to run a few-step adapter or checkpoint, or None when it is not known to be one.

    Args:
        name: hub id, file name or path. Its last part counts, and the folder or repository of a file whose own name
            says nothing, such as ``pytorch_lora_weights.safetensors``. The number of steps is read from it too.
        metadata: the text entries of the file's header, which count when the name says nothing.
    """
    labels = [*_labels(PurePath(name).parts), *((metadata or {}).get(key, "") for key in NAMING)]
    for label in labels:
        text = re.sub(r"[_\s]+", "-", label.lower())
        for pattern, settings in KNOWN:
            if re.search(pattern, text):
                steps = re.search(r"\b(\d+)-?steps?\b", text)
                timed = settings.timesteps is not None
                return settings if steps is None or timed else replace(settings, num_inference_steps=int(steps[1]))
    return None


def _labels(parts: Sequence[str]) -> Sequence[str]:
    if len(parts) < 2 or not re.fullmatch(_NAMELESS, parts[-1]):
        return parts[-1:]
    # In the hub's cache a file lies in models--owner--name/snapshots/commit.
    return parts[-4:-3] if "snapshots" in parts[-3:-2] else parts[-2:-1]
