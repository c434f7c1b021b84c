"""AutoencoderTiny: a small convolutional encoder and decoder for the latents of an `AutoencoderKL` (TAESD's layout)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import AutoencoderTinyConfig, UnsupportedConfig
from ..loading import Model

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}


class TinyBlock(nn.Module):
    """Three convolutions around a residual connection. ``conv`` is indexed as published: layers at 0, 2 and 4."""

    def __init__(self, channels: int, act: type[nn.Module]):
        super().__init__()
        convolutions = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convolutions[0], act(), convolutions[1], act(), convolutions[2])

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return torch.relu(self.conv(x) + x)


class EncoderTiny(nn.Module):
    """Pictures -> latents."""

    def __init__(self, config: AutoencoderTinyConfig, act: type[nn.Module]):
        super().__init__()
        channels = config.encoder_block_out_channels[0]
        layers: list[nn.Module] = []
        for i, blocks in enumerate(config.num_encoder_blocks):
            if i == 0:
                layers.append(nn.Conv2d(config.in_channels, channels, 3, padding=1))
            else:
                layers.append(nn.Conv2d(channels, channels, 3, padding=1, stride=2, bias=False))
            layers += [TinyBlock(channels, act) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, config.latent_channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, latent_channels, H/8, W/8)."""
        return self.layers((x + 1) / 2)


class DecoderTiny(nn.Module):
    """Latents -> pictures. Latents are squashed softly to [-3, 3] first."""

    def __init__(self, config: AutoencoderTinyConfig, act: type[nn.Module]):
        super().__init__()
        channels = config.decoder_block_out_channels[0]
        layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, channels, 3, padding=1), act()]
        for i, blocks in enumerate(config.num_decoder_blocks):
            last = i == len(config.num_decoder_blocks) - 1
            layers += [TinyBlock(channels, act) for _ in range(blocks)]
            if not last:
                layers.append(nn.Upsample(scale_factor=config.upsampling_scaling_factor))
            layers.append(nn.Conv2d(channels, config.out_channels if last else channels, 3, padding=1, bias=last))
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """(N, latent_channels, h, w) -> (N, 3, 8h, 8w), about [-1, 1]."""
        return self.layers(torch.tanh(z / 3) * 3) * 2 - 1


class AutoencoderTiny(Model):
    """A VAE that is many times cheaper than `AutoencoderKL`, for previews and fast decoding.

    Raises:
        UnsupportedConfig: the levels have different widths (the published layout has no layer that would change the
            width), or the activation is unknown.
    """

    config_class = AutoencoderTinyConfig

    def __init__(self, config: AutoencoderTinyConfig):
        super().__init__(config)
        self.config: AutoencoderTinyConfig = config
        for name in ("encoder_block_out_channels", "decoder_block_out_channels"):
            if len(set(getattr(config, name))) != 1:
                raise UnsupportedConfig(
                    f"AutoencoderTiny: {name} {getattr(config, name)} must be one width throughout."
                )
        if config.act_fn not in ACTIVATIONS:
            raise UnsupportedConfig(f"AutoencoderTiny: act_fn {config.act_fn!r} is not one of {sorted(ACTIVATIONS)}.")
        self.encoder = EncoderTiny(config, ACTIVATIONS[config.act_fn])
        self.decoder = DecoderTiny(config, ACTIVATIONS[config.act_fn])

    @property
    def downscale(self) -> int:
        """How many times smaller than the picture the latents are, a side."""
        return self.config.upsampling_scaling_factor ** (len(self.config.num_decoder_blocks) - 1)

    def encode(self, x: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in [-1, 1] -> latents (N, latent_channels, H/8, W/8); nothing random about it."""
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (N, latent_channels, h, w) -> pictures (N, 3, 8h, 8w), about [-1, 1], not clamped."""
        return self.decoder(z)

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
