"""stable-diffusion.cpp through its Python package, weights quantised when they are read.

It cannot apply an LCM-LoRA to quantised weights (its process ends), so it gets a checkpoint with the LoRA merged. It
draws noise of its own, so its pictures cannot be compared. Its parts are what lies between the reports of its progress.
Narrow models (``--tiny``) it cannot run: the widths are in its code.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .protocol import Clock, Job, Paint, prompts, serve

MERGE = """
import sys, torch
from fourstroke import DiffusionPipeline
repository, lora, folder = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(repository, dtype=torch.float16)
pipe.load_lora_weights(lora)
pipe.merge_adapters()
pipe.save_pretrained(folder)
"""


def load(job: Job, clock: Clock) -> Paint:
    library: Any = importlib.import_module("stable_diffusion_cpp")
    files, merged = job["files"], Path(job["cache"]) / "merged"
    if not (merged / "model_index.json").exists():  # by a process of its own, whose memory is not this one's
        arguments = [files["repository"], files["lcm-lora"], str(merged)]
        subprocess.run([sys.executable, "-c", MERGE, *arguments], check=True)
    tiny = Path(files["tiny-vae"]) / "diffusion_pytorch_model.safetensors" if job["tiny_vae"] else ""
    model = library.StableDiffusion(
        model_path=str(merged),
        taesd_path=str(tiny),
        wtype=job["wtype"],
        n_threads=job["threads"],
        vae_decode_only=True,
        diffusion_flash_attn=True,
        diffusion_conv_direct=job["conv_direct"],
        vae_conv_direct=job["conv_direct"],
        verbose=False,
    )

    def paint(job: Job) -> Any:
        last = time.perf_counter()

        def lap(part: str) -> None:
            nonlocal last
            now = time.perf_counter()
            clock.parts.setdefault(part, []).append(now - last)
            last = now

        pictures = model.generate_image(
            prompt=prompts(job)[0],
            width=job["size"],
            height=job["size"],
            cfg_scale=1.0,
            scheduler="lcm",
            sample_method="lcm",
            sample_steps=job["steps"],
            seed=job["seed"],
            batch_count=job["batch"],
            progress_callback=lambda step, steps, seconds: lap("unet" if step else "text"),
        )
        lap("vae")
        return pictures

    return paint


if __name__ == "__main__":
    serve(load)
