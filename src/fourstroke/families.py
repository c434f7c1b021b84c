"""Families of models: what is published for each, under short names, and which family a model belongs to."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import hub
from .request import GenerateRequest

INDEX_NAME, UNET_CONFIG = "model_index.json", "unet/config.json"
WEIGHTS = ".safetensors"
# Text width of a UNet -> its family; SSD-1B is an SDXL without attention in the middle.
WIDTHS: Mapping[int, str] = {768: "SD 1.5", 1024: "SD 2.x", 2048: "SDXL"}
# Families of the shipped models -> the model whose shape tells them.
SHIPPED: Mapping[str, str] = {"emoji": "emoji/base", "emoji XL": "emoji/xl"}
ALIASES: Mapping[str, str] = {"openpose": "pose"}
# What a network may be -> the field of `Family` that has its short names.
KINDS: Mapping[str, str] = {
    "ControlNet": "controlnets",
    "T2I-Adapter": "t2i_adapters",
    "IP-Adapter": "ip_adapters",
}
VAE_FACTOR = 8
# A picture of so many times the model's own number of pixels, or fewer, is painted as large as it is.
LARGEST, SMALLEST = 1.5, 0.5


@dataclass(frozen=True)
class Family:
    """What is published for a family of models, as places: ``owner/name``, or ``owner/name/path/in/it``.

    Attributes:
        name: as `fourstroke.lora` tells it.
        lcm_lora: the LCM-LoRA.
        motion: the motion adapter.
        tiny_vae: the tiny autoencoder.
        controlnets, t2i_adapters: by what their pictures show.
        ip_adapters: by how closely they follow their picture; the first is the usual one.
    """

    name: str
    lcm_lora: str | None = None
    motion: str | None = None
    tiny_vae: str | None = None
    controlnets: Mapping[str, str] = field(default_factory=dict)
    t2i_adapters: Mapping[str, str] = field(default_factory=dict)
    ip_adapters: Mapping[str, str] = field(default_factory=dict)

    @property
    def published(self) -> bool:
        """Whether it is one of the published families, which LoRAs tell they were made for."""
        return self.name in WIDTHS.values() or self.name == "SSD-1B"

    def known(self, kind: str) -> dict[str, str]:
        """Short name -> place of the networks of a ``kind`` (see `KINDS`); shipped ones only where they are there."""
        return {name: place for name, place in getattr(self, KINDS[kind]).items() if available(place)}

    def find(self, kind: str, name: str | None) -> str:
        """The place of the network called ``name``: a short name, or else the place itself.

        Args:
            kind: see `KINDS`.
            name: short name, hub id, folder or ``.safetensors`` file; None is the first of the known ones.

        Raises:
            ValueError: there is none; the message lists the known ones.
        """
        known = self.known(kind)
        if name is None and kind == "IP-Adapter" and known:
            return next(iter(known.values()))
        if name is None:
            raise ValueError(f"A picture for a {kind} names none; for {self.name} there are {_listed(known)}.")
        if ALIASES.get(name, name) in known:
            return known[ALIASES.get(name, name)]
        if "/" in name or "\\" in name or name.endswith(WEIGHTS) or Path(name).is_dir():
            return name
        raise ValueError(
            f"There is no {kind} {name!r} for {self.name}; there are {_listed(known)}. Others go by hub id "
            "(owner/name), folder (./name) or .safetensors file."
        )


def _listed(names: Mapping[str, str]) -> str:
    return ", ".join(names) or "none by a short name"


def available(place: str | None) -> str | None:
    """``place``, or None when it is that of a shipped network which is not in this package."""
    return None if place is None or place.startswith("emoji/") and place not in hub.shipped() else place


_XL = Family(
    "SDXL",
    lcm_lora="latent-consistency/lcm-lora-sdxl",
    motion="guoyww/animatediff-motion-adapter-sdxl-beta",
    tiny_vae="madebyollin/taesdxl",
    controlnets={
        "canny": "diffusers/controlnet-canny-sdxl-1.0",
        "depth": "diffusers/controlnet-depth-sdxl-1.0",
        "pose": "thibaud/controlnet-openpose-sdxl-1.0",
    },
    t2i_adapters={
        "canny": "TencentARC/t2i-adapter-canny-sdxl-1.0",
        "lineart": "TencentARC/t2i-adapter-lineart-sdxl-1.0",
        "depth": "TencentARC/t2i-adapter-depth-midas-sdxl-1.0",
        "pose": "TencentARC/t2i-adapter-openpose-sdxl-1.0",
        "sketch": "TencentARC/t2i-adapter-sketch-sdxl-1.0",
    },
    ip_adapters={
        "base": "h94/IP-Adapter/sdxl_models/ip-adapter_sdxl.safetensors",
        "plus": "h94/IP-Adapter/sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors",
        "plus-face": "h94/IP-Adapter/sdxl_models/ip-adapter-plus-face_sdxl_vit-h.safetensors",
    },
)
FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(
            "SD 1.5",
            lcm_lora="latent-consistency/lcm-lora-sdv1-5",
            motion="guoyww/animatediff-motion-adapter-v1-5-2",
            tiny_vae="madebyollin/taesd",
            controlnets={
                "canny": "lllyasviel/control_v11p_sd15_canny",
                "depth": "lllyasviel/control_v11f1p_sd15_depth",
                "pose": "lllyasviel/control_v11p_sd15_openpose",
                "lineart": "lllyasviel/control_v11p_sd15_lineart",
            },
            t2i_adapters={
                "canny": "TencentARC/t2iadapter_canny_sd15v2",
                "depth": "TencentARC/t2iadapter_depth_sd15v2",
                "pose": "TencentARC/t2iadapter_openpose_sd14v1",
                "sketch": "TencentARC/t2iadapter_sketch_sd15v2",
            },
            ip_adapters={
                "base": "h94/IP-Adapter/models/ip-adapter_sd15.safetensors",
                "plus": "h94/IP-Adapter/models/ip-adapter-plus_sd15.safetensors",
                "plus-face": "h94/IP-Adapter/models/ip-adapter-plus-face_sd15.safetensors",
                "full-face": "h94/IP-Adapter/models/ip-adapter-full-face_sd15.safetensors",
            },
        ),
        Family("SD 2.x", tiny_vae="madebyollin/taesd"),
        _XL,
        # Control networks add to the same feature maps; IP-Adapters have a weight a transformer, and SSD-1B has fewer.
        Family(
            "SSD-1B",
            lcm_lora="latent-consistency/lcm-lora-ssd-1b",
            tiny_vae=_XL.tiny_vae,
            controlnets=_XL.controlnets,
            t2i_adapters=_XL.t2i_adapters,
        ),
        Family(
            "emoji",
            lcm_lora="emoji/lcm-lora",
            motion="emoji/motion-adapter",
            tiny_vae="emoji/tiny-vae",
            controlnets={"canny": "emoji/controlnet-canny"},
        ),
        Family(
            "emoji XL",
            lcm_lora="emoji/xl-lcm-lora",
            tiny_vae="emoji/tiny-vae",
            t2i_adapters={"canny": "emoji/t2i-canny"},
        ),
    )
}
# IP-Adapter -> the folder of its image encoder, where that is not ``image_encoder`` beside it.
IMAGE_ENCODERS: Mapping[str, str] = {
    place: "models/image_encoder" for place in _XL.ip_adapters.values() if place.endswith("_vit-h" + WEIGHTS)
}


@dataclass(frozen=True)
class Base:
    """A model as its configuration tells of it, before it is loaded.

    Attributes:
        name: hub id, shipped name, folder or single file.
        family: what is published for it.
        size: height and width in pixels that it was trained for.
        channels: 4, or 9 for a model that does nothing but inpainting.
        embeds_guidance: guidance is an input of the UNet: a full latent consistency model.
        width: channels of the UNet's first level.
    """

    name: str
    family: Family
    size: tuple[int, int]
    channels: int = 4
    embeds_guidance: bool = False
    width: int = 320

    def check(self, request: GenerateRequest) -> None:
        """Check what can be checked without loading anything.

        Raises:
            ValueError: a network has no such name, or an inpainting model gets no mask.
        """
        for kind, controls in (("ControlNet", request.controls), ("T2I-Adapter", request.adapters)):
            for control in controls:
                self.family.find(kind, control.model)
        if self.channels == 9 and request.mask_image is None:
            raise ValueError(f"{self.name} is an inpainting model: pass image and mask_image, or use another model.")

    def fitting_size(
        self, size: tuple[int, int], height: int | None = None, width: int | None = None, factor: int = VAE_FACTOR
    ) -> tuple[int, int]:
        """Height and width in pixels at which to paint from a picture of ``size`` (height, width).

        What is given stays, and the other side follows the picture's ratio. If nothing is, it is the picture's own size
        as long as the model can paint that (half to one and a half times its own number of pixels), and else the
        model's number of pixels in the picture's ratio. Sides that are not given are multiples of ``factor``.
        """
        if height is not None and width is not None:
            return height, width
        area = math.prod(size) / math.prod(self.size)
        if height is not None:
            scale = height / size[0]
        elif width is not None:
            scale = width / size[1]
        else:
            scale = 1.0 if SMALLEST <= area <= LARGEST else 1 / math.sqrt(area)
        sides = [max(int(side * scale / factor + 1e-6) * factor, factor) for side in size]
        return height or sides[0], width or sides[1]


def look_at(model: str | os.PathLike[str], config: str | os.PathLike[str] | None = None, **where: Any) -> Base:
    """What ``model`` is, from its configuration or, of a single file, its header.

    Args:
        model: hub id, shipped name, folder, or single-file checkpoint.
        config: of a single file, see `fourstroke.single_file.load_single_file`.
        where: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it is something else.
    """
    name = os.fspath(model)
    if name.endswith(WEIGHTS):
        folder = _single_file_configs(name, config, where)
    else:
        folder = hub.fetch(name, lambda files: hub.required(files, INDEX_NAME, UNET_CONFIG), **where)
    unet = hub.read_json(folder / UNET_CONFIG)
    size = unet.get("sample_size") or (128 if unet.get("addition_embed_type") else 64)
    sides = (size, size) if isinstance(size, int) else (size[0], size[1])
    return Base(
        name,
        family_of(unet),
        (sides[0] * VAE_FACTOR, sides[1] * VAE_FACTOR),
        unet.get("in_channels", 4),
        unet.get("time_cond_proj_dim") is not None,
        unet.get("block_out_channels", (320,))[0],
    )


def _single_file_configs(name: str, config: str | os.PathLike[str] | None, where: Mapping[str, Any]) -> Path:
    from .loading import resolve_file
    from .single_file import SingleFile, config_folder, infer_family

    if config is not None:
        return config_folder(config, **where)
    file = SingleFile.open(resolve_file(name, **where))
    return config_folder(infer_family(file.shapes, file.metadata, read=file.read))


def family_of(unet: Any) -> Family:
    """The family that a UNet's or ControlNet's configuration tells; one of which nothing is known where it is of none.

    Args:
        unet: the configuration as a mapping or an object with ``get``.
    """
    width = unet.get("cross_attention_dim")
    for name, shipped in SHIPPED.items():
        if shipped in hub.shipped() and _alike(unet, hub.read_json(hub.ZOO / shipped / UNET_CONFIG)):
            return FAMILIES[name]
    if not isinstance(width, int) or width not in WIDTHS:
        return Family(f"a model of text width {width}")
    short = WIDTHS[width] == "SDXL" and unet.get("mid_block_type", "") in (None, "UNetMidBlock2D")
    return FAMILIES["SSD-1B" if short else WIDTHS[width]]


def _alike(unet: Any, other: Any) -> bool:
    names = ("cross_attention_dim", "block_out_channels")
    return all(_plain(unet.get(name)) == _plain(other.get(name)) for name in names)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
