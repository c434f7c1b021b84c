"""What a training is asked to do: options of every training, of a distillation, and of a LoRA on pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..loading import listed
from ..lora.layers import LCM_LORA_TARGETS
from ..request import option
from .data import DataOptions

PRECISIONS: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCHEDULES = ("constant", "cosine")
OPTIMIZERS = ("adamw", "adamw8bit")
LOSSES = ("huber", "l2")
LOGS = ("csv", "tensorboard")
LAYOUTS = ("kohya", "peft")
ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
"""Attention and feed-forward: what a LoRA for a style or a subject adapts."""
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""What is adapted of a text encoder."""

_CHOICES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("precision", "base_precision", "save_precision"), tuple(PRECISIONS)),
    "schedule": SCHEDULES,
    "optimizer": OPTIMIZERS,
    "loss": LOSSES,
    "log": LOGS,
    "layout": LAYOUTS,
}
# Option -> its smallest value, and whether that value itself is allowed.
_LOWEST: Mapping[str, tuple[float, bool]] = {
    **dict.fromkeys(("steps", "batch_size", "gradient_accumulation", "rank", "num_ddim_timesteps"), (1, True)),
    **dict.fromkeys(("warmup", "save_every", "sample_every", "keep", "seed", "weight_decay"), (0, True)),
    **dict.fromkeys(("min_snr_gamma", "noise_offset", "prior_weight"), (0, True)),
    **dict.fromkeys(("learning_rate", "text_learning_rate", "alpha", "huber_c", "max_grad_norm"), (0, False)),
}


class Stop(KeyboardInterrupt):
    """Raised by a `Progress`, which is called between steps only: end the training once a checkpoint is written."""


class Progress(Protocol):
    """Is told what is being done, how much of it is done, how much there is of it, and, of training, figures."""

    def __call__(self, what: str, done: int, total: int, figures: Mapping[str, float] = ..., /) -> None:
        """``figures``: ``loss`` (of the last steps), ``rate`` (steps a second), ``left`` (seconds)."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of every training.

    Raises:
        ValueError: a value breaks a rule; the message names value and rule.
    """

    steps: int = option(1000, "Steps of the optimizer.")
    batch_size: int = option(4, "Examples that go through the network at once, on each device.")
    gradient_accumulation: int = option(1, "Batches that make one step: a larger batch in the memory of a small one.")
    learning_rate: float = option(1e-4, "Peak learning rate.")
    warmup: int = option(0, "Steps in which the learning rate rises from nothing.")
    schedule: str = option("constant", "What the learning rate does then: constant, or cosine (down to 0).")
    optimizer: str = option("adamw", "adamw, or adamw8bit (a quarter of the optimizer's memory; needs bitsandbytes).")
    betas: tuple[float, float] = option((0.9, 0.999), "AdamW's decays of the gradient's mean and mean square.")
    weight_decay: float = option(0.0, "AdamW's weight decay.")
    max_grad_norm: float = option(1.0, "Longer gradients are shortened to this norm.")
    ema_decay: float = option(0.0, "Result: a moving average of the weights with this decay; 0 is the last weights.")
    rank: int = option(64, "Rank of the LoRA.")
    alpha: float | None = option(None, "The LoRA's change is multiplied by ALPHA / RANK; the rank if not given.")
    targets: tuple[str, ...] | None = option(None, "Endings of the names of the UNet's layers that are adapted.")
    init_from: str | None = option(None, "A LoRA file (of the same rank and targets) to go on from.")
    precision: str = option("fp32", "Of the networks' arithmetic: fp32, bf16 or fp16. The LoRA itself stays fp32.")
    base_precision: str | None = option(
        None, "Of the base's frozen weights in memory; as the arithmetic's on a GPU, fp32 on a CPU if not given."
    )
    gradient_checkpointing: bool = option(False, "Compute layers twice rather than keep what they computed.")
    caption_dropout: float = option(0.0, "Part of the examples that are shown without their caption, 0 to 1.")
    seed: int = option(0, "Seed of everything random.")
    device: str | None = option(None, "cpu, cuda, cuda:1, mps; the GPU if there is one.")
    save_every: int = option(250, "Steps between checkpoints, from which a run that was killed goes on; 0: at the end.")
    keep: int = option(0, "How many LoRAs of earlier checkpoints are kept in OUTPUT/loras, newest first.")
    sample_every: int = option(0, "Steps between sample pictures in OUTPUT/samples; 0 is none.")
    sample_prompts: tuple[str, ...] = option((), "Their prompts; captions of the data if not given.")
    log: str = option("csv", "Where figures go: csv (OUTPUT/metrics.csv) or tensorboard (OUTPUT/events…).")
    layout: str = option("kohya", "Layout of the LoRA file: kohya or peft.")
    save_precision: str = option("fp16", "Of the LoRA file: fp32, bf16 or fp16.")
    caption: str | None = option(None, "Caption of pictures without one; with {} in it, put around every caption.")
    cache: str | None = option(None, "Folder for encoded pictures and captions; OUTPUT/cache if not given.")
    data: DataOptions = dataclasses.field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _check(name, value)
        for name, top in (("ema_decay", 1.0), ("caption_dropout", 1.0)):
            if not 0 <= getattr(self, name) <= top:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be between 0 and {top:g}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; both must be at least 0 and below 1.")
        if self.targets is not None and not self.targets:
            raise ValueError("targets is empty; name at least one ending, such as 'to_q', or leave it out.")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup is {self.warmup} of {self.steps} steps; it must be less than steps.")

    @property
    def dtype(self) -> torch.dtype:
        """Of the networks' arithmetic."""
        return PRECISIONS[self.precision]


@dataclass(frozen=True, kw_only=True)
class DistillOptions(TrainOptions):
    """Options of `distill`. Rank, alpha, targets, loss, guidance and grid are the published LCM-LoRAs'.

    Raises:
        ValueError: see `TrainOptions`.
    """

    alpha: float | None = option(8.0, "The LoRA's change is multiplied by ALPHA / RANK.")
    guidance: tuple[float, float] = option((7.5, 7.5), "The teacher's guidance is drawn from LOW to HIGH.")
    num_ddim_timesteps: int = option(50, "Steps of the teacher's solver over the whole noise range.")
    loss: str = option("huber", "Distance of the student from its target: huber or l2.")
    huber_c: float = option(1e-3, "Where the Huber loss turns from a square into an absolute value.")
    ema_target: bool = option(False, "Take the target from the averaged weights (with --ema-decay), not the newest.")

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.guidance
        if not 1 <= low <= high:
            raise ValueError(f"guidance is {low} to {high}; it must be 1 <= low <= high (1 is no guidance).")
        if self.ema_target and not self.ema_decay:
            raise ValueError("ema_target needs averaged weights; give ema_decay, such as 0.95.")


@dataclass(frozen=True, kw_only=True)
class LoraOptions(TrainOptions):
    """Options of `train_lora`.

    Raises:
        ValueError: see `TrainOptions`.
    """

    rank: int = option(16, "Rank of the LoRA.")
    caption_dropout: float = option(0.05, "Part of the examples that are shown without their caption, 0 to 1.")
    keep: int = option(4, "How many LoRAs of earlier checkpoints are kept in OUTPUT/loras, newest first.")
    loss: str = option("l2", "Distance of the network's output from its target: l2 or huber.")
    huber_c: float = option(1e-3, "Where the Huber loss turns from a square into an absolute value.")
    min_snr_gamma: float | None = option(None, "Weigh timesteps by min(SNR, GAMMA), such as 5; all alike if not given.")
    noise_offset: float = option(0.0, "Noise that a whole channel shares, such as 0.05: darker and lighter results.")
    train_text_encoder: bool = option(False, "Adapt the text encoders, too.")
    text_targets: tuple[str, ...] | None = option(None, "Endings of the names of the text encoders' layers.")
    text_learning_rate: float | None = option(None, "Of the text encoders; the UNet's if not given.")
    prior_data: str | None = option(None, "Pictures or prompts of the whole class, which is to stay as it is.")
    prior_weight: float = option(1.0, "Weight of their loss.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_snr_gamma == 0:
            raise ValueError("min_snr_gamma is 0, which weighs everything with 0; leave it out, or give 5.")
        for name in ("text_targets", "text_learning_rate"):
            if getattr(self, name) is not None and not self.train_text_encoder:
                raise ValueError(f"{name} has no effect without train_text_encoder.")


def _check(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` may be the option ``name``'s."""
    choices = _CHOICES.get(name)
    if choices is not None and value not in choices and not (name == "base_precision" and value is None):
        raise ValueError(f"{name} is {value!r}; it must be one of {listed(choices)}.")
    if name in _LOWEST and value is not None:
        lowest, included = _LOWEST[name]
        if not (value >= lowest if included else value > lowest):
            raise ValueError(f"{name} is {value}; it must be {'at least' if included else 'above'} {lowest:g}.")


def default_targets(options: TrainOptions) -> tuple[str, ...]:
    """The targets in the UNet when none are named."""
    return LCM_LORA_TARGETS if isinstance(options, DistillOptions) else ATTENTION_TARGETS
