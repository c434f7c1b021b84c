"""What single files say about themselves, what is refused and how, and which tensors may be left out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fourstroke import hub
from fourstroke.loading import WeightError, resolve_file
from fourstroke.models.clip import CLIPTextModel
from fourstroke.models.unet import UNet2DConditionModel
from fourstroke.models.vae import AutoencoderKL
from fourstroke.single_file import (
    IGNORED,
    SingleFile,
    config_folder,
    families,
    infer_family,
    infer_prediction_type,
    load,
    load_single_file,
    load_unet_file,
    load_vae_file,
)
from tests.parity import original_layout as original

Shapes = dict[str, tuple[int, ...]]
NETWORKS = ("unet", "vae", "text_encoder")
SMALLER: dict[str, dict[str, Any]] = {
    "unet": {
        "block_out_channels": [32, 64],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
    },
    "vae": {
        "block_out_channels": [32, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 1,
    },
    "text_encoder": {"num_hidden_layers": 1},
}


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """The configurations of SD 1.5, made small."""
    folder = tmp_path / "configs"
    for source in config_folder("sd15").rglob("*.json"):
        target = folder / source.relative_to(config_folder("sd15"))
        target.parent.mkdir(parents=True, exist_ok=True)
        data = json.loads(source.read_text(encoding="utf-8"))
        if source.parent.name in NETWORKS:
            data = original.narrowed(source.parent.name, data, "sd15") | SMALLER[source.parent.name]
        target.write_text(json.dumps(data))
    return folder


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """A checkpoint like SD 1.5's, of two levels and one layer."""
    unet = original.UNetModel(32, (1, 2), (1, 0), (0, 0, 1, 1), 1, 32, use_linear=False, num_res_blocks=1)
    shapes = original.prefixed("model.diffusion_model.", unet.shapes())
    shapes |= original.prefixed("first_stage_model.", original.autoencoder(32, (1, 2), num_res_blocks=1))
    shapes |= original.prefixed("cond_stage_model.transformer.", original.clip(32, 1, 40, 60))
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def saved(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, path, metadata)
    return path


# Which family?


@pytest.mark.parametrize(
    ("statement", "family"),
    [
        ({"prediction_type": "epsilon"}, "sd2-base"),
        ({"prediction_type": "v_prediction"}, "sd2-768"),
        ({"metadata": {"modelspec.prediction_type": "epsilon"}}, "sd2-base"),
        ({"metadata": {"modelspec.prediction_type": "v"}}, "sd2-768"),
        ({"metadata": {"modelspec.architecture": "stable-diffusion-v2-512"}}, "sd2-base"),
        ({"metadata": {"modelspec.architecture": "stable-diffusion-v2-768-v"}}, "sd2-768"),
        ({"prediction_type": "epsilon", "metadata": {"modelspec.prediction_type": "v"}}, "sd2-base"),
        ({}, "sd2-768"),
    ],
)
def test_sd2_is_told_by_what_is_said(statement: dict[str, Any], family: str) -> None:
    assert infer_family(original.checkpoint("sd2-768"), **statement) == family


def test_sd2_with_a_mark() -> None:
    shapes = original.checkpoint("sd2-768") | {"v_pred": (0,)}
    header = {"modelspec.architecture": "stable-diffusion-v2-512"}
    assert infer_family(shapes, header) == "sd2-768"


@pytest.mark.parametrize(("spread", "family"), [(0.05, "sd2-base"), (0.15, "sd2-768")])
def test_sd2_is_guessed_from_a_bias(spread: float, family: str) -> None:
    asked = []

    def read(key: str) -> Tensor:
        asked.append(key)
        return torch.tensor([spread, -spread]) + 3.0

    assert infer_family(original.checkpoint("sd2-768"), read=read) == family
    assert asked == ["model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"]


def test_sd2_inpainting_is_not_asked_for_its_prediction() -> None:
    assert infer_family(original.checkpoint("sd2-inpainting"), {"modelspec.prediction_type": "v"}) == "sd2-inpainting"


@pytest.mark.parametrize(
    ("shapes", "metadata", "expected"),
    [
        ({"v_pred": (0,)}, {}, "v_prediction"),
        ({}, {"modelspec.prediction_type": "v"}, "v_prediction"),
        ({}, {"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ({}, {"modelspec.architecture": "stable-diffusion-v1"}, None),
        ({}, None, None),
    ],
)
def test_prediction_type(shapes: Shapes, metadata: dict[str, str] | None, expected: str | None) -> None:
    assert infer_prediction_type(shapes, metadata) == expected


def changed_input(family: str, channels: int) -> Shapes:
    key = "model.diffusion_model.input_blocks.0.0.weight"
    return original.checkpoint(family) | {key: (320, channels, 3, 3)}


def of_depth(depths_in: tuple[int, ...], depths_out: tuple[int, ...]) -> Shapes:
    model = original.UNetModel(320, (1, 2, 4), depths_in, depths_out, None, 2048, True, 2816)
    return original.prefixed("model.diffusion_model.", model.shapes())


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (changed_input("sd15", 8), "InstructPix2Pix"),
        (changed_input("sd2-base", 5), "Stable Diffusion 2 with depth"),
        (changed_input("sd2-base", 7), "x4 upscaler"),
        (changed_input("sd15", 6), "6 input channels and texts of width 768"),
        (of_depth((0, 0, 1, 1, 2, 2), (2, 2, 2, 1, 1, 1, 0, 0, 0)), "at most 2 deep, with no transformer in the mid"),
        ({"conditioner.embedders.0.model.ln_final.weight": (1280,)}, "the SDXL refiner"),
        ({"lora_unet_mid_block.lora_down.weight": (4, 4)}, r"a LoRA .*use pipe\.load_lora_weights"),
        ({"unet.mid_block.attentions.0.proj_in.lora_A.weight": (4, 4)}, "a LoRA"),
        ({"control_model.time_embed.0.weight": (4, 4)}, "a ControlNet"),
        ({"down_blocks.0.motion_modules.0.temporal_transformer.norm.bias": (4,)}, "a motion module of AnimateDiff"),
        ({"emb_params": (4, 768)}, "a textual inversion embedding"),
        ({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (4, 4)}, "Stable Diffusion 3"),
        ({"double_blocks.0.img_attn.qkv.weight": (4, 4)}, "FLUX"),
        (original.checkpoint("sdxl") | {"edm_mean": (4,)}, r"Playground 2\.5"),
        ({"embedder.model.visual.proj": (4, 4)}, "Stable unCLIP"),
        ({"unet.down_blocks.0.resnets.0.conv1.weight": (4, 4)}, "a pipeline in diffusers' naming"),
        ({"weight": (4, 4)}, "No UNet of Stable Diffusion"),
        (original.autoencoder(128), r"For a VAE use AutoencoderKL\.from_single_file"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(shapes: Shapes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        infer_family(shapes)


def test_refusals_by_the_loader(tmp_path: Path) -> None:
    path = saved(tmp_path / "lora.safetensors", {"lora_unet_conv_in.lora_down.weight": torch.ones(1)})
    for loader in (load_single_file, load_unet_file, load_vae_file):
        with pytest.raises(ValueError, match="This file is a LoRA"):
            loader(path)


# Every tensor is used or excused.


JUNK = {
    "model_ema.decay": (),
    "model_ema.diffusion_modelinput_blocks00weight": (3,),
    "first_stage_model.loss.logvar": (),
    "first_stage_model.model_ema.num_updates": (),
    "global_step": (),
    "scale_factor": (),
    "logvar": (1000,),
    "lvlb_weights": (1000,),
    "cond_stage_model.logit_scale": (),
    "cond_stage_model.transformer.text_projection.weight": (32, 32),
    "embedding_manager.embedder.transformer.text_model.final_layer_norm.weight": (32,),
}


def test_tensors_without_effect_are_left_out(tmp_path: Path, configs: Path, tensors: dict[str, Tensor]) -> None:
    plain = load_single_file(saved(tmp_path / "plain.safetensors", tensors), config=configs)
    junk = {name: torch.ones(shape) for name, shape in JUNK.items()}
    full = load_single_file(saved(tmp_path / "full.safetensors", tensors | junk), config=configs)
    for name in NETWORKS:
        ours, expected = full[name].state_dict(), plain[name].state_dict()
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], expected[key]) for key in ours)


def test_no_weight_of_a_published_checkpoint_is_excused() -> None:
    """The patterns of what is left out match nothing of the networks; OpenCLIP's leavings are the tables' business."""
    excused = "|".join(IGNORED.values())
    buffers = {"conditioner.embedders.1.model.logit_scale", "cond_stage_model.model.logit_scale", *original.SCHEDULE}
    for family in families():
        for key in original.checkpoint(family):
            expected = key in buffers or key == "denoiser.sigmas" or key.endswith(".position_ids")
            assert bool(re.search(excused, key)) == expected, key


@pytest.mark.parametrize(
    "key",
    [
        "surprise",
        "model.diffusion_model.input_blocks.1.0.in_layers.1.weight",
        "model.diffusion_model.input_blocks.12.0.in_layers.0.weight",
        "model.diffusion_model.label_emb.weight",
        "first_stage_model.encoder.down.3.attn.0.q.weight",
        "cond_stage_model.tokens",
    ],
)
def test_an_unknown_tensor_is_an_error(key: str, tmp_path: Path, configs: Path, tensors: dict[str, Tensor]) -> None:
    path = saved(tmp_path / "model.safetensors", tensors | {key: torch.ones(1)})
    with pytest.raises(WeightError, match=f"1 tensors are unknown: {key}\\. .*pass ignore="):
        load_single_file(path, config=configs)
    assert load_single_file(path, config=configs, ignore=[f"^{key}$"])["unet"] is not None


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("model.diffusion_model.middle_block.1.surprise.weight", "mid_block.attentions.0.surprise.weight"),
        ("cond_stage_model.transformer.text_model.surprise", "text_model.surprise"),
        ("first_stage_model.quant_conv.surprise", "quant_conv.surprise"),
    ],
)
def test_an_unknown_tensor_inside_a_known_module(
    key: str, name: str, tmp_path: Path, configs: Path, tensors: dict[str, Tensor]
) -> None:
    path = saved(tmp_path / "model.safetensors", tensors | {key: torch.ones(1)})
    with pytest.raises(WeightError, match=rf"1 unexpected: {name} \({key} in the file\)"):
        load_single_file(path, config=configs)


def test_a_missing_tensor_is_an_error(tmp_path: Path, configs: Path, tensors: dict[str, Tensor]) -> None:
    del tensors["first_stage_model.decoder.mid.attn_1.q.bias"]
    path = saved(tmp_path / "model.safetensors", tensors)
    with pytest.raises(WeightError, match=r"1 missing: decoder\.mid_block\.attentions\.0\.to_q\.bias"):
        load_single_file(path, config=configs)


def test_two_tensors_for_one_name(tmp_path: Path, configs: Path, tensors: dict[str, Tensor]) -> None:
    prefix = "cond_stage_model.transformer."
    extra = {prefix + "final_layer_norm.weight": torch.ones(32)}
    path = saved(tmp_path / "model.safetensors", tensors | extra)
    with pytest.raises(WeightError, match=r"both hold 'text_model\.final_layer_norm\.weight'"):
        load_single_file(path, config=configs)


def test_clip_keys_without_their_inner_prefix(tmp_path: Path, configs: Path, tensors: dict[str, Tensor]) -> None:
    flat = {name.replace(".transformer.text_model.", ".transformer."): tensor for name, tensor in tensors.items()}
    assert flat.keys() != tensors.keys()
    encoder = load_single_file(saved(tmp_path / "model.safetensors", flat), config=configs)["text_encoder"]
    key = "final_layer_norm.weight"
    expected = tensors[f"cond_stage_model.transformer.text_model.{key}"]
    assert torch.equal(encoder.state_dict()[f"text_model.{key}"], expected)


# What is loaded.


def test_parts_of_a_pipeline(tmp_path: Path, configs: Path, tensors: dict[str, Tensor]) -> None:
    names: list[str] = []

    def progress(wanted: list[str]) -> list[str]:
        names.extend(wanted)
        return wanted

    path = saved(tmp_path / "model.safetensors", tensors)
    parts = load_single_file(path, config=configs, progress=progress)
    assert sorted(names) == ["scheduler", "text_encoder", "tokenizer", "unet", "vae"]
    assert parts.keys() == {*names, "safety_checker", "feature_extractor", "requires_safety_checker"}
    assert parts["safety_checker"] is None and parts["requires_safety_checker"] is False
    assert parts["scheduler"]["_class_name"] == "PNDMScheduler"
    assert "prediction_type" not in parts["scheduler"]


def test_prediction_type_reaches_the_scheduler(tmp_path: Path, configs: Path, tensors: dict[str, Tensor]) -> None:
    path = saved(tmp_path / "plain.safetensors", tensors)
    scheduler = load_single_file(path, config=configs, prediction_type="v_prediction", skip=NETWORKS)["scheduler"]
    assert scheduler["prediction_type"] == "v_prediction"
    path = saved(tmp_path / "header.safetensors", tensors, {"modelspec.prediction_type": "v"})
    scheduler = load_single_file(path, config=configs, skip=NETWORKS)["scheduler"]
    assert scheduler["prediction_type"] == "v_prediction" and "rescale_betas_zero_snr" not in scheduler
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    path = saved(tmp_path / "marks.safetensors", tensors | marks)
    scheduler = load_single_file(path, config=configs, skip=NETWORKS)["scheduler"]
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["rescale_betas_zero_snr"] is True and scheduler["timestep_spacing"] == "trailing"
    with pytest.raises(ValueError, match="prediction_type is 'v'; it is one of epsilon, v_prediction"):
        load_single_file(path, config=configs, prediction_type="v")


def test_a_component_that_the_file_lacks(tmp_path: Path, configs: Path, tensors: dict[str, Tensor]) -> None:
    without = {name: tensor for name, tensor in tensors.items() if not name.startswith("first_stage_model.")}
    path = saved(tmp_path / "model.safetensors", without)
    with pytest.raises(WeightError, match=r"holds no vae\. .*pass vae=AutoencoderKL\.from_pretrained"):
        load_single_file(path, config=configs)
    assert "vae" not in load_single_file(path, config=configs, skip=["vae"])


def test_skipped_components_are_not_looked_at(tmp_path: Path, configs: Path, tensors: dict[str, Tensor]) -> None:
    tensors["first_stage_model.encoder.conv_in.weight"] = torch.ones(1)
    path = saved(tmp_path / "model.safetensors", tensors)
    with pytest.raises(WeightError, match=r"encoder\.conv_in\.weight \(1,\) instead of"):
        load_single_file(path, config=configs)
    assert load_single_file(path, config=configs, skip=["vae", "tokenizer"]).keys() >= {"unet", "text_encoder"}


def test_a_component_that_no_file_holds(tmp_path: Path, configs: Path, tensors: dict[str, Tensor]) -> None:
    index = json.loads((configs / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (configs / "model_index.json").write_text(json.dumps(index))
    path = saved(tmp_path / "model.safetensors", tensors)
    with pytest.warns(UserWarning, match="cannot hold safety_checker"):
        parts = load_single_file(path, config=configs)
    assert parts["safety_checker"] is None
    assert "safety_checker" not in load_single_file(path, config=configs, skip=["safety_checker"])


def test_a_network_of_another_class(tmp_path: Path, configs: Path, tensors: dict[str, Tensor]) -> None:
    index = json.loads((configs / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AsymmetricAutoencoderKL"]
    (configs / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="vae is a AsymmetricAutoencoderKL, which is not supported"):
        load_single_file(saved(tmp_path / "model.safetensors", tensors), config=configs)


def test_the_tokenizer_of_the_configuration(tmp_path: Path, configs: Path, tensors: dict[str, Tensor]) -> None:
    """A folder with its own vocabulary or padding is obeyed."""
    path = saved(tmp_path / "model.safetensors", tensors)
    for settings, pad in (({"pad_token": "!"}, 0), ({"pad_token": {"content": "!"}}, 0), ({}, 49407)):
        (configs / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
        assert load_single_file(path, config=configs, skip=NETWORKS)["tokenizer"].pad_token_id == pad
    (configs / "tokenizer" / "tokenizer_config.json").unlink()
    assert load_single_file(path, config=configs, skip=NETWORKS)["tokenizer"].pad_token_id == 49407
    vocab = {"a": 0, "a</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}
    (configs / "tokenizer" / "vocab.json").write_text(json.dumps(vocab))
    (configs / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    assert load_single_file(path, config=configs, skip=NETWORKS)["tokenizer"].vocab == vocab


# One network alone.


def test_a_vae_alone_is_asked_for_its_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``config`` SD's scale is taken with a warning, unless the header or a UNet in the file says more."""
    chosen: list[str] = []
    monkeypatch.setattr(load, "_load", lambda file, place, cls, folder, *_: chosen.append(folder.parent.name))
    vae = {name: torch.zeros(1) for name in original.autoencoder(32)}
    path = saved(tmp_path / "vae.safetensors", vae)
    with pytest.warns(UserWarning, match='config="sdxl" for a VAE of SDXL'):
        load_vae_file(path)
    load_vae_file(path, config="sdxl")
    load_vae_file(saved(tmp_path / "xl.safetensors", vae, {"modelspec.architecture": "stable-diffusion-xl-v1-base"}))
    assert chosen == ["sd15", "sdxl", "sdxl"]


def test_the_vae_of_a_whole_checkpoint(tmp_path: Path, configs: Path, tensors: dict[str, Tensor]) -> None:
    path = saved(tmp_path / "model.safetensors", tensors | {"surprise": torch.ones(1)})
    vae = load_vae_file(path, config=configs)
    assert torch.equal(vae.encoder.conv_in.weight, tensors["first_stage_model.encoder.conv_in.weight"])


def test_a_network_that_is_not_there(tmp_path: Path) -> None:
    unet = saved(tmp_path / "unet.safetensors", {"input_blocks.0.0.weight": torch.ones(1, 4, 1, 1)})
    with pytest.raises(WeightError, match=r"holds no vae; its tensors are input_blocks\.0\.0\.weight"):
        load_vae_file(unet)
    vae = saved(tmp_path / "vae.safetensors", {"encoder.norm_out.weight": torch.ones(1)})
    with pytest.raises(WeightError, match="holds no unet"):
        load_unet_file(vae)


def test_a_bare_unet_is_no_pipeline(tmp_path: Path, configs: Path, tensors: dict[str, Tensor]) -> None:
    prefix = "model.diffusion_model."
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    path = saved(tmp_path / "unet.safetensors", bare)
    with pytest.raises(WeightError, match=r"It holds a UNet alone; UNet2DConditionModel\.from_single_file loads it"):
        load_single_file(path, config=configs)


def test_a_distilled_unet_in_the_published_layout(tmp_path: Path, configs: Path) -> None:
    """LCM_Dreamshaper's own file is a UNet alone with a guidance embedding, which its shapes tell."""
    config = json.loads((configs / "unet" / "config.json").read_text())
    expected = UNet2DConditionModel.from_config(config | {"time_cond_proj_dim": 16})
    path = saved(tmp_path / "unet.safetensors", dict(expected.state_dict()))
    unet = load_unet_file(path, config=configs)
    assert unet.config.time_cond_proj_dim == 16
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in unet.state_dict().items())


def test_classes_read_single_files(tmp_path: Path, configs: Path, tensors: dict[str, Tensor]) -> None:
    path = saved(tmp_path / "model.safetensors", tensors | {"model.diffusion_model.surprise": torch.ones(1)})
    with pytest.raises(WeightError, match=r"1 tensors are unknown: model\.diffusion_model\.surprise"):
        UNet2DConditionModel.from_single_file(path, config=configs)
    unet = UNet2DConditionModel.from_single_file(path, config=configs, dtype=torch.bfloat16, ignore=["surprise$"])
    expected = tensors["model.diffusion_model.input_blocks.0.0.weight"].bfloat16()
    assert type(unet) is UNet2DConditionModel and torch.equal(unet.conv_in.weight, expected)
    with pytest.warns(UserWarning, match=r"AutoencoderKL\.from_single_file: ignored unknown arguments 'varient'"):
        vae = AutoencoderKL.from_single_file(path, config=configs, varient="fp16")
    assert torch.equal(vae.encoder.conv_in.weight, tensors["first_stage_model.encoder.conv_in.weight"])
    elsewhere = configs.rename(configs.with_name("elsewhere"))
    (elsewhere / "unet").rename(elsewhere / "network")
    options = {"config": elsewhere, "subfolder": "network", "local_files_only": True, "ignore": ["surprise$"]}
    assert torch.equal(UNet2DConditionModel.from_single_file(path, **options).conv_in.weight.bfloat16(), expected)
    with pytest.raises(TypeError, match=r"CLIPTextModel is not read from single files; UNet2DConditionModel, Autoenc"):
        CLIPTextModel.from_single_file(path)


# Files and folders.


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin", "https://huggingface.co/a/b/blob/main/m.ckpt"])
def test_pickles_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"is a pickle"):
        load_single_file(name)


def test_a_file_that_is_not_what_its_name_says(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x80\x04not a safetensors file at all")
    with pytest.raises(WeightError, match=r"model\.safetensors is not a readable \.safetensors file"):
        load_single_file(path)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("https://huggingface.co/owner/name/blob/main/model.safetensors", ("main", "model.safetensors")),
        (
            "https://huggingface.co/owner/name/resolve/v2/in/model.safetensors?x=1",
            ("v2", "in/model.safetensors"),
        ),
        ("huggingface.co/owner/name/model.safetensors", (None, "model.safetensors")),
        ("hf.co/owner/name/blob/main/model.safetensors", ("main", "model.safetensors")),
    ],
)
def test_addresses_on_the_hub(
    address: str, expected: tuple[str | None, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(name: str, select: Any, **where: Any) -> Path:
        asked.append((name, select(["in/model.safetensors", "model.safetensors"]), where))
        return tmp_path

    monkeypatch.setattr(hub, "fetch", fetch)
    revision, file = expected
    assert resolve_file(address, token="t") == tmp_path / file
    assert resolve_file(address, revision="mine") == tmp_path / file
    assert asked == [
        ("owner/name", [file], {"token": "t", "revision": revision}),
        ("owner/name", [file], {"revision": "mine"}),
    ]


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no file '.*none\.safetensors'"):
        resolve_file(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="is a folder; load it with from_pretrained"):
        resolve_file(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"There is no file 'https://civitai\.com/.*download others first"):
        resolve_file("https://civitai.com/api/download/models/1")


def test_configurations_by_name(configs: Path) -> None:
    assert config_folder("sdxl").name == "sdxl"
    assert config_folder(configs) == configs
    assert set(json.loads((config_folder("ssd-1b") / "model_index.json").read_text())) >= {"unet", "text_encoder_2"}
    with pytest.raises(FileNotFoundError, match="'sdx' is neither a folder"):
        config_folder("sdx")


def test_configurations_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the small files are fetched."""
    files = ["model_index.json", "unet/config.json", "unet/model.safetensors", "tokenizer/merges.txt", "README.md"]
    chosen = []

    def fetch(name: str, select: Any, **_: Any) -> Path:
        chosen.append((name, select(files)))
        return tmp_path

    monkeypatch.setattr(hub, "fetch", fetch)
    assert config_folder("owner/name") == tmp_path
    assert chosen == [("owner/name", ["model_index.json", "unet/config.json", "tokenizer/merges.txt"])]


# Without a configuration.


def test_the_configuration_is_found(
    tmp_path: Path, configs: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The family decides, and the shipped configuration of it is asked for; here a small one stands in for it."""
    wide = {
        name: torch.randn(tensor.shape[0], 768) if re.search(r"\.attn2\.to_[kv]\.weight$", name) else tensor
        for name, tensor in tensors.items()
    }
    config = json.loads((configs / "unet" / "config.json").read_text())
    (configs / "unet" / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 768}))
    asked = []
    monkeypatch.setattr(load, "config_folder", lambda config, **_: asked.append(config) or configs)
    path = saved(tmp_path / "model.safetensors", wide)
    assert load_single_file(path)["unet"].config.cross_attention_dim == 768
    assert load_unet_file(path).config.cross_attention_dim == 768
    assert load_vae_file(path).config.scaling_factor == 0.18215
    assert asked == ["sd15"] * 3


@pytest.mark.parametrize(("spread", "family"), [(0.05, "sd2-base"), (0.15, "sd2-768")])
def test_the_bias_is_read_from_the_file(spread: float, family: str, tmp_path: Path) -> None:
    contents = {
        "input_blocks.0.0.weight": torch.ones(2, 4, 1, 1),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(2, 1024),
        "output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.tensor([spread, -spread]).half(),
    }
    path = saved(tmp_path / "model.safetensors", {f"model.diffusion_model.{key}": t for key, t in contents.items()})
    file = SingleFile.open(path)
    assert infer_family(file.shapes, file.metadata, read=file.read) == family
