"""From what a user gives to a training that runs: everything is checked first, then encoded, then trained."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import PIL.Image
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..lora.weights import Lora
from ..pipelines.pipeline import DiffusionPipeline
from .base import Base, Text, load_base, model_name
from .checkpointing import checkpointing_
from .data import Source, open_source
from .devices import Devices, open_devices
from .encoding import Examples, encode_examples, encoders_on
from .loop import Data, LossFunction, Run, adamw8bit, settings_of, train
from .metrics import summary_writer
from .options import DistillOptions, LoraOptions, Progress, TrainOptions
from .progress import Bars
from .samples import MOST, sample_pictures, save_grid
from .state import CHECKPOINT, check_output, check_settings, claim
from .student import Student, make_student

Options = TypeVar("Options", bound=TrainOptions)
SAMPLES = 4  # captions of the data that samples are painted of when no prompts are given
HASHED = 4  # examples that data is known by, beside their number
FEW_PIXELS = 256  # latent pixels up to which attention with its matrix in memory is the faster one on a CPU


@dataclass
class Setup(Generic[Options]):
    """A training that is ready to run.

    Attributes:
        examples, prior: what is trained on, and what is to be kept, if anything.
        data: where batches come from.
        empty: what the model is told without a prompt, on the device.
        thawed: the parameters that needed gradients before.
    """

    name: str
    base: Base
    student: Student
    examples: Examples
    prior: Examples | None
    output: Path
    options: Options
    devices: Devices
    progress: Progress
    settings: Mapping[str, Any]
    data: Data
    thawed: list[nn.Parameter]

    @property
    def empty(self) -> Text:
        """One row, without sizes."""
        text = self.base.text_of(self.examples.empty)
        return Text(text.embeds, text.pooled)


def prepare(
    model: str | os.PathLike[str] | DiffusionPipeline,
    data: str | os.PathLike[str] | Source | Examples,
    output: str | os.PathLike[str],
    options: Options,
    progress: Progress | None,
) -> Setup[Options]:
    """Check everything, load the model, make the pairs and encode the data; see `distill.distill`.

    Raises:
        FileNotFoundError, DataError, ImportError, ValueError, RuntimeError: see `distill.distill`.
    """
    output, progress = Path(output), progress or Bars()
    check_output(output)
    _check_installed(options)
    sources: list[Any] = [data if isinstance(data, Examples) else open_source(data, options.caption)]
    if isinstance(options, LoraOptions) and options.prior_data is not None:
        sources.append(open_source(options.prior_data))
    devices = open_devices(options.device)
    base, thawed = load_base(model, options, devices.device)
    student = make_student(base, options)
    settings = settings_of(options, model=base.fingerprint(), devices=devices.count)
    if (output / CHECKPOINT).exists():
        check_settings(output / CHECKPOINT, settings, whole=False)
    name = model_name(model)
    if devices.main:
        claim(
            output, {"model": name, "data": str(getattr(data, "place", data)), "options": dataclasses.asdict(options)}
        )
    devices.wait()
    cache = output / "cache" if options.cache is None else Path(options.cache)
    with devices.main_first(), encoders_on(base.pipe, base.device):
        quiet = progress if devices.main else None
        found = [
            source if isinstance(source, Examples)
            else encode_examples(base.pipe, source, options.data, cache, quiet)
            for source in sources
        ]  # fmt: skip
    settings = {**settings, "data": [_fingerprint(examples) for examples in found]}
    examples, prior = found[0], found[1] if len(found) > 1 else None
    return Setup(name, base, student, examples, prior, output, options, devices, progress, settings, examples, thawed)


def run_training(setup: Setup[Any], loss: LossFunction, method: str, header: Mapping[str, str]) -> Path:
    """Train what is set up by ``loss``, and leave a pipeline that was given as it was; see `loop.train`.

    Args:
        setup: of `prepare`.
        loss: see `loop.LossFunction`.
        method: what the file's header says was done.
        header: further entries.

    Raises:
        ValueError, RuntimeError: see `loop.train`.
    """
    base, options = setup.base, setup.options
    text_rate = options.text_learning_rate if isinstance(options, LoraOptions) else None
    run = Run(
        loss=loss,
        data=setup.data,
        output=setup.output,
        options=options,
        devices=setup.devices,
        settings=setup.settings,
        header={**_header(setup, method), **header},
        around=lambda: _attention(setup),
        sample=_sampler(setup) if options.sample_every else None,
        progress=setup.progress,
    )
    _place_text_encoders(setup)
    try:
        return train(run, setup.student, text_rate)
    finally:
        checkpointing_(base.unet, False)
        for parameter in setup.thawed:
            parameter.requires_grad_(True)
        for network in base.pipe.networks:
            network.to(base.device)


def _attention(setup: Setup[Any]) -> AbstractContextManager[Any]:
    """Inside, attention is as torch has it fastest for training on pictures of the data's sizes."""
    most = FEW_PIXELS * setup.base.parts.vae.downscale**2
    shapes = [*setup.examples.shapes, *(setup.prior.shapes if setup.prior else ())]
    small = setup.base.device.type == "cpu" and all(height * width <= most for height, width in shapes)
    return sdpa_kernel(SDPBackend.MATH) if small else nullcontext()


def _place_text_encoders(setup: Setup[Any]) -> None:
    """Have the text encoders on the device if they are trained; otherwise they are not needed there."""
    for component in setup.student.pairs:
        setup.base.network(component).to(setup.base.device)


def _sampler(setup: Setup[Any]) -> Any:
    options, base = setup.options, setup.base
    prompts = [*options.sample_prompts] or [*itertools.islice(setup.examples.captions, SAMPLES)]

    def sample(step: int, lora: Lora) -> PIL.Image.Image:
        with encoders_on(base.pipe, base.device), torch.no_grad():
            pictures = sample_pictures(
                base.pipe, lora, prompts[:MOST], few_steps=isinstance(options, DistillOptions), seed=options.seed
            )
        _place_text_encoders(setup)
        return save_grid(pictures, setup.output / "samples" / f"step-{step:06d}.png")

    return sample


def _header(setup: Setup[Any], method: str) -> dict[str, str]:
    options = setup.options
    rank, alpha = options.rank, options.rank if options.alpha is None else options.alpha
    title = f"{setup.name} {'LCM-LoRA' if isinstance(options, DistillOptions) else 'LoRA'}"
    header = {"modelspec.title": title, "base_model": setup.name, "method": method, "rank": str(rank)}
    header |= {"alpha": f"{alpha:g}", "ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
    phrase = (options.caption or "").replace("{}", "").strip(" ,")
    return header | ({"modelspec.trigger_phrase": phrase} if phrase else {})


def _check_installed(options: TrainOptions) -> None:
    if options.optimizer == "adamw8bit":
        adamw8bit()
    if options.log == "tensorboard":
        summary_writer()
    if len(options.sample_prompts) > MOST:
        raise ValueError(f"{len(options.sample_prompts)} sample_prompts; give at most {MOST}.")


def _fingerprint(examples: Examples) -> str:
    """How many examples there are, and what the first batch holds."""
    batch = examples.batch(0, min(HASHED, len(examples)), 0)
    digest = hashlib.sha256("\n".join(batch.captions).encode())
    digest.update(batch.latents.numpy().tobytes() + batch.prompt_embeds.numpy().tobytes())
    return f"{len(examples)} examples, {digest.hexdigest()[:16]}"
