"""The loop: prepare -> steps -> decode. Every task of Fourstroke is a condition of this one loop."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .conditioning import Components, encode_text, guidance_embedding, guide, micro_conditioning
from .models.vae import AutoencoderKL
from .models.vae_tiny import AutoencoderTiny
from .random import generators_for_seeds, randn_tensor
from .request import GenerateRequest


@dataclass
class DenoiseState:
    """Everything that a step reads; whoever drives the loop may change it between two steps.

    Attributes:
        latents: (N, 4, h, w), noisy, in the scheduler's scale.
        timesteps: (steps,) on the network's device.
        prompt_embeds: (N, L, D), or (2N, L, D) with the unconditional rows first when ``guided``.
        negative_prompt_embeds: the unconditional rows alone, for callbacks.
        add_text_embeds, add_time_ids: SDXL's pooled text (rows, P) and sizes (rows, 6).
        timestep_cond: guidance embedding (N, time_cond_proj_dim) of a full LCM.
        step_options: further arguments of the scheduler's step (``generator``, ``eta``).
        index, timestep: the step that ran last.
        denoised: (N, 4, h, w) the scheduler's estimate of the clean latents at that step, where it gives one.
    """

    latents: Tensor
    timesteps: Tensor
    prompt_embeds: Tensor
    guided: bool = False
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    negative_prompt_embeds: Tensor | None = None
    add_text_embeds: Tensor | None = None
    add_time_ids: Tensor | None = None
    timestep_cond: Tensor | None = None
    step_options: dict[str, Any] = field(default_factory=dict)
    index: int = -1
    timestep: Tensor | None = None
    denoised: Tensor | None = None

    @property
    def added_cond_kwargs(self) -> dict[str, Tensor] | None:
        """SDXL's second conditioning in the form that the UNet takes."""
        if self.add_text_embeds is None or self.add_time_ids is None:
            return None
        return {"text_embeds": self.add_text_embeds, "time_ids": self.add_time_ids}


def picture_size(parts: Components, request: GenerateRequest) -> tuple[int, int]:
    """Height and width in pixels: what was asked for, or the model's own size.

    Raises:
        ValueError: not a positive multiple of the VAE's factor.
    """
    factor = parts.vae.downscale
    own = parts.unet.config.sample_size or (128 if parts.xl else 64)
    own_height, own_width = own if isinstance(own, tuple) else (own, own)
    size = request.height or own_height * factor, request.width or own_width * factor
    for name, value in zip(("height", "width"), size, strict=True):
        if value <= 0 or value % factor:
            down, up = value // factor * factor, (value // factor + 1) * factor
            raise ValueError(
                f"{name} is {value}; it must be a multiple of {factor}, such as {max(down, factor)} or {up}."
            )
    return size


def make_schedule(scheduler: Any, request: GenerateRequest, device: torch.device) -> Tensor:
    """Set the scheduler's timesteps for ``request`` and return them, (steps,) on ``device``.

    Raises:
        ValueError: the request has custom timesteps, sigmas or a training grid that this scheduler does not take.
    """
    wanted = {
        "timesteps": request.timesteps,
        "sigmas": request.sigmas,
        "original_inference_steps": request.original_inference_steps,
    }
    options = {name: value for name, value in wanted.items() if value is not None}
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    for name in options:
        if name not in accepted:
            raise ValueError(f"{type(scheduler).__name__} takes no {name}; leave it out or use another scheduler.")
    if not options.keys() & {"timesteps", "sigmas"}:
        options["num_inference_steps"] = request.num_inference_steps
    scheduler.set_timesteps(**options, device=device)
    if hasattr(scheduler, "set_begin_index"):
        # Without it the first step looks the timestep up, which waits for the device.
        scheduler.set_begin_index(0)
    timesteps = scheduler.timesteps
    if request.denoising_end is not None and request.denoising_end < 1:
        total = scheduler.config.num_train_timesteps
        timesteps = timesteps[timesteps >= round(total - request.denoising_end * total)]
    return timesteps


@torch.no_grad()
def prepare(parts: Components, request: GenerateRequest) -> DenoiseState:
    """Check the request against the model and compute everything that the steps do not change.

    Random numbers are drawn in diffusers' order: first the start noise, then, during the steps, the scheduler's.

    Raises:
        ValueError: the request does not fit the model; no network has run by then.
    """
    height, width = picture_size(parts, request)
    unet, factor, batch = parts.unet, parts.vae.downscale, request.batch_size
    shape = (batch, unet.config.in_channels, height // factor, width // factor)
    if request.latents is not None and request.latents.shape != shape:
        raise ValueError(f"latents are {tuple(request.latents.shape)}; this request needs {shape}.")
    generator = request.generator
    if generator is None and request.seed is not None:
        generator = generators_for_seeds(request.seed, batch)
    guided = parts.guided(request.guidance_scale)
    _warn_about_guidance(parts, request, guided)

    positive, negative = encode_text(parts, request, guided)
    rows = positive if negative is None else _stack(negative, positive)
    dtype, device = positive.embeds.dtype, unet.device
    timesteps = make_schedule(parts.scheduler, request, device)
    noise = request.latents
    if noise is None:
        noise = randn_tensor(shape, generator, device=device, dtype=dtype)
    scheduler = parts.scheduler
    state = DenoiseState(
        latents=noise.to(device) * scheduler.init_noise_sigma,
        timesteps=timesteps,
        prompt_embeds=rows.embeds.to(device),
        guided=guided,
        guidance_scale=request.guidance_scale,
        guidance_rescale=request.guidance_rescale,
        negative_prompt_embeds=None if negative is None else negative.embeds,
    )
    if parts.xl:
        state.add_text_embeds = rows.pooled.to(device)
        state.add_time_ids = micro_conditioning(request, (height, width), guided, dtype).to(device)
    if unet.config.time_cond_proj_dim is not None:
        embedding = guidance_embedding(request.guidance_scale, batch, unet.config.time_cond_proj_dim)
        state.timestep_cond = embedding.to(device, dtype)
    accepted = inspect.signature(scheduler.step).parameters
    options = {"generator": generator, "eta": request.eta}
    state.step_options = {name: value for name, value in options.items() if name in accepted}
    return state


def _stack(first: Any, second: Any) -> Any:
    return type(first)(torch.cat([first.embeds, second.embeds]), torch.cat([first.pooled, second.pooled]))


def _warn_about_guidance(parts: Components, request: GenerateRequest, guided: bool) -> None:
    if guided and request.guidance_scale > 2 and type(parts.scheduler).__name__ == "LCMScheduler":
        warnings.warn(
            f"guidance_scale is {request.guidance_scale}: with an LCM-LoRA values above 2 burn the colours; 1.0 to 2.0 "
            "is its range.",
            stacklevel=2,
        )


@torch.no_grad()
def denoise(parts: Components, state: DenoiseState) -> Iterator[DenoiseState]:
    """Run the steps; after each, yield the state, which the caller may edit.

    Nothing here waits for the device: timesteps stay tensors, and the scheduler counts its steps itself.
    """
    unet, scheduler = parts.unet, parts.scheduler
    for index, timestep in enumerate(state.timesteps):
        inputs = torch.cat([state.latents] * 2) if state.guided else state.latents
        prediction = unet(
            scheduler.scale_model_input(inputs, timestep),
            timestep,
            state.prompt_embeds,
            added_cond_kwargs=state.added_cond_kwargs,
            timestep_cond=state.timestep_cond,
        )
        if state.guided:
            prediction = guide(prediction, state.guidance_scale, state.guidance_rescale)
        output = scheduler.step(prediction, timestep, state.latents, **state.step_options, return_dict=False)
        state.latents = output[0]
        state.denoised = output[1] if len(output) > 1 else None
        state.index, state.timestep = index, timestep
        yield state


@torch.no_grad()
def decode(vae: AutoencoderKL | AutoencoderTiny, latents: Tensor, *, upcast: bool = False) -> Tensor:
    """Latents (N, 4, h, w) in the UNet's scale -> pictures (N, 3, 8h, 8w), about [-1, 1].

    Args:
        vae: its ``scaling_factor`` and, where the configuration has them, mean and deviation are undone.
        latents: what the loop left.
        upcast: decode in float32 when a half-precision VAE asks for it (``force_upcast``: SDXL's overflows there).
    """
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        channels = (1, -1, 1, 1)
        latents = latents * latents.new_tensor(std).view(channels) / config.scaling_factor
        latents = latents + latents.new_tensor(mean).view(channels)
    else:
        latents = latents / config.scaling_factor
    dtype = vae.dtype
    if upcast and dtype == torch.float16 and config.force_upcast:
        # float16 -> float32 -> float16 changes no weight.
        vae.to(torch.float32)
        try:
            return vae.decode(latents.float())
        finally:
            vae.to(dtype)
    return vae.decode(latents.to(dtype))
