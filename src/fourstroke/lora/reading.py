"""Reading LoRA files of every dialect: each key is used exactly once, or named in one error."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..loading import listed, open_tensors
from .keys import (
    OR,
    Key,
    component_of,
    guess_family,
    model_modules,
    named_weights,
    parse_key,
    target_names,
    unsupported_kind,
)
from .pairs import AdapterWeights, Diff, Dora, LoHa, LoKr, LoraError, LoraPair, misfit
from .weights import METADATA_KEY, Lora


def read_lora(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    models: Mapping[str, nn.Module | None],
    *,
    name: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Lora:
    """Read a LoRA of any dialect for the given models. Tensors of a file stay memory-mapped.

    Args:
        source: a ``.safetensors`` file, or its tensors by key (not changed).
        models: component (``"unet"``, ``"text_encoder"``, …) -> model. None: the model is missing on purpose, and its
            keys are left out.
        name: what messages call it; default the file's name without suffix.
        metadata: header entries, beside those of the file.

    Raises:
        LoraError: keys that mean nothing, name no module, do not fit in shape, lack their other half, or hold NaN or
            infinity. One message lists them all; when the LoRA is for another family, it names both families, and of
            many keys the first.
        WeightError, ValueError: the file is broken, or a pickle.

    Warns:
        The LoRA fits, but was made for another family; or it holds the same modules under two names.
    """
    tensors, header, name = _open(source, name)
    reader = _Reader({**header, **(metadata or {})}, models)
    for key, tensor in tensors.items():
        reader.take(key, tensor)
    components = reader.finish()
    message = reader.report()
    if reader.problems:
        raise LoraError(f"LoRA {name}: {message}.")
    if message:
        warnings.warn(f"LoRA {name}: {message}.", stacklevel=2)
    return Lora(name, components, reader.metadata, "+".join(sorted(reader.dialects)) or "kohya")


def read_header(path: Path, file: Any) -> dict[str, str]:
    """Return a header's text entries, with the settings that peft's own ``save_pretrained`` puts beside the file."""
    header = dict(file.metadata() or {})
    settings = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and settings.is_file():
        header.setdefault(METADATA_KEY, settings.read_text(encoding="utf-8"))
    return header


def _open(
    source: str | os.PathLike[str] | Mapping[str, Tensor], name: str | None
) -> tuple[Mapping[str, Tensor], dict[str, str], str]:
    if isinstance(source, Mapping):
        return source, {}, name or "(tensors)"
    path = Path(source)
    file = open_tensors(path)
    tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    return tensors, read_header(path, file), name or path.stem


class _Reader:
    """Sorts keys into targets and collects everything that is wrong with them."""

    def __init__(self, metadata: Mapping[str, str], models: Mapping[str, nn.Module | None]):
        self.metadata = metadata
        self.models = {component: model for component, model in models.items() if model is not None}
        self.absent = {component for component, model in models.items() if model is None}
        self.targets = {component: target_names(model) for component, model in self.models.items()}
        self.parameters = {component: named_weights(model) for component, model in self.models.items()}
        # (component, path) -> the module's name in the file -> role -> (key, tensor)
        self.found: dict[tuple[str, str], dict[str, dict[str, tuple[str, Tensor]]]] = defaultdict(dict)
        self.problems: dict[str, list[str]] = defaultdict(list)
        self.modules: dict[tuple[str, str], int | None] = {}
        self.dialects: set[str] = set()
        self.twice = 0
        self.settings = peft_settings(metadata)

    def take(self, key: str, tensor: Tensor) -> None:
        """Sort one key."""
        parsed = parse_key(key)
        if parsed is None:
            kind = unsupported_kind(key)
            self.problems[f"belong to {kind}, which is not supported" if kind else "are of no known format"].append(key)
            return
        component = self._component(parsed)
        if component in self.absent:
            return
        place = component, parsed.module
        self.modules[place] = input_width(parsed.role, tensor.shape) or self.modules.get(place)
        if component not in self.models:
            self.problems[f"are for {component}, which is not among {', '.join(self.models)}"].append(key)
        elif parsed.module not in self.targets[component]:
            self.problems[f"name no module of {component}"].append(key)
        elif not _finite(tensor):
            self.problems["hold NaN or infinity, or nothing"].append(key)
        else:
            self._add(component, parsed, key, tensor)

    def _component(self, parsed: Key) -> str:
        if parsed.component is not None:
            return parsed.component
        having = (component for component, names in self.targets.items() if parsed.module in names)
        return next(having, component_of(parsed.module))

    def _add(self, component: str, parsed: Key, key: str, tensor: Tensor) -> None:
        if parsed.dialect:
            self.dialects.add(parsed.dialect)
        path = self.targets[component][parsed.module]
        roles = self.found[component, path].setdefault(parsed.module.replace(".", "_"), {})
        if parsed.role in roles:
            self.problems["say one thing twice"] += [roles[parsed.role][0], key]
        roles[parsed.role] = (key, tensor)

    def finish(self) -> dict[str, dict[str, AdapterWeights]]:
        """Build the weights of every target."""
        components: dict[str, dict[str, AdapterWeights]] = {}
        for (component, path), spellings in self.found.items():
            # Merged files hold modules under our and under the original name; diffusers takes the former.
            ours = path.replace(".", "_")
            self.twice += len(spellings) > 1
            roles = spellings[ours] if ours in spellings else next(iter(spellings.values()))
            keys = listed(key for key, _ in roles.values())
            try:
                built = build_weights({role: t for role, (_, t) in roles.items()}, self._alpha(component, path))
            except LoraError as error:
                self.problems["do not make a change"].append(f"{keys} ({error})")
                continue
            for kind, weights in built.items():
                parameter = self.parameters[component].get(f"{path}.{kind}")
                if parameter is None or not parameter.is_floating_point():
                    self.problems[f"want a floating-point {kind}, which {component} lacks there"].append(keys)
                elif reason := misfit(weights, parameter.shape):
                    self.problems["do not fit"].append(f"{keys} ({reason})")
                else:
                    components.setdefault(component, {})[f"{path}.{kind}"] = weights
        if not (self.modules or self.problems or self.absent):
            self.problems["it holds no keys"] = []
        return components

    def _alpha(self, component: str, path: str) -> Callable[[int], float] | None:
        settings = self.settings.get(component, self.settings.get(""))
        return None if settings is None else lambda rank: peft_alpha(settings, path, rank)

    def report(self) -> str:
        """One message for everything that is wrong or strange; empty when nothing is."""
        theirs, ours = guess_family(self.modules), guess_family(model_modules(self.models))
        parts = []
        foreign = "unknown" not in (theirs, ours) and not {*theirs.split(OR)} & {*ours.split(OR)}
        if foreign:
            parts.append(f"it was made for {theirs}, the model is {ours}; use a LoRA of the model's family")
        if self.twice:
            parts.append(f"{self.twice} modules come under two names; the diffusers names are used")
        for what, keys in self.problems.items():
            # Of another family nearly every key is wrong, and one says as much as twenty.
            names = f"such as {keys[0]}" if foreign and len(keys) > 3 else listed(keys)
            parts.append(f"keys that {what} ({len(keys)}): {names}" if keys else what)
        return "; ".join(parts)


def input_width(role: str, shape: Any) -> int | None:
    """Input width of the adapted layer, where one tensor alone tells it."""
    return shape[1] if role in ("lora.down", "diff.change", "hada.w1_b") and len(shape) > 1 else None


def _finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0:
        return False
    wide = tensor if tensor.dtype.itemsize > 1 else tensor.float()  # 8-bit floats have no minimum
    return bool(torch.isfinite(torch.stack(wide.aminmax())).all())


def peft_settings(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return component ("" for all) -> peft's settings, from a file's header; empty when there are none.

    Raises:
        LoraError: the entry is not a JSON object.
    """
    if METADATA_KEY not in metadata:
        return {}
    try:
        flat = json.loads(metadata[METADATA_KEY])
    except json.JSONDecodeError as error:
        raise LoraError(f"the header entry {METADATA_KEY} is not JSON ({error})") from None
    if not isinstance(flat, dict):
        raise LoraError(f"the header entry {METADATA_KEY} must be a JSON object, not {type(flat).__name__}")
    settings: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in flat.items():
        component, dot, entry = key.partition(".")
        settings[component if dot else ""][entry if dot else key] = value
    return dict(settings)


def peft_alpha(settings: Mapping[str, Any], path: str, rank: int) -> float:
    """Return the alpha that peft's settings give to a module; rsLoRA's scale ``alpha / sqrt(rank)`` is put into it."""
    pattern: Mapping[str, float] = settings.get("alpha_pattern") or {}
    default = settings.get("lora_alpha", settings.get("alpha", rank))
    alpha = float(next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), default))
    return alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha


REQUIRED: dict[str, tuple[str, ...]] = {"lora": ("down", "up"), "hada": ("w1_a", "w1_b", "w2_a", "w2_b"), "lokr": ()}
CLASSES: dict[str, type[LoraPair] | type[LoHa] | type[LoKr]] = {"lora": LoraPair, "hada": LoHa, "lokr": LoKr}
"""First part of a role -> the class whose fields the second parts are."""


def build_weights(
    tensors: Mapping[str, Tensor], alpha_of: Callable[[int], float] | None = None
) -> dict[str, AdapterWeights]:
    """Make the weights of one module from its tensors by role.

    Args:
        tensors: role (see `keys.SUFFIXES`) -> tensor.
        alpha_of: alpha for a rank, when the tensors hold none.

    Returns:
        ``{"weight": …}``, ``{"bias": …}`` or both.

    Raises:
        LoraError: a tensor lacks its other half, or two ways of changing the weight are mixed.
    """
    roles = dict(tensors)
    alpha, magnitude, rows, bias, bias_diff = (
        roles.pop(role, None) for role in ("alpha", "magnitude", "magnitude_rows", "lora_bias", "diff_bias")
    )
    if rows is not None:
        magnitude = rows.reshape(-1, 1)
    if alpha is not None and alpha.numel() != 1:
        raise LoraError(f"alpha must be one number, it has shape {tuple(alpha.shape)}")
    if "embedding.A" in roles and "embedding.B" in roles:  # peft keeps an embedding's pair transposed
        roles |= {"lora.up": roles.pop("embedding.A").T, "lora.down": roles.pop("embedding.B").T}
    built: dict[str, AdapterWeights] = {}
    if roles:
        built["weight"] = _build(roles, None if alpha is None else float(alpha), alpha_of, magnitude)
    elif bias_diff is None or bias is not None or magnitude is not None:
        raise LoraError("the weights themselves are missing")
    if bias is not None:
        built["bias"] = Diff(bias, getattr(built["weight"], "scale", 1.0))
    if bias_diff is not None:
        built["bias"] = Diff(bias_diff)
    return built


def _build(
    roles: Mapping[str, Tensor],
    alpha: float | None,
    alpha_of: Callable[[int], float] | None,
    magnitude: Tensor | None,
) -> AdapterWeights:
    kinds = sorted({role.partition(".")[0] for role in roles})
    fields = {role.partition(".")[2]: tensor for role, tensor in roles.items()}
    if kinds == ["diff"] and magnitude is None:
        return Diff(fields["change"])
    if len(kinds) > 1 or kinds[0] not in CLASSES:
        raise LoraError(f"tensors of {' and '.join(kinds)} alone do not belong together")
    if missing := [name for name in REQUIRED[kinds[0]] if name not in fields]:
        raise LoraError(f"{' and '.join(missing)} missing")
    weights = CLASSES[kinds[0]](**fields, alpha=alpha)
    if alpha is None and alpha_of is not None and weights.rank is not None:
        weights = replace(weights, alpha=alpha_of(weights.rank))
    return weights if magnitude is None else Dora(weights, magnitude)
