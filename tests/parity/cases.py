"""What `test_combinations` paints with both libraries: tasks, steered and styled, with the arguments that people use.

Every case names what may be left out of it (`Case.without`); the picture must change when it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ..fakehub import (
    CANNY,
    CANNY_XL,
    DEPTH,
    DEPTH_XL,
    DREAMSHAPER_LCM,
    INPAINTING,
    MOTION,
    MOTION_V2,
    MOTION_XL,
    REFINER,
    SD15,
    SD21,
    SSD1B,
    T2I_CANNY,
    T2I_CANNY_XL,
    T2I_DEPTH,
    T2I_DEPTH_XL,
    XL,
    XL_INPAINTING,
)
from .combinations import (
    ARRAY,
    EDITED,
    GUIDED,
    LARGE,
    LARGE_MASK,
    LATENTS,
    LEFT_OUT,
    LINE_FRAMES,
    LINES,
    MASK,
    NO_ADAPTER,
    NO_CONTROL,
    NO_NEGATIVE,
    OTHER,
    OTHER_VIDEO,
    OWN_STEPS,
    PROMPTS,
    RELIEF,
    SAMPLERS,
    START,
    TENSOR,
    VIDEO,
    WIDE,
    Case,
    brighten,
    exchange_text,
    interrupt,
    stop_guidance,
)
from .pictures import PROMPT, hole, shapes


def sampled(case: Callable[..., Case], name: str, call: Mapping[str, Any], without: Mapping[str, Any]) -> Case:
    scheduler, options = SAMPLERS[name]
    return case({**call, **options}, without, scheduler=scheduler)


text = partial(Case, "StableDiffusionPipeline", SD15)
text_xl = partial(Case, "StableDiffusionXLPipeline", XL)

TEXT = {
    "LCM-LoRA at another scale": text({"cross_attention_kwargs": {"scale": 0.6}}, None, setup="LCM-LoRA"),
    "odd size": text({"height": 72, "width": 88, **GUIDED}, NO_NEGATIVE),
    "latents edited": text({"callback_on_step_end": brighten}, {"callback_on_step_end": LEFT_OUT}),
    "text edited": text(
        {
            "callback_on_step_end": exchange_text,
            "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
            "guidance_scale": 1.5,
        },
        {"callback_on_step_end": LEFT_OUT},
    ),
    "guidance ended half-way": text(
        {
            "callback_on_step_end": stop_guidance,
            "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
            "guidance_scale": 2.0,
        },
        {"callback_on_step_end": LEFT_OUT},
    ),
    "XL, guidance ended half-way": text_xl(
        {
            "callback_on_step_end": stop_guidance,
            "callback_on_step_end_tensor_inputs": ["prompt_embeds", "add_text_embeds", "add_time_ids"],
            "guidance_scale": 2.0,
        },
        {"callback_on_step_end": LEFT_OUT},
    ),
    "interrupted": text({"callback_on_step_end": interrupt}, {"callback_on_step_end": LEFT_OUT}),
    "Euler's sigmas": text(
        {"sigmas": [14.6, 5.0, 1.5, 0.4], "num_inference_steps": 4},
        {"sigmas": [14.6, 7.0, 3.0, 0.4]},
        scheduler=("EulerDiscreteScheduler", {}),
    ),
    "TCD": sampled(text, "TCD", {}, {"eta": 0.9}),
    "Euler a": sampled(text, "Euler a", GUIDED, NO_NEGATIVE),
    "DPM++ 2M Karras": sampled(text, "DPM++ 2M Karras", {}, {"guidance_scale": 1.5}),
    "v-prediction, DPM++ 2M": sampled(partial(Case, "StableDiffusionPipeline", SD21), "DPM++ 2M", {}, EDITED),
    "full LCM, prompts times images": Case(
        "LatentConsistencyModelPipeline",
        DREAMSHAPER_LCM,
        {**PROMPTS, "num_images_per_prompt": 2, "guidance_scale": 8.5},
        {"guidance_scale": 3.0},
    ),
    "SSD-1B": Case("StableDiffusionXLPipeline", SSD1B, {**PROMPTS, **GUIDED}, None, setup="LCM-LoRA SSD-1B"),
}

LORA = {
    name: text_xl({"guidance_scale": 1.4}, None, setup=name)
    for name in (
        "style",
        "fuse",
        "fuse and unload",
        "fuse one and unload",
        "fuse the UNet's",
        "unfuse and choose",
        "delete one",
        "disable and enable",
        "load again",
        "by block",
    )
} | {
    "style, scaled by the call": text_xl({"cross_attention_kwargs": {"scale": 0.5}}, None, setup="style"),
    "style, two negative prompts": text_xl(
        {**GUIDED, "negative_prompt_2": PROMPT}, {"negative_prompt_2": None}, setup="style"
    ),
}

img2img = partial(Case, "StableDiffusionImg2ImgPipeline", SD15)
img2img_xl = partial(Case, "StableDiffusionXLImg2ImgPipeline", XL)
lcm_img2img = partial(Case, "LatentConsistencyModelImg2ImgPipeline", DREAMSHAPER_LCM)
FROM_START = {"image": START, "strength": 0.6}
FROM_OTHER = {"image": OTHER}

IMG2IMG = {
    "few": img2img(FROM_START, FROM_OTHER),
    "whole schedule": img2img({"image": START, "strength": 1.0}, {"strength": 0.75}),
    "eight steps": img2img(
        {"image": START, "strength": 0.3, "num_inference_steps": 8, "guidance_scale": 1.5}, FROM_OTHER
    ),
    "guided, images a prompt": img2img({**FROM_START, **GUIDED, "num_images_per_prompt": 2}, NO_NEGATIVE),
    "prompts": img2img({**FROM_START, **PROMPTS}, FROM_OTHER),
    "prompts times images": img2img({**FROM_START, **PROMPTS, "num_images_per_prompt": 2}, FROM_OTHER),
    "a picture a prompt": img2img({**FROM_START, **PROMPTS, "image": [START, OTHER]}, {"image": [START, START]}),
    "a generator a picture": img2img({**FROM_START, **PROMPTS, "seed": [3, 1]}, {"seed": [3, 2]}),
    "odd size": img2img({"image": WIDE, "strength": 0.8}, {"image": shapes(1, (88, 72))}),
    "array": img2img({**FROM_START, "image": ARRAY}, FROM_OTHER),
    "tensor": img2img({**FROM_START, "image": TENSOR}, FROM_OTHER),
    "latents": img2img({**FROM_START, "image": LATENTS}, FROM_OTHER),
    "custom timesteps": img2img({**FROM_START, "timesteps": [999, 679, 339, 99], "strength": 0.8}, {"strength": 0.5}),
    "Euler's sigmas": img2img(
        {"image": START, "sigmas": [14.6, 5.0, 1.5, 0.4], "num_inference_steps": 4, "strength": 0.75},
        FROM_OTHER,
        scheduler=("EulerDiscreteScheduler", {}),
    ),
    "latents edited": img2img({**FROM_START, "callback_on_step_end": brighten}, {"callback_on_step_end": LEFT_OUT}),
    "guidance ended half-way": img2img(
        {
            "image": START,
            "strength": 0.8,
            "callback_on_step_end": stop_guidance,
            "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
            "guidance_scale": 2.0,
        },
        {"callback_on_step_end": LEFT_OUT},
    ),
    "LCM-LoRA": img2img(FROM_START, None, setup="LCM-LoRA"),
    "v-prediction": Case(
        "StableDiffusionImg2ImgPipeline", SD21, {**FROM_START, **OWN_STEPS}, FROM_OTHER, scheduler=("DDIMScheduler", {})
    ),
    "full LCM": lcm_img2img({"image": START, "strength": 0.5, "guidance_scale": 8.5}, {"guidance_scale": 4.0}),
    "full LCM, another grid": lcm_img2img(
        {"image": START, "strength": 0.5, "original_inference_steps": 25, "num_images_per_prompt": 2},
        {"original_inference_steps": 50},
    ),
    "full LCM, little": lcm_img2img({"image": START, "strength": 0.2, **PROMPTS}, FROM_OTHER),
    "XL": img2img_xl({"image": START, "strength": 0.8, **GUIDED}, NO_NEGATIVE),
    "XL, prompts times images": img2img_xl({**FROM_START, **PROMPTS, "num_images_per_prompt": 2}, FROM_OTHER),
    "XL, sizes": img2img_xl(
        {**FROM_START, "guidance_scale": 2.0, "original_size": (96, 128), "target_size": (48, 64)},
        {"original_size": None, "target_size": None},
    ),
    "XL, crop": img2img_xl({**FROM_START, "crops_coords_top_left": (8, 16)}, {"crops_coords_top_left": (0, 0)}),
    "XL, negative sizes": img2img_xl(
        {
            **FROM_START,
            "guidance_scale": 2.0,
            "negative_original_size": (32, 32),
            "negative_target_size": (96, 96),
        },
        {"negative_original_size": None, "negative_target_size": None},
    ),
    "XL, guidance rescaled": img2img_xl(
        {**FROM_START, "guidance_scale": 2.0, "guidance_rescale": 0.7}, {"guidance_rescale": 0.0}
    ),
    "XL, style": img2img_xl(FROM_START, None, setup="style"),
    "refiner": Case(
        "StableDiffusionXLImg2ImgPipeline",
        REFINER,
        {
            "image": START,
            "strength": 0.8,
            "guidance_scale": 2.0,
            "aesthetic_score": 9.0,
            "negative_aesthetic_score": 1.0,
        },
        {"aesthetic_score": 2.0},
    ),
    "refiner, negative score": Case(
        "StableDiffusionXLImg2ImgPipeline",
        REFINER,
        {**FROM_START, **OWN_STEPS, "negative_aesthetic_score": 9.0, "original_size": (96, 96)},
        {"negative_aesthetic_score": 1.0},
        scheduler=("EulerDiscreteScheduler", {}),
    ),
    "SSD-1B": Case("StableDiffusionXLImg2ImgPipeline", SSD1B, FROM_START, None, setup="LCM-LoRA SSD-1B"),
} | {name: sampled(img2img, name, {"image": START, "strength": 0.7}, FROM_OTHER) for name in SAMPLERS}

inpaint = partial(Case, "StableDiffusionInpaintPipeline", SD15)
inpaint_9 = partial(Case, "StableDiffusionInpaintPipeline", INPAINTING)
inpaint_xl = partial(Case, "StableDiffusionXLInpaintPipeline", XL)
HOLE = {"image": START, "mask_image": MASK}
ALL_WHITE = {"mask_image": hole().point(lambda _: 255)}
CUT_OUT = {"image": LARGE, "mask_image": LARGE_MASK, "padding_mask_crop": 8, "output_type": "pil"}
WHOLE = {"padding_mask_crop": None, "height": 96, "width": 112}

INPAINT = {
    "four channels": inpaint(HOLE, ALL_WHITE),
    "four channels, guided": inpaint({**HOLE, **GUIDED, "strength": 0.8}, NO_NEGATIVE),
    "four channels, little": inpaint({**HOLE, "strength": 0.4, "num_inference_steps": 8}, FROM_OTHER),
    "four channels, images a prompt": inpaint({**HOLE, "num_images_per_prompt": 2}, FROM_OTHER),
    "four channels, prompts": inpaint({**HOLE, **PROMPTS, "strength": 0.7}, FROM_OTHER),
    "four channels, a picture and a mask a prompt": inpaint(
        {**PROMPTS, "image": [START, OTHER], "mask_image": [MASK, MASK.rotate(180)], "strength": 0.9},
        {"image": [OTHER, START]},
    ),
    "four channels, cut out": inpaint(CUT_OUT, WHOLE),
    "four channels, cut out, little": inpaint({**CUT_OUT, "strength": 0.6, "padding_mask_crop": 20}, WHOLE),
    "four channels, size": inpaint({**HOLE, "height": 48, "width": 88}, FROM_OTHER),
    "four channels, given noise": inpaint({**HOLE, "latents": LATENTS}, {"latents": None}),
    "four channels, latents edited": inpaint(
        {**HOLE, "callback_on_step_end": brighten}, {"callback_on_step_end": LEFT_OUT}
    ),
    "four channels, custom timesteps": inpaint(
        {**HOLE, "timesteps": [999, 679, 339, 99]}, {"timesteps": [999, 799, 199, 99]}
    ),
    "four channels, LCM-LoRA": inpaint({**HOLE, "strength": 0.8}, None, setup="LCM-LoRA"),
    "nine channels": inpaint_9(HOLE, FROM_OTHER),
    "nine channels, guided": inpaint_9({**HOLE, **GUIDED, "num_images_per_prompt": 2}, NO_NEGATIVE),
    "nine channels, little": inpaint_9({**HOLE, "strength": 0.6}, FROM_OTHER),
    "nine channels, another mask": inpaint_9(HOLE, {"mask_image": MASK.rotate(180)}),
    "nine channels, prompts": inpaint_9({**HOLE, **PROMPTS}, FROM_OTHER),
    "nine channels, cut out": inpaint_9(CUT_OUT, WHOLE),
    "nine channels, masked latents": inpaint_9(
        {**HOLE, "masked_image_latents": LATENTS}, {"masked_image_latents": None}
    ),
    "nine channels, latents in place of pictures": inpaint_9(
        {"image": LATENTS, "mask_image": MASK, "masked_image_latents": LATENTS.flip(3), "strength": 0.7},
        {"masked_image_latents": LATENTS},
    ),
    "nine channels, given noise": inpaint_9({**HOLE, "latents": LATENTS}, {"latents": None}),
    "nine channels, LCM-LoRA": inpaint_9(HOLE, None, setup="LCM-LoRA"),
    "nine channels, Euler": sampled(inpaint_9, "Euler", HOLE, FROM_OTHER),
    "XL": inpaint_xl({**HOLE, **GUIDED}, NO_NEGATIVE),
    "XL, little": inpaint_xl({**HOLE, "strength": 0.5}, FROM_OTHER),
    "XL, cut out": inpaint_xl(CUT_OUT, WHOLE),
    "XL, latents": inpaint_xl({"image": LATENTS, "mask_image": MASK, "strength": 0.8}, FROM_OTHER),
    "XL, sizes": inpaint_xl(
        {**HOLE, "original_size": (96, 128), "target_size": (48, 64)}, {"original_size": None, "target_size": None}
    ),
    "XL, prompts times images": inpaint_xl({**HOLE, **PROMPTS, "num_images_per_prompt": 2}, FROM_OTHER),
    "XL, style": inpaint_xl({**HOLE, "strength": 0.8}, None, setup="style"),
    "XL, nine channels": Case(
        "StableDiffusionXLInpaintPipeline", XL_INPAINTING, {**HOLE, "strength": 0.8, **GUIDED}, FROM_OTHER
    ),
} | {
    f"four channels, {name}": sampled(inpaint, name, {**HOLE, "strength": 0.8}, FROM_OTHER)
    for name in ("DDIM", "Euler a", "DPM++ 2M", "TCD")
}

BOTH, BOTH_XL = (CANNY, DEPTH), (CANNY_XL, DEPTH_XL)
control = partial(Case, "StableDiffusionControlNetPipeline", SD15, nets=(CANNY,))
controls = partial(control, nets=BOTH)
control_xl = partial(Case, "StableDiffusionXLControlNetPipeline", XL, nets=(CANNY_XL,))
control_img2img = partial(Case, "StableDiffusionControlNetImg2ImgPipeline", SD15, nets=(CANNY,))
control_inpaint = partial(Case, "StableDiffusionControlNetInpaintPipeline", SD15, nets=(CANNY,))
control_img2img_xl = partial(Case, "StableDiffusionXLControlNetImg2ImgPipeline", XL, nets=(CANNY_XL,))
control_inpaint_xl = partial(Case, "StableDiffusionXLControlNetInpaintPipeline", XL, nets=(CANNY_XL,))
UNDER = {"image": LINES}
TWO = {"image": [LINES, RELIEF], "controlnet_conditioning_scale": [0.8, 0.5]}

CONTROL = {
    "one": control(UNDER, NO_CONTROL),
    "guided": control({**UNDER, **GUIDED, "controlnet_conditioning_scale": 0.7}, NO_CONTROL),
    "guess mode, guided": control({**UNDER, "guidance_scale": 2.0, "guess_mode": True}, {"guess_mode": False}),
    "guess mode": control({**UNDER, "prompt": "", "guess_mode": True}, {"guess_mode": False}),
    "window": control(
        {**UNDER, "control_guidance_start": 0.25, "control_guidance_end": 0.75}, {"control_guidance_start": 0.0}
    ),
    "early": control({**UNDER, "control_guidance_end": 0.5}, {"control_guidance_end": 1.0}),
    "prompts times images": control({**UNDER, **PROMPTS, "num_images_per_prompt": 2}, NO_CONTROL),
    "a picture a prompt": control({**PROMPTS, "image": [LINES, RELIEF]}, {"image": [LINES, LINES]}),
    "larger picture": control({"image": LARGE, "height": 64, "width": 64}, NO_CONTROL),
    "odd size": control({"image": WIDE, "guidance_scale": 1.5}, NO_CONTROL),
    "a generator a picture": control({**UNDER, **PROMPTS, "seed": [5, 2]}, {"seed": [5, 3]}),
    "array": control({"image": ARRAY}, NO_CONTROL),
    "tensor": control({"image": TENSOR}, NO_CONTROL),
    "two": controls(TWO, {"controlnet_conditioning_scale": [0.8, 0.0]}),
    "two, one number for both": controls(
        {"image": [LINES, RELIEF], "controlnet_conditioning_scale": 0.6, **GUIDED},
        {"controlnet_conditioning_scale": 0.0},
    ),
    "two, windows": controls(
        {**TWO, "control_guidance_start": [0.0, 0.5], "control_guidance_end": [0.5, 1.0]},
        {"control_guidance_end": [1.0, 1.0]},
    ),
    "two, guess mode": controls({**TWO, "guess_mode": True, "guidance_scale": 1.5}, {"guess_mode": False}),
    "latents edited": control({**UNDER, "callback_on_step_end": brighten}, {"callback_on_step_end": LEFT_OUT}),
    "custom timesteps": control({**UNDER, "timesteps": [999, 679, 339]}, NO_CONTROL),
    "LCM-LoRA": control({**UNDER, "cross_attention_kwargs": {"scale": 1}}, None, setup="LCM-LoRA"),
    "DDIM": sampled(control, "DDIM", UNDER, NO_CONTROL),
    "Euler": sampled(control, "Euler", UNDER, NO_CONTROL),
    "TCD": sampled(control, "TCD", UNDER, NO_CONTROL),
    "img2img": control_img2img({**FROM_START, "control_image": LINES}, NO_CONTROL),
    "img2img, guided": control_img2img(
        {**FROM_START, "control_image": LINES, **GUIDED, "guess_mode": True}, FROM_OTHER
    ),
    "img2img, two": control_img2img(
        {**FROM_START, "control_image": [LINES, RELIEF], "control_guidance_start": [0.0, 0.5]},
        {"control_guidance_start": [0.5, 0.5]},
        nets=BOTH,
    ),
    "img2img, prompts times images": control_img2img(
        {**FROM_START, **PROMPTS, "control_image": LINES, "num_images_per_prompt": 2}, NO_CONTROL
    ),
    "img2img, Euler": sampled(control_img2img, "Euler", {**FROM_START, "control_image": LINES}, NO_CONTROL),
    "inpaint": control_inpaint({**HOLE, "control_image": LINES}, NO_CONTROL),
    "inpaint, guided, little": control_inpaint({**HOLE, "control_image": LINES, **GUIDED, "strength": 0.7}, NO_CONTROL),
    "inpaint, cut out": control_inpaint({**CUT_OUT, "control_image": shapes(17, (112, 96))}, NO_CONTROL),
    "inpaint, two, guess mode": control_inpaint(
        {**HOLE, "control_image": [LINES, RELIEF], "guess_mode": True, "guidance_scale": 1.5},
        {"guess_mode": False},
        nets=BOTH,
    ),
    "inpaint, nine channels": Case(
        "StableDiffusionControlNetInpaintPipeline",
        INPAINTING,
        {**HOLE, "control_image": LINES, "num_images_per_prompt": 2},
        NO_CONTROL,
        nets=(CANNY,),
    ),
    "inpaint, DDIM": sampled(control_inpaint, "DDIM", {**HOLE, "control_image": LINES}, NO_CONTROL),
    "XL": control_xl({**UNDER, **GUIDED}, NO_CONTROL),
    "XL, guess mode": control_xl({**UNDER, "guidance_scale": 1.5, "guess_mode": True}, {"guess_mode": False}),
    "XL, two": control_xl(
        {**TWO, "control_guidance_end": [1.0, 0.5]}, {"controlnet_conditioning_scale": [0.8, 0.0]}, nets=BOTH_XL
    ),
    "XL, sizes": control_xl(
        {**UNDER, "original_size": (96, 128), "crops_coords_top_left": (8, 0)},
        {"original_size": None, "crops_coords_top_left": (0, 0)},
    ),
    "XL, style": control_xl(UNDER, None, setup="style"),
    "XL, img2img": control_img2img_xl({"image": START, "control_image": LINES, **GUIDED}, NO_CONTROL),
    "XL, img2img, two": control_img2img_xl(
        {**FROM_START, "control_image": [LINES, RELIEF], "num_images_per_prompt": 2},
        NO_CONTROL,
        nets=BOTH_XL,
    ),
    "XL, inpaint": control_inpaint_xl({**HOLE, "control_image": LINES, **GUIDED}, NO_CONTROL),
    "XL, inpaint, little": control_inpaint_xl({**HOLE, "control_image": LINES, "strength": 0.6}, FROM_OTHER),
    "XL, inpaint, cut out": control_inpaint_xl({**CUT_OUT, "control_image": shapes(17, (112, 96))}, NO_CONTROL),
}

adapter = partial(Case, "StableDiffusionAdapterPipeline", SD15, nets=(T2I_CANNY,))
adapters = partial(adapter, nets=(T2I_CANNY, T2I_DEPTH))
adapter_xl = partial(Case, "StableDiffusionXLAdapterPipeline", XL, nets=(T2I_CANNY_XL,))
adapters_xl = partial(adapter_xl, nets=(T2I_CANNY_XL, T2I_DEPTH_XL))

ADAPTER = {
    "one": adapter(UNDER, NO_ADAPTER),
    "guided, images a prompt": adapter({**UNDER, **GUIDED, "num_images_per_prompt": 2}, NO_ADAPTER),
    "two": adapters(
        {"image": [LINES, RELIEF], "adapter_conditioning_scale": [0.9, 0.6]}, {"adapter_conditioning_scale": [0.9, 0.0]}
    ),
    "size": adapter({**UNDER, "height": 48, "width": 80}, NO_ADAPTER),
    "XL": adapter_xl({**UNDER, "adapter_conditioning_scale": 0.8}, NO_ADAPTER),
    "XL, guided": adapter_xl({**UNDER, **GUIDED}, NO_ADAPTER),
    "XL, half the steps": adapter_xl(
        {**UNDER, "adapter_conditioning_factor": 0.5}, {"adapter_conditioning_factor": 1.0}
    ),
    "XL, two": adapters_xl(
        {"image": [LINES, RELIEF], "adapter_conditioning_scale": [0.9, 0.6]}, {"adapter_conditioning_scale": [0.9, 0.0]}
    ),
    "XL, images a prompt": adapter_xl({**UNDER, "num_images_per_prompt": 2}, NO_ADAPTER),
    "XL, sizes": adapter_xl({**UNDER, "original_size": (96, 128)}, {"original_size": None}),
    "XL, style": adapter_xl(UNDER, None, setup="style"),
    "XL, Euler": sampled(adapter_xl, "Euler", UNDER, NO_ADAPTER),
}

FRAMES = {"num_frames": 4, "height": 64, "width": 64}
SIZE = {"height": 64, "width": 64}
animate = partial(Case, "AnimateDiffPipeline", SD15, nets=(MOTION,))
animate_xl = partial(Case, "AnimateDiffSDXLPipeline", XL, nets=(MOTION_XL,))
animate_control = partial(Case, "AnimateDiffControlNetPipeline", SD15, nets=(MOTION, CANNY))
repaint = partial(Case, "AnimateDiffVideoToVideoPipeline", SD15, nets=(MOTION,))
repaint_control = partial(Case, "AnimateDiffVideoToVideoControlNetPipeline", SD15, nets=(MOTION, CANNY))

ANIMATION = {
    "text": animate({**FRAMES, "guidance_scale": 1.5}, {"guidance_scale": 1.0}),
    "negative prompt": animate({**FRAMES, **GUIDED}, NO_NEGATIVE),
    "prompts": animate({**FRAMES, **PROMPTS, "guidance_scale": 1.5}, EDITED | {"prompt": [PROMPT, PROMPT]}),
    "size": animate({"num_frames": 3, "height": 48, "width": 72}, EDITED),
    "with a middle block": animate(FRAMES, EDITED, nets=(MOTION_V2,)),
    "motion LoRA": animate({**FRAMES, "cross_attention_kwargs": {"scale": 1}}, None, setup="motion LoRA"),
    "latents edited": animate({**FRAMES, "callback_on_step_end": brighten}, {"callback_on_step_end": LEFT_OUT}),
    "decoded one by one": animate({**FRAMES, "decode_chunk_size": 1}, EDITED),
    "DDIM, linear": animate(
        {**FRAMES, **OWN_STEPS},
        {"guidance_scale": 1.5},
        scheduler=("DDIMScheduler", {"beta_schedule": "linear", "clip_sample": False}),
    ),
    "Euler": sampled(animate, "Euler", FRAMES, EDITED),
    "controlled": animate_control({**FRAMES, "conditioning_frames": LINE_FRAMES}, NO_CONTROL),
    "controlled, guided, window": animate_control(
        {**FRAMES, "conditioning_frames": LINE_FRAMES, **GUIDED, "control_guidance_end": 0.5},
        {"control_guidance_end": 1.0},
    ),
    "controlled, guess mode": animate_control(
        {**FRAMES, "conditioning_frames": LINE_FRAMES, "guess_mode": True}, {"guess_mode": False}
    ),
    "two controls": animate_control(
        {**FRAMES, "conditioning_frames": [LINE_FRAMES, OTHER_VIDEO], "controlnet_conditioning_scale": [0.8, 0.6]},
        {"controlnet_conditioning_scale": [0.8, 0.0]},
        nets=(MOTION, CANNY, DEPTH),
    ),
    "video": repaint({**SIZE, "video": VIDEO, "strength": 0.7}, {"video": OTHER_VIDEO}),
    "video, guided": repaint({**SIZE, "video": VIDEO, **GUIDED}, NO_NEGATIVE),
    "video, all steps": repaint(
        {**SIZE, "video": VIDEO, "strength": 0.6, "enforce_inference_steps": True}, {"enforce_inference_steps": False}
    ),
    "video, DDIM": sampled(repaint, "DDIM", {**SIZE, "video": VIDEO}, {"video": OTHER_VIDEO}),
    "controlled video": repaint_control(
        {**SIZE, "video": VIDEO, "conditioning_frames": LINE_FRAMES, "strength": 0.7}, NO_CONTROL
    ),
    "controlled video, all steps": repaint_control(
        {**SIZE, "video": VIDEO, "conditioning_frames": LINE_FRAMES, "enforce_inference_steps": True, **GUIDED},
        NO_CONTROL,
    ),
    "XL": animate_xl({**FRAMES, "guidance_scale": 1.5}, {"guidance_scale": 1.0}),
}

FACE = {"ip_adapter_image": RELIEF}
OTHER_FACE = {"ip_adapter_image": OTHER}

IMAGE_PROMPT = {
    "text": text(FACE, OTHER_FACE, setup="image prompt"),
    "text, guided": text({**FACE, **GUIDED}, OTHER_FACE, setup="image prompt"),
    "several pictures": text({"ip_adapter_image": [[RELIEF, LINES]], **GUIDED}, OTHER_FACE, setup="image prompt"),
    "plus, images a prompt": text({**FACE, "num_images_per_prompt": 2}, OTHER_FACE, setup="image prompt plus"),
    "LCM-LoRA": text({**FACE, "guidance_scale": 1.5}, OTHER_FACE, setup="image prompt and LCM-LoRA"),
    "img2img": img2img({**FROM_START, **FACE, **GUIDED}, OTHER_FACE, setup="image prompt"),
    "inpaint": inpaint({**HOLE, **FACE}, OTHER_FACE, setup="image prompt"),
    "ControlNet": control({**UNDER, **FACE, **GUIDED}, OTHER_FACE, setup="image prompt"),
    "animation": animate({**FRAMES, **FACE, "guidance_scale": 1.5}, OTHER_FACE, setup="image prompt"),
    "XL": text_xl({**FACE, **GUIDED}, OTHER_FACE, setup="image prompt XL"),
    "XL, by block": text_xl(FACE, OTHER_FACE, setup="image prompt by block"),
    "XL, ControlNet": control_xl({**UNDER, **FACE}, OTHER_FACE, setup="image prompt XL"),
}

TOGETHER = {
    "inpainted under two controls": control_inpaint(
        {**HOLE, **FACE, **GUIDED, "control_image": [LINES, RELIEF], "strength": 0.9, "num_images_per_prompt": 2},
        OTHER_FACE,
        nets=BOTH,
        setup="image prompt and LCM-LoRA",
    ),
    "XL, inpainted under two controls": control_inpaint_xl(
        {**HOLE, **GUIDED, "control_image": [LINES, RELIEF], "strength": 0.8}, None, nets=BOTH_XL, setup="style"
    ),
    "repainted video": repaint_control(
        {**SIZE, **FACE, **GUIDED, "video": VIDEO, "conditioning_frames": LINE_FRAMES, "strength": 0.7},
        OTHER_FACE,
        setup="image prompt and motion LoRA",
    ),
}

CASES: Mapping[str, Case] = {
    f"{group}: {name}": case
    for group, cases in {
        "text": TEXT,
        "LoRA": LORA,
        "img2img": IMG2IMG,
        "inpaint": INPAINT,
        "ControlNet": CONTROL,
        "T2I-Adapter": ADAPTER,
        "animation": ANIMATION,
        "image prompt": IMAGE_PROMPT,
        "together": TOGETHER,
    }.items()
    for name, case in cases.items()
}
