"""Tiny configurations of every kind of network, and how an oracle's random weights get into ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

COMMON: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 16,
}
SD_BLOCKS: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
}
XL_EXTRAS: dict[str, Any] = {
    "cross_attention_dim": 24,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
# diffusers' keyword arguments, one entry a published kind of UNet.
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {**COMMON, **SD_BLOCKS, "attention_head_dim": 4},
    "sd21": {
        **COMMON,
        **SD_BLOCKS,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "inpainting": {**COMMON, **SD_BLOCKS, "attention_head_dim": 4, "in_channels": 9},
    "lcm": {**COMMON, **SD_BLOCKS, "attention_head_dim": 4, "time_cond_proj_dim": 16},
    "xl": {
        **COMMON,
        **XL_EXTRAS,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 2),
    },
    "ssd1b": {
        **XL_EXTRAS,
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "sample_size": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
        "attention_head_dim": (2, 4, 4),
        "transformer_layers_per_block": [0, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 0],
    },
}


def randomise(module: nn.Module, std: float = 0.1) -> nn.Module:
    """Give every parameter random values, so that one which is not used, or used twice, changes the result."""
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, std=std)
        parameter.data[parameter == 0] = std
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1.0
    assert all(bool((parameter != 0).all()) for parameter in module.parameters())
    return module.eval().requires_grad_(False)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Equal within 1e-5, relative to the value and to the scale of the whole tensor."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == torch.float32
    scale = float(theirs.abs().max())
    assert scale > 0
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=1e-5, atol=1e-5)


def unet_inputs(config: dict[str, Any], size: tuple[int, int] = (16, 16), batch: int = 2) -> dict[str, Any]:
    """Random arguments of a forward call of the UNet with ``config``; both libraries take them."""
    inputs: dict[str, Any] = {
        "sample": torch.randn(batch, config.get("in_channels", 4), *size),
        "timestep": torch.tensor(499),
        "encoder_hidden_states": torch.randn(batch, 7, config["cross_attention_dim"]),
    }
    if "addition_embed_type" in config:
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        time_ids = torch.tensor([[96.0, 128, 0, 16, 64, 64]]).repeat(batch, 1)
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(batch, pooled), "time_ids": time_ids}
    if "time_cond_proj_dim" in config:
        inputs["timestep_cond"] = torch.randn(batch, config["time_cond_proj_dim"])
    return inputs
