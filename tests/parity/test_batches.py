"""A picture depends on its own request and seed, not on the batch that it is painted in.

Where diffusers mixes the pictures of a batch up, or leaves an argument unread, what is promised is tested here against
single pictures; test_combinations compares the same pictures singly with diffusers'.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from fourstroke import Control, FreeInit, GenerateRequest, Windows

from ..fakehub import CANNY, DREAMSHAPER_LCM, INPAINTING, LORA_SD15, MOTION, SD15, T2I_CANNY, T2I_CANNY_XL, XL
from .cases import CASES
from .combinations import LATENTS, LINES, MASK, OTHER, RELIEF, START, VIDEO, Case, Pipelines, paint_case
from .pictures import EFFECT, NEGATIVE, OTHER_PROMPT, PROMPT, assert_same_pictures, unheard

pytestmark = pytest.mark.usefixtures("peer_without_words")
SEED = 11
# In the largest and on average: what the order of additions in a larger batch may change.
ROUNDING = 1 / 255

EULER_A = ("EulerAncestralDiscreteScheduler", {})
TEXT = Case("StableDiffusionPipeline", SD15, {}, None)
TEXT_XL = Case("StableDiffusionXLPipeline", XL, {}, None)
LCM = Case("LatentConsistencyModelPipeline", DREAMSHAPER_LCM, {}, None)
INPAINT_9 = Case("StableDiffusionInpaintPipeline", INPAINTING, {}, None)
CONTROL = Case("StableDiffusionControlNetPipeline", SD15, {}, None, (CANNY,))
ADAPTER = Case("StableDiffusionAdapterPipeline", SD15, {}, None, (T2I_CANNY,))
ADAPTER_XL = Case("StableDiffusionXLAdapterPipeline", XL, {}, None, (T2I_CANNY_XL,))
ANIMATE = Case("AnimateDiffPipeline", SD15, {}, None, (MOTION,))
ANIMATE_CONTROL = Case("AnimateDiffControlNetPipeline", SD15, {}, None, (MOTION, CANNY))
FACE = Case("StableDiffusionPipeline", SD15, {}, None, setup="image prompt")

GUIDED = {"guidance_scale": 1.7, "negative_prompt": NEGATIVE}
FRAMES = {"num_frames": 4, "height": 64, "width": 64}
HOLE = {"image": START, "mask_image": MASK}

# A request for one picture, the pipeline that paints it, and its scheduler.
REQUESTS: dict[str, tuple[Case, dict[str, Any]]] = {
    "text": (TEXT, GUIDED),
    "text, stochastic steps": (Case("StableDiffusionPipeline", SD15, {}, None, scheduler=EULER_A), {}),
    "XL": (TEXT_XL, GUIDED),
    "full LCM": (LCM, {"guidance_scale": 8.5}),
    "start picture": (TEXT, {"image": START, "strength": 0.6}),
    "start picture, guided, XL": (TEXT_XL, {"image": START, "strength": 0.7, **GUIDED}),
    "start picture, trimmed schedule": (TEXT, {"image": START, "strength": 0.6, "strength_mode": "trim"}),
    "mask": (TEXT, {**HOLE, "strength": 0.8}),
    "mask, whole strength": (TEXT, HOLE),
    "mask, cut out": (TEXT, {**HOLE, "padding_mask_crop": 4, "output_type": "pil"}),
    "mask, nine channels": (INPAINT_9, {**HOLE, **GUIDED}),
    "mask, nine channels, little": (INPAINT_9, {**HOLE, "strength": 0.5}),
    "ControlNet": (CONTROL, {"controls": (Control(LINES, 0.8),), **GUIDED}),
    "ControlNet, guess mode": (CONTROL, {"controls": (Control(LINES),), "guess_mode": True, **GUIDED}),
    "ControlNet, mask": (CONTROL, {"controls": (Control(LINES),), **HOLE, "strength": 0.7}),
    "T2I-Adapter": (ADAPTER, {"adapters": (Control(LINES),), **GUIDED}),
    "T2I-Adapter, XL": (ADAPTER_XL, {"adapters": (Control(LINES, 0.8, end=0.5),), **GUIDED}),
    "image prompt": (FACE, {"ip_adapter_image": RELIEF, **GUIDED}),
    "animation": (ANIMATE, {**FRAMES, **GUIDED}),
    "animation, start frames": (ANIMATE, {**FRAMES, "image": VIDEO, "strength": 0.6}),
    "animation, ControlNet": (ANIMATE_CONTROL, {**FRAMES, "controls": (Control(VIDEO),)}),
    "animation, windows": (ANIMATE, {**FRAMES, "num_frames": 6, "windows": Windows(length=4, stride=2)}),
    "animation, FreeInit": (ANIMATE, {**FRAMES, "free_init": FreeInit(iterations=2)}),
    "animation, masked frames": (ANIMATE, {**FRAMES, "image": VIDEO, "mask_image": MASK, "strength": 0.8}),
}


def generated(pipe: Any, request: dict[str, Any], **changes: Any) -> np.ndarray:
    request = {"prompt": PROMPT, "output_type": "np", **request, **changes}
    images = pipe.generate(GenerateRequest(**request)).images
    return images if isinstance(images, np.ndarray) else np.stack([np.asarray(image) for image in images]) / 255


def assert_rows(together: np.ndarray, alone: list[np.ndarray]) -> None:
    """Each picture of the batch is the one painted alone, and they are not all the same."""
    assert len(together) == len(alone)
    for one, single in zip(together, alone, strict=True):
        assert np.abs(one - single[0]).max() <= ROUNDING
    for i in range(1, len(together)):
        assert np.abs(together[i] - together[i - 1]).mean() >= EFFECT


@pytest.mark.parametrize("name", REQUESTS)
def test_a_picture_of_a_batch_is_the_picture_of_its_seed(name: str, pipelines: Pipelines, hub: Path) -> None:
    case, request = REQUESTS[name]
    pipe = pipelines("fourstroke", case)
    together = generated(pipe, request, seed=SEED, num_images_per_prompt=3)
    assert_rows(together, [generated(pipe, request, seed=SEED + i) for i in range(3)])


@pytest.mark.parametrize("name", ["text", "start picture", "mask", "ControlNet", "T2I-Adapter, XL", "animation"])
def test_a_picture_of_a_batch_of_prompts_is_the_picture_of_its_seed(name: str, pipelines: Pipelines, hub: Path) -> None:
    case, request = REQUESTS[name]
    pipe = pipelines("fourstroke", case)
    prompts = [PROMPT, OTHER_PROMPT]
    negative = {"negative_prompt": [NEGATIVE, "night"]} if "negative_prompt" in request else {}
    together = generated(pipe, request, prompt=prompts, seed=SEED, num_images_per_prompt=2, **negative)
    alone = []
    for i in range(4):
        own = {"negative_prompt": negative["negative_prompt"][i // 2]} if negative else {}
        alone.append(generated(pipe, request, prompt=prompts[i // 2], seed=SEED + i, **own))
    assert_rows(together, alone)


# Where the peer does something else


def rows_alone(pipe: Any, case: Case, rows: list[dict[str, Any]]) -> list[np.ndarray]:
    return [paint_case(pipe, case, **row) for row in rows]


def test_a_picture_a_prompt_with_several_images_a_prompt(pipelines: Pipelines, hub: Path) -> None:
    """diffusers lays the pictures out as A, B, A, B beside the prompts' P, P, Q, Q."""
    case = CASES["img2img: few"]
    pipe = pipelines("fourstroke", case)
    prompts, pictures = [PROMPT, OTHER_PROMPT], [START, OTHER]
    together = paint_case(pipe, case, prompt=prompts, image=pictures, num_images_per_prompt=2, seed=[1, 2, 3, 4])
    rows = [{"prompt": prompts[i // 2], "image": pictures[i // 2], "seed": [i + 1]} for i in range(4)]
    assert_rows(together, rows_alone(pipe, case, rows))


@pytest.mark.parametrize("name", ["T2I-Adapter: guided, images a prompt", "T2I-Adapter: XL, guided"])
@pytest.mark.parametrize("images", [1, 2])
def test_several_prompts_with_an_adapter(name: str, images: int, pipelines: Pipelines, hub: Path) -> None:
    """diffusers takes one picture only for all prompts, or gives some prompts another's picture."""
    case = CASES[name]
    pipe = pipelines("fourstroke", case)
    prompts, pictures = [PROMPT, OTHER_PROMPT], [LINES, RELIEF]
    options = {"num_images_per_prompt": images, "negative_prompt": [NEGATIVE, NEGATIVE]}
    seeds = list(range(2 * images))
    together = paint_case(pipe, case, prompt=prompts, image=pictures, seed=seeds, **options)
    rows = [
        {"prompt": prompts[i // images], "image": pictures[i // images], "seed": [i], "num_images_per_prompt": 1}
        for i in seeds
    ]
    assert_rows(together, rows_alone(pipe, case, rows))


@pytest.mark.parametrize(
    "name", ["inpaint: four channels", "inpaint: four channels, little", "inpaint: nine channels", "inpaint: XL"]
)
def test_a_generator_a_picture_when_inpainting(name: str, pipelines: Pipelines, hub: Path) -> None:
    """diffusers draws the start picture's latents from the first generator only."""
    case = CASES[name]
    pipe = pipelines("fourstroke", case)
    together = paint_case(pipe, case, num_images_per_prompt=2, seed=[4, 7])
    assert_rows(together, rows_alone(pipe, case, [{"seed": [4]}, {"seed": [7]}]))


@pytest.mark.parametrize("name", ["animation: text", "animation: video", "animation: controlled"])
def test_several_animations_a_prompt(name: str, pipelines: Pipelines, hub: Path) -> None:
    """diffusers paints one, whatever ``num_videos_per_prompt`` says."""
    case = CASES[name]
    ours, theirs = pipelines("fourstroke", case), pipelines("diffusers", case)
    together = paint_case(ours, case, num_videos_per_prompt=2, seed=[4, 7])
    alone = rows_alone(ours, case, [{"seed": [4]}, {"seed": [7]}])
    assert_rows(together, alone)
    assert_same_pictures(alone[1], paint_case(theirs, case, num_videos_per_prompt=2, seed=7))


@pytest.mark.parametrize("name", ["img2img: XL", "inpaint: XL", "ControlNet: XL, img2img", "ControlNet: XL"])
def test_the_crop_of_the_unconditional_half(name: str, pipelines: Pipelines, hub: Path) -> None:
    """diffusers' image-to-image and inpainting leave ``negative_crops_coords_top_left`` unread."""
    case = CASES[name]
    pipe = pipelines("fourstroke", case)
    seen: list[torch.Tensor] = []

    def look(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["add_time_ids"])
        return {}

    look_on = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": ["add_time_ids"]}
    crops = {"crops_coords_top_left": (8, 16), "original_size": (96, 80), "target_size": (64, 72)}
    negative = {
        "negative_crops_coords_top_left": (4, 2),
        "negative_original_size": (32, 40),
        "negative_target_size": (56, 48),
    }
    paint_case(pipe, case, **crops, **negative, **look_on)
    assert seen[0].tolist() == [[32, 40, 4, 2, 56, 48], [96, 80, 8, 16, 64, 72]]
    seen.clear()
    paint_case(pipe, case, **crops, **look_on)
    assert seen[0].tolist() == [[96, 80, 8, 16, 64, 72]] * 2


def test_a_lora_under_an_adapter(hub: Path) -> None:
    """diffusers' T2I-Adapter pipeline for SD has no LoRA; there it must come in through another pipeline."""
    case = CASES["T2I-Adapter: one"]
    ours, theirs = (Pipelines()(library, case) for library in ("fourstroke", "diffusers"))
    plain = paint_case(ours, case)
    ours.load_lora_weights(LORA_SD15)
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    with unheard("diffusers"):
        diffusers.StableDiffusionPipeline(**{name: getattr(theirs, name) for name in names}, **rest).load_lora_weights(
            LORA_SD15
        )
    expected = paint_case(theirs, case)
    found = paint_case(ours, case)
    assert_same_pictures(found, expected)
    assert np.abs(found - plain).mean() >= EFFECT


def test_latents_do_not_tell_what_is_behind_the_mask(pipelines: Pipelines, hub: Path) -> None:
    pipe = pipelines("fourstroke", INPAINT_9)
    with pytest.raises(ValueError, match="which latents do not tell: pass masked_image_latents"):
        generated(pipe, {"image": LATENTS, "mask_image": MASK})


def test_unfusing_takes_the_scale_of_fusing_back(hub: Path) -> None:
    """diffusers keeps ``lora_scale`` on the LoRA when the fusing is undone."""
    case = CASES["LoRA: style"]
    pipe = Pipelines()("fourstroke", case)
    before = paint_case(pipe, case)
    pipe.fuse_lora(lora_scale=0.5)
    assert np.abs(paint_case(pipe, case) - before).mean() >= EFFECT
    pipe.unfuse_lora()
    assert np.array_equal(paint_case(pipe, case), before)


# A form that diffusers refuses or misreads, and the one that it wants for the same thing.
FORMS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "one scale for several adapters": (
        "T2I-Adapter: XL, two",
        {"adapter_conditioning_scale": 0.5},
        {"adapter_conditioning_scale": [0.5, 0.5]},
    ),
    "a list of one scale": (
        "animation: controlled",
        {"controlnet_conditioning_scale": [0.5]},
        {"controlnet_conditioning_scale": 0.5},
    ),
    "a picture with an alpha channel": ("img2img: few", {"image": START.convert("RGBA")}, {"image": START}),
    "a grey picture": (
        "img2img: few",
        {"image": START.convert("L")},
        {"image": START.convert("L").convert("RGB")},
    ),
    "one negative prompt for all prompts": (
        "img2img: prompts",
        {"negative_prompt": NEGATIVE, "guidance_scale": 1.5},
        {"negative_prompt": [NEGATIVE, NEGATIVE], "guidance_scale": 1.5},
    ),
}


@pytest.mark.parametrize("form_name", FORMS)
def test_forms_that_the_peer_does_not_take(form_name: str, pipelines: Pipelines, hub: Path) -> None:
    name, free, strict = FORMS[form_name]
    case = CASES[name]
    ours, theirs = (pipelines(library, case) for library in ("fourstroke", "diffusers"))
    assert_same_pictures(paint_case(ours, case, **free), paint_case(theirs, case, **strict))
