"""One picture painted over by another: ``python examples/image_to_image.py``, offline, with the shipped model.

``strength`` says how much may change. It shortens the noise range, so all four steps run.
"""

from pathlib import Path

from fourstroke import Engine
from fourstroke.utils import make_image_grid

OUTPUT = Path("out/image_to_image.png")

engine = Engine("emoji")
apple = engine.generate("a red apple", seed=0).images[0]
lemons = [engine.generate("a lemon", image=apple, strength=strength, seed=0).images[0] for strength in (0.4, 0.6, 0.9)]

OUTPUT.parent.mkdir(exist_ok=True)
make_image_grid([apple, *lemons], rows=1, cols=4).save(OUTPUT)
print(OUTPUT.resolve())
