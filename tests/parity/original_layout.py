"""Stability's layout of a checkpoint, written down from its own code: the shape of every tensor by its original name.

The networks are described here by the parameters of the original YAML files (``channel_mult``, ``num_res_blocks``,
``transformer_depth``, …) and built as the original constructors build them, so nothing here knows our names or
diffusers'. `checkpoint` puts the parts together as the published files do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Shapes = dict[str, tuple[int, ...]]


def norm(prefix: str, channels: int) -> Shapes:
    return {f"{prefix}.weight": (channels,), f"{prefix}.bias": (channels,)}


def linear(prefix: str, inputs: int, outputs: int, bias: bool = True) -> Shapes:
    return {f"{prefix}.weight": (outputs, inputs)} | ({f"{prefix}.bias": (outputs,)} if bias else {})


def conv(prefix: str, inputs: int, outputs: int, kernel: int = 3) -> Shapes:
    return {f"{prefix}.weight": (outputs, inputs, kernel, kernel), f"{prefix}.bias": (outputs,)}


def prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


@dataclass(frozen=True)
class UNetModel:
    """``openaimodel.UNetModel``: transformer depths are one a residual block, down the network and up again."""

    model_channels: int
    channel_mult: Sequence[int]
    depths_in: Sequence[int]
    depths_out: Sequence[int]
    depth_middle: int | None
    context_dim: int
    use_linear: bool
    adm_in_channels: int | None = None
    in_channels: int = 4
    num_res_blocks: int = 2

    def shapes(self) -> Shapes:
        emb = 4 * self.model_channels
        found = linear("time_embed.0", self.model_channels, emb) | linear("time_embed.2", emb, emb)
        if self.adm_in_channels:
            found |= linear("label_emb.0.0", self.adm_in_channels, emb) | linear("label_emb.0.2", emb, emb)
        found |= conv("input_blocks.0.0", self.in_channels, self.model_channels)
        channels, kept, number = self.model_channels, [self.model_channels], 1
        depths = iter(self.depths_in)
        for level, factor in enumerate(self.channel_mult):
            for _ in range(self.num_res_blocks):
                found |= self.resblock(f"input_blocks.{number}.0", channels, factor * self.model_channels)
                channels = factor * self.model_channels
                found |= self.transformer(f"input_blocks.{number}.1", channels, next(depths))
                kept.append(channels)
                number += 1
            if level != len(self.channel_mult) - 1:
                found |= conv(f"input_blocks.{number}.0.op", channels, channels)
                kept.append(channels)
                number += 1
        found |= self.resblock("middle_block.0", channels, channels)
        if self.depth_middle is not None:
            found |= self.transformer("middle_block.1", channels, self.depth_middle)
            found |= self.resblock("middle_block.2", channels, channels)
        number, depths = 0, iter(self.depths_out)
        for level, factor in reversed(list(enumerate(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                found |= self.resblock(f"output_blocks.{number}.0", channels + kept.pop(), factor * self.model_channels)
                channels = factor * self.model_channels
                attention = self.transformer(f"output_blocks.{number}.1", channels, next(depths))
                found |= attention
                if level and i == self.num_res_blocks:
                    found |= conv(f"output_blocks.{number}.{2 if attention else 1}.conv", channels, channels)
                number += 1
        assert not kept
        return found | norm("out.0", channels) | conv("out.2", channels, 4)

    def resblock(self, prefix: str, inputs: int, outputs: int) -> Shapes:
        found = norm(f"{prefix}.in_layers.0", inputs) | conv(f"{prefix}.in_layers.2", inputs, outputs)
        found |= linear(f"{prefix}.emb_layers.1", 4 * self.model_channels, outputs)
        found |= norm(f"{prefix}.out_layers.0", outputs) | conv(f"{prefix}.out_layers.3", outputs, outputs)
        return found | (conv(f"{prefix}.skip_connection", inputs, outputs, 1) if inputs != outputs else {})

    def transformer(self, prefix: str, channels: int, depth: int) -> Shapes:
        if not depth:
            return {}
        found = norm(f"{prefix}.norm", channels)
        for name in ("proj_in", "proj_out"):
            inner = f"{prefix}.{name}"
            found |= linear(inner, channels, channels) if self.use_linear else conv(inner, channels, channels, 1)
        for i in range(depth):
            block = f"{prefix}.transformer_blocks.{i}"
            for attention, context in (("attn1", channels), ("attn2", self.context_dim)):
                found |= linear(f"{block}.{attention}.to_q", channels, channels, bias=False)
                found |= linear(f"{block}.{attention}.to_k", context, channels, bias=False)
                found |= linear(f"{block}.{attention}.to_v", context, channels, bias=False)
                found |= linear(f"{block}.{attention}.to_out.0", channels, channels)
            found |= linear(f"{block}.ff.net.0.proj", channels, 8 * channels)
            found |= linear(f"{block}.ff.net.2", 4 * channels, channels)
            found |= {name: shape for i in (1, 2, 3) for name, shape in norm(f"{block}.norm{i}", channels).items()}
        return found


def autoencoder(ch: int, ch_mult: Sequence[int] = (1, 2, 4, 4), num_res_blocks: int = 2, z: int = 4) -> Shapes:
    """``AutoencoderKL`` with ``diffusionmodules.model``'s encoder and decoder: attention in the middle only."""

    def resnet(prefix: str, inputs: int, outputs: int) -> Shapes:
        found = norm(f"{prefix}.norm1", inputs) | conv(f"{prefix}.conv1", inputs, outputs)
        found |= norm(f"{prefix}.norm2", outputs) | conv(f"{prefix}.conv2", outputs, outputs)
        return found | (conv(f"{prefix}.nin_shortcut", inputs, outputs, 1) if inputs != outputs else {})

    def middle(prefix: str, channels: int) -> Shapes:
        found = resnet(f"{prefix}.block_1", channels, channels) | resnet(f"{prefix}.block_2", channels, channels)
        found |= norm(f"{prefix}.attn_1.norm", channels)
        for name in ("q", "k", "v", "proj_out"):
            found |= conv(f"{prefix}.attn_1.{name}", channels, channels, 1)
        return found

    found = conv("encoder.conv_in", 3, ch)
    channels = ch
    for level, factor in enumerate(ch_mult):
        for i in range(num_res_blocks):
            found |= resnet(f"encoder.down.{level}.block.{i}", channels, factor * ch)
            channels = factor * ch
        if level != len(ch_mult) - 1:
            found |= conv(f"encoder.down.{level}.downsample.conv", channels, channels)
    found |= middle("encoder.mid", channels) | norm("encoder.norm_out", channels)
    found |= conv("encoder.conv_out", channels, 2 * z) | conv("decoder.conv_in", z, channels)
    found |= middle("decoder.mid", channels)
    for level, factor in reversed(list(enumerate(ch_mult))):
        for i in range(num_res_blocks + 1):
            found |= resnet(f"decoder.up.{level}.block.{i}", channels, factor * ch)
            channels = factor * ch
        if level:
            found |= conv(f"decoder.up.{level}.upsample.conv", channels, channels)
    found |= norm("decoder.norm_out", channels) | conv("decoder.conv_out", channels, 3)
    return found | conv("quant_conv", 2 * z, 2 * z, 1) | conv("post_quant_conv", z, z, 1)


def clip(width: int, layers: int, inner: int, vocab: int = 49408) -> Shapes:
    """OpenAI's text tower as transformers 4.2x saved it, with the buffer of position ids."""
    found: Shapes = {
        "embeddings.position_ids": (1, 77),
        "embeddings.token_embedding.weight": (vocab, width),
        "embeddings.position_embedding.weight": (77, width),
    }
    for i in range(layers):
        layer = f"encoder.layers.{i}"
        for name in ("q", "k", "v", "out"):
            found |= linear(f"{layer}.self_attn.{name}_proj", width, width)
        found |= norm(f"{layer}.layer_norm1", width) | norm(f"{layer}.layer_norm2", width)
        found |= linear(f"{layer}.mlp.fc1", width, inner) | linear(f"{layer}.mlp.fc2", inner, width)
    return prefixed("text_model.", found | norm("final_layer_norm", width))


def open_clip(width: int, layers: int, inner: int, vocab: int = 49408) -> Shapes:
    """OpenCLIP's text tower."""
    found: Shapes = {
        "positional_embedding": (77, width),
        "text_projection": (width, width),
        "logit_scale": (),
        "token_embedding.weight": (vocab, width),
    }
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        found |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        found |= linear(f"{block}.attn.out_proj", width, width)
        found |= norm(f"{block}.ln_1", width) | norm(f"{block}.ln_2", width)
        found |= linear(f"{block}.mlp.c_fc", width, inner) | linear(f"{block}.mlp.c_proj", inner, width)
    return found | norm("ln_final", width)


# What ldm's LatentDiffusion registers as buffers beside the networks.
SCHEDULE = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


@dataclass(frozen=True)
class Widths:
    """Everything that a tiny model has smaller than the published one. The structure is never smaller."""

    unet: int = 320
    vae: int = 128
    clip: tuple[int, int] = (768, 3072)
    clip_h: tuple[int, int] = (1024, 4096)
    clip_g: tuple[int, int] = (1280, 5120)
    time_ids: int = 256
    vocab: int = 49408


PUBLISHED = Widths()
TINY = Widths(unet=32, vae=32, clip=(32, 40), clip_h=(32, 40), clip_g=(64, 72), time_ids=8, vocab=60)

SD = {"channel_mult": (1, 2, 4, 4), "depths_in": (1,) * 6 + (0,) * 2, "depths_out": (0,) * 3 + (1,) * 9}
XL = {"channel_mult": (1, 2, 4), "depths_in": (0, 0, 2, 2, 10, 10), "depths_out": (10,) * 3 + (2,) * 3 + (0,) * 3}
SSD = {"channel_mult": (1, 2, 4), "depths_in": (0, 0, 2, 2, 4, 4), "depths_out": (4, 4, 10, 2, 1, 1, 0, 0, 0)}


def unet(family: str, w: Widths = PUBLISHED) -> Shapes:
    channels = 9 if family.endswith("inpainting") else 4
    if family.startswith(("sd15", "sd2")):
        second = family.startswith("sd2")
        context = w.clip_h[0] if second else w.clip[0]
        model = UNetModel(
            w.unet, **SD, depth_middle=1, context_dim=context, use_linear=second, in_channels=channels
        )  # fmt: skip
        return model.shapes()
    return UNetModel(
        w.unet,
        **(SSD if family == "ssd-1b" else XL),
        depth_middle=None if family == "ssd-1b" else 10,
        context_dim=w.clip[0] + w.clip_g[0],
        use_linear=True,
        adm_in_channels=w.clip_g[0] + 6 * w.time_ids,
        in_channels=channels,
    ).shapes()


def checkpoint(family: str, w: Widths = PUBLISHED) -> Shapes:
    """Every tensor of a published checkpoint of ``family``."""
    found = prefixed("model.diffusion_model.", unet(family, w))
    found |= prefixed("first_stage_model.", autoencoder(w.vae))
    if family.startswith(("sd15", "sd2")):
        found |= {name: (1000,) for name in SCHEDULE}
    if family.startswith("sd15"):
        return found | prefixed("cond_stage_model.transformer.", clip(w.clip[0], 12, w.clip[1], w.vocab))
    if family.startswith("sd2"):
        return found | prefixed("cond_stage_model.model.", open_clip(w.clip_h[0], 24, w.clip_h[1], w.vocab))
    found |= {"denoiser.sigmas": (1000,)}
    found |= prefixed("conditioner.embedders.0.transformer.", clip(w.clip[0], 12, w.clip[1], w.vocab))
    return found | prefixed("conditioner.embedders.1.model.", open_clip(w.clip_g[0], 32, w.clip_g[1], w.vocab))


def narrowed(name: str, config: Mapping[str, object], family: str, w: Widths = TINY) -> dict[str, object]:
    """The published configuration of the component ``name`` at the widths ``w``."""
    xl = not family.startswith(("sd15", "sd2"))
    if name == "unet":
        mult = XL["channel_mult"] if xl else SD["channel_mult"]
        context = w.clip[0] + w.clip_g[0] if xl else w.clip_h[0] if family.startswith("sd2") else w.clip[0]
        changed = {"block_out_channels": [w.unet * factor for factor in mult], "cross_attention_dim": context}
        changed["attention_head_dim"] = 4
        if xl:
            changed["addition_time_embed_dim"] = w.time_ids
            changed["projection_class_embeddings_input_dim"] = w.clip_g[0] + 6 * w.time_ids
        return {**config, **changed}
    if name == "vae":
        return {**config, "block_out_channels": [w.vae * factor for factor in (1, 2, 4, 4)]}
    width, inner = w.clip_g if name == "text_encoder_2" else w.clip_h if family.startswith("sd2") else w.clip
    smaller = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": 4, "vocab_size": w.vocab}
    return {**config, **smaller, "projection_dim": width}
