"""The tiny random networks of `fakehub`, made by diffusers and transformers themselves.

No parameter is zero, and what the networks give is scaled to the range of trained ones: pictures are neither flat nor
saturated, and every condition moves them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import Tensor, nn

from .parity.oracles import COMMON, UNETS, randomise

WIDTH = 32
# What the shared configurations have not: SDXL with three levels, as its T2I-Adapters need them, and its relatives.
XL_LEVELS: dict[str, Any] = {
    **UNETS["xl"],
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4, 4),
    "transformer_layers_per_block": (1, 1, 2),
}
SCORED = {"projection_class_embeddings_input_dim": WIDTH + 5 * 8}
KINDS: Mapping[str, dict[str, Any]] = {
    **UNETS,
    "xl": XL_LEVELS,
    "xl inpainting": {**XL_LEVELS, "in_channels": 9},
    "refiner": {**UNETS["xl"], **SCORED},
}
# Of CLIP's vision tower: 16 patches and the class token.
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "projection_dim": 12,
}


def targets(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """The linear and convolutional layers whose path ends like ``pattern``."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and re.search(pattern, name)
    }
    assert found
    return found


def text_encoder(cls: type[nn.Module], vocab: Mapping[str, int], hidden_act: str) -> nn.Module:
    """A CLIP text tower. ``eos_token_id`` is 2, as in every published Stable Diffusion."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=WIDTH,
        hidden_act=hidden_act,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    encoder = randomise(cls(config), std=0.15)
    nn.init.normal_(encoder.get_input_embeddings().weight, std=1.0)
    return encoder


def vae() -> nn.Module:
    """A VAE of factor 8 whose pictures fill about half of [-1, 1]."""
    model = randomise(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
            sample_size=64,
        ),
        std=0.2,
    )
    latents = torch.randn(4, 4, 8, 8) / model.config.scaling_factor
    normalise(model.decoder.conv_out, lambda: model.decode(latents).sample, 0.35)
    normalise(model.quant_conv, lambda: model.encode(torch.rand(4, 3, 64, 64) * 2 - 1).latent_dist.mean, 3.0)
    return model


def unet(kind: str, cross_attention_dim: int) -> nn.Module:
    """A UNet for 64 x 64 pictures whose prediction has the scale of the noise and depends on the text."""
    config = {**KINDS[kind], "cross_attention_dim": cross_attention_dim, "sample_size": 8}
    model = randomise(diffusers.UNet2DConditionModel(**config), std=0.1)
    # Loud conditions, so that another text, timestep or guidance gives another picture. But no sharper attention, which
    # would make the network chaotic: rounding errors must stay rounding errors over the steps.
    louder = {r"attn2\.(to_v|to_out\.0)$": 3.0, r"attn2\.(to_q|to_k)$": 1.5, r"(time_emb_proj|cond_proj)$": 4.0}
    for pattern, factor in louder.items():
        for layer in targets(model, pattern).values():
            layer.weight.data *= factor
    inputs: dict[str, Any] = {
        "sample": torch.randn(4, config.get("in_channels", 4), 8, 8),
        "timestep": torch.tensor([999, 759, 499, 259]),
        "encoder_hidden_states": torch.randn(4, 77, cross_attention_dim),
    }
    if "addition_embed_type" in config:
        sizes = torch.tensor([[64.0, 64, 0, 0, 6] if kind == "refiner" else [64.0, 64, 0, 0, 64, 64]]).repeat(4, 1)
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(4, WIDTH), "time_ids": sizes}
    if "time_cond_proj_dim" in config:
        inputs["timestep_cond"] = torch.randn(4, config["time_cond_proj_dim"])
    normalise(model.conv_out, lambda: model(**inputs).sample, 1.0)
    return model


@torch.no_grad()
def normalise(layer: nn.Module, output: Callable[[], Tensor], std: float) -> None:
    """Scale and shift the last layer so that ``output()`` has mean 0 and the standard deviation ``std``."""
    layer.weight *= std / output().std()
    layer.bias -= output().mean()


@torch.no_grad()
def round_to_half(module: nn.Module) -> None:
    """Make every parameter a float16 number other than 0, so that both variants of a file hold the same numbers."""
    for parameter in module.parameters():
        parameter[parameter.abs() < 1e-4] = 1e-4
        parameter.copy_(parameter.half())
    assert all(bool((parameter != 0).all()) for parameter in module.parameters())


def controlnet(base: nn.Module) -> nn.Module:
    """A ControlNet for the UNet ``base``, for pictures eight times as large as the latents."""
    net = diffusers.ControlNetModel.from_unet(base, conditioning_embedding_out_channels=(8, 8, 8, 8))
    randomise(net, std=0.1)
    for layer in targets(net, r"controlnet_cond_embedding\.").values():
        layer.weight.data *= 2.0
    return net


def t2i_adapter(base: nn.Module) -> nn.Module:
    """A T2I-Adapter for the UNet ``base``; SDXL's has one feature more than there are levels, for the middle block."""
    channels = list(base.config.block_out_channels)
    xl = base.config.addition_embed_type is not None
    options = {"channels": [*channels, channels[-1]] if xl else channels, "downscale_factor": 16 if xl else 8}
    kind = "full_adapter_xl" if xl else "full_adapter"
    return randomise(diffusers.T2IAdapter(**options, num_res_blocks=1, adapter_type=kind), std=0.1)


def motion_adapter(base: nn.Module, frames: int, mid_block: bool) -> nn.Module:
    """A motion adapter for the UNet ``base`` and up to ``frames`` frames."""
    config = base.config
    adapter = diffusers.MotionAdapter(
        block_out_channels=config.block_out_channels,
        motion_layers_per_block=config.layers_per_block,
        motion_num_attention_heads=2,
        motion_norm_num_groups=config.norm_num_groups,
        motion_max_seq_length=frames,
        use_motion_mid_block=mid_block,
    )
    return randomise(adapter, std=0.1)


def safety_checker() -> tuple[nn.Module, Any]:
    """A safety checker that flags nothing, and its feature extractor."""
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(vision_config=VISION, text_config=text, projection_dim=20)
    checker = randomise(StableDiffusionSafetyChecker(config))
    for thresholds in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        thresholds.fill_(1.0)
    # The one that works on PIL images was called so until transformers 5.
    processor: Any = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    return checker, processor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})


assert COMMON["block_out_channels"] == (32, 64), "these networks are made for two levels"
