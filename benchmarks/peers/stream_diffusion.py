"""StreamDiffusion, its stream batch: each call evaluates the UNet once, for as many pictures as there are steps.

A call so returns the picture that was begun as many calls ago, under the prompts of the calls since, and from noise of
its own: the pictures cannot be compared. It asks for an old diffusers and runs with the present one: ``pip install
--no-deps streamdiffusion``.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from .protocol import Clock, Job, Paint, prompts, serve

SCHEDULE = 50
"""Timesteps of the schedule that its steps are chosen from; those of an LCM-LoRA were distilled on these."""


def load(job: Job, clock: Clock) -> Paint:
    diffusers: Any = importlib.import_module("diffusers")
    library: Any = importlib.import_module("streamdiffusion")
    files, dtype = job["files"], getattr(torch, job["dtype"])
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(files["repository"], torch_dtype=dtype)
    if job["tiny_vae"]:
        pipe.vae = diffusers.AutoencoderTiny.from_pretrained(files["tiny-vae"], torch_dtype=dtype)
    pipe.to(job["device"])
    pipe.load_lora_weights(files["lcm-lora"])
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    clock.watch(pipe.text_encoder, "text")
    clock.watch(pipe.unet, "unet")
    pipe.vae.decode = clock.timed(pipe.vae.decode, "vae")
    streams: dict[tuple[int, int], Any] = {}

    def stream_of(size: int, steps: int) -> Any:
        if (size, steps) not in streams:
            chosen = [i * SCHEDULE // steps for i in range(steps)]
            stream = library.StreamDiffusion(pipe, chosen, dtype, width=size, height=size, cfg_type="none")
            stream.prepare("", num_inference_steps=SCHEDULE)
            for _ in chosen[1:]:  # until then no picture has been through all steps
                stream.txt2img()
            streams[size, steps] = stream
        return streams[size, steps]

    def paint(job: Job) -> Any:
        stream = stream_of(job["size"], job["steps"])
        torch.manual_seed(job["seed"])
        pictures = []
        for prompt in prompts(job):
            stream.update_prompt(prompt)
            pictures.append(stream.txt2img()[0])
        return (torch.stack(pictures).permute(0, 2, 3, 1).float() / 2 + 0.5).clamp(0, 1).cpu()

    return paint


if __name__ == "__main__":
    serve(load)
