"""The first emoji picture from a cold shell, Fourstroke against diffusers: whole processes, the same folder and LoRA.

Each process starts Python, imports, loads the model and the LCM-LoRA, paints four steps and saves a PNG.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from timing import arguments, interleave, python, report

from fourstroke import hub

SCRIPT = """
import sys
import torch
from {library} import DiffusionPipeline, LCMScheduler
base, lora, output = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(base)
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
pipe.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
generator = torch.manual_seed(0)
pipe("a red fox", num_inference_steps=4, guidance_scale=1.0, generator=generator).images[0].save(output)
"""


def main() -> None:
    options = arguments(__doc__, repeats=7).parse_args()
    base, lora = (hub.ZOO / "emoji" / name for name in ("base", "lcm-lora"))
    with tempfile.TemporaryDirectory() as folder:
        outputs = {name: Path(folder) / f"{name}.png" for name in ("diffusers", "fourstroke")}
        commands = {
            name: python(SCRIPT.format(library=name), str(base), str(lora), str(output))
            for name, output in outputs.items()
        }
        env = {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
        seconds = interleave(commands, 1 if options.tiny else options.repeats, env)
        ours, theirs = (np.asarray(Image.open(outputs[name]), dtype=int) for name in ("fourstroke", "diffusers"))
    report("first_picture", seconds, options)
    print(f"  largest difference of the two pictures: {abs(ours - theirs).max()} / 255")


if __name__ == "__main__":
    main()
