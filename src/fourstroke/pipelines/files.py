"""Pipelines from files and back: repositories, folders, single files."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import hub
from ..loading import read_json, write_json
from ..models.clip import CLIPTextModel
from ..models.clip_vision import CLIPVisionModelWithProjection
from ..models.safety import StableDiffusionSafetyChecker
from ..schedulers import load_scheduler
from ..single_file import load_single_file
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


def read_index(source: str | os.PathLike[str], where: Mapping[str, Any]) -> dict[str, Any]:
    """The ``model_index.json`` of a repository.

    Args:
        source: hub id, shipped name or folder.
        where: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.

    Raises:
        FileNotFoundError: no such repository, or no pipeline in it.
    """
    return read_json(hub.fetch(source, lambda files: hub.required(files, INDEX_NAME), **where) / INDEX_NAME)


def fetch_components(
    source: str | os.PathLike[str], wanted: Mapping[str, str], variant: str | None, where: Mapping[str, Any]
) -> Path:
    """A local folder with the files of the components ``wanted``, a class name by name.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a class is not supported.
    """
    return hub.fetch(
        source,
        lambda files: [file for name, kind in wanted.items() for file in component_files(files, name, kind, variant)],
        **where,
    )


def wanted_components(index: Mapping[str, Any], names: Collection[str]) -> dict[str, str]:
    """The class names of those components in a ``model_index.json`` that are called one of ``names``."""
    found = {
        name: entry[1]
        for name, entry in index.items()
        if name in names and isinstance(entry, list) and entry[1] is not None
    }
    if found.get("unet") == MOTION_UNET:
        # Its own motion modules are those that run; the adapter beside it is what they were made from.
        found.pop("motion_adapter", None)
    return found


def load_repository(
    cls: type[DiffusionPipeline],
    source: str | os.PathLike[str],
    dtype: torch.dtype | None,
    variant: str | None,
    options: Mapping[str, Any],
) -> tuple[type[DiffusionPipeline], dict[str, Any]]:
    """The class and the components of a pipeline in a repository; see `DiffusionPipeline.from_pretrained`.

    Args:
        cls: the class to make; `DiffusionPipeline` itself, which has no components, stands for the one that the
            repository names.
        source: hub id, shipped name or folder.
        dtype, variant, options: as there.

    Raises:
        FileNotFoundError, UnsupportedConfig, WeightError: as there.
    """
    options = dict(options)
    where = {name: options.pop(name) for name in hub.OPTIONS if name in options}
    index = read_index(source, where)
    target = cls if cls.component_names else pipeline_class(index.get("_class_name"))
    given, known = given_components(f"{cls.__name__}.from_pretrained", target, options)
    wanted = wanted_components(index, known - given.keys())
    folder = fetch_components(source, wanted, variant, where)
    given |= {name: value for name, value in index.items() if name in known - given.keys() and is_setting(value)}
    for name in counted(list(wanted)):
        if wanted[name] == MOTION_UNET:
            given[name], adapter = load_motion_unet(folder / name, variant, dtype)
            if "motion_adapter" in known:
                given.setdefault("motion_adapter", adapter)
        else:
            given[name] = load_component(folder / name, wanted[name], variant, dtype)
    return target, given


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
