"""An inpainted, controlled, styled SDXL picture in one request: ``python examples/everything_at_once.py PHOTO MASK``.

The photo's edges steer the white part of the mask through a T2I-Adapter, in a style LoRA, in four steps: the LCM-LoRA
of the family is added by itself.
"""

import sys
from pathlib import Path

from fourstroke import Control, Engine
from fourstroke.controls import canny
from fourstroke.utils import load_image

OUTPUT = Path("out/everything_at_once.png")

photo, mask = load_image(sys.argv[1]), load_image(sys.argv[2])
engine = Engine(
    "stabilityai/stable-diffusion-xl-base-1.0",
    loras=["TheLastBen/Papercut_SDXL/papercut.safetensors:0.8"],
    variant="fp16",
)
result = engine.generate(
    "papercut, a cute fox",
    image=photo,
    mask_image=mask,
    adapters=[Control(canny(photo), scale=0.8, model="TencentARC/t2i-adapter-canny-sdxl-1.0")],
    seed=0,
)
OUTPUT.parent.mkdir(exist_ok=True)
result.images[0].save(OUTPUT)
print(OUTPUT.resolve())
