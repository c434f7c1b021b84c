"""Three animations by one engine: ``python examples/animation.py VIDEO``.

A long one from words, painted in windows of frames; a video repainted; and a video whose edges steer new frames.
"""

import sys
from pathlib import Path

from fourstroke import Control, Engine, Windows
from fourstroke.controls import canny
from fourstroke.utils import export_to_gif, load_video

FOLDER = Path("out")
STYLE = "best quality, a fox in the snow"

video = load_video(sys.argv[1])[:16]
engine = Engine(
    "frankjoshua/toonyou_beta6",
    loras=["guoyww/animatediff-motion-lora-zoom-in/diffusion_pytorch_model.safetensors:0.8"],
    motion="diffusers/animatediff-motion-adapter-v1-5",
)
edges = Control([canny(frame) for frame in video], scale=0.8, model="lllyasviel/sd-controlnet-canny")
animations = {
    "long": engine.generate(STYLE, num_frames=32, windows=Windows(length=16, stride=8), seed=0),
    "repainted": engine.generate(STYLE, image=video, strength=0.6, num_frames=len(video), seed=0),
    "steered": engine.generate(STYLE, controls=[edges], num_frames=len(video), seed=0),
}
FOLDER.mkdir(exist_ok=True)
for name, animation in animations.items():
    print(Path(export_to_gif(animation.images[0], str(FOLDER / f"{name}.gif"), fps=8)).resolve())
