"""Fourstroke: an `Engine` with the job's dtype and `RuntimeOptions`."""

from __future__ import annotations

from typing import Any

import torch

from fourstroke import AutoencoderTiny, Control, Engine
from fourstroke.engine import where_to_run
from fourstroke.runtime.options import RuntimeOptions

from .protocol import Clock, Job, Paint, picture, prompts, serve


def load(job: Job, clock: Clock) -> Paint:
    files = job["files"]
    given: dict[str, Any] = {"device": job["device"], "dtype": job["dtype"] and getattr(torch, job["dtype"])}
    if job["tiny_vae"]:
        eager = job["runtime"].get("backend") != "openvino"
        dtype = where_to_run(job["device"], given["dtype"] if eager else None)[1]
        given["vae"] = AutoencoderTiny.from_pretrained(files["tiny-vae"], dtype=dtype)
    loras = [files["lcm-lora"], *files.get("styles", ())]
    motion = files.get("motion-adapter")
    runtime = RuntimeOptions(**job["runtime"])
    engine = Engine(files["repository"], loras=loras, motion=motion, runtime=runtime, **given)
    pipe: Any = engine.pipeline
    names = list(pipe.adapters.names)
    active = None
    for name in ("text_encoder", "text_encoder_2"):
        clock.watch(getattr(pipe, name, None), "text")
    clock.watch(pipe.unet, "unet")
    pipe.vae.decode = clock.timed(pipe.vae.decode, "vae")
    watched: set[Any] = set()

    def paint(job: Job) -> Any:
        nonlocal active
        if job["loras"] != active:
            active = job["loras"]
            pipe.set_adapters(names[:active])
        result = engine.generate(engine.request(prompts(job), **request(job)))
        for network in {*pipe.controlnet} - watched:  # they are loaded by the first picture
            watched.add(network)
            clock.watch(network, "control")
        images = result.images
        return images[0] if job["task"] == "animation" else images

    return paint


def request(job: Job) -> dict[str, Any]:
    """The job as fields of a `GenerateRequest`; a start picture shortens the schedule as it does in the peers."""
    fields: dict[str, Any] = {"num_inference_steps": job["steps"], "guidance_scale": 1.0, "seed": job["seed"]}
    fields |= {"height": job["size"], "width": job["size"]}
    if job["task"] == "img2img":
        fields |= {"image": picture(job), "strength": job["strength"], "strength_mode": "trim"}
        fields = {name: value for name, value in fields.items() if name not in ("height", "width")}
    elif job["task"] == "controlnet":
        fields["controls"] = [Control(picture(job), model=job["files"]["controlnet"])]
    elif job["task"] == "animation":
        fields["num_frames"] = job["frames"]
    return fields


if __name__ == "__main__":
    serve(load)
