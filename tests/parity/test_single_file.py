"""Single files in Stability's layout load as diffusers loads them, tensor for tensor, for every published key."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils as oracle
from safetensors.torch import save_file
from torch import Tensor, nn

from fourstroke.config import CLIPTextConfig, config_from_dict
from fourstroke.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from fourstroke.models.unet import UNet2DConditionModel
from fourstroke.models.vae import AutoencoderKL
from fourstroke.single_file import (
    clip_tokenizer,
    clip_vocabulary,
    config_folder,
    families,
    infer_family,
    load_single_file,
    load_unet_file,
    load_vae_file,
)
from fourstroke.single_file.layout import open_clip_table, translate, translator

from . import original_layout as original

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
CLASSES = (UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection)
OURS = {cls.__name__: cls for cls in CLASSES}
# Parameters as counted by the models' papers and cards; SD 2.x's encoder is OpenCLIP's H without its last layer.
COUNTS = {
    ("sd15", "unet"): 859_520_964,
    ("sd15", "vae"): 83_653_863,
    ("sd15", "text_encoder"): 123_060_480,
    ("sd2-base", "unet"): 865_910_724,
    ("sd2-768", "unet"): 865_910_724,
    ("sd2-base", "text_encoder"): 340_387_840,
    ("sdxl", "unet"): 2_567_463_684,
    ("sdxl", "text_encoder_2"): 694_659_840,
}


def shipped(family: str, name: str) -> dict[str, Any]:
    return json.loads((config_folder(family) / name).read_text(encoding="utf-8"))


def on_meta(shapes: original.Shapes) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def theirs_on_meta(family: str, name: str) -> nn.Module:
    """The oracle's network in the shipped configuration, at its full size, without memory."""
    config = shipped(family, f"{name}/config.json")
    with torch.device("meta"):
        if name == "unet":
            return diffusers.UNet2DConditionModel.from_config(config)
        if name == "vae":
            return diffusers.AutoencoderKL.from_config(config)
        cls = getattr(transformers, shipped(family, "model_index.json")[name][1])
        return cls(transformers.CLIPTextConfig(**config))


def published_names(module: nn.Module, cls: type) -> dict[str, Tensor]:
    """The oracle's state under the published names; new transformers leave ``text_model.`` out."""
    return {cls.published_name(name): tensor for name, tensor in module.state_dict().items()}


def renamed(family: str, name: str, tensors: dict[str, Tensor], dialect: str) -> dict[str, str]:
    """Our name of each tensor -> its original name, by our table for the shipped configuration."""
    cls = OURS[shipped(family, "model_index.json")[name][1]]
    rename = translator(cls, config_from_dict(cls.config_class, shipped(family, f"{name}/config.json")), dialect)
    found: dict[str, str] = {}
    for key in tensors:
        rows = rename(key)
        assert rows is not None, key
        for row in rows:
            assert row.name not in found, row.name
            found[row.name] = key
    return found


def test_every_family_is_covered() -> None:
    assert families() == sorted(["sd15", "sd15-inpainting", "sd2-base", "sd2-768", "sd2-inpainting", "sdxl",
                                 "sdxl-inpainting", "ssd-1b"])  # fmt: skip


@pytest.mark.parametrize(("family", "name"), COUNTS)
def test_shipped_configurations_have_the_published_sizes(family: str, name: str) -> None:
    assert sum(parameter.numel() for parameter in theirs_on_meta(family, name).parameters()) == COUNTS[family, name]


@pytest.mark.parametrize("family", families())
def test_unet_names_at_full_size(family: str) -> None:
    tensors = on_meta(original.unet(family))
    config = shipped(family, "unet/config.json")
    prefixed = {oracle.LDM_UNET_KEY + key: tensor for key, tensor in tensors.items()}
    theirs = oracle.convert_ldm_unet_checkpoint(prefixed, config)
    expected = theirs_on_meta(family, "unet").state_dict()
    assert {name: tensor.shape for name, tensor in theirs.items()} == {k: v.shape for k, v in expected.items()}
    ours = renamed(family, "unet", tensors, "original")
    assert ours.keys() == theirs.keys()
    assert all(tensors[key] is theirs[name] for name, key in ours.items())


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_vae_names_at_full_size(family: str) -> None:
    shapes = original.autoencoder(128)
    tensors = on_meta(shapes)
    theirs = oracle.convert_ldm_vae_checkpoint(
        {"first_stage_model." + key: tensor for key, tensor in tensors.items()}, shipped(family, "vae/config.json")
    )
    ours = renamed(family, "vae", tensors, "original")
    assert ours.keys() == theirs.keys() == theirs_on_meta(family, "vae").state_dict().keys()
    for name, key in ours.items():
        # The oracle makes linear layers of the attention's convolutions; all others are the same tensors.
        assert tensors[key] is theirs[name] or (".attn_1." in key and tensors[key].shape[:2] == theirs[name].shape)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (family, "text_encoder" if "sd2" in family else "text_encoder_2")
        for family in families()
        if "sd15" not in family
    ],
)
def test_open_clip_names_at_full_size(family: str, name: str) -> None:
    projected = name == "text_encoder_2"
    shapes = original.open_clip(1280, 32, 5120) if projected else original.open_clip(1024, 24, 4096)
    expected = published_names(theirs_on_meta(family, name), CLIPTextModelWithProjection)
    ours = renamed(family, name, on_meta(shapes), "open_clip")
    assert ours.keys() == expected.keys()
    left = set(shapes) - set(ours.values())
    last = {key for key in shapes if key.startswith("transformer.resblocks.23.")}
    assert left == ({"logit_scale"} if projected else {"logit_scale", "text_projection"} | last)


@pytest.mark.parametrize("family", families())
def test_infer_family_of_the_published_tensors(family: str) -> None:
    header = {"modelspec.prediction_type": "epsilon"} if family == "sd2-base" else {}
    assert infer_family(original.checkpoint(family), header) == family


@pytest.mark.parametrize("family", families())
def test_infer_family_of_a_published_unet(family: str) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs_on_meta(family, "unet").state_dict().items()}
    assert infer_family(shapes, prediction_type="epsilon" if family == "sd2-base" else None) == family
    assert infer_family(original.unet(family), prediction_type="epsilon" if family == "sd2-base" else None) == family


# Whole files, with the published structure and all published tensors at tiny widths.


def random_file(path: Path, shapes: original.Shapes, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, path)
    return tensors


def tiny_configs(family: str, folder: Path) -> Path:
    """A folder of the family's shipped configurations at tiny widths, with a tokenizer that the oracle can read."""
    index = shipped(family, "model_index.json")
    for name in (*NETWORKS, "scheduler", "tokenizer", "tokenizer_2"):
        if name not in index:
            continue
        file = "config.json" if name in NETWORKS else "scheduler_config.json" if name == "scheduler" else None
        (folder / name).mkdir(parents=True)
        if file:
            config = shipped(family, f"{name}/{file}")
            config = original.narrowed(name, config, family) if name in NETWORKS else config
            (folder / name / file).write_text(json.dumps(config))
        else:
            clip_tokenizer(shipped(family, f"{name}/tokenizer_config.json")["pad_token"]).save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def theirs_from(path: Path, configs: Path, family: str) -> Any:
    cls = getattr(diffusers, shipped(family, "model_index.json")["_class_name"])
    keywords = {} if "xl" in family or "ssd" in family else {"safety_checker": None, "requires_safety_checker": False}
    return cls.from_single_file(str(path), config=str(configs), local_files_only=True, **keywords)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("family", ["sd15", "sd15-inpainting", "sd2-768", "sdxl", "ssd-1b"])
def test_file_loads_as_by_diffusers(family: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = random_file(path, original.checkpoint(family, original.TINY))
    configs = tiny_configs(family, tmp_path / "configs")
    parts = load_single_file(path, config=configs)
    pipe = theirs_from(path, configs, family)
    compared = 0
    for name in NETWORKS:
        theirs = getattr(pipe, name, None)
        if theirs is None:
            assert name not in parts
            continue
        ours = parts[name].state_dict()
        expected = published_names(theirs, CLIPTextModelWithProjection) if "text" in name else theirs.state_dict()
        assert ours.keys() == expected.keys()
        assert [key for key in ours if not torch.equal(ours[key], expected[key])] == []
        assert type(parts[name]).__name__ == type(theirs).__name__
        compared += len(ours)
        for key in ours:
            assert torch.equal(parts[name].source.read(key), expected[key])
    assert compared > 0.8 * len(tensors)
    assert parts["scheduler"]["_class_name"] == type(pipe.scheduler).__name__
    for suffix in ("", "_2") if "tokenizer_2" in parts else ("",):
        ours, theirs = parts[f"tokenizer{suffix}"], getattr(pipe, f"tokenizer{suffix}")
        ids = theirs(["a red fox, very red!"], padding="max_length", max_length=77, return_tensors="pt").input_ids
        assert torch.equal(ours(["a red fox, very red!"]), ids)
    assert parts.get("force_zeros_for_empty_prompt") == pipe.config.get("force_zeros_for_empty_prompt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """Half precision stays half; what is stored in another dtype is rounded once, as ``Tensor.to`` does."""
    path = tmp_path / "model.safetensors"
    stored = random_file(path, original.checkpoint("sd2-base", original.TINY), torch.float16)
    configs = tiny_configs("sd2-base", tmp_path / "configs")
    parts = load_single_file(path, config=configs, torch_dtype=dtype)
    fused = stored["cond_stage_model.model.transformer.resblocks.3.attn.in_proj_weight"].to(dtype)
    layer = parts["text_encoder"].text_model.encoder.layers[3].self_attn
    assert torch.equal(torch.cat([layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight]), fused)
    networks = [parts[name] for name in ("unet", "vae", "text_encoder")]
    assert {parameter.dtype for network in networks for parameter in network.parameters()} == {dtype}


def test_a_parameter_changed_in_place_leaves_the_source_pristine(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    stored = random_file(path, original.checkpoint("sd2-base", original.TINY))
    encoder = load_single_file(path, config=tiny_configs("sd2-base", tmp_path / "configs"))["text_encoder"]
    attention = encoder.text_model.encoder.layers[0].self_attn
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight.zero_()
    name = "text_model.encoder.layers.0.self_attn.{}_proj.weight"
    again = torch.cat([encoder.source.read(name.format(kind)) for kind in "qkv"])
    assert torch.equal(again, stored["cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"])
    assert not attention.q_proj.weight.any()


@pytest.mark.parametrize("layout", ["original", "bare", "diffusers"])
def test_unet_alone(layout: str, tmp_path: Path) -> None:
    configs = tiny_configs("sd15", tmp_path / "configs")
    path = tmp_path / "unet.safetensors"
    shapes = original.prefixed("model.diffusion_model.", original.unet("sd15", original.TINY))
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    theirs = oracle.convert_ldm_unet_checkpoint(tensors, shipped("sd15", "unet/config.json"))
    bare = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in tensors.items()}
    save_file({"original": tensors, "bare": bare, "diffusers": theirs}[layout], path)
    for config in (configs, configs / "unet"):
        ours = load_unet_file(path, config=config).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("layout", ["original", "bare", "diffusers"])
def test_vae_alone(layout: str, tmp_path: Path) -> None:
    configs = tiny_configs("sdxl", tmp_path / "configs")
    path = tmp_path / "vae.safetensors"
    shapes = original.prefixed("first_stage_model.", original.autoencoder(32))
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    theirs = oracle.convert_ldm_vae_checkpoint(tensors, shipped("sdxl", "vae/config.json"))
    # Published VAEs carry what their training left behind.
    junk = {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.ones(())}
    bare = {name.removeprefix("first_stage_model."): tensor for name, tensor in tensors.items()}
    contiguous = {name: tensor.contiguous() for name, tensor in theirs.items()}
    save_file({"original": tensors, "bare": bare | junk, "diffusers": contiguous}[layout], path)
    vae = load_vae_file(path, config=configs)
    ours = vae.state_dict()
    assert vae.config.scaling_factor == 0.13025
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


NAMES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("component", NAMES)
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_network_loads_under_the_name_that_people_know(family: str, component: str, tmp_path: Path) -> None:
    """Out of a whole checkpoint, with the peer's arguments; the dtype is rounded once."""
    configs = tiny_configs(family, tmp_path / "configs")
    path = tmp_path / "model.safetensors"
    random_file(path, original.checkpoint(family, original.TINY))
    options = {"config": str(configs), "subfolder": component, "torch_dtype": torch.float16}
    ours = OURS[NAMES[component]].from_single_file(str(path), **options)
    theirs = getattr(diffusers, NAMES[component]).from_single_file(str(path), **options, local_files_only=True)
    expected = theirs.state_dict()
    assert type(ours).__name__ == type(theirs).__name__ and not ours.training
    assert ours.state_dict().keys() == expected.keys()
    assert [key for key, tensor in ours.state_dict().items() if not torch.equal(tensor, expected[key])] == []


# The vocabulary.

HARD = [
    "",
    "a red fox",
    "A RED  FOX!!! \t\n it's   they'll I'd we've",
    "naïve café ÅNGSTRÖM straße ǅ ﬁn",
    "cafe\u0301 o\u0308 \u1e9b\u0323",  # decomposed letters, which are composed first
    "日本語の狐 лиса αλεπού ثعلب ลูกสุนัข 여우",
    "🦊 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ☃️",
    "1234567890 3.14 1,000 2nd 10x",
    "semi-automatic_weapon/of [[words]] (masterpiece:1.2), <lora:x:0.8> {a|b}",
    "<|endoftext|> and <|startoftext|> inside",
    "null\u0000byte \u200b zero\u200dwidth \ufeff \u00a0nbsp",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "!", "!!", "! !", "hello!", "a! b",
    "x" * 400,
    " ".join(["word"] * 70),
]  # fmt: skip


def test_vocabulary_is_the_published_one(tmp_path: Path) -> None:
    """The digests are those of the files of openai/clip-vit-large-patch14, which SD 1.5, 2.x and SDXL ship too."""
    vocab, merges = clip_vocabulary()
    text = "#version: 0.2\n" + "".join(f"{first} {second}\n" for first, second in merges)
    published = "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"
    assert hashlib.sha256(text.encode()).hexdigest() == published
    text = json.dumps(vocab, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    published = "e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349"
    assert hashlib.sha256(text.encode()).hexdigest() == published


@pytest.mark.filterwarnings("ignore:CLIP reads at most")
@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
def test_tokens_are_those_of_transformers(pad_token: str, tmp_path: Path) -> None:
    ours = clip_tokenizer(pad_token)
    ours.save_pretrained(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert theirs.pad_token_id == (0 if pad_token == "!" else 49407) == ours.pad_token_id
    for prompt in HARD:
        expected = theirs(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        assert torch.equal(ours([prompt]), expected), prompt


def test_open_clip_projection_in_either_form() -> None:
    """Some trainers save SDXL's projection as a linear layer, not as the original's bare matrix."""
    table = open_clip_table(CLIPTextConfig(num_hidden_layers=1), projected=True)
    bare, linear = translate(table, "text_projection"), translate(table, "text_projection.weight")
    assert bare and linear and bare[0].name == linear[0].name == "text_projection.weight"
    matrix = torch.randn(3, 3)
    assert bare[0].transform is not None and linear[0].transform is None
    assert torch.equal(bare[0].transform(matrix), matrix.T)
