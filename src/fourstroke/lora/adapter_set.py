"""The adapters that a pipeline holds."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..loading import listed
from .blocks import AdapterWeight, block_weights, component_weight, factor_of, finite, unknown_parts
from .keys import named_weights, unwrap
from .merge import Bases, Terms
from .pairs import AdapterWeights, LoraError, misfit
from .weights import Lora

Names = str | Sequence[str]
Listing = dict[str, list[str]]
Weight = float | Mapping[str, float]
"""What an adapter weighs in one component: a number, or a number for each attention (`blocks.block_weights`)."""


@dataclass(frozen=True)
class _Fused:
    """An adapter merged until `unfuse`: it keeps acting when the adapter itself is deleted."""

    name: str
    lora: Lora
    weight: Weight
    scale: float


class AdapterSet:
    """The adapters of a pipeline's models: which are loaded, which act, and at which weight.

    Every method but `apply` only notes what is wanted; `apply` makes the models' weights what was noted. It recomputes
    ``W <- base + sum`` from the pristine base into the same storage, for the parameters whose sum has changed, so any
    way back ends at the bits of the start, compiled models stay compiled, and a running picture costs nothing extra.

    Weights that are mapped from a file stay there as the base, and the sum gets memory of its own while an adapter
    acts. Others are read again from the model's own file (``model.source``) where that gives the same bits; only
    elsewhere a copy of the base is kept. Meanwhile the weights belong to this object: overwriting them in place, or
    replacing a parameter, gives a new base. Pipelines that share models must share the set.

    Args:
        models: component -> model. Kept and read anew at every `apply`, so it may be a live view of a pipeline.
            Models wrapped by ``torch.compile`` are unwrapped. None is allowed for a component that is not there.
    """

    def __init__(self, models: Mapping[str, nn.Module | None]):
        self.models = models
        self.enabled = True
        self.scale = 1.0
        """Multiplies every adapter that is not fused, as ``cross_attention_kwargs={"scale": …}`` does."""
        self.settle: Callable[[Tensor], Tensor] | None = None
        """Moves sums to where they shall lie, if their base stays mapped from a file."""
        self._loras: dict[str, Lora] = {}
        self._weights: dict[str, dict[str, Weight]] = {}  # component -> adapter -> weight
        self._active: dict[str, tuple[str, ...]] = {}  # component -> adapters
        self._fused: dict[str, tuple[_Fused, ...]] = {}
        self._bases: dict[str, Bases] = {}
        self._revision = 0

    # What is loaded

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the loaded adapters, oldest first."""
        return tuple(self._loras)

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the adapters that act in any component, in the order they were set; also while disabled."""
        return tuple(dict.fromkeys(name for names in self._active.values() for name in names))

    @property
    def fused(self) -> tuple[str, ...]:
        """Names of the adapters that are fused in any component, deleted ones included."""
        return tuple(dict.fromkeys(entry.name for entries in self._fused.values() for entry in entries))

    def __getitem__(self, name: str) -> Lora:
        """Return the loaded adapter ``name``; raises `LoraError` for an unknown one."""
        self._known(name)
        return self._loras[name]

    def list(self) -> Listing:
        """Return component -> names of the loaded adapters that change it."""
        found = {part: [n for n, lora in self._loras.items() if part in lora.components] for part in self.models}
        return {component: names for component, names in found.items() if names}

    def add(self, name: str, lora: Lora, *, hotswap: bool = False) -> None:
        """Load an adapter and let it alone act, at weight 1, in the components that it changes (as diffusers does).

        Args:
            name: a new name, or with ``hotswap`` the name of the adapter to replace, whose weight and state are kept.
            lora: what to add.
            hotswap: replace instead of add.

        Raises:
            LoraError: the name is taken, or with ``hotswap`` it is not; the LoRA does not fit the models.
        """
        if not hotswap and name in self._loras:
            raise LoraError(f"adapter name {name!r} is already in use; choose another, or replace it with hotswap=True")
        if hotswap and name not in self._loras:
            raise LoraError(f"there is no adapter {name!r} to hotswap; loaded: {listed(self._loras) or 'none'}")
        _check(lora, dict(self._present()))
        acting = name in self.active
        self._loras[name] = lora
        self._revision += 1
        for component in lora.components:
            self._weights.setdefault(component, {}).setdefault(name, 1.0)
            active = self._active.get(component, ())
            if not hotswap:
                self._active[component] = (name,)
            elif acting and name not in active:
                self._active[component] = (*active, name)
        self._drop_stale()

    def move(self, names: Names, device: torch.device | str | int) -> None:
        """Keep the tensors of adapters on ``device``; merging works from any device."""
        for name in self._known(names):
            old = self._loras[name]
            moved = self._loras[name] = old.to(device)
            for component, entries in self._fused.items():
                self._fused[component] = tuple(replace(e, lora=moved) if e.lora is old else e for e in entries)
        self._revision += 1

    def delete(self, names: Names) -> None:
        """Unload adapters. A component in which none acts any more falls back to its oldest loaded one.

        Raises:
            LoraError: an unknown name.
        """
        for name in self._known(names):
            del self._loras[name]
        self._revision += 1
        self._drop_stale()

    def _drop_stale(self) -> None:
        """Forget the weights and activity of adapters that are no longer loaded in a component."""
        loaded = self.list()
        for component, active in self._active.items():
            present = loaded.get(component, ())
            kept = tuple(name for name in active if name in present)
            self._active[component] = kept if kept or not active else tuple(present[:1])
        for component, weights in self._weights.items():
            present = loaded.get(component, ())
            self._weights[component] = {name: weight for name, weight in weights.items() if name in present}

    def clear(self) -> None:
        """Unload every adapter and enable the next one; what is fused stays fused."""
        self._loras.clear()
        self._weights.clear()
        self._active.clear()
        self.enabled = True
        self._revision += 1

    # What acts

    def set(self, names: Names, weights: AdapterWeight | None | Sequence[AdapterWeight | None] = None) -> None:
        """Let exactly these adapters act, in every component.

        Args:
            names: loaded adapters; none at all for an empty list.
            weights: one for all or one for each; None is 1. A weight is a number, or for example
                ``{"text_encoder": 0.5, "unet": {"down": 0.9, "up": {"block_0": 0.6, "block_1": [0.4, 0.8, 1]}}}``.

        Raises:
            LoraError: an unknown or repeated name, another number of weights than names, an unknown block.
        """
        names = self._known(names)
        each: list[Any] = [*weights] if isinstance(weights, (list, tuple)) else [weights] * len(names)
        if len(each) != len(names):
            raise LoraError(f"{len(names)} adapter names, but {len(each)} weights; give one weight for each")
        wanted: dict[str, dict[str, Weight]] = {}
        for name, weight in zip(names, each, strict=True):
            if unknown := unknown_parts(weight, self.models):
                message = f"weights for {', '.join(unknown)} are ignored; there are {listed(self.models)}"
                warnings.warn(message, stacklevel=2)
            for component, model in self._present():
                part = block_weights(component_weight(weight, component), model)
                if component in self._loras[name].components:
                    wanted.setdefault(component, {})[name] = part
                elif isinstance(weight, Mapping) and component in weight:
                    warnings.warn(f"adapter {name} has nothing in {component}; its weight is ignored", stacklevel=2)
        self._active = {component: tuple(found) for component, found in wanted.items()}
        for component, found in wanted.items():
            self._weights.setdefault(component, {}).update(found)
        self._revision += 1

    def disable(self) -> None:
        """Let no loaded adapter act, fused or not, until `enable`."""
        self.enabled = False

    def enable(self) -> None:
        """Undo `disable`."""
        self.enabled = True

    def fuse(self, names: Names | None = None, scale: float = 1.0, components: Sequence[str] | None = None) -> None:
        """Merge adapters at their present weight times ``scale`` until `unfuse`, whatever is set or unloaded later.

        Args:
            names: loaded adapters; default those that act. One that is fused already stays as it is.
            scale: further factor.
            components: where; default everywhere.

        Raises:
            LoraError: an unknown adapter or component, a scale that is not a finite number.
        """
        chosen, scale = None if names is None else self._known(names), finite(scale)
        for component in self._components(components):
            for name in self._active.get(component, ()) if chosen is None else chosen:
                lora, entries = self._loras[name], self._fused.get(component, ())
                if component in lora.components and all(entry.lora is not lora for entry in entries):
                    weight = self._weights[component][name]
                    self._fused[component] = (*entries, _Fused(name, lora, weight, scale))
        self._revision += 1

    def unfuse(self, components: Sequence[str] | None = None) -> None:
        """Undo every `fuse` in these components (default all), also of adapters that were unloaded since."""
        for component in self._components(components):
            self._fused.pop(component, None)
        self._revision += 1

    def terms(self, component: str) -> dict[str, Terms]:
        """Return parameter name -> the (weights, factor) that act on it, in order; factors of 0 are left out."""
        found: dict[str, list[tuple[AdapterWeights, float]]] = {}
        for lora, weight, scale in self._acting(component):
            for name, weights in lora.components[component].items():
                factor = factor_of(weight, name) * scale
                if factor != 0:
                    found.setdefault(name, []).append((weights, factor))
        return {name: tuple(terms) for name, terms in found.items()}

    def _acting(self, component: str) -> Iterator[tuple[Lora, Weight, float]]:
        fused = self._fused.get(component, ())
        for entry in fused:
            if self.enabled or all(entry.lora is not lora for lora in self._loras.values()):
                yield entry.lora, entry.weight, entry.scale
        for name in self._active.get(component, ()) if self.enabled else ():
            lora = self._loras[name]
            if all(entry.lora is not lora for entry in fused):
                yield lora, self._weights[component][name], self.scale

    # What it comes to

    def apply(self) -> int:
        """Make the models' weights what was asked for; returns the number of parameters that were rewritten.

        Raises:
            LoraError: an adapter does not fit the model (it was replaced), or a weight is quantised or not in memory.
                Nothing of that component is changed then.
        """
        written, scale = 0, finite(self.scale)
        for component, model in self._present():
            bases = self._bases.get(component)
            if bases is not None and bases.model is not model:
                # Another model took its place: the old one gets its own weights back.
                bases.apply({})
            if bases is None or bases.model is not model:
                bases = self._bases[component] = Bases(component, model, self.settle)
            stamp = (self._revision, self.enabled, scale)
            if bases.stamp != stamp or not bases.intact():
                written += bases.apply(self.terms(component))
                bases.stamp = stamp
        return written

    # Checks

    def _present(self) -> Iterator[tuple[str, nn.Module]]:
        return ((component, unwrap(model)) for component, model in self.models.items() if model is not None)

    def _known(self, names: Names) -> Sequence[str]:
        names = [names] if isinstance(names, str) else [*names]
        if unknown := [name for name in names if name not in self._loras]:
            raise LoraError(f"unknown adapter {', '.join(map(repr, unknown))}; loaded: {listed(self._loras) or 'none'}")
        if len(dict.fromkeys(names)) < len(names):
            raise LoraError(f"an adapter is named twice in {names}")
        return names

    def _components(self, components: Sequence[str] | None) -> Sequence[str]:
        wanted = [*self.models] if components is None else [components] if isinstance(components, str) else components
        if unknown := [component for component in wanted if component not in self.models]:
            raise LoraError(f"unknown component {', '.join(map(repr, unknown))}; there are {listed(self.models)}")
        return wanted


_SET = "_adapter_set"
"""The attribute of a UNet that leads to the set that acts on it."""


class _Link:
    """From a UNet to the set of adapters that acts on it, without keeping the set; copies of the UNet have none."""

    def __init__(self, adapters: AdapterSet | None = None):
        self.adapters = None if adapters is None else weakref.ref(adapters)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


def adapters_of(unet: nn.Module | None, models: Mapping[str, nn.Module | None]) -> AdapterSet:
    """The set of adapters that acts on ``unet``, or a new one for ``models``.

    Pipelines that share a UNet share the set: two would undo each other's merges.
    """
    if unet is None:
        return AdapterSet(models)
    unet = unwrap(unet)
    link: Any = vars(unet).get(_SET)
    found = None if link is None or link.adapters is None else link.adapters()
    if found is None:
        found = AdapterSet(models)
        vars(unet)[_SET] = _Link(found)
    return found


def _check(lora: Lora, models: Mapping[str, nn.Module]) -> None:
    for component, weights in lora.components.items():
        if component not in models:
            raise LoraError(f"LoRA {lora.name} changes {component}, which is not among {listed(models)}")
        parameters = named_weights(models[component])
        if missing := [name for name in weights if name not in parameters]:
            raise LoraError(f"LoRA {lora.name}: {component} has no parameter {listed(missing)}")
        reasons = ((name, misfit(value, parameters[name].shape)) for name, value in weights.items())
        if wrong := [f"{name} ({reason})" for name, reason in reasons if reason]:
            raise LoraError(f"LoRA {lora.name} does not fit {component}: {listed(wrong)}")
