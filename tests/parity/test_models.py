"""Every network computes what diffusers' or transformers' class of the same configuration computes, key for key."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch import Tensor, nn

from fourstroke.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from fourstroke.models.unet import Residuals, UNet2DConditionModel
from fourstroke.models.vae import AutoencoderKL
from fourstroke.models.vae_tiny import AutoencoderTiny

from .oracles import UNETS, assert_close, randomise, unet_inputs

VAE: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "layers_per_block": 2,
}
TINY: dict[str, Any] = {"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 4}
EOS, BOS = 99, 98


def unet_pair(kind: str) -> tuple[UNet2DConditionModel, nn.Module]:
    oracle = randomise(diffusers.UNet2DConditionModel(**UNETS[kind]))
    ours = UNet2DConditionModel.from_config(dict(oracle.config)).eval().requires_grad_(False)
    assert set(ours.state_dict()) == set(oracle.state_dict())
    ours.load_state_dict(oracle.state_dict())
    return ours, oracle


@pytest.mark.parametrize("size", [(16, 16), (18, 14), (9, 13)], ids=str)
@pytest.mark.parametrize("kind", UNETS)
def test_unet(kind: str, size: tuple[int, int]) -> None:
    ours, oracle = unet_pair(kind)
    inputs = unet_inputs(UNETS[kind], size)
    assert_close(ours(**inputs), oracle(**inputs).sample)


@pytest.mark.parametrize("kind", UNETS)
def test_every_input_of_the_unet_matters(kind: str) -> None:
    """A guard of the tests above: an input without effect on the oracle would be compared with nothing."""
    _, oracle = unet_pair(kind)
    inputs = unet_inputs(UNETS[kind])
    before = oracle(**inputs).sample
    for name in inputs:
        changed = dict(inputs)
        if name == "timestep":
            changed[name] = torch.tensor(259)
        elif name == "added_cond_kwargs":
            changed[name] = {key: value + 8 for key, value in inputs[name].items()}
        else:
            changed[name] = inputs[name] + 0.5
        assert (oracle(**changed).sample - before).abs().mean() > 1e-3 * before.abs().mean(), name


def test_unet_takes_one_timestep_a_sample() -> None:
    ours, oracle = unet_pair("sd15")
    inputs = unet_inputs(UNETS["sd15"])
    inputs["timestep"] = torch.tensor([999, 259])
    assert_close(ours(**inputs), oracle(**inputs).sample)
    inputs["timestep"] = 259
    assert_close(ours(**inputs)[1], oracle(**inputs).sample[1])


def test_unet_takes_fractional_timesteps() -> None:
    ours, oracle = unet_pair("sd15")
    inputs = unet_inputs(UNETS["sd15"])
    inputs["timestep"] = torch.tensor(499.25)
    assert_close(ours(**inputs), oracle(**inputs).sample)


def control_shapes(ours: UNet2DConditionModel, inputs: dict[str, Any]) -> tuple[list[torch.Size], torch.Size]:
    """Shapes of the skip connections and of the mid block's output, observed in a forward pass."""
    skips: list[torch.Size] = []
    mids: list[torch.Size] = []
    handles = [ours.conv_in.register_forward_hook(lambda _m, _i, out: skips.append(out.shape))]
    handles += [
        block.register_forward_hook(lambda _m, _i, out: skips.extend(skip.shape for skip in out[1]))
        for block in ours.down_blocks
    ]
    handles.append(ours.mid_block.register_forward_hook(lambda _m, _i, out: mids.append(out.shape)))
    ours(**inputs)
    for handle in handles:
        handle.remove()
    return skips, mids[0]


@pytest.mark.parametrize("kind", ["sd15", "xl", "ssd1b"])
def test_residuals_of_a_controlnet(kind: str) -> None:
    ours, oracle = unet_pair(kind)
    inputs = unet_inputs(UNETS[kind], (10, 14))
    shapes, mid_shape = control_shapes(ours, inputs)
    down = tuple(torch.randn(shape) for shape in shapes)
    mid = torch.randn(mid_shape)
    theirs = oracle(**inputs, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
    assert_close(ours(**inputs, residuals=Residuals(down=down, mid=mid)), theirs)
    assert (theirs - oracle(**inputs).sample).abs().max() > 0.01


def adapter_shapes(kind: str, batch: int, side: int) -> list[tuple[int, ...]]:
    """A T2I-Adapter's features: before the downsampler of a level with attention, after that of one without."""
    config, shapes = UNETS[kind], []
    levels = zip(config["down_block_types"], config["block_out_channels"], strict=True)
    for i, (block, channels) in enumerate(levels):
        after = side if i == len(config["block_out_channels"]) - 1 else side // 2
        at = side if block.startswith("CrossAttn") else after
        shapes.append((batch, channels, at, at))
        side = after
    return shapes


@pytest.mark.parametrize("kind", ["sd15", "xl", "ssd1b"])
def test_residuals_of_a_t2i_adapter(kind: str) -> None:
    ours, oracle = unet_pair(kind)
    inputs = unet_inputs(UNETS[kind])
    intra = [torch.randn(shape) for shape in adapter_shapes(kind, 2, 16)]
    theirs = oracle(**inputs, down_intrablock_additional_residuals=list(intra)).sample
    assert_close(ours(**inputs, residuals=Residuals(intra=tuple(intra))), theirs)
    assert (theirs - oracle(**inputs).sample).abs().max() > 0.01


def test_control_and_adapter_together() -> None:
    ours, oracle = unet_pair("sd15")
    inputs = unet_inputs(UNETS["sd15"])
    shapes, mid_shape = control_shapes(ours, inputs)
    down, mid = tuple(torch.randn(shape) for shape in shapes), torch.randn(mid_shape)
    intra = (torch.randn(2, 32, 16, 16), torch.randn(2, 64, 8, 8))
    theirs = oracle(
        **inputs,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
        down_intrablock_additional_residuals=list(intra),
    ).sample
    assert_close(ours(**inputs, residuals=Residuals(down, mid, intra)), theirs)


def test_zero_residuals_are_none() -> None:
    ours, _ = unet_pair("sd15")
    inputs = unet_inputs(UNETS["sd15"])
    shapes, mid_shape = control_shapes(ours, inputs)
    zeros = Residuals(tuple(map(torch.zeros, shapes)), torch.zeros(mid_shape))
    assert torch.equal(ours(**inputs, residuals=zeros), ours(**inputs))


def test_xl_without_its_conditions_explains_itself() -> None:
    ours, _ = unet_pair("xl")
    inputs = unet_inputs(UNETS["xl"])
    del inputs["added_cond_kwargs"]["time_ids"]
    with pytest.raises(ValueError, match=r"text_embeds \(N, D\) and time_ids \(N, 6\).*\['text_embeds'\]"):
        ours(**inputs)


def vae_pair(**changes: Any) -> tuple[AutoencoderKL, nn.Module]:
    oracle = randomise(diffusers.AutoencoderKL(**{**VAE, **changes}))
    ours = AutoencoderKL.from_config(dict(oracle.config)).eval().requires_grad_(False)
    assert set(ours.state_dict()) == set(oracle.state_dict())
    ours.load_state_dict(oracle.state_dict())
    return ours, oracle


VAE_CHANGES = {
    "sd": {},
    "no quantisation layers": {"use_quant_conv": False, "use_post_quant_conv": False},
    "no attention": {"mid_block_add_attention": False},
    "sixteen latent channels": {"latent_channels": 16},
}


@pytest.mark.parametrize("changes", VAE_CHANGES.values(), ids=list(VAE_CHANGES))
def test_vae(changes: dict[str, Any]) -> None:
    ours, oracle = vae_pair(**changes)
    picture = torch.rand(2, 3, 20, 28) * 2 - 1
    distribution, theirs = ours.encode(picture), oracle.encode(picture).latent_dist
    assert_close(distribution.mean, theirs.mean)
    assert_close(distribution.mode(), theirs.mode())
    assert_close(distribution.logvar, theirs.logvar)
    assert_close(distribution.std, theirs.std)
    assert_close(distribution.sample(torch.Generator().manual_seed(3)), theirs.sample(torch.Generator().manual_seed(3)))
    latents = torch.randn(theirs.mean.shape)
    assert_close(ours.decode(latents), oracle.decode(latents).sample)
    assert ours.downscale == 2 ** (len(VAE["block_out_channels"]) - 1)


def test_vae_clamps_the_log_variance_as_the_oracle_does() -> None:
    ours, oracle = vae_pair()
    for vae in (ours, oracle):
        vae.quant_conv.weight[4:].mul_(1e4)
    picture = torch.rand(1, 3, 16, 16) * 2 - 1
    theirs = oracle.encode(picture).latent_dist.logvar
    assert theirs.min() == -30 and theirs.max() == 20
    assert_close(ours.encode(picture).logvar, theirs)


LEGACY = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def with_legacy_attention(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The form in which SD 1.5's VAE was published: other names in the mid block's attention."""
    renamed = {}
    for name, tensor in state.items():
        for new, old in LEGACY.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[name] = tensor
    assert len(set(renamed) - set(state)) == 16
    return renamed


def test_vae_reads_the_old_names_of_attention() -> None:
    ours, oracle = vae_pair()
    state = with_legacy_attention(oracle.state_dict())
    assert {AutoencoderKL.published_name(name) for name in state} == set(ours.state_dict())
    assert all(AutoencoderKL.published_name(name) == name for name in oracle.state_dict())


@pytest.mark.parametrize("act_fn", ["relu", "silu"])
def test_tiny_vae(act_fn: str) -> None:
    oracle = randomise(diffusers.AutoencoderTiny(**TINY, act_fn=act_fn))
    ours = AutoencoderTiny.from_config(dict(oracle.config)).eval().requires_grad_(False)
    assert set(ours.state_dict()) == set(oracle.state_dict())
    ours.load_state_dict(oracle.state_dict())
    picture = torch.rand(2, 3, 32, 48) * 2 - 1
    latents = oracle.encode(picture).latents
    assert_close(ours.encode(picture), latents)
    assert_close(ours.decode(5 * latents), oracle.decode(5 * latents).sample)
    assert ours.downscale == 8


def clip_pair(projected: bool, **changes: Any) -> tuple[CLIPTextModel, nn.Module]:
    config = transformers.CLIPTextConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=20,
        **{"eos_token_id": EOS, "bos_token_id": BOS, "hidden_act": "quick_gelu", **changes},
    )
    theirs, cls = (
        (transformers.CLIPTextModelWithProjection, CLIPTextModelWithProjection)
        if projected
        else (transformers.CLIPTextModel, CLIPTextModel)
    )
    oracle = randomise(theirs(config))
    ours = cls.from_config(config.to_dict()).eval().requires_grad_(False)
    state = {cls.published_name(name): tensor for name, tensor in oracle.state_dict().items()}
    assert set(state) == set(ours.state_dict())
    ours.load_state_dict(state)
    return ours, oracle


def prompts() -> Tensor:
    """Two padded prompts: the end-of-text token once, and many times (SD 1.5 pads with it)."""
    ids = torch.randint(0, BOS, (2, 77))
    ids[:, 0] = BOS
    ids[0, 5] = EOS
    ids[0, 6:] = 0
    ids[1, 50:] = EOS
    return ids


@pytest.mark.parametrize("projected", [False, True], ids=["plain", "projected"])
@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos_token_id", [2, EOS])
def test_clip(projected: bool, hidden_act: str, eos_token_id: int) -> None:
    ours, oracle = clip_pair(projected, hidden_act=hidden_act, eos_token_id=eos_token_id)
    ids = prompts()
    output, theirs = ours(ids), oracle(ids, output_hidden_states=True)
    assert_close(output.last_hidden_state, theirs.last_hidden_state)
    assert len(output.hidden_states) == len(theirs.hidden_states) == 4
    for state, their_state in zip(output.hidden_states, theirs.hidden_states, strict=True):
        assert_close(state, their_state)
    assert_close(output.pooled, theirs.text_embeds if projected else theirs.pooler_output)


def test_clip_takes_short_prompts() -> None:
    ours, oracle = clip_pair(projected=False)
    ids = torch.tensor([[BOS, 5, 6, EOS]])
    assert_close(ours(ids).last_hidden_state, oracle(ids).last_hidden_state)


def test_clip_reads_every_published_key_form() -> None:
    """With and without ``text_model.``, with the position buffer of old exports and the projection of full ones."""
    ours, _ = clip_pair(projected=False)
    names = set(ours.state_dict())
    bare = {name.removeprefix("text_model.") for name in names}
    old = {*names, "text_model.embeddings.position_ids", "text_projection.weight"}
    assert {CLIPTextModel.published_name(name) for name in bare} == names
    assert {CLIPTextModel.published_name(name) for name in old} - {None} == names
    projected, _ = clip_pair(projected=True)
    bare = {name.removeprefix("text_model.") for name in projected.state_dict()}
    assert {CLIPTextModelWithProjection.published_name(name) for name in bare} == set(projected.state_dict())
