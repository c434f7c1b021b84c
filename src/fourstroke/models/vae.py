"""AutoencoderKL: pictures <-> latents of an eighth of their size (Rombach et al. 2022, sec. 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import AutoencoderKLConfig
from ..loading import Model
from ..random import randn_tensor
from .layers import Downsample2D, ResnetBlock2D, Upsample2D

EPS = 1e-6


@dataclass(frozen=True)
class DiagonalGaussian:
    """A normal distribution with diagonal covariance over latents; both tensors are (N, C, h, w).

    ``logvar`` is clamped to [-30, 20] when it is made by `AutoencoderKL.encode`.
    """

    mean: Tensor
    logvar: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> DiagonalGaussian:
        """The distribution with these ``moments``, see `AutoencoderKL.moments`."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    @property
    def std(self) -> Tensor:
        """Standard deviation, (N, C, h, w)."""
        return torch.exp(0.5 * self.logvar)

    def mode(self) -> Tensor:
        """The most likely latents, (N, C, h, w)."""
        return self.mean

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """Random latents, (N, C, h, w); one generator for all or one a picture."""
        noise = randn_tensor(self.mean.shape, generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise


class PixelAttention(nn.Module):
    """Single-head self-attention over the pixels of a feature map, with its own norm and residual connection."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (N, H*W, C)
        q, k, v = (project(h).unsqueeze(1) for project in (self.to_q, self.to_k, self.to_v))
        h = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + h.transpose(1, 2).unflatten(2, x.shape[-2:])


class MidBlock(nn.Module):
    """Resnet, optional attention, resnet at the lowest resolution."""

    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.attentions = nn.ModuleList([PixelAttention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList(ResnetBlock2D(channels, channels, None, groups, EPS) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class EncoderBlock(nn.Module):
    """Resnets of one level, then (but at the last level) a downsampler."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, last: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock2D(in_channels if i == 0 else out_channels, out_channels, None, groups, EPS)
            for i in range(layers)
        )
        self.downsamplers = nn.ModuleList([] if last else [Downsample2D(out_channels, padding=0)])

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H/2, W/2); the last level keeps the size."""
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class DecoderBlock(nn.Module):
    """Resnets of one level, then (but at the last level) an upsampler."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, last: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock2D(in_channels if i == 0 else out_channels, out_channels, None, groups, EPS)
            for i in range(layers)
        )
        self.upsamplers = nn.ModuleList([] if last else [Upsample2D(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, h, w) -> (N, out_channels, 2h, 2w); the last level keeps the size."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Picture -> the mean and log-variance of its latents."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        inputs = (channels[0], *channels[:-1])
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            EncoderBlock(before, after, config.layers_per_block, groups, last=i == len(channels) - 1)
            for i, (before, after) in enumerate(zip(inputs, channels, strict=True))
        )
        self.mid_block = MidBlock(channels[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 2 * latent_channels, H/8, W/8)."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents -> picture."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        inputs = (channels[0], *channels[:-1])
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            DecoderBlock(before, after, config.layers_per_block + 1, groups, last=i == len(channels) - 1)
            for i, (before, after) in enumerate(zip(inputs, channels, strict=True))
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(N, latent_channels, h, w) -> (N, 3, 8h, 8w)."""
        z = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            z = block(z)
        return self.conv_out(F.silu(self.conv_norm_out(z)))


class AutoencoderKL(Model):
    """The VAE of Stable Diffusion. Latents here are unscaled; multiply by ``config.scaling_factor`` for the UNet."""

    config_class = AutoencoderKLConfig
    renames = (
        (r"\.attentions\.(\d+)\.query\.", r".attentions.\1.to_q."),
        (r"\.attentions\.(\d+)\.key\.", r".attentions.\1.to_k."),
        (r"\.attentions\.(\d+)\.value\.", r".attentions.\1.to_v."),
        (r"\.attentions\.(\d+)\.proj_attn\.", r".attentions.\1.to_out.0."),
    )

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__(config)
        latent = config.latent_channels
        self.config: AutoencoderKLConfig = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.use_post_quant_conv else None

    @property
    def downscale(self) -> int:
        """How many times smaller than the picture the latents are, a side (8 for the published models)."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def moments(self, x: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in [-1, 1] -> means and log-variances, (N, 2 latent_channels, H/8, W/8)."""
        h = self.encoder(x)
        return h if self.quant_conv is None else self.quant_conv(h)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Pictures (N, 3, H, W) in [-1, 1] -> the distribution of their latents, (N, latent_channels, H/8, W/8)."""
        return DiagonalGaussian.of(self.moments(x))

    def decode(self, z: Tensor) -> Tensor:
        """Latents (N, latent_channels, h, w) -> pictures (N, 3, 8h, 8w), about [-1, 1], not clamped."""
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    # How it runs is put onto it from outside; only the names that people look for are here.

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Work through large pictures in overlapping tiles, in one tile's memory; see `fourstroke.runtime.tiling`."""
        from ..runtime.tiling import set_pieces_

        set_pieces_(self, tiling=use_tiling)

    def disable_tiling(self) -> None:
        """Undo `enable_tiling`."""
        self.enable_tiling(False)

    def enable_slicing(self) -> None:
        """Work through a batch one picture at a time, in one picture's memory."""
        from ..runtime.tiling import set_pieces_

        set_pieces_(self, slicing=True)

    def disable_slicing(self) -> None:
        """Undo `enable_slicing`."""
        from ..runtime.tiling import set_pieces_

        set_pieces_(self, slicing=False)
