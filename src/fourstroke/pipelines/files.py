"""Pipelines from files and back: repositories, folders, single files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .. import hub
from ..loading import read_json, write_json
from ..models.clip import CLIPTextModel
from ..models.clip_vision import CLIPVisionModelWithProjection
from ..models.safety import StableDiffusionSafetyChecker
from ..schedulers import load_scheduler
from .components import (
    INDEX_NAME,
    MOTION_UNET,
    component_files,
    counted,
    given_components,
    is_setting,
    library_of,
    load_component,
    load_motion_unet,
    pipeline_class,
    published_class,
)

if TYPE_CHECKING:
    from .pipeline import DiffusionPipeline

# Of the weights of networks that are transformers'.
STEM = "model"
# The release whose layout is written; diffusers does not read every index without it.
LAYOUT = "0.30.0"


class Index(NamedTuple):
    """What a repository's pipeline is made of.

    Attributes:
        source, where: the repository, and how to ask the hub for it.
        target: the class to make.
        given: the arguments that need no file: components that the user gave, and settings.
        wanted: a class name for each component to load.
    """

    source: str | os.PathLike[str]
    where: dict[str, Any]
    target: type[DiffusionPipeline]
    given: dict[str, Any]
    wanted: dict[str, str]


def look_up(
    cls: type[DiffusionPipeline], method: str, source: str | os.PathLike[str], options: Mapping[str, Any]
) -> Index:
    """Read a repository's ``model_index.json``.

    Args:
        cls: the class to make; `DiffusionPipeline` itself, which has no components, stands for the one that the
            repository names.
        method: of ``cls`` that is called, for warnings.
        source: hub id, shipped name or folder.
        options: components by name, and ``revision``, ``token``, ``cache_dir``, ``local_files_only``,
            ``force_download``; others warn.

    Raises:
        FileNotFoundError: no such repository, or no pipeline in it.
        ValueError: the repository's pipeline is of a class that is not supported.
    """
    options = dict(options)
    where = {name: options.pop(name) for name in hub.OPTIONS if name in options}
    index = read_json(hub.fetch(source, lambda files: hub.required(files, INDEX_NAME), **where) / INDEX_NAME)
    target = cls if cls.component_names else pipeline_class(index.get("_class_name"))
    given, known = given_components(f"{cls.__name__}.{method}", target, options)
    open_ = {name: value for name, value in index.items() if name in known - given.keys()}
    wanted = {name: value[1] for name, value in open_.items() if isinstance(value, list) and value[1] is not None}
    if wanted.get("unet") == MOTION_UNET:
        # Its own motion modules are those that run; the adapter beside it is what they were made from.
        wanted.pop("motion_adapter", None)
    given |= {name: value for name, value in open_.items() if is_setting(value)}
    return Index(source, where, target, given, wanted)


def fetch_components(index: Index, variant: str | None) -> Path:
    """A local folder with the files of the components that ``index`` wants.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a class is not supported.
    """

    def select(files: list[str]) -> list[str]:
        return [file for name, kind in index.wanted.items() for file in component_files(files, name, kind, variant)]

    return hub.fetch(index.source, select, **index.where)


def load_repository(
    cls: type[DiffusionPipeline],
    source: str | os.PathLike[str],
    dtype: torch.dtype | None,
    variant: str | None,
    options: Mapping[str, Any],
) -> tuple[type[DiffusionPipeline], dict[str, Any]]:
    """The class and the components of a pipeline in a repository; see `DiffusionPipeline.from_pretrained`.

    Args:
        cls, source, options: as in `look_up`.
        dtype, variant: as there.

    Raises:
        FileNotFoundError, UnsupportedConfig, WeightError: as there.
    """
    index = look_up(cls, "from_pretrained", source, options)
    folder, given = fetch_components(index, variant), index.given
    for name in counted(list(index.wanted)):
        kind = index.wanted[name]
        if kind != MOTION_UNET:
            given[name] = load_component(hub.part(folder, name), kind, variant, dtype)
            continue
        given[name], adapter = load_motion_unet(folder / name, variant, dtype)
        if "motion_adapter" in index.target.component_names:
            given.setdefault("motion_adapter", adapter)
    return index.target, given


def load_checkpoint(
    cls: type[DiffusionPipeline],
    source: str | os.PathLike[str],
    dtype: torch.dtype | None,
    options: Mapping[str, Any],
    **reading: Any,
) -> tuple[type[DiffusionPipeline], dict[str, Any]]:
    """The class and the components of a pipeline in a single file; see `DiffusionPipeline.from_single_file`.

    Args:
        cls, source, dtype, options: as in `load_repository`.
        reading: ``config``, ``prediction_type`` and ``ignore`` of `fourstroke.single_file.load_single_file`.

    Raises:
        FileNotFoundError, ValueError, WeightError: see `fourstroke.single_file.load_single_file`.
    """
    # The tables of the original layouts are read by those alone who load such a file.
    from ..single_file import load_single_file

    options = dict(options)
    where = {name: options.pop(name) for name in hub.OPTIONS if name in options}
    parts = load_single_file(source, dtype=dtype, skip=tuple(options), progress=counted, **reading, **where)
    kind = "StableDiffusionXLPipeline" if "text_encoder_2" in parts else "StableDiffusionPipeline"
    target = cls if cls.component_names else pipeline_class(kind)
    given, known = given_components(f"{cls.__name__}.from_single_file", target, options)
    given = {name: value for name, value in parts.items() if name in known} | given
    if isinstance(given.get("scheduler"), Mapping):
        given["scheduler"] = load_scheduler(given["scheduler"]["_class_name"], given["scheduler"])
    return target, given


def save(pipe: DiffusionPipeline, folder: Path, variant: str | None) -> None:
    """Write all components and ``model_index.json``; see `DiffusionPipeline.save_pretrained`.

    Raises:
        ValueError: a component has no ``save_pretrained``; nothing is written then.
    """
    # Not the wrapper that torch.compile puts around a module.
    components = {name: getattr(part, "_orig_mod", part) for name, part in pipe.components.items()}
    for name, component in components.items():
        if component is not None and not hasattr(component, "save_pretrained"):
            raise ValueError(
                f"The component {name!r} is a {type(component).__name__}, which cannot be saved: set "
                f"pipe.{name} = None first, and pass it to from_pretrained again."
            )
    pipe.merge_adapters()
    index: dict[str, Any] = {"_class_name": type(pipe).__name__, "_diffusers_version": LAYOUT}
    for name, component in components.items():
        index[name] = [library_of(component), published_class(component)]
        if isinstance(component, CLIPTextModel | CLIPVisionModelWithProjection | StableDiffusionSafetyChecker):
            component.save_pretrained(folder / name, variant=variant, stem=STEM)
        elif isinstance(component, nn.Module):
            component.save_pretrained(folder / name, variant=variant)  # pyright: ignore[reportCallIssue]
        elif component is not None:
            component.save_pretrained(folder / name)
    write_json(folder / INDEX_NAME, index | pipe.settings)
