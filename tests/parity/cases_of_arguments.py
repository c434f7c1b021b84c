"""More cases for `test_combinations`: pictures, masks and other arguments in the forms and sizes that people pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.ImageFilter
import torch

from ..fakehub import REFINER, SD21, SSD1B, XL_INPAINTING
from .cases import (
    CUT_OUT,
    FACE,
    FRAMES,
    FROM_OTHER,
    HOLE,
    OTHER_FACE,
    SIZE,
    UNDER,
    adapter,
    adapter_xl,
    animate,
    animate_control,
    animate_xl,
    control,
    control_img2img,
    control_img2img_xl,
    control_inpaint,
    control_inpaint_xl,
    control_xl,
    controls,
    img2img,
    img2img_xl,
    inpaint,
    inpaint_9,
    inpaint_xl,
    lcm_img2img,
    repaint,
    repaint_control,
    text,
)
from .combinations import (
    EDITED,
    GUIDED,
    LARGE,
    LATENTS,
    LINE_FRAMES,
    LINES,
    MASK,
    NO_ADAPTER,
    NO_CONTROL,
    OTHER,
    OTHER_VIDEO,
    OWN_STEPS,
    PROMPTS,
    RELIEF,
    START,
    TENSOR,
    VIDEO,
    WIDE,
    Case,
)
from .pictures import NEGATIVE, OTHER_PROMPT, PROMPT, hole, shapes

# 64 x 72 once rounded down to multiples of 8.
ODD, ODD_OTHER, ODD_MASK = shapes(5, (75, 67)), shapes(6, (75, 67)), hole((75, 67))
TENSORS = torch.cat([TENSOR, TENSOR.flip(3)])
LINE_TENSOR = torch.from_numpy(np.asarray(LINES) / 255.0).float().permute(2, 0, 1)[None]
MASK_TENSOR = torch.from_numpy(np.asarray(MASK) / 255.0).float()[None, None]
FRAME_ARRAY = np.stack([np.asarray(frame) for frame in VIDEO]).astype(np.float32) / 255
FRAME_LATENTS = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(9))
NO_LATENTS = {"latents": None}
EULER: tuple[str, Mapping[str, Any]] = ("EulerDiscreteScheduler", {})
SIGMAS = {"sigmas": [14.6, 5.0, 1.5, 0.4], "num_inference_steps": 4}

START_PICTURES = {
    "rounded down": img2img({"image": ODD, "strength": 0.6}, {"image": ODD_OTHER}),
    "list of one": img2img({"image": [START], "prompt": [PROMPT], "strength": 0.6, "seed": [3]}, FROM_OTHER),
    "tensors": img2img({"image": TENSORS, **PROMPTS, "strength": 0.6}, {"image": TENSORS.flip(2)}),
    "list of arrays": img2img(
        {"image": [np.asarray(one) / 255 for one in (START, OTHER)], **PROMPTS, "strength": 0.6}, FROM_OTHER
    ),
    "list of tensors": img2img({"image": list(TENSORS), **PROMPTS, "strength": 0.6}, FROM_OTHER),
    "tensor in [-1, 1]": img2img({"image": TENSOR * 2 - 1, "strength": 0.6}, FROM_OTHER),
    "latents of several": img2img({"image": torch.cat([LATENTS, -LATENTS]), **PROMPTS, "strength": 0.6}, FROM_OTHER),
    "XL, given noise": img2img_xl({"image": START, "latents": LATENTS, "strength": 0.6}, NO_LATENTS),
    "full LCM, given noise": lcm_img2img({"image": START, "latents": LATENTS, "strength": 0.6}, NO_LATENTS),
    "refiner, prompts times images": Case(
        "StableDiffusionXLImg2ImgPipeline",
        REFINER,
        {"image": START, "strength": 0.8, **PROMPTS, **GUIDED, "num_images_per_prompt": 2},
        FROM_OTHER,
    ),
}

MASKS = {
    "tensors": inpaint({"image": TENSOR * 2 - 1, "mask_image": MASK_TENSOR, "strength": 0.8}, FROM_OTHER),
    "arrays": inpaint(
        {
            "image": np.asarray(START)[None] / np.float32(255),
            "mask_image": MASK_TENSOR.permute(0, 2, 3, 1).numpy(),
            "strength": 0.8,
        },
        FROM_OTHER,
    ),
    "RGB": inpaint({"image": START, "mask_image": MASK.convert("RGB"), "strength": 0.8}, FROM_OTHER),
    "soft": inpaint({"image": START, "mask_image": MASK.filter(PIL.ImageFilter.GaussianBlur(6))}, {"mask_image": MASK}),
    "one for two pictures": inpaint({**HOLE, **PROMPTS, "image": [START, OTHER]}, {"image": [OTHER, START]}),
    "rounded down": inpaint({"image": ODD, "mask_image": ODD_MASK, "strength": 0.8}, {"image": ODD_OTHER}),
    "rounded down, nine channels": inpaint_9({"image": ODD, "mask_image": ODD_MASK}, {"image": ODD_OTHER}),
    "rounded down, XL": inpaint_xl({"image": ODD, "mask_image": ODD_MASK}, {"image": ODD_OTHER}),
    "given noise, little": inpaint({**HOLE, "latents": LATENTS, "strength": 0.6}, NO_LATENTS),
    "given noise, XL": inpaint_xl({**HOLE, "latents": LATENTS, "strength": 1.0}, NO_LATENTS),
    "custom timesteps, little": inpaint({**HOLE, "timesteps": [999, 679, 339, 99], "strength": 0.5}, {"strength": 1.0}),
    "Euler's sigmas": inpaint({**HOLE, **SIGMAS, "strength": 0.75}, FROM_OTHER, scheduler=EULER),
    "cut out, without margin": inpaint({**CUT_OUT, "padding_mask_crop": 0}, {"padding_mask_crop": 30}),
    "cut out, images a prompt": inpaint(
        {**CUT_OUT, **GUIDED, "num_images_per_prompt": 2, "height": 96, "width": 64}, {"padding_mask_crop": 30}
    ),
    "cut out, XL, nine channels": Case(
        "StableDiffusionXLInpaintPipeline", XL_INPAINTING, CUT_OUT, {"padding_mask_crop": 30}
    ),
    "SSD-1B": Case("StableDiffusionXLInpaintPipeline", SSD1B, {**HOLE, **GUIDED}, FROM_OTHER),
    "refiner": Case("StableDiffusionXLInpaintPipeline", REFINER, {**HOLE, **GUIDED, "strength": 0.7}, FROM_OTHER),
}

CONTROL_PICTURES = {
    "rounded down": control({"image": ODD}, NO_CONTROL),
    "grey": control({"image": LINES.convert("L")}, NO_CONTROL),
    "list of one": control({"image": [LINES], "prompt": [PROMPT]}, NO_CONTROL),
    "tensors": control({"image": torch.cat([LINE_TENSOR, LINE_TENSOR.flip(3)]), **PROMPTS}, NO_CONTROL),
    "window in lists": control(
        {**UNDER, "control_guidance_start": [0.25], "control_guidance_end": [0.75]}, {"control_guidance_start": [0.0]}
    ),
    "given noise": control({**UNDER, "latents": LATENTS}, NO_LATENTS),
    "two, window by number and list": controls(
        {"image": [LINES, RELIEF], "control_guidance_start": 0.25, "control_guidance_end": [0.5, 1.0]}, NO_CONTROL
    ),
    "two, a list a prompt": controls(
        {"image": [[LINES, RELIEF], [RELIEF, LINES]], **PROMPTS}, {"image": [[LINES, RELIEF], [LINES, RELIEF]]}
    ),
    "img2img, size": control_img2img(
        {"image": START, "control_image": LINES, "height": 48, "width": 80}, {"control_image": RELIEF}
    ),
    "img2img, rounded down": control_img2img({"image": ODD, "control_image": ODD}, NO_CONTROL),
    "img2img, a picture a prompt": control_img2img(
        {"image": [START, OTHER], "control_image": [LINES, RELIEF], **PROMPTS}, {"control_image": [LINES, LINES]}
    ),
    "img2img, latents": control_img2img({"image": LATENTS, "control_image": LINES}, NO_CONTROL),
    "inpaint, size": control_inpaint({**HOLE, "control_image": LINES, "height": 48, "width": 80}, NO_CONTROL),
    "inpaint, rounded down": control_inpaint({"image": ODD, "mask_image": ODD_MASK, "control_image": ODD}, NO_CONTROL),
    "inpaint, given noise": control_inpaint({**HOLE, "control_image": LINES, "latents": LATENTS}, NO_LATENTS),
    "XL, end of denoising": control_xl(
        {**UNDER, "denoising_end": 0.5, "num_inference_steps": 8}, {"denoising_end": None}
    ),
    "XL, second prompts": control_xl(
        {**UNDER, "prompt_2": OTHER_PROMPT, **GUIDED, "negative_prompt_2": "night"}, {"prompt_2": None}
    ),
    "XL, clip skip": control_xl({**UNDER, "clip_skip": 1}, {"clip_skip": None}),
    "XL, negative sizes": control_xl(
        {
            **UNDER,
            "guidance_scale": 1.8,
            "negative_original_size": (32, 32),
            "negative_target_size": (40, 48),
            "negative_crops_coords_top_left": (3, 4),
        },
        {"negative_original_size": None},
    ),
    "XL, img2img, guess mode": control_img2img_xl(
        {"image": START, "control_image": LINES, "guess_mode": True, "guidance_scale": 1.5}, {"guess_mode": False}
    ),
    "XL, img2img, prompts times images": control_img2img_xl(
        {"image": START, "control_image": LINES, **PROMPTS, "num_images_per_prompt": 2}, NO_CONTROL
    ),
    "XL, inpaint, guess mode": control_inpaint_xl(
        {**HOLE, "control_image": LINES, "guess_mode": True, "guidance_scale": 1.5}, {"guess_mode": False}
    ),
    "XL, inpaint, guidance rescaled": control_inpaint_xl(
        {**HOLE, "control_image": LINES, "guidance_scale": 1.8, "guidance_rescale": 0.7}, {"guidance_rescale": 0.0}
    ),
    "XL, inpaint, end of denoising": control_inpaint_xl(
        {**HOLE, "control_image": LINES, "denoising_end": 0.6, "num_inference_steps": 8}, {"denoising_end": None}
    ),
}

ADAPTER_PICTURES = {
    "rounded down": adapter({"image": ODD}, NO_ADAPTER),
    "odd size": adapter({"image": WIDE}, NO_ADAPTER),
    "list of one": adapter({"image": [LINES]}, NO_ADAPTER),
    "tensor": adapter({"image": LINE_TENSOR}, NO_ADAPTER),
    "one for two prompts": adapter({**UNDER, **PROMPTS}, NO_ADAPTER),
    "given noise": adapter({**UNDER, "latents": LATENTS}, NO_LATENTS),
    "custom timesteps": adapter({**UNDER, "timesteps": [999, 679, 339]}, NO_ADAPTER),
    "XL, rounded down": adapter_xl({"image": ODD}, NO_ADAPTER),
    "XL, end of denoising": adapter_xl(
        {**UNDER, "denoising_end": 0.5, "num_inference_steps": 8}, {"denoising_end": None}
    ),
    "XL, clip skip, two prompts": adapter_xl({**UNDER, "clip_skip": 1, "prompt_2": OTHER_PROMPT}, {"clip_skip": None}),
    "XL, guidance rescaled": adapter_xl(
        {**UNDER, "guidance_scale": 1.8, "guidance_rescale": 0.7}, {"guidance_rescale": 0.0}
    ),
}

FRAMES_AND_VIDEOS = {
    "given noise": animate({**FRAMES, "latents": FRAME_LATENTS}, NO_LATENTS),
    "the model's size": animate({"num_frames": 2}, EDITED),
    "one frame": animate({**FRAMES, "num_frames": 1}, EDITED),
    "a negative prompt each": animate(
        {**FRAMES, **PROMPTS, **GUIDED, "negative_prompt": [NEGATIVE, "a fox"]},
        {"negative_prompt": [NEGATIVE, NEGATIVE]},
    ),
    "controls of another size": animate_control(
        {"num_frames": 4, "conditioning_frames": [frame.resize((88, 72)) for frame in LINE_FRAMES]}, NO_CONTROL
    ),
    "video as an array": repaint({**SIZE, "video": FRAME_ARRAY, "strength": 0.7}, {"video": OTHER_VIDEO}),
    "video of another size": repaint({"video": [frame.resize((96, 80)) for frame in VIDEO]}, {"video": OTHER_VIDEO}),
    "video, size": repaint({"video": VIDEO, "height": 48, "width": 80}, {"video": OTHER_VIDEO}),
    "video, custom timesteps": repaint(
        {**SIZE, "video": VIDEO, "timesteps": [999, 679, 339, 99], "strength": 0.75}, {"strength": 0.5}
    ),
    "video, decoded one by one": repaint({**SIZE, "video": VIDEO, "decode_chunk_size": 1}, {"video": OTHER_VIDEO}),
    "video, controls from a third on": repaint_control(
        {**SIZE, "video": VIDEO, "conditioning_frames": LINE_FRAMES, "control_guidance_start": 0.3}, NO_CONTROL
    ),
    "XL, second negative prompt, sizes": animate_xl(
        {
            **FRAMES,
            **GUIDED,
            "negative_prompt_2": PROMPT,
            "original_size": (96, 96),
            "negative_original_size": (32, 32),
            "negative_target_size": (32, 40),
        },
        {"negative_prompt_2": None},
    ),
}

SCHEDULES = {
    "guidance rescaled": text({"guidance_scale": 2.0, "guidance_rescale": 0.9}, {"guidance_rescale": 0.0}),
    "trailing Euler": text(
        OWN_STEPS, {"guidance_scale": 1.5}, scheduler=("EulerDiscreteScheduler", {"timestep_spacing": "trailing"})
    ),
    "zero terminal SNR": text(
        OWN_STEPS,
        {"guidance_scale": 1.5},
        scheduler=("DDIMScheduler", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
    ),
    "another LCM grid": text({}, EDITED, scheduler=("LCMScheduler", {"original_inference_steps": 20})),
    "v-prediction, Euler": Case("StableDiffusionPipeline", SD21, OWN_STEPS, {"guidance_scale": 1.5}, scheduler=EULER),
}

MORE_IMAGE_PROMPTS = {
    "prompts times images": text(
        {**FACE, **PROMPTS, "guidance_scale": 1.5, "num_images_per_prompt": 2}, OTHER_FACE, setup="image prompt"
    ),
    "XL, inpaint": inpaint_xl({**HOLE, **FACE, **GUIDED}, OTHER_FACE, setup="image prompt XL"),
    "XL, T2I-Adapter": adapter_xl({**UNDER, **FACE}, OTHER_FACE, setup="image prompt XL"),
    "large picture": text({"ip_adapter_image": LARGE}, OTHER_FACE, setup="image prompt"),
}

ARGUMENT_CASES: Mapping[str, Case] = {
    f"{group}: {name}": case
    for group, cases in {
        "start pictures": START_PICTURES,
        "masks": MASKS,
        "control pictures": CONTROL_PICTURES,
        "adapter pictures": ADAPTER_PICTURES,
        "frames and videos": FRAMES_AND_VIDEOS,
        "schedules": SCHEDULES,
        "more image prompts": MORE_IMAGE_PROMPTS,
    }.items()
    for name, case in cases.items()
}
