"""What an engine will run, told from names, headers and configurations before anything is loaded."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .families import WEIGHTS, Base, available
from .lora import LoraError, LoraInfo, Settings, inspect_lora, recommended
from .lora.keys import OR
from .pipelines.components import lora_file

LCM = Settings("LCM-LoRA", "LCMScheduler", 4)
# Luo et al. 2023: a UNet that reads the guidance scale.
FULL_LCM = Settings("LCM", "LCMScheduler", 4, 8.0)
# Method of a motion adapter -> the LoRA that was distilled together with it.
MOTION_LORAS: Mapping[str, str] = {"AnimateLCM": "wangfuyun/AnimateLCM/AnimateLCM_sd15_t2v_lora.safetensors"}
# Families whose LoRAs may fit one another.
RELATED = {"SDXL", "SSD-1B"}


@dataclass(frozen=True)
class LoraFile:
    """A LoRA that was asked for: its name, its weight, its file, and what the file's header tells."""

    name: str
    weight: float
    path: Path
    info: LoraInfo

    @property
    def moves(self) -> bool:
        """Whether it changes motion modules."""
        return any("motion_modules" in module for modules in self.info.targets.values() for module in modules)


@dataclass(frozen=True)
class Plan:
    """What will run.

    Attributes:
        loras: in their order, one that makes few steps possible first where the family has one.
        settings: scheduler, steps, guidance and timesteps; None for the model's own scheduler and no opinion.
        motion: place of the motion adapter for animations.
        betas: ``beta_schedule`` that the motion adapter was trained with, where that is not the model's.
    """

    loras: tuple[LoraFile, ...]
    settings: Settings | None
    motion: str | None
    betas: str | None


def make_plan(base: Base, loras: Sequence[str], *, lcm: bool, motion: str | None, where: Mapping[str, Any]) -> Plan:
    """Find the LoRAs, and tell how to run in few steps by what is known of them, the motion adapter and the model.

    Args:
        base: the model.
        loras: ``name`` or ``name:weight`` each.
        lcm: set up for few steps.
        motion: place of a motion adapter; the family's if not given.
        where: how repositories are fetched, see `fourstroke.hub.fetch`.

    Raises:
        FileNotFoundError: a LoRA is not to be found.
        ValueError: one is none, or was made for another family.

    Warns:
        Nothing is known that makes the model a few-step one.
    """
    files = [read_lora_file(text, where) for text in loras]
    motion = motion or available(base.family.motion)
    moving = recommended(motion) if motion else None
    settings, added = _few_step(base, files, moving) if lcm else (None, None)
    if added is not None:
        files.insert(0, _few_step_lora(added, base, where))
    for file in files:
        check_family(file, base)
    betas = None if moving is None else moving.scheduler_options.get("beta_schedule")
    return Plan(tuple(files), settings, motion, betas)


def _few_step(base: Base, files: Sequence[LoraFile], moving: Settings | None) -> tuple[Settings, str | None]:
    """How to run in few steps, and the place of the LoRA to add for it."""
    known = next((file.info.recommended for file in files if file.info.recommended), None)
    if known is not None:
        return known, None
    if moving is not None:
        return moving, MOTION_LORAS.get(moving.method)
    known = recommended(base.name)
    if known is not None or base.embeds_guidance:
        return known or FULL_LCM, None
    lora = available(base.family.lcm_lora)
    if lora is None and base.family.published:
        warnings.warn(
            f"No LCM-LoRA is known for {base.family.name}, and few steps give poor pictures without one; name one, or "
            "use lcm=False.",
            stacklevel=4,
        )
    return LCM, lora


def _few_step_lora(place: str, base: Base, where: Mapping[str, Any]) -> LoraFile:
    try:
        return read_lora_file(place, where)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The LoRA that makes {base.family.name} a few-step model: {error} To run without it use lcm=False."
        ) from error


def split_weight(text: str, what: str = "LoRA") -> tuple[str, float | None]:
    """Split ``name:weight`` (``style.safetensors:0.8``); the weight is None when there is none.

    Raises:
        ValueError: what stands behind the colon is no finite number; the message calls the whole ``what``.
    """
    name, colon, weight = text.rpartition(":")
    # The colon of a Windows path or of a URL has a slash behind it.
    if not colon or "/" in weight or "\\" in weight:
        return text, None
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{what} {text!r}: {weight!r} is not a number; write NAME:WEIGHT, such as {name}:0.8.")
    return name, number


def split_place(place: str) -> tuple[str, str | None]:
    """``owner/name/path/in/it`` -> ``owner/name`` and ``path/in/it``; what lies on this machine stays whole."""
    first, *others = place.split("/")
    if len(others) < 2 or first in ("", ".", "..", "~") or Path(first).is_dir():
        return os.path.expanduser(place), None
    return f"{first}/{others[0]}", "/".join(others[1:])


def read_lora_file(text: str, where: Mapping[str, Any]) -> LoraFile:
    """Find the LoRA called ``text`` (``name`` or ``name:weight``) and read its header.

    Without a weight it is the one that its authors recommend, or 1.

    Raises:
        FileNotFoundError: there is no such file or repository.
        ValueError: it is no LoRA, or a repository holds several.
    """
    name, weight = split_weight(text)
    source, inside = split_place(name)
    if inside is None and source.endswith(WEIGHTS) and not Path(source).is_file():
        raise FileNotFoundError(f"LoRA {text}: there is no such file.")
    path = lora_file(source, inside, None, where)
    info = inspect_lora(path, name=name)
    usual = 1.0 if info.recommended is None else info.recommended.weight
    return LoraFile(name, usual if weight is None else weight, path, info)


def check_family(file: LoraFile, base: Base) -> None:
    """Refuse a LoRA that was made for another family; what the headers do not tell, loading will.

    Raises:
        LoraError: it was; the message names both families.
    """
    theirs, ours = {*file.info.family.split(OR)}, base.family
    if ours.published and not theirs & {ours.name, "unknown"} and not theirs | {ours.name} <= RELATED:
        raise LoraError(
            f"LoRA {file.name}: it was made for {file.info.family}, the model is {ours.name}; use a LoRA of the "
            "model's family."
        )
