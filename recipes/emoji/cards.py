"""README.md of every shipped folder: what it is, data, licence, the commands that made it, its figures.

``python recipes/emoji/export.py --cards-only`` renews them; the figures are those that `evaluate.py` left in
``report.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from data import PACKAGES, load
from styles import BLOB, load_style

RECIPE = Path(__file__).parent
ZOO = RECIPE.parents[1] / "src" / "fourstroke" / "zoo" / "emoji"
TEMPLATE = """---
license: apache-2.0
tags: [fourstroke, emoji, {tags}]
---

# emoji/{name}

{text}

```python
{usage}
```

- **Data**: {data}
- **Licence**: {licence_text}
- **Made by** `recipes/emoji/` with seed 0 on two CPU cores: {command}. `recipes/emoji/README.md` has the steps.
- **Limits**: {limits}
{figures}"""
LIMITS = "it knows emoji, one on a white ground, by names close to their own. It does not compose scenes."
APACHE = "Apache-2.0, as the pictures. `NOTICE` in `emoji/base` holds the attributions."
LCM = """pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
pipe.load_lora_weights("emoji/{lora}lcm-lora", adapter_name="lcm")
"""
SD = (
    "from fourstroke import LCMScheduler, StableDiffusionPipeline\n\n"
    'pipe = StableDiffusionPipeline.from_pretrained("emoji/{base}")\n' + LCM.format(lora="")
)
XL = (
    "from fourstroke import LCMScheduler, StableDiffusionXLPipeline\n\n"
    'pipe = StableDiffusionXLPipeline.from_pretrained("emoji/xl")\n' + LCM.format(lora="xl-")
)
PAINT = 'image = pipe("a red fox", num_inference_steps=4, guidance_scale=1.0).images[0]'
EDGES = (
    'edges = Image.new("RGB", (128, 128))  # or fourstroke.controls.canny(photo)\n'
    'ImageDraw.Draw(edges).ellipse((24, 32, 104, 112), outline="white")\n'
    'image = pipe("a red apple", image=edges, num_inference_steps=4, guidance_scale=1.0).images[0]'
)
VIDEO = (
    "from fourstroke import AnimateDiffPipeline, LCMScheduler, MotionAdapter\n\n"
    'adapter = MotionAdapter.from_pretrained("emoji/motion-adapter")\n'
    'pipe = AnimateDiffPipeline.from_pretrained("emoji/base", motion_adapter=adapter)\n' + LCM.format(lora="")
)
FRAMES = 'frames = pipe("a red fox", num_frames=8, num_inference_steps=5, guidance_scale=1.0).frames[0]'


class Card(NamedTuple):
    """What is said of one folder; ``section`` is the part of the report that has its figures, ``style`` its
    pictures."""

    tags: str
    text: str
    usage: str
    command: str
    section: str = ""
    style: str = "noto"


CARDS = {
    "base": Card(
        "stable-diffusion, text-to-image",
        "A text-to-image model of Stable Diffusion 1.5's shape that paints emoji at 128x128. Text encoder, UNet and "
        "autoencoder were trained from nothing. Best with guidance 4 in 25 to 50 DDIM steps, or with `emoji/lcm-lora` "
        "in four.",
        SD.format(base="base") + PAINT,
        "`data.py`, `train_vae.py`, `train_text.py`, `train_unet.py`", "base",
    ),
    "lcm-lora": Card(
        "lora, lcm",
        "The LCM-LoRA of `emoji/base`: four steps without guidance, on its fine-tunes and with its style LoRAs, its "
        "ControlNet, its inpainting UNet and its motion adapter as well. Distilled at guidance 3 to 6 on the targets "
        "of the published LCM-LoRAs; alpha 8, rank 48 cut to 24 by singular values.",
        SD.format(base="base") + PAINT, "`distill_lcm.py`", "base",
    ),
    "tiny-vae": Card(
        "autoencoder",
        "A tiny autoencoder for the latents of the whole family, for previews and fast decoding.",
        'from fourstroke import AutoencoderTiny, DiffusionPipeline\n\n'
        'pipe = DiffusionPipeline.from_pretrained("emoji/base")\n'
        'pipe.vae = AutoencoderTiny.from_pretrained("emoji/tiny-vae")', "`train_tiny_vae.py`",
    ),
    "xl": Card(
        "stable-diffusion-xl, text-to-image",
        "A text-to-image model of SDXL's shape: two text encoders, micro-conditioning (original size, crop, target "
        "size), linear projections, a transformer of depth two at the lowest level. It began as `emoji/base` with a "
        "fifth of the lowest level's channels left out.",
        XL + PAINT, "`train_xl.py`", "xl",
    ),
    "xl-lcm-lora": Card(
        "lora, lcm", "The LCM-LoRA of `emoji/xl`.", XL + PAINT, "`fourstroke distill emoji/xl`", "xl",
    ),
    "blob": Card(
        "stable-diffusion, text-to-image",
        "`emoji/base` fine-tuned on another drawing style, Noto's older blobs. `emoji/lcm-lora` works on it as it is.",
        SD.format(base="blob") + PAINT, "`train_blob.py`", "blob", "blob",
    ),
    "flat-lora": Card(
        "lora, style", "A style LoRA for `emoji/base`: flat poster colours on cream. Combine it with `emoji/lcm-lora`.",
        SD.format(base="base") + 'pipe.load_lora_weights("emoji/flat-lora", adapter_name="flat")\n'
        'pipe.set_adapters(["lcm", "flat"], adapter_weights=[1.0, 0.8])\n' + PAINT,
        "`fourstroke train lora emoji/base`", "styles", "flat",
    ),
    "line-lora": Card(
        "lora, style", "A style LoRA for `emoji/base`: black line art. Combine it with `emoji/lcm-lora`.",
        SD.format(base="base") + 'pipe.load_lora_weights("emoji/line-lora", adapter_name="line")\n'
        'pipe.set_adapters(["lcm", "line"], adapter_weights=[1.0, 0.8])\n' + PAINT,
        "`fourstroke train lora emoji/base`", "styles", "line",
    ),
    "controlnet-canny": Card(
        "controlnet, canny", "A ControlNet for `emoji/base` that follows canny edges.",
        'from PIL import Image, ImageDraw\n\n'
        'from fourstroke import ControlNetModel, LCMScheduler, StableDiffusionControlNetPipeline\n\n'
        'controlnet = ControlNetModel.from_pretrained("emoji/controlnet-canny")\n'
        'pipe = StableDiffusionControlNetPipeline.from_pretrained("emoji/base", controlnet=controlnet)\n'
        + LCM.format(lora="") + EDGES,
        "`train_controlnet.py`", "control",
    ),
    "t2i-canny": Card(
        "t2i-adapter, canny", "A T2I-Adapter for `emoji/xl` that follows canny edges.",
        'from PIL import Image, ImageDraw\n\n'
        'from fourstroke import LCMScheduler, StableDiffusionXLAdapterPipeline, T2IAdapter\n\n'
        'adapter = T2IAdapter.from_pretrained("emoji/t2i-canny")\n'
        'pipe = StableDiffusionXLAdapterPipeline.from_pretrained("emoji/xl", adapter=adapter)\n'
        + LCM.format(lora="xl-") + EDGES,
        "`train_t2i.py`", "control",
    ),
    "inpainting": Card(
        "stable-diffusion, inpainting",
        "`emoji/base` with nine input channels: it also sees the mask and what is left of the picture.",
        'from PIL import Image\n\nfrom fourstroke import AutoPipelineForInpainting, LCMScheduler\n\n'
        'pipe = AutoPipelineForInpainting.from_pretrained("emoji/inpainting")\n' + LCM.format(lora="")
        + 'photo, mask = Image.new("RGB", (128, 128), "white"), Image.new("L", (128, 128))\n'
        + 'mask.paste(255, (16, 16, 112, 112))\n'
        + 'image = pipe("a pizza", image=photo, mask_image=mask, num_inference_steps=4, guidance_scale=1.0).images[0]',
        "`train_inpainting.py`", "inpainting",
    ),
    "motion-adapter": Card(
        "animatediff, motion",
        "A motion adapter for `emoji/base`, up to 16 frames, trained on drawn motion: faces, people, nature and "
        "food bounce, all else sways.",
        VIDEO + FRAMES,
        "`clips.py`, `train_motion.py`", "motion",
    ),
    "zoom-in-lora": Card(
        "animatediff, lora", "A motion LoRA for `emoji/motion-adapter`: the camera comes nearer.",
        VIDEO + 'pipe.load_lora_weights("emoji/zoom-in-lora", adapter_name="zoom-in")\n'
        'pipe.set_adapters(["lcm", "zoom-in"], [1.0, 1.0])\n' + FRAMES, "`train_motion_lora.py`", "motion",
    ),
    "pan-left-lora": Card(
        "animatediff, lora", "A motion LoRA for `emoji/motion-adapter`: the camera pans to the left.",
        VIDEO + 'pipe.load_lora_weights("emoji/pan-left-lora", adapter_name="pan-left")\n'
        'pipe.set_adapters(["lcm", "pan-left"], [1.0, 1.0])\n' + FRAMES, "`train_motion_lora.py`", "motion",
    ),
}  # fmt: skip


def data_of(style: str) -> str:
    """The pictures that were trained on, and whose they are."""
    package = BLOB if style == "blob" else PACKAGES["noto"]
    filtered = {"flat": ", in poster colours (`styles.py`)", "line": ", as ink outlines (`styles.py`)"}.get(style, "")
    return (
        f"{len(load_style(style)[0])} pictures of Noto Emoji (Apache-2.0, Google; npm `{package}`), drawn at 128x128 "
        f"on white{filtered}; captions from the names, keywords and shortcodes of emojibase (MIT, Miles Johnson; npm "
        f"`{PACKAGES['emojibase']}`). No flags, skin tones or keycaps."
    )


def figures_of(section: str) -> str:
    """The bars of the report that belong to a card, as a table; nothing when there are none."""
    path = RECIPE / "report.json"
    bars: dict[str, list[Any]] = json.loads(path.read_text()).get("bars", {}) if path.exists() else {}
    rows = [
        f"| {claim} | {figure} | {'holds' if holds else 'missed'} |" for claim, figure, holds in bars.get(section, [])
    ]
    if not rows:
        return ""
    head = ["", "Figures (`python recipes/emoji/evaluate.py`; recipes/emoji/report.md has all):", "",
            "| bar | figure | |", "|---|---|---|"]  # fmt: skip
    return "\n".join([*head, *rows, ""])


def write_cards() -> None:
    """Write README.md into every folder that is there."""
    load()
    for name, card in CARDS.items():
        if not (ZOO / name).is_dir():
            continue
        text = TEMPLATE.format(
            name=name, tags=card.tags, text=card.text, usage=card.usage, command=card.command, limits=LIMITS,
            data=data_of(card.style), licence_text=APACHE, figures=figures_of(card.section),
        )  # fmt: skip
        (ZOO / name / "README.md").write_text(text)
