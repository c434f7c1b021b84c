"""What is trained: low-rank pairs of one or more networks, and their moving average."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..loading import listed
from ..lora.layers import init_pairs, trainable
from ..lora.pairs import LoraError, LoraPair
from ..lora.reading import read_lora
from ..lora.weights import Lora
from .base import Base
from .options import TEXT_TARGETS, LoraOptions, TrainOptions, default_targets

Pairs = Mapping[str, Mapping[str, LoraPair]]
"""Component (``unet``, ``text_encoder``, …) -> parameter name -> pair."""


@dataclass(frozen=True)
class Student:
    """The pairs that are trained, float32 leaf tensors; ``averages`` of them, or None."""

    pairs: Pairs
    averages: Pairs | None = None

    @property
    def best(self) -> Pairs:
        """The averages if there are any, else the pairs."""
        return self.averages or self.pairs

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, ``pairs/unet/….weight/down`` and so on, for a checkpoint."""
        found = {"pairs": self.pairs} if self.averages is None else {"pairs": self.pairs, "averages": self.averages}
        return {f"{kind}/{name}": tensor for kind, pairs in found.items() for name, tensor in named(pairs)}

    @torch.no_grad()
    def average(self, step: int, decay: float) -> None:
        """Move the averages towards the pairs after ``step`` steps, quickly at first: the decay is at most
        ``step / (9 + step)``."""
        if self.averages is not None:
            rate = 1 - min(decay, step / (9 + step))
            # One call for all: there are hundreds of small tensors.
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                leaves(self.averages), leaves(self.pairs), rate
            )

    def lora(self, name: str, metadata: Mapping[str, str] | None = None) -> Lora:
        """The best pairs as an adapter; its tensors are the student's own."""
        return Lora(name, self.best, metadata or {})


def named(pairs: Pairs) -> Iterable[tuple[str, Tensor]]:
    """The tensors of ``pairs`` with their names, ``unet/….weight/down``, in a fixed order."""
    for component, found in pairs.items():
        for name, pair in found.items():
            yield f"{component}/{name}/down", pair.down
            yield f"{component}/{name}/up", pair.up


def leaves(pairs: Pairs) -> list[Tensor]:
    """The tensors of ``pairs``, in the order of `named`."""
    return [tensor for found in pairs.values() for tensor in trainable(found)]


def make_student(base: Base, options: TrainOptions) -> Student:
    """New pairs for the targets, or, with ``init_from``, those of a file.

    Raises:
        LoraError: a target names no layer, or the file's LoRA is not one of these networks, rank and targets.
    """
    generator = torch.Generator().manual_seed(options.seed)
    pairs = {"unet": _new(base.unet, options.targets, default_targets(options), options, generator)}
    if isinstance(options, LoraOptions) and options.train_text_encoder:
        for component in base.text_encoders:
            network = base.network(component)
            pairs[component] = _new(network, options.text_targets, TEXT_TARGETS, options, generator)
    if options.init_from is not None:
        _fill(pairs, base, options.init_from)
    averages = _copy(pairs) if options.ema_decay else None
    return Student(pairs, averages)


def _new(
    network: nn.Module,
    targets: tuple[str, ...] | None,
    default: tuple[str, ...],
    options: TrainOptions,
    generator: torch.Generator,
) -> dict[str, LoraPair]:
    if targets is None:  # of the usual ones those that this network has; a small one may have no downsamplers
        names = [name for name, _ in network.named_modules()]
        targets = tuple(t for t in default if any(name == t or name.endswith(f".{t}") for name in names))
        if not targets:
            raise LoraError(f"{type(network).__name__} has none of the layers {listed(default)}; name targets.")
    pairs = init_pairs(network, targets, options.rank, options.alpha, generator)
    # A LoRA file has each parameter once, however many modules of the network share it.
    own = dict(network.named_parameters())
    return {name: pair for name, pair in pairs.items() if name in own}


@torch.no_grad()
def _fill(pairs: Pairs, base: Base, path: str) -> None:
    """Put the weights of the file at ``path`` into ``pairs``."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"init_from: there is no file {path!r}.")
    lora = read_lora(path, {component: base.network(component) for component in ("unet", *base.text_encoders)})
    given = {(component, name): value for component, name, value in lora.items()}
    wanted = {(component, name): pair for component, found in pairs.items() for name, pair in found.items()}
    missing = [f"{component}.{name}" for component, name in wanted.keys() - given.keys()]
    extra = [f"{component}.{name}" for component, name in given.keys() - wanted.keys()]
    if missing or extra:
        kinds = (("it lacks", missing), ("it has", extra))
        found = "; ".join(f"{word} {listed(sorted(names))}" for word, names in kinds if names)
        raise LoraError(f"init_from {path}: its targets are not those asked for: {found}. Name the file's targets.")
    for place, pair in wanted.items():
        value = given[place]
        if not isinstance(value, LoraPair) or value.rank != pair.rank:
            kind = f"of rank {value.rank}" if isinstance(value, LoraPair) else f"a {type(value).__name__}"
            raise LoraError(f"init_from {path}: {'.'.join(place)} is {kind}, and rank is {pair.rank}; give it as rank.")
        value = value.folded()
        pair.down.copy_(value.down)
        pair.up.copy_(value.up.float() * (value.scale / pair.scale))


def _copy(pairs: Pairs) -> Pairs:
    return {
        component: {
            name: LoraPair(pair.down.detach().clone(), pair.up.detach().clone(), pair.alpha)
            for name, pair in found.items()
        }
        for component, found in pairs.items()
    }
