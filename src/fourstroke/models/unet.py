"""The UNet of Stable Diffusion 1.5, 2.x, SDXL and SSD-1B; what differs between them is data in the configuration."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ControlNetConfig, UNetConfig, config_to_dict
from ..loading import CONFIG_NAME, WEIGHT_STEMS, Model, save_tensors, weight_name, write_json
from .layers import (
    Context,
    Downsample2D,
    Prompts,
    ResnetBlock2D,
    TimestepEmbedding,
    Transformer2DModel,
    Upsample2D,
    timestep_embedding,
)

if TYPE_CHECKING:
    from .controlnet import ControlNetModel

DownConfig: TypeAlias = UNetConfig | ControlNetConfig
"""What the way down and the middle are built from: a control network is a copy of these."""

_ATTACHED = re.compile(r"\.motion_modules\.")
"""Names of tensors that other networks have put into the UNet's slots."""


class Residuals(NamedTuple):
    """What a control network or an adapter adds inside the UNet.

    Attributes:
        down: one tensor a skip connection, in the order in which the down path makes them (ControlNet).
        mid: added after the mid block (ControlNet).
        intra: one tensor a down block, added inside it (T2I-Adapter), and after them, perhaps, one for the mid block.
    """

    down: tuple[Tensor, ...] = ()
    mid: Tensor | None = None
    intra: tuple[Tensor, ...] = ()


def add_residuals(first: Residuals | None, second: Residuals) -> Residuals:
    """What two controls or adapters add together: the sum of each part that both have, else the one that is there.

    Raises:
        ValueError: they have different numbers of tensors in one part, so they belong to different kinds of UNet.
    """
    if first is None:
        return second
    mid = first.mid
    if second.mid is not None:
        mid = second.mid if mid is None else mid + second.mid
    return Residuals(_sums("down", first.down, second.down), mid, _sums("intra", first.intra, second.intra))


def _sums(part: str, first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if not (first and second):
        return first or second
    if len(first) != len(second):
        raise ValueError(
            f"The {part} residuals of two controls are {len(first)} and {len(second)} tensors: they are made for "
            "different kinds of UNet (SD 1.5's has 12 skip connections, SDXL's 9). Use controls of one kind."
        )
    return tuple(a + b for a, b in zip(first, second, strict=True))


class Stage(nn.Module):
    """One level of the network: resnets, each with an optional transformer and an optional motion module after it."""

    resnets: nn.ModuleList
    attentions: nn.ModuleList | None

    def __init__(self) -> None:
        super().__init__()
        self.motion_modules: nn.ModuleList | None = None

    def layer(self, i: int, x: Tensor, temb: Tensor, context: Context, frames: int | None) -> Tensor:
        """Resnet ``i`` and what follows it: (N, C_in, H, W) -> (N, C, H, W)."""
        x = self.resnets[i](x, temb)
        if self.attentions is not None:
            x = self.attentions[i](x, context)
        return x if self.motion_modules is None or frames is None else self.motion_modules[i](x, frames)


class DownBlock(Stage):
    """A level on the way down; every layer's output is kept for the way up."""

    def __init__(self, config: DownConfig, level: int, in_channels: int, temb_channels: int):
        super().__init__()
        channels = config.block_out_channels[level]
        layers = config.per_level("layers_per_block")[level]
        self.attentions = _transformers(config, config.down_block_types[level], level, _down_depths(config)[level])
        self.resnets = nn.ModuleList(
            ResnetBlock2D(
                channels if i else in_channels, channels, temb_channels, config.norm_num_groups, config.norm_eps
            )
            for i in range(layers)
        )
        last = level == len(config.block_out_channels) - 1
        self.downsamplers = None if last else nn.ModuleList([Downsample2D(channels)])

    def forward(
        self, x: Tensor, temb: Tensor, context: Context, frames: int | None, intra: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """(N, C_in, H, W) -> (N, C, H/2, W/2) and the skip connections.

        ``intra`` is added where T2I-Adapters were trained: before the downsampler of a block with attention
        (N, C, H, W), after that of a block without (N, C, H/2, W/2); the skip connection has it too.
        """
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, temb, context, frames)
            if intra is not None and self.attentions is not None and i == len(self.resnets) - 1:
                x = x + intra
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips.append(x)
        if intra is not None and self.attentions is None:
            x = skips[-1] = x + intra
        return x, skips


class MidBlock(nn.Module):
    """Resnet, transformer, resnet at the lowest resolution; SSD-1B has one resnet and no transformer."""

    def __init__(self, config: DownConfig, temb_channels: int):
        super().__init__()
        level = len(config.block_out_channels) - 1
        channels = config.block_out_channels[level]
        crossed = config.mid_block_type == "UNetMidBlock2DCrossAttn"
        depths = (_depths(config.transformer_layers_per_block, level, 1)[0],) if crossed else ()
        self.attentions = nn.ModuleList(_transformer(config, level, depth) for depth in depths)
        self.resnets = nn.ModuleList(
            ResnetBlock2D(channels, channels, temb_channels, config.norm_num_groups, config.norm_eps)
            for _ in range(1 + len(depths))
        )
        self.motion_modules: nn.ModuleList | None = None

    def forward(self, x: Tensor, temb: Tensor, context: Context, frames: int | None) -> Tensor:
        """(N, C, h, w) -> (N, C, h, w)."""
        x = self.resnets[0](x, temb)
        for i, attention in enumerate(self.attentions):
            x = attention(x, context)
            if self.motion_modules is not None and frames is not None:
                x = self.motion_modules[i](x, frames)
            x = self.resnets[i + 1](x, temb)
        return x


class UpBlock(Stage):
    """A level on the way up; every layer takes one skip connection. ``level`` counts down the network."""

    def __init__(self, config: UNetConfig, level: int, in_channels: int, temb_channels: int):
        super().__init__()
        outputs = config.block_out_channels
        channels, top = outputs[level], level == 0
        layers = config.per_level("layers_per_block")[level] + 1
        position = len(outputs) - 1 - level
        self.attentions = _transformers(config, config.up_block_types[position], level, _up_depths(config)[level])
        last_skip = outputs[0] if top else outputs[level - 1]
        self.resnets = nn.ModuleList(
            ResnetBlock2D(
                (channels if i else in_channels) + (channels if i < layers - 1 else last_skip),
                channels,
                temb_channels,
                config.norm_num_groups,
                config.norm_eps,
            )
            for i in range(layers)
        )
        self.upsamplers = None if top else nn.ModuleList([Upsample2D(channels)])

    def forward(
        self,
        x: Tensor,
        skips: list[Tensor],
        temb: Tensor,
        context: Context,
        frames: int | None,
        size: tuple[int, int] | None,
    ) -> Tensor:
        """(N, C_in, H, W) and its skip connections (taken off the list's end) -> (N, C, 2H, 2W) or ``size``."""
        for i in range(len(self.resnets)):
            x = self.layer(i, torch.cat([x, skips.pop()], dim=1), temb, context, frames)
        return x if self.upsamplers is None else self.upsamplers[0](x, size)


class UNet2DConditionModel(Model):
    """Predicts the noise (or v, or the sample) in latents, given a timestep and a text.

    References: Rombach et al. 2022 (SD), Podell et al. 2023 (SDXL's micro-conditioning), Gupta et al. 2024 (SSD-1B),
    Luo et al. 2023 (guidance embedding, ``time_cond_proj_dim``).
    """

    config_class = UNetConfig

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        self.config: UNetConfig = config
        outputs, groups = config.block_out_channels, config.norm_num_groups
        levels = range(len(outputs))
        temb_channels = 4 * outputs[0]
        self.conv_in = nn.Conv2d(config.in_channels, outputs[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(outputs[0], temb_channels, config.time_cond_proj_dim)
        if config.addition_embed_type == "text_time":
            if not (config.projection_class_embeddings_input_dim and config.addition_time_embed_dim):
                raise ValueError(
                    "UNet2DConditionModel: addition_embed_type 'text_time' needs addition_time_embed_dim and "
                    "projection_class_embeddings_input_dim; SDXL has 256 and 2816."
                )
            self.add_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim, temb_channels)
        self.down_blocks = nn.ModuleList(
            DownBlock(config, level, outputs[max(level - 1, 0)], temb_channels) for level in levels
        )
        self.mid_block = MidBlock(config, temb_channels) if config.mid_block_type else None
        self.up_blocks = nn.ModuleList(
            UpBlock(config, level, outputs[min(level + 1, len(outputs) - 1)], temb_channels)
            for level in reversed(levels)
        )
        self.conv_norm_out = nn.GroupNorm(groups, outputs[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(outputs[0], config.out_channels, 3, padding=1)
        self.image_projections: nn.ModuleList | None = None

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, variant: str | None = None, stem: str = WEIGHT_STEMS[0]
    ) -> None:
        """As `Model.save_pretrained`, without attached motion modules and IP-Adapters, which have their own files."""
        own = {name: tensor for name, tensor in self.state_dict().items() if not _ATTACHED.search(name)}
        folder = Path(save_directory)
        write_json(folder / CONFIG_NAME, config_to_dict(self.config))
        save_tensors(folder / weight_name(stem, variant), own, metadata={"format": "pt"})

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        *,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        timestep_cond: Tensor | None = None,
        residuals: Residuals | None = None,
        image_tokens: Sequence[Tensor] = (),
        frames: int | None = None,
    ) -> Tensor:
        """One network evaluation.

        Args:
            sample: noisy latents (N, in_channels, h, w); for animation N is videos x frames, frames running fastest.
            timestep: diffusion timestep(s) in [0, 1000), a number or (N,).
            encoder_hidden_states: text (N, L, cross_attention_dim).
            added_cond_kwargs: SDXL only: ``text_embeds`` (N, D) and ``time_ids`` (N, 6).
            timestep_cond: guidance embedding (N, time_cond_proj_dim), LCM only.
            residuals: what control networks and adapters add.
            image_tokens: one tensor (N, tokens, cross_attention_dim) an attached IP-Adapter, from
                `ip_adapter.project`; without any, the adapters do nothing.
            frames: frames a video; None for pictures, which motion modules leave alone.

        Returns:
            (N, out_channels, h, w) in the dtype of the parameters.

        Raises:
            ValueError: SDXL's second conditioning is missing, or there are not as many image tokens as IP-Adapters; or
                ``frames`` is more than an attached motion adapter has positions for, or N is no multiple of it.
        """
        down, mid, intra = residuals or Residuals()
        context = self._context(encoder_hidden_states, image_tokens)
        temb = embed(self, timestep, sample.shape[0], added_cond_kwargs, timestep_cond)
        x = self.conv_in(sample)
        skips = [x]
        for i, block in enumerate(self.down_blocks):
            x, kept = block(x, temb, context, frames, intra[i] if intra else None)
            skips += kept
        if down:
            skips = [skip + more for skip, more in zip(skips, down, strict=True)]
        if self.mid_block is not None:
            x = self.mid_block(x, temb, context, frames)
        if len(intra) > len(self.down_blocks):
            # SDXL's adapters have a feature map more than SDXL has levels; it belongs here.
            x = x + intra[-1]
        if mid is not None:
            x = x + mid
        for i, block in enumerate(self.up_blocks):
            # The next level's size is its skip connection's, so that odd sizes come back as they were.
            below = len(skips) - len(cast(UpBlock, block).resnets) - 1
            size = (skips[below].shape[-2], skips[below].shape[-1]) if i < len(self.up_blocks) - 1 else None
            x = block(x, skips, temb, context, frames, size)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def _context(self, text: Tensor, image_tokens: Sequence[Tensor]) -> Context:
        if not image_tokens:
            return text
        attached = 0 if self.image_projections is None else len(self.image_projections)
        if len(image_tokens) != attached:
            raise ValueError(
                f"image_tokens holds {len(image_tokens)} tensors, but the UNet has {attached} IP-Adapters; give one "
                "tensor an adapter, as ip_adapter.project does."
            )
        return Prompts(text, tuple(image_tokens))


def embed(
    network: UNet2DConditionModel | ControlNetModel,
    timestep: Tensor | float,
    batch: int,
    added_cond_kwargs: Mapping[str, Tensor] | None = None,
    timestep_cond: Tensor | None = None,
) -> Tensor:
    """The activated embedding of time (and SDXL's sizes and pooled text, LCM's guidance): (batch, 4 C0).

    Raises:
        ValueError: SDXL's pooled text or sizes are missing.
    """
    config, dtype = network.config, network.dtype
    timestep = torch.as_tensor(timestep, device=network.device).reshape(-1).expand(batch)
    frequencies = timestep_embedding(
        timestep,
        config.block_out_channels[0],
        flip_sin_to_cos=config.flip_sin_to_cos,
        freq_shift=config.freq_shift,
    )
    temb = network.time_embedding(frequencies.to(dtype), timestep_cond)
    if config.addition_embed_type == "text_time":
        added = added_cond_kwargs or {}
        if "text_embeds" not in added or "time_ids" not in added:
            raise ValueError(
                f"This {type(network).__name__} is of SDXL's kind: added_cond_kwargs must hold text_embeds (N, D) and "
                f"time_ids (N, 6); got {sorted(added) or 'nothing'}."
            )
        sizes = timestep_embedding(
            added["time_ids"].flatten(),
            config.addition_time_embed_dim or 0,
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        ).reshape(added["text_embeds"].shape[0], -1)
        temb = temb + network.add_embedding(torch.cat([added["text_embeds"], sizes], dim=-1).to(dtype))
    return F.silu(temb)


def _transformer(config: DownConfig, level: int, depth: int) -> Transformer2DModel:
    heads = config.per_level("num_attention_heads" if config.num_attention_heads else "attention_head_dim")[level]
    return Transformer2DModel(
        config.block_out_channels[level],
        heads,
        depth,
        config.per_level("cross_attention_dim")[level],
        config.norm_num_groups,
        config.use_linear_projection,
        config.upcast_attention,
    )


def _transformers(config: DownConfig, block_type: str, level: int, depths: tuple[int, ...]) -> nn.ModuleList | None:
    if not block_type.startswith("CrossAttn"):
        return None
    return nn.ModuleList(_transformer(config, level, depth) for depth in depths)


def _depths(published: Any, position: int, layers: int) -> tuple[int, ...]:
    """Transformer depths of one level's ``layers``, from a published value: one, one a level, or one a layer."""
    value = published[position] if isinstance(published, tuple) else published
    return value if isinstance(value, tuple) else (value,) * layers


def _down_depths(config: DownConfig) -> list[tuple[int, ...]]:
    layers = config.per_level("layers_per_block")
    return [_depths(config.transformer_layers_per_block, i, layers[i]) for i in range(len(layers))]


def _up_depths(config: UNetConfig) -> list[tuple[int, ...]]:
    """As `_down_depths`, by level; ``reverse_transformer_layers_per_block`` is published from the bottom up."""
    layers = config.per_level("layers_per_block")
    published = config.reverse_transformer_layers_per_block
    if published is None:
        return [_depths(config.transformer_layers_per_block, i, n + 1) for i, n in enumerate(layers)]
    return [_depths(published[::-1], i, n + 1) for i, n in enumerate(layers)]
