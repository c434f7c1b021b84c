"""Text to image with a model of SDXL's shape in 1, 2, 4 and 8 steps: ``python examples/text_to_image.py``."""

from pathlib import Path

import torch

from fourstroke import DiffusionPipeline, LCMScheduler
from fourstroke.utils import make_image_grid

OUTPUT = Path("out/text_to_image.png")
PROMPTS = ["a red fox", "an octopus", "a strawberry"]
STEPS = (1, 2, 4, 8)

pipe = DiffusionPipeline.from_pretrained("emoji/xl")
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
pipe.load_lora_weights("emoji/xl-lcm-lora")

images = []
for prompt in PROMPTS:
    for steps in STEPS:
        generator = torch.manual_seed(0)
        images += pipe(prompt, num_inference_steps=steps, guidance_scale=1.0, generator=generator).images

OUTPUT.parent.mkdir(exist_ok=True)
make_image_grid(images, rows=len(PROMPTS), cols=len(STEPS)).save(OUTPUT)
print(OUTPUT.resolve())
