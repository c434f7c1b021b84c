"""LoRA files: every key is used or named in an error; written files come back as they were; what a header tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fourstroke.lora import Diff, Dora, LoHa, LoKr, Lora, LoraError, LoraPair, inspect_lora, read_lora, save_lora
from fourstroke.lora.keys import parse_key, target_names
from fourstroke.models.clip import CLIPTextModel

from .lora_toys import lora, toy, unet

Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
KEY = "lora_unet_" + Q.replace(".", "_")


def halves(key: str = KEY, out: int = 16, inner: int = 16, rank: int = 2) -> dict[str, Tensor]:
    return {f"{key}.lora_down.weight": torch.randn(rank, inner), f"{key}.lora_up.weight": torch.randn(out, rank)}


def text_model() -> CLIPTextModel:
    config = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPTextModel.from_config({**config, "vocab_size": 10, "max_position_embeddings": 8, "projection_dim": 8})


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nonsense": torch.ones(1)}, r"keys that are of no known format \(1\): nonsense"),
        ({f"{KEY}.lora_left.weight": torch.ones(1)}, rf"are of no known format \(1\): {KEY}\.lora_left\.weight"),
        (
            halves("lora_unet_mid_block_foo"),
            r"keys that name no module of unet \(2\): lora_unet_mid_block_foo\.lora_down",
        ),
        (
            halves("lora_te2_text_model_foo"),
            r"keys that are for text_encoder_2, which is not among unet \(2\): lora_te2",
        ),
        (halves(KEY.replace("to_q", "to_k"), inner=17), r"do not fit \(1\): .*to_k.*change of shape \(16, 17\)"),
        (
            halves(KEY.replace("to_q", "to_k"), out=15),
            r"do not fit \(1\): .*change of shape \(15, 16\).*has \(16, 16\)",
        ),
        (
            {f"{KEY.replace('to_q', 'to_k')}.lora_down.weight": torch.ones(2, 16)},
            r"to_k\.lora_down\.weight \(up missing\)",
        ),
        (
            {f"{KEY.replace('to_q', 'to_k')}.alpha": torch.ones(())},
            r"to_k\.alpha \(the weights themselves are missing\)",
        ),
        ({f"{KEY}.alpha": torch.ones(2)}, r"alpha must be one number, it has shape \(2,\)"),
        (
            {f"{KEY}.lora_up.weight": torch.full((16, 2), torch.nan)},
            rf"hold NaN or infinity, or nothing \(1\): {KEY}\.lora_up",
        ),
        (
            {f"{KEY}.lora_up.weight": torch.full((16, 2), torch.inf)},
            rf"hold NaN or infinity, or nothing \(1\): {KEY}\.lora_up",
        ),
        ({f"{KEY}.lora_up.weight": torch.ones(0, 2)}, rf"hold NaN or infinity, or nothing \(1\): {KEY}\.lora_up"),
        ({f"{KEY}.hada_w1_a": torch.ones(2, 2)}, "tensors of hada and lora alone do not belong together"),
        ({f"{KEY}.dora_scale": torch.ones(3, 1)}, r"has a magnitude of shape \(3, 1\)"),
        ({f"unet.{Q}.lora.up.weight": torch.ones(16, 2)}, r"keys that say one thing twice \(2\): "),
        ({f"{KEY}.oft_blocks": torch.ones(1)}, r"keys that belong to OFT, which is not supported \(1\): .*oft_blocks"),
        ({f"{KEY}.on_input": torch.ones(1)}, "belong to IA3, which is not supported"),
        ({f"{KEY}.a1.weight": torch.ones(1)}, "belong to GLoRA, which is not supported"),
        ({"bundle_emb.cat.string_to_param": torch.ones(1)}, "belong to a bundled textual-inversion embedding"),
        ({f"{KEY}.lora_up.bias": torch.ones(16)}, "belong to a LoRA with biases, which is not supported"),
        ({f"{KEY}.diff_b": torch.ones(16)}, "want a floating-point bias, which unet lacks there"),
        ({f"{KEY.replace('to_q', 'to_k')}.dora_scale": torch.ones(16, 1)}, "the weights themselves are missing"),
        ({f"{KEY.replace('to_q', 'to_k')}.hada_w1_a": torch.ones(16, 2)}, "w1_b and w2_a and w2_b missing"),
        ({f"{KEY.replace('to_q', 'to_k')}.lokr_w1": torch.ones(4, 4)}, "LoKr needs either lokr_w2 or both"),
    ],
)
def test_a_wrong_key_is_named(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(LoraError, match=message):
        read_lora({**halves(), **change}, {"unet": unet()})


def test_all_problems_come_in_one_message() -> None:
    wrong = {"x": torch.ones(1), **halves("lora_unet_foo"), f"{KEY}.alpha": torch.ones(2)}
    with pytest.raises(LoraError) as error:
        read_lora({**halves(), **wrong}, {"unet": unet()}, name="cat")
    text = str(error.value)
    assert text.startswith("LoRA cat: ")
    assert all(
        part in text
        for part in (
            "of no known format (1): x",
            "name no module of unet (2): lora_unet_foo",
            "do not make a change (1)",
        )
    )


def test_nothing_is_not_a_lora() -> None:
    with pytest.raises(LoraError, match=r"LoRA \(tensors\): it holds no keys\."):
        read_lora({}, {"unet": unet()})


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("lora_unet_double_blocks_0_img_attn_proj", "Flux"),
        ("transformer.transformer_blocks.0.attn.to_q", "Stable Diffusion 3"),
    ],
)
def test_other_architectures_are_told_apart(key: str, family: str) -> None:
    tensors = halves(key) if key.startswith("lora_") else {f"{key}.lora_A.weight": torch.ones(2, 8)}
    with pytest.raises(LoraError, match=f"it was made for {family}, the model is SD 1.5"):
        read_lora(tensors, {"unet": unet()})


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a pickle.*only \.safetensors.*Convert it"):
        read_lora(tmp_path / "lora.bin", {"unet": unet()})
    with pytest.raises(ValueError, match="is a pickle"):
        inspect_lora(tmp_path / "lora.pt")


def test_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "lora.safetensors").write_bytes(b"no")
    for read in (lambda path: read_lora(path, {"unet": unet()}), inspect_lora):
        with pytest.raises(ValueError, match=r"lora\.safetensors is not a readable"):
            read(tmp_path / "lora.safetensors")


def test_broken_settings(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="lora_adapter_metadata is not JSON"):
        read_lora(halves(), {"unet": unet()}, metadata={"lora_adapter_metadata": "{"})
    with pytest.raises(LoraError, match="lora_adapter_metadata must be a JSON object, not list"):
        read_lora(halves(), {"unet": unet()}, metadata={"lora_adapter_metadata": "[]"})


# What is read


def test_a_component_that_is_missing_on_purpose_is_left_out() -> None:
    text = halves("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 8, 8)
    found = read_lora({**halves(), **text}, {"unet": unet(), "text_encoder": None})
    assert list(found.components) == ["unet"]
    assert read_lora(text, {"unet": unet(), "text_encoder": None}).components == {}


def test_original_names_give_way_to_ours() -> None:
    """Merged files hold both; diffusers takes its own names too."""
    ours = halves()
    original = halves("lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q")
    alpha = {"lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.alpha": torch.tensor(7.0)}
    with pytest.warns(UserWarning, match="1 modules come under two names; the diffusers names are used"):
        found = read_lora({**original, **alpha, **ours}, {"unet": unet()})
    (pair,) = found.components["unet"].values()
    assert isinstance(pair, LoraPair) and pair.down is ours[f"{KEY}.lora_down.weight"] and pair.alpha is None


def test_every_kind_of_key_of_lycoris() -> None:
    """LoHa, LoKr, DoRA, Tucker cores, full changes and norms, by kohya's names."""
    model = unet()
    block = "lora_unet_mid_block_resnets_0_"
    tensors = {
        **{f"{KEY}.hada_{name}": torch.randn(16, 2) for name in ("w1_a", "w2_a")},
        **{f"{KEY}.hada_{name}": torch.randn(2, 16) for name in ("w1_b", "w2_b")},
        f"{KEY}.alpha": torch.tensor(1),
        f"{block}conv1.lora_down.weight": torch.randn(2, 16, 1, 1),
        f"{block}conv1.lora_mid.weight": torch.randn(2, 2, 3, 3),
        f"{block}conv1.lora_up.weight": torch.randn(16, 2, 1, 1),
        f"{block}conv1.dora_scale": torch.rand(16, 1, 1, 1),
        f"{block}conv2.lokr_w1": torch.randn(4, 4),
        f"{block}conv2.lokr_w2_a": torch.randn(2, 4),
        f"{block}conv2.lokr_w2_b": torch.randn(2, 4),
        f"{block}conv2.lokr_t2": torch.randn(2, 2, 3, 3),
        f"{block}time_emb_proj.diff": torch.randn(16, 32),
        f"{block}time_emb_proj.diff_b": torch.randn(16),
        f"{block}norm1.w_norm": torch.randn(16),
        f"{block}norm1.b_norm": torch.randn(16),
        "lora_unet_conv_in.diff_b": torch.randn(8),
    }
    found = read_lora(tensors, {"unet": model})
    kinds = {name.removeprefix("mid_block."): type(weights) for name, weights in found.components["unet"].items()}
    assert kinds == {
        "attentions.0.transformer_blocks.0.attn1.to_q.weight": LoHa,
        "resnets.0.conv1.weight": Dora,
        "resnets.0.conv2.weight": LoKr,
        "resnets.0.time_emb_proj.weight": Diff,
        "resnets.0.time_emb_proj.bias": Diff,
        "resnets.0.norm1.weight": Diff,
        "resnets.0.norm1.bias": Diff,
        "conv_in.bias": Diff,
    }
    assert found.dialect == "kohya+lycoris" and found.alpha in (None, 1.0)
    used = {id(t) for _, _, w in found.items() for t in w.tensors().values()}
    assert {id(t) for key, t in tensors.items() if not key.endswith("alpha")} <= used, "every tensor is somewhere"


def test_biases_and_embeddings_of_peft() -> None:
    """``lora_B.bias`` (peft's ``lora_bias``) is scaled as the pair is; an embedding's pair is stored transposed."""
    model = toy()
    tensors = {
        "unet.inner.0.lora_A.weight": torch.randn(2, 6),
        "unet.inner.0.lora_B.weight": torch.randn(8, 2),
        "unet.inner.0.lora_B.bias": torch.randn(8),
        "unet.table.lora_embedding_A": torch.randn(2, 10),
        "unet.table.lora_embedding_B": torch.randn(6, 2),
    }
    settings = {"unet.r": 2, "unet.lora_alpha": 3}
    found = read_lora(tensors, {"unet": model}, metadata={"lora_adapter_metadata": json.dumps(settings)})
    weights = found.components["unet"]
    bias = weights["inner.0.bias"].delta(model.inner[0].bias)
    torch.testing.assert_close(bias, tensors["unet.inner.0.lora_B.bias"] * 3 / 2)
    table = tensors["unet.table.lora_embedding_A"].T @ tensors["unet.table.lora_embedding_B"].T * 3 / 2
    torch.testing.assert_close(weights["table.weight"].delta(model.table.weight), table)


def test_one_name_for_two_modules_is_an_error() -> None:
    model = nn.ModuleDict({"a_b": nn.Linear(2, 2), "a": nn.ModuleDict({"b": nn.Linear(2, 2)})})
    with pytest.raises(LoraError, match="the LoRA name a_b would mean both a_b and a.b"):
        target_names(model)


def test_text_encoders_are_found_with_and_without_their_prefix() -> None:
    for key in (
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
    ):
        found = read_lora(halves(key, 8, 8), {"text_encoder": text_model()})
        assert list(found.components["text_encoder"]) == ["text_model.encoder.layers.0.self_attn.q_proj.weight"]
    bare = {"encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 8)}
    bare["encoder.layers.0.self_attn.q_proj.lora_B.weight"] = torch.ones(8, 2)
    assert list(read_lora(bare, {"unet": unet(), "text_encoder": text_model()}).components) == ["text_encoder"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_of_a_file_stay_mapped(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file(
        {key: tensor.to(dtype) for key, tensor in halves().items()},
        tmp_path / "cat.safetensors",
        {"ss_base_model_version": "sd_v1"},
    )
    found = read_lora(tmp_path / "cat.safetensors", {"unet": unet()})
    assert found.name == "cat" and found.metadata["ss_base_model_version"] == "sd_v1"
    (pair,) = found.components["unet"].values()
    assert isinstance(pair, LoraPair) and pair.down.dtype == dtype
    assert pair.up.data_ptr() == pair.down.data_ptr() + pair.down.nbytes, "they lie side by side, as in the file"


# What is written


def everything(model: nn.Module) -> Lora:
    """One of each kind of weights."""
    weights: dict[str, Any] = {
        "inner.0.weight": LoraPair(torch.randn(2, 6), torch.randn(8, 2)),
        "inner.0.bias": Diff(torch.randn(8), 0.5),
        "inner.1.weight": Diff(torch.randn(8)),
        "conv.weight": LoraPair(torch.randn(2, 4, 1, 1), torch.randn(6, 2, 1, 1), 3.0, torch.randn(2, 2, 3, 3)),
        "point.weight": Dora(LoraPair(torch.randn(2, 4, 1, 1), torch.randn(6, 2, 1, 1), 1.0), torch.rand(1, 4, 1, 1)),
        "line.weight": LoKr(w1=torch.randn(2, 2), w2_a=torch.randn(3, 1), w2_b=torch.randn(1, 2 * 3), alpha=4.0),
        "table.weight": LoHa(*(torch.randn(*shape) for shape in ((10, 2), (2, 6)) * 2), alpha=1.0),
    }
    return Lora("everything", {"unet": weights}, {"author": "cat"})


def test_kohya_s_layout_holds_everything(tmp_path: Path) -> None:
    model = toy()
    written = everything(model)
    save_lora(tmp_path / "all.safetensors", written, metadata={"title": "all"})
    found = read_lora(tmp_path / "all.safetensors", {"unet": model})
    assert found.components["unet"].keys() == written.components["unet"].keys()
    for name, weights in written.components["unet"].items():
        parameter = model.get_parameter(name)
        assert type(found.components["unet"][name]) is type(weights)
        assert torch.equal(found.components["unet"][name].delta(parameter, 0.7), weights.delta(parameter, 0.7)), name
    assert found.metadata == {"format": "pt", "author": "cat", "title": "all"}
    assert found.num_parameters == written.num_parameters
    assert [path.name for path in tmp_path.iterdir()] == ["all.safetensors"], "no temporary file is left"


@pytest.mark.parametrize("layout", ["peft", "diffusers"])
def test_other_layouts_hold_pairs(layout: Any, tmp_path: Path) -> None:
    model = toy()
    weights = {name: w for name, w in everything(model).components["unet"].items() if isinstance(w, LoraPair)}
    save_lora(tmp_path / "pairs.safetensors", Lora("pairs", {"unet": weights}), layout)
    found = read_lora(tmp_path / "pairs.safetensors", {"unet": model})
    assert found.dialect == layout
    for name, pair in weights.items():
        parameter = model.get_parameter(name)
        torch.testing.assert_close(found.components["unet"][name].delta(parameter), pair.delta(parameter))


def test_dtype_of_a_file(tmp_path: Path) -> None:
    save_lora(tmp_path / "a.safetensors", lora(toy()), dtype=torch.float16)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        dtypes = {key.rpartition(".")[2]: file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    assert dtypes == {"weight": torch.float16, "diff": torch.float16, "diff_b": torch.float16, "alpha": torch.float32}


@pytest.mark.parametrize(
    ("name", "layout", "component", "message"),
    [
        ("a.bin", "kohya", "unet", r"written as \.safetensors, not as a\.bin"),
        ("a.safetensors", "a1111", "unet", "unknown layout 'a1111'; one of kohya, peft, diffusers"),
        ("a.safetensors", "kohya", "controlnet", "kohya's layout has no name for controlnet"),
        ("a.safetensors", "peft", "unet", "layout='peft' cannot hold the Diff of inner.0.bias; use 'kohya'"),
        ("a.safetensors", "diffusers", "unet", "layout='diffusers' cannot hold the Diff of inner.0.bias"),
    ],
)
def test_what_cannot_be_written(name: str, layout: Any, component: str, message: str, tmp_path: Path) -> None:
    weights = Lora("a", {component: everything(toy()).components["unet"]})
    with pytest.raises(LoraError, match=message):
        save_lora(tmp_path / name, weights, layout)
    assert not list(tmp_path.iterdir())


def test_columns_of_dora_need_kohya_s_layout(tmp_path: Path) -> None:
    weights = {"point.weight": everything(toy()).components["unet"]["point.weight"]}
    with pytest.raises(LoraError, match="peft's DoRA norms rows"):
        save_lora(tmp_path / "a.safetensors", Lora("a", {"unet": weights}), "peft")


# What a file tells


def test_inspection_of_a_kohya_file(tmp_path: Path) -> None:
    metadata = {
        "ss_base_model_version": "sd_v1",
        "ss_tag_frequency": json.dumps({"10_cat": {"a cat": 12, "red": 3}, "5_dog": {"a cat": 2, "blue": 4}}),
    }
    tensors = {**halves(), **halves(KEY.replace("attn1", "attn2").replace("to_q", "to_k"), 16, 768)}
    tensors |= {
        f"{KEY}.alpha": torch.tensor(1.0),
        **halves("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 8, 8, 3),
    }
    save_file(tensors, tmp_path / "cat.safetensors", metadata)
    info = inspect_lora(tmp_path / "cat.safetensors")
    assert (info.name, info.family, info.dialect, info.kinds) == ("cat", "SD 1.5", "kohya", ("lora",))
    assert (info.rank, info.ranks, info.alpha, info.alphas) == (2, (2, 3), 1.0, (1.0,))
    assert {part: len(modules) for part, modules in info.targets.items()} == {"unet": 2, "text_encoder": 1}
    assert info.num_parameters == sum(t.numel() for t in tensors.values()) - 1
    assert info.trigger_words == ("a cat", "blue", "red")
    assert info.fits == ("stable-diffusion-v1-5/stable-diffusion-v1-5",)
    assert info.base_model == "sd_v1" and info.recommended is None and info.unknown_keys == ()


def test_inspection_reads_peft_s_settings_and_names_strange_keys(tmp_path: Path) -> None:
    settings = {"unet.r": 2, "unet.lora_alpha": 16, "unet.alpha_pattern": {Q: 4.0}}
    tensors = {f"unet.{Q}.lora_A.weight": torch.ones(2, 16), f"unet.{Q}.lora_B.weight": torch.ones(16, 2)}
    save_file(
        {**tensors, "odd": torch.ones(1)}, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(settings)}
    )
    info = inspect_lora(tmp_path / "a.safetensors")
    assert (info.dialect, info.alphas, info.unknown_keys, info.family) == ("peft", (4.0,), ("odd",), "unknown")


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"a.weight": torch.ones(1)}, "none of its keys"), ({"x.oft_blocks": torch.ones(1)}, "it is OFT")],
)
def test_inspection_of_something_else(keys: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    save_file(keys, tmp_path / "a.safetensors")
    with pytest.raises(LoraError, match=message):
        inspect_lora(tmp_path / "a.safetensors")


XL = "lora_unet_input_blocks_8_1_transformer_blocks_{}_attn2_to_k"


@pytest.mark.parametrize(
    ("keys", "width", "family"),
    [
        (["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v"], 768, "SD 1.5"),
        (["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"], 1024, "SD 2.x"),
        ([XL.format(9)], 2048, "SDXL"),
        ([XL.format(3)], 2048, "SSD-1B"),
        ([XL.format(3), "lora_unet_middle_block_1_proj_in"], 2048, "SDXL"),
        (["lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_v"], 2048, "SDXL or SSD-1B"),
        (["lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_v"], 1280, "SDXL refiner"),
        (["lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_v"], 96, "a model of text width 96"),
        (["lora_te2_text_model_encoder_layers_0_self_attn_q_proj"], 1280, "SDXL or SSD-1B"),
        (["lora_te_text_model_encoder_layers_0_self_attn_q_proj"], 1024, "SD 2.x"),
        (["lora_te_text_model_encoder_layers_0_self_attn_q_proj"], 768, "unknown"),
        (["lora_unet_conv_in"], 4, "unknown"),
    ],
)
def test_families(keys: list[str], width: int, family: str, tmp_path: Path) -> None:
    suffix = ".lora_down.weight" if keys[0].startswith("lora_") else ".lora.down.weight"
    save_file({key + suffix: torch.ones(2, width) for key in keys}, tmp_path / "a.safetensors")
    assert inspect_lora(tmp_path / "a.safetensors").family == family


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"modelspec.trigger_phrase": "emoji, flat"}, ("emoji", "flat")),
        ({"ss_trigger_words": "a fox"}, ("a fox",)),
        ({"ss_trained_words": '["a fox", "snow"]'}, ("a fox", "snow")),
        ({"ss_trained_words": "fox,", "ss_tag_frequency": '{"1_x": {"tag": 3}}'}, ("fox",)),
        ({"ss_tag_frequency": '{"1_x": {"b": 3, " a ": 5}, "2_y": {"b": 3}}'}, ("b", "a")),
        ({}, ()),
    ],
)
def test_trigger_words(metadata: dict[str, str], words: tuple[str, ...], tmp_path: Path) -> None:
    save_file(halves(), tmp_path / "a.safetensors", metadata)
    assert inspect_lora(tmp_path / "a.safetensors").trigger_words == words


@pytest.mark.parametrize("tags", ["{", "[]", '{"a": 1}', '{"a": {"b": "many"}}'])
def test_strange_tag_counts_are_no_error(tags: str, tmp_path: Path) -> None:
    save_file(halves(), tmp_path / "a.safetensors", {"ss_tag_frequency": tags})
    assert inspect_lora(tmp_path / "a.safetensors").trigger_words == ()


def test_parsing_is_total() -> None:
    """Any key gives a parsed key or None, never an exception, also where nothing stands before the suffix."""
    for key in ("", ".", "lora_unet_", ".lora_down.weight", "lora_unet_.alpha", "unet.", "base_model.model."):
        assert parse_key(key) is None
