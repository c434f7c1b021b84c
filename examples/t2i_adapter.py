"""A T2I-Adapter's edges, a model of SDXL's shape and its LCM-LoRA: ``python examples/t2i_adapter.py``.

From the left: a picture, its edges, and what other words make of the edges.
"""

from pathlib import Path

import torch

from fourstroke import DiffusionPipeline, LCMScheduler, StableDiffusionXLAdapterPipeline, T2IAdapter
from fourstroke.controls import canny
from fourstroke.utils import make_image_grid

OUTPUT = Path("out/t2i_adapter.png")
PROMPTS = ["a tomato", "a green apple", "a red heart"]

pipe = DiffusionPipeline.from_pretrained("emoji/xl")
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
pipe.load_lora_weights("emoji/xl-lcm-lora")
apple = pipe("a red apple", num_inference_steps=4, guidance_scale=1.0, generator=torch.manual_seed(0)).images[0]
edges = canny(apple)

steered = StableDiffusionXLAdapterPipeline.from_pipe(pipe, adapter=T2IAdapter.from_pretrained("emoji/t2i-canny"))
images = []
for prompt in PROMPTS:
    generator = torch.manual_seed(0)
    images += steered(prompt, image=edges, num_inference_steps=4, guidance_scale=1.0, generator=generator).images

OUTPUT.parent.mkdir(exist_ok=True)
make_image_grid([apple, edges, *images], rows=1, cols=2 + len(images)).save(OUTPUT)
print(OUTPUT.resolve())
