"""Pictures while training: deterministic DDIM with guidance, in latents, and a quick look at what the words bind to.

Used between training steps only, on networks that live in memory; `evaluate.py` judges what is exported, through
fourstroke's own pipelines.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fourstroke.schedulers.ddim import DDIMScheduler
from fourstroke.schedulers.lcm import LCMScheduler

SCHEDULE = {
    "num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "epsilon",
}  # fmt: skip
Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]  # (latents, timesteps, text) -> predicted noise


@torch.no_grad()
def ddim(denoiser: Denoiser, text: Tensor, empty: Tensor, steps: int, guidance: float, seed: int = 0) -> Tensor:
    """Latents (B, 4, 16, 16) for text (B, L, D); ``empty`` (1, L, D) is the unconditional text."""
    scheduler = DDIMScheduler.from_config(SCHEDULE)
    scheduler.set_timesteps(steps)
    latents = torch.randn(len(text), 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    for timestep in scheduler.timesteps:
        noise = denoiser(latents, timestep.expand(len(text)), text)
        if guidance > 1:
            plain = denoiser(latents, timestep.expand(len(text)), empty.expand_as(text))
            noise = plain + guidance * (noise - plain)
        latents = scheduler.step(noise, timestep, latents).prev_sample
    return latents


@torch.no_grad()
def consistency(denoiser: Denoiser, text: Tensor, steps: int, seed: int = 0) -> Tensor:
    """Latents (B, 4, 16, 16) by ``steps`` LCM steps without guidance."""
    scheduler = LCMScheduler.from_config(SCHEDULE)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(text), 4, 16, 16, generator=generator)
    for timestep in scheduler.timesteps:
        noise = denoiser(latents, timestep.expand(len(text)), text)
        latents = scheduler.step(noise, timestep, latents, generator=generator).prev_sample
    return latents


def retrieval(latents: Tensor, own: Tensor, plain: Tensor) -> tuple[float, float]:
    """How often the nearest plain latents (top 1, top 5) are those of the picture that was asked for."""
    distances = torch.cdist(latents.flatten(1), plain.flatten(1))
    ranks = (distances < distances.gather(1, own[:, None])).sum(1)
    return (ranks < 1).float().mean().item(), (ranks < 5).float().mean().item()
