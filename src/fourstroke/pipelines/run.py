"""The run of one request by a pipeline: check, loop, safety checker, and the pictures in the form asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..conditioning import Components
from ..denoise import DenoiseState, check, prepare, rounds
from ..images import paste_back, postprocess, read_pictures
from ..latents import crop_box, decode, picture_size
from ..request import GenerateRequest, GenerateResult
from ..runtime.device import avoid_half_on_cpu_
from .arguments import controls, make_request, on_step
from .ip_adapter import image_tokens

if TYPE_CHECKING:
    from .pipeline import DiffusionPipeline


class PipelineOutput(NamedTuple):
    """What a pipeline returns: ``images`` as ``output_type`` says, and the safety checker's verdicts, if any."""

    images: Any
    nsfw_content_detected: list[bool] | None = None


class AnimationOutput(NamedTuple):
    """What an animation pipeline returns: for each animation its ``frames``, as ``output_type`` says."""

    frames: Any


@torch.no_grad()
def generate(
    pipe: DiffusionPipeline,
    request: GenerateRequest,
    *,
    on_step: Callable[[DenoiseState], None] | None = None,
    decode_denoised: bool = False,
) -> GenerateResult:
    """Run one request.

    Args:
        pipe: whose networks run.
        request: what to paint.
        on_step: called after each step; it may change the state.
        decode_denoised: decode the last estimate of the clean latents instead of the last latents.

    Raises:
        ValueError: the request does not fit the model; no network has run by then.
    """
    parts = pipe._parts()
    check(parts, request)
    avoid_half_on_cpu_(pipe.networks, parts.device)
    pipe.merge_adapters(request.lora_scale)
    try:
        latents = _denoised(pipe, parts, request, on_step, decode_denoised)
        if request.output_type == "latent":
            return _result(latents, None, request)
        chunk = None if request.num_frames is None else request.decode_chunk_size
        parts.bring(parts.vae)
        pictures, flags = check_safety(pipe, decode(parts.vae, latents, upcast_half=parts.xl, chunk=chunk))
        return _result(finish(pictures, request), flags, request)
    finally:
        pipe.maybe_free_model_hooks()


def _denoised(
    pipe: DiffusionPipeline,
    parts: Components,
    request: GenerateRequest,
    on_step: Callable[[DenoiseState], None] | None,
    decode_denoised: bool,
) -> Tensor:
    """The latents after the loop."""
    guided = parts.guided(request.guidance_scale)
    tokens = image_tokens(pipe, request.ip_adapter_image, request.ip_adapter_image_embeds, request.batch_size, guided)
    state = prepare(parts, request, tokens)
    pipe._interrupt, pipe._request = False, request
    pipe._guidance_scale, pipe._num_timesteps = state.guidance_scale, len(state.timesteps)
    with progress_bar(len(state.timesteps), pipe._progress_options) as bar:
        for _ in rounds(parts, state, request):
            if on_step is not None:
                on_step(state)
                if pipe._guidance_scale != state.guidance_scale:
                    state.guidance_scale = pipe._guidance_scale
                    if state.guided and not parts.guided(state.guidance_scale):
                        state.stop_guiding()
            bar.update()
            if pipe._interrupt:
                break
    return state.denoised if decode_denoised and state.denoised is not None else state.latents


def finish(pictures: Tensor, request: GenerateRequest) -> Any:
    """Pictures in the form that was asked for, put back into what they were cut from."""
    images = postprocess(pictures, request.output_type)
    box = crop_box(request, (pictures.shape[-2], pictures.shape[-1]))
    if box is not None:
        images = [paste_back(request.mask_image, request.image, image, box) for image in images]
    if request.num_frames is None:
        return images
    if isinstance(images, list):
        return [images[i : i + request.num_frames] for i in range(0, len(images), request.num_frames)]
    return images.reshape(request.batch_size, request.num_frames, *images.shape[1:])


def _result(images: Any, flags: list[bool] | None, request: GenerateRequest) -> GenerateResult:
    drawn = request.generator is None and request.seed is not None
    seeds = tuple(range(request.seed or 0, (request.seed or 0) + request.batch_size)) if drawn else None
    return GenerateResult(images, seeds, flags, request)


def check_safety(pipe: DiffusionPipeline, pictures: Tensor) -> tuple[Tensor, list[bool] | None]:
    """Pictures (N, 3, H, W), black where the pipeline's safety checker flags them, and its verdicts.

    Raises:
        ValueError: there is a checker, but no feature extractor.
    """
    checker, extractor = getattr(pipe, "safety_checker", None), getattr(pipe, "feature_extractor", None)
    if checker is None:
        return pictures, None
    if extractor is None:
        raise ValueError("A safety_checker needs a feature_extractor; load both, or pass safety_checker=None for none.")
    inputs = extractor(postprocess(pictures, "pil"), return_tensors="pt").pixel_values
    if isinstance(checker, nn.Module):
        pipe._bring(checker)
    # Keywords, so that a user's own function with diffusers' arguments works as well.
    _, flags = checker(images=postprocess(pictures, "np"), clip_input=inputs.to(pictures.device, pictures.dtype))
    keep = torch.tensor([not flag for flag in flags], device=pictures.device)
    return torch.where(keep[:, None, None, None], pictures, -torch.ones_like(pictures)), flags


def call(pipe: DiffusionPipeline, arguments: Mapping[str, Any], *, decode_denoised: bool = False, **fields: Any) -> Any:
    """The end that all ``__call__`` methods share: their ``arguments``, by name, through `generate` and out."""
    where = f"{type(pipe).__name__}.__call__"
    callback = on_step(pipe, arguments)
    parts = pipe._parts()
    nets, adapters = parts.controlnets, parts.t2i_adapters
    if adapters:
        steps = arguments.get("adapter_conditioning_factor", 1.0)
        fields["adapters"] = controls(
            arguments["image"], len(adapters), arguments["adapter_conditioning_scale"], end=steps
        )
        fields["image"] = None
    if nets:
        frames = "conditioning_frames" in arguments
        pictures = arguments["conditioning_frames" if frames else pipe.control_argument]
        window = (arguments[f"control_guidance_{name}"] for name in ("start", "end"))
        scale = arguments["controlnet_conditioning_scale"]
        fields["controls"] = controls(pictures, len(nets), scale, *window, frames=frames)
        if pipe.control_argument == "image":
            fields["image"] = None
    if "video" in arguments:
        fields["num_frames"] = len(read_pictures(arguments["video"], "video"))
    if pipe.sized_by_model:
        own = picture_size(parts, GenerateRequest(prompt=""))
        for name, value in zip(("height", "width"), own, strict=True):
            fields[name] = arguments[name] or value
    fields |= {"windows": pipe._windows, "free_init": pipe._free_init}
    request = make_request(where, arguments, **fields)
    result = generate(pipe, request, on_step=callback, decode_denoised=decode_denoised)
    if request.num_frames is None:
        output: Any = PipelineOutput(result.images, result.nsfw_content_detected)
    else:
        output = AnimationOutput(result.images)
    return output if arguments["return_dict"] else tuple(output)


def progress_bar(total: int, options: Mapping[str, Any]) -> Any:
    """Tqdm's bar over ``total`` steps."""
    from tqdm.auto import tqdm

    return tqdm(total=total, **options)
