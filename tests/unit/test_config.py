"""Configurations: published files are read, what is not implemented is refused by name, and nothing is lost."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import diffusers
import pytest
import transformers

from fourstroke.config import (
    AutoencoderKLConfig,
    AutoencoderTinyConfig,
    CLIPTextConfig,
    Config,
    UNetConfig,
    UnsupportedConfig,
    config_from_dict,
    config_to_dict,
)

CONFIGS = [UNetConfig, AutoencoderKLConfig, AutoencoderTinyConfig, CLIPTextConfig]
ORACLES = {
    UNetConfig: diffusers.UNet2DConditionModel,
    AutoencoderKLConfig: diffusers.AutoencoderKL,
    AutoencoderTinyConfig: diffusers.AutoencoderTiny,
}
SMALL: dict[type[Config], dict[str, Any]] = {
    UNetConfig: {"block_out_channels": (32,) * 4, "cross_attention_dim": 8, "attention_head_dim": 4},
    AutoencoderKLConfig: {},
    AutoencoderTinyConfig: {},
}


@pytest.mark.parametrize("cls", CONFIGS)
def test_dict_and_back(cls: type[Config]) -> None:
    config = cls()
    data = config_to_dict(config)
    assert data["_class_name"] == cls.class_name
    assert not any(isinstance(value, tuple) for value in data.values()), "a config.json holds lists"
    assert config_from_dict(cls, data) == config


@pytest.mark.parametrize("cls", ORACLES)
def test_diffusers_reads_what_is_written(cls: type[Config]) -> None:
    written = config_to_dict(config_from_dict(cls, SMALL[cls]))
    oracle = ORACLES[cls].from_config(dict(written))
    for name, value in written.items():
        if name != "_class_name":
            theirs = oracle.config[name]
            assert (list(theirs) if isinstance(theirs, tuple) else theirs) == value, name


@pytest.mark.parametrize("cls", ORACLES)
def test_every_field_of_the_oracle_is_known(cls: type[Config]) -> None:
    """A field of diffusers' class is one of ours or has a neutral value; its default must load."""
    oracle = dict(ORACLES[cls](**SMALL[cls]).config)
    config = config_from_dict(cls, oracle)
    for field in dataclasses.fields(cls):
        if field.name in oracle and not isinstance(oracle[field.name], (list, tuple)):
            assert config[field.name] == oracle[field.name], field.name


def test_every_field_of_a_transformers_config_is_known() -> None:
    oracle = transformers.CLIPTextConfig(hidden_size=64, hidden_act="gelu", eos_token_id=7)
    config = config_from_dict(CLIPTextConfig, oracle.to_dict())
    assert (config.hidden_size, config.hidden_act, config.eos_token_id) == (64, "gelu", 7)


@pytest.mark.parametrize("cls", ORACLES)
def test_defaults_of_shared_fields_are_the_oracles(cls: type[Config]) -> None:
    """A published config.json may leave out a field; the oracle's default then holds."""
    parameters = inspect.signature(ORACLES[cls].__init__).parameters
    shared = [field for field in dataclasses.fields(cls) if field.name in parameters]
    assert len(shared) > 10
    for field in shared:
        default = parameters[field.name].default
        assert field.default == (tuple(default) if isinstance(default, list) else default), field.name


@pytest.mark.parametrize("cls", CONFIGS)
def test_unknown_field_is_named(cls: type[Config]) -> None:
    with pytest.raises(UnsupportedConfig, match=r"unknown config field 'wings' \(value 2\).*Remove it"):
        config_from_dict(cls, {"wings": 2})


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        (UNetConfig, "class_embed_type", "timestep"),
        (UNetConfig, "resnet_time_scale_shift", "scale_shift"),
        (UNetConfig, "encoder_hid_dim_type", "ip_image_proj"),
        (UNetConfig, "only_cross_attention", [True, False]),
        (AutoencoderKLConfig, "act_fn", "relu"),
        (AutoencoderTinyConfig, "upsample_fn", "bilinear"),
    ],
)
def test_field_that_is_not_implemented_is_named(cls: type[Config], name: str, value: Any) -> None:
    with pytest.raises(UnsupportedConfig, match=rf"config field '{name}' is .* not supported; only "):
        config_from_dict(cls, {name: value})
    neutral = cls.neutral[name][0]
    assert config_from_dict(cls, {name: neutral}) == cls(), "the neutral value loads"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_block_types": ["DownBlock2D"]}, r"down_block_types has 1 entries, but block_out_channels has 4"),
        ({"up_block_types": ["UpBlock2D"] * 3 + ["AttnUpBlock2D"]}, r"up_block_types 'AttnUpBlock2D' is not supported"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, r"mid_block_type 'UNetMidBlock2DSimpleCrossAttn'"),
        ({"addition_embed_type": "image"}, r"addition_embed_type 'image' is not supported"),
        ({"transformer_layers_per_block": [1, [1, 2], 1, 1]}, r"reverse_transformer_layers_per_block must give"),
    ],
)
def test_unet_that_cannot_be_built_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedConfig, match=message):
        config_from_dict(UNetConfig, changes)


def test_vae_and_clip_that_cannot_be_built_are_refused() -> None:
    with pytest.raises(UnsupportedConfig, match=r"down_block_types is .* once a level \(2 levels\)"):
        config_from_dict(AutoencoderKLConfig, {"block_out_channels": [32, 64]})
    with pytest.raises(UnsupportedConfig, match=r"hidden_act 'relu' is not 'quick_gelu' or 'gelu'"):
        config_from_dict(CLIPTextConfig, {"hidden_act": "relu"})


def test_underscored_keys_are_bookkeeping() -> None:
    assert config_from_dict(UNetConfig, {"_class_name": "X", "_diffusers_version": "0.1"}) == UNetConfig()


def test_config_reads_like_a_mapping() -> None:
    config = UNetConfig()
    assert config["in_channels"] == config.in_channels == config.get("in_channels") == 4
    assert config.get("wings") is None and config.get("wings", 2) == 2
    with pytest.raises(KeyError, match="wings"):
        config["wings"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.in_channels = 9  # type: ignore[misc]


def test_per_level() -> None:
    assert UNetConfig(layers_per_block=3).per_level("layers_per_block") == (3, 3, 3, 3)
    assert UNetConfig(attention_head_dim=(5, 10, 20, 20)).per_level("attention_head_dim") == (5, 10, 20, 20)
