"""Names in the layouts of single files, and the tables that translate them, derived from the configurations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, cast

from torch import Tensor

from ..config import AutoencoderKLConfig, CLIPTextConfig, Config, ControlNetConfig, UNetConfig
from ..loading import Model
from ..models.clip import CLIPTextModelWithProjection
from ..models.unet import DownConfig

Transform = Callable[[Tensor], Tensor]


class Place(NamedTuple):
    """Where a component may lie in a file: it does when ``prefix + marker`` is one of the file's tensors.

    ``dialect`` names its layout: ``original`` (Stability's code), ``open_clip``, or ``published`` (as in diffusers' and
    transformers' folders).
    """

    prefix: str
    marker: str
    dialect: str


PLACES: Mapping[str, tuple[Place, ...]] = {
    "unet": (
        Place("model.diffusion_model.", "input_blocks.0.0.weight", "original"),
        Place("", "input_blocks.0.0.weight", "original"),
        Place("", "conv_in.weight", "published"),
    ),
    "vae": (
        Place("first_stage_model.", "encoder.norm_out.weight", "original"),
        Place("vae.", "encoder.norm_out.weight", "original"),
        Place("", "encoder.norm_out.weight", "original"),
        Place("", "encoder.conv_norm_out.weight", "published"),
    ),
    "text_encoder": (
        Place("cond_stage_model.transformer.", "text_model.final_layer_norm.weight", "published"),
        Place("cond_stage_model.transformer.", "final_layer_norm.weight", "published"),
        Place("cond_stage_model.model.", "ln_final.weight", "open_clip"),
        Place("conditioner.embedders.0.transformer.", "text_model.final_layer_norm.weight", "published"),
    ),
    "text_encoder_2": (Place("conditioner.embedders.1.model.", "ln_final.weight", "open_clip"),),
    "controlnet": (
        Place("control_model.", "zero_convs.0.0.weight", "original"),
        Place("", "zero_convs.0.0.weight", "original"),
        Place("", "controlnet_cond_embedding.conv_in.weight", "published"),
    ),
}


def find_place(component: str, shapes: Collection[str], bare: bool = True) -> Place | None:
    """Where ``component`` lies among the tensors named ``shapes``; unless ``bare``, only where others may lie too."""
    places = (place for place in PLACES[component] if bare or place.prefix)
    return next((place for place in places if place.prefix + place.marker in shapes), None)


class Row(NamedTuple):
    """What a tensor becomes: its name here, and the function that adapts it, if one must."""

    name: str
    transform: Transform | None = None


Table = Mapping[str, tuple[Row, ...]]

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
VAE_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
VAE_ENDS = {
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
    **{f"{side}.{name}": f"{side}.{name}" for side in ("encoder", "decoder") for name in ("conv_in", "conv_out")},
    **{f"{side}.norm_out": f"{side}.conv_norm_out" for side in ("encoder", "decoder")},
}
CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def unet_table(config: UNetConfig) -> Table:
    """The UNet: flat lists of numbered blocks, which the configuration's levels are dealt out to."""
    names, resnets, _ = _way_down(config)
    layers = config.per_level("layers_per_block")
    last = len(layers) - 1
    number = 0
    for block, kind in enumerate(config.up_block_types):
        crossed = kind.startswith("CrossAttn")
        for layer in range(layers[last - block] + 1):
            resnets[f"output_blocks.{number}.0"] = f"up_blocks.{block}.resnets.{layer}"
            if crossed:
                names[f"output_blocks.{number}.1"] = f"up_blocks.{block}.attentions.{layer}"
            number += 1
        if block < last:
            # The upsampler is the last thing in the level's last numbered block.
            names[f"output_blocks.{number - 1}.{1 + crossed}.conv"] = f"up_blocks.{block}.upsamplers.0.conv"
    return _rows(names | _expanded(resnets, RESNET))


def controlnet_table(config: ControlNetConfig) -> Table:
    """A ControlNet (lllyasviel's code): the UNet's way down, one convolution a block, and the picture's embedding."""
    names, resnets, blocks = _way_down(config)
    names |= {f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(blocks)}
    names["middle_block_out.0"] = "controlnet_mid_block"
    # Convolutions and activations by turns, in one list.
    inner = 2 * (len(config.conditioning_embedding_out_channels) - 1)
    names["input_hint_block.0"] = "controlnet_cond_embedding.conv_in"
    names |= {f"input_hint_block.{2 * i + 2}": f"controlnet_cond_embedding.blocks.{i}" for i in range(inner)}
    names[f"input_hint_block.{2 * inner + 2}"] = "controlnet_cond_embedding.conv_out"
    return _rows(names | _expanded(resnets, RESNET))


def _way_down(config: DownConfig) -> tuple[dict[str, str], dict[str, str], int]:
    """Names from the input to the middle: of modules, of resnets (see `RESNET`), and the number of input blocks."""
    layers = config.per_level("layers_per_block")
    last = len(layers) - 1
    names, resnets = dict(UNET_ENDS), {}
    number = 1
    for level, kind in enumerate(config.down_block_types):
        for layer in range(layers[level]):
            resnets[f"input_blocks.{number}.0"] = f"down_blocks.{level}.resnets.{layer}"
            if kind.startswith("CrossAttn"):
                names[f"input_blocks.{number}.1"] = f"down_blocks.{level}.attentions.{layer}"
            number += 1
        if level < last:
            names[f"input_blocks.{number}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            number += 1
    resnets["middle_block.0"] = "mid_block.resnets.0"
    if config.mid_block_type == "UNetMidBlock2DCrossAttn":
        names["middle_block.1"] = "mid_block.attentions.0"
        resnets["middle_block.2"] = "mid_block.resnets.1"
    return names, resnets, number


def vae_table(config: AutoencoderKLConfig) -> Table:
    """The VAE: the original numbers the decoder's levels by resolution, ours in the order in which they run."""
    levels = len(config.block_out_channels)
    names, resnets = dict(VAE_ENDS), {}
    attention: dict[str, tuple[Row, ...]] = {}
    for level in range(levels):
        for layer in range(config.layers_per_block):
            resnets[f"encoder.down.{level}.block.{layer}"] = f"encoder.down_blocks.{level}.resnets.{layer}"
        for layer in range(config.layers_per_block + 1):
            resnets[f"decoder.up.{level}.block.{layer}"] = f"decoder.up_blocks.{levels - 1 - level}.resnets.{layer}"
        names[f"encoder.down.{level}.downsample.conv"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        names[f"decoder.up.{level}.upsample.conv"] = f"decoder.up_blocks.{levels - 1 - level}.upsamplers.0.conv"
    for side in ("encoder", "decoder"):
        for i in (1, 2):
            resnets[f"{side}.mid.block_{i}"] = f"{side}.mid_block.resnets.{i - 1}"
        here = f"{side}.mid_block.attentions.0"
        names[f"{side}.mid.attn_1.norm"] = f"{here}.group_norm"
        for theirs, ours in VAE_ATTENTION.items():
            attention[f"{side}.mid.attn_1.{theirs}"] = (Row(f"{here}.{ours}", as_linear),)
    return {**_rows(names | _expanded(resnets, VAE_RESNET)), **attention}


def open_clip_table(config: CLIPTextConfig, projected: bool) -> Table:
    """OpenCLIP's text tower, whose attention keeps queries, keys and values in one matrix.

    Args:
        config: of our encoder.
        projected: SDXL's second encoder projects its pooled text. SD 2.x's does not, and reads the last layer but one
            through the final norm, so the published encoder is one layer shorter and the last layer is left out.
    """
    encoder = "text_model.encoder.layers"
    layers = range(config.num_hidden_layers)
    table: dict[str, tuple[Row, ...]] = {
        "positional_embedding": (Row("text_model.embeddings.position_embedding.weight"),),
        "token_embedding": (Row("text_model.embeddings.token_embedding"),),
        "ln_final": (Row("text_model.final_layer_norm"),),
        "text_projection": (Row("text_projection.weight", transposed),) if projected else (),
        "text_projection.weight": (Row("text_projection.weight"),) if projected else (),
        "logit_scale": (),
        **_rows(_expanded({f"transformer.resblocks.{i}": f"{encoder}.{i}" for i in layers}, CLIP_LAYER)),
    }
    for i in layers:
        for kind in ("weight", "bias"):
            table[f"transformer.resblocks.{i}.attn.in_proj_{kind}"] = tuple(
                Row(f"{encoder}.{i}.self_attn.{name}_proj.{kind}", functools.partial(third, part=part))
                for part, name in enumerate("qkv")
            )
    if not projected:
        table[f"transformer.resblocks.{config.num_hidden_layers}"] = ()
    return table


def as_linear(tensor: Tensor) -> Tensor:
    """The weight of a 1x1 convolution (O, I, 1, 1) as that of a linear layer (O, I); a bias as it is."""
    return tensor.flatten(1) if tensor.ndim > 2 else tensor


def transposed(tensor: Tensor) -> Tensor:
    """A matrix (I, O) that multiplies from the right, as the weight (O, I) of a linear layer."""
    return tensor.t().contiguous()


def third(tensor: Tensor, part: int) -> Tensor:
    """One of three projections that are stacked along the first dimension: (3 D, …) -> (D, …), without a copy."""
    return tensor.chunk(3)[part]


def _expanded(modules: Mapping[str, str], inside: Mapping[str, str]) -> dict[str, str]:
    return {f"{theirs}.{part}": f"{ours}.{name}" for theirs, ours in modules.items() for part, name in inside.items()}


def _rows(names: Mapping[str, str]) -> dict[str, tuple[Row, ...]]:
    return {theirs: (Row(ours),) for theirs, ours in names.items()}


def translate(table: Table, key: str) -> tuple[Row, ...] | None:
    """What becomes of the tensor ``key``: the longest entry of ``table`` that it begins with decides.

    Returns:
        The rows, none when the tensor carries nothing here; or None when the table does not know it.
    """
    end = len(key)
    while end > 0:
        rows = table.get(key[:end])
        if rows is not None:
            return tuple(Row(row.name + key[end:], row.transform) for row in rows)
        end = key.rfind(".", 0, end)
    return None


def translator(cls: type[Model], config: Config, dialect: str) -> Callable[[str], tuple[Row, ...] | None]:
    """`translate` with the table of the network ``cls`` in ``dialect``, for names without the place's prefix."""
    if dialect == "published":

        def published(key: str) -> tuple[Row, ...]:
            name = cls.published_name(key)
            return () if name is None else (Row(name),)

        return published
    if isinstance(config, UNetConfig):
        table = unet_table(config)
    elif isinstance(config, ControlNetConfig):
        table = controlnet_table(config)
    elif isinstance(config, AutoencoderKLConfig):
        table = vae_table(config)
    else:
        table = open_clip_table(cast(CLIPTextConfig, config), issubclass(cls, CLIPTextModelWithProjection))
    return functools.partial(translate, table)
