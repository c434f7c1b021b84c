"""A part of a picture painted anew by an inpainting model and the LCM-LoRA: ``python examples/inpainting.py``."""

from pathlib import Path

import torch
from PIL import Image

from fourstroke import AutoPipelineForInpainting, DiffusionPipeline, LCMScheduler
from fourstroke.utils import make_image_grid

OUTPUT = Path("out/inpainting.png")

base = DiffusionPipeline.from_pretrained("emoji/base")
base.scheduler = LCMScheduler.from_config(base.scheduler.config)
base.load_lora_weights("emoji/lcm-lora")
picture = base("a cat face", num_inference_steps=4, guidance_scale=1.0, generator=torch.manual_seed(1)).images[0]
mask = Image.new("L", picture.size)
mask.paste(255, (0, 0, picture.width, picture.height // 2))

pipe = AutoPipelineForInpainting.from_pretrained("emoji/inpainting")
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
pipe.load_lora_weights("emoji/lcm-lora")
painted = pipe(
    "a lion", image=picture, mask_image=mask, num_inference_steps=4, guidance_scale=1.0, generator=torch.manual_seed(0)
).images[0]

OUTPUT.parent.mkdir(exist_ok=True)
make_image_grid([picture, mask.convert("RGB"), painted], rows=1, cols=3).save(OUTPUT)
print(OUTPUT.resolve())
