"""T2I-Adapters: small networks that read a picture once a request and add features inside the UNet's way down."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..config import T2IAdapterConfig
from ..loading import CONFIG_NAME, Model, load_model, warn_unknown


class AdapterResnet(nn.Module):
    """Two convolutions around a residual connection; the second one's kernel is 1 (full) or 3 (light)."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.block1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return self.block2(torch.relu(self.block1(x))) + x


class AdapterBlock(nn.Module):
    """One level: halve the size if ``down``, change the width, then ``depth`` resnets (light: at a quarter of it)."""

    def __init__(self, in_channels: int, out_channels: int, depth: int, *, down: bool, light: bool):
        super().__init__()
        width = out_channels // 4 if light else out_channels
        # A side of odd length is rounded up, as the UNet's own downsampler does.
        self.downsample = nn.AvgPool2d(2, ceil_mode=True) if down else nn.Identity()
        self.in_conv = nn.Conv2d(in_channels, width, 1) if light or in_channels != width else nn.Identity()
        self.resnets = nn.Sequential(*[AdapterResnet(width, 3 if light else 1) for _ in range(depth)])
        self.out_conv = nn.Conv2d(width, out_channels, 1) if light else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C, H, W), or half of H and W."""
        return self.out_conv(self.resnets(self.in_conv(self.downsample(x))))


class AdapterBody(nn.Module):
    """The whole network: pixels folded into channels, then one level after the other."""

    def __init__(self, config: T2IAdapterConfig):
        super().__init__()
        light = config.adapter_type == "light_adapter"
        folded = config.in_channels * config.downscale_factor**2
        self.unshuffle = nn.PixelUnshuffle(config.downscale_factor)
        self.conv_in = nn.Identity() if light else nn.Conv2d(folded, config.channels[0], 3, padding=1)
        # A light adapter's last width serves two levels. SDXL's UNet is half as large again only at its third level.
        widths = (*config.channels, config.channels[-1]) if light else config.channels
        before = (folded if light else widths[0], *widths[:-1])
        halving = (2,) if config.adapter_type == "full_adapter_xl" else range(1, len(widths))
        self.body = nn.ModuleList(
            AdapterBlock(before[i], widths[i], config.num_res_blocks, down=i in halving, light=light)
            for i in range(len(widths))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(N, in_channels, H, W) -> the output of every level."""
        x = self.conv_in(self.unshuffle(x))
        features = []
        for block in self.body:
            x = block(x)
            features.append(x)
        return tuple(features)


class T2IAdapter(Model):
    """Steers a UNet by a picture: edges, a sketch, depth, a pose (Mou et al. 2023, arXiv 2302.08453).

    Its features do not depend on the step; they go into the UNet as ``Residuals(intra=…)``.
    """

    config_class = T2IAdapterConfig

    def __init__(self, config: T2IAdapterConfig):
        super().__init__(config)
        self.config: T2IAdapterConfig = config
        self.adapter = AdapterBody(config)

    @property
    def downscale_factor(self) -> int:
        """What the sides of a control picture must be multiples of: 8 for SD's adapters, 16 for SDXL's."""
        return self.config.downscale_factor

    @property
    def total_downscale_factor(self) -> int:
        """How many times smaller than the picture the last feature map is, a side."""
        halvings = sum(isinstance(cast(AdapterBlock, block).downsample, nn.AvgPool2d) for block in self.adapter.body)
        return self.downscale_factor * 2**halvings

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The features of a control picture.

        Args:
            x: (N, in_channels, H, W) in [0, 1]; H and W are multiples of `downscale_factor`.

        Returns:
            One tensor a level, finest first: (N, channels, H / f, W / f), where f grows from `downscale_factor` to
            `total_downscale_factor`. SDXL's adapters give one more than the UNet has levels, for the mid block.

        Raises:
            ValueError: another number of channels, or sides that are no such multiples.
        """
        channels, factor = self.config.in_channels, self.downscale_factor
        shape = tuple(x.shape)
        if len(shape) != 4 or shape[1] != channels or shape[2] % factor or shape[3] % factor:
            raise ValueError(
                f"The adapter's picture has the shape {shape}; it must be (N, {channels}, H, W), H and W multiples of "
                f"{factor}. Convert or resize it."
            )
        return self.adapter(x)


class MultiAdapter(nn.Module):
    """Several T2I-Adapters that steer one UNet together; their features are added.

    Attributes:
        adapters: the networks, in the order of their pictures.
    """

    def __init__(self, adapters: Iterable[T2IAdapter]):
        """Hold ``adapters``.

        Raises:
            ValueError: there are none, or their features differ in size.
            TypeError: one is something else.
        """
        super().__init__()
        networks = list(adapters)
        if not networks:
            raise ValueError("MultiAdapter needs at least one T2IAdapter; the list is empty.")
        for network in networks:
            if not isinstance(network, T2IAdapter):
                raise TypeError(f"MultiAdapter holds T2IAdapters, not {type(network).__name__}.")
        scales = {(network.downscale_factor, network.total_downscale_factor) for network in networks}
        if len(scales) > 1:
            raise ValueError(
                f"The adapters make their pictures {' and '.join(f'{a} to {b}' for a, b in sorted(scales))} times "
                "smaller, so their features cannot be added; take adapters for one kind of UNet."
            )
        self.adapters = nn.ModuleList(networks)

    @property
    def downscale_factor(self) -> int:
        """See `T2IAdapter.downscale_factor`; all adapters have the same."""
        return cast(T2IAdapter, self.adapters[0]).downscale_factor

    @property
    def total_downscale_factor(self) -> int:
        """See `T2IAdapter.total_downscale_factor`; all adapters have the same."""
        return cast(T2IAdapter, self.adapters[0]).total_downscale_factor

    def forward(self, xs: Sequence[Tensor], adapter_weights: Sequence[float] | None = None) -> tuple[Tensor, ...]:
        """The weighted sum of the adapters' features.

        Args:
            xs: one batch of pictures an adapter, see `T2IAdapter.forward`.
            adapter_weights: one factor an adapter; their mean is taken if not given.

        Returns:
            One tensor a level.

        Raises:
            ValueError: there are more or fewer pictures or weights than adapters, or a picture has a bad shape.
        """
        count = len(self.adapters)
        weights = [1 / count] * count if adapter_weights is None else list(adapter_weights)
        if len(xs) != count or len(weights) != count:
            raise ValueError(f"{len(xs)} pictures and {len(weights)} weights for {count} adapters: give one each.")
        every = [
            [weight * feature for feature in adapter(x)]
            for x, weight, adapter in zip(xs, weights, self.adapters, strict=True)
        ]
        return tuple(functools.reduce(torch.add, level) for level in zip(*every, strict=True))

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, variant: str | None = None) -> None:
        """Write one folder an adapter beside one another: ``adapter``, ``adapter_1``, ``adapter_2``, …

        Args:
            save_directory: the first of the folders.
            variant: as for `T2IAdapter.save_pretrained`.

        Raises:
            FileExistsError: the folder after the last one exists, and would be read as one adapter more.
        """
        after = _found(save_directory, len(self.adapters))
        if after is not None:
            raise FileExistsError(f"{after} would be read as one more T2I-Adapter; remove it or save elsewhere.")
        for i, adapter in enumerate(self.adapters):
            cast(T2IAdapter, adapter).save_pretrained(_folder(save_directory, i), variant=variant)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_path: str | os.PathLike[str],
        *,
        variant: str | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **unknown: Any,
    ) -> MultiAdapter:
        """Load what `save_pretrained` wrote.

        Args:
            pretrained_model_path: the first folder; the others are found beside it.
            variant, torch_dtype, dtype: as for `T2IAdapter.from_pretrained`.
            unknown: any other keyword warns and is ignored.

        Raises:
            FileNotFoundError: the folder holds no adapter.
            UnsupportedConfig, WeightError: the files do not describe a T2I-Adapter.
        """
        warn_unknown("MultiAdapter.from_pretrained", unknown)
        if not (_folder(pretrained_model_path, 0) / CONFIG_NAME).is_file():
            raise FileNotFoundError(
                f"{pretrained_model_path} is no folder with a T2I-Adapter ({CONFIG_NAME} and weights). Load adapters "
                "from elsewhere one by one: MultiAdapter([T2IAdapter.from_pretrained(…), …])."
            )
        adapters: list[T2IAdapter] = []
        while (folder := _found(pretrained_model_path, len(adapters))) is not None:
            adapters.append(load_model(T2IAdapter, folder, variant=variant, dtype=dtype or torch_dtype))
        return cls(adapters).eval()


def _folder(first: str | os.PathLike[str], i: int) -> Path:
    path = Path(first)
    return path if i == 0 else path.with_name(f"{path.name}_{i}")


def _found(first: str | os.PathLike[str], i: int) -> Path | None:
    """The folder of adapter ``i``. diffusers writes the third into ``adapter_1_2``, and so on."""
    chained = Path(first)
    chained = chained.with_name("_".join([chained.name, *map(str, range(1, i + 1))]))
    return next((folder for folder in (_folder(first, i), chained) if folder.is_dir()), None)
