"""The components of a pipeline as files: which class is which, what to fetch, how to load."""

from __future__ import annotations

import importlib
import inspect
import itertools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import hub
from ..loading import (
    CONFIG_NAME,
    Model,
    load_model,
    read_json,
    refuse_pickle,
    select_weights,
    warn_unknown,
)
from ..models.clip import CLIPTextModel, CLIPTextModelWithProjection
from ..models.clip_vision import CLIPImageProcessor, CLIPVisionModel, CLIPVisionModelWithProjection
from ..models.controlnet import ControlNetModel
from ..models.motion import MotionAdapter
from ..models.safety import StableDiffusionSafetyChecker
from ..models.t2i_adapter import T2IAdapter
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
        CLIPVisionModelWithProjection,
        ControlNetModel,
        MotionAdapter,
        StableDiffusionSafetyChecker,
        T2IAdapter,
    )
}
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
PROCESSORS = ("CLIPImageProcessor", "CLIPFeatureExtractor", "CLIPImageProcessorFast", "CLIPImageProcessorPil")

# Module of this package -> the published class names that it has pipelines for.
PIPELINES: Mapping[str, tuple[str, ...]] = {
    "stable_diffusion": ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline"),
    "image_to_image": (
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
    ),
    "inpaint": ("StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline"),
    "controlnet": (
        "StableDiffusionControlNetPipeline",
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline",
    ),
    "controlnet_xl": (
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
    ),
    "adapter": ("StableDiffusionAdapterPipeline", "StableDiffusionXLAdapterPipeline"),
    "animatediff": (
        "AnimateDiffPipeline",
        "AnimateDiffControlNetPipeline",
        "AnimateDiffVideoToVideoPipeline",
        "AnimateDiffVideoToVideoControlNetPipeline",
        "AnimateDiffSDXLPipeline",
    ),
}
# Arguments of a constructor that are settings in model_index.json and no components.
SETTINGS = ("requires_safety_checker", "force_zeros_for_empty_prompt", "requires_aesthetics_score")
# Keywords that people pass out of habit and that choose what is done here anyway.
HARMLESS = ("use_safetensors", "low_cpu_mem_usage", "safety_checker_kwargs", "add_watermarker")


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
    foreign = CLIPTextModel | CLIPVisionModel | Tokenizer | CLIPImageProcessor
    return "transformers" if isinstance(component, foreign) else "diffusers"


def published_class(component: Any) -> str | None:
    """The class that ``model_index.json`` names for ``component``; None for a component that is not there."""
    if component is None:
        return None
    if isinstance(component, Tokenizer):
        return "CLIPTokenizer"
    # A scheduler that is only kept, not run, goes by the name in its configuration.
    return getattr(component, "config", {}).get("_class_name") or type(component).__name__


def pipeline_class(name: str | None) -> type[Any]:
    """The pipeline whose published class name is ``name``.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    for module, names in PIPELINES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__package__}.{module}"), name)
    known = ", ".join(itertools.chain(*PIPELINES.values()))
    raise ValueError(f"The repository's pipeline is {name!r}, which is not supported. Supported: {known}.")


def given_components(where: str, target: type[Any], options: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """The components among ``options``, and the names that ``target`` takes; what is neither warns."""
    known = set(inspect.signature(target.__init__).parameters) - {"self"}
    warn_unknown(where, {name: value for name, value in options.items() if name not in known and name not in HARMLESS})
    return {name: value for name, value in options.items() if name in known}, known


def is_setting(value: Any) -> bool:
    """Whether an entry of ``model_index.json`` is a setting and no component."""
    return isinstance(value, bool | int | float | str)


def counted(names: list[str]) -> Iterable[str]:
    """``names``, with a progress bar over them."""
    from tqdm.auto import tqdm

    return tqdm(names, desc="Loading pipeline components")
