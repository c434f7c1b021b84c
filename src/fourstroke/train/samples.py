"""Sample pictures of a LoRA in training, painted by the pipeline itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import PIL.Image

from ..loading import write_atomically
from ..lora.weights import Lora
from ..pipelines.pipeline import DiffusionPipeline
from ..request import GenerateRequest
from ..schedulers import DPMSolverMultistepScheduler, LCMScheduler

ADAPTER = "training"
MOST = 16  # pictures in a grid
AT_ONCE = 4


def sample_pictures(
    pipe: DiffusionPipeline, lora: Lora, prompts: Sequence[str], *, few_steps: bool, seed: int = 0
) -> list[PIL.Image.Image]:
    """Paint one picture of each prompt with ``lora``; afterwards the pipeline is as it was, to the bit.

    Args:
        pipe: without other LoRAs.
        lora: at weight 1.
        prompts: at least one.
        few_steps: 4 steps of `LCMScheduler` without guidance, or 20 of DPM++ 2M at guidance 7.5 (5 for SDXL).
        seed: of the first picture; the next ones count up.
    """
    before = pipe.scheduler, pipe._progress_options
    kind = LCMScheduler if few_steps else DPMSolverMultistepScheduler
    steps, guidance = (4, 1.0) if few_steps else (20, 5.0 if pipe._parts().xl else 7.5)
    pipe.scheduler, pipe._progress_options = kind.from_config(before[0].config), {"disable": True}
    pipe.adapters.add(ADAPTER, lora)
    try:
        pictures: list[PIL.Image.Image] = []
        for first in range(0, len(prompts), AT_ONCE):
            request = GenerateRequest(
                prompt=list(prompts[first : first + AT_ONCE]),
                num_inference_steps=steps,
                guidance_scale=guidance,
                seed=seed + first,
            )
            pictures += pipe.generate(request).images
        return pictures
    finally:
        pipe.adapters.delete(ADAPTER)
        pipe.merge_adapters()
        pipe.scheduler, pipe._progress_options = before


def save_grid(pictures: Sequence[PIL.Image.Image], path: Path) -> PIL.Image.Image:
    """Put pictures of one size side by side, in a square of rows and columns, and write it as a PNG file."""
    width, height = pictures[0].size
    columns = math.ceil(math.sqrt(len(pictures)))
    grid = PIL.Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height), "white")
    for i, picture in enumerate(pictures):
        grid.paste(picture, (i % columns * width, i // columns * height))
    write_atomically(path, lambda temporary: grid.save(temporary, format="PNG"))
    return grid
