"""Distil an LCM-LoRA: latent consistency distillation (Luo et al. 2023, arXiv 2310.04378 and 2311.05556).

The mathematics is in `lcd`; here it meets the networks. The teacher is the model as it is; the student is the model
with the pairs; the target is the student again, without gradients, with its newest or its averaged weights.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..pipelines.pipeline import DiffusionPipeline
from ..schedulers.noise import add_noise
from . import lcd
from .adapted import adapted_weights
from .base import Base, Text
from .data import Source
from .encoding import Batch, Examples
from .entry import prepare, run_training
from .options import DistillOptions, Progress
from .student import Student


@dataclass(frozen=True)
class Draws:
    """What is random in the loss of a batch of B: ``noise`` (B, C, h, w); timesteps ``later`` and ``earlier`` (B,);
    ``w``, the guidance scale less one, (B,); ``dropped`` (B,) bool, which rows lose their caption."""

    noise: Tensor
    later: Tensor
    earlier: Tensor
    w: Tensor
    dropped: Tensor


@dataclass(frozen=True)
class Distillation:
    """The loss of `distill`.

    Attributes:
        base: the teacher.
        empty: one row of what the model is told without a prompt; its ``time_ids`` do not count.
    """

    base: Base
    empty: Text
    options: DistillOptions

    def draw(self, latents: Tensor, generator: torch.Generator) -> Draws:
        """The random numbers for ``latents`` (B, C, h, w), drawn on the CPU, on the device."""
        count, options, device = len(latents), self.options, self.base.device
        later, earlier = lcd.draw_timesteps(
            count,
            num_train_timesteps=len(self.base.alphas),
            original_inference_steps=options.num_ddim_timesteps,
            generator=generator,
        )
        w = lcd.draw_guidance(count, *options.guidance, generator=generator)
        dropped = torch.rand(count, generator=generator) < options.caption_dropout
        noise = torch.randn(latents.shape, generator=generator)
        return Draws(*(value.to(device) for value in (noise, later, earlier, w, dropped)))

    def __call__(self, student: Student, batch: Batch, generator: torch.Generator) -> Tensor:
        """The mean loss over ``batch``."""
        latents, text = batch.latents.to(self.base.device), self.base.text_of(batch)
        draws = self.draw(latents, generator)
        empty = Text(self.empty.embeds.expand_as(text.embeds), _like(self.empty.pooled, text.pooled), text.time_ids)
        if self.options.caption_dropout:
            text = text.where(draws.dropped, empty)
        return self.loss(student, latents, text, empty, draws)

    def loss(self, student: Student, latents: Tensor, text: Text, empty: Text, draws: Draws) -> Tensor:
        """The mean over the batch of the distance between what the student says of ``x_t`` and of ``x_s``.

        Args:
            student: whose pairs get gradients.
            latents: ``x_0`` (B, C, h, w) float32.
            text, empty: of every row, with and without its prompt.
            draws: what is random.
        """
        base, alphas, kind = self.base, self.base.alphas, self.base.prediction_type
        later, earlier = draws.later, draws.earlier
        weights = adapted_weights(base.unet, student.pairs["unet"])
        sample = add_noise(latents, draws.noise, alphas[later])
        with torch.no_grad():
            nearer = self._teacher_step(sample, text, empty, draws)
            if self.options.ema_target and student.averages is not None:
                fixed = adapted_weights(base.unet, student.averages["unet"])
            else:
                fixed = weights
            output = base.predict(nearer, earlier, text, fixed)
            target = lcd.consistency(output, nearer, earlier, alphas, kind)
        output = base.predict(sample, later, text, weights)
        value = lcd.consistency(output, sample, later, alphas, kind)
        if self.options.loss == "l2":
            return (value - target).square().mean()
        return lcd.pseudo_huber(value, target, self.options.huber_c).mean()

    def _teacher_step(self, sample: Tensor, text: Text, empty: Text, draws: Draws) -> Tensor:
        """``x_s`` from ``x_t`` by one guided step of the teacher, whose two evaluations run as one batch."""
        base = self.base
        if self.options.guidance == (1.0, 1.0):
            conditional = unconditional = base.predict(sample, draws.later, text, {})
        else:
            both = base.predict(sample.repeat(2, 1, 1, 1), draws.later.repeat(2), text.then(empty), {})
            conditional, unconditional = both.chunk(2)
        return lcd.teacher_step(
            conditional, unconditional, sample, draws.later, draws.earlier, draws.w, base.alphas, base.prediction_type
        )


def _like(row: Tensor | None, rows: Tensor | None) -> Tensor | None:
    return None if row is None or rows is None else row.expand_as(rows)


def distill(
    model: str | os.PathLike[str] | DiffusionPipeline,
    data: str | os.PathLike[str] | Source | Examples,
    output: str | os.PathLike[str],
    options: DistillOptions | None = None,
    progress: Progress | None = None,
) -> Path:
    """Distil an LCM-LoRA of ``model``, or go on where ``output`` left off.

    Args:
        model: hub id, shipped name, folder, single file or pipeline, of the SD 1.5, SD 2.x, SDXL or SSD-1B kind.
        data: pictures with captions (folder, webdataset) or prompts alone, of which the model itself paints latents;
            see `data.open_source`.
        output: a new folder, or that of an unfinished run.
        options: see `DistillOptions`.
        progress: is told what is being done; tqdm's bars if not given.

    Returns:
        ``output/pytorch_lora_weights.safetensors``; `load_lora_weights` and diffusers read it.

    Raises:
        FileNotFoundError, DataError, ImportError, ValueError: model, data, options and output do not fit, or something
            that is asked for is not installed. All of this is found before anything is computed.
        RuntimeError: the loss is not a finite number any more, or there is no such device.
    """
    setup = prepare(model, data, output, options or DistillOptions(), progress)
    loss = Distillation(setup.base, setup.empty, setup.options)
    header = {"guidance": "-".join(f"{scale:g}" for scale in dict.fromkeys(setup.options.guidance))}
    return run_training(setup, loss, "latent consistency distillation", header)
