"""Distilling really learns: a dozen steps on the shipped model bring the student nearer to what it is taught."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fourstroke import DiffusionPipeline, LCMScheduler
from fourstroke.train import loop
from fourstroke.train.base import Text, load_base
from fourstroke.train.distillation import Distillation
from fourstroke.train.encoding import Batch
from fourstroke.train.options import DistillOptions
from fourstroke.train.student import make_student

from .toys import run_of

PROMPTS = ["red apple", "dog face", "rainbow", "fire", "snowman", "pizza", "sun", "tree"]


@dataclasses.dataclass(frozen=True)
class Painted:
    """Batches of latents with their prompts' embeddings, in turn."""

    latents: Tensor
    embeds: Tensor

    def batch(self, index: int, size: int, seed: int) -> Batch:
        rows = [(index * size + i) % len(PROMPTS) for i in range(size)]
        return Batch(self.latents[rows], self.embeds[rows], None, None, [PROMPTS[row] for row in rows])


@pytest.mark.slow
def test_distilling_the_emoji_model_lowers_the_loss(tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained("emoji/base")
    pipe.set_progress_bar_config(disable=True)
    embeds, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    own, pipe.scheduler = pipe.scheduler, LCMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights("emoji/lcm-lora")
    numbers = torch.Generator().manual_seed(0)
    latents = pipe(PROMPTS, num_inference_steps=2, guidance_scale=1.0, output_type="latent", generator=numbers).images
    pipe.unload_lora_weights()
    pipe.merge_adapters()
    pipe.scheduler = own

    options = DistillOptions(
        steps=12, batch_size=4, rank=16, alpha=16.0, guidance=(3.0, 6.0), learning_rate=1e-3, schedule="cosine",
        betas=(0.9, 0.99), save_every=0,
    )  # fmt: skip
    base, _ = load_base(pipe, options)
    student, data = make_student(base, options), Painted(latents, embeds)
    task = Distillation(base, Text(negative[:1]), options)

    def evaluated() -> float:
        """On all pictures, with draws that training never meets."""
        with torch.no_grad():
            found = [task(student, data.batch(0, 8, 0), loop.generator_for(99, i)) for i in range(3)]
        return float(torch.stack(found).mean())

    before = evaluated()
    loop.train(run_of(tmp_path, options, loss=task, data=data), student)
    assert evaluated() < 0.97 * before
