"""The components of a pipeline as files: which class is which, what to fetch, how to load."""

from __future__ import annotations

import importlib
import inspect
import itertools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import hub
from ..config import UnsupportedConfig, config_from_dict
from ..loading import (
    CONFIG_NAME,
    Model,
    WeightSource,
    build,
    load_model,
    read_json,
    refuse_pickle,
    select_weights,
    warn_unknown,
)
from ..models.clip import CLIPTextModel, CLIPTextModelWithProjection
from ..models.clip_vision import CLIPImageProcessor, CLIPVisionModel, CLIPVisionModelWithProjection
from ..models.controlnet import ControlNetModel, MultiControlNetModel
from ..models.motion import SLOT, MotionAdapter, config_of
from ..models.safety import StableDiffusionSafetyChecker
from ..models.t2i_adapter import MultiAdapter, T2IAdapter
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
# Several networks as one component, each in a folder of its own.
CONTAINERS: Mapping[str, type[MultiControlNetModel] | type[MultiAdapter]] = {
    "MultiControlNetModel": MultiControlNetModel,
    "MultiAdapter": MultiAdapter,
}
# A UNet with motion modules, as diffusers saves it.
MOTION_UNET = "UNetMotionModel"
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
    if kind in NETWORKS or kind == MOTION_UNET:
        return [*hub.required(files, prefix + CONFIG_NAME), *select_weights(files, prefix, variant)]
    if kind in CONTAINERS:
        hub.required(files, prefix + CONFIG_NAME)
        configs = [file for file in files if re.fullmatch(rf"{re.escape(name)}(_\d+)*/{CONFIG_NAME}", file)]
        folders = [file.removesuffix(CONFIG_NAME) for file in configs]
        return configs + [file for folder in folders for file in select_weights(files, folder, variant)]
    raise ValueError(f"Component {name!r} is a {kind}, which is not supported; pass {name}=… or {name}=None.")


def load_component(folder: Path, kind: str, variant: str | None, dtype: torch.dtype | None) -> Any:
    """Load the component of class ``kind`` from a local folder."""
    if kind in TOKENIZERS:
        return Tokenizer.from_folder(folder)
    if kind in PROCESSORS:
        return CLIPImageProcessor.from_pretrained(folder)
    if kind in NETWORKS:
        return load_model(NETWORKS[kind], folder, variant=variant, dtype=dtype)
    if kind in CONTAINERS:
        return CONTAINERS[kind].from_pretrained(folder, variant=variant, dtype=dtype)
    return load_scheduler(kind, read_json(folder / SCHEDULER_NAME))


def load_motion_unet(
    folder: Path, variant: str | None, dtype: torch.dtype | None
) -> tuple[UNet2DConditionModel, MotionAdapter]:
    """A UNet that was saved with motion modules, as the UNet for pictures and the motion adapter that it is made of.

    Raises:
        UnsupportedConfig: the configuration asks for what one of the two cannot be.
        WeightError: the weights do not fit.
    """
    config = read_json(folder / CONFIG_NAME)
    if config.get("mid_block_layers", 1) != 1 or config.get("reverse_motion_num_attention_heads") is not None:
        raise UnsupportedConfig(f"{folder}: only UNetMotionModels made from a UNet and a motion adapter are supported.")
    motion = re.compile("motion|temporal|mid_block_layers")
    picture = {name: value for name, value in config.items() if not motion.search(name) and value is not None}
    picture["attention_head_dim"] = picture.pop("num_attention_heads")
    for name in ("down_block_types", "up_block_types"):
        picture[name] = [kind.replace("Motion", "2D") for kind in picture[name]]
    files = [folder / name for name in select_weights([path.name for path in folder.iterdir()], "", variant)]

    def part(motion: bool) -> WeightSource:
        published = MotionAdapter.published_name if motion else UNet2DConditionModel.published_name
        return WeightSource.from_files(files, lambda key: published(key) if (SLOT in key) == motion else None)

    source = part(motion=True)
    heads = config.get("motion_num_attention_heads", 8)
    told = {
        "motion_num_attention_heads": tuple(heads) if isinstance(heads, list) else heads,
        "motion_norm_num_groups": config.get("norm_num_groups", 32),
    }
    adapter = build(MotionAdapter, replace(config_of(source, str(folder)), **told), source, dtype=dtype)
    unet_config = config_from_dict(UNet2DConditionModel.config_class, picture)
    return build(UNet2DConditionModel, unet_config, part(motion=False), dtype=dtype, where=str(folder)), adapter


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
    return folder / select(hub.listing(folder))[0]


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
    """The components among ``options``, and the names that ``target`` takes; what is neither, and not None, warns."""
    known = set(inspect.signature(target.__init__).parameters) - {"self"}
    unknown = {name: value for name, value in options.items() if name not in known and name not in HARMLESS}
    warn_unknown(where, {name: value for name, value in unknown.items() if value is not None})
    return {name: value for name, value in options.items() if name in known}, known


def several(component: Any, name: str) -> list[Any]:
    """A component that may be one network, a list of them, or a container that holds them as ``name``."""
    if component is None:
        return []
    return list(component if isinstance(component, list | tuple) else getattr(component, name, [component]))


def is_setting(value: Any) -> bool:
    """Whether an entry of ``model_index.json`` is a setting and no component."""
    return isinstance(value, bool | int | float | str)


def counted(names: list[str]) -> Iterable[str]:
    """``names``, with a progress bar over them."""
    from tqdm.auto import tqdm

    return tqdm(names, desc="Loading pipeline components")
