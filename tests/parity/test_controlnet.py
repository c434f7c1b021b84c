"""ControlNets compute, copy, save and load what diffusers' do; residuals of several are a sum."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from safetensors.torch import save_file
from torch import Tensor, nn

from fourstroke.config import ControlNetConfig, UnsupportedConfig, config_from_dict, config_to_dict
from fourstroke.loading import WeightError
from fourstroke.models.controlnet import ControlNetModel, MultiControlNetModel, control_config, guess_scales
from fourstroke.models.unet import Residuals, UNet2DConditionModel, add_residuals
from fourstroke.single_file import config_folder, load, load_controlnet_file, load_unet_file
from fourstroke.single_file.layout import translator

from . import original_layout as original
from .oracles import UNETS, assert_close, randomise, unet_inputs

EMBEDDING = {"conditioning_embedding_out_channels": (4, 8, 8, 12)}
NOT_CONTROL = ("up_block_types", "sample_size", "reverse_transformer_layers_per_block")
# diffusers' keyword arguments, one entry a published kind of ControlNet.
NETS: dict[str, dict[str, Any]] = {
    kind: {name: value for name, value in UNETS[kind].items() if name not in NOT_CONTROL} | EMBEDDING
    for kind in ("sd15", "sd21", "xl")
}
# The "small" ControlNets for SDXL have no transformer at all.
NETS["xl small"] = NETS["xl"] | {"down_block_types": ("DownBlock2D",) * 2, "mid_block_type": "UNetMidBlock2D"}


def pair(kind: str, **changes: Any) -> tuple[ControlNetModel, nn.Module]:
    oracle = randomise(diffusers.ControlNetModel(**{**NETS[kind], **changes}))
    # Its few channels would let little of the picture through.
    randomise(oracle.controlnet_cond_embedding, std=0.3)
    ours = ControlNetModel.from_config(dict(oracle.config)).eval().requires_grad_(False)
    assert set(ours.state_dict()) == set(oracle.state_dict())
    ours.load_state_dict(oracle.state_dict())
    return ours, oracle


def picture(size: tuple[int, int] = (16, 16), batch: int = 2, channels: int = 3) -> Tensor:
    """A control picture for latents of ``size``."""
    return torch.rand(batch, channels, 8 * size[0], 8 * size[1])


def compare(ours: Residuals, theirs: Any) -> None:
    assert ours.intra == () and ours.mid is not None
    for one, other in zip([*ours.down, ours.mid], [*theirs[0], theirs[1]], strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("size", [(16, 16), (10, 14), (9, 13)], ids=str)
@pytest.mark.parametrize("kind", NETS)
def test_residuals(kind: str, size: tuple[int, int]) -> None:
    ours, oracle = pair(kind)
    inputs, shown = unet_inputs(NETS[kind], size), picture(size)
    condition = ours.embed_condition(shown)
    assert_close(condition, oracle.controlnet_cond_embedding(shown))
    compare(ours(**inputs, condition=condition), oracle(**inputs, controlnet_cond=shown, return_dict=False))


@pytest.mark.parametrize("kind", NETS)
def test_every_input_matters(kind: str) -> None:
    """A guard of the test above: an input without effect on the oracle would be compared with nothing."""
    _, oracle = pair(kind)
    inputs = unet_inputs(NETS[kind]) | {"controlnet_cond": picture()}
    before = oracle(**inputs, return_dict=False)[1]
    for name in inputs:
        changed = dict(inputs)
        if name == "timestep":
            changed[name] = torch.tensor(259)
        elif name == "added_cond_kwargs":
            changed[name] = {key: value + 8 for key, value in inputs[name].items()}
        else:
            changed[name] = inputs[name] + 0.5
        moved = (oracle(**changed, return_dict=False)[1] - before).abs().mean() > 1e-3 * before.abs().mean()
        assert bool(moved) != (kind == "xl small" and name == "encoder_hidden_states"), name


@pytest.mark.parametrize("pooled", [False, True], ids=["maps", "pooled"])
@pytest.mark.parametrize("guess_mode", [False, True])
@pytest.mark.parametrize("scale", [0.8, 1.5])
@pytest.mark.parametrize("kind", ["sd15", "xl"])
def test_scales(kind: str, scale: float, guess_mode: bool, pooled: bool) -> None:
    ours, oracle = pair(kind, global_pool_conditions=pooled)
    inputs, shown = unet_inputs(NETS[kind]), picture()
    options = {"conditioning_scale": scale, "guess_mode": guess_mode}
    theirs = oracle(**inputs, controlnet_cond=shown, **options, return_dict=False)
    found = ours(**inputs, condition=ours.embed_condition(shown), **options)
    compare(found, theirs)
    assert (found.down[0].shape[-2:] == (1, 1)) == pooled


def test_guess_mode_goes_evenly_from_a_tenth_to_one() -> None:
    assert guess_scales(13) == pytest.approx(torch.logspace(-1, 0, 13, dtype=torch.float64).tolist(), rel=1e-12)


def test_channel_order() -> None:
    ours, oracle = pair("sd15", controlnet_conditioning_channel_order="bgr")
    inputs, shown = unet_inputs(NETS["sd15"]), picture()
    theirs = oracle(**inputs, controlnet_cond=shown, return_dict=False)
    compare(ours(**inputs, condition=ours.embed_condition(shown)), theirs)
    swapped = ControlNetModel.from_config(NETS["sd15"])
    swapped.load_state_dict(oracle.state_dict())
    assert torch.equal(swapped.embed_condition(shown.flip(1)), ours.embed_condition(shown))
    assert not torch.allclose(swapped.embed_condition(shown), ours.embed_condition(shown))


def test_pictures_of_other_channels_and_scales() -> None:
    ours, oracle = pair("sd15", conditioning_channels=1, conditioning_embedding_out_channels=(4, 8, 12))
    inputs, shown = unet_inputs(NETS["sd15"]), torch.rand(2, 1, 64, 64)
    assert ours.downscale == 4
    compare(
        ours(**inputs, condition=ours.embed_condition(shown)),
        oracle(**inputs, controlnet_cond=shown, return_dict=False),
    )


def test_one_timestep_a_sample() -> None:
    ours, oracle = pair("sd15")
    inputs, shown = unet_inputs(NETS["sd15"]), picture()
    inputs["timestep"] = torch.tensor([999, 259])
    theirs = oracle(**inputs, controlnet_cond=shown, return_dict=False)
    compare(ours(**inputs, condition=ours.embed_condition(shown)), theirs)


def test_one_picture_for_all_samples() -> None:
    ours, _ = pair("sd15")
    inputs, condition = unet_inputs(NETS["sd15"], batch=3), ours.embed_condition(picture(batch=1))
    one, repeated = (ours(**inputs, condition=value) for value in (condition, condition.repeat(3, 1, 1, 1)))
    assert all(torch.equal(*both) for both in zip(one.down, repeated.down, strict=True))


@pytest.mark.parametrize("pooled", [False, True], ids=["maps", "pooled"])
@pytest.mark.parametrize("kind", ["sd15", "sd21", "xl"])
def test_unet_under_control(kind: str, pooled: bool) -> None:
    net, their_net = pair(kind, global_pool_conditions=pooled)
    their_unet = randomise(diffusers.UNet2DConditionModel(**UNETS[kind]))
    unet = UNet2DConditionModel.from_config(dict(their_unet.config)).eval().requires_grad_(False)
    unet.load_state_dict(their_unet.state_dict())
    inputs, shown = unet_inputs(UNETS[kind], (10, 14)), picture((10, 14))
    down, mid = their_net(**inputs, controlnet_cond=shown, conditioning_scale=0.7, return_dict=False)
    theirs = their_unet(**inputs, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
    found = net(**inputs, condition=net.embed_condition(shown), conditioning_scale=0.7)
    assert_close(unet(**inputs, residuals=found), theirs)
    assert (theirs - their_unet(**inputs).sample).abs().max() > 0.01


# Several controls.


def test_residuals_of_several_are_a_sum() -> None:
    pairs = [pair("sd15"), pair("sd15", global_pool_conditions=True), pair("sd15")]
    inputs, shown, scales = unet_inputs(NETS["sd15"]), [picture() for _ in pairs], [1.0, 0.5, 0.3]
    theirs = diffusers.MultiControlNetModel([oracle for _, oracle in pairs])(
        **inputs, controlnet_cond=shown, conditioning_scale=scales, return_dict=False
    )
    total = None
    for (net, _), image, scale in zip(pairs, shown, scales, strict=True):
        total = add_residuals(total, net(**inputs, condition=net.embed_condition(image), conditioning_scale=scale))
    assert total is not None
    compare(total, theirs)


def test_sum_takes_over_what_only_one_has() -> None:
    control = Residuals((torch.ones(1), torch.ones(2)), torch.ones(3))
    adapter = Residuals(intra=(torch.full((4,), 2.0),))
    for first, second in ((control, adapter), (adapter, control)):
        total = add_residuals(first, second)
        assert total == (control.down, control.mid, adapter.intra)
    assert add_residuals(None, adapter) is adapter
    doubled = add_residuals(adapter, adapter)
    assert doubled.down == () and doubled.mid is None and doubled.intra[0].tolist() == [4.0] * 4
    assert adapter.intra[0].tolist() == [2.0] * 4, "the arguments are not changed"


def test_controls_of_different_kinds_do_not_add() -> None:
    with pytest.raises(ValueError, match=r"down residuals of two controls are 2 and 1 tensors.*Use controls of one"):
        add_residuals(Residuals((torch.ones(1),) * 2), Residuals((torch.ones(1),)))
    with pytest.raises(ValueError, match=r"intra residuals of two controls are 1 and 2 tensors"):
        add_residuals(Residuals(intra=(torch.ones(1),)), Residuals(intra=(torch.ones(1),) * 2))


# A new network for a UNet.


def unet_pair(kind: str) -> tuple[UNet2DConditionModel, Any]:
    oracle = randomise(diffusers.UNet2DConditionModel(**UNETS[kind]))
    ours = UNet2DConditionModel.from_config(dict(oracle.config)).eval().requires_grad_(False)
    ours.load_state_dict(oracle.state_dict())
    return ours, oracle


def is_zero_conv(name: str) -> bool:
    return name.startswith(("controlnet_down_blocks.", "controlnet_mid_block.", "controlnet_cond_embedding.conv_out."))


@pytest.mark.parametrize("kind", ["sd15", "sd21", "inpainting", "xl", "ssd1b"])
def test_from_unet(kind: str) -> None:
    unet, their_unet = unet_pair(kind)
    options: dict[str, Any] = {**EMBEDDING, "controlnet_conditioning_channel_order": "bgr", "conditioning_channels": 1}
    net = ControlNetModel.from_unet(unet, **options)
    oracle = diffusers.ControlNetModel.from_unet(their_unet, **options)
    assert config_from_dict(ControlNetConfig, dict(oracle.config)) == net.config
    ours, theirs = net.state_dict(), oracle.state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}
    compared = {"copied": 0, "zero": 0, "new": 0}
    for name, tensor in theirs.items():
        if is_zero_conv(name):
            assert not tensor.any() and not ours[name].any(), name
            compared["zero"] += 1
        elif name.startswith("controlnet_"):
            assert ours[name].any(), name
            compared["new"] += 1
        else:
            assert torch.equal(ours[name], tensor), name
            compared["copied"] += 1
    assert min(compared.values()) > 0
    assert net.training and all(parameter.requires_grad for parameter in net.parameters())


def test_from_unet_without_its_weights() -> None:
    unet, _ = unet_pair("sd15")
    net = ControlNetModel.from_unet(unet, load_weights_from_unet=False, **EMBEDDING)
    given = unet.state_dict()
    assert not any(torch.equal(tensor, given[name]) for name, tensor in net.state_dict().items() if name in given)
    assert not any(tensor.any() for name, tensor in net.state_dict().items() if is_zero_conv(name))


def test_a_new_network_changes_nothing_and_can_be_trained() -> None:
    unet, _ = unet_pair("sd15")
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    net, inputs = ControlNetModel.from_unet(unet, **EMBEDDING), unet_inputs(UNETS["sd15"])
    residuals = net(**inputs, condition=net.embed_condition(picture()))
    plain = unet(**inputs)
    controlled = unet(**inputs, residuals=residuals)
    assert torch.equal(controlled, plain)
    controlled.square().mean().backward()
    weights = dict(net.named_parameters())
    moved = {name for name, parameter in weights.items() if parameter.grad is not None and parameter.grad.any()}
    zero = {name for name in weights if is_zero_conv(name) and not name.startswith("controlnet_cond_embedding")}
    assert moved == zero, "at first only the last layers learn (Zhang et al. 2023, sec. 3.2)"
    assert all(torch.equal(unet.state_dict()[name], tensor) for name, tensor in before.items())


def test_from_unet_leaves_guidance_embedding_behind() -> None:
    """The published layout has no ``cond_proj``: ControlNets of distilled models are told the time alone."""
    unet, _ = unet_pair("lcm")
    net = ControlNetModel.from_unet(unet, **EMBEDDING)
    assert "time_embedding.cond_proj.weight" in unet.state_dict()
    assert "time_embedding.cond_proj.weight" not in net.state_dict()
    assert torch.equal(net.time_embedding.linear_1.weight, unet.time_embedding.linear_1.weight)


def test_from_unet_explains_what_cannot_be_copied() -> None:
    unet, _ = unet_pair("sd15")
    unet.mid_block = None
    with pytest.raises(ValueError, match=r"The UNet lacks mid_block\..*neither compiled nor quantised"):
        ControlNetModel.from_unet(unet, **EMBEDDING)
    unet, _ = unet_pair("sd15")
    unet.config = dataclasses.replace(unet.config, layers_per_block=(1, 2))
    with pytest.raises(UnsupportedConfig, match=r"layers_per_block is \(1, 2\); it must be one integer"):
        ControlNetModel.from_unet(unet, **EMBEDDING)


# Files.


@pytest.mark.parametrize("kind", NETS)
def test_diffusers_reads_what_is_written(kind: str, tmp_path: Path) -> None:
    ours, oracle = pair(kind)
    ours.save_pretrained(tmp_path)
    again = diffusers.ControlNetModel.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in oracle.state_dict().items())
    assert config_from_dict(ControlNetConfig, dict(again.config)) == ours.config


@pytest.mark.parametrize("kind", NETS)
def test_what_diffusers_writes_is_read(kind: str, tmp_path: Path) -> None:
    _, oracle = pair(kind)
    oracle.save_pretrained(tmp_path / "net")
    ours = ControlNetModel.from_pretrained(tmp_path, subfolder="net")
    assert ours.state_dict().keys() == oracle.state_dict().keys()
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in oracle.state_dict().items())
    assert not ours.training and ours.source is not None


def test_variants_and_dtypes(tmp_path: Path) -> None:
    _, oracle = pair("sd15")
    oracle.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    for ours in (
        ControlNetModel.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16),
        MultiControlNetModel.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16).nets[0],
    ):
        assert {parameter.dtype for parameter in ours.parameters()} == {torch.float16}
        assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in oracle.state_dict().items())


def test_misspelt_keyword_warns(tmp_path: Path) -> None:
    ours, _ = pair("sd15")
    ours.save_pretrained(tmp_path / "controlnet")
    for cls in (ControlNetModel, MultiControlNetModel):
        with pytest.warns(UserWarning, match=rf"{cls.__name__}.from_pretrained: ignored unknown arguments 'varient'"):
            cls.from_pretrained(tmp_path / "controlnet", varient="fp16")


def test_missing_weight_is_named(tmp_path: Path) -> None:
    ours, _ = pair("sd15")
    del ours.controlnet_mid_block
    ours.save_pretrained(tmp_path)
    with pytest.raises(WeightError, match=r"ControlNetModel. 2 missing: controlnet_mid_block.weight"):
        ControlNetModel.from_pretrained(tmp_path)


def test_several_are_saved_beside_one_another(tmp_path: Path) -> None:
    nets = [pair("sd15")[0] for _ in range(3)]
    MultiControlNetModel(nets).save_pretrained(tmp_path / "controlnet")
    assert {path.name for path in tmp_path.iterdir()} == {"controlnet", "controlnet_1", "controlnet_2"}
    theirs = diffusers.MultiControlNetModel.from_pretrained(str(tmp_path / "controlnet"))
    theirs.save_pretrained(str(tmp_path / "again"))
    ours = MultiControlNetModel.from_pretrained(tmp_path / "again")
    assert len(ours.nets) == len(theirs.nets) == 3 and not ours.training
    for net, first, second in zip(nets, theirs.nets, ours.nets, strict=True):
        for name, tensor in net.state_dict().items():
            assert torch.equal(first.state_dict()[name], tensor) and torch.equal(second.state_dict()[name], tensor)


def test_several_explain_themselves(tmp_path: Path) -> None:
    net, _ = pair("sd15")
    with pytest.raises(ValueError, match="at least one ControlNetModel; the list is empty"):
        MultiControlNetModel([])
    with pytest.raises(TypeError, match="holds ControlNetModels, not UNet2DConditionModel"):
        MultiControlNetModel([net, unet_pair("sd15")[0]])
    with pytest.raises(FileNotFoundError, match=r"no folder with a ControlNet .* one by one: MultiControlNetModel\("):
        MultiControlNetModel.from_pretrained(tmp_path / "controlnet")
    (tmp_path / "controlnet_1").mkdir()
    with pytest.raises(FileExistsError, match=r"controlnet_1 would be read as one more ControlNet; remove it"):
        MultiControlNetModel([net]).save_pretrained(tmp_path / "controlnet")
    assert [path.name for path in tmp_path.iterdir()] == ["controlnet_1"], "nothing was written"


# Single files.


def original_names(family: str, w: original.Widths) -> original.Shapes:
    """``cldm.ControlNet``: the UNet's way down, a convolution after each block, and the embedding of the hint."""
    parts = ("time_embed.", "label_emb.", "input_blocks.", "middle_block.")
    found = {name: shape for name, shape in original.unet(family, w).items() if name.startswith(parts)}
    number, channels = 0, w.unet
    while any(name.startswith(f"input_blocks.{number}.") for name in found):
        for last in ("0.weight", "0.op.weight", "0.out_layers.3.weight"):
            channels = found.get(f"input_blocks.{number}.{last}", (channels,))[0]
        found |= original.conv(f"zero_convs.{number}.0", channels, channels, 1)
        number += 1
    found |= original.conv("middle_block_out.0", channels, channels, 1)
    widths = (3, 16, 16, 32, 32, 96, 96, 256, w.unet)
    for i in range(8):
        found |= original.conv(f"input_hint_block.{2 * i}", widths[i], widths[i + 1])
    return found


def unet_config(family: str) -> dict[str, Any]:
    return json.loads((config_folder(family) / "unet" / "config.json").read_text(encoding="utf-8"))


def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' conversion, with the pair of layers for SDXL that it does not know."""
    theirs = convert_controlnet_checkpoint(
        {f"control_model.{name}": tensor for name, tensor in tensors.items()}, {"layers_per_block": 2}
    )
    for name, tensor in tensors.items():
        if name.startswith("label_emb."):
            new = name.replace("label_emb.0.0.", "add_embedding.linear_1.")
            theirs[new.replace("label_emb.0.2.", "add_embedding.linear_2.")] = tensor
    return theirs


@pytest.mark.parametrize("family", ["sd15", "sd2-768", "sdxl"])
def test_names_at_full_size(family: str) -> None:
    shapes = original_names(family, original.PUBLISHED)
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(unet_config(family))
        oracle = diffusers.ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    expected = {name: tuple(tensor.shape) for name, tensor in oracle.state_dict().items()}
    rename = translator(ControlNetModel, config_from_dict(ControlNetConfig, dict(oracle.config)), "original")
    rows = {name: rename(name) or () for name in shapes}
    assert {row.name: shapes[name] for name in shapes for row in rows[name]} == expected
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert {row.name: id(tensors[name]) for name in shapes for row in rows[name]} == {
        name: id(tensor) for name, tensor in convert(tensors).items()
    }


def narrow_folder(family: str, folder: Path, w: original.Widths) -> Path:
    """A family's folder of configurations with a narrow UNet in it."""
    (folder / "unet").mkdir(parents=True)
    config = original.narrowed("unet", unet_config(family), family, w)
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("family", ["sd15", "sd2-768", "sdxl"])
def test_file_of_a_family(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of the published width tell the family, whose UNet's configuration implies the network's."""
    w = original.Widths(unet=32)
    tensors = {name: torch.randn(shape) for name, shape in original_names(family, w).items()}
    save_file(tensors, tmp_path / "net.safetensors")
    folder, asked = narrow_folder(family, tmp_path / "configs", w), []
    monkeypatch.setattr(load, "config_folder", lambda name, **_: asked.append(name) or folder)
    net, theirs = load_controlnet_file(tmp_path / "net.safetensors"), convert(tensors)
    assert asked == [family]
    assert net.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in net.state_dict().items())
    assert net.config.use_linear_projection == (family != "sd15")


@pytest.mark.parametrize("layout", ["original", "bare", "diffusers"])
def test_file_with_a_configuration(layout: str, tmp_path: Path) -> None:
    folder = narrow_folder("sd15", tmp_path / "family", original.TINY)
    unet = config_from_dict(UNet2DConditionModel.config_class, json.loads((folder / "unet/config.json").read_text()))
    config = config_to_dict(control_config(unet)) | {"global_pool_conditions": True}
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "config.json").write_text(json.dumps(config))
    tensors = {name: torch.randn(shape) for name, shape in original_names("sd15", original.TINY).items()}
    theirs = convert(tensors)
    prefixed = {f"control_model.{name}": tensor for name, tensor in tensors.items()}
    path = tmp_path / "net.safetensors"
    save_file({"original": prefixed, "bare": tensors, "diffusers": theirs}[layout], path)
    for where, pooled in ((folder, False), (tmp_path / "net", True)):
        net = load_controlnet_file(path, config=where, torch_dtype=torch.float16)
        assert net.config.global_pool_conditions == pooled
        assert all(torch.equal(net.state_dict()[name], tensor.half()) for name, tensor in theirs.items())
    with pytest.raises(ValueError, match=r"reads texts of width 32, which tells no family. Pass config= with"):
        load_controlnet_file(path)
    with pytest.raises(ValueError, match=r"This file is a ControlNet .*: load it with .*\.load_controlnet_file"):
        load_unet_file(path)


def test_file_that_is_no_controlnet(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_file({"conv_in.weight": torch.ones(1)}, path)
    with pytest.raises(WeightError, match=r"net.safetensors holds no ControlNet; its tensors are conv_in.weight"):
        load_controlnet_file(path)
    _, oracle = pair("xl small")
    save_file(oracle.state_dict(), path)
    with pytest.raises(ValueError, match=r"is a ControlNet that reads no text, which tells no family. Pass config="):
        load_controlnet_file(path)


def test_tensors_that_no_table_knows_are_named(tmp_path: Path) -> None:
    folder, path = narrow_folder("sd15", tmp_path / "family", original.TINY), tmp_path / "net.safetensors"
    tensors = {name: torch.randn(shape) for name, shape in original_names("sd15", original.TINY).items()}
    save_file({**tensors, "wings.weight": torch.ones(1)}, path)
    with pytest.raises(WeightError, match=r"1 tensors are unknown: wings.weight"):
        load_controlnet_file(path, config=folder)
    assert load_controlnet_file(path, config=folder, ignore=[r"^wings\."]).state_dict()


# What is refused.


def test_condition_of_another_size_is_named() -> None:
    ours, _ = pair("sd15")
    inputs = unet_inputs(NETS["sd15"])
    message = r"2 control pictures of 112x80 pixels, but the 2 latents of 16x16 are pictures of 128x128\. Resize"
    with pytest.raises(ValueError, match=message):
        ours(**inputs, condition=ours.embed_condition(picture((10, 14))))
    with pytest.raises(ValueError, match=r"of 3 control pictures of 128x128 pixels, but the 2 latents of 16x16 are"):
        ours(**inputs, condition=ours.embed_condition(picture(batch=3)))


@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (1, 3, 60, 64), (1, 3, 64, 60), (3, 64, 64)], ids=str)
def test_picture_that_cannot_be_embedded_is_named(shape: tuple[int, ...]) -> None:
    ours, _ = pair("sd15")
    with pytest.raises(ValueError, match=r"has the shape \(.*\); it must be \(N, 3, H, W\), H and W multiples of 8"):
        ours.embed_condition(torch.zeros(shape))


def test_xl_without_its_conditions_explains_itself() -> None:
    ours, _ = pair("xl")
    inputs = unet_inputs(NETS["xl"])
    del inputs["added_cond_kwargs"]
    with pytest.raises(ValueError, match=r"This ControlNetModel is of SDXL's kind: .*text_embeds.*got nothing"):
        ours(**inputs, condition=ours.embed_condition(picture()))


def test_configuration_is_the_oracles() -> None:
    """Every field of diffusers' class is known, with its default; what is written is read back, by both."""
    parameters = inspect.signature(diffusers.ControlNetModel.__init__).parameters
    fields = {field.name: field for field in dataclasses.fields(ControlNetConfig)}
    assert set(parameters) - {"self"} == set(fields) | set(ControlNetConfig.neutral)
    for name, field in fields.items():
        assert field.default == parameters[name].default, name
    small = {"block_out_channels": (32,) * 4, "cross_attention_dim": 8, "attention_head_dim": 4}
    written = config_to_dict(config_from_dict(ControlNetConfig, small))
    oracle = dict(diffusers.ControlNetModel.from_config(dict(written)).config)
    assert config_from_dict(ControlNetConfig, oracle) == config_from_dict(ControlNetConfig, written)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_control_type": 6}, r"ControlNetModel: unknown config field 'num_control_type' \(value 6\)"),
        ({"class_embed_type": "timestep"}, r"ControlNetModel: config field 'class_embed_type' is 'timestep'"),
        ({"down_block_types": ["DownBlock2D"]}, r"ControlNetModel: down_block_types has 1 entries, but .* has 4"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, r"ControlNetModel: down_block_types 'AttnDownBlock2D' is not"),
        ({"mid_block_type": None}, r"ControlNetModel: mid_block_type None is not supported"),
        ({"addition_embed_type": "text"}, r"ControlNetModel: addition_embed_type 'text' is not supported"),
        ({"addition_embed_type": "text_time"}, r"ControlNetModel: .* needs addition_time_embed_dim"),
        ({"controlnet_conditioning_channel_order": "gbr"}, r"controlnet_conditioning_channel_order 'gbr' is not"),
        ({"cross_attention_dim": [768, 768, 768, 768]}, r"cross_attention_dim is \(768, .*must be one integer"),
    ],
)
def test_configuration_that_cannot_be_built_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedConfig, match=message):
        config_from_dict(ControlNetConfig, changes)
