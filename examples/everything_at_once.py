"""An inpainted, edge-guided picture in two LoRAs by one request: ``python examples/everything_at_once.py``.

The white part of the mask is painted anew along the edges of the picture in it, as flat art, in four steps: the
LCM-LoRA of the family is added by itself.
"""

from pathlib import Path

from PIL import Image

from fourstroke import Control, Engine
from fourstroke.controls import canny
from fourstroke.utils import make_image_grid

OUTPUT = Path("out/everything_at_once.png")

engine = Engine("emoji", loras=["emoji/flat-lora:0.8"])
heart = engine.generate("a red heart", seed=0).images[0]
mask = Image.new("L", heart.size)
mask.paste(255, (heart.width // 2, 0, heart.width, heart.height))
half = engine.generate(
    "a blue heart",
    image=heart,
    mask_image=mask,
    controls=[Control(canny(heart), scale=0.8, model="canny")],
    seed=0,
).images[0]

OUTPUT.parent.mkdir(exist_ok=True)
make_image_grid([heart, mask.convert("RGB"), half], rows=1, cols=3).save(OUTPUT)
print(OUTPUT.resolve())
