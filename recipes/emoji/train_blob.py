"""The fine-tuned base: `emoji/base` taught to draw Noto's old blobs. ``python recipes/emoji/train_blob.py --steps 350``

An ordinary fine-tuning of the whole UNet on another drawing style under the same captions; the text encoder and the
autoencoder stay `emoji/base`'s. The LCM-LoRA is never trained with it: that it works here too is what is to be shown.
"""

from __future__ import annotations

import torch
from data import CACHE, load, save_grid, to_floats
from distill_lcm import trained_networks
from latents import Latents, cached
from loop import Run, arguments, optimisers, say, train, use
from sampling import ddim, retrieval
from styles import load_style
from tokenizer import MAX_LENGTH
from torch import nn
from train_text import Captions, tokenizer_of_ours
from train_unet import CONFIG, PROMPTS, denoising_loss
from train_vae import trained as trained_vae

from fourstroke.models.unet import UNet2DConditionModel

BATCH = 64


@torch.no_grad()
def style_latents(style: str) -> tuple[Latents, torch.Tensor]:
    """Latents of the pictures of a style, with the base's scaling factor, and each one's place in the base's list."""
    pictures, index = load_style(style)
    vae, factor = trained_vae(), cached().scaling_factor
    with torch.autocast("cpu", torch.bfloat16):
        plain = torch.cat([vae.encode(part).mean.float() for part in to_floats(pictures).split(32)]) * factor
    return Latents(plain, plain[None], factor), index


def trained_blob() -> UNet2DConditionModel:
    """The averaged UNet, frozen."""
    unet = UNet2DConditionModel.from_config(CONFIG)
    unet.load_state_dict(torch.load(CACHE / "train" / "blob.ema.pt", weights_only=True)["unet"])
    return unet.eval().requires_grad_(False)


def main() -> None:
    """Fine-tune, and show what the sample prompts look like."""
    parser = arguments(__doc__, minutes=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    latents, index = style_latents("blob")
    emojis = [load()[1][i] for i in index.tolist()]
    tokenizer = tokenizer_of_ours(load()[1])
    unet, encoder = trained_networks()
    unet.requires_grad_(True).train()
    networks: dict[str, nn.Module] = {"unet": unet}
    loss = denoising_loss(unet, encoder, latents, Captions(emojis, tokenizer, MAX_LENGTH), BATCH, plain=1.0)
    run = Run("blob", CACHE / "train", options.steps, options.minutes, ema_decay=0.99, seed=options.seed)
    averages = train(run, networks, optimisers({"unet": (unet, options.rate)}), loss)
    own = torch.arange(0, len(emojis), len(emojis) // 96)[:96]
    with use(networks, averages), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        empty = encoder(tokenizer([""])).last_hidden_state
        texts = [list(PROMPTS), [emojis[i].name for i in own.tolist()]]
        drawn, named = (ddim(unet, encoder(tokenizer(t)).last_hidden_state, empty, 15, 4.0).float() for t in texts)
        pictures = torch.cat([trained_vae().decode(part / latents.scaling_factor) for part in drawn.split(16)])
    first, five = retrieval(named, own, latents.plain)
    say(f"blob: DDIM 15, guidance 4: {first:.1%} of 96 names retrieved, {five:.1%} in the top five")
    save_grid(pictures.float(), CACHE / "samples" / "blob.png")


if __name__ == "__main__":
    main()
