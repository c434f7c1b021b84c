"""The masked half of a picture painted anew: ``python examples/inpainting.py``, offline, with the shipped model."""

from pathlib import Path

from PIL import Image

from fourstroke import Engine
from fourstroke.utils import make_image_grid

OUTPUT = Path("out/inpainting.png")

engine = Engine("emoji")
picture = engine.generate("a cat face", seed=1).images[0]
mask = Image.new("L", picture.size)
mask.paste(255, (0, 0, picture.width, picture.height // 2))
painted = engine.generate("a lion", image=picture, mask_image=mask, seed=0).images[0]

OUTPUT.parent.mkdir(exist_ok=True)
make_image_grid([picture, mask.convert("RGB"), painted], rows=1, cols=3).save(OUTPUT)
print(OUTPUT.resolve())
