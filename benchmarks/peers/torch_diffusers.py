"""diffusers: eager in the job's dtype, or with torch.compile as its documentation recommends; the LCM-LoRA is fused."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from .protocol import Clock, Job, Paint, Timed, picture, prompts, serve

CLASSES = {
    ("text", False): "StableDiffusionPipeline",
    ("text", True): "StableDiffusionXLPipeline",
    ("img2img", False): "StableDiffusionImg2ImgPipeline",
    ("img2img", True): "StableDiffusionXLImg2ImgPipeline",
    ("controlnet", False): "StableDiffusionControlNetPipeline",
    ("controlnet", True): "StableDiffusionXLControlNetPipeline",
    ("animation", False): "AnimateDiffPipeline",
}


def load(job: Job, clock: Clock) -> Paint:
    diffusers: Any = importlib.import_module("diffusers")
    files, dtype = job["files"], getattr(torch, job["dtype"])
    given: dict[str, Any] = {}
    for name, kind in (("controlnet", "ControlNetModel"), ("motion-adapter", "MotionAdapter")):
        if name in files:
            given[name.replace("-", "_")] = getattr(diffusers, kind).from_pretrained(files[name], torch_dtype=dtype)
    if job["tiny_vae"]:
        given["vae"] = diffusers.AutoencoderTiny.from_pretrained(files["tiny-vae"], torch_dtype=dtype)
    cls = getattr(diffusers, CLASSES[job["task"], job["xl"]])
    pipe = cls.from_pretrained(files["repository"], torch_dtype=dtype, **given).to(job["device"])
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    names = []
    for i, path in enumerate([files["lcm-lora"], *files.get("styles", ())]):
        names.append(f"lora_{i}")
        pipe.load_lora_weights(path, adapter_name=names[-1])
    fused = 0

    def fuse(count: int) -> None:
        nonlocal fused
        if fused:
            pipe.unfuse_lora()
        if count:
            pipe.enable_lora()
            pipe.set_adapters(names[:count])
            pipe.fuse_lora(adapter_names=names[:count])
        else:
            pipe.disable_lora()
        fused = count

    fuse(job["loras"])
    if "styles" not in files:
        pipe.unload_lora_weights()  # what is fused stays, without a detour in every layer
    if job.get("compile"):
        pipe.unet = torch.compile(pipe.unet)
        pipe.vae.decode = torch.compile(pipe.vae.decode)
    for name in ("text_encoder", "text_encoder_2"):
        clock.watch(getattr(pipe, name, None), "text")
    pipe.vae.decode = clock.timed(pipe.vae.decode, "vae")
    clock.watch(given.get("controlnet"), "control")
    if job.get("compile"):
        pipe.unet = Timed(pipe.unet, clock, "unet")
    else:
        clock.watch(pipe.unet, "unet")

    def paint(job: Job) -> Any:
        if job["loras"] != fused:
            fuse(job["loras"])
        output = pipe(**request(job))
        return output.frames[0] if job["task"] == "animation" else output.images

    return paint


def request(job: Job) -> dict[str, Any]:
    """The job as arguments of a pipeline."""
    generators = [torch.Generator().manual_seed(job["seed"] + i) for i in range(job["batch"])]
    fields: dict[str, Any] = {"num_inference_steps": job["steps"], "guidance_scale": 1.0}
    fields |= {"prompt": prompts(job), "generator": generators}
    if job["task"] == "img2img":
        return fields | {"image": [picture(job)] * job["batch"], "strength": job["strength"]}
    fields |= {"height": job["size"], "width": job["size"]}
    if job["task"] == "controlnet":
        fields["image"] = [picture(job)] * job["batch"]
    elif job["task"] == "animation":
        fields["num_frames"] = job["frames"]
    return fields


if __name__ == "__main__":
    serve(load)
