"""The base's LCM-LoRA on a model that was fine-tuned from the base: ``python examples/fine_tuned.py``.

Above the base, below the fine-tuned model: the same LoRA, which was never trained with the second.
"""

from pathlib import Path

import torch

from fourstroke import DiffusionPipeline, LCMScheduler
from fourstroke.utils import make_image_grid

OUTPUT = Path("out/fine_tuned.png")
PROMPTS = ["a red fox", "a grinning face", "a pizza", "a ghost", "a snowman"]
MODELS = ("emoji/base", "emoji/blob")

images = []
for model in MODELS:
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights("emoji/lcm-lora")
    generators = [torch.Generator().manual_seed(0) for _ in PROMPTS]
    images += pipe(PROMPTS, num_inference_steps=4, guidance_scale=1.0, generator=generators).images

OUTPUT.parent.mkdir(exist_ok=True)
make_image_grid(images, rows=len(MODELS), cols=len(PROMPTS)).save(OUTPUT)
print(OUTPUT.resolve())
