"""The one training loop of the recipe: cosine schedule, averaged weights, exact resume, progress.

A stage gives :func:`train` its networks and a function ``loss(step, generator)``; everything random is drawn from that
one generator, so a run that was killed and started again continues bit for bit from its last checkpoint.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

LossFunction = Callable[[int, torch.Generator], dict[str, Tensor]]
MEASURED_STEPS = 20  # steps timed before a time budget becomes a number of steps; the first few are left out


@dataclass
class Run:
    """What a stage is trained with. ``steps`` 0 means: as many as fit in ``minutes``, measured in the first steps."""

    name: str
    folder: Path
    steps: int = 0
    minutes: float = 0.0
    warmup: int = 100
    ema_decay: float = 0.999
    clip: float = 1.0
    save_every_s: float = 120.0
    seed: int = 0
    after: Callable[[int], None] | None = None
    after_every: int = 500
    started: float = field(default_factory=time.monotonic)


def cosine(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to zero at ``steps`` (0: not yet known)."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    return rise * (0.5 * (1 + math.cos(math.pi * min(step, steps) / steps)) if steps else 1.0)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates for matrices and convolutions (K. Jordan et al., "Muon", 2024).

    The update of a weight of shape (out, in * k * k) is replaced by its nearest semi-orthogonal matrix, found by five
    quintic Newton-Schulz iterations, and scaled by 0.2 * sqrt(longer side), which gives it the size of an AdamW update
    (Liu et al., arXiv 2502.16982), so that both take the same learning rate.
    """

    def __init__(self, weights: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 1e-3):
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            beta, rate = group["momentum"], group["lr"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                average = self.state[weight].setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - beta)
                update = orthogonal(weight.grad.lerp(average, beta).flatten(1))
                weight.mul_(1 - rate * group["weight_decay"])
                weight.add_(update.view_as(weight), alpha=-0.2 * rate * max(update.shape) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """The semi-orthogonal factor of a matrix, nearly: its singular values are moved to about one.

    Newton-Schulz is ``X <- P(X X^T) X`` with ``P(A) = 3.4445 - 4.7750 A + 2.0315 A^2``. All P commute with A, so the
    iteration runs on the small square A alone, ``A <- P A P``, and X is multiplied once, by the product of all P.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    value = matrix.T if tall else matrix
    value = value / (value.norm() + 1e-7)
    gram = value @ value.T
    product = unit = torch.eye(len(gram))
    for _ in range(5):
        factor = 3.4445 * unit - 4.7750 * gram + 2.0315 * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
        gram = (gram + gram.T) / 2
    value = product @ value
    return value.T if tall else value


def optimisers(
    networks: dict[str, tuple[nn.Module, float]], adamw: Iterable[str] = ("conv_in.", "conv_out.", "embed", "position")
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and convolutions inside ``networks`` (name -> (module, peak rate)), AdamW for the rest."""
    inner: list[dict] = []
    outer: list[dict] = []
    for module, rate in networks.values():
        weights = [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]
        chosen = [w.ndim >= 2 and not any(part in name for part in adamw) for name, w in weights]
        inner.append({"params": [w for (_, w), yes in zip(weights, chosen, strict=True) if yes], "lr": rate})
        outer.append({"params": [w for (_, w), yes in zip(weights, chosen, strict=True) if not yes], "lr": rate})
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(outer, lr=1.0, betas=(0.9, 0.99), weight_decay=0.0)]
    if any(group["params"] for group in inner):
        found.append(Muon(inner, lr=1.0))
    return found


def average(kept: dict[str, Tensor], module: nn.Module, step: int, decay: float) -> None:
    """Move the averaged weights towards the module's, quickly at first: min(decay, (1 + step) / (10 + step))."""
    rate = 1 - min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        for name, value in module.state_dict().items():
            kept[name].lerp_(value, rate) if value.is_floating_point() else kept[name].copy_(value)


def train(
    run: Run, networks: dict[str, nn.Module], optimizers: list[torch.optim.Optimizer], loss: LossFunction
) -> dict[str, dict[str, Tensor]]:
    """Train ``networks`` and return their averaged weights, name -> state dict.

    ``loss`` returns named scalars, of which ``"loss"`` is differentiated and all are shown. Peak learning rates are
    those in the optimisers' groups. The final averages are also in ``<folder>/<name>.ema.pt``.
    """
    checkpoint = run.folder / f"{run.name}.pt"
    generator = torch.Generator().manual_seed(run.seed)
    averages = {name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in networks.items()}
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    step, steps = 0, run.steps
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        step, steps, averages = saved["step"], saved["steps"], saved["averages"]
        for name, network in networks.items():
            network.load_state_dict(saved["networks"][name])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        generator.set_state(saved["generator"])
        say(f"{run.name}: resumed at step {step} of {steps}")

    def save() -> None:
        write(checkpoint, {
            "step": step, "steps": steps, "averages": averages, "generator": generator.get_state(),
            "networks": {name: network.state_dict() for name, network in networks.items()},
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        })  # fmt: skip

    weights = [w for optimizer in optimizers for group in optimizer.param_groups for w in group["params"]]
    first, begun, saved_at, shown = step, time.monotonic(), time.monotonic(), {}
    while not steps or step < steps:
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * cosine(step, steps, run.warmup)
        values = loss(step, generator)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        values["loss"].backward()
        torch.nn.utils.clip_grad_norm_(weights, run.clip)
        for optimizer in optimizers:
            optimizer.step()
        for name, network in networks.items():
            average(averages[name], network, step, run.ema_decay)
        step += 1
        shown = {k: v.item() * 0.02 + shown.get(k, v.item()) * 0.98 for k, v in values.items()}
        if step - first == 5:
            begun = time.monotonic()
        rate = (step - first - 5) / (time.monotonic() - begun) if step - first > 5 else 0.0
        if not steps and step == MEASURED_STEPS:
            steps = max(2 * MEASURED_STEPS, int(run.minutes * 60 * rate))
        if step % 20 == 0:
            text = "  ".join(f"{key} {value:.4f}" for key, value in shown.items())
            left = (steps - step) / max(rate, 1e-9) / 60
            say(f"{run.name} {step}/{steps}  {text}  {rate:.2f}/s  {left:.1f} min left")
        if time.monotonic() - saved_at > run.save_every_s or step == steps:
            save()
            saved_at = time.monotonic()
        if run.after and step % run.after_every == 0:
            with use(networks, averages):
                run.after(step)
    write(run.folder / f"{run.name}.ema.pt", averages)
    return averages


class use:  # noqa: N801
    """``with use(networks, averages):`` the networks hold the averaged weights, and their own again afterwards."""

    def __init__(self, networks: dict[str, nn.Module], averages: dict[str, dict[str, Tensor]]):
        self.networks, self.averages = networks, averages
        self.own: dict[str, dict[str, Tensor]] = {}

    def __enter__(self) -> None:
        for name, network in self.networks.items():
            self.own[name] = {k: v.clone() for k, v in network.state_dict().items()}
            network.load_state_dict(self.averages[name])
            network.eval()

    def __exit__(self, *_: object) -> None:
        for name, network in self.networks.items():
            network.load_state_dict(self.own[name])
            network.train()


def write(path: Path, value: object) -> None:
    """Save with torch under a temporary name, then rename: a killed process leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(value, temporary)
    os.replace(temporary, path)


def say(text: str) -> None:
    """One line of progress."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def arguments(description: str | None, minutes: float) -> argparse.ArgumentParser:
    """The options that every stage has: ``--minutes``, ``--steps``, ``--threads``, ``--seed``, ``--name``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=minutes, help="time budget, when --steps is not given")
    parser.add_argument("--steps", type=int, default=0, help="number of steps, exactly")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    return parser
