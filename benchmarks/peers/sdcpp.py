"""stable-diffusion.cpp through its Python package, weights quantised, LoRA applied when it loads.

It draws noise of its own, so its pictures cannot be compared. Only the whole and the steps, by its progress, are timed:
nothing but its log tells of the other parts.
"""

from __future__ import annotations

import importlib
import shutil
import time
from pathlib import Path
from typing import Any

from .protocol import Clock, Job, Paint, prompts, serve


def load(job: Job, clock: Clock) -> Paint:
    library: Any = importlib.import_module("stable_diffusion_cpp")
    files, loras = job["files"], Path(job["cache"]) / "sdcpp-loras"
    if not (loras / "lcm.safetensors").exists():
        loras.mkdir(parents=True, exist_ok=True)
        shutil.copy(files["lcm-lora"], loras / "lcm.safetensors")
    tiny = Path(files["tiny-vae"]) / "diffusion_pytorch_model.safetensors" if job["tiny_vae"] else ""
    model = library.StableDiffusion(
        model_path=files["repository"],
        taesd_path=str(tiny),
        lora_model_dir=str(loras),
        lora_apply_mode="immediately",  # the faster of the two
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

        def on_step(step: int, steps: int, seconds: float) -> None:
            nonlocal last
            now = time.perf_counter()
            if step > 0:
                clock.parts.setdefault("unet", []).append(now - last)
            last = now

        return model.generate_image(
            prompt=f"{prompts(job)[0]}<lora:lcm:1>",
            width=job["size"],
            height=job["size"],
            cfg_scale=1.0,
            scheduler="lcm",
            sample_method="lcm",
            sample_steps=job["steps"],
            seed=job["seed"],
            batch_count=job["batch"],
            progress_callback=on_step,
        )

    return paint


if __name__ == "__main__":
    serve(load)
