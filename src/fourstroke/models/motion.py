"""AnimateDiff's motion modules (Guo et al. 2023, arXiv 2307.04725): attention between the frames of an animation."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import hub
from ..config import MotionAdapterConfig, config_from_dict
from ..loading import Model, WeightError, WeightSource, build, listed, resolve_file, warn_unknown
from .layers import Attention, FeedForward
from .unet import UNet2DConditionModel

if TYPE_CHECKING:
    from typing_extensions import Self

SLOT = ".motion_modules."
"""What the names of all tensors of a motion adapter contain, in its own files and in a UNet."""


def check_frames(frames: int, limit: int) -> None:
    """Check that an animation is one that a motion adapter can take at once.

    Args:
        frames: of the animation.
        limit: ``motion_max_seq_length`` of the adapter.

    Raises:
        ValueError: more frames than that, or none.
    """
    if not 1 <= frames <= limit:
        raise ValueError(
            f"{frames} frames, but the motion adapter has positions for 1 to {limit} (motion_max_seq_length); paint "
            f"longer animations in overlapping windows of at most {limit} frames."
        )


class PositionalEmbedding(nn.Module):
    """Adds the sinusoidal embedding of a frame's number (Vaswani et al. 2017, sec. 3.5); ``pe`` is (1, length, dim)."""

    pe: Tensor

    def __init__(self, dim: int, length: int):
        super().__init__()
        frequencies = torch.exp(torch.arange(0, dim, 2) * (-math.log(10_000) / dim))
        angles = torch.arange(length)[:, None] * frequencies  # (length, dim / 2)
        self.register_buffer("pe", torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[None])

    def forward(self, x: Tensor) -> Tensor:
        """(N, frames, dim) -> (N, frames, dim)."""
        return x + self.pe[:, : x.shape[1]]


class MotionBlock(nn.Module):
    """Two self-attentions over the frames and a feed-forward, each behind a LayerNorm, around residual connections."""

    def __init__(self, dim: int, heads: int, length: int):
        super().__init__()
        self.pos_embed = PositionalEmbedding(dim, length)
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, dim // heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, dim // heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, frames, dim) -> (N, frames, dim)."""
        x = x + self.attn1(self.pos_embed(self.norm1(x)))
        x = x + self.attn2(self.pos_embed(self.norm2(x)))
        return x + self.ff(self.norm3(x))


class MotionModule(nn.Module):
    """A transformer along time: every pixel of a feature map attends to itself in the other frames (sec. 4.2)."""

    def __init__(self, channels: int, heads: int, depth: int, groups: int, length: int):
        super().__init__()
        self.length = length
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(MotionBlock(channels, heads, length) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """(V F, C, H, W), the frames of a video one after another -> (V F, C, H, W).

        Raises:
            ValueError: more frames than there are positions for, or part of a video.
        """
        check_frames(frames, self.length)
        count, _, height, width = x.shape
        if count % frames:
            raise ValueError(f"{count} pictures are no whole number of videos of {frames} frames each.")
        h = self.norm(x.unflatten(0, (-1, frames)).transpose(1, 2))  # (V, C, F, H, W), normalised over all frames
        h = self.proj_in(h.permute(0, 3, 4, 2, 1).flatten(0, 2))  # (V H W, F, C)
        for block in self.transformer_blocks:
            h = block(h)
        h = self.proj_out(h).unflatten(0, (-1, height, width)).permute(0, 3, 4, 1, 2)  # (V, F, C, H, W)
        return x + h.flatten(0, 1)


class MotionModules(nn.Module):
    """The motion modules of one block of the UNet, one a layer; a container, which is never called."""

    def __init__(self, config: MotionAdapterConfig, level: int, depths: Iterable[int]):
        super().__init__()
        channels = config.block_out_channels[level]
        heads = config.per_level("motion_num_attention_heads")[level]
        groups, length = config.motion_norm_num_groups, config.motion_max_seq_length
        self.motion_modules = nn.ModuleList(MotionModule(channels, heads, depth, groups, length) for depth in depths)


class MotionAdapter(Model):
    """What makes a UNet for pictures one for animations: motion modules for its blocks; see `attach_motion_`.

    Files in the layout of AnimateDiff's own code are read too: v1 (no module in the mid block), v2, v3 and SDXL's.

    Args:
        config: default is that of the second version, for SD 1.5.
    """

    config_class = MotionAdapterConfig
    renames = (
        (r"^module\.", ""),
        (r"\.temporal_transformer\.", "."),
        (r"\.attention_blocks\.0\.pos_encoder\.pe$", ".pos_embed.pe"),
        (r"\.attention_blocks\.0\.", ".attn1."),
        (r"\.attention_blocks\.1\.", ".attn2."),
        (r"\.norms\.0\.", ".norm1."),
        (r"\.norms\.1\.", ".norm2."),
        (r"\.ff_norm\.", ".norm3."),
    )
    ignored = (r"\.attention_blocks\.1\.pos_encoder\.pe$",)  # the same constants as those of the first attention

    def __init__(self, config: MotionAdapterConfig | None = None):
        config = config or MotionAdapterConfig()
        super().__init__(config)
        self.config: MotionAdapterConfig = config
        layers = config.per_level("motion_layers_per_block")
        depths = config.per_level("motion_transformer_layers_per_block")
        levels = range(len(layers))
        self.down_blocks = nn.ModuleList(MotionModules(config, i, [depths[i]] * layers[i]) for i in levels)
        self.mid_block = MotionModules(config, -1, config.mid_depths()) if config.use_motion_mid_block else None
        self.up_blocks = nn.ModuleList(
            MotionModules(config, i, [depths[i]] * (layers[i] + 1)) for i in reversed(levels)
        )

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike[str],
        *,
        config: MotionAdapterConfig | Mapping[str, Any] | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """Load a file that comes without a configuration, in AnimateDiff's layout or in that of `from_pretrained`.

        Args:
            pretrained_model_link_or_path: a ``.safetensors`` file, or its address on the hub
                (``https://huggingface.co/owner/name/blob/main/file.safetensors``).
            config: default is what the tensors tell (`config_of`), with 8 heads and groups of 32, as all published
                adapters have.
            torch_dtype, dtype: dtype of the parameters, two names of one thing (default ``torch.float32``).
            options: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download`` as in
                huggingface_hub; any other keyword warns and is ignored.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is a pickle, or has parts that are not supported.
            WeightError: a tensor is unknown, missing or of the wrong shape; all of them are named.
        """
        where = {name: options.pop(name) for name in hub.OPTIONS if name in options}
        warn_unknown(f"{cls.__name__}.from_single_file", options)
        file = resolve_file(pretrained_model_link_or_path, **where)
        source = WeightSource.from_files([file], cls.published_name)
        if isinstance(config, Mapping):
            config = config_from_dict(MotionAdapterConfig, config)
        return build(cls, config or config_of(source, str(file)), source, dtype=dtype or torch_dtype, where=str(file))


def config_of(source: WeightSource, where: str = "the file") -> MotionAdapterConfig:
    """The configuration that the tensors of a motion adapter tell; heads and groups, which they do not, are the usual.

    Args:
        source: the tensors, by our names.
        where: what messages call it.

    Raises:
        WeightError: these are not the tensors of a motion adapter.
    """
    blocks = {name.partition(SLOT)[0] for name in source.places if SLOT in name}
    levels = sum(block.startswith("down_blocks.") for block in blocks)
    first = "down_blocks.0.motion_modules.0"
    tell = (f"{first}.norm.weight", f"{first}.transformer_blocks.0.pos_embed.pe")
    if not levels or any(name not in source.places for name in tell):
        raise WeightError(
            f"{where} is not a motion adapter: {listed(name for name in tell if name not in source.places)} is missing "
            f"among its {len(source.places)} tensors ({listed(list(source.places)[:3])})."
        )
    depths = [_depths(source, f"down_blocks.{level}") for level in range(levels)]
    middle = _depths(source, "mid_block")
    norms = [f"down_blocks.{level}.motion_modules.0.norm.weight" for level in range(levels)]
    return MotionAdapterConfig(
        block_out_channels=tuple(len(source.read(name)) if name in source.places else 0 for name in norms),
        motion_layers_per_block=_shortened([len(found) for found in depths]),
        motion_transformer_layers_per_block=_shortened([max(found, default=0) for found in depths]),
        motion_mid_block_layers_per_block=len(middle) or 1,
        motion_transformer_layers_per_mid_block=_shortened(middle or [1]),
        motion_max_seq_length=source.read(tell[1]).shape[1],
        use_motion_mid_block=bool(middle),
    )


def _depths(source: WeightSource, block: str) -> list[int]:
    """Number of transformer blocks of each motion module of ``block``."""
    pattern = re.compile(rf"{re.escape(block + SLOT)}(\d+)\.transformer_blocks\.(\d+)\.")
    found = {(int(match[1]), int(match[2])) for name in source.places if (match := pattern.match(name))}
    return [
        sum(module == i for module, _ in found) for i in range(1 + max((module for module, _ in found), default=-1))
    ]


def _shortened(values: list[int]) -> int | tuple[int, ...]:
    """One number for equal ones, as configurations are published."""
    return values[0] if len(set(values)) == 1 else tuple(values)


def attach_motion_(unet: UNet2DConditionModel, adapter: MotionAdapter) -> None:
    """Put the modules of ``adapter`` into the slots of ``unet``, which then makes animations (``frames``).

    The modules are shared, not copied, and are moved to the dtype and device of the UNet. An adapter that is attached
    already is replaced. The UNet's names become those of diffusers' ``UNetMotionModel``, so that motion LoRAs fit.
    Adapter sets that act on motion modules must be emptied before the modules leave: see `detach_motion_`.

    Raises:
        ValueError: the adapter is for another UNet; every block that differs is named, and nothing is changed.
    """
    slots, blocks = _blocks(unet), _blocks(adapter)
    if adapter.mid_block is None:
        slots.pop("mid_block", None)
    pairs: dict[str, Any] = {name: (slots.get(name), blocks.get(name)) for name in {**slots, **blocks}}
    if problems := [text for name, (slot, block) in pairs.items() if (text := _misfit(name, slot, block))]:
        raise ValueError(
            f"The motion adapter does not fit the UNet: {'; '.join(problems)}. Take an adapter that was made for a "
            f"UNet of block_out_channels {unet.config.block_out_channels}."
        )
    adapter.to(device=unet.device, dtype=unet.dtype)
    detach_motion_(unet)
    for slot, block in pairs.values():
        slot.motion_modules = block.motion_modules
    unet.source = _joined(unet.source, adapter.source)


def detach_motion_(unet: UNet2DConditionModel) -> None:
    """Take a motion adapter out of ``unet``, which is then one for pictures again; nothing happens when it has none.

    What LoRAs have merged into motion modules goes with the adapter: unload them before.
    """
    for block in _blocks(unet).values():
        block.motion_modules = None
    if unet.source is not None:
        unet.source = _joined(unet.source, None)


def _blocks(model: UNet2DConditionModel | MotionAdapter) -> dict[str, Any]:
    """The blocks by name, those that there are."""
    found = {f"down_blocks.{i}": block for i, block in enumerate(model.down_blocks)}
    found |= {f"up_blocks.{i}": block for i, block in enumerate(model.up_blocks)}
    return found if model.mid_block is None else {**found, "mid_block": model.mid_block}


def _misfit(name: str, slot: Any, block: Any) -> str | None:
    """How the layers of a block of the UNet and of the adapter differ; None when they do not."""
    # A motion module follows each resnet, in the mid block each but the first: there it stands after the transformer.
    layers = () if slot is None else slot.resnets[1:] if name == "mid_block" else slot.resnets
    theirs = [resnet.conv2.out_channels for resnet in layers]
    ours = [] if block is None else [module.proj_in.in_features for module in block.motion_modules]
    return None if ours == theirs else f"{name} has layers of {theirs} channels, the adapter's have {ours}"


def _joined(unet: WeightSource | None, adapter: WeightSource | None) -> WeightSource | None:
    """Where the tensors of a UNet with motion modules lie: the UNet's own in its file, the others in the adapter's."""
    places, transforms = {}, {}
    for source, motion in ((unet, False), (adapter, True)):
        if source is not None:
            places |= {name: place for name, place in source.places.items() if (SLOT in name) == motion}
            transforms |= {name: change for name, change in source.transforms.items() if (SLOT in name) == motion}
    return WeightSource(places, transforms) if places else None
