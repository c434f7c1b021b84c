"""A ControlNet's edges and the LCM-LoRA: ``python examples/controlnet.py``.

From the left: a picture, its edges, and what other words make of the edges.
"""

from pathlib import Path

import torch

from fourstroke import ControlNetModel, DiffusionPipeline, LCMScheduler, StableDiffusionControlNetPipeline
from fourstroke.controls import canny
from fourstroke.utils import make_image_grid

OUTPUT = Path("out/controlnet.png")
PROMPTS = ["a green apple", "an orange", "a blue heart"]

pipe = DiffusionPipeline.from_pretrained("emoji/base")
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
pipe.load_lora_weights("emoji/lcm-lora")
apple = pipe("a red apple", num_inference_steps=4, guidance_scale=1.0, generator=torch.manual_seed(0)).images[0]
edges = canny(apple)

controlnet = ControlNetModel.from_pretrained("emoji/controlnet-canny")
steered = StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=controlnet)
generators = [torch.Generator().manual_seed(0) for _ in PROMPTS]
made = steered(PROMPTS, [edges] * 3, num_inference_steps=4, guidance_scale=1.0, generator=generators).images

OUTPUT.parent.mkdir(exist_ok=True)
make_image_grid([apple, edges, *made], rows=1, cols=2 + len(made)).save(OUTPUT)
print(OUTPUT.resolve())
