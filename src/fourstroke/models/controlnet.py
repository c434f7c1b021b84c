"""ControlNet: a copy of the UNet's way down that reads a picture and adds to the UNet's skip connections."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ControlNetConfig, UNetConfig
from ..loading import CONFIG_NAME, Model, listed, load_model, warn_unknown
from .layers import TimestepEmbedding
from .unet import DownBlock, MidBlock, Residuals, UNet2DConditionModel, embed


class ConditioningEmbedding(nn.Module):
    """Convolutions that bring a picture to the size and width of the UNet's first feature map (Zhang et al., eq. 4)."""

    def __init__(self, in_channels: int, channels: tuple[int, ...], out_channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for here, below in zip(channels[:-1], channels[1:], strict=True):
            self.blocks.append(nn.Conv2d(here, here, 3, padding=1))
            self.blocks.append(nn.Conv2d(here, below, 3, padding=1, stride=2))
        self.conv_out = _zero_conv(channels[-1], out_channels, 3)

    def forward(self, picture: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H / 2^k, W / 2^k), k one less than the number of widths."""
        x = F.silu(self.conv_in(picture))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class ControlNetModel(Model):
    """Steers a UNet by a picture: edges, a depth map, a pose (Zhang et al. 2023, arXiv 2302.05543).

    The picture is embedded once a request by `embed_condition`; each step adds `forward`'s residuals in the UNet.
    """

    config_class = ControlNetConfig

    def __init__(self, config: ControlNetConfig):
        super().__init__(config)
        self.config: ControlNetConfig = config
        outputs, layers = config.block_out_channels, config.layers_per_block
        last = len(outputs) - 1
        temb_channels = 4 * outputs[0]
        self.conv_in = nn.Conv2d(config.in_channels, outputs[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(outputs[0], temb_channels)
        if config.addition_embed_type == "text_time":
            self.add_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim or 0, temb_channels)
        self.controlnet_cond_embedding = ConditioningEmbedding(
            config.conditioning_channels, config.conditioning_embedding_out_channels, outputs[0]
        )
        self.down_blocks = nn.ModuleList(
            DownBlock(config, level, outputs[max(level - 1, 0)], temb_channels) for level in range(len(outputs))
        )
        self.mid_block = MidBlock(config, temb_channels)
        # One a skip connection: the first convolution's, then each layer's and each downsampler's.
        widths = [outputs[0]]
        for level, width in enumerate(outputs):
            widths += [width] * (layers + (level < last))
        self.controlnet_down_blocks = nn.ModuleList(_zero_conv(width, width, 1) for width in widths)
        self.controlnet_mid_block = _zero_conv(outputs[-1], outputs[-1], 1)

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DConditionModel,
        *,
        controlnet_conditioning_channel_order: str = "rgb",
        conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256),
        load_weights_from_unet: bool = True,
        conditioning_channels: int = 3,
    ) -> ControlNetModel:
        """A new network to train for ``unet``: a copy of its way down that adds nothing yet (its last layers are zero).

        Args:
            unet: what is copied; it is not changed.
            controlnet_conditioning_channel_order: ``"rgb"``, or ``"bgr"`` to swap the colours of the pictures.
            conditioning_embedding_out_channels: widths of the picture's embedding, from full size to the latents'.
            load_weights_from_unet: copy the weights too, not only the shape.
            conditioning_channels: channels of the pictures.

        Returns:
            A network in training mode, in torch's default dtype, on its default device.

        Raises:
            UnsupportedConfig: there is no such ControlNet; the message names the field.
            ValueError: ``unet`` lacks weights under their published names, as a wrapped or quantised one does.
        """
        config = control_config(
            unet.config,
            controlnet_conditioning_channel_order=controlnet_conditioning_channel_order,
            conditioning_embedding_out_channels=tuple(conditioning_embedding_out_channels),
            conditioning_channels=conditioning_channels,
        )
        network = cls(config)
        if load_weights_from_unet:
            wanted = [name for name in network.state_dict() if not name.startswith("controlnet_")]
            given = unet.state_dict()
            missing = [name for name in wanted if name not in given]
            if missing:
                raise ValueError(
                    f"The UNet lacks {listed(missing)}; copy from one that is neither compiled nor quantised."
                )
            network.load_state_dict({name: given[name] for name in wanted}, strict=False)
        return network

    @property
    def downscale(self) -> int:
        """Pixels of a control picture along one side of a latent pixel: 8 for all published networks."""
        return 2 ** (len(self.config.conditioning_embedding_out_channels) - 1)

    def embed_condition(self, picture: Tensor) -> Tensor:
        """What `forward` takes as ``condition``; it does not depend on the step.

        Args:
            picture: (N, conditioning_channels, H, W) in [0, 1], RGB; H and W are multiples of `downscale`.

        Returns:
            (N, C0, H / downscale, W / downscale).

        Raises:
            ValueError: another number of channels, or sides that are no such multiples.
        """
        channels, scale = self.config.conditioning_channels, self.downscale
        shape = tuple(picture.shape)
        if len(shape) != 4 or shape[1] != channels or shape[2] % scale or shape[3] % scale:
            raise ValueError(
                f"The control picture has the shape {shape}; it must be (N, {channels}, H, W), H and W multiples of "
                f"{scale}. Convert or resize it."
            )
        if self.config.controlnet_conditioning_channel_order == "bgr":
            picture = picture.flip(1)
        return self.controlnet_cond_embedding(picture)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        *,
        condition: Tensor,
        conditioning_scale: float = 1.0,
        guess_mode: bool = False,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
    ) -> Residuals:
        """One network evaluation.

        Args:
            sample: noisy latents (N, in_channels, h, w).
            timestep: diffusion timestep(s) in [0, 1000), a number or (N,).
            encoder_hidden_states: text (N, L, cross_attention_dim).
            condition: `embed_condition`'s result for pictures of ``downscale`` times the latents' size, (N, C0, h, w),
                or (1, C0, h, w) for all samples alike.
            conditioning_scale: factor of all residuals.
            guess_mode: let the shallow residuals count less, from a tenth to all, so that the network can be followed
                without a prompt. A network with ``global_pool_conditions`` has no use for it.
            added_cond_kwargs: SDXL only: ``text_embeds`` (N, D) and ``time_ids`` (N, 6).

        Returns:
            Residuals for every skip connection and the mid block, in the dtype of the parameters; with
            ``global_pool_conditions`` each is averaged to (N, C, 1, 1).

        Raises:
            ValueError: ``condition`` is of another size than ``sample``, or SDXL's conditions are missing.
        """
        self._check_condition(condition, sample)
        temb = embed(self, timestep, sample.shape[0], added_cond_kwargs)
        x = self.conv_in(sample) + condition
        features = [x]
        for block in self.down_blocks:
            x, kept = block(x, temb, encoder_hidden_states, 1, None)
            features += kept
        features.append(self.mid_block(x, temb, encoder_hidden_states, 1))
        pooled = self.config.global_pool_conditions
        scales = guess_scales(len(features)) if guess_mode and not pooled else [1.0] * len(features)
        convs = [*self.controlnet_down_blocks, self.controlnet_mid_block]
        residuals = [
            conv(feature) * (scale * conditioning_scale)
            for conv, feature, scale in zip(convs, features, scales, strict=True)
        ]
        if pooled:
            residuals = [residual.mean(dim=(2, 3), keepdim=True) for residual in residuals]
        return Residuals(tuple(residuals[:-1]), residuals[-1])

    def _check_condition(self, condition: Tensor, sample: Tensor) -> None:
        batch, _, height, width = sample.shape
        if condition.shape[-2:] != sample.shape[-2:] or condition.shape[0] not in (1, batch):
            scale = self.downscale
            rows, _, have_height, have_width = condition.shape
            raise ValueError(
                f"The condition is of {rows} control pictures of {have_width * scale}x{have_height * scale} pixels, "
                f"but the {batch} latents of {width}x{height} are pictures of {width * scale}x{height * scale}. Resize "
                "the control pictures to that, and give one for all or one a picture."
            )


class MultiControlNetModel(nn.Module):
    """Several control networks that steer one UNet together; their residuals are added (`unet.add_residuals`).

    Attributes:
        nets: the networks, in the order of their pictures.
    """

    def __init__(self, controlnets: Iterable[ControlNetModel]):
        """Hold ``controlnets``.

        Raises:
            ValueError: there are none.
            TypeError: one is something else.
        """
        super().__init__()
        nets = list(controlnets)
        if not nets:
            raise ValueError("MultiControlNetModel needs at least one ControlNetModel; the list is empty.")
        for net in nets:
            if not isinstance(net, ControlNetModel):
                raise TypeError(f"MultiControlNetModel holds ControlNetModels, not {type(net).__name__}.")
        self.nets = nn.ModuleList(nets)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, variant: str | None = None) -> None:
        """Write one folder a network beside one another: ``controlnet``, ``controlnet_1``, ``controlnet_2``, …

        Args:
            save_directory: the first of the folders.
            variant: as for `ControlNetModel.save_pretrained`.

        Raises:
            FileExistsError: the folder after the last one exists, and would be read as one network more.
        """
        after = _folder(save_directory, len(self.nets))
        if after.exists():
            raise FileExistsError(f"{after} would be read as one more ControlNet; remove it or save elsewhere.")
        for i, net in enumerate(self.nets):
            assert isinstance(net, ControlNetModel)
            net.save_pretrained(_folder(save_directory, i), variant=variant)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_path: str | os.PathLike[str],
        *,
        variant: str | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **unknown: Any,
    ) -> MultiControlNetModel:
        """Load what `save_pretrained` wrote.

        Args:
            pretrained_model_path: the first folder; the others are found beside it.
            variant, torch_dtype, dtype: as for `ControlNetModel.from_pretrained`.
            unknown: any other keyword warns and is ignored.

        Raises:
            FileNotFoundError: the folder holds no network.
            UnsupportedConfig, WeightError: the files do not describe a ControlNet.
        """
        warn_unknown("MultiControlNetModel.from_pretrained", unknown)
        if not (_folder(pretrained_model_path, 0) / CONFIG_NAME).is_file():
            raise FileNotFoundError(
                f"{pretrained_model_path} is no folder with a ControlNet ({CONFIG_NAME} and weights). Load networks "
                "from elsewhere one by one: MultiControlNetModel([ControlNetModel.from_pretrained(…), …])."
            )
        nets: list[ControlNetModel] = []
        while (folder := _folder(pretrained_model_path, len(nets))).is_dir():
            nets.append(load_model(ControlNetModel, folder, variant=variant, dtype=dtype or torch_dtype))
        return cls(nets).eval()


def guess_scales(count: int) -> list[float]:
    """Factors of the residuals in guess mode, evenly spaced in the logarithm from 0.1 to 1 (Zhang et al., sec. 3.4)."""
    return [10 ** (i / (count - 1) - 1) for i in range(count)]


def control_config(unet: UNetConfig, **changes: Any) -> ControlNetConfig:
    """The configuration of a ControlNet for the UNet with the configuration ``unet``, with ``changes``.

    Raises:
        UnsupportedConfig: there is no such ControlNet; the message names the field.
    """
    shared = {field.name for field in dataclasses.fields(UNetConfig)}
    names = [field.name for field in dataclasses.fields(ControlNetConfig) if field.name in shared]
    return ControlNetConfig(**{name: unet[name] for name in names} | changes)


def _zero_conv(in_channels: int, out_channels: int, kernel: int) -> nn.Conv2d:
    """A convolution that adds nothing until it is trained (Zhang et al., sec. 3.1)."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _folder(first: str | os.PathLike[str], i: int) -> Path:
    path = Path(first)
    return path if i == 0 else path.with_name(f"{path.name}_{i}")
