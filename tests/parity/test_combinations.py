"""Tasks, conditions, LoRAs and arguments in combination: each picture is the peer's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from ..fakehub import CANNY, MOTION, REFINER, SD15, XL
from .cases import CASES
from .cases_of_arguments import ARGUMENT_CASES
from .combinations import LATENTS, LEFT_OUT, Case, Pipelines, paint_case
from .pictures import EFFECT, LIBRARIES, NEGATIVE, PROMPT, assert_same_pictures, unheard

pytestmark = pytest.mark.usefixtures("peer_without_words")


@pytest.mark.parametrize("name", [*CASES, *ARGUMENT_CASES])
def test_combination(name: str, pipelines: Pipelines, hub: Path) -> None:
    case = {**CASES, **ARGUMENT_CASES}[name]
    ours = paint_case(pipelines("fourstroke", case), case)
    theirs = paint_case(pipelines("diffusers", case), case)
    assert_same_pictures(ours, theirs)
    other = paint_case(pipelines("fourstroke", case, setup=case.without is not None), case, **(case.without or {}))
    assert np.abs(ours - other).mean() >= EFFECT


DEFAULTS = {
    case.pipeline: case
    for case in CASES.values()
    if case.setup is None and case.model in (SD15, XL) and "output_type" not in case.call
}
REQUIRED = ("image", "mask_image", "control_image", "video", "conditioning_frames")


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_of_the_call(name: str, pipelines: Pipelines, hub: Path) -> None:
    """Nothing but a prompt and the pictures, four steps and four frames: everything else as each class has it."""
    case = DEFAULTS[name]
    call = {name: value for name, value in case.call.items() if name in REQUIRED}
    call |= {"guidance_scale": LEFT_OUT} | ({"num_frames": 4} if "num_frames" in case.call else {})
    plain = Case(name, case.model, call, None, case.nets, ("DDIMScheduler", {"clip_sample": False}))
    assert_same_pictures(*(paint_case(pipelines(library, plain), plain) for library in LIBRARIES))


def frozen(value: Any) -> Any:
    """An argument's content, to compare later."""
    if isinstance(value, (list, tuple)):
        return type(value), [frozen(one) for one in value]
    if isinstance(value, Mapping):
        return {name: frozen(one) for name, one in value.items()}
    if isinstance(value, PIL.Image.Image):
        return value.size, value.mode, value.tobytes()
    return value.tolist() if isinstance(value, (np.ndarray, torch.Tensor)) else value


@pytest.mark.parametrize(
    "name",
    [
        "start pictures: list of tensors",
        "masks: tensors",
        "inpaint: nine channels, latents in place of pictures",
        "control pictures: two, a list a prompt",
        "control pictures: window in lists",
        "adapter pictures: tensor",
        "frames and videos: given noise",
        "LoRA: style, scaled by the call",
        "image prompt: several pictures",
    ],
)
def test_the_callers_arguments_are_left_alone(name: str, pipelines: Pipelines, hub: Path) -> None:
    case = {**CASES, **ARGUMENT_CASES}[name]
    before = frozen(case.call)
    paint_case(pipelines("fourstroke", case), case)
    assert frozen(case.call) == before


# What needs more than one call


def pair(pipelines: Pipelines, case: Case) -> tuple[Any, Any]:
    ours, theirs = (pipelines(library, case) for library in LIBRARIES)
    return ours, theirs


LITTLE = {
    "SD": CASES["img2img: few"],
    "XL": CASES["img2img: XL, style"],
    "ControlNet": CASES["ControlNet: img2img"],
    "ControlNet XL": CASES["ControlNet: XL, img2img"],
    "full LCM": CASES["img2img: full LCM"],
    "inpaint": CASES["inpaint: four channels"],
    "video": CASES["animation: video"],
}


@pytest.mark.parametrize("name", LITTLE)
def test_strength_of_less_than_a_step_runs_one(name: str, pipelines: Pipelines, hub: Path) -> None:
    """The last step of the schedule, as the peer runs it at the least strength that does not fail there."""
    case = LITTLE[name]
    ours, theirs = pair(pipelines, case)
    picture = paint_case(ours, case, strength=0.1)
    if name == "full LCM":
        assert_same_pictures(picture, paint_case(theirs, case, strength=0.1))
        return
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        paint_case(theirs, case, strength=0.1)
    assert_same_pictures(picture, paint_case(theirs, case, strength=0.25))
    assert_same_pictures(paint_case(ours, case, strength=0.01), picture)


OUTPUTS = {
    "img2img": CASES["img2img: few"],
    "ControlNet": CASES["ControlNet: one"],
    "XL inpaint": CASES["inpaint: XL"],
    "T2I-Adapter": CASES["T2I-Adapter: XL"],
    "animation": CASES["animation: text"],
    "video": CASES["animation: video"],
}


@pytest.mark.parametrize("output_type", ["pil", "pt", "latent"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_output_types(name: str, output_type: str, pipelines: Pipelines, hub: Path) -> None:
    case = OUTPUTS[name]
    found = []
    for pipe in pair(pipelines, case):
        call = {"prompt": PROMPT, "num_inference_steps": 4, "guidance_scale": 1.0, **case.call}
        call["output_type"] = output_type
        with unheard(pipe):
            output = pipe(**call, generator=torch.Generator().manual_seed(0))
        value = output.frames if hasattr(output, "frames") else output.images
        found.append(sum(value, []) if isinstance(value, list) and isinstance(value[0], list) else value)
    ours, theirs = found
    if output_type == "pil":
        assert {type(picture) for picture in ours} == {type(picture) for picture in theirs} == {PIL.Image.Image}
        assert_same_pictures(*(np.stack([np.asarray(picture) for picture in value]) / 255 for value in found))
    else:
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


EMBEDDED = {
    "img2img": CASES["img2img: guided, images a prompt"],
    "inpaint": CASES["inpaint: nine channels, guided"],
    "ControlNet": CASES["ControlNet: guided"],
    "XL img2img": CASES["img2img: XL"],
    "XL inpaint": CASES["inpaint: XL"],
    "XL ControlNet": CASES["ControlNet: XL"],
    "XL T2I-Adapter": CASES["T2I-Adapter: XL, guided"],
    "animation": CASES["animation: negative prompt"],
}


@pytest.mark.parametrize("name", EMBEDDED)
def test_embeddings_in_place_of_prompts(name: str, pipelines: Pipelines, hub: Path) -> None:
    case = EMBEDDED[name]
    ours, theirs = pair(pipelines, case)
    prompts = (PROMPT, None) if "XL" in case.pipeline else (PROMPT,)
    with unheard(theirs):
        encoded = theirs.encode_prompt(*prompts, "cpu", 1, True, negative_prompt=NEGATIVE)
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    given = {**dict(zip(names, encoded, strict=False)), "prompt": None, "negative_prompt": None}
    picture = paint_case(ours, case, **given)
    assert_same_pictures(picture, paint_case(theirs, case, **given))
    assert_same_pictures(picture, paint_case(ours, case))


@pytest.mark.parametrize("name", ["img2img: few", "ControlNet: one", "inpaint: nine channels", "animation: text"])
def test_clip_skip(name: str, pipelines: Pipelines, hub: Path) -> None:
    """diffusers 0.42 fails here with transformers 5, so its embeddings are made by hand."""
    case = CASES[name]
    ours, theirs = pair(pipelines, case)
    tokens = theirs.tokenizer([PROMPT, ""], padding="max_length", max_length=77, return_tensors="pt")
    output = theirs.text_encoder(tokens.input_ids, output_hidden_states=True)
    norm = dict(theirs.text_encoder.named_modules())["final_layer_norm"]
    positive, negative = norm(output.hidden_states[-2])[:1].detach(), output.last_hidden_state[1:].detach()
    given = {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}
    picture = paint_case(ours, case, clip_skip=1)
    assert_same_pictures(picture, paint_case(theirs, case, **given))
    assert np.abs(picture - paint_case(ours, case)).mean() >= EFFECT


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_base_and_refiner_share_a_schedule(guidance_scale: float, pipelines: Pipelines, hub: Path) -> None:
    """An ensemble of experts: the base leaves latents at 60 % of the way, the refiner goes on from there."""
    euler = ("EulerDiscreteScheduler", {})
    base = Case("StableDiffusionXLPipeline", XL, {}, None, scheduler=euler)
    refiner = Case("StableDiffusionXLImg2ImgPipeline", REFINER, {}, None, scheduler=euler)
    call = {"num_inference_steps": 10, "guidance_scale": guidance_scale}
    first, second = [], []
    for library in LIBRARIES:
        pipe = pipelines(library, base)
        with unheard(pipe):
            generator = torch.Generator().manual_seed(0)
            latents = pipe(PROMPT, denoising_end=0.6, output_type="latent", generator=generator, **call).images
        first.append(latents)
        second.append(paint_case(pipelines(library, refiner), refiner, image=latents, denoising_start=0.6, **call))
    torch.testing.assert_close(*first, rtol=1e-4, atol=1e-4 * float(first[1].abs().max()))
    assert_same_pictures(*second)
    pipe = pipelines("fourstroke", refiner)
    whole = paint_case(pipe, refiner, image=first[0], strength=0.4, **call)
    assert np.abs(whole - second[0]).mean() >= EFFECT


@pytest.mark.parametrize("part", [{"denoising_start": 0.5}, {"denoising_end": 0.6}])
@pytest.mark.parametrize("name", ["img2img: XL", "inpaint: XL"])
def test_part_of_a_schedule(name: str, part: dict[str, float], pipelines: Pipelines, hub: Path) -> None:
    case = CASES[name]
    ours, theirs = pair(pipelines, case)
    call = {"num_inference_steps": 8, "strength": 0.9, **part}
    if "denoising_start" in part:
        call["image"] = LATENTS * 3
    picture = paint_case(ours, case, **call)
    assert_same_pictures(picture, paint_case(theirs, case, **call))
    call = {"image": case.call["image"], "num_inference_steps": 8, "strength": 0.9}
    assert np.abs(picture - paint_case(ours, case, **call)).mean() >= EFFECT


FREE_INIT: dict[str, dict[str, Any]] = {
    "Butterworth": {"num_iters": 2},
    "fast": {"num_iters": 3, "use_fast_sampling": True},
    "Gaussian": {"num_iters": 2, "method": "gaussian", "spatial_stop_frequency": 0.4},
}


@pytest.mark.parametrize("options", FREE_INIT.values(), ids=list(FREE_INIT))
def test_free_init(options: dict[str, Any], pipelines: Pipelines, hub: Path) -> None:
    case = Case("AnimateDiffPipeline", SD15, {**CASES["animation: text"].call}, None, (MOTION,), setup=None)
    plain = paint_case(pipelines("fourstroke", case), case)
    found = []
    for pipe in pair(pipelines, case):
        pipe.enable_free_init(**options)
        found.append(paint_case(pipe, case))
        pipe.disable_free_init()
    assert_same_pictures(*found)
    assert np.abs(found[0] - plain).mean() >= EFFECT
    assert np.array_equal(paint_case(pipelines("fourstroke", case), case), plain)


@pytest.mark.parametrize("name", ["image prompt: text, guided", "image prompt: XL", "image prompt: ControlNet"])
def test_embeddings_in_place_of_image_prompts(name: str, pipelines: Pipelines, hub: Path) -> None:
    case = CASES[name]
    ours, theirs = pair(pipelines, case)
    guided = case.call["guidance_scale"] > 1
    embeds = theirs.prepare_ip_adapter_image_embeds(case.call["ip_adapter_image"], None, "cpu", 1, guided)
    given = {"ip_adapter_image": None, "ip_adapter_image_embeds": embeds}
    picture = paint_case(ours, case, **given)
    assert_same_pictures(picture, paint_case(theirs, case, **given))
    assert_same_pictures(picture, paint_case(ours, case))


@pytest.mark.parametrize("name", ["image prompt: text", "image prompt: XL"])
def test_scale_and_end_of_image_prompts(name: str, hub: Path) -> None:
    case = CASES[name]
    found = []
    for pipe in pair(Pipelines(), case):
        pipe.set_ip_adapter_scale(0.3)
        scaled = paint_case(pipe, case)
        pipe.unload_ip_adapter()
        found.append((scaled, paint_case(pipe, case, ip_adapter_image=LEFT_OUT)))
    for ours, theirs in zip(*found, strict=True):
        assert_same_pictures(ours, theirs)
    assert np.abs(found[0][0] - found[0][1]).mean() >= EFFECT


def test_one_pipeline_after_another(hub: Path) -> None:
    """A LoRA stays where it is while `from_pipe` goes from task to task."""
    found: dict[str, list[np.ndarray]] = {}
    for library, module in LIBRARIES.items():
        text = Pipelines()(library, Case("StableDiffusionPipeline", SD15, {}, None, setup="LCM-LoRA"))
        with unheard(library):
            image = module.AutoPipelineForImage2Image.from_pipe(text)
            inpaint = module.AutoPipelineForInpainting.from_pipe(image)
            net = module.ControlNetModel.from_pretrained(CANNY)
            control = module.AutoPipelineForText2Image.from_pipe(inpaint, controlnet=net)
        assert type(control).__name__ == "StableDiffusionControlNetPipeline"
        names = ("text: odd size", "img2img: few", "inpaint: four channels", "ControlNet: one")
        for pipe, name in zip((text, image, inpaint, control), names, strict=True):
            pipe.set_progress_bar_config(disable=True)
            found.setdefault(library, []).append(paint_case(pipe, CASES[name]))
    for ours, theirs in zip(*found.values(), strict=True):
        assert_same_pictures(ours, theirs)


def test_a_lora_that_comes_and_goes_with_a_control(hub: Path) -> None:
    case = CASES["ControlNet: LCM-LoRA"]
    ours, theirs = pair(Pipelines(), case)
    steps: list[Callable[[Any], None]] = [
        lambda pipe: pipe.set_adapters(pipe.get_active_adapters(), 0.5),
        # At another scale diffusers keeps it when the fusing is undone.
        lambda pipe: pipe.fuse_lora(),
        lambda pipe: pipe.unfuse_lora(),
        lambda pipe: pipe.disable_lora(),
        lambda pipe: pipe.enable_lora(),
        lambda pipe: pipe.unload_lora_weights(),
    ]
    pictures = [paint_case(ours, case)]
    for step in steps:
        step(ours)
        with unheard(theirs):
            step(theirs)
        pictures.append(paint_case(ours, case))
        assert_same_pictures(pictures[-1], paint_case(theirs, case))
    plain = paint_case(Pipelines()("fourstroke", case, setup=False), case)
    assert np.array_equal(pictures[-1], plain) and np.array_equal(pictures[-3], plain), "undone to the bit"


def test_every_step_of_every_task(pipelines: Pipelines, hub: Path) -> None:
    """Which timesteps run, and the latents after each."""
    for name in ("img2img: eight steps", "inpaint: four channels, little", "ControlNet: guided", "animation: video"):
        case = CASES[name]
        seen: list[list[tuple[int, int, torch.Tensor]]] = []
        for pipe in pair(pipelines, case):
            steps: list[tuple[int, int, torch.Tensor]] = []

            def look(_pipe: Any, step: int, timestep: Any, tensors: Any, steps: Any = steps) -> dict[str, Any]:
                steps.append((step, int(timestep), tensors["latents"].clone()))
                return {}

            paint_case(pipe, case, callback_on_step_end=look)
            seen.append(steps)
        assert len(seen[0]) >= 2 and [step[:2] for step in seen[0]] == [step[:2] for step in seen[1]]
        for ours, theirs in zip(*seen, strict=True):
            torch.testing.assert_close(ours[2], theirs[2], rtol=1e-4, atol=1e-4 * float(theirs[2].abs().max()))
