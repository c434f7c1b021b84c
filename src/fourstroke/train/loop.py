"""The one training loop: gradients, step, average, figures, checkpoint, samples.

A kind of training is a function ``loss(student, batch, generator)``. Batches are numbered throughout a run, and all
that is random in one is drawn from a generator that is seeded with its number. So the state is the weights, their
averages, the optimizer and the step; a resumed run goes on to the bit, and two devices do what one does that
accumulates twice.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from ..lora.weights import Layout, Lora, save_lora
from .devices import Devices
from .metrics import Log, Row, open_log
from .options import PRECISIONS, Progress, Stop, TrainOptions
from .state import CHECKPOINT, State
from .student import Student, leaves

LORA_NAME = "pytorch_lora_weights.safetensors"
SHOWN_EVERY = 1.0  # seconds; reading losses waits for the device
UNTIMED = 3  # first steps, which are slower than the others

LossFunction = Callable[[Student, Any, torch.Generator], Tensor]
"""``loss(student, batch, generator)``: the mean over the batch, a scalar that the student's pairs get gradients of."""


class Data(Protocol):
    """What `train` reads: `encoding.Examples`, or anything with numbered batches."""

    def batch(self, index: int, size: int, seed: int, /) -> Any:
        """What the loss reads, a pure function of the arguments; see `encoding.Examples.batch`."""
        ...


@dataclass(frozen=True)
class Run:
    """What a training is made of.

    Attributes:
        loss: see `LossFunction`.
        data: the batches.
        output: the folder that everything is written to.
        settings: JSON values that a checkpoint must agree with, so that its run can go on.
        header: of the LoRA file.
        around: what is in force while losses and gradients are computed.
        sample: makes sample pictures after a step, given the LoRA so far.
        progress: is told how far the run is.
    """

    loss: LossFunction
    data: Data
    output: Path
    options: TrainOptions
    devices: Devices
    settings: Mapping[str, Any] = field(default_factory=dict)
    header: Mapping[str, str] = field(default_factory=dict)
    around: Callable[[], AbstractContextManager[Any]] | None = None
    sample: Callable[[int, Lora], Any] | None = None
    progress: Progress | None = None


def train(run: Run, student: Student, text_rate: float | None = None) -> Path:
    """Train ``student``, or go on where the checkpoint in the output folder is, and write its LoRA.

    Args:
        run: see `Run`.
        student: its pairs are changed in place.
        text_rate: peak learning rate of what is not the UNet's.

    Returns:
        the LoRA file.

    Raises:
        ValueError: the checkpoint in the output folder is of another training, or of more steps.
        RuntimeError: the loss is not a finite number any more.
    """
    options, devices = run.options, run.devices
    optimizer = make_optimizer(student, options, text_rate)
    scaler = torch.amp.GradScaler(devices.device.type, enabled=options.precision == "fp16")
    state = State(student, optimizer, scaler)
    if (run.output / CHECKPOINT).exists():
        state.load(run.output / CHECKPOINT, run.settings)
        if state.step > options.steps:
            raise ValueError(f"steps is {options.steps}, and {run.output} holds {state.step} already; give more.")
    first = state.step
    devices.wait()  # nobody overwrites what another still reads
    peaks = [group["lr"] for group in optimizer.param_groups]
    shown = _Shown(run, state, open_log(options.log, run.output, state.step) if devices.main else None)
    try:
        while state.step < options.steps:
            factor = rate_factor(state.step, options)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            shown.add(_step(run, state), peaks[0] * factor)
            last = state.step == options.steps
            if last or (options.save_every and state.step % options.save_every == 0):
                shown.flush()  # looks at the losses first
                if devices.main:
                    _save(run, state, last)
            if run.sample and options.sample_every and (last or state.step % options.sample_every == 0):
                shown.sample()
    except Stop:
        if devices.main and state.step > first:
            state.save(run.output / CHECKPOINT, run.settings)
        raise
    finally:
        shown.close()
    devices.wait()
    path = run.output / LORA_NAME
    if devices.main and first == options.steps:  # there was nothing to do, but perhaps to write this file
        _save_lora(run, state, path)
    return path


def _step(run: Run, state: State) -> Tensor:
    """One step of the optimizer; returns the mean loss, a detached scalar."""
    options, devices, weights = run.options, run.devices, leaves(state.student.pairs)
    total = torch.zeros((), device=devices.device)
    with run.around() if run.around is not None else nullcontext():
        for micro in range(options.gradient_accumulation):
            place = (state.step * options.gradient_accumulation + micro) * devices.count + devices.rank
            generator = generator_for(options.seed, place)
            loss = run.loss(state.student, run.data.batch(place, options.batch_size, options.seed), generator)
            loss = loss / options.gradient_accumulation
            state.scaler.scale(loss).backward()
            total += loss.detach()
    gradients = [weight.grad if weight.grad is not None else torch.zeros_like(weight) for weight in weights]
    devices.mean_([total, *gradients])
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    state.scaler.unscale_(state.optimizer)
    torch.nn.utils.clip_grad_norm_(weights, options.max_grad_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.student.average(state.step, options.ema_decay)
    return total


def generator_for(seed: int, number: int) -> torch.Generator:
    """The generator, on the CPU, of everything random in the batch of this number."""
    drawn = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(drawn >> np.uint64(1)))


def rate_factor(step: int, options: TrainOptions) -> float:
    """What the peak learning rate is multiplied by in ``step`` (from 0): warm-up, then constant or half a cosine."""
    if step < options.warmup:
        return (step + 1) / options.warmup
    if options.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - options.warmup) / (options.steps - options.warmup)))


def make_optimizer(student: Student, options: TrainOptions, text_rate: float | None = None) -> torch.optim.Optimizer:
    """AdamW over the student's pairs, the UNet's and, where there are others, those with a rate of their own.

    Raises:
        ImportError: bitsandbytes, which is asked for, is not installed; the message names the extra.
    """
    rates = {component: text_rate or options.learning_rate for component in student.pairs}
    rates["unet"] = options.learning_rate
    groups = [{"params": leaves({name: pairs}), "lr": rates[name]} for name, pairs in student.pairs.items()]
    settings: dict[str, Any] = {"betas": options.betas, "weight_decay": options.weight_decay}
    if options.optimizer == "adamw8bit":
        return adamw8bit()(groups, **settings)
    kind = groups[0]["params"][0].device.type
    # One call for all weights: with hundreds of small ones, calls are what a step costs on a CPU.
    return torch.optim.AdamW(groups, **settings, fused=kind in ("cpu", "cuda"))


def adamw8bit() -> Any:
    """The class of AdamW with 8-bit states (Dettmers et al. 2022, arXiv 2110.02861).

    Raises:
        ImportError: bitsandbytes is not installed; the message names the extra.
    """
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("optimizer adamw8bit needs bitsandbytes: pip install 'fourstroke[8bit]'.") from error
    return bitsandbytes.optim.AdamW8bit


def _save(run: Run, state: State, last: bool) -> None:
    state.save(run.output / CHECKPOINT, run.settings)
    if last:
        _save_lora(run, state, run.output / LORA_NAME)
    elif run.options.keep:
        folder = run.output / "loras"
        _save_lora(run, state, folder / f"step-{state.step:06d}.safetensors")
        for path in sorted(folder.glob("step-*.safetensors"))[: -run.options.keep]:
            path.unlink()


def _save_lora(run: Run, state: State, path: Path) -> None:
    header = {**run.header, "steps": str(state.step), "ss_steps": str(state.step)}
    layout = cast(Layout, run.options.layout)
    save_lora(path, state.student.lora(path.stem, header), layout, dtype=PRECISIONS[run.options.save_precision])


class _Shown:
    """The run as it is seen from outside: figures, progress, samples. Losses are read from the device now and then."""

    def __init__(self, run: Run, state: State, log: Log | None):
        self.run, self.state, self.log = run, state, log
        self._waiting: list[tuple[int, Tensor, float]] = []
        self._recent: float | None = None
        self._looked = self._since = time.monotonic()
        self._done = 0
        self._tell()

    def add(self, loss: Tensor, rate: float) -> None:
        self._waiting.append((self.state.step, loss, rate))
        if time.monotonic() - self._looked >= SHOWN_EVERY:
            self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        losses = torch.stack([loss for _, loss, _ in self._waiting]).tolist()
        self._check(losses)
        now = time.monotonic()
        took, self._looked = now - self._looked, now
        self.state.seconds += took
        speed = len(losses) / max(took, 1e-9)
        rows = [
            Row(step, loss, rate, speed, self.state.seconds)
            for (step, _, rate), loss in zip(self._waiting, losses, strict=True)
        ]
        self._waiting.clear()
        for loss in losses:
            if math.isfinite(loss):
                self._recent = loss if self._recent is None else 0.95 * self._recent + 0.05 * loss
        if self.log is not None:
            self.log.write(rows)
        self._tell(len(rows))

    def _check(self, losses: Sequence[float]) -> None:
        """With loss scaling single steps may overflow; they change nothing."""
        broken = [not math.isfinite(loss) for loss in losses]
        if all(broken) if self.state.scaler.is_enabled() else any(broken):
            step = self._waiting[broken.index(True)][0]
            raise RuntimeError(
                f"The loss of step {step} is not a finite number. Start again from the last checkpoint with a lower "
                "learning_rate, or with precision bf16 or fp32, in another output folder (init_from takes a LoRA)."
            )

    def _tell(self, steps: int = 0) -> None:
        if self._done < UNTIMED <= self._done + steps:
            self._since, self._timed = time.monotonic(), self.state.step
        self._done += steps
        if self.run.progress is None or not self.run.devices.main:
            return
        figures = {} if self._recent is None else {"loss": self._recent}
        total, step = self.run.options.steps, self.state.step
        if self._done > UNTIMED and step > self._timed:
            figures["rate"] = (step - self._timed) / max(time.monotonic() - self._since, 1e-9)
            figures["left"] = (total - step) / figures["rate"]
        self.run.progress("training", step, total, figures)

    def sample(self) -> None:
        """Make sample pictures; the time that they take is not the steps'."""
        self.flush()
        if self.run.sample is not None and self.log is not None:
            begun = time.monotonic()
            image = self.run.sample(self.state.step, self.state.student.lora("training"))
            self.log.picture(self.state.step, image)
            self._looked += time.monotonic() - begun
            self._since += time.monotonic() - begun

    def close(self) -> None:
        if self.log is not None:
            self.log.close()


def settings_of(options: TrainOptions, **more: Any) -> dict[str, Any]:
    """What of ``options`` decides a run's numbers, as JSON values, and ``more``; a checkpoint must agree with it.

    With a constant learning rate a run may be made longer later.
    """
    harmless = {"device", "save_every", "keep", "sample_every", "sample_prompts", "log", "layout", "save_precision"}
    harmless |= {"gradient_checkpointing", "cache", "data", "caption"}  # examples are compared themselves
    if options.schedule == "constant":
        harmless.add("steps")
    found = {name: value for name, value in vars(options).items() if name not in harmless}
    return json.loads(json.dumps({**found, **more}))
