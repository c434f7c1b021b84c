"""Examples without pictures: latents that the model itself paints of prompts, with guidance and many steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..request import GenerateRequest
from ..schedulers import ConfigOnly, DDIMScheduler, LCMScheduler, TCDScheduler
from .data import DataOptions
from .store import PIXELS_A_BATCH, Store, folder_of, key_of, pieces

if TYPE_CHECKING:
    from ..pipelines.pipeline import DiffusionPipeline


def many_step_scheduler(scheduler: Any) -> Any:
    """``scheduler``, or DDIM with its configuration where it is one for few steps or one that is not run here."""
    few = isinstance(scheduler, LCMScheduler | TCDScheduler | ConfigOnly)
    # Configurations of other schedulers need not say that latents are not clipped, and DDIM's default is to clip.
    return DDIMScheduler.from_config(scheduler.config, clip_sample=False) if few else scheduler


def painted(
    pipe: DiffusionPipeline,
    prompts: Sequence[tuple[str, bytes]],
    size: tuple[int, int],
    options: DataOptions,
    cache: Path | None,
    tell: Callable[[int, int], None],
) -> tuple[Store, list[bytes]]:
    """Latents in the UNet's scale, one a prompt, each depending on its prompt and its number alone.

    Args:
        pipe: the teacher; it paints with `many_step_scheduler`.
        prompts: each with a key that stands for it; the same one may come several times and is painted anew each time.
        size: height and width in pixels.
        options: the teacher's steps, guidance and ``clip_skip``.
        cache: the folder for what is painted; None keeps it in memory.
        tell: called with how many are done, and how many there are.

    Returns:
        the store, rows ``mean`` (4, h, w), and the key of each prompt's row in it.
    """
    parts, scheduler = pipe._parts(), many_step_scheduler(pipe.scheduler)
    settings = (options.teacher_steps, options.teacher_guidance, options.clip_skip, size, type(scheduler).__name__)
    networks = (parts.unet, *parts.text_encoders)
    store = Store(folder_of(cache, "painted", *networks, *settings, sorted(scheduler.config.items(), key=str)))
    keys, seen, texts = [], dict.fromkeys((key for _, key in prompts), 0), {}
    for prompt, key in prompts:
        keys.append(key_of(key, seen[key]))
        seen[key] += 1
        texts[keys[-1]] = prompt
    missing = [key for key in keys if key not in store]
    done = len(keys) - len(missing)
    before = pipe.scheduler, pipe._progress_options
    pipe.scheduler, pipe._progress_options = scheduler, {"disable": True}
    try:
        with store:
            for batch in pieces(missing, max(1, PIXELS_A_BATCH // (size[0] * size[1]))):
                tell(done, len(keys))
                store.add(batch, {"mean": _paint(pipe, texts, batch, size, options)})
                done += len(batch)
        if missing:
            tell(done, len(keys))
    finally:
        pipe.scheduler, pipe._progress_options = before
    return store, keys


def _paint(
    pipe: DiffusionPipeline,
    texts: Mapping[bytes, str],
    keys: Sequence[bytes],
    size: tuple[int, int],
    options: DataOptions,
) -> Tensor:
    request = GenerateRequest(
        prompt=[texts[key] for key in keys],
        height=size[0],
        width=size[1],
        num_inference_steps=options.teacher_steps,
        guidance_scale=options.teacher_guidance,
        generator=[torch.Generator().manual_seed(int.from_bytes(key[:7], "big")) for key in keys],
        clip_skip=options.clip_skip,
        output_type="latent",
    )
    return pipe.generate(request).images
