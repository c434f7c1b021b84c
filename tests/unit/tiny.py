"""Tiny random pipelines built from our own classes, for tests that need no oracle."""

from __future__ import annotations

import numpy as np
import PIL.Image
import torch
from torch import nn

from fourstroke import (
    AutoencoderKL,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    Tokenizer,
    UNet2DConditionModel,
)
from fourstroke.text import END, START

WIDTH = 32


def tokenizer(pad_token: str = END) -> Tokenizer:
    """Bytes, two words and the special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = [("f", "o"), ("fo", "x</w>"), ("r", "e"), ("re", "d</w>")]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), START, END]
    return Tokenizer({token: i for i, token in enumerate(tokens)}, merges, pad_token=pad_token)


def filled(module: nn.Module) -> nn.Module:
    """Random numbers in every parameter; norms stay near one."""
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, std=0.15)
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    return module.eval().requires_grad_(False)


def text_config() -> dict[str, object]:
    vocab = tokenizer()
    return {
        "vocab_size": len(vocab.vocab),
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "projection_dim": WIDTH,
        "bos_token_id": vocab.bos_token_id,
        "eos_token_id": vocab.eos_token_id,
    }


def vae() -> AutoencoderKL:
    return filled(
        AutoencoderKL.from_config(
            {
                "block_out_channels": (8, 8, 16, 16),
                "down_block_types": ("DownEncoderBlock2D",) * 4,
                "up_block_types": ("UpDecoderBlock2D",) * 4,
                "norm_num_groups": 4,
            }
        )
    )


def unet(**changes: object) -> UNet2DConditionModel:
    config = {
        "sample_size": 4,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
    }
    return filled(UNet2DConditionModel.from_config(config | changes))


def scheduler() -> LCMScheduler:
    return LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def sd(**unet_changes: object) -> StableDiffusionPipeline:
    """SD-shaped; 32 x 32 pixels by default."""
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=filled(CLIPTextModel.from_config(text_config())),
        tokenizer=tokenizer(),
        unet=unet(**unet_changes),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def xl() -> StableDiffusionXLPipeline:
    """SDXL-shaped; 32 x 32 pixels by default."""
    torch.manual_seed(0)
    pipe = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=filled(CLIPTextModel.from_config(text_config())),
        text_encoder_2=filled(CLIPTextModelWithProjection.from_config(text_config())),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer("!"),
        unet=unet(
            cross_attention_dim=2 * WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        ),
        scheduler=scheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(seed: int, size: tuple[int, int] = (32, 32)) -> PIL.Image.Image:
    """Coarse noise."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return PIL.Image.fromarray(blocks).resize(size)
