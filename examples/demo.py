"""Four steps with the LCM-LoRA, and beside it the same model, seed and steps without: ``python examples/demo.py``.

Nothing is downloaded: both come with the package. The last line printed is the path of the picture.
"""

from pathlib import Path

import torch
from PIL import Image

from fourstroke import DiffusionPipeline, LCMScheduler
from fourstroke.utils import make_image_grid

OUTPUT = Path("out/demo.png")
ENLARGED = 3

pipe = DiffusionPipeline.from_pretrained("emoji/base")
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)


def paint() -> Image.Image:
    generator = torch.manual_seed(4)
    image = pipe("a red fox", num_inference_steps=4, guidance_scale=1.0, generator=generator).images[0]
    return image.resize((image.width * ENLARGED, image.height * ENLARGED), Image.Resampling.LANCZOS)


pipe.load_lora_weights("emoji/lcm-lora")
with_lora = paint()
pipe.unload_lora_weights()
without_lora = paint()

OUTPUT.parent.mkdir(exist_ok=True)
make_image_grid([with_lora, without_lora], rows=1, cols=2).save(OUTPUT)
print("left: with the LCM-LoRA; right: without it")
print(OUTPUT.resolve())
