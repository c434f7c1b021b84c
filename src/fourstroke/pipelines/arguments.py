"""From a pipeline's arguments to a `GenerateRequest`: what each argument of a ``__call__`` means.

Most arguments are fields of the request and are described there. The others:

- ``image``: the start picture; in ``StableDiffusion(XL)ControlNetPipeline`` and the T2I-Adapter pipelines the control
  picture, or a list of them, one a network.
- ``control_image``, ``conditioning_frames``: control pictures (frames) where ``image`` (``video``) is the start.
- ``video``, ``num_videos_per_prompt``: the start picture's frames, and animations a prompt.
- ``controlnet_conditioning_scale``, ``control_guidance_start``, ``control_guidance_end``: scale, start and end of each
  control; a number serves all networks.
- ``adapter_conditioning_scale``, ``adapter_conditioning_factor``: scale of each T2I-Adapter, and the fraction of the
  steps in which they act.
- ``enforce_inference_steps``: run all steps whatever the strength.
- ``cross_attention_kwargs``: ``{"scale": s}`` multiplies the weight of every active LoRA.
- ``callback_on_step_end``: called as ``f(pipe, step, timestep, tensors)`` after each step; the tensors that it returns
  replace the loop's. ``callback_on_step_end_tensor_inputs`` names the tensors to hand to it.
- ``callback``, ``callback_steps``: the older form, ``f(step, timestep, latents)`` every so many steps.
- ``return_dict``: return a `PipelineOutput` instead of a plain tuple.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..denoise import DenoiseState
from ..loading import warn_unknown
from ..request import Control, GenerateRequest

FIELDS = frozenset(field.name for field in dataclasses.fields(GenerateRequest))
# Argument -> field of another name.
RENAMED: Mapping[str, str] = {"video": "image", "num_videos_per_prompt": "num_images_per_prompt"}
# Arguments that are read here and by the pipelines, not by the request.
OWN = frozenset(
    (
        "control_image",
        "conditioning_frames",
        "controlnet_conditioning_scale",
        "control_guidance_start",
        "control_guidance_end",
        "adapter_conditioning_scale",
        "adapter_conditioning_factor",
        "enforce_inference_steps",
        "cross_attention_kwargs",
        "callback_on_step_end",
        "callback_on_step_end_tensor_inputs",
        "callback",
        "callback_steps",
        "return_dict",
    )
)
CALLBACK_INPUTS = (
    "latents",
    "prompt_embeds",
    "negative_prompt_embeds",
    "add_text_embeds",
    "add_time_ids",
    "denoised",
    "timestep_cond",
    "mask",
    "masked_image_latents",
)

StepCallback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None]


def make_request(where: str, arguments: Mapping[str, Any], **fields: Any) -> GenerateRequest:
    """The request that a call's ``arguments`` ask for; ``fields`` win over them.

    Warns:
        An argument that nobody reads is named.

    Raises:
        ValueError, TypeError: see `GenerateRequest`.
    """
    values = {RENAMED.get(name, name): value for name, value in arguments.items() if name not in ("self", "kwargs")}
    unknown = {name: value for name, value in (arguments.get("kwargs") or {}).items() if name not in OWN}
    warn_unknown(where, unknown)
    options = dict(values.get("cross_attention_kwargs") or {})
    scale = float(options.pop("scale", 1.0))
    warn_unknown("cross_attention_kwargs", options)
    # None is diffusers' way to say "the default".
    given = {name: value for name, value in values.items() if name in FIELDS and value is not None}
    given["strength_mode"] = "extend" if values.get("enforce_inference_steps") else "trim"
    return GenerateRequest(**{**given, "lora_scale": scale, **fields})


def controls(
    images: Any, count: int, scale: Any, start: Any = 0.0, end: Any = 1.0, *, frames: bool = False
) -> tuple[Control, ...]:
    """One `Control` for each of ``count`` networks.

    Args:
        images: what the one network reads, or a list with an entry a network; a list of lists holds one a prompt.
        count: how many networks there are.
        scale, start, end: numbers for all, or one a network.
        frames: a list of lists holds the frames of each network instead.

    Raises:
        ValueError: the lists have another length than there are networks.
    """
    if count != 1 and not frames and isinstance(images, list) and images and isinstance(images[0], list):
        images = [list(entry) for entry in zip(*images, strict=True)]
    entries = list(images) if count != 1 and isinstance(images, list | tuple) else [images]
    columns = [entries, *(_each(value, count) for value in (scale, start, end))]
    for name, column in zip(("control pictures", "scales", "starts", "ends"), columns, strict=True):
        if len(column) != count:
            raise ValueError(f"{len(column)} {name} for {count} control networks: give one each.")
    return tuple(Control(*row) for row in zip(*columns, strict=True))


def _each(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, Sequence) else [value] * count


def on_step(pipe: Any, arguments: Mapping[str, Any]) -> Callable[[DenoiseState], None] | None:
    """The callbacks among a call's ``arguments`` as one function of the loop's state, or None.

    A callback may also set ``pipe._guidance_scale`` (and halve ``prompt_embeds`` when that ends guidance) or
    ``pipe._interrupt``.

    Raises:
        ValueError: ``callback_on_step_end_tensor_inputs`` names a tensor that there is not.
    """
    arguments = {**arguments, **(arguments.get("kwargs") or {})}
    modern, names = arguments.get("callback_on_step_end"), arguments.get("callback_on_step_end_tensor_inputs") or ()
    older, every = arguments.get("callback"), arguments.get("callback_steps") or 1
    if modern is None and older is None:
        return None
    for name in names:
        if name not in CALLBACK_INPUTS:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs names {name!r}; it may name {', '.join(CALLBACK_INPUTS)}."
            )

    def call(state: DenoiseState) -> None:
        assert state.timestep is not None
        if modern is not None:
            tensors = {name: getattr(state, name) for name in names}
            for name, value in (modern(pipe, state.index, state.timestep, tensors) or {}).items():
                if name in CALLBACK_INPUTS:
                    setattr(state, name, value)
        if older is not None and state.index % every == 0:
            older(state.index, state.timestep, state.latents)

    return call
