"""The loop on a problem that can be worked out by hand: steps, accumulation, averages, figures, checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fourstroke.lora.reading import read_lora
from fourstroke.train import loop, metrics
from fourstroke.train.options import DistillOptions, LoraOptions, TrainOptions
from fourstroke.train.state import CHECKPOINT
from fourstroke.train.student import Student

from .toys import Rows, bits, one_pair, regression, run_of, table

FIVE = {"steps": 5, "batch_size": 3, "learning_rate": 0.01, "save_every": 0, "max_grad_norm": 1e9}


def adamw(student: Student, options: TrainOptions, batches: list[Tensor], rates: list[float]) -> list[Tensor]:
    """The same steps by Loshchilov & Hutter 2019, alg. 2, in float64, the gradient of the regression worked out."""
    pair = student.pairs["unet"]["layer.weight"]
    weights = [pair.down.detach().double().clone(), pair.up.detach().double().clone()]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for t, (x, rate) in enumerate(zip(batches, rates, strict=True), start=1):
        down, up = weights
        x = x.flatten(1).double()
        error = 2 * (x @ down.T @ up.T - 1) / len(x)
        for i, g in enumerate((up.T @ error.T @ x, error.T @ (x @ down.T))):
            first[i] = options.betas[0] * first[i] + (1 - options.betas[0]) * g
            second[i] = options.betas[1] * second[i] + (1 - options.betas[1]) * g**2
            step = first[i] / (1 - options.betas[0] ** t) / ((second[i] / (1 - options.betas[1] ** t)).sqrt() + 1e-8)
            weights[i] = weights[i] - rate * (step + options.weight_decay * weights[i])
    return weights


def test_steps_are_adamws(tmp_path: Path) -> None:
    options = DistillOptions(**FIVE, weight_decay=0.1, betas=(0.8, 0.95))
    run, student, before = run_of(tmp_path, options), one_pair(), one_pair()
    loop.train(run, student)
    batches = [run.data.batch(i, 3, 0).latents for i in range(5)]
    for ours, theirs in zip(bits(student), adamw(before, options, batches, [0.01] * 5), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


def test_accumulation_is_a_larger_batch(tmp_path: Path) -> None:
    large, small = one_pair(), one_pair()
    loop.train(run_of(tmp_path / "a", DistillOptions(**FIVE | {"batch_size": 6})), large)
    loop.train(run_of(tmp_path / "b", DistillOptions(**FIVE, gradient_accumulation=2)), small)
    for one, other in zip(bits(large), bits(small), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for one, other in zip(*(table(tmp_path / name / "metrics.csv")[1:] for name in "ab"), strict=True):
        assert float(one[1]) == pytest.approx(float(other[1]), rel=1e-4)


def test_a_long_gradient_is_shortened(tmp_path: Path) -> None:
    """AdamW's steps do not show it, so the gradients that it gets are watched."""
    norms: list[float] = []
    options = DistillOptions(**FIVE | {"max_grad_norm": 0.1})

    def watched(student: Student, batch: Any, generator: torch.Generator) -> Tensor:
        return regression(student, batch, generator) * 100

    student = one_pair()
    run = dataclasses.replace(run_of(tmp_path, options), loss=watched)
    tensors = [t for pairs in student.pairs.values() for p in pairs.values() for t in (p.down, p.up)]
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *arguments: Any) -> Any:
        norms.append(math.sqrt(sum(float(t.grad.square().sum()) for t in tensors if t.grad is not None)))
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        loop.train(run, student)
    assert norms == pytest.approx([0.1] * 5, rel=1e-4)


def test_averages_follow_the_weights(tmp_path: Path) -> None:
    """In float64: a <- d a + (1 - d) w, where d is the decay, but at most t / (t + 9) after step t."""
    decay, seen = 0.3, []
    options = DistillOptions(**FIVE, ema_decay=decay)
    student = one_pair(averaged=True)
    assert student.averages is not None
    wanted = student.averages["unet"]["layer.weight"].up.double().clone()

    def progress(what: str, done: int, total: int, figures: Any = None) -> None:
        if done > len(seen):
            seen.append(done)

    with pytest.MonkeyPatch.context() as patch:
        original = Student.average

        def average(self: Student, step: int, rate: float) -> None:
            nonlocal wanted
            d = min(decay, step / (step + 9))
            wanted = d * wanted + (1 - d) * self.pairs["unet"]["layer.weight"].up.detach().double()
            original(self, step, rate)

        patch.setattr(Student, "average", average)
        loop.train(run_of(tmp_path, options, progress=progress), student)
    torch.testing.assert_close(student.averages["unet"]["layer.weight"].up.double(), wanted, rtol=1e-6, atol=1e-7)
    assert student.best is student.averages


def test_learning_rates_are_those_of_torchs_schedules() -> None:
    options = DistillOptions(steps=20, warmup=4)
    assert [loop.rate_factor(step, options) for step in range(20)] == [0.25, 0.5, 0.75, *[1.0] * 17]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=16)
    for step in range(4, 20):
        ours = loop.rate_factor(step, dataclasses.replace(options, schedule="cosine"))
        assert ours == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_text_encoders_may_have_a_rate_of_their_own() -> None:
    student = one_pair()
    both = Student({**student.pairs, "text_encoder": one_pair().pairs["unet"]})
    options = LoraOptions(learning_rate=0.5)
    assert [group["lr"] for group in loop.make_optimizer(both, options, 0.1).param_groups] == [0.5, 0.1]
    assert [group["lr"] for group in loop.make_optimizer(both, options).param_groups] == [0.5, 0.5]


class Stop(Exception):
    """The end of a run before its time."""


def stopping(at: int) -> Any:
    def progress(what: str, done: int, total: int, figures: Any = None) -> None:
        if done >= at:
            raise Stop

    return progress


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_that_was_stopped_goes_on_to_the_bit(precision: str, tmp_path: Path) -> None:
    options = DistillOptions(
        **FIVE | {"steps": 6, "save_every": 3},
        schedule="cosine",
        warmup=2,
        gradient_accumulation=2,
        precision=precision,
    )
    whole, halves = one_pair(), one_pair()
    loop.train(run_of(tmp_path / "whole", options), whole)
    with pytest.raises(Stop):
        loop.train(run_of(tmp_path / "halves", options, progress=stopping(6)), halves)
    resumed = one_pair()
    assert not all(map(torch.equal, bits(resumed), bits(whole)))
    loop.train(run_of(tmp_path / "halves", options), resumed)
    assert all(map(torch.equal, bits(resumed), bits(whole)))
    rows = [table(tmp_path / name / "metrics.csv") for name in ("whole", "halves")]
    assert [row[:3] for row in rows[0]] == [row[:3] for row in rows[1]]
    assert [row[0] for row in rows[0]] == ["step", "1", "2", "3", "4", "5", "6"]


def test_a_finished_run_writes_its_file_again_and_may_be_made_longer(tmp_path: Path) -> None:
    options = DistillOptions(**FIVE)
    path = loop.train(run_of(tmp_path, options), one_pair())
    wanted = load_file(path)
    path.unlink()
    again = load_file(loop.train(run_of(tmp_path, options), one_pair()))
    assert again.keys() == wanted.keys() and all(torch.equal(again[key], wanted[key]) for key in wanted)
    longer, whole = one_pair(), one_pair()
    loop.train(run_of(tmp_path, dataclasses.replace(options, steps=8)), longer)
    loop.train(run_of(tmp_path / "whole", dataclasses.replace(options, steps=8)), whole)
    assert all(map(torch.equal, bits(longer), bits(whole)))
    with pytest.raises(ValueError, match="steps is 5, and .* holds 8 already; give more"):
        loop.train(run_of(tmp_path, options), one_pair())


def test_another_training_is_refused_by_what_differs(tmp_path: Path) -> None:
    options = DistillOptions(**FIVE)
    loop.train(run_of(tmp_path, options, settings=loop.settings_of(options, model="a")), one_pair())
    other = dataclasses.replace(options, learning_rate=0.5)
    message = (
        r"checkpoint.safetensors is of another training: learning_rate was 0.01 and is 0.5; model was 'a' and is 'b'"
    )
    with pytest.raises(ValueError, match=message):
        loop.train(run_of(tmp_path, other, settings=loop.settings_of(other, model="b")), one_pair())
    # What changes no number may change.
    harmless = dataclasses.replace(options, save_every=7, keep=3, sample_every=9, layout="peft", steps=6)
    loop.train(run_of(tmp_path, harmless, settings=loop.settings_of(harmless, model="a")), one_pair())
    cosine = dataclasses.replace(options, schedule="cosine")
    assert "steps" in loop.settings_of(cosine) and "steps" not in loop.settings_of(options)


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_file_that_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read; remove it|is not a checkpoint of a training"):
        loop.train(run_of(tmp_path, DistillOptions(**FIVE)), one_pair())


def test_a_loss_that_is_no_number_ends_the_run_and_spares_the_checkpoint(tmp_path: Path) -> None:
    def broken(student: Student, batch: Any, generator: torch.Generator) -> Tensor:
        calls.append(1)
        return regression(student, batch, generator) * (math.nan if len(calls) == 4 else 1)

    calls: list[int] = []
    options = DistillOptions(**FIVE | {"save_every": 2})
    with pytest.raises(RuntimeError, match="The loss of step 4 is not a finite number.*lower learning_rate"):
        loop.train(dataclasses.replace(run_of(tmp_path, options), loss=broken), one_pair())
    again = one_pair()
    loop.train(run_of(tmp_path, options), again)
    whole = one_pair()
    loop.train(run_of(tmp_path / "whole", options), whole)
    assert all(map(torch.equal, bits(again), bits(whole)))


def test_loss_scaling_skips_steps_that_overflow(tmp_path: Path) -> None:
    """The scale starts at 65536; a gradient that overflows with it changes nothing and halves it."""

    def steep(student: Student, batch: Any, generator: torch.Generator) -> Tensor:
        return regression(student, batch, generator) * (1e36 if len(before) == 0 else 1)

    before: list[Any] = []
    student, start = one_pair(), bits(one_pair())
    options = DistillOptions(**FIVE | {"steps": 1}, precision="fp16")
    loop.train(dataclasses.replace(run_of(tmp_path / "a", options), loss=steep), student)
    assert all(map(torch.equal, bits(student), start))
    before.append(1)
    loop.train(dataclasses.replace(run_of(tmp_path / "b", options), loss=steep), student)
    assert not any(map(torch.equal, bits(student), start))


def test_earlier_loras_are_kept_as_asked(tmp_path: Path) -> None:
    options = DistillOptions(**FIVE | {"steps": 9, "save_every": 2}, keep=2, save_precision="fp32")
    path = loop.train(run_of(tmp_path, options, header={"base_model": "tiny"}), one_pair())
    kept = sorted(file.name for file in (tmp_path / "loras").iterdir())
    assert kept == ["step-000006.safetensors", "step-000008.safetensors"]

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 3)

    six = one_pair()
    loop.train(run_of(tmp_path / "six", dataclasses.replace(options, steps=6)), six)
    lora = read_lora(tmp_path / "loras" / kept[0], {"unet": Net()})
    pair: Any = lora.components["unet"]["layer.weight"]
    assert all(map(torch.equal, (pair.down, pair.up), bits(six)))
    assert pair.alpha == 4.0
    header = read_lora(path, {"unet": Net()}).metadata
    assert header["base_model"] == "tiny" and header["steps"] == "9"


def test_progress_tells_loss_rate_and_time_left(tmp_path: Path) -> None:
    told: list[tuple[str, int, int, dict[str, float]]] = []

    def progress(what: str, done: int, total: int, figures: Any = None) -> None:
        told.append((what, done, total, dict(figures or {})))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "SHOWN_EVERY", 0.0)
        loop.train(run_of(tmp_path, DistillOptions(**FIVE | {"steps": 8}), progress=progress), one_pair())
    assert [entry[:3] for entry in told] == [("training", i, 8) for i in range(9)]
    assert told[1][3]["loss"] == pytest.approx(float(table(tmp_path / "metrics.csv")[1][1]), rel=1e-4)
    last = told[-1][3]
    assert last["rate"] > 0 and last["left"] == 0
    assert told[5][3]["left"] == pytest.approx(3 / told[5][3]["rate"])


def test_rows_past_the_checkpoint_and_broken_ones_are_cut(tmp_path: Path) -> None:
    log = metrics.CsvLog(tmp_path, 0)
    log.write([metrics.Row(i, 0.5, 1e-4, 2.0, i / 2) for i in range(1, 6)])
    with log.path.open("a") as file:
        file.write("6,0.2")
    again = metrics.CsvLog(tmp_path, 3)
    again.write([metrics.Row(4, 0.25, 1e-4, 2.0, 2.0)])
    rows = table(log.path)
    assert rows[0] == ["step", "loss", "learning_rate", "steps_per_second", "seconds"]
    assert [(row[0], row[1]) for row in rows[1:]] == [("1", "0.5"), ("2", "0.5"), ("3", "0.5"), ("4", "0.25")]
    assert table(metrics.CsvLog(tmp_path, 0).path) == [rows[0]]


def test_tensorboard_gets_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int | None):
            calls.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def flush(self) -> None:
            pass

        def close(self) -> None:
            calls.append("closed")

    monkeypatch.setattr(metrics, "summary_writer", lambda: SummaryWriter)
    log = metrics.open_log("tensorboard", tmp_path, 3)
    log.write([metrics.Row(4, 0.25, 1e-4, 2.0, 9.0)])
    log.close()
    assert calls == [
        (str(tmp_path), 4), ("loss", 0.25, 4), ("learning_rate", 1e-4, 4), ("steps_per_second", 2.0, 4), "closed",
    ]  # fmt: skip


def test_tensorboard_reads_what_is_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = DistillOptions(**FIVE, log="tensorboard")
    loop.train(run_of(tmp_path, options), one_pair())
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"bitsandbytes: pip install 'fourstroke\[8bit\]'"):
        loop.adamw8bit()
    with pytest.raises(ImportError, match=r"TensorBoard: pip install 'fourstroke\[train\]'"):
        metrics.summary_writer()


def test_states_in_eight_bits_are_kept_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer with bytes and plain numbers in its state, as bitsandbytes has."""

    class AdamW8bit(torch.optim.Optimizer):
        def __init__(self, groups: Any, betas: tuple[float, float], weight_decay: float):
            super().__init__(groups, {"lr": 0.0, "betas": betas, "weight_decay": weight_decay})

        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for weight in group["params"]:
                    state = self.state[weight]
                    state["step"] = state.get("step", 0) + 1
                    state["signs"] = weight.grad.sign().add(1).to(torch.uint8)
                    weight.data -= group["lr"] / state["step"] * (state["signs"].float() - 1)

        def load_state_dict(self, state_dict: Any) -> None:
            super().load_state_dict(state_dict)
            for state in self.state.values():
                state["signs"] = state["signs"].to(torch.uint8)

    fake = types.SimpleNamespace(optim=types.SimpleNamespace(AdamW8bit=AdamW8bit))
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    options = DistillOptions(**FIVE | {"steps": 6, "save_every": 2}, optimizer="adamw8bit")
    whole, resumed = one_pair(), one_pair()
    loop.train(run_of(tmp_path / "whole", options), whole)
    with pytest.raises(Stop):
        loop.train(run_of(tmp_path / "halves", options, progress=stopping(4)), one_pair())
    loop.train(run_of(tmp_path / "halves", options), resumed)
    assert all(map(torch.equal, bits(resumed), bits(whole)))


def test_what_a_batch_draws_depends_on_seed_and_number_alone() -> None:
    first = [torch.randn(3, generator=loop.generator_for(seed, n)).tolist() for seed in (0, 1) for n in (0, 1, 2)]
    again = [torch.randn(3, generator=loop.generator_for(seed, n)).tolist() for seed in (0, 1) for n in (0, 1, 2)]
    assert first == again
    assert len({json.dumps(numbers) for numbers in first}) == 6


def test_batches_are_numbered_throughout_the_run(tmp_path: Path) -> None:
    asked: list[tuple[int, int, int]] = []

    class Watched(Rows):
        def batch(self, index: int, size: int, seed: int) -> Any:
            asked.append((index, size, seed))
            return super().batch(index, size, seed)

    options = DistillOptions(**FIVE | {"steps": 3}, gradient_accumulation=2, seed=7)
    run = run_of(tmp_path, options)
    loop.train(dataclasses.replace(run, data=Watched(torch.randn(12, 4, 1, 1))), one_pair())
    assert asked == [(i, 3, 7) for i in range(6)]
