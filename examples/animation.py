"""A motion adapter, a motion LoRA and the LCM-LoRA in five steps: ``python examples/animation.py``."""

from pathlib import Path

import torch

from fourstroke import AnimateDiffPipeline, LCMScheduler, MotionAdapter
from fourstroke.utils import export_to_gif, make_image_grid

FOLDER = Path("out")
MIXES = {"moving": [1.0, 0.0], "zooming": [1.0, 1.0]}

adapter = MotionAdapter.from_pretrained("emoji/motion-adapter")
pipe = AnimateDiffPipeline.from_pretrained("emoji/base", motion_adapter=adapter)
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
pipe.load_lora_weights("emoji/lcm-lora", adapter_name="lcm")
pipe.load_lora_weights("emoji/zoom-in-lora", adapter_name="zoom-in")

FOLDER.mkdir(exist_ok=True)
for name, weights in MIXES.items():
    pipe.set_adapters(["lcm", "zoom-in"], weights)
    made = pipe("a red fox", num_frames=8, num_inference_steps=5, guidance_scale=1.0, generator=torch.manual_seed(0))
    frames = made.frames[0]
    print(Path(export_to_gif(frames, str(FOLDER / f"{name}.gif"), fps=8)).resolve())
    make_image_grid(frames, rows=1, cols=len(frames)).save(FOLDER / f"{name}.png")
