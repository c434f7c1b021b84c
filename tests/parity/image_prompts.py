"""IP-Adapter files as they are published, with random weights: what `test_ip_adapter` reads with both libraries."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from fourstroke.models.clip_vision import CLIPImageProcessor, CLIPVisionModelWithProjection

from .lora_files import World
from .oracles import randomise

# CLIP's vision tower: 16 patches and the class token.
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "projection_dim": 12,
}
PATCHES = 17
CLIP_WIDTHS = {"plain": 12, "full": 32, "plus": 32}
Nested = dict[str, dict[str, Tensor]]


def normal(*shape: int, std: float = 0.3) -> Tensor:
    tensor = torch.randn(*shape) * std
    tensor[tensor == 0] = std
    return tensor


def affine(name: str, width: int) -> dict[str, Tensor]:
    return {f"{name}.weight": 1 + normal(width), f"{name}.bias": normal(width)}


def plain_projection(width: int, tokens: int = 4) -> dict[str, Tensor]:
    rows = tokens * width
    return {"proj.weight": normal(rows, 12), "proj.bias": normal(rows), **affine("norm", width)}


def full_projection(width: int) -> dict[str, Tensor]:
    first = {"proj.0.weight": normal(32, 32), "proj.0.bias": normal(32)}
    return {**first, "proj.2.weight": normal(width, 32), "proj.2.bias": normal(width), **affine("proj.3", width)}


def plus_projection(
    width: int, tokens: int = 5, hidden: int = 20, inner: int = 128, depth: int = 4
) -> dict[str, Tensor]:
    """Two heads of 64; diffusers knows this depth only."""
    tensors = {
        "latents": normal(1, tokens, hidden),
        "proj_in.weight": normal(hidden, 32),
        "proj_in.bias": normal(hidden),
    }
    tensors |= {"proj_out.weight": normal(width, hidden), "proj_out.bias": normal(width), **affine("norm_out", width)}
    for i in range(depth):
        tensors |= affine(f"layers.{i}.0.norm1", hidden) | affine(f"layers.{i}.0.norm2", hidden)
        tensors |= {
            f"layers.{i}.0.to_q.weight": normal(inner, hidden),
            f"layers.{i}.0.to_kv.weight": normal(2 * inner, hidden),
            f"layers.{i}.0.to_out.weight": normal(hidden, inner),
            f"layers.{i}.1.1.weight": normal(4 * hidden, hidden),
            f"layers.{i}.1.3.weight": normal(hidden, 4 * hidden),
        }
        tensors |= affine(f"layers.{i}.1.0", hidden)
    return tensors


PROJECTIONS = {"plain": plain_projection, "full": full_projection, "plus": plus_projection}


def adapter(unet: nn.Module, kind: str) -> Nested:
    """A random adapter for an oracle; the number of a layer is its place among the oracle's attention processors."""
    layers = {}
    names = [name.removesuffix(".processor") for name in unet.attn_processors]  # type: ignore[union-attr]
    for number, name in enumerate(names):
        if not name.endswith("attn2"):
            continue
        inner, width = unet.get_submodule(name).to_k.weight.shape  # type: ignore[union-attr,misc]
        for part in "kv":
            layers[f"{number}.to_{part}_ip.weight"] = normal(inner, width)
    return {"image_proj": PROJECTIONS[kind](width), "ip_adapter": layers}


def flat(nested: Nested) -> dict[str, Tensor]:
    return {f"{part}.{key}": tensor for part, tensors in nested.items() for key, tensor in tensors.items()}


def write(nested: Nested, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(flat(nested), path)
    return path


def repository(folder: Path, files: dict[str, Nested], encoders: tuple[str, ...] = ("models/image_encoder",)) -> Path:
    """A repository laid out as h94/IP-Adapter is; its image encoder is `encoder`'s."""
    for name, nested in files.items():
        write(nested, folder / name)
    for place in encoders:
        encoder().save_pretrained(folder / place)
    return folder


def embeds(kind: str, rows: int = 2, images: int = 1) -> Tensor:
    """Random embeddings of pictures, as an adapter of this kind takes them."""
    width = CLIP_WIDTHS[kind]
    return torch.randn(rows, images, width) if kind == "plain" else torch.randn(rows, images, PATCHES, width)


def picture(seed: int = 0, size: tuple[int, int] = (40, 33)) -> PIL.Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values).resize(size, PIL.Image.Resampling.BICUBIC)


def encoder() -> nn.Module:
    """The oracle's image encoder."""
    return randomise(transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION)))


def give_encoder(world: World) -> SimpleNamespace:
    """An image encoder and a feature extractor for the oracle; and what stands for our pipeline, with the same ones."""
    theirs = encoder()
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    # The one that works on PIL images was called so until transformers 5.
    processor: Any = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    world.pipe.register_modules(image_encoder=theirs, feature_extractor=processor(**size))
    ours = CLIPVisionModelWithProjection.from_config(theirs.config.to_dict()).eval().requires_grad_(False)
    ours.load_state_dict({ours.published_name(name): tensor for name, tensor in theirs.state_dict().items()})
    return stand_in(world, ours, CLIPImageProcessor(**size))  # type: ignore[arg-type]


def stand_in(world: World, image_encoder: Any = None, feature_extractor: Any = None) -> SimpleNamespace:
    """What the functions under test need of a pipeline."""
    names = ["unet", "image_encoder", "feature_extractor"] + ([] if world.xl else ["safety_checker"])
    return SimpleNamespace(
        component_names=tuple(names),
        unet=world.ours["unet"],
        image_encoder=image_encoder,
        feature_extractor=feature_extractor,
        device=torch.device("cpu"),
        dtype=torch.float32,
        _execution_device=torch.device("cpu"),
        _bring=lambda *_: None,
    )


def load_both(world: World, pipe: Any, nested: list[Nested], load: Any) -> None:
    """The same adapters in both libraries."""
    count = len(nested)
    for own in (lambda *a, **k: load(pipe, *a, **k), world.pipe.load_ip_adapter):
        own(nested, subfolder=[""] * count, weight_name=[""] * count, image_encoder_folder=None)


def oracle(world: World, image_embeds: list[Tensor]) -> Tensor:
    """diffusers' UNet with pictures."""
    added = {**world.inputs.get("added_cond_kwargs", {}), "image_embeds": image_embeds}
    with torch.no_grad():
        return world.pipe.unet(**{**world.inputs, "added_cond_kwargs": added}).sample
