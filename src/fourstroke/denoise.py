"""The loop: prepare -> steps. Every task of Fourstroke is a condition of this one loop."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .animation import free_init_filter, free_init_steps, fuse, mix_frequencies, window_weights
from .conditioning import (
    Components,
    Steering,
    check_controls,
    encode_text,
    guesses,
    guidance_embedding,
    guide,
    micro_conditioning,
    steer,
    with_frames,
    without_frames,
)
from .latents import check_pictures, crop_box, picture_size, start_latents
from .models.unet import Residuals, add_residuals
from .random import generators_for_seeds, randn_tensor
from .request import FreeInit, GenerateRequest, Windows


@dataclass
class DenoiseState:
    """Everything that a step reads; whoever drives the loop may change it between two steps.

    N is the number of pictures or animations, F that of an animation's frames (1 for pictures); the network's batch has
    rows = N F, or 2 N F with the unconditional half first when ``guided``.

    Attributes:
        latents: (N, 4, h, w) or (N, 4, F, h, w), noisy, in the scheduler's scale.
        timesteps: (steps,) on the network's device.
        prompt_embeds: (rows, L, D).
        negative_prompt_embeds: the unconditional rows alone, for callbacks.
        add_text_embeds, add_time_ids: SDXL's pooled text (rows, P) and sizes (rows, 6).
        timestep_cond: guidance embedding (N, time_cond_proj_dim) of a full LCM.
        image_tokens: one (rows, tokens, D) an IP-Adapter.
        steering: ControlNets and T2I-Adapters.
        guess_mode: ControlNets steer the conditional half alone.
        mask, noise, image_latents, masked_image_latents: of inpainting, laid out as ``latents``; see `StartLatents`.
        windows: in which windows of frames the network runs.
        step_options: further arguments of the scheduler's step (``generator``, ``eta``).
        index, timestep: the step that ran last.
        denoised: the scheduler's estimate of the clean latents at that step, where it gives one.
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
    image_tokens: tuple[Tensor, ...] = ()
    steering: list[Steering] = field(default_factory=list)
    guess_mode: bool = False
    mask: Tensor | None = None
    noise: Tensor | None = None
    image_latents: Tensor | None = None
    masked_image_latents: Tensor | None = None
    windows: Windows | None = None
    step_options: dict[str, Any] = field(default_factory=dict)
    index: int = -1
    timestep: Tensor | None = None
    denoised: Tensor | None = None

    @property
    def frames(self) -> int:
        """Frames of an animation; 1 for pictures."""
        return self.latents.shape[2] if self.latents.ndim == 5 else 1

    def stop_guiding(self) -> None:
        """Run without guidance from the next step on: drop the unconditional half of whatever still has it."""
        rows = len(self.latents) * self.frames

        def half(values: Any) -> Any:
            return values if values is None or len(values) != 2 * rows else values.chunk(2)[1]

        self.guided = False
        self.prompt_embeds = half(self.prompt_embeds)
        self.add_text_embeds, self.add_time_ids = half(self.add_text_embeds), half(self.add_time_ids)
        self.image_tokens = tuple(half(tokens) for tokens in self.image_tokens)
        self.steering = [
            dataclasses.replace(
                steering, condition=half(steering.condition), features=tuple(half(value) for value in steering.features)
            )
            for steering in self.steering
        ]


def make_schedule(scheduler: Any, request: GenerateRequest, device: torch.device) -> Tensor:
    """Set the scheduler's timesteps for ``request`` and return those that run, (steps,) on ``device``.

    A start picture shortens the noise range or the schedule, as ``request.strength_mode`` says; one step always runs.

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
    custom = bool(options.keys() & {"timesteps", "sigmas"})
    change = request.change if request.image is not None and request.denoising_start is None else 1.0
    steps = request.num_inference_steps
    mode = "trim" if custom or change == 0 else request.strength_mode
    kept = None  # how many of the schedule's last steps run; None is all
    if mode == "noise" and change < 1 and "strength" in accepted:
        # A short noise range has fewer timesteps than may be asked for.
        grid = request.original_inference_steps or scheduler.config.original_inference_steps
        change = max(change, 1 / grid)
        steps = min(steps, int(grid * change))
        options["strength"] = change
    elif mode != "trim" and change < 1:
        steps, kept = int(steps / change), steps
    if not custom:
        options["num_inference_steps"] = steps
    scheduler.set_timesteps(**options, device=device)
    timesteps = scheduler.timesteps
    if mode == "trim":
        kept = int(len(timesteps) // scheduler.order * change)
    first = _first(scheduler, request, kept)
    if hasattr(scheduler, "set_begin_index"):
        # Without it the first step looks the timestep up, which waits for the device.
        scheduler.set_begin_index(first)
    timesteps = timesteps[first:]
    if request.denoising_end is not None and request.denoising_end < 1:
        total = scheduler.config.num_train_timesteps
        timesteps = timesteps[timesteps >= round(total - request.denoising_end * total)]
    return timesteps


def _first(scheduler: Any, request: GenerateRequest, kept: int | None) -> int:
    """Index of the first timestep that runs; the last ``kept`` steps do, or all, or those from a given noise on."""
    timesteps, count = scheduler.timesteps, len(scheduler.timesteps) // scheduler.order
    if request.denoising_start is not None:
        total = scheduler.config.num_train_timesteps
        return len(timesteps) - max(1, int((timesteps < round(total - request.denoising_start * total)).sum()))
    return 0 if kept is None else (count - min(count, max(1, kept))) * scheduler.order


def check(parts: Components, request: GenerateRequest) -> None:
    """Hold the request against the model, before anything runs.

    Raises:
        ValueError: they do not fit; the message says where and what to do.
    """
    check_pictures(parts, request)
    check_controls(parts, request, picture_size(parts, request))
    most = parts.motion_frames
    if request.num_frames is None:
        return
    if most is None:
        raise ValueError("num_frames needs a motion adapter: load one (AnimateDiffPipeline's motion_adapter).")
    seen = request.num_frames if request.windows is None else min(request.num_frames, request.windows.length)
    if seen > most:
        raise ValueError(
            f"{seen} frames at a time, but the motion adapter was trained on at most {most}: ask for fewer, or paint "
            f"in windows (windows=Windows(length={min(16, most)}))."
        )


@torch.no_grad()
def prepare(parts: Components, request: GenerateRequest, image_tokens: Sequence[Tensor] = ()) -> DenoiseState:
    """Check the request against the model and compute everything that the steps do not change.

    Random numbers are drawn in diffusers' order: those of `start_latents`, then, during the steps, the scheduler's.

    Args:
        parts, request: the model and what is asked of it.
        image_tokens: what the IP-Adapters see, one (N or 2 N, tokens, D) an adapter, unconditional rows first.

    Raises:
        ValueError: the request does not fit the model; no network has run by then.
    """
    check(parts, request)
    size, batch, unet, device = picture_size(parts, request), request.batch_size, parts.unet, parts.device
    generator = request.generator
    if generator is None and request.seed is not None:
        generator = generators_for_seeds(request.seed, batch)
    guided = parts.guided(request.guidance_scale)
    _warn_about_guidance(parts, request, guided)

    timesteps = make_schedule(parts.scheduler, request, device)
    positive, negative = encode_text(parts, request, guided)
    rows = positive if negative is None else _stack(negative, positive)
    frames, dtype = request.num_frames or 1, positive.embeds.dtype
    start = start_latents(parts, request, size, timesteps[:1], generator, dtype)
    # After the pictures, so that the ControlNets stay on the device from here on.
    steering = steer(parts, request, size, guided, crop_box(request, size))
    state = DenoiseState(
        latents=start.latents,
        timesteps=timesteps,
        prompt_embeds=rows.embeds.to(device).repeat_interleave(frames, dim=0),
        guided=guided,
        guidance_scale=request.guidance_scale,
        guidance_rescale=request.guidance_rescale,
        negative_prompt_embeds=None if negative is None else negative.embeds.repeat_interleave(frames, dim=0),
        image_tokens=tuple(tokens.repeat_interleave(frames, dim=0) for tokens in image_tokens),
        steering=steering,
        guess_mode=guesses(parts, request),
        mask=start.mask,
        noise=start.noise,
        image_latents=start.image_latents,
        masked_image_latents=start.masked_image_latents,
        windows=request.windows,
    )
    if parts.xl:
        state.add_text_embeds = rows.pooled.to(device).repeat_interleave(frames, dim=0)
        ids = micro_conditioning(parts, request, size, guided, dtype)
        state.add_time_ids = ids.to(device).repeat_interleave(frames, dim=0)
    if unet.config.time_cond_proj_dim is not None:
        embedding = guidance_embedding(request.guidance_scale, batch, unet.config.time_cond_proj_dim)
        state.timestep_cond = embedding.to(device, dtype).repeat_interleave(frames, dim=0)
    accepted = inspect.signature(parts.scheduler.step).parameters
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
    scheduler = parts.scheduler
    parts.bring(parts.unet, *parts.controlnets)
    for index, timestep in enumerate(state.timesteps):
        prediction = predict(parts, state, index, timestep)
        if state.guided:
            prediction = guide(prediction, state.guidance_scale, state.guidance_rescale)
        output = scheduler.step(prediction, timestep, state.latents, **state.step_options, return_dict=False)
        state.latents = output[0]
        state.denoised = output[1] if len(output) > 1 else None
        if state.image_latents is not None:
            state.latents = keep_unmasked(scheduler, state, index)
        state.index, state.timestep = index, timestep
        yield state


def rounds(parts: Components, state: DenoiseState, request: GenerateRequest) -> Iterator[DenoiseState]:
    """The steps of one request: one round of `denoise`, or as many as its FreeInit repaints."""
    free = request.free_init
    if free is None:
        yield from denoise(parts, state)
        return
    initial = state.latents
    for round_ in range(free.iterations):
        if round_ > 0:
            state.latents = renoised(parts.scheduler, state, initial, free)
        steps = free_init_steps(request.num_inference_steps, round_, free.iterations, free.fast)
        shortened = dataclasses.replace(request, num_inference_steps=steps)
        state.timesteps = make_schedule(parts.scheduler, shortened, state.latents.device)
        yield from denoise(parts, state)


def renoised(scheduler: Any, state: DenoiseState, initial: Tensor, free: FreeInit) -> Tensor:
    """The last round's result at the noisiest timestep, its high frequencies drawn anew (Wu et al. 2023, eq. 8)."""
    last = torch.full((len(initial),), scheduler.config.num_train_timesteps - 1, device=initial.device)
    noised = scheduler.add_noise(state.latents, initial, last).float()
    generator = state.step_options.get("generator")
    fresh = randn_tensor(noised.shape, generator, device=noised.device, dtype=torch.float32)
    low_pass = free_init_filter(
        (1, *noised.shape[1:]), free.method, free.order, free.spatial_stop, free.temporal_stop, device=noised.device
    )
    return mix_frequencies(noised, fresh, low_pass).to(initial.dtype)


def predict(parts: Components, state: DenoiseState, index: int, timestep: Tensor) -> Tensor:
    """The network's answer in step ``index``: ``state.latents``' layout, with 2 N in place of N when guided.

    Animations longer than a window run window by window, and the answers are averaged (Qiu et al. 2023, sec. 3.3).
    """
    inputs = torch.cat([state.latents] * 2) if state.guided else state.latents
    inputs = parts.scheduler.scale_model_input(inputs, timestep)
    if state.masked_image_latents is not None and state.mask is not None:
        extra = torch.cat([state.mask, state.masked_image_latents], dim=1)
        inputs = torch.cat([inputs, torch.cat([extra] * 2) if state.guided else extra], dim=1)
    if state.windows is None or state.frames <= state.windows.length:
        return _predict(parts, state, index, timestep, inputs, slice(None))
    windows = state.windows
    return fuse(
        lambda window: _predict(parts, state, index, timestep, inputs[:, :, window], window),
        state.frames,
        windows.length,
        windows.stride,
        window_weights(windows.length, windows.weights, inputs.device),
    )


def _predict(
    parts: Components, state: DenoiseState, index: int, timestep: Tensor, inputs: Tensor, window: slice
) -> Tensor:
    """One network evaluation of the frames in ``window``; all conditions are cut to them."""

    def cut(rows: Tensor) -> Tensor:
        return rows if window == slice(None) else rows.unflatten(0, (-1, state.frames))[:, window].flatten(0, 1)

    frames = inputs.shape[2] if inputs.ndim == 5 else None
    sample, text = without_frames(inputs), cut(state.prompt_embeds)
    added = None
    if state.add_text_embeds is not None and state.add_time_ids is not None:
        added = {"text_embeds": cut(state.add_text_embeds), "time_ids": cut(state.add_time_ids)}
    residuals = None
    for steering in state.steering:
        if steering.acts(index, len(state.timesteps)):
            more = _residuals(steering, state, sample[:, : state.latents.shape[1]], timestep, text, added, cut)
            residuals = add_residuals(residuals, more)
    prediction = parts.unet(
        sample,
        timestep,
        text,
        added_cond_kwargs=added,
        timestep_cond=None if state.timestep_cond is None else cut(state.timestep_cond),
        residuals=residuals,
        image_tokens=[cut(tokens) for tokens in state.image_tokens],
        frames=frames,
    )
    return with_frames(prediction, frames)


def _residuals(
    steering: Steering,
    state: DenoiseState,
    sample: Tensor,
    timestep: Tensor,
    text: Tensor,
    added: Mapping[str, Tensor] | None,
    cut: Any,
) -> Residuals:
    if steering.net is None or steering.condition is None:
        return Residuals(intra=tuple(cut(feature) for feature in steering.features))
    alone = state.guess_mode and state.guided
    if alone:
        # Only the conditional half is steered; the other gets zeros.
        sample, text = sample.chunk(2)[1], text.chunk(2)[1]
        added = None if added is None else {name: value.chunk(2)[1] for name, value in added.items()}
    found = steering.net(
        sample,
        timestep,
        text,
        condition=cut(steering.condition),
        conditioning_scale=steering.scale,
        guess_mode=state.guess_mode,
        added_cond_kwargs=added,
    )
    if not alone:
        return found
    assert found.mid is not None
    return Residuals(
        tuple(torch.cat([torch.zeros_like(value), value]) for value in found.down),
        torch.cat([torch.zeros_like(found.mid), found.mid]),
    )


def keep_unmasked(scheduler: Any, state: DenoiseState, index: int) -> Tensor:
    """Latents whose unmasked part is the start picture's, noised to the next timestep (4-channel inpainting)."""
    assert state.mask is not None and state.image_latents is not None
    original = state.image_latents
    if index < len(state.timesteps) - 1:
        assert state.noise is not None
        original = scheduler.add_noise(original, state.noise, state.timesteps[index + 1 : index + 2])
    return (1 - state.mask) * original + state.mask * state.latents
