"""What a LoRA file is, told without a model: family, dialect, rank, trigger words, and how to run it."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..loading import listed, open_tensors
from .keys import component_of, guess_family, parse_key, unsupported_kind
from .pairs import LoraError
from .reading import input_width, peft_alpha, peft_settings, read_header


@dataclass(frozen=True)
class Recipe:
    """How the authors of a few-step adapter run it.

    Attributes:
        method: its common name.
        scheduler: class name of the noise scheduler.
        steps: number of steps.
        guidance_scale: 1 and less mean no guidance.
        scheduler_options: arguments for ``Scheduler.from_config``.
        call_options: arguments for the pipeline's call.
        weight: of the adapter.
    """

    method: str
    scheduler: str
    steps: int
    guidance_scale: float
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    call_options: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0


_TRAILING = {"timestep_spacing": "trailing"}

RECIPES: tuple[tuple[str, Recipe], ...] = (
    (
        r"animatelcm|animate-lcm",
        Recipe("AnimateLCM", "LCMScheduler", 6, 2.0, {"beta_schedule": "linear"}, weight=0.8),
    ),
    (r"hyper[-_ ]?sd.*cfg", Recipe("Hyper-SD (CFG preserved)", "DDIMScheduler", 8, 5.0, _TRAILING)),
    (
        r"hyper[-_ ]?sd.*(?<!\d)1[-_ ]?step",
        Recipe("Hyper-SD", "TCDScheduler", 1, 0.0, call_options={"eta": 1.0}),
    ),
    (r"hyper[-_ ]?sd", Recipe("Hyper-SD", "DDIMScheduler", 4, 0.0, _TRAILING)),
    (r"lightning", Recipe("SDXL-Lightning", "EulerDiscreteScheduler", 4, 0.0, _TRAILING)),
    (
        r"dmd2",
        Recipe("DMD2", "LCMScheduler", 4, 0.0, call_options={"timesteps": (999, 749, 499, 249)}),
    ),
    (r"(?:^|[-_ /])tcd", Recipe("TCD", "TCDScheduler", 4, 0.0, call_options={"eta": 0.3})),
    (
        r"(?:^|[-_ /])pcm.*normalcfg",
        Recipe("PCM", "TCDScheduler", 4, 5.0, _TRAILING, {"eta": 0.3}),
    ),
    (r"(?:^|[-_ /])pcm", Recipe("PCM", "TCDScheduler", 4, 1.5, _TRAILING, {"eta": 0.3})),
    (r"(?:^|[-_ /])lcm", Recipe("LCM-LoRA", "LCMScheduler", 4, 1.0)),
)
"""Pattern over a file's name, or what its header says of itself -> how to run it; the first match holds."""

_NAMING = ("modelspec.title", "ss_output_name", "modelspec.description", "name", "title")


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
        recipe: how to run it when it is a known few-step adapter, else None.
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
    recipe: Recipe | None
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
    folders = "/".join(path.absolute().parts[-4:-1])  # in the hub's cache the repository's name is three above the file
    labels = [path.stem, name or "", *(metadata.get(key, "") for key in _NAMING), folders]
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
        recipe=recommend(labels),
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
    if phrase := metadata.get("modelspec.trigger_phrase") or metadata.get("ss_trigger_words"):
        return tuple(word.strip() for word in phrase.split(",") if word.strip())
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        counts: Counter[str] = Counter()
        for tags in folders.values():
            counts.update({tag.strip(): int(count) for tag, count in tags.items()})
    except (json.JSONDecodeError, AttributeError, TypeError, ValueError):
        return ()  # trainers write what they like here; it is a hint, no more
    return tuple(tag for tag, _ in counts.most_common(limit) if tag)


def recommend(labels: list[str]) -> Recipe | None:
    """Return how to run a few-step adapter from texts that may name it; the number of steps is read from them too."""
    for label in labels:
        text = label.lower()
        for pattern, recipe in RECIPES:
            if re.search(pattern, text):
                steps = re.search(r"(\d+)[-_ ]?steps?\b", text.replace("_", " "))
                timed = "timesteps" in recipe.call_options
                return recipe if steps is None or timed else Recipe(**{**vars(recipe), "steps": int(steps[1])})
    return None
