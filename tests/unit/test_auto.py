"""The pipeline for a task: which class is picked, and what the pipelines that share components have in common."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import fourstroke
from fourstroke import DiffusionPipeline
from fourstroke.pipelines.pipeline import CONTAINERS
from tests import fakenets
from tests.parity.peers import NAMES, bases, kind_of, oracle
from tests.unit import tiny
from tests.unit.test_runtime import lora, painted, picture

TASKS = ("AutoPipelineForText2Image", "AutoPipelineForImage2Image", "AutoPipelineForInpainting")


def peers_choice(make: Callable[..., Any], source: Any, options: dict[str, Any]) -> str | None:
    """The class that diffusers picks; None where it has no answer."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return type(make(source, **options)).__name__
    except ValueError:
        return None


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved pipeline of every class, and a ControlNet for each kind of model."""
    root = tmp_path_factory.mktemp("pipelines")
    for name in NAMES:
        oracle(name).save_pretrained(root / name)
    for kind in ("sd15", "xl"):
        fakenets.controlnet(bases()[kind]["unet"]).save_pretrained(root / f"controlnet-{kind}")
    return {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", NAMES)
def test_the_class_is_the_one_that_the_peer_picks(task: str, name: str, folders: dict[str, Path]) -> None:
    kind = {"inpainting": "sd15"}.get(kind_of(name), kind_of(name))
    theirs, ours = oracle(name), DiffusionPipeline.from_pretrained(folders[name])
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [({}, {}), ({"controlnet": None}, {"controlnet": None})]
    if kind != "lcm":
        folder = folders[f"controlnet-{kind}"]
        nets = [library.ControlNetModel.from_pretrained(folder) for library in (diffusers, fourstroke)]
        cases.append(({"controlnet": nets[0]}, {"controlnet": nets[1]}))
    answered = 0
    for (peers, own), saved in itertools.product(cases, (False, True)):
        if saved and peers.get("controlnet", ...) is None:
            continue  # diffusers takes controlnet=None for a wish for the ControlNet form
        their_auto, our_auto = getattr(diffusers, task), getattr(fourstroke, task)
        makes = [auto.from_pretrained if saved else auto.from_pipe for auto in (their_auto, our_auto)]
        sources = [folders[name]] * 2 if saved else [theirs, ours]
        wanted = peers_choice(makes[0], sources[0], peers)
        if wanted is None:
            continue
        found = makes[1](sources[1], **own)
        assert type(found).__name__ == wanted
        answered += 1
    # It has no answer for animations, T2I-Adapters, and inpainting with a full LCM.
    assert answered or "Adapter" in name or "Animate" in name or (kind == "lcm" and task == TASKS[2])


def sd_adapter() -> Any:
    base = tiny.sd()
    adapter = tiny.filled(
        fourstroke.T2IAdapter.from_config({"channels": (16, 32), "downscale_factor": 8, "num_res_blocks": 1})
    )
    return fourstroke.StableDiffusionAdapterPipeline.from_pipe(base, adapter=adapter), adapter


def controlnet(pipe: Any) -> Any:
    torch.manual_seed(5)
    net = fourstroke.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8,) * 4)
    return tiny.filled(net)


def test_adapters_choose_the_adapter_form_for_text_alone() -> None:
    pipe, adapter = sd_adapter()
    again = fourstroke.AutoPipelineForText2Image.from_pipe(tiny.sd(), adapter=adapter)
    assert type(again).__name__ == "StableDiffusionAdapterPipeline" and again.adapter is adapter
    assert type(fourstroke.AutoPipelineForText2Image.from_pipe(pipe)) is type(pipe)
    plain = fourstroke.AutoPipelineForText2Image.from_pipe(pipe, adapter=None)
    assert type(plain).__name__ == "StableDiffusionPipeline"
    with pytest.warns(UserWarning, match="AutoPipelineForImage2Image leaves the T2I-Adapter out; pass adapter=None"):
        image = fourstroke.AutoPipelineForImage2Image.from_pipe(pipe)
    assert type(image).__name__ == "StableDiffusionImg2ImgPipeline"
    steered = fourstroke.AutoPipelineForText2Image.from_pipe(pipe, controlnet=controlnet(pipe))
    assert type(steered).__name__ == "StableDiffusionControlNetPipeline", "what is given counts more than what is held"


def test_several_networks_become_one_component(tmp_path: Path) -> None:
    base = tiny.sd()
    nets = [controlnet(base), controlnet(base)]
    pipe: Any = fourstroke.AutoPipelineForImage2Image.from_pipe(base, controlnet=nets)
    assert type(pipe.controlnet) is CONTAINERS["controlnet"] and list(pipe.controlnet.nets) == nets
    pipe.to(torch.float64)
    assert nets[1].dtype == torch.float64
    pipe.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("controlnet*")} == {"controlnet", "controlnet_1"}
    again = fourstroke.AutoPipelineForInpainting.from_pretrained(tmp_path)
    assert type(again).__name__ == "StableDiffusionControlNetInpaintPipeline"
    without = fourstroke.AutoPipelineForInpainting.from_pretrained(tmp_path, controlnet=None)
    assert type(without).__name__ == "StableDiffusionInpaintPipeline"


def test_a_task_that_a_model_has_no_pipeline_for_is_named(folders: dict[str, Path]) -> None:
    message = "AutoPipelineForInpainting has no pipeline for LatentConsistencyModelPipeline: there is no LatentC"
    with pytest.raises(ValueError, match=message):
        fourstroke.AutoPipelineForInpainting.from_pretrained(folders["LatentConsistencyModelPipeline"])
    with pytest.raises(TypeError, match="makes other classes: use its from_pretrained"):
        fourstroke.AutoPipelineForInpainting()


# LoRAs of pipelines that share a UNet

START: dict[str, Any] = {"image": picture(1), "strength": 0.9}


def image_to_image(pipe: Any, way: str) -> Any:
    if way == "from_pipe":
        made: Any = fourstroke.AutoPipelineForImage2Image.from_pipe(pipe)
    else:
        kind = {"StableDiffusionPipeline": "StableDiffusionImg2ImgPipeline"}.get(
            type(pipe).__name__, "StableDiffusionXLImg2ImgPipeline"
        )
        components = {name: part for name, part in pipe.components.items()}
        made = getattr(fourstroke, kind)(**components)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("way", ["from_pipe", "components"])
@pytest.mark.parametrize("make", [tiny.sd, tiny.xl])
@pytest.mark.parametrize("before", [True, False], ids=["made before", "made after"])
def test_loras_act_in_every_pipeline_that_shares_the_networks_and_leave_no_trace(
    make: Any, way: str, before: bool
) -> None:
    pipe = make()
    other = image_to_image(pipe, way) if before else None
    base, base_other = painted(pipe), painted(image_to_image(make(), way), **START)
    pipe.load_lora_weights(lora(pipe) if make is tiny.sd else unet_only(pipe), adapter_name="style")
    other = other or image_to_image(pipe, way)

    # The other pipeline alone paints first: the weights change when a picture is painted.
    styled = painted(other, **START)
    assert np.abs(styled - base_other).max() > 1 / 255
    expected = image_to_image(make(), way)
    expected.load_lora_weights(lora(pipe) if make is tiny.sd else unet_only(pipe))
    assert np.array_equal(styled, painted(expected, **START))
    assert other.get_active_adapters() == ["style"]
    other.set_adapters("style", 0.25)
    weaker = painted(pipe)
    assert np.abs(weaker - base).max() > 0
    pipe.unload_lora_weights()
    assert np.array_equal(painted(other, **START), base_other) and np.array_equal(painted(pipe), base)


def unet_only(pipe: Any) -> dict[str, torch.Tensor]:
    return {key: value for key, value in lora(pipe).items() if key.startswith("lora_unet_")}


def test_another_unet_takes_the_loras_along_and_the_old_one_gets_its_weights_back() -> None:
    pipe = tiny.sd()
    first, weights = pipe.unet, {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    base = painted(pipe)
    pipe.load_lora_weights(unet_only(pipe))
    styled = painted(pipe)
    torch.manual_seed(9)
    pipe.unet = tiny.unet()
    painted(pipe)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in first.state_dict().items())
    pipe.unet = first
    assert np.array_equal(painted(pipe), styled), "once, not on top of itself"
    pipe.unload_lora_weights()
    assert np.array_equal(painted(pipe), base)


def test_a_copied_unet_is_one_without_loras_set() -> None:
    pipe = tiny.sd()
    pipe.load_lora_weights(unet_only(pipe))
    styled = painted(pipe)
    other = fourstroke.StableDiffusionPipeline(**{**pipe.components, "unet": copy.deepcopy(pipe.unet)})
    other.set_progress_bar_config(disable=True)
    assert other.adapters is not pipe.adapters and other.get_active_adapters() == []
    pipe.unload_lora_weights()
    painted(pipe)
    assert np.array_equal(painted(other), styled), "the copy holds the merged weights"
