"""Train a LoRA on pictures the ordinary way: the network learns to tell the noise in them.

The loss is that of diffusion models (Ho et al. 2020, "DDPM", eq. 14), on the LoRA's weights alone (arXiv 2106.09685);
with pictures of a whole class beside those of a subject it is DreamBooth's (Ruiz et al. 2022, arXiv 2208.12242, eq. 2).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..pipelines.pipeline import DiffusionPipeline
from ..schedulers.noise import add_noise, get_velocity
from .adapted import adapted_weights
from .base import Base, Text
from .data import Source
from .encoding import Batch, Examples
from .entry import prepare, run_training
from .lcd import pseudo_huber
from .options import LoraOptions, Progress
from .student import Student


@dataclass(frozen=True)
class Draws:
    """What is random in the loss of a batch of B: ``noise`` (B, C, h, w), its offset included; ``timesteps`` (B,)."""

    noise: Tensor
    timesteps: Tensor


@dataclass(frozen=True)
class WithPrior:
    """Batches of two sources side by side: `data` and, to be kept, `prior`."""

    data: Examples
    prior: Examples

    def batch(self, index: int, size: int, seed: int) -> tuple[Batch, Batch]:
        """As `encoding.Examples.batch`, one of each."""
        return self.data.batch(index, size, seed), self.prior.batch(index, size, seed)


@dataclass(frozen=True)
class NoisePrediction:
    """The loss of `train_lora`.

    Attributes:
        base: the model as it is.
        empty: one row of what the model is told without a prompt; its ``time_ids`` do not count.
    """

    base: Base
    empty: Text
    options: LoraOptions

    def __call__(self, student: Student, batch: Batch | tuple[Batch, Batch], generator: torch.Generator) -> Tensor:
        """The mean loss over ``batch``, or that of the first plus ``prior_weight`` times that of the second."""
        if isinstance(batch, tuple):
            own, prior = (self(student, part, generator) for part in batch)
            return own + self.options.prior_weight * prior
        latents = batch.latents.to(self.base.device)
        dropped = torch.rand(len(latents), generator=generator) < self.options.caption_dropout
        draws = self.draw(latents, generator)
        return self.loss(student, latents, self.text(student, batch, dropped), draws)

    def draw(self, latents: Tensor, generator: torch.Generator) -> Draws:
        """The random numbers for ``latents`` (B, C, h, w), drawn on the CPU, on the device."""
        count, channels = latents.shape[:2]
        timesteps = torch.randint(len(self.base.alphas), (count,), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        if self.options.noise_offset:
            noise += self.options.noise_offset * torch.randn(count, channels, 1, 1, generator=generator)
        return Draws(noise.to(latents.device), timesteps.to(latents.device))

    def text(self, student: Student, batch: Batch, dropped: Tensor) -> Text:
        """What is told of ``batch``; nothing in the rows that are ``dropped`` (B,) bool."""
        text, gone = self.base.text_of(batch), dropped.to(self.base.device)
        if not self.options.train_text_encoder:
            return text.where(gone, self.empty) if self.options.caption_dropout else text
        captions = ["" if lost else caption for caption, lost in zip(batch.captions, dropped.tolist(), strict=True)]
        encoders = {name: pairs for name, pairs in student.pairs.items() if name != "unet"}
        weights = {name: adapted_weights(self.base.network(name), pairs) for name, pairs in encoders.items()}
        encoded = self.base.encode(captions, self.options.data.clip_skip, weights)
        text = Text(encoded.embeds, encoded.pooled, text.time_ids)
        return text.where(gone, self.empty) if self.base.parts.force_zeros_for_empty_prompt else text

    def loss(self, student: Student, latents: Tensor, text: Text, draws: Draws) -> Tensor:
        """The mean over the batch of the distance between the network's output and its target.

        Args:
            student: whose pairs get gradients.
            latents: ``x_0`` (B, C, h, w) float32.
            text: of every row.
            draws: what is random.
        """
        base, options = self.base, self.options
        alphas = base.alphas[draws.timesteps]
        weights = adapted_weights(base.unet, student.pairs["unet"])
        sample = add_noise(latents, draws.noise, alphas)
        output = base.predict(sample, draws.timesteps, text, weights)
        target = target_of(base.prediction_type, latents, draws.noise, alphas)
        distance = (output - target).square() if options.loss == "l2" else pseudo_huber(output, target, options.huber_c)
        each = distance.mean((1, 2, 3))
        if options.min_snr_gamma is not None:
            each = each * min_snr_weights(alphas, options.min_snr_gamma, base.prediction_type)
        return each.mean()


def target_of(prediction_type: str, latents: Tensor, noise: Tensor, alphas: Tensor) -> Tensor:
    """What a network of this kind should say: the noise, the velocity (Salimans & Ho 2022, app. D) or the latents.

    Args:
        latents, noise: (B, C, h, w).
        alphas: ``a_t`` of the rows, (B,).
    """
    if prediction_type == "epsilon":
        return noise
    return latents if prediction_type == "sample" else get_velocity(latents, noise, alphas)


def min_snr_weights(alphas: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """``min(SNR, gamma)`` as a weight of the loss of ``x_0`` (Hang et al. 2023, arXiv 2303.09556, eq. 8 and sec. 3.4).

    That loss is SNR times smaller than the noise's, and SNR + 1 times smaller than the velocity's.

    Args:
        alphas: ``a_t``, (B,); the signal-to-noise ratio is ``a_t / (1 - a_t)``.
        gamma: the largest weight, above 0.
        prediction_type: whose loss the weights are for.

    Returns:
        (B,).
    """
    snr = alphas / (1 - alphas)
    if prediction_type == "sample":
        return snr.clamp(max=gamma)
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1)


def train_lora(
    model: str | os.PathLike[str] | DiffusionPipeline,
    data: str | os.PathLike[str] | Source | Examples,
    output: str | os.PathLike[str],
    options: LoraOptions | None = None,
    progress: Progress | None = None,
) -> Path:
    """Train a LoRA of ``model`` on pictures, or go on where ``output`` left off.

    Args:
        model: hub id, shipped name, folder, single file or pipeline, of the SD 1.5, SD 2.x, SDXL or SSD-1B kind.
        data: pictures with captions (folder, webdataset); see `data.open_source`.
        output: a new folder, or that of an unfinished run.
        options: see `LoraOptions`.
        progress: is told what is being done; tqdm's bars if not given.

    Returns:
        ``output/pytorch_lora_weights.safetensors``; `load_lora_weights` and diffusers read it.

    Raises:
        FileNotFoundError, DataError, ImportError, ValueError: model, data, options and output do not fit, or something
            that is asked for is not installed. All of this is found before anything is computed.
        RuntimeError: the loss is not a finite number any more, or there is no such device.
    """
    setup = prepare(model, data, output, options or LoraOptions(), progress)
    if setup.prior is not None:
        setup.data = WithPrior(setup.examples, setup.prior)
    return run_training(setup, NoisePrediction(setup.base, setup.empty, setup.options), "LoRA", {})
