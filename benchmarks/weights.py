"""Models of real size with random weights: speed does not depend on the weights, so nothing has to be downloaded.

Everything is written when it is first asked for, one network at a time, into a cache folder outside the repository:
float16 safetensors in diffusers' folder layout. ``tiny`` and ``tiny-xl`` have the shape of SD 1.5 and SDXL at a
fraction of their width; ``emoji`` is the family that comes with Fourstroke, with its trained weights.

The weights keep every activation near one, and the noise that a UNet predicts too, so that pictures vary, float16 does
not overflow, and the difference between two number formats shows in the pictures as it would with trained weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourstroke import (
    AutoencoderKL,
    AutoencoderTiny,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    ControlNetModel,
    MotionAdapter,
    UNet2DConditionModel,
    hub,
)
from fourstroke.config import ControlNetConfig
from fourstroke.loading import Model, read_json, save_tensors, write_json
from fourstroke.single_file.assets import CONFIGS, clip_tokenizer

CACHE = Path.home() / ".cache" / "fourstroke-bench"
SHAPES = {"sd15": "sd15", "sdxl": "sdxl", "tiny": "sd15", "tiny-xl": "sdxl"}
WEIGHTS = "diffusion_pytorch_model.safetensors"
EMOJI = {
    "repository": "base",
    "lcm-lora": "lcm-lora/pytorch_lora_weights.safetensors",
    "style-1": "flat-lora/pytorch_lora_weights.safetensors",
    "style-2": "line-lora/pytorch_lora_weights.safetensors",
    "tiny-vae": "tiny-vae",
    "controlnet": "controlnet-canny",
    "motion-adapter": "motion-adapter",
}
# Latents of a random UNet have a standard deviation of about 15; a VAE divides them by this.
SCALING_FACTOR = 16.0
# The modules that the published LCM-LoRAs change, and those that style LoRAs change as a rule.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")
# Rank, alpha, targets and the size of the change beside the weight.
LORAS = {
    "lcm-lora": (64, 8.0, ATTENTION + CONVOLUTIONS, 0.1),
    "style-1": (32, 16.0, ATTENTION, 0.1),
    "style-2": (32, 16.0, ATTENTION, 0.1),
    "style-3": (32, 16.0, ATTENTION, 0.1),
}
# The last layers of residual branches are smaller, so that the sum of many stays near one.
BRANCH_ENDS = ("conv2", "to_out.0", "ff.net.2", "out_proj", "fc2", "proj_out", "conv.4")


def find(model: str, part: str, cache: Path = CACHE) -> Path:
    """The folder or file of a ``part`` of a ``model``, written first if it is not there.

    Args:
        model: ``sd15``, ``sdxl``, ``tiny``, ``tiny-xl`` or ``emoji``.
        part: ``repository``, ``lcm-lora``, ``style-1`` to ``style-3``, ``tiny-vae``, ``controlnet`` or
            ``motion-adapter``.
        cache: where models are kept.

    Raises:
        ValueError: there is no such model or part.
    """
    if model == "emoji" and part in EMOJI:
        return hub.ZOO / "emoji" / EMOJI[part]
    if model not in SHAPES:
        raise ValueError(f"There is no {part} of {model!r}; models are {', '.join(SHAPES)} and emoji.")
    folder = cache / model
    if part == "repository":
        return write_repository(model, folder / "repository")
    if part in LORAS:
        return write_lora(model, part, folder / f"{part}.safetensors")
    if part == "tiny-vae":
        width = [16] * 4 if model.startswith("tiny") else [64] * 4
        sizes = {"encoder_block_out_channels": width, "decoder_block_out_channels": width}
        return write_network(AutoencoderTiny, {**sizes, "scaling_factor": SCALING_FACTOR}, folder / part)
    if part == "controlnet":
        return write_network(ControlNetModel, control_config(config_of(model, "unet")), folder / part)
    if part == "motion-adapter":
        return write_network(MotionAdapter, motion_config(config_of(model, "unet")), folder / part)
    raise ValueError(f"There is no part {part!r}; see `weights.find`.")


def config_of(model: str, component: str) -> dict[str, Any]:
    """The published configuration of a component, or its narrow copy for the tiny models."""
    config = read_json(CONFIGS / SHAPES[model] / component / "config.json")
    if component == "vae":
        config["scaling_factor"] = SCALING_FACTOR
    if not model.startswith("tiny"):
        return config
    if component == "unet":
        levels = len(config["block_out_channels"])
        narrow = {"block_out_channels": [32, 64, 64, 64][:levels], "norm_num_groups": 8, "sample_size": 8}
        narrow |= {"cross_attention_dim": 32, "attention_head_dim": 4}
        if model == "tiny-xl":
            narrow |= {"cross_attention_dim": 64, "transformer_layers_per_block": [1, 1, 2]}
            narrow |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 32}
        return config | narrow
    if component == "vae":
        return config | {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4, "sample_size": 64}
    width = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 32}
    return config | width | {"num_hidden_layers": 3, "num_attention_heads": 4}


def control_config(unet: Mapping[str, Any]) -> dict[str, Any]:
    """A ControlNet for this UNet."""
    fields = {field.name for field in dataclasses.fields(ControlNetConfig)}
    return {name: value for name, value in unet.items() if name in fields and not name.endswith("_channels")} | {
        "block_out_channels": unet["block_out_channels"]
    }


def motion_config(unet: Mapping[str, Any]) -> dict[str, Any]:
    """A motion adapter for this UNet."""
    groups = unet.get("norm_num_groups", 32)
    heads = {"motion_num_attention_heads": 4} if groups < 32 else {}
    return {"block_out_channels": unet["block_out_channels"], "motion_norm_num_groups": groups, **heads}


def write_repository(model: str, folder: Path) -> Path:
    """Write all components of ``model``; the index comes last, so a repository that has one is whole."""
    index = folder / "model_index.json"
    if index.exists():
        return folder
    published = CONFIGS / SHAPES[model]
    for name, (_, kind) in ((k, v) for k, v in read_json(published / index.name).items() if isinstance(v, list)):
        if name.startswith("tokenizer"):
            settings = read_json(published / name / "tokenizer_config.json")
            clip_tokenizer(settings["pad_token"]).save_pretrained(folder / name)
        elif name == "scheduler":
            (folder / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(published / name / "scheduler_config.json", folder / name)
        elif kind is not None:
            classes = (UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection)
            cls = next(cls for cls in classes if cls.__name__ == kind)
            file = "model.safetensors" if name.startswith("text_encoder") else WEIGHTS
            write_network(cls, config_of(model, name), folder / name, file)
    shutil.copy(published / index.name, index)
    return folder


def write_network(cls: type[Model], config: Mapping[str, Any], folder: Path, file: str = WEIGHTS) -> Path:
    """Write ``config.json`` and random float16 weights of a network."""
    if not (folder / file).exists():
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in cls.from_config(config).state_dict().items()}
        write_json(folder / "config.json", {"_class_name": cls.__name__, **config})
        generator = torch.Generator().manual_seed(zlib.crc32(str(folder.name).encode()))
        tensors = {name: random_weight(name, shape, generator) for name, shape in shapes.items()}
        save_tensors(folder / file, tensors, {"format": "pt"})
    return folder


def random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A float16 parameter that keeps activations near one."""
    module = name.rpartition(".")[0]
    values = torch.randn(shape, generator=generator)
    if "embedding" in name and "text_model" in name:  # of tokens and positions
        scale = 0.5
    elif len(shape) < 2:
        scale = 0.05
    else:
        plain = 1.1 if ".layers." in name and "text_model" not in name else 1.0  # a tiny VAE has no norms
        gain = 0.5 if module.endswith(BRANCH_ENDS) else 1.7 if module == "conv_out" else plain
        scale = gain / math.sqrt(math.prod(shape[1:]))
    values *= scale
    if "norm" in name and name.endswith("weight"):
        values += 1
    elif shape == (3,) and name.startswith("decoder.layers"):  # a tiny VAE's pictures go from 0 to 1
        values += 0.5
    return values.half()


def write_lora(model: str, name: str, path: Path) -> Path:
    """Write a LoRA of the UNet in kohya's layout, with the modules and the rank of the published ones."""
    if path.exists():
        return path
    rank, alpha, targets, change = LORAS[name]
    with torch.device("meta"):
        shapes = UNet2DConditionModel.from_config(config_of(model, "unet")).state_dict()
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    tensors: dict[str, Tensor] = {}
    for key, weight in shapes.items():
        module, _, kind = key.rpartition(".")
        if kind != "weight" or not module.endswith(targets):
            continue
        inputs, window = weight.shape[1], weight.shape[2:]
        down = torch.randn(rank, inputs, *window, generator=generator) / math.sqrt(math.prod(weight.shape[1:]))
        up = torch.randn(weight.shape[0], rank, *[1] * len(window), generator=generator)
        prefix = "lora_unet_" + module.replace(".", "_")
        tensors[f"{prefix}.lora_down.weight"] = down.half()
        tensors[f"{prefix}.lora_up.weight"] = (up * change * math.sqrt(rank) / alpha).half()
        tensors[f"{prefix}.alpha"] = torch.tensor(alpha)
    save_tensors(path, tensors, {"format": "pt"})
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["sd15"], help=f"of {', '.join(SHAPES)}; default sd15")
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args()
    for model in options.models:
        for part in ("repository", *LORAS, "tiny-vae"):
            print(find(model, part, options.cache))


if __name__ == "__main__":
    main()
