"""IP-Adapter (Ye et al. 2023, arXiv 2308.06721): pictures as prompts, beside the text.

An adapter is a projection that turns a picture's CLIP embedding into a few tokens, and a pair of key and value weights
for every cross-attention, which attends to these tokens as well as to the text. `read_ip_adapter` gives it as data,
`attach_ip_adapters_` puts any number of them into a UNet, and `project` computes the tokens, once a request::

    attach_ip_adapters_(unet, [read_ip_adapter(path)])
    noise = unet(latents, t, text, image_tokens=project(unet, [image_embeds]))
    detach_ip_adapters_(unet)

What is attached are buffers outside the state dict: they move with the UNet, but are neither saved nor LoRA targets.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..loading import PICKLE_SUFFIXES, WeightError, listed, open_tensors
from .layers import Attention, merge_heads, split_heads
from .unet import UNet2DConditionModel

PARTS = ("image_proj", "ip_adapter")
# Width of the text states -> the family that has it, for messages.
FAMILIES: Mapping[int, str] = {768: "SD 1.5", 1024: "SD 2.x", 2048: "SDXL", 1280: "the SDXL refiner"}
RESAMPLER_HEAD_DIM = 64
AFFINE = ("weight", "bias")
# The tensor whose length is the width of the tokens.
WIDTHS: Mapping[str, str] = {
    "plain": "image_proj.norm.weight",
    "full": "image_proj.proj.3.weight",
    "plus": "image_proj.norm_out.weight",
}

Shapes = dict[str, tuple[int, ...]]
# A tensor that only this kind has -> the kind, in the order in which to look.
KINDS: Mapping[str, str] = {
    "perceiver_resampler.proj_in.weight": "FaceID Plus",
    "proj.weight": "plain",
    "proj.3.weight": "full",
    "latents": "plus",
    "norm.weight": "FaceID",
}


@dataclass(frozen=True)
class IPAdapter:
    """A published IP-Adapter, checked in itself but not yet against a UNet. Tensors of a file stay memory-mapped.

    Attributes:
        name: what messages call it.
        kind: ``plain`` (one embedding a picture -> a few tokens), ``full`` (every patch -> a token) or ``plus``
            (every patch -> a few tokens).
        projection: the tensors of the projection by their published names, without ``image_proj.``.
        layers: (key, value) weights, (inner, width) each, of every cross-attention in the published order.
    """

    name: str
    kind: str
    projection: Mapping[str, Tensor]
    layers: tuple[tuple[Tensor, Tensor], ...]

    @property
    def width(self) -> int:
        """Width of the tokens, which is that of the UNet's text states."""
        return self.layers[0][0].shape[1]


def read_ip_adapter(source: str | os.PathLike[str] | Mapping[str, Any], *, name: str | None = None) -> IPAdapter:
    """Read an IP-Adapter.

    Args:
        source: a ``.safetensors`` file, or its tensors: ``{"image_proj": {…}, "ip_adapter": {…}}``, or by whole key.
        name: what messages call it; default the file's name without suffix.

    Raises:
        ValueError: the file is a pickle, or the adapter is of a kind that is not supported (FaceID).
        WeightError: it cannot be read, is no IP-Adapter, or a tensor is missing, unexpected or of the wrong shape; all
            of them are named.
    """
    if isinstance(source, Mapping):
        name, tensors = name or "(tensors)", _flat(source)
    else:
        path = Path(source)
        refuse_ip_adapter_pickle(path)
        file = open_tensors(path)
        name, tensors = name or path.stem, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    projection, layers = (
        {key[len(part) + 1 :]: tensor for key, tensor in tensors.items() if key.startswith(f"{part}.")}
        for part in PARTS
    )
    if not projection or not layers:
        raise WeightError(
            f"{name} is no IP-Adapter: its keys must begin with {' and '.join(f'{part}.' for part in PARTS)}; it has "
            f"{listed(sorted(tensors)) or 'none'}."
        )
    kind = _kind(name, projection, layers)
    pairs = _pairs(layers)
    expected = {f"image_proj.{key}": shape for key, shape in SHAPES[kind](projection).items()}
    width = expected[WIDTHS[kind]][0]
    for pair in pairs:
        inner = _size(layers, pair[0], 0)
        expected |= {f"ip_adapter.{key}": (inner, width) for key in pair}
    _check(f"IP-Adapter {name} ({kind})", tensors, expected)
    return IPAdapter(name, kind, projection, tuple((layers[key], layers[value]) for key, value in pairs))


def refuse_ip_adapter_pickle(file: str | os.PathLike[str]) -> None:
    """Raise when ``file`` is a pickle, with the conversion that nested IP-Adapter files need.

    Raises:
        ValueError: the file name ends like a pickle's.
    """
    path = Path(file)
    if path.suffix in PICKLE_SUFFIXES:
        raise ValueError(
            f"{path.name} is a pickle, and loading a pickle can run code hidden in it, so only .safetensors files are "
            f"read. Most IP-Adapters are published as both: try weight_name='{path.stem}.safetensors'. Otherwise "
            "convert it once, in an environment that you trust: safetensors.torch.save_file({f'{part}.{key}': tensor "
            "for part, tensors in torch.load(path, weights_only=True).items() for key, tensor in tensors.items()}, "
            f"'{path.stem}.safetensors')."
        )


def _flat(source: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for key, value in source.items():
        if isinstance(value, Mapping):
            tensors |= {f"{key}.{inner}": tensor for inner, tensor in value.items()}
        else:
            tensors[key] = value
    return tensors


def _kind(name: str, projection: Iterable[str], layers: Iterable[str]) -> str:
    names = set(projection)
    kind = next((kind for key, kind in KINDS.items() if key in names), None)
    if kind is None:
        raise WeightError(
            f"{name}: no known kind of IP-Adapter has a projection of {listed(sorted(names))}; plain, full-face and "
            "Plus adapters are read."
        )
    if not kind.startswith("FaceID") and any("_lora." in key for key in layers):
        kind = "FaceID"
    if kind.startswith("FaceID"):
        raise ValueError(
            f"{name} is an IP-Adapter of the kind {kind}, which needs the embedding of a face recogniser and is not "
            "supported; use a plain, full-face or Plus one, such as ip-adapter-plus-face_sd15.safetensors."
        )
    return kind


def _pairs(layers: Iterable[str]) -> list[tuple[str, str]]:
    """The names of the (key, value) weights: numbers 1, 3, 5, …, for the even ones are those of self-attentions."""
    numbers = [int(match[1]) for key in layers if (match := re.fullmatch(r"(\d+)\.to_[kv]_ip\.weight", key))]
    return [(f"{i}.to_k_ip.weight", f"{i}.to_v_ip.weight") for i in range(1, max(numbers, default=1) + 1, 2)]


def _check(where: str, tensors: Mapping[str, Tensor], expected: Shapes) -> None:
    """Raise a `WeightError` that lists missing and unexpected names or, where there are none, wrong shapes."""
    problems = {
        "missing": [key for key in expected if key not in tensors],
        "unexpected": [key for key in tensors if key not in expected],
    }
    if not any(problems.values()):
        problems["of the wrong shape"] = [
            f"{key} {tuple(tensors[key].shape)} instead of {shape}"
            for key, shape in expected.items()
            if tensors[key].shape != shape
        ]
    if any(problems.values()):
        found = "; ".join(f"{len(names)} {kind}: {listed(names)}" for kind, names in problems.items() if names)
        raise WeightError(f"{where}: {found}.")


def _size(tensors: Mapping[str, Tensor], key: str, axis: int, factor: int = 1) -> int:
    """The size of a tensor along ``axis``, cut to a multiple of ``factor``, at least one; 1 where there is none."""
    shape = tensors[key].shape if key in tensors else ()
    return max(shape[axis] // factor, 1) * factor if axis < len(shape) else 1


# The tensors of each kind's projection, from the sizes that some of them have. c: CLIP's width, d: the text's.


def _plain(tensors: Mapping[str, Tensor]) -> Shapes:
    d, c = _size(tensors, "norm.weight", 0), _size(tensors, "proj.weight", 1)
    rows = _size(tensors, "proj.weight", 0, factor=d)
    return {"norm.weight": (d,), "norm.bias": (d,), "proj.weight": (rows, c), "proj.bias": (rows,)}


def _full(tensors: Mapping[str, Tensor]) -> Shapes:
    d, h, c = _size(tensors, "proj.3.weight", 0), _size(tensors, "proj.0.weight", 0), _size(tensors, "proj.0.weight", 1)
    return {
        "proj.0.weight": (h, c),
        "proj.0.bias": (h,),
        "proj.2.weight": (d, h),
        "proj.2.bias": (d,),
        "proj.3.weight": (d,),
        "proj.3.bias": (d,),
    }


def _plus(tensors: Mapping[str, Tensor]) -> Shapes:
    d, c = _size(tensors, "norm_out.weight", 0), _size(tensors, "proj_in.weight", 1)
    h = _size(tensors, "latents", 2)
    shapes: Shapes = {
        "latents": (1, _size(tensors, "latents", 1), h),
        "proj_in.weight": (h, c),
        "proj_in.bias": (h,),
        "proj_out.weight": (d, h),
        "proj_out.bias": (d,),
        "norm_out.weight": (d,),
        "norm_out.bias": (d,),
    }
    depth = len({key.split(".")[1] for key in tensors if key.startswith("layers.")})
    for layer in (f"layers.{i}" for i in range(depth)):
        inner = _size(tensors, f"{layer}.0.to_q.weight", 0, factor=RESAMPLER_HEAD_DIM)
        wide = _size(tensors, f"{layer}.1.1.weight", 0)
        shapes |= {f"{layer}.{norm}.{kind}": (h,) for norm in ("0.norm1", "0.norm2", "1.0") for kind in AFFINE}
        shapes |= {
            f"{layer}.0.to_q.weight": (inner, h),
            f"{layer}.0.to_kv.weight": (2 * inner, h),
            f"{layer}.0.to_out.weight": (h, inner),
            f"{layer}.1.1.weight": (wide, h),
            f"{layer}.1.3.weight": (h, wide),
        }
    return shapes


SHAPES: Mapping[str, Callable[[Mapping[str, Tensor]], Shapes]] = {"plain": _plain, "full": _full, "plus": _plus}


class ImageProjection(nn.Module):
    """A picture's embedding -> tokens. Its tensors are buffers that are not part of a state dict.

    Attributes:
        name, kind: as in `IPAdapter`.
    """

    def __init__(self, adapter: IPAdapter):
        super().__init__()
        self.name = adapter.name
        self.kind = adapter.kind
        self._keys = {key: key.replace(".", "/") for key in adapter.projection}  # buffers take no dots
        for key, tensor in adapter.projection.items():
            self.register_buffer(self._keys[key], tensor, persistent=False)

    @property
    def reads_patches(self) -> bool:
        """Whether it takes CLIP's last states but one, of every patch, instead of the projected embedding."""
        return self.kind != "plain"

    @property
    def image_width(self) -> int:
        """Width of the embeddings that it takes."""
        name = {"plain": "proj", "full": "proj.0", "plus": "proj_in"}[self.kind]
        return self.get_buffer(self._keys[f"{name}.weight"]).shape[1]

    def forward(self, embeds: Tensor) -> Tensor:
        """(N, c), or (N, L, c) when it `reads_patches` -> (N, tokens, d)."""
        w = {key: self.get_buffer(name) for key, name in self._keys.items()}
        if self.kind == "plain":
            width = w["norm.weight"].shape[0]
            return _norm(w, "norm", _linear(w, "proj", embeds).unflatten(-1, (-1, width)))
        if self.kind == "full":
            return _norm(w, "proj.3", _linear(w, "proj.2", F.gelu(_linear(w, "proj.0", embeds))))
        return _resample(w, embeds)


def _linear(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def _norm(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def _resample(w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Perceiver resampler (Alayrac et al. 2022, sec. 3.1.1): learnt queries attend to all patches and themselves."""
    x = _linear(w, "proj_in", x)  # (N, L, h)
    latents = w["latents"].expand(x.shape[0], -1, -1)  # (N, t, h)
    for i in range(sum(key.endswith("to_q.weight") for key in w)):
        attention, feed_forward = f"layers.{i}.0", f"layers.{i}.1"
        heads = w[f"{attention}.to_q.weight"].shape[0] // RESAMPLER_HEAD_DIM
        queries = _norm(w, f"{attention}.norm2", latents)
        context = torch.cat([_norm(w, f"{attention}.norm1", x), queries], dim=1)  # (N, L + t, h)
        k, v = _linear(w, f"{attention}.to_kv", context).chunk(2, dim=-1)
        q, k, v = (split_heads(y, heads) for y in (_linear(w, f"{attention}.to_q", queries), k, v))
        attended = merge_heads(F.scaled_dot_product_attention(q, k, v))
        latents = latents + _linear(w, f"{attention}.to_out", attended)
        h = F.gelu(_linear(w, f"{feed_forward}.1", _norm(w, f"{feed_forward}.0", latents)))
        latents = latents + _linear(w, f"{feed_forward}.3", h)
    return _norm(w, "norm_out", _linear(w, "proj_out", latents))


class ImageAttention(nn.Module):
    """What one cross-attention of the UNet has for its IP-Adapters (Ye et al. 2023, eq. 5).

    Attributes:
        scales: one factor an adapter; at 0 the adapter costs nothing here.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]]):
        super().__init__()
        self.scales = [1.0] * len(layers)
        for i, (key, value) in enumerate(layers):
            self.register_buffer(f"key_{i}", key, persistent=False)
            self.register_buffer(f"value_{i}", value, persistent=False)

    def forward(self, out: Tensor, q: Tensor, images: Sequence[Tensor]) -> Tensor:
        """Add to ``out``, the text's attention, that to each adapter's tokens (N, t, width).

        ``out``, the queries ``q`` and the result are (N, heads, L, d).
        """
        for i, (tokens, scale) in enumerate(zip(images, self.scales, strict=True)):
            if scale:
                weights = self.get_buffer(f"key_{i}"), self.get_buffer(f"value_{i}")
                k, v = (split_heads(F.linear(tokens, weight), q.shape[1]).to(q.dtype) for weight in weights)
                out = out + scale * F.scaled_dot_product_attention(q, k, v)
        return out


def cross_attentions(unet: UNet2DConditionModel) -> Iterator[tuple[str, Attention]]:
    """Yield (path of the transformer, its cross-attention) in the order in which IP-Adapters number them.

    That is the order of diffusers' modules, where the up blocks come before the mid block.
    """
    blocks: list[tuple[str, Any]] = [
        (f"{part}.{i}", block) for part in ("down_blocks", "up_blocks") for i, block in enumerate(getattr(unet, part))
    ]
    blocks.append(("mid_block", unet.mid_block))
    for path, block in blocks:
        transformers: Iterable[Any] = getattr(block, "attentions", None) or ()
        for i, transformer in enumerate(transformers):
            for layer in transformer.transformer_blocks:
                yield f"{path}.attentions.{i}", layer.attn2


def attach_ip_adapters_(unet: UNet2DConditionModel, adapters: Sequence[IPAdapter]) -> None:
    """Put ``adapters`` into ``unet``, at scale 1, in the place of those that it has. Its own weights stay as they are.

    Raises:
        ValueError: no adapters.
        WeightError: one was made for another family of models, or does not fit in shape; nothing is changed then.
    """
    if not adapters:
        raise ValueError("There are no IP-Adapters to attach; detach_ip_adapters_ takes away those that are there.")
    places = [attention for _, attention in cross_attentions(unet)]
    for adapter in adapters:
        check_fit(unet, adapter)
    to = {"device": unet.device, "dtype": unet.dtype}
    for i, attention in enumerate(places):
        attention.image = ImageAttention([adapter.layers[i] for adapter in adapters]).to(**to)
    unet.image_projections = nn.ModuleList(ImageProjection(adapter) for adapter in adapters).to(**to)


def detach_ip_adapters_(unet: UNet2DConditionModel) -> None:
    """Take all IP-Adapters out of ``unet``, if it has any."""
    for _, attention in cross_attentions(unet):
        attention.image = None
    unet.image_projections = None


def check_fit(unet: UNet2DConditionModel, adapter: IPAdapter) -> None:
    """Check that ``adapter`` has the layers of ``unet``.

    Raises:
        WeightError: it has not; the message names both families where they differ.
    """
    places = list(cross_attentions(unet))
    widths = {attention.to_k.in_features for _, attention in places}
    if widths != {adapter.width} or len(places) != len(adapter.layers):
        ours, theirs = _family(max(widths, default=0), len(places)), _family(adapter.width, len(adapter.layers))
        raise WeightError(
            f"IP-Adapter {adapter.name} was made for {theirs}, but this UNet is {ours}; load one that was made for it."
        )
    wrong = [
        f"ip_adapter.{2 * i + 1}.to_{part}_ip.weight {tuple(weight.shape)} instead of "
        f"{(attention.to_k.out_features, attention.to_k.in_features)}"
        for i, ((_, attention), pair) in enumerate(zip(places, adapter.layers, strict=True))
        for part, weight in zip("kv", pair, strict=True)
        if weight.shape[0] != attention.to_k.out_features
    ]
    if wrong:
        raise WeightError(
            f"IP-Adapter {adapter.name} does not fit this UNet. {len(wrong)} of the wrong shape: {listed(wrong)}."
        )


def _family(width: int, layers: int) -> str:
    return f"{FAMILIES.get(width, 'a model')} of text width {width} with {layers} cross-attentions"


def set_ip_adapter_scales_(unet: UNet2DConditionModel, scales: Sequence[float | Mapping[str, float]]) -> None:
    """Set how much each attached adapter counts; no weight is touched.

    Args:
        unet: with IP-Adapters.
        scales: one an adapter: a number, or numbers by the path of a transformer (``down_blocks.1.attentions.0``),
            where 0 holds for those that are left out.

    Raises:
        ValueError: another number of scales than of adapters.
    """
    attached = 0 if unet.image_projections is None else len(unet.image_projections)
    if len(scales) != attached:
        raise ValueError(f"{len(scales)} scales for {attached} IP-Adapters; give one an adapter.")
    for path, attention in cross_attentions(unet):
        own = [scale.get(path, 0.0) if isinstance(scale, Mapping) else scale for scale in scales]
        cast(ImageAttention, attention.image).scales = [float(scale) for scale in own]


def projections(unet: UNet2DConditionModel) -> list[ImageProjection]:
    """The projections of the attached adapters, in their order; none without adapters."""
    return [cast(ImageProjection, module) for module in unet.image_projections or ()]


@torch.no_grad()
def project(unet: UNet2DConditionModel, image_embeds: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tokens of pictures, which stay the same over all steps: what `UNet2DConditionModel.forward` takes.

    Args:
        unet: with IP-Adapters.
        image_embeds: one tensor an adapter, in any dtype and on any device: CLIP's projected embeddings (N, images, c)
            for a plain adapter, its last states but one (N, images, L, c) for full-face and Plus.

    Returns:
        One tensor (N, images * tokens, d) an adapter, in the UNet's dtype and on its device.

    Raises:
        ValueError: another number of tensors than of adapters, or one with another number of axes or another width.
    """
    modules = projections(unet)
    if len(image_embeds) != len(modules):
        raise ValueError(
            f"image_embeds holds {len(image_embeds)} tensors, but the UNet has {len(modules)} IP-Adapters; give one "
            "tensor an adapter."
        )
    for module, embeds in zip(modules, image_embeds, strict=True):
        check_embeds(module, embeds)
    tokens = []
    for module, embeds in zip(modules, image_embeds, strict=True):
        place = next(module.buffers())
        found = module(embeds.to(place.device, place.dtype).flatten(0, 1))  # (N * images, t, d)
        tokens.append(found.unflatten(0, embeds.shape[:2]).flatten(1, 2))
    return tuple(tokens)


def check_embeds(projection: ImageProjection, embeds: Tensor) -> None:
    """Check that ``embeds`` are what ``projection`` takes.

    Raises:
        ValueError: they have another number of axes, or another width.
    """
    width = projection.image_width
    wanted = ("rows", "images", "patches", width) if projection.reads_patches else ("rows", "images", width)
    if embeds.ndim != len(wanted) or embeds.shape[-1] != width:
        raise ValueError(
            f"The embeddings for the IP-Adapter {projection.name} ({projection.kind}) have the shape "
            f"{tuple(embeds.shape)}; it takes {wanted}. Use the image encoder that is published with it."
        )
