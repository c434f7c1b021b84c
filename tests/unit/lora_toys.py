"""Small modules and LoRAs for the tests of `fourstroke.lora`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fourstroke.lora import Diff, Lora, LoraPair
from fourstroke.models.unet import UNet2DConditionModel


class Toy(nn.Module):
    """One of each kind of layer that adapters change."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8))
        self.conv = nn.Conv2d(4, 6, 3)
        self.point = nn.Conv2d(4, 6, 1)
        self.line = nn.Conv1d(4, 6, 3)
        self.table = nn.Embedding(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def toy(dtype: torch.dtype = torch.float32, seed: int = 0) -> Toy:
    """A toy with fixed random weights."""
    torch.manual_seed(seed)
    model = Toy().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.to(dtype)


def pair(shape: torch.Size, rank: int = 2, alpha: float | None = 1.0, seed: int = 0) -> LoraPair:
    """A random pair for a parameter of ``shape``."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator)
    return LoraPair(torch.randn(rank, *shape[1:], generator=generator), up, alpha)


def lora(model: nn.Module, name: str = "a", seed: int = 0, component: str = "unet", skip: str = "-") -> Lora:
    """Random pairs for every layer, and changes for the one-dimensional parameters."""
    weights = {
        key: pair(parameter.shape, seed=seed + i) if parameter.ndim > 1 else Diff(torch.randn(parameter.shape))
        for i, (key, parameter) in enumerate(model.named_parameters())
        if skip not in key
    }
    return Lora(name, {component: weights})


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Whether the weights are ``state``, to the bit."""
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[name], state[name]) for name in state)


TINY_UNET: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 768,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
"""SD 1.5's text width."""

TINY_XL: dict[str, Any] = {
    **TINY_UNET,
    "block_out_channels": (8, 16, 16),
    "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
    "transformer_layers_per_block": (1, 1, 5),
}
"""SDXL's text width, and a third level as deep as only SDXL's is."""


def unet(xl: bool = False) -> UNet2DConditionModel:
    """A tiny UNet whose text width is that of a published family."""
    return UNet2DConditionModel.from_config(TINY_XL if xl else TINY_UNET).eval().requires_grad_(False)
