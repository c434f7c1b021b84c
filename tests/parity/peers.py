"""diffusers' pipelines of every class, around tiny random networks that they share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import torch

from fourstroke.pipelines.components import PIPELINES

from .. import fakehub, fakenets
from .pictures import TEXTS

NAMES = [name for names in PIPELINES.values() for name in names]
STEERING: list[tuple[str, Callable[..., Any], Callable[..., Any]]] = [
    ("controlnet", fakenets.controlnet, diffusers.MultiControlNetModel),
    ("adapter", fakenets.t2i_adapter, diffusers.MultiAdapter),
]
STEERED = [name for name in NAMES if "ControlNet" in name or "Adapter" in name]


@functools.cache
def bases() -> dict[str, Any]:
    """diffusers' components by kind of model."""
    found = {
        "sd15": fakehub.stable_diffusion(fakehub.SD15, "sd15", TEXTS),
        "inpainting": fakehub.stable_diffusion(fakehub.INPAINTING, "inpainting", TEXTS),
        "lcm": fakehub.stable_diffusion(fakehub.DREAMSHAPER_LCM, "lcm", TEXTS),
        "xl": fakehub.stable_diffusion_xl(fakehub.XL, "xl", TEXTS),
    }
    for pipe in found.values():
        for tokenizer in (pipe.tokenizer, getattr(pipe, "tokenizer_2", pipe.tokenizer)):
            tokenizer.model_max_length = 77
        pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    return {kind: pipe.components for kind, pipe in found.items()}


def kind_of(name: str) -> str:
    if "XL" in name:
        return "xl"
    if name == "StableDiffusionInpaintPipeline":
        return "inpainting"
    return "lcm" if name.startswith("Latent") else "sd15"


def oracle(name: str, several: bool = False) -> Any:
    """diffusers' pipeline ``name``, with two networks of a kind if it is to have ``several``."""
    torch.manual_seed(fakehub.seed_of(name))
    given = {**bases()[kind_of(name)], "controlnet": None, "adapter": None, "motion_adapter": None}
    cls = getattr(diffusers, name)
    cls = getattr(diffusers, name)
    expected, _ = cls._get_signature_keys(cls)
    for part, make, multi in STEERING:
        if part not in expected:
            continue
        nets = [make(given["unet"]) for _ in range(1 + several)]
        given[part] = multi(nets) if several else nets[0]
    given["motion_adapter"] = fakenets.motion_adapter(given["unet"], frames=8, mid_block=True)
    pipe = cls(**{part: given.get(part) for part in expected if part in given})
    pipe.set_progress_bar_config(disable=True)
    return pipe
