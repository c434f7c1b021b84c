"""The LCM-LoRA combined with style LoRAs: ``python examples/style_loras.py``.

One model in memory, three styles: switching is exact and costs a fraction of a step.
"""

from pathlib import Path

import torch

from fourstroke import DiffusionPipeline, LCMScheduler
from fourstroke.utils import make_image_grid

OUTPUT = Path("out/style_loras.png")
PROMPTS = ["a red fox", "a rocket", "a pizza", "a crown", "a house"]
MIXES = ((["lcm"], [1.0]), (["lcm", "flat"], [1.0, 0.8]), (["lcm", "line"], [1.0, 0.8]))

pipe = DiffusionPipeline.from_pretrained("emoji/base")
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
for name in ("lcm", "flat", "line"):
    pipe.load_lora_weights(f"emoji/{name}-lora", adapter_name=name)

images = []
for names, weights in MIXES:
    pipe.set_adapters(names, adapter_weights=weights)
    generators = [torch.Generator().manual_seed(0) for _ in PROMPTS]
    images += pipe(PROMPTS, num_inference_steps=4, guidance_scale=1.0, generator=generators).images

OUTPUT.parent.mkdir(exist_ok=True)
make_image_grid(images, rows=len(MIXES), cols=len(PROMPTS)).save(OUTPUT)
print(OUTPUT.resolve())
