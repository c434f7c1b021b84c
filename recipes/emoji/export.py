"""Stage 6: what ships. ``python recipes/emoji/export.py`` writes src/fourstroke/zoo/emoji/{base,lcm-lora,tiny-vae}.

fp16 safetensors in diffusers' folder layout, so that diffusers itself loads them, with a card in each folder. The
figures in the cards are those that ``evaluate.py`` left in ``report.json``; run this again after an evaluation to
renew them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from data import CACHE, PACKAGES, load
from distill_lcm import ALPHA, GUIDANCE, RANK, Student, trained_networks
from latents import cached
from loop import say
from sampling import SCHEDULE
from tokenizer import MAX_LENGTH, Tokenizer
from torch import nn
from train_text import tokenizer_of_ours
from train_tiny_vae import CONFIG as TINY_CONFIG
from train_vae import trained as trained_vae

from fourstroke.config import config_to_dict
from fourstroke.loading import Model, save_tensors, write_json
from fourstroke.lora import Lora, LoraPair, save_lora
from fourstroke.models.vae_tiny import AutoencoderTiny

RECIPE = Path(__file__).parent
ZOO = RECIPE.parents[1] / "src" / "fourstroke" / "zoo" / "emoji"
PARTS = {
    "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"], "feature_extractor": [None, None], "image_encoder": [None, None],
    "safety_checker": [None, None],
}  # fmt: skip
VERSION = "0.30.0"  # of diffusers' layout
CARD = """---
license: apache-2.0
tags: [fourstroke, emoji, {tags}]
---

# {name}

{text}

- **Data**: {pictures} pictures of Noto Emoji (Apache-2.0, Google; npm `{noto}`), drawn at 128x128 on white; captions
  from the names, keywords and shortcodes of emojibase (MIT, Miles Johnson; npm `{emojibase}`). No flags, skin tones or
  keycaps.
- **Licence**: Apache-2.0, as the pictures. `NOTICE` in `emoji/base` holds the attributions.
- **Made by** `recipes/emoji/` with seed 0 on two CPU cores: {command}
- **Limits**: it knows emoji, one on a white ground, by names close to their own. It does not compose scenes.
{figures}
"""
NOTICE = """The pictures that these networks were trained on are Noto Emoji, Copyright Google LLC, licensed under the
Apache License, Version 2.0 (https://www.apache.org/licenses/LICENSE-2.0), taken from the npm package {noto}.

The captions are made of the names, keywords and shortcodes in the npm package {emojibase}:

{licence}"""


def half(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict in fp16."""
    return {name: tensor.half() for name, tensor in model.state_dict().items()}


def write_model(model: Model, folder: Path, stem: str, **extra: object) -> None:
    """config.json and fp16 weights."""
    write_json(folder / "config.json", {**config_to_dict(model.config), **extra})
    save_tensors(folder / f"{stem}.safetensors", half(model), metadata={"format": "pt"})


def export_base(folder: Path) -> None:
    """The pipeline folder of SD 1.5's shape."""
    unet, encoder = trained_networks()
    vae = trained_vae()
    factor = round(cached().scaling_factor, 5)
    vae_folder, stem = folder / "vae", "diffusion_pytorch_model"
    write_model(vae, vae_folder, stem, scaling_factor=factor, force_upcast=False, _diffusers_version=VERSION)
    write_model(unet, folder / "unet", stem, _diffusers_version=VERSION)
    write_model(encoder, folder / "text_encoder", "model", model_type="clip_text_model",
                architectures=["CLIPTextModel"], torch_dtype="float32", dropout=0.0, attention_dropout=0.0)  # fmt: skip
    tokenizer_of_ours(load()[1])
    shutil.copytree(CACHE / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    scheduler = {**SCHEDULE, "_class_name": "DDIMScheduler", "timestep_spacing": "leading", "trained_betas": None}
    write_json(folder / "scheduler" / "scheduler_config.json", {**scheduler, "_diffusers_version": VERSION})
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": VERSION, "requires_safety_checker": False}
    write_json(folder / "model_index.json", {**index, **PARTS})
    licence = next((CACHE / "npm").glob("emojibase-data*/package/LICENSE")).read_text()
    (folder / "NOTICE").write_text(NOTICE.format(**PACKAGES, licence=licence))


def export_lora(folder: Path, name: str = "lcm") -> None:
    """The pairs as a kohya-layout file with alpha, rank and steps in its header."""
    unet, _ = trained_networks()
    student = Student(unet)
    student.load_state_dict(torch.load(CACHE / "train" / f"{name}.ema.pt", weights_only=True)["pairs"])
    pairs = {path: LoraPair(p.down.detach(), p.up.detach(), p.alpha) for path, p in student.pairs.items()}
    steps = torch.load(CACHE / "train" / f"{name}.pt", weights_only=True)["steps"]
    about = {"base_model": "emoji/base", "rank": str(RANK), "alpha": str(ALPHA), "steps": str(steps),
             "guidance": f"{GUIDANCE[0]}-{GUIDANCE[1]}", "method": "latent consistency distillation"}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pytorch_lora_weights.safetensors"
    save_lora(path, Lora("lcm-lora", {"unet": pairs}), layout="kohya", dtype=torch.float16, metadata=about)


def export_tiny(folder: Path) -> None:
    """The tiny autoencoder."""
    tiny = AutoencoderTiny.from_config(TINY_CONFIG)
    tiny.load_state_dict(torch.load(CACHE / "train" / "tiny.ema.pt", weights_only=True)["tiny"])
    write_model(tiny, folder, "diffusion_pytorch_model", _diffusers_version=VERSION)


def write_cards() -> None:
    """README.md of every folder, with the figures of the last evaluation."""
    report = RECIPE / "report.json"
    rows = json.loads(report.read_text())["rows"] if report.exists() else []
    table = "\n".join(f"| {r['what']} | {r['top1']:.1%} | {r['top5']:.1%} |" for r in rows)
    figures = f"\n| | top-1 | top-5 |\n|---|---|---|\n{table}\n" if rows else ""
    common = {"pictures": len(load()[1]), **PACKAGES}
    cards = {
        "base": ("stable-diffusion, text-to-image", "`data.py`, `train_vae.py`, `train_text.py`, `train_unet.py`.",
                 figures,
                 "A text-to-image model of Stable Diffusion 1.5's shape that paints emoji at 128x128. Text encoder, "
                 "UNet and autoencoder were trained from nothing. Best with guidance 4 in 25 to 50 DDIM steps, or with "
                 "`emoji/lcm-lora` in four."),
        "lcm-lora": ("lora, lcm", "`distill_lcm.py`.", figures,
                     f"The LCM-LoRA of `emoji/base`: four steps without guidance. Rank {RANK}, alpha {ALPHA:g}, on the "
                     f"targets of the published LCM-LoRAs, distilled at guidance {GUIDANCE[0]:g} to {GUIDANCE[1]:g}."),
        "tiny-vae": ("autoencoder", "`train_tiny_vae.py`.", "",
                     "A tiny autoencoder for the latents of `emoji/base`, for previews and fast decoding."),
    }  # fmt: skip
    for name, (tags, command, shown, text) in cards.items():
        card = CARD.format(name=f"emoji/{name}", tags=tags, text=text, command=command, figures=shown, **common)
        if (ZOO / name).is_dir():
            (ZOO / name / "README.md").write_text(card)


def check_tokenizer(folder: Path) -> None:
    """The exported tokenizer still gives the ids that the text encoder was trained on."""
    texts = [emoji.name for emoji in load()[1]]
    if not torch.equal(Tokenizer(folder)(texts, MAX_LENGTH), Tokenizer(CACHE / "tokenizer")(texts, MAX_LENGTH)):
        raise RuntimeError(f"{folder} does not hold the tokenizer that was trained with; delete it and export again")


def main() -> None:
    """Export what is trained; parts that are not yet trained are left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards-only", action="store_true", help="renew the cards, leave the weights")
    parser.add_argument("--lora", default="lcm", help="name of the distillation run")
    options = parser.parse_args()
    if not options.cards_only:
        export_base(ZOO / "base")
        check_tokenizer(ZOO / "base" / "tokenizer")
        if (CACHE / "train" / f"{options.lora}.ema.pt").exists():
            export_lora(ZOO / "lcm-lora", options.lora)
        if (CACHE / "train" / "tiny.ema.pt").exists():
            export_tiny(ZOO / "tiny-vae")
    write_cards()
    size = sum(path.stat().st_size for path in ZOO.rglob("*") if path.is_file())
    say(f"{ZOO}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
