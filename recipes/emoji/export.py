"""What ships. ``python recipes/emoji/export.py`` writes the folders of src/fourstroke/zoo/emoji.

fp16 safetensors in diffusers' folder layout. A model that has a component in common with `emoji/base` names it in
``shared.json`` (see `fourstroke.hub.part`); ``save_pretrained`` writes any of them whole, for other programs. What is
not yet trained is left out; the cards come last, see `cards.py`.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import train_blob
import train_controlnet
import train_inpainting
import train_motion
import train_motion_lora
import train_t2i
import train_xl
from cards import ZOO, write_cards
from data import CACHE, PACKAGES, load
from distill_lcm import ALPHA, GUIDANCE, Student, trained_networks
from folders import write_model, write_pipeline, write_text_encoder
from latents import cached
from loop import say
from styles import BLOB
from tokenizer import MAX_LENGTH, Tokenizer
from train_text import tokenizer_of_ours
from train_tiny_vae import CONFIG as TINY_CONFIG
from train_vae import trained as trained_vae

from fourstroke.lora import Lora, LoraPair, read_lora, save_lora
from fourstroke.models.vae_tiny import AutoencoderTiny

LCM_RANK, XL_LCM_RANK = 24, 12  # of the files, from the trained 48 and 16: less than a hundredth of the energy is lost
STYLE_GAIN = 1.25  # so that the usual weight of 0.8 shows a style as it was trained
LORA_NAME = "pytorch_lora_weights.safetensors"
BASE_PARTS = {name: f"emoji/base/{name}" for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
NOTICE = """The pictures that these networks were trained on:

Noto Emoji, today's and the older blobs, Copyright Google LLC, licensed under the Apache License, Version 2.0
(https://www.apache.org/licenses/LICENSE-2.0), taken from the npm packages {noto} and {blob}.

The captions are made of the names, keywords and shortcodes in the npm package {emojibase}:

{licence}"""


def export_base(folder: Path) -> None:
    """The pipeline folder of SD 1.5's shape."""
    unet, encoder = trained_networks()
    factor = round(cached().scaling_factor, 5)
    write_model(trained_vae(), folder / "vae", scaling_factor=factor, force_upcast=False)
    write_model(unet, folder / "unet")
    write_text_encoder(encoder, folder / "text_encoder")
    tokenizer_of_ours(load()[1])
    shutil.copytree(CACHE / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    check_tokenizer(folder / "tokenizer")
    write_pipeline(folder, "StableDiffusionPipeline", {}, requires_safety_checker=False)
    licence = next((CACHE / "npm").glob("emojibase-data*/package/LICENSE")).read_text()
    (folder / "NOTICE").write_text(NOTICE.format(**PACKAGES, blob=BLOB, licence=licence))


def check_tokenizer(folder: Path) -> None:
    """The exported tokenizer still gives the ids that the text encoder was trained on."""
    texts = [emoji.name for emoji in load()[1]]
    if not torch.equal(Tokenizer(folder)(texts, MAX_LENGTH), Tokenizer(CACHE / "tokenizer")(texts, MAX_LENGTH)):
        raise RuntimeError(f"{folder} does not hold the tokenizer that was trained with; delete it and export again")


def export_xl(folder: Path) -> None:
    """The pipeline folder of SDXL's shape."""
    unet, encoders = train_xl.trained_xl()
    write_model(unet, folder / "unet")
    write_text_encoder(encoders.second, folder / "text_encoder_2")
    shared = {**BASE_PARTS, "tokenizer_2": "emoji/base/tokenizer"}
    write_pipeline(folder, "StableDiffusionXLPipeline", shared, force_zeros_for_empty_prompt=False)


def export_fine_tuned(folder: Path) -> None:
    """The base in another style: its UNet."""
    write_model(train_blob.trained_blob(), folder / "unet")
    write_pipeline(folder, "StableDiffusionPipeline", BASE_PARTS, requires_safety_checker=False)


def export_inpainting(folder: Path) -> None:
    """The inpainting model: its UNet."""
    train_inpainting.export(folder)
    write_pipeline(folder, "StableDiffusionInpaintPipeline", BASE_PARTS, requires_safety_checker=False)


def truncated(pair: LoraPair, rank: int) -> LoraPair:
    """The pair of a smaller rank that is nearest in the Frobenius norm (Eckart & Young 1936), of the same alpha."""
    up, down = pair.up.detach().flatten(1).double(), pair.down.detach().flatten(1).double()
    left, values, right = torch.linalg.svd(up @ down * (rank / up.shape[1]), full_matrices=False)
    root = values[:rank].sqrt()
    shape_up, shape_down = (len(up), rank, *pair.up.shape[2:]), (rank, *pair.down.shape[1:])
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    return LoraPair(down.float().view(shape_down), up.float().view(shape_up), pair.alpha)


def export_lcm_lora(folder: Path) -> None:
    """The base's LCM-LoRA in the layout of the published ones (kohya), its alpha, rank and steps in the header."""
    unet, _ = trained_networks()
    student = Student(unet)
    student.load_state_dict(torch.load(CACHE / "train" / "lcm.ema.pt", weights_only=True)["pairs"])
    pairs = {path: truncated(pair, LCM_RANK) for path, pair in student.pairs.items()}
    steps = torch.load(CACHE / "train" / "lcm.pt", weights_only=True)["steps"]
    about = {"base_model": "emoji/base", "rank": str(LCM_RANK), "alpha": str(ALPHA), "steps": str(steps),
             "guidance": f"{GUIDANCE[0]}-{GUIDANCE[1]}", "method": "latent consistency distillation"}  # fmt: skip
    write_lora(folder, pairs, about)


def export_tiny_vae(folder: Path) -> None:
    """The tiny autoencoder."""
    tiny = AutoencoderTiny.from_config(TINY_CONFIG)
    tiny.load_state_dict(torch.load(CACHE / "train" / "tiny.ema.pt", weights_only=True)["tiny"])
    write_model(tiny, folder)


def export_xl_lcm_lora(folder: Path) -> None:
    """The LCM-LoRA of the XL model as `fourstroke distill` left it, cut to fewer ranks."""
    lora = read_lora(CACHE / "train" / "xl-lcm" / LORA_NAME, {"unet": train_xl.trained_xl()[0]})
    pairs = {path: truncated(pair, XL_LCM_RANK) for path, pair in lora.components["unet"].items()}
    write_lora(folder, pairs, {**lora.metadata, "rank": str(XL_LCM_RANK)})


def export_style(run: str) -> Callable[[Path], None]:
    """What `fourstroke train lora` left in ``.cache/train/<run>``, stronger by STYLE_GAIN."""

    def export(folder: Path) -> None:
        lora = read_lora(CACHE / "train" / run / LORA_NAME, {"unet": trained_networks()[0]})
        pairs = {
            path: LoraPair(pair.down, pair.up, STYLE_GAIN * (pair.alpha or len(pair.down)))
            for path, pair in lora.components["unet"].items()
        }
        write_lora(folder, pairs, {**lora.metadata, "alpha": f"{STYLE_GAIN * float(lora.metadata['alpha']):g}"})

    return export


def write_lora(folder: Path, pairs: Mapping[str, LoraPair], about: Mapping[str, str]) -> None:
    """Pairs of the UNet in kohya's layout, fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    lora = Lora(folder.name, {"unet": pairs})
    save_lora(folder / LORA_NAME, lora, layout="kohya", dtype=torch.float16, metadata=about)


# name: (what it is made from, how it is written)
EXPORTS: Mapping[str, tuple[str, Callable[[Path], None]]] = {
    "base": ("unet-refine.ema.pt", export_base),
    "lcm-lora": ("lcm.ema.pt", export_lcm_lora),
    "tiny-vae": ("tiny.ema.pt", export_tiny_vae),
    "xl": ("xl.ema.pt", export_xl),
    "xl-lcm-lora": (f"xl-lcm/{LORA_NAME}", export_xl_lcm_lora),
    "blob": ("blob.ema.pt", export_fine_tuned),
    "flat-lora": (f"flat/{LORA_NAME}", export_style("flat")),
    "line-lora": (f"line-more/{LORA_NAME}", export_style("line-more")),
    "controlnet-canny": ("controlnet.ema.pt", train_controlnet.export),
    "t2i-canny": ("t2i.ema.pt", train_t2i.export),
    "inpainting": ("inpainting.ema.pt", export_inpainting),
    "motion-adapter": ("motion.ema.pt", train_motion.export),
    "zoom-in-lora": ("zoom-in.ema.pt", lambda folder: train_motion_lora.export(folder, "zoom-in")),
    "pan-left-lora": ("pan-left.ema.pt", lambda folder: train_motion_lora.export(folder, "pan-left")),
}


def main() -> None:
    """Export what is trained, all or the named ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(EXPORTS)}; default: all")
    parser.add_argument("--cards-only", action="store_true", help="renew the cards, leave the weights")
    options = parser.parse_args()
    for name in () if options.cards_only else options.names or EXPORTS:
        source, write = EXPORTS[name]
        if (CACHE / "train" / source).exists():
            write(ZOO / name)
        else:
            say(f"{name}: left out, {CACHE / 'train' / source} is not there")
    write_cards()
    size = sum(path.stat().st_size for path in ZOO.rglob("*.safetensors"))
    say(f"{ZOO}: {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main()
