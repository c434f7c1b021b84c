"""openvino-genai's `Text2ImagePipeline` on the networks that the other OpenVINO peer runs.

It cannot load an LCM-LoRA itself (its adapters have no convolutions), so it gets the UNet with the LoRA merged. It has
no tiny VAE.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from .openvino_export import exported
from .protocol import Clock, Job, Paint, prompts, serve


def load(job: Job, clock: Clock) -> Paint:
    import openvino_genai as genai

    folder = complete(exported(job))
    settings = {"INFERENCE_PRECISION_HINT": job["precision"], "INFERENCE_NUM_THREADS": job["threads"]}
    pipe: Any = genai.Text2ImagePipeline(folder)
    pipe.reshape(job["batch"], job["size"], job["size"], 1.0)
    pipe.compile("CPU", **settings)

    def paint(job: Job) -> Any:
        pictures = pipe.generate(
            prompts(job)[0],  # it takes one prompt for the whole batch
            num_images_per_prompt=job["batch"],
            num_inference_steps=job["steps"],
            guidance_scale=1.0,
            height=job["size"],
            width=job["size"],
            generator=genai.TorchGenerator(job["seed"]),
        )
        metrics = pipe.get_performance_metrics()
        text = metrics.get_text_encoder_infer_duration()
        clock.parts["text"] = [ms / 1000 for ms in (text.values() if isinstance(text, dict) else [text])]
        clock.parts["unet"] = [ms / 1e6 for ms in metrics.raw_metrics.unet_inference_durations]
        clock.parts["vae"] = [metrics.get_vae_decoder_infer_duration() / 1000]
        return pictures.data.copy()

    return paint


def complete(folder: Path) -> Path:
    """Add what openvino-genai reads beside the networks: its tokenizers, and a scheduler that is LCM's."""
    import openvino
    import openvino_tokenizers
    import transformers

    whole = folder.with_name("openvino-genai")
    shutil.copytree(folder, whole, dirs_exist_ok=True, copy_function=link)
    for name in ("tokenizer", "tokenizer_2"):
        if (whole / name).exists() and not (whole / name / "openvino_tokenizer.xml").exists():
            tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / name)
            model = openvino_tokenizers.convert_tokenizer(tokenizer, max_length=77, use_max_padding=True)
            openvino.save_model(model, whole / name / "openvino_tokenizer.xml")
    scheduler = whole / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text()) | {"_class_name": "LCMScheduler"}
    scheduler.unlink()
    scheduler.write_text(json.dumps(config))
    return whole


def link(source: str, target: str) -> str:
    """Link a file that is not there yet."""
    if not Path(target).exists():
        Path(target).hardlink_to(source)
    return target


if __name__ == "__main__":
    serve(load)
