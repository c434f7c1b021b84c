"""Folders as they ship: config.json and fp16 weights in diffusers' layout, and the index of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from sampling import SCHEDULE
from torch import nn

from fourstroke.config import config_to_dict
from fourstroke.hub import SHARED_NAME
from fourstroke.loading import Model, save_tensors, write_json

VERSION = "0.30.0"  # of diffusers' layout
STEM = "diffusion_pytorch_model"
CLASSES = {
    "text_encoder": ("transformers", "CLIPTextModel"), "tokenizer": ("transformers", "CLIPTokenizer"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"), "tokenizer_2": ("transformers", "CLIPTokenizer"),
    "unet": ("diffusers", "UNet2DConditionModel"), "vae": ("diffusers", "AutoencoderKL"),
    "scheduler": ("diffusers", "DDIMScheduler"), "feature_extractor": (None, None), "image_encoder": (None, None),
    "safety_checker": (None, None),
}  # fmt: skip
SD_PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "safety_checker", "feature_extractor",
            "image_encoder")  # fmt: skip
XL_PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler",
            "feature_extractor", "image_encoder")  # fmt: skip


def half(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict in fp16."""
    return {name: tensor.half() for name, tensor in model.state_dict().items()}


def write_model(model: Model, folder: Path, stem: str = STEM, **extra: object) -> None:
    """config.json and fp16 weights."""
    write_json(folder / "config.json", {**config_to_dict(model.config), "_diffusers_version": VERSION, **extra})
    save_tensors(folder / f"{stem}.safetensors", half(model), metadata={"format": "pt"})


def write_text_encoder(model: Model, folder: Path) -> None:
    """A text encoder as transformers has it."""
    extra = {"model_type": "clip_text_model", "architectures": [type(model).__name__], "torch_dtype": "float32",
             "dropout": 0.0, "attention_dropout": 0.0}  # fmt: skip
    write_model(model, folder, "model", **extra)


def write_pipeline(folder: Path, kind: str, shared: Mapping[str, str], **settings: object) -> None:
    """model_index.json, the scheduler, and, when there are any, the components that are another folder's."""
    scheduler = {**SCHEDULE, "_class_name": "DDIMScheduler", "timestep_spacing": "leading", "trained_betas": None}
    if "scheduler" not in shared:
        write_json(folder / "scheduler" / "scheduler_config.json", {**scheduler, "_diffusers_version": VERSION})
    parts = {name: list(CLASSES[name]) for name in (XL_PARTS if "XL" in kind else SD_PARTS)}
    write_json(folder / "model_index.json", {"_class_name": kind, "_diffusers_version": VERSION, **settings, **parts})
    if shared:
        write_json(folder / SHARED_NAME, dict(shared))
