"""What the safety checker and CLIP's preparation of pictures say when something is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from fourstroke.config import SafetyCheckerConfig, UnsupportedConfig, config_from_dict, config_to_dict
from fourstroke.models.clip_vision import CLIPImageProcessor
from fourstroke.models.safety import StableDiffusionSafetyChecker

VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def checker(threshold: float) -> StableDiffusionSafetyChecker:
    """Flags every picture (threshold -2) or none (2), since cosines lie between -1 and 1."""
    model = StableDiffusionSafetyChecker.from_config({"vision_config": VISION, "projection_dim": 6})
    model.concept_embeds_weights.data.fill_(threshold)
    model.special_care_embeds_weights.data.fill_(2.0)
    return model


def test_flagging_warns_where_the_checker_was_called() -> None:
    with pytest.warns(UserWarning, match=re.escape("flagged 2 of 2 pictures (number 0, 1, counted from 0)")) as caught:
        checker(-2.0)(torch.randn(2, 3, 8, 8), torch.ones(2, 3, 4, 4))
    assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]


def test_flags_alone_warn_of_nothing() -> None:
    assert checker(-2.0).flags(torch.randn(2, 3, 8, 8)) == [True, True]
    assert checker(2.0).flags(torch.randn(2, 3, 8, 8)) == [False, False]


def test_no_pictures() -> None:
    assert checker(-2.0)(torch.zeros(0, 3, 8, 8), []) == ([], [])


def test_as_many_pictures_as_inputs() -> None:
    with pytest.raises(ValueError, match="clip_input holds 2 pictures, images 3"):
        checker(2.0)(torch.randn(2, 3, 8, 8), np.zeros((3, 4, 4, 3)))


@pytest.mark.parametrize("shape", [(1, 3, 9, 8), (1, 1, 8, 8), (3, 8, 8)], ids=str)
def test_pictures_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{shape}, but this CLIP sees ('N', 3, 8, 8)")):
        checker(2.0).flags(torch.zeros(shape))


def test_the_verdict_takes_no_gradient() -> None:
    result, _ = checker(2.0)(torch.randn(1, 3, 8, 8, requires_grad=True), torch.ones(1, 3, 4, 4))
    assert not result.requires_grad


def test_the_nested_configuration_survives_its_dictionary() -> None:
    config = config_from_dict(SafetyCheckerConfig, {"vision_config": VISION, "projection_dim": 6})
    assert config["vision_config"]["patch_size"] == 4
    data = config_to_dict(config)
    assert type(data["vision_config"]) is dict
    assert config_from_dict(SafetyCheckerConfig, data) == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"vision_config": {"register_tokens": 4}}, "unknown config field 'register_tokens'"),
        ({"vision_config": VISION, "vision_config_dict": {"use_rope": True}}, "unknown config field 'use_rope'"),
        ({"vision_config": {"hidden_act": "relu"}}, "hidden_act 'relu' is not"),
        ({"vision_config": {"image_size": [224, 336]}}, r"image_size is \(224, 336\); it must be one integer"),
        ({"num_concepts": 20}, "unknown config field 'num_concepts'"),
    ],
)
def test_unsupported_configurations(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedConfig, match=message):
        StableDiffusionSafetyChecker.from_config(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"size": {"longest_edge": 224}}, r"size is {'longest_edge': 224}; give a mapping with \['shortest_edge'\] or"),
        ({"crop_size": {"shortest_edge": 224}}, r"crop_size is .*; give a mapping with \['height', 'width'\]"),
        ({"resample": 9}, "resample is 9; give one of PIL's 0 to 5"),
        ({"image_mean": [0.5]}, "give three numbers"),
        ({"do_pad": True}, "'do_pad' is True"),
        ({"do_binarize": True}, "unknown config field 'do_binarize'"),
    ],
)
def test_unsupported_preparations(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedConfig, match=message):
        config_from_dict(CLIPImageProcessor, data)


def test_preparation_takes_pil_images_only() -> None:
    with pytest.raises(TypeError, match=r"takes PIL images, not ndarray; use PIL\.Image\.fromarray"):
        CLIPImageProcessor()([np.zeros((4, 4, 3))])  # type: ignore[list-item]


def test_preparation_gives_torch_tensors_only() -> None:
    with pytest.raises(ValueError, match="return_tensors is 'np'"):
        CLIPImageProcessor()(PIL.Image.new("RGB", (4, 4)), return_tensors="np")


def test_uncropped_pictures_must_agree_in_size() -> None:
    processor = CLIPImageProcessor(do_resize=False, do_center_crop=False)
    with pytest.raises(ValueError, match=re.escape("have the sizes [(4, 4), (5, 4)]")):
        processor([PIL.Image.new("RGB", (4, 4)), PIL.Image.new("RGB", (5, 4))])


def test_a_missing_preprocessor_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path)) + ".*preprocessor_config.json"):
        CLIPImageProcessor.from_pretrained(tmp_path)
