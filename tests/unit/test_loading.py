"""Loading and saving: every tensor is used or named, files are whole or absent, pickles are never opened."""

from __future__ import annotations

import json
import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fourstroke import loading
from fourstroke.config import AutoencoderTinyConfig, UnsupportedConfig
from fourstroke.loading import Model, WeightError, WeightSource, select_weights
from fourstroke.models.unet import UNet2DConditionModel
from fourstroke.models.vae import AutoencoderKL
from fourstroke.models.vae_tiny import AutoencoderTiny

CONFIG: dict[str, Any] = {
    "encoder_block_out_channels": [8, 8],
    "decoder_block_out_channels": [8, 8],
    "num_encoder_blocks": [1, 1],
    "num_decoder_blocks": [1, 1],
}
STEM = "diffusion_pytorch_model"


def make(std: float = 0.3) -> AutoencoderTiny:
    model = AutoencoderTiny.from_config(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make().save_pretrained(tmp_path)
    return tmp_path


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path)


def same(one: Model, other: Model) -> bool:
    state, others = one.state_dict(), other.state_dict()
    return set(state) == set(others) and all(torch.equal(state[name], others[name]) for name in state)


def test_save_and_load(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", f"{STEM}.safetensors"]
    loaded = AutoencoderTiny.from_pretrained(tmp_path)
    assert same(model, loaded) and loaded.config == model.config
    assert not loaded.training
    assert loaded.dtype == torch.float32 and loaded.device == torch.device("cpu")
    oracle = diffusers.AutoencoderTiny.from_pretrained(tmp_path)
    picture = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(loaded.encode(picture), oracle.encode(picture).latents)


def test_what_diffusers_saves_is_loaded(tmp_path: Path) -> None:
    oracle = diffusers.AutoencoderTiny(**CONFIG)
    oracle.save_pretrained(tmp_path)
    assert set(AutoencoderTiny.from_pretrained(tmp_path).state_dict()) == set(oracle.state_dict())


@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
def test_both_names_of_the_dtype(folder: Path, name: str) -> None:
    loaded = AutoencoderTiny.from_pretrained(folder, **{name: torch.bfloat16})
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    full = AutoencoderTiny.from_pretrained(folder)
    for (key, half), single in zip(loaded.state_dict().items(), full.state_dict().values(), strict=True):
        assert torch.equal(half, single.bfloat16()), key


def test_half_precision_files_become_float32_unless_asked(tmp_path: Path) -> None:
    make().half().save_pretrained(tmp_path)
    assert AutoencoderTiny.from_pretrained(tmp_path).dtype == torch.float32
    assert AutoencoderTiny.from_pretrained(tmp_path, torch_dtype=torch.float16).dtype == torch.float16


def test_subfolder(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "vae")
    assert same(AutoencoderTiny.from_pretrained(tmp_path, subfolder="vae"), model)
    with pytest.raises(FileNotFoundError, match=r"there is no 'unet/config.json'; it holds: vae/config.json"):
        AutoencoderTiny.from_pretrained(tmp_path, subfolder="unet")


def test_misspelt_keyword_warns_and_goes_on(folder: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"AutoencoderTiny.from_pretrained: ignored unknown arguments 'varient'"
    ) as caught:
        AutoencoderTiny.from_pretrained(folder, varient="fp16")
    assert caught[0].filename == __file__, "the warning points at the caller"


def test_source_reads_the_pristine_weights_again(folder: Path) -> None:
    model = AutoencoderTiny.from_pretrained(folder, torch_dtype=torch.bfloat16)
    name = "encoder.layers.0.weight"
    model.state_dict()[name].zero_()
    assert model.source is not None
    assert torch.equal(model.source.read(name), load_file(folder / f"{STEM}.safetensors")[name])
    with pytest.raises(KeyError):
        model.source.read("encoder.layers.0.wait")


def test_changing_a_loaded_weight_leaves_the_file_alone(folder: Path) -> None:
    path = folder / f"{STEM}.safetensors"
    before = path.read_bytes()
    model = AutoencoderTiny.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    assert path.read_bytes() == before


# Variants, shards, selection


def test_variant_is_read_where_there_is_one(folder: Path) -> None:
    half = make().half()
    half.save_pretrained(folder, variant="fp16")
    assert (folder / f"{STEM}.fp16.safetensors").is_file()
    assert same(AutoencoderTiny.from_pretrained(folder, variant="fp16", torch_dtype=torch.float16), half)
    assert not same(AutoencoderTiny.from_pretrained(folder, torch_dtype=torch.float16), half)


def test_missing_variant_falls_back_with_a_warning(folder: Path) -> None:
    with pytest.warns(UserWarning, match=rf"no variant 'fp16'; {STEM}.safetensors is loaded"):
        loaded = AutoencoderTiny.from_pretrained(folder, variant="fp16")
    assert same(loaded, AutoencoderTiny.from_pretrained(folder))


def test_plain_form_wanted_but_only_a_variant_there(folder: Path) -> None:
    (folder / f"{STEM}.safetensors").rename(folder / f"{STEM}.fp16.safetensors")
    with pytest.raises(FileNotFoundError, match=rf"No .safetensors weights .*{STEM}.fp16.safetensors"):
        AutoencoderTiny.from_pretrained(folder)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_weights(tmp_path: Path, variant: str | None) -> None:
    """As diffusers and transformers write them when a file would grow past ``max_shard_size``."""
    oracle = diffusers.AutoencoderTiny(**CONFIG)
    oracle.save_pretrained(tmp_path, max_shard_size="8KB", variant=variant)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and len(list(tmp_path.glob("*.index*.json"))) == 1
    loaded = AutoencoderTiny.from_pretrained(tmp_path, variant=variant)
    for name, tensor in oracle.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_missing_shard_is_an_error_that_names_its_tensors(tmp_path: Path) -> None:
    diffusers.AutoencoderTiny(**CONFIG).save_pretrained(tmp_path, max_shard_size="8KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    with safe_open(shard, framework="pt") as file:
        name = next(iter(file.keys()))
    shard.unlink()
    with pytest.raises(WeightError, match=rf"missing: .*{name}"):
        AutoencoderTiny.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("files", "variant", "chosen"),
    [
        ([f"unet/{STEM}.safetensors", "unet/config.json"], None, [f"unet/{STEM}.safetensors"]),
        (
            [f"unet/{STEM}.safetensors", f"unet/{STEM}.fp16.safetensors"],
            "fp16",
            [f"unet/{STEM}.fp16.safetensors"],
        ),
        ([f"unet/{STEM}.safetensors", f"unet/{STEM}.bin"], None, [f"unet/{STEM}.safetensors"]),
        (["unet/model.safetensors", f"{STEM}.safetensors"], None, ["unet/model.safetensors"]),
        (["unet/pytorch_model.safetensors"], None, ["unet/pytorch_model.safetensors"]),
        ([f"unet/deeper/{STEM}.safetensors", "unet/model.safetensors"], None, ["unet/model.safetensors"]),
        (
            [
                "unet/model.safetensors.index.fp16.json",
                "unet/model-00001-of-00002.fp16.safetensors",
                "unet/model-00002-of-00002.fp16.safetensors",
                "unet/model-00001-of-00003.safetensors",
            ],
            "fp16",
            ["unet/model-00001-of-00002.fp16.safetensors", "unet/model-00002-of-00002.fp16.safetensors"],
        ),
    ],
)
def test_selection(files: list[str], variant: str | None, chosen: list[str]) -> None:
    assert select_weights(files, "unet/", variant) == chosen


def test_selection_of_shards_reads_their_index_too() -> None:
    """Without the index's file no shard is taken for a whole."""
    with pytest.raises(FileNotFoundError, match="No .safetensors weights in unet/"):
        select_weights(["unet/model-00001-of-00002.safetensors"], "unet/", None)


def test_empty_folder() -> None:
    with pytest.raises(FileNotFoundError, match=r"No .safetensors weights in unet/; it holds: nothing"):
        select_weights(["vae/model.safetensors"], "unet/", None)


# Strictness


def test_every_problem_is_in_one_error(folder: Path) -> None:
    def spoil(state: dict[str, Tensor]) -> None:
        state["decoder.layers.9.weight"] = state.pop("encoder.layers.0.weight")
        state["encoder.layers.0.bias"] = torch.zeros(3)

    rewrite(folder / f"{STEM}.safetensors", spoil)
    with pytest.raises(WeightError) as caught:
        AutoencoderTiny.from_pretrained(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}"), "the place is named"
    assert "the weights do not fit AutoencoderTiny" in message
    assert "1 missing: encoder.layers.0.weight" in message
    assert "1 unexpected: decoder.layers.9.weight" in message
    assert "1 of the wrong shape: encoder.layers.0.bias (3,) instead of (8,)" in message


def test_long_lists_are_cut_and_counted(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / f"{STEM}.safetensors")
    total = len(make().state_dict())
    with pytest.raises(WeightError, match=rf"{total} missing: .* and {total - loading.MAX_LISTED} more"):
        AutoencoderTiny.from_pretrained(tmp_path)


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    """Both the old and today's name of one tensor in a file: neither is silently preferred."""
    path = tmp_path / "x.safetensors"
    stem = "encoder.mid_block.attentions.0"
    save_file({f"{stem}.query.weight": torch.zeros(1), f"{stem}.to_q.weight": torch.ones(1)}, path)
    with pytest.raises(WeightError, match=rf"both hold '{stem}.to_q.weight'"):
        WeightSource.from_files([path], AutoencoderKL.published_name)


def test_unsupported_config_is_refused_before_the_weights_are_read(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, "wings": 2}))
    (folder / f"{STEM}.safetensors").write_bytes(b"not read")
    with pytest.raises(UnsupportedConfig, match="wings"):
        AutoencoderTiny.from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not valid JSON .*download it again"), ("[1]", "must hold a JSON object, not list")]
)
def test_broken_config(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        AutoencoderTiny.from_pretrained(folder)


def test_truncated_weights(folder: Path) -> None:
    path = folder / f"{STEM}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightError, match=rf"{path.name} is not a readable .safetensors file .* again"):
        AutoencoderTiny.from_pretrained(folder)


# Pickles


@pytest.mark.parametrize("name", [f"{STEM}.bin", "model.ckpt", "model.pt", "model.pth"])
def test_pickle_is_refused_with_the_mend(folder: Path, name: str) -> None:
    (folder / f"{STEM}.safetensors").unlink()
    (folder / name).write_bytes(b"cos\nsystem\n")
    with pytest.raises(ValueError, match=rf"{name} is a pickle.*Convert it once.*save_file") as caught:
        AutoencoderTiny.from_pretrained(folder)
    assert not isinstance(caught.value, FileNotFoundError)


def test_pickle_called_directly() -> None:
    with pytest.raises(ValueError, match="is a pickle"):
        WeightSource.from_files([Path("x.ckpt")], str)
    loading.refuse_pickle("x.safetensors")


def test_index_of_pickle_shards_is_refused() -> None:
    names = ["unet/pytorch_model-00001-of-00002.bin", "unet/pytorch_model.bin.index.json"]
    with pytest.raises(ValueError, match="is a pickle"):
        select_weights(names, "unet/", None)


# Atomic writes


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loading.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_failed_save_leaves_the_old_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_args: Any, **_options: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        AutoencoderTiny.from_config(CONFIG).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_written_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        loading.write_json(tmp_path / "a" / "b.json", {"ü": 1})
    finally:
        os.umask(before)
    path = tmp_path / "a" / "b.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert json.loads(path.read_text(encoding="utf-8")) == {"ü": 1}
    assert loading.read_json(path) == {"ü": 1}


def test_overwriting_a_folder_that_is_loaded(folder: Path) -> None:
    """The rename gives the file a new inode, so weights that are memory-mapped keep their values."""
    loaded = AutoencoderTiny.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    make(std=2.0).save_pretrained(folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())
    loaded.save_pretrained(folder)
    assert same(AutoencoderTiny.from_pretrained(folder), loaded)


# Building


def test_nothing_is_initialised_at_random_when_loading(folder: Path) -> None:
    state = torch.get_rng_state()
    AutoencoderTiny.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_loading_does_not_copy(folder: Path) -> None:
    """Weights of the file's dtype stay memory-mapped: the parameters' storages lie in one mapping of the file."""
    model = AutoencoderTiny.from_pretrained(folder)
    path = str((folder / f"{STEM}.safetensors").resolve())
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(path):
            ranges.append([int(end, 16) for end in line.split()[0].split("-")])
    assert ranges, "the file is mapped"
    for name, parameter in model.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in ranges), name


def test_from_config_takes_a_mapping_or_a_config() -> None:
    one = AutoencoderTiny.from_config(CONFIG)
    assert isinstance(one.config, AutoencoderTinyConfig) and one.source is None
    assert AutoencoderTiny.from_config(one.config).config == one.config
    with pytest.raises(UnsupportedConfig, match="must be one width throughout"):
        AutoencoderTiny.from_config({"encoder_block_out_channels": [8, 16]})
    with pytest.raises(UnsupportedConfig, match="act_fn 'tanh' is not one of"):
        AutoencoderTiny.from_config({"act_fn": "tanh"})
    with pytest.raises(ValueError, match="needs addition_time_embed_dim"):
        UNet2DConditionModel.from_config({"addition_embed_type": "text_time", "block_out_channels": [8] * 4})


def test_loading_gives_no_warning(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoencoderTiny.from_pretrained(folder)
