"""IP-Adapters of a pipeline: loading them by name, how much they count, and the pictures that they see.

Names and conventions are diffusers'; the pipelines' methods of the same names call these functions with themselves.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from .. import hub
from ..loading import PICKLE_SUFFIXES, warn_unknown
from ..lora.blocks import block_weights
from ..lora.keys import unwrap
from ..lora.pairs import LoraError
from ..models.clip_vision import CLIPImageProcessor, CLIPVisionModelWithProjection
from ..models.ip_adapter import (
    ImageProjection,
    IPAdapter,
    attach_ip_adapters_,
    check_embeds,
    check_fit,
    detach_ip_adapters_,
    project,
    projections,
    read_ip_adapter,
    refuse_ip_adapter_pickle,
    set_ip_adapter_scales_,
)

if TYPE_CHECKING:
    from .pipeline import DiffusionPipeline

Source: TypeAlias = str | os.PathLike[str] | Mapping[str, Any]
Scale: TypeAlias = float | Mapping[str, Any]
DEFAULT_IMAGE_SIZE = 224  # of the published image encoders
# Keywords that choose what is done here anyway.
HARMLESS = ("low_cpu_mem_usage", "use_safetensors")


def load_ip_adapter(
    pipe: DiffusionPipeline,
    pretrained_model_name_or_path_or_dict: Source | Sequence[Source],
    subfolder: str | None | Sequence[str | None],
    weight_name: str | None | Sequence[str | None],
    image_encoder_folder: str | None = "image_encoder",
    **where: Any,
) -> None:
    """Load one IP-Adapter or several, in the place of those that are loaded; each counts with scale 1.

    The image encoder and the feature extractor are loaded with it where the pipeline has none.

    Args:
        pipe: a pipeline with an ``image_encoder`` component, which may be None.
        pretrained_model_name_or_path_or_dict: hub id, folder, ``.safetensors`` file or tensors; a list for several.
        subfolder: folder inside the repository (``"models"``); one for all or one each.
        weight_name: the file in it (``"ip-adapter_sd15.safetensors"``); a list for several adapters.
        image_encoder_folder: where the image encoder lies: a name is inside ``subfolder``, a path is not. None loads
            none, for use with ``ip_adapter_image_embeds``.
        where: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``. Any other warns.

    Raises:
        FileNotFoundError: no such repository or file.
        ValueError: lists of unequal length, a pickle, a kind that is not supported, or no place for an image encoder.
        WeightError: a tensor is missing, unexpected or of the wrong shape, or the adapter is for another family.
    """
    unknown = {name: value for name, value in where.items() if name not in (*hub.OPTIONS, *HARMLESS)}
    warn_unknown(f"{type(pipe).__name__}.load_ip_adapter", unknown)
    where = {name: value for name, value in where.items() if name in hub.OPTIONS}
    if "image_encoder" not in pipe.component_names:
        raise ValueError(f"{type(pipe).__name__} has no image_encoder and runs no IP-Adapters; use another pipeline.")
    unet = _unet(pipe)
    places = _places(pretrained_model_name_or_path_or_dict, subfolder, weight_name)
    adapters = [_read(*place, where) for place in places]
    for adapter in adapters:
        check_fit(unet, adapter)
    parts: Any = pipe
    encoder, extractor = parts.image_encoder, parts.feature_extractor
    if encoder is None and image_encoder_folder is not None:
        encoder = _load_encoder(pipe, places[0], image_encoder_folder, where)
    if extractor is None:
        size = DEFAULT_IMAGE_SIZE if encoder is None else encoder.config.image_size
        extractor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    attach_ip_adapters_(unet, adapters)
    parts.image_encoder, parts.feature_extractor = encoder, extractor


def _places(source: Any, subfolder: Any, weight_name: Any) -> list[tuple[Source, str | None, str | None]]:
    """One (source, subfolder, file) an adapter."""
    several = [[*value] if isinstance(value, (list, tuple)) else [value] for value in (source, subfolder, weight_name)]
    count = max(map(len, several))
    if any(len(values) not in (1, count) for values in several):
        raise ValueError(
            f"{len(several[0])} repositories, {len(several[1])} subfolders and {len(several[2])} weight names for "
            f"{count} IP-Adapters; give one of each for all, or one an adapter."
        )
    sources, folders, names = (values if len(values) == count else values * count for values in several)
    return list(zip(sources, folders, names, strict=True))


def _read(source: Source, subfolder: str | None, weight_name: str | None, where: Mapping[str, Any]) -> IPAdapter:
    if isinstance(source, Mapping):
        return read_ip_adapter(source)
    if Path(source).is_file() or str(source).endswith(PICKLE_SUFFIXES):
        return read_ip_adapter(source)
    if weight_name is not None:
        refuse_ip_adapter_pickle(weight_name)
    prefix = _prefix(subfolder)

    def select(files: list[str]) -> list[str]:
        if weight_name is not None:
            return hub.required(files, prefix + weight_name)
        found = [file for file in files if file.startswith(prefix) and file.endswith(".safetensors")]
        found = [file for file in found if "/" not in file[len(prefix) :]]
        if len(found) != 1:
            choice = ", ".join(file[len(prefix) :] for file in sorted(found)) or "none"
            raise ValueError(f"{source} needs weight_name=, the file of the adapter; in {prefix or './'}: {choice}.")
        return found

    folder = hub.fetch(source, select, **where)
    return read_ip_adapter(folder / select(hub.listing(folder))[0])


def _prefix(subfolder: str | None) -> str:
    return f"{subfolder.strip('/')}/" if subfolder and subfolder.strip("/.") else ""


def _load_encoder(
    pipe: DiffusionPipeline, place: tuple[Source, str | None, str | None], folder: str, where: Mapping[str, Any]
) -> CLIPVisionModelWithProjection:
    source, subfolder, _ = place
    if isinstance(source, Mapping):
        raise ValueError(
            "The pipeline has no image_encoder, and tensors come without one. Set pipe.image_encoder first, or pass "
            "image_encoder_folder=None and give ip_adapter_image_embeds to the call."
        )
    if Path(source).is_file():
        source, subfolder = Path(source).parent, None
    inside = folder.strip("/") if "/" in folder else _prefix(subfolder) + folder
    encoder = CLIPVisionModelWithProjection.from_pretrained(source, subfolder=inside, dtype=pipe.dtype, **where)
    return encoder.to(pipe.device)


def unload_ip_adapter(pipe: DiffusionPipeline) -> None:
    """Take all IP-Adapters out of ``pipe``, and its image encoder with them.

    The feature extractor goes too, except where the pipeline's class has a safety checker, which needs it.
    """
    detach_ip_adapters_(_unet(pipe))
    parts: Any = pipe
    if "image_encoder" in pipe.component_names:
        parts.image_encoder = None
        if "safety_checker" not in pipe.component_names:
            parts.feature_extractor = None


def set_ip_adapter_scale(pipe: DiffusionPipeline, scale: Scale | Sequence[Scale]) -> None:
    """Set how much the loaded IP-Adapters count; no weight is touched.

    Args:
        pipe: with IP-Adapters.
        scale: one for all, or a list with one an adapter. A scale is a number, or ``{"down": …, "mid": …, "up": …}``
            where a part is a number, a list with a number for each transformer of a block, or ``{"block_1": number or
            list, …}``. What is left out counts 0: ``{"up": {"block_0": [0, 1, 0]}}`` is SDXL's style alone
            (InstantStyle, Wang et al. 2024).

    Raises:
        ValueError: no adapters, another number of scales, a block that is not there or has no attention, or a scale
            that is not a finite number.
    """
    unet = _unet(pipe)
    count = len(projections(unet))
    if not count:
        raise ValueError("There is no IP-Adapter to scale; load one first: pipe.load_ip_adapter(…).")
    scales: list[Any] = [*scale] if isinstance(scale, (list, tuple)) else [scale] * count
    if len(scales) != count:
        raise ValueError(f"{len(scales)} scales for {count} IP-Adapters; give one for all, or one an adapter.")
    try:
        expanded = [block_weights(value, unet) for value in scales]
    except LoraError as error:
        raise ValueError(f"IP-Adapter scale {scale!r}: {error}.") from None
    set_ip_adapter_scales_(unet, expanded)


@torch.no_grad()
def encode_image(
    pipe: DiffusionPipeline,
    image: Any,
    device: torch.device | str | None,
    num_images_per_prompt: int,
    output_hidden_states: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Embeddings of pictures, and those of no picture, ``num_images_per_prompt`` rows a picture.

    Args:
        pipe: with an image encoder and, for anything but tensors, a feature extractor.
        image: a PIL image, a list of them, or pixel values (N, 3, S, S) as the feature extractor prepares them.
        device: of the result; None is the pipeline's.
        num_images_per_prompt: how often each picture is repeated, copies side by side.
        output_hidden_states: give the states before CLIP's last layer, (rows, L, D), as full-face and Plus adapters
            read them, instead of the projected embedding (rows, D). No picture is a black one then, else zeros.

    Raises:
        TypeError: the picture is of another type.
        ValueError: there is no image encoder, or no feature extractor.
    """
    encoder, extractor = _encoder(pipe), getattr(pipe, "feature_extractor", None)
    pipe._bring(encoder)
    if isinstance(image, Tensor):
        pixels = image
    elif extractor is None:
        raise ValueError("The pipeline has no feature_extractor; set pipe.feature_extractor, or give pixel values.")
    else:
        pixels = extractor(image, return_tensors="pt").pixel_values
    pixels = pixels.to(encoder.device, encoder.dtype)
    if output_hidden_states:
        embeds = encoder(pixels).hidden_states[-2]
        # All rows of no picture are one.
        none = encoder(torch.zeros_like(pixels[:1])).hidden_states[-2].expand_as(embeds)
    else:
        embeds = encoder(pixels).pooled
        none = torch.zeros_like(embeds)
    embeds, none = (rows.repeat_interleave(num_images_per_prompt, dim=0) for rows in (embeds, none))
    device = device or pipe._execution_device
    return embeds.to(device), none.to(device)


def _encoder(pipe: DiffusionPipeline) -> CLIPVisionModelWithProjection:
    encoder = getattr(pipe, "image_encoder", None)
    if encoder is None:
        raise ValueError(
            "The pipeline has no image_encoder; load the IP-Adapter without image_encoder_folder=None, or give "
            "ip_adapter_image_embeds instead of ip_adapter_image."
        )
    return encoder


def _check_encoder(pipe: DiffusionPipeline, projection: ImageProjection) -> None:
    config = _encoder(pipe).config
    width = config.hidden_size if projection.reads_patches else config.projection_dim
    if width != projection.image_width:
        raise ValueError(
            f"The IP-Adapter {projection.name} reads embeddings of width {projection.image_width}, but the pipeline's "
            f"image_encoder gives {width}. Load the one that is published with it: image_encoder_folder= in "
            "load_ip_adapter, on a pipeline whose image_encoder is None."
        )


def check_ip_adapter_inputs(pipe: DiffusionPipeline, ip_adapter_image: Any, ip_adapter_image_embeds: Any) -> None:
    """Check the arguments of a call before any network runs.

    Raises:
        ValueError: both or, with IP-Adapters loaded, neither is given; pictures without an IP-Adapter; another number
            of pictures than of adapters; no image encoder, or one that was not made for an adapter; embeddings of a
            shape that an adapter does not take.
        TypeError: the embeddings are no list of tensors.
    """
    found = projections(_unet(pipe))
    if ip_adapter_image is not None and ip_adapter_image_embeds is not None:
        raise ValueError("Pass either ip_adapter_image or ip_adapter_image_embeds; both are given.")
    if ip_adapter_image is None and ip_adapter_image_embeds is None:
        if found:
            raise ValueError(
                f"The pipeline has {len(found)} IP-Adapters, but no pictures for them; pass ip_adapter_image or "
                "ip_adapter_image_embeds, or call unload_ip_adapter()."
            )
        return
    if not found:
        raise ValueError("There are pictures for an IP-Adapter, but none is loaded; call pipe.load_ip_adapter(…).")
    if ip_adapter_image_embeds is None:
        images = _each(ip_adapter_image)
        if len(images) != len(found):
            raise ValueError(
                f"ip_adapter_image holds {len(images)} entries for {len(found)} IP-Adapters; give one an adapter. "
                "Several pictures for one adapter are a list of their own: ip_adapter_image=[[a, b]]."
            )
        for projection in found:
            _check_encoder(pipe, projection)
        return
    _check_given(found, ip_adapter_image_embeds)


def _check_given(found: Sequence[ImageProjection], given: Any) -> None:
    if not isinstance(given, (list, tuple)) or not all(isinstance(embeds, Tensor) for embeds in given):
        kind = type(given).__name__
        raise TypeError(f"ip_adapter_image_embeds must be a list of tensors, one an IP-Adapter, not a {kind}.")
    if len(given) != len(found):
        raise ValueError(
            f"ip_adapter_image_embeds holds {len(given)} tensors for {len(found)} IP-Adapters; give one an adapter."
        )
    for projection, embeds in zip(found, given, strict=True):
        check_embeds(projection, embeds)


@torch.no_grad()
def prepare_ip_adapter_image_embeds(
    pipe: DiffusionPipeline,
    ip_adapter_image: Any,
    ip_adapter_image_embeds: Sequence[Tensor] | None,
    device: torch.device | str | None,
    num_images_per_prompt: int,
    do_classifier_free_guidance: bool,
) -> list[Tensor]:
    """The embeddings of a call's pictures, one tensor an adapter: (rows, images, …), unconditional rows first.

    Args:
        pipe: with IP-Adapters.
        ip_adapter_image: one entry an adapter: what `encode_image` takes. All pictures of an entry are seen at once.
        ip_adapter_image_embeds: what this function gave earlier for one picture, in place of the pictures: one row,
            or one a picture of the call; with guidance as many unconditional rows before them.
        device: of the result; None is the pipeline's.
        num_images_per_prompt: pictures that the call paints in all.
        do_classifier_free_guidance: whether there are unconditional rows.

    Raises:
        ValueError, TypeError: see `check_ip_adapter_inputs` and `encode_image`; or the embeddings have another number
            of rows.
    """
    check_ip_adapter_inputs(pipe, ip_adapter_image, ip_adapter_image_embeds)
    device = device or pipe._execution_device
    found = projections(_unet(pipe))
    prepared: list[Tensor] = []
    if ip_adapter_image_embeds is not None:
        for projection, embeds in zip(found, ip_adapter_image_embeds, strict=True):
            halves = _halves(projection.name, embeds, num_images_per_prompt, do_classifier_free_guidance)
            prepared.append(torch.cat(halves).to(device))
        return prepared
    for projection, image in zip(found, _each(ip_adapter_image), strict=True):
        positive, negative = encode_image(pipe, image, device, 1, projection.reads_patches)
        halves = (negative, positive) if do_classifier_free_guidance else (positive,)
        prepared.append(torch.cat([half[None].expand(num_images_per_prompt, *half.shape) for half in halves]))
    return prepared


def _halves(name: str, embeds: Tensor, pictures: int, guided: bool) -> list[Tensor]:
    """Given embeddings, repeated to one row a picture: the unconditional half, if ``guided``, and the other."""
    rows, parts = embeds.shape[0], 2 if guided else 1
    if rows % parts or not rows or pictures % (rows // parts):
        wanted = f"{parts} or {parts * pictures} rows" if pictures > 1 else f"{parts} rows"
        half = "unconditional rows first" if guided else "without unconditional rows, for there is no guidance"
        raise ValueError(
            f"The embeddings for the IP-Adapter {name} have {rows} rows; this call needs {wanted}, {half}. "
            "prepare_ip_adapter_image_embeds(…) makes them."
        )
    return [half.repeat_interleave(pictures // half.shape[0], dim=0) for half in embeds.chunk(parts)]


def image_tokens(
    pipe: DiffusionPipeline,
    ip_adapter_image: Any,
    ip_adapter_image_embeds: Sequence[Tensor] | None,
    pictures: int,
    guided: bool,
) -> tuple[Tensor, ...]:
    """What the UNet takes as ``image_tokens`` in every step of a call; empty when there are no IP-Adapters.

    Args:
        pipe, ip_adapter_image, ip_adapter_image_embeds: as in `prepare_ip_adapter_image_embeds`.
        pictures: the call paints in all.
        guided: whether there are unconditional rows, which come first.

    Returns:
        One tensor (pictures or 2 * pictures, tokens, width) an adapter, on the UNet's device and in its dtype.

    Raises:
        ValueError, TypeError: see `prepare_ip_adapter_image_embeds`.
    """
    check_ip_adapter_inputs(pipe, ip_adapter_image, ip_adapter_image_embeds)
    unet = _unet(pipe)
    if not projections(unet):
        return ()
    embeds = prepare_ip_adapter_image_embeds(
        pipe, ip_adapter_image, ip_adapter_image_embeds, pipe._execution_device, pictures, guided
    )
    pipe._bring(*projections(unet))
    return project(unet, embeds)


def _each(images: Any) -> list[Any]:
    """The entries of ``ip_adapter_image``, one an adapter."""
    return [*images] if isinstance(images, (list, tuple)) else [images]


def _unet(pipe: DiffusionPipeline) -> Any:
    """The UNet, without the wrapper that torch.compile puts around it."""
    return unwrap(pipe.unet)
