"""The components of a pipeline as files: which class is which, what to fetch, how to load."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import hub
from ..loading import CONFIG_NAME, Model, load_model, read_json, refuse_pickle, select_weights
from ..models.clip import CLIPTextModel, CLIPTextModelWithProjection
from ..models.clip_vision import CLIPImageProcessor
from ..models.safety import StableDiffusionSafetyChecker
from ..models.unet import UNet2DConditionModel
from ..models.vae import AutoencoderKL
from ..models.vae_tiny import AutoencoderTiny
from ..schedulers import load_scheduler
from ..text import FILES as TOKENIZER_FILES
from ..text import Tokenizer

INDEX_NAME = "model_index.json"
SCHEDULER_NAME = "scheduler_config.json"
PROCESSOR_NAME = "preprocessor_config.json"
LORA_NAME = "pytorch_lora_weights.safetensors"

NETWORKS: Mapping[str, type[Model]] = {
    cls.__name__: cls
    for cls in (
        UNet2DConditionModel,
        AutoencoderKL,
        AutoencoderTiny,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        StableDiffusionSafetyChecker,
    )
}
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
PROCESSORS = ("CLIPImageProcessor", "CLIPFeatureExtractor", "CLIPImageProcessorFast", "CLIPImageProcessorPil")


def component_files(files: list[str], name: str, kind: str, variant: str | None) -> list[str]:
    """The files of the component ``name`` of class ``kind``, out of all ``files`` of a repository.

    Raises:
        FileNotFoundError: one is missing.
        ValueError: the class is not supported; pass the component yourself, or None.
    """
    prefix = f"{name}/"
    if kind in TOKENIZERS:
        return [prefix + file for file in TOKENIZER_FILES if prefix + file in files]
    if kind in PROCESSORS:
        return hub.required(files, prefix + PROCESSOR_NAME)
    if name == "scheduler":
        return hub.required(files, prefix + SCHEDULER_NAME)
    if kind in NETWORKS:
        return [*hub.required(files, prefix + CONFIG_NAME), *select_weights(files, prefix, variant)]
    raise ValueError(f"Component {name!r} is a {kind}, which is not supported; pass {name}=… or {name}=None.")


def load_component(folder: Path, kind: str, variant: str | None, dtype: torch.dtype | None) -> Any:
    """Load the component of class ``kind`` from a local folder."""
    if kind in TOKENIZERS:
        return Tokenizer.from_folder(folder)
    if kind in PROCESSORS:
        return CLIPImageProcessor.from_pretrained(folder)
    if kind in NETWORKS:
        return load_model(NETWORKS[kind], folder, variant=variant, dtype=dtype)
    return load_scheduler(kind, read_json(folder / SCHEDULER_NAME))


def lora_file(
    name: str | os.PathLike[str], weight_name: str | None, subfolder: str | None, where: Mapping[str, Any]
) -> Path:
    """The ``.safetensors`` file of a LoRA: the path itself, the one named, or the only one of the repository.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several, or only a pickle.
    """
    refuse_pickle(name)
    if Path(name).is_file():
        return Path(name)
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""

    def select(files: list[str]) -> list[str]:
        if weight_name is not None:
            refuse_pickle(weight_name)
            return hub.required(files, prefix + weight_name)
        found = [file for file in files if file.startswith(prefix) and file.endswith(".safetensors")]
        if prefix + LORA_NAME in found:
            return [prefix + LORA_NAME]
        if len(found) > 1:
            raise ValueError(f"{name} holds several LoRAs; pass weight_name=, one of {', '.join(sorted(found))}.")
        return found or hub.required(files, prefix + LORA_NAME)

    folder = hub.fetch(name, select, **where)
    return (
        folder / select(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()))[0]
    )


def library_of(component: Any) -> str | None:
    """The library that ``model_index.json`` names for ``component``; None for a component that is not there."""
    if component is None:
        return None
    if isinstance(component, StableDiffusionSafetyChecker):
        return "stable_diffusion"
    return "transformers" if isinstance(component, CLIPTextModel | Tokenizer | CLIPImageProcessor) else "diffusers"


def published_class(component: Any) -> str | None:
    """The class that ``model_index.json`` names for ``component``; None for a component that is not there."""
    if component is None:
        return None
    if isinstance(component, Tokenizer):
        return "CLIPTokenizer"
    # A scheduler that is only kept, not run, goes by the name in its configuration.
    return getattr(component, "config", {}).get("_class_name") or type(component).__name__
