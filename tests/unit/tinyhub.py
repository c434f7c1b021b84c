"""A cache of tiny random repositories under published names: a model with the shape of SD 1.5, and all that fits it.

Nothing but the text width (768) is of the true size, and that is what tells the family.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fourstroke import (
    CLIPTextModel,
    CLIPVisionModelWithProjection,
    ControlNetModel,
    DDIMScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    T2IAdapter,
)
from fourstroke.lora.layers import LCM_LORA_TARGETS, init_pairs
from fourstroke.models.ip_adapter import cross_attentions
from fourstroke.models.motion import attach_motion_

from . import tiny

TEXT_WIDTH = 768
CANNY, DEPTH = "lllyasviel/control_v11p_sd15_canny", "lllyasviel/control_v11f1p_sd15_depth"
T2I_CANNY, T2I_DEPTH = "TencentARC/t2iadapter_canny_sd15v2", "TencentARC/t2iadapter_depth_sd15v2"
LCM_LORA, MOTION = "latent-consistency/lcm-lora-sdv1-5", "guoyww/animatediff-motion-adapter-v1-5-2"
ANIMATELCM, ANIMATELCM_LORA = "wangfuyun/AnimateLCM", "AnimateLCM_sd15_t2v_lora.safetensors"
IP_ADAPTER = "h94/IP-Adapter"
WEIGHTS = "pytorch_lora_weights.safetensors"
FRAMES = 8


def publish(cache: Path, name: str) -> Path:
    """The folder for the files of the repository ``name``, in the layout of huggingface_hub's cache."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    folder = repository / "snapshots" / "0123abc"
    folder.mkdir(parents=True)
    return folder


def model(width: int = TEXT_WIDTH, **unet_changes: Any) -> StableDiffusionPipeline:
    """A pipeline whose text states are ``width`` wide; its own scheduler is DDIM."""
    pipe: Any = tiny.sd(cross_attention_dim=width, **unet_changes)
    text = {**tiny.text_config(), "hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 1}
    pipe.text_encoder = tiny.filled(CLIPTextModel.from_config(text))
    pipe.scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return pipe


def lora(unet: Any, path: Path, seed: int = 0, targets: tuple[str, ...] = LCM_LORA_TARGETS, scale: float = 0.2) -> Path:
    """A LoRA of rank 2 with weights that make a difference."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, pair in init_pairs(unet, targets, rank=2, alpha=2, generator=generator).items():
        name = name.removesuffix(".weight")
        tensors[f"unet.{name}.lora_A.weight"] = pair.down.detach()
        tensors[f"unet.{name}.lora_B.weight"] = torch.randn(pair.up.shape, generator=generator) * scale
    save_file(tensors, path)
    return path


def controlnet(unet: Any) -> ControlNetModel:
    return tiny.filled(ControlNetModel.from_unet(unet))


def t2i_adapter() -> T2IAdapter:
    shape = {"in_channels": 3, "channels": [16, 32], "num_res_blocks": 1, "downscale_factor": 8}
    return tiny.filled(T2IAdapter.from_config({**shape, "adapter_type": "full_adapter"}))


def motion_adapter() -> MotionAdapter:
    return tiny.filled(
        MotionAdapter.from_config(
            {
                "block_out_channels": (16, 32),
                "motion_layers_per_block": 1,
                "motion_num_attention_heads": 2,
                "motion_norm_num_groups": 4,
                "motion_max_seq_length": FRAMES,
                "use_motion_mid_block": False,
            }
        )
    )


def ip_adapter(unet: Any) -> dict[str, Tensor]:
    """One embedding of width 12 -> four tokens."""
    rows = 4 * TEXT_WIDTH
    tensors = {
        "image_proj.proj.weight": torch.randn(rows, 12),
        "image_proj.proj.bias": torch.randn(rows),
        "image_proj.norm.weight": 1 + 0.3 * torch.randn(TEXT_WIDTH),
        "image_proj.norm.bias": torch.randn(TEXT_WIDTH),
    }
    for i, (_, attention) in enumerate(cross_attentions(unet)):
        for part in "kv":
            shape = (attention.to_k.out_features, TEXT_WIDTH)
            tensors[f"ip_adapter.{2 * i + 1}.to_{part}_ip.weight"] = torch.randn(shape) * 0.3
    return tensors


def image_encoder() -> CLIPVisionModelWithProjection:
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape = {**sizes, "image_size": 28, "patch_size": 7, "projection_dim": 12}
    return tiny.filled(CLIPVisionModelWithProjection.from_config(shape))


def build(cache: Path, folder: Path) -> None:
    """The model in ``folder``, and in ``cache`` whatever its family's short names stand for."""
    torch.manual_seed(0)
    pipe: Any = model()
    pipe.save_pretrained(folder)
    unet = pipe.unet
    repositories: dict[str, Callable[[], Any]] = {
        CANNY: lambda: controlnet(unet),
        DEPTH: lambda: controlnet(unet),
        T2I_CANNY: t2i_adapter,
        T2I_DEPTH: t2i_adapter,
        MOTION: motion_adapter,
        ANIMATELCM: motion_adapter,
    }
    folders = {name: publish(cache, name) for name in repositories}
    for name, make in repositories.items():
        make().save_pretrained(folders[name])
    lora(unet, publish(cache, LCM_LORA) / WEIGHTS, seed=1)
    lora(unet, folders[ANIMATELCM] / ANIMATELCM_LORA, seed=2)
    pictures = publish(cache, IP_ADAPTER) / "models"
    image_encoder().save_pretrained(pictures / "image_encoder", stem="model")
    for name in ("ip-adapter_sd15", "ip-adapter-plus-face_sd15"):
        save_file(ip_adapter(unet), pictures / f"{name}.safetensors")


def motion_lora(path: Path) -> Path:
    """A LoRA for motion modules and for nothing else."""
    pipe: Any = model()
    attach_motion_(pipe.unet, motion_adapter())
    lora(pipe.unet, path, seed=3, scale=3.0)
    from safetensors.torch import load_file

    save_file({key: tensor for key, tensor in load_file(path).items() if "motion_modules" in key}, path)
    return path
