"""Folders with whole pipelines: written by one library, read by the other, with the same pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import fourstroke

from .. import fakenets
from .peers import NAMES, STEERED, bases, oracle
from .pictures import PROMPT, assert_same_pictures, hole, shapes


def painted(pipe: Any, several: bool = False) -> np.ndarray:
    """What ``pipe`` makes of everything that its class takes: (N, 64, 64, 3) in [0, 1]."""
    name = type(pipe).__name__
    animated, steered = "Animate" in name, "ControlNet" in name or "Adapter" in name
    call: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.5, "output_type": "np"}
    picture = [shapes(1), shapes(2)] if several else shapes(1)
    if animated:
        frames: Any = [shapes(seed) for seed in (3, 4)]
        call |= {"decode_chunk_size": 4} if "SDXL" not in name else {}
        call |= {"video": frames, "strength": 0.8} if "Video" in name else {"num_frames": 2}
        call |= {"conditioning_frames": [frames, frames] if several else frames} if steered else {}
    elif "Img2Img" in name or "Inpaint" in name:
        call |= {"image": shapes(0), "strength": 0.8}
        call |= {"control_image": picture} if steered else {}
        call |= {"mask_image": hole()} if "Inpaint" in name else {}
    elif steered:
        call["image"] = picture
    if several and "Adapter" in name:
        call["adapter_conditioning_scale"] = [0.9, 0.7]
    if "Video" not in name and "Img2Img" not in name:
        call |= {"height": 64, "width": 64}
    result = pipe(prompt=PROMPT, generator=torch.Generator().manual_seed(0), **call)
    return np.asarray(result.frames[0] if animated else result.images)


# The SD 1.5 T2I-Adapter pipeline calls a method that diffusers itself calls deprecated.
@pytest.mark.filterwarnings("ignore:The decode_latents method is deprecated:FutureWarning")
@pytest.mark.parametrize(("name", "several"), [*((name, False) for name in NAMES), *((name, True) for name in STEERED)])
def test_folders_go_both_ways(name: str, several: bool, tmp_path: Path) -> None:
    theirs = oracle(name, several)
    theirs.save_pretrained(tmp_path / "theirs")
    ours: Any = fourstroke.DiffusionPipeline.from_pretrained(tmp_path / "theirs")
    ours.set_progress_bar_config(disable=True)
    assert type(ours).__name__ == name
    picture = painted(ours, several)
    assert_same_pictures(picture, painted(theirs, several))

    ours.save_pretrained(tmp_path / "ours", variant="fp16")
    again: Any = fourstroke.DiffusionPipeline.from_pretrained(tmp_path / "ours", variant="fp16")
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(painted(again, several), picture)
    read = getattr(diffusers, name).from_pretrained(tmp_path / "ours", variant="fp16")
    read.set_progress_bar_config(disable=True)
    if "Animate" in name and "XL" in name:  # UNetMotionModel.from_unet2d forgets it
        read.unet.add_embedding.load_state_dict(again.unet.add_embedding.state_dict())
    assert_same_pictures(picture, painted(read, several))


def index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model_index.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_the_index_names_what_the_peers_names(name: str, tmp_path: Path) -> None:
    several = name in STEERED
    oracle(name, several).save_pretrained(tmp_path / "theirs")
    fourstroke.DiffusionPipeline.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    ours, theirs = index(tmp_path / "ours"), index(tmp_path / "theirs")
    for index_ in (ours, theirs):
        assert index_.pop("_diffusers_version")
    theirs = {part: entry for part, entry in theirs.items() if entry is not None}
    # diffusers saves the UNet and the motion modules in it as one network; we save the two that it was made of.
    if "Animate" in name:
        assert theirs["unet"] == ["diffusers", "UNetMotionModel"]
        theirs["unet"] = ["diffusers", "UNet2DConditionModel"]
    if theirs.get("feature_extractor") == ["transformers", "CLIPImageProcessorPil"]:
        theirs["feature_extractor"] = ["transformers", "CLIPImageProcessor"]  # named for the library that resizes
    # Not every class of diffusers' writes its settings.
    settings = {part for part in ours if isinstance(ours[part], bool)} - theirs.keys()
    assert {part: entry for part, entry in ours.items() if entry != [None, None] and part not in settings} == {
        part: entry for part, entry in theirs.items() if entry != [None, None]
    }


def test_a_unet_with_motion_modules_is_taken_apart(tmp_path: Path) -> None:
    theirs = oracle("AnimateDiffPipeline")
    # What runs is in the UNet; the adapter beside it is not looked at.
    with torch.no_grad():
        theirs.unet.up_blocks[0].motion_modules[0].proj_out.weight.mul_(-2)
    theirs.save_pretrained(tmp_path)
    ours: Any = fourstroke.AnimateDiffPipeline.from_pretrained(tmp_path)
    ours.set_progress_bar_config(disable=True)
    assert_same_pictures(painted(ours), painted(theirs))
    picture = fourstroke.StableDiffusionPipeline.from_pretrained(tmp_path)
    assert not any("motion" in name for name in picture.unet.state_dict())
    saved = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, saved[key]) for key, tensor in picture.unet.state_dict().items())


def test_another_motion_adapter_can_be_given(tmp_path: Path) -> None:
    theirs = oracle("AnimateDiffPipeline")
    theirs.save_pretrained(tmp_path / "pipe")
    other = fakenets.motion_adapter(bases()["sd15"]["unet"], frames=8, mid_block=True)
    other.save_pretrained(tmp_path / "adapter")
    adapter = fourstroke.MotionAdapter.from_pretrained(tmp_path / "adapter")
    ours: Any = fourstroke.AnimateDiffPipeline.from_pretrained(tmp_path / "pipe", motion_adapter=adapter)
    ours.set_progress_bar_config(disable=True)
    unet = bases()["sd15"]["unet"]
    expected = diffusers.AnimateDiffPipeline(**{**theirs.components, "unet": unet, "motion_adapter": other})
    expected.set_progress_bar_config(disable=True)
    assert_same_pictures(painted(ours), painted(expected))


@pytest.mark.parametrize("change", [{"mid_block_layers": 2}, {"reverse_motion_num_attention_heads": [2, 2]}])
def test_a_motion_unet_of_another_build_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    oracle("AnimateDiffPipeline").save_pretrained(tmp_path)
    path = tmp_path / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(fourstroke.UnsupportedConfig, match="only UNetMotionModels made from a UNet"):
        fourstroke.DiffusionPipeline.from_pretrained(tmp_path)


def test_image_encoder_and_safety_checker_are_kept(tmp_path: Path) -> None:
    make: Callable[..., Any] = transformers.CLIPVisionModelWithProjection
    encoder = fakenets.randomise(make(transformers.CLIPVisionConfig(**fakenets.VISION)))
    parts = {**bases()["inpainting"], "unet": bases()["sd15"]["unet"], "image_encoder": encoder}
    diffusers.StableDiffusionPipeline(**parts).save_pretrained(tmp_path / "theirs")
    ours = fourstroke.DiffusionPipeline.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    read = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "ours")
    for name in ("image_encoder", "safety_checker"):
        mine = getattr(read, name).state_dict()
        original = parts[name].state_dict()
        assert all(torch.equal(tensor, mine[key]) for key, tensor in original.items() if tensor.is_floating_point())
    assert read.feature_extractor.crop_size == parts["feature_extractor"].crop_size
