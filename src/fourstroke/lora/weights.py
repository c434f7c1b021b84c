"""A LoRA as a value, and its way to a file."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..loading import save_tensors
from .pairs import AdapterWeights, Diff, Dora, LoHa, LoKr, LoraError, LoraPair, map_tensors

__all__ = ["AdapterWeights", "Diff", "Dora", "LoHa", "LoKr", "Lora", "LoraError", "LoraPair", "Layout", "save_lora"]

Layout = Literal["kohya", "peft", "diffusers"]

METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers keeps peft's settings in a file's header, as JSON."""

KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


@dataclass(frozen=True, eq=False)
class Lora:
    """An adapter of one or more models, as data. Two are equal only when they are the same object.

    Attributes:
        name: what messages call it (the file's name without suffix).
        components: component (``"unet"``, ``"text_encoder"``, …) -> parameter name (``….to_q.weight``) -> weights.
        metadata: the text entries of the file's header.
        dialect: ``"kohya"``, ``"peft"``, ``"diffusers"``, ``"lycoris"``, or several joined by ``"+"``.
    """

    name: str
    components: Mapping[str, Mapping[str, AdapterWeights]]
    metadata: Mapping[str, str] = field(default_factory=dict)
    dialect: str = "kohya"

    def items(self) -> Iterator[tuple[str, str, AdapterWeights]]:
        """Yield (component, parameter name, weights)."""
        for component, weights in self.components.items():
            for name, value in weights.items():
                yield component, name, value

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur, most frequent first."""
        counts = Counter(value.rank for _, _, value in self.items() if value.rank is not None)
        return tuple(rank for rank, _ in counts.most_common())

    @property
    def rank(self) -> int | None:
        """The most frequent rank; None when nothing is low-rank."""
        return self.ranks[0] if self.ranks else None

    @property
    def alpha(self) -> float | None:
        """The most frequent alpha; None when there is none, that is for a scale of 1."""
        counts = Counter(_alpha(value) for _, _, value in self.items() if value.rank is not None)
        return counts.most_common(1)[0][0] if counts else None

    @property
    def num_parameters(self) -> int:
        """Number of stored values, alphas left out."""
        return sum(t.numel() for _, _, value in self.items() for name, t in value.tensors().items() if name != "alpha")

    def to(self, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None) -> Lora:
        """Return a copy with its tensors on ``device`` and in ``dtype``."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype)

        parts = self.components.items()
        moved = {part: {name: map_tensors(value, move) for name, value in weights.items()} for part, weights in parts}
        return replace(self, components=moved)


def _alpha(weights: AdapterWeights) -> float | None:
    return getattr(weights.change if isinstance(weights, Dora) else weights, "alpha", None)


def save_lora(
    path: str | os.PathLike[str],
    lora: Lora,
    layout: Layout = "kohya",
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a ``.safetensors`` file, atomically.

    ``"kohya"`` holds everything: ``lora_unet_….lora_down.weight``, ``….alpha``, LoHa, LoKr, ``dora_scale``, ``diff``.
    ``"peft"`` holds pairs and DoRA as diffusers writes them, alphas in the header. ``"diffusers"`` is the oldest form,
    ``unet.….lora.up.weight``; it has no place for alpha, which is multiplied into ``up``.

    Args:
        path: the file; its name must end in ``.safetensors``.
        lora: what to write.
        layout: see above.
        dtype: of the stored tensors; default the tensors' own.
        metadata: further entries of the header, beside the LoRA's own.

    Raises:
        LoraError: another file name, an unknown layout, or weights that the layout cannot hold.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise LoraError(f"LoRAs are written as .safetensors, not as {path.name}; change the file name")
    writers = {"kohya": _kohya, "peft": _peft, "diffusers": _diffusers}
    if layout not in writers:
        raise LoraError(f"unknown layout {layout!r}; one of {', '.join(writers)}")
    kept = {key: value for key, value in lora.metadata.items() if key != METADATA_KEY}
    header = {"format": "pt", **kept, **(metadata or {})}
    tensors: dict[str, Tensor] = {}
    for component, name, weights in lora.items():
        module, _, kind = name.rpartition(".")
        tensors |= writers[layout](component, module, kind, weights)
    if layout == "peft":
        header[METADATA_KEY] = json.dumps(_peft_settings(lora), sort_keys=True)
    save_tensors(path, {key: _stored(key, tensor, dtype) for key, tensor in tensors.items()}, header)


def _stored(key: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    stored = tensor if dtype is None or key.endswith(".alpha") else tensor.to(dtype)
    return stored.detach().clone()  # a file must not hold two views of one storage


def _kohya(component: str, module: str, kind: str, weights: AdapterWeights) -> dict[str, Tensor]:
    if component not in KOHYA_PREFIXES:
        raise LoraError(f"kohya's layout has no name for {component}; it knows {', '.join(KOHYA_PREFIXES)}")
    if component != "unet" and not module.startswith(("text_model.", "text_projection")):
        module = f"text_model.{module}"
    prefix = KOHYA_PREFIXES[component] + module.replace(".", "_")
    tensors = weights.tensors()
    if kind == "bias":
        tensors = {"diff_b": tensors["diff"]}
    return {f"{prefix}.{suffix}": tensor for suffix, tensor in tensors.items()}


def _peft(component: str, module: str, kind: str, weights: AdapterWeights) -> dict[str, Tensor]:
    prefix, magnitude = f"{component}.{module}", {}
    if isinstance(weights, Dora):
        if weights.magnitude.shape[0] != weights.magnitude.numel():
            raise LoraError(f"peft's DoRA norms rows, the magnitude of {module} is for columns; use layout='kohya'")
        magnitude = {f"{prefix}.lora_magnitude_vector": weights.magnitude.flatten()}
        weights = weights.change
    pair = _plain(module, kind, weights, "peft")
    if pair.down.ndim > 2:
        magnitude = {key: m.reshape(1, -1, *[1] * (pair.down.ndim - 2)) for key, m in magnitude.items()}
    return {f"{prefix}.lora_A.weight": pair.down, f"{prefix}.lora_B.weight": pair.up, **magnitude}


def _diffusers(component: str, module: str, kind: str, weights: AdapterWeights) -> dict[str, Tensor]:
    pair = _plain(module, kind, weights, "diffusers")
    up = (pair.up.float() * pair.scale).to(pair.up.dtype)
    infix = "lora" if component == "unet" else "lora_linear_layer"
    return {f"{component}.{module}.{infix}.down.weight": pair.down, f"{component}.{module}.{infix}.up.weight": up}


def _plain(module: str, kind: str, weights: AdapterWeights, layout: str) -> LoraPair:
    if kind != "weight" or not isinstance(weights, LoraPair):
        raise LoraError(f"layout={layout!r} cannot hold the {type(weights).__name__} of {module}.{kind}; use 'kohya'")
    return weights.folded()


def _peft_settings(lora: Lora) -> dict[str, Any]:
    """Settings that peft needs to rebuild the adapter: one rank and alpha a component, and patterns of exceptions."""
    settings: dict[str, Any] = {}
    for component, weights in lora.components.items():
        # Without ``text_model.`` the names fit CLIP with and without it: peft compares endings.
        modules = {name.removeprefix("text_model.").removesuffix(".weight"): v for name, v in weights.items()}
        start = "^" if component == "unet" else ""
        ranks = {module: value.rank for module, value in modules.items() if value.rank is not None}
        given = {module: _alpha(modules[module]) for module in ranks}
        alphas = {module: ranks[module] if alpha is None else alpha for module, alpha in given.items()}
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        entries = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {start + module: value for module, value in ranks.items() if value != rank},
            "alpha_pattern": {start + module: value for module, value in alphas.items() if value != alpha},
            "target_modules": sorted(modules),
            "use_dora": any(isinstance(value, Dora) for value in modules.values()),
        }
        settings |= {f"{component}.{key}": value for key, value in entries.items()}
    return settings
