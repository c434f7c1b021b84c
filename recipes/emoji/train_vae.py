"""Stage 1: the autoencoder. ``python recipes/emoji/train_vae.py --minutes 35``, then ``--polish --minutes 15`` at any
time.

The first run trains encoder and decoder on 64x64 crops and on whole pictures in turn, with L1 + L1 of the gradients +
L2 and a faint KL term (1e-6). ``--polish`` freezes the encoder, so that latents and everything trained on them stay
valid, and goes on with the decoder alone on whole pictures, from latents with a little noise, as a denoiser leaves
them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from data import CACHE, load, save_grid, to_floats
from loop import Run, arguments, optimisers, train, use
from torch import Tensor

from fourstroke.models.vae import AutoencoderKL

CONFIG = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": 128, "act_fn": "silu",
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 128], "layers_per_block": 1, "norm_num_groups": 8,
}  # fmt: skip
CROP, CROPS, WHOLES = 64, 32, 8
KL_WEIGHT = 1e-6
LATENT_NOISE = 0.1  # of the latents' own spread, for --polish
PAD = 8


def batch(pictures: Tensor, step: int, generator: torch.Generator, whole: bool) -> Tensor:
    """A batch in -1..1, flipped at random and placed at random in a wider white field: crops, or whole pictures."""
    count, size = (WHOLES, pictures.shape[-1]) if whole else (CROPS, CROP)
    chosen = torch.randint(len(pictures), (count,), generator=generator)
    offsets = torch.randint(pictures.shape[-1] + 2 * PAD - size + 1, (count, 2), generator=generator).tolist()
    flips = torch.randint(2, (count,), generator=generator).tolist()
    found = []
    for index, (top, left), flip in zip(chosen.tolist(), offsets, flips, strict=True):
        field = torch.nn.functional.pad(pictures[index], (PAD, PAD, PAD, PAD), value=255)
        crop = field[:, top : top + size, left : left + size]
        found.append(crop.flip(-1) if flip else crop)
    return to_floats(torch.stack(found))


def reconstruction(made: Tensor, picture: Tensor) -> dict[str, Tensor]:
    """L1, L1 of the horizontal and vertical gradients (crisp edges), and L2, each a mean."""
    error = made.float() - picture
    across, down = error.diff(dim=-1).abs().mean(), error.diff(dim=-2).abs().mean()
    return {"l1": error.abs().mean(), "edges": across + down, "l2": error.square().mean()}


def train_both(vae: AutoencoderKL, pictures: Tensor) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    """The loss of the first run."""

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        picture = batch(pictures, step, generator, whole=step % 2 == 1)
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(picture)
            mean, logvar = latents.mean.float(), latents.logvar.float()
            made = vae.decode(mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator))
        parts = reconstruction(made, picture)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        return {"loss": parts["l1"] + parts["edges"] + parts["l2"] + KL_WEIGHT * kl, **parts, "kl": kl}

    return loss


def train_decoder(vae: AutoencoderKL, pictures: Tensor) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    """The loss of ``--polish``."""

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        picture = batch(pictures, step, generator, whole=True)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                mean = vae.encode(picture).mean.float()
            noise = torch.randn(mean.shape, generator=generator) * mean.std() * LATENT_NOISE
            made = vae.decode(mean + noise * torch.rand(len(mean), 1, 1, 1, generator=generator))
        parts = reconstruction(made, picture)
        return {"loss": parts["l1"] + parts["edges"] + parts["l2"], **parts}

    return loss


def trained() -> AutoencoderKL:
    """The autoencoder as far as it is trained: averaged weights, the polished decoder when there is one."""
    folder = CACHE / "train"
    vae = AutoencoderKL.from_config(CONFIG)
    name = "vae-polish" if (folder / "vae-polish.ema.pt").exists() else "vae"
    vae.load_state_dict(torch.load(folder / f"{name}.ema.pt", weights_only=True)["vae"])
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Pictures through the autoencoder, most likely latents."""
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([vae.decode(vae.encode(part).mean.float()).float() for part in pictures.split(32)])


def main() -> None:
    """Train, with a sample sheet of originals over reconstructions from time to time."""
    parser = arguments(__doc__, minutes=35)
    parser.add_argument("--polish", action="store_true", help="train the decoder alone, from the finished first run")
    parser.add_argument("--rate", type=float, default=2e-3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    pictures, _ = load()
    name = "vae-polish" if options.polish else "vae"
    if options.polish:
        vae = trained()
        vae.decoder.requires_grad_(True)
        vae.post_quant_conv.requires_grad_(True)
    else:
        vae = AutoencoderKL.from_config(CONFIG)
    vae.train()
    shown = to_floats(pictures[:: len(pictures) // 32][:32])

    def sheet(step: int) -> None:
        rows = torch.stack([shown, reconstruct(vae, shown)], 1).flatten(0, 1)
        save_grid(rows, CACHE / "samples" / f"{name}-{step:06d}.png", columns=16)

    run = Run(name, CACHE / "train", options.steps, options.minutes, seed=options.seed, after=sheet)
    averages = train(
        run, {"vae": vae}, optimisers({"vae": (vae, options.rate)}),
        train_decoder(vae, pictures) if options.polish else train_both(vae, pictures),
    )  # fmt: skip
    with use({"vae": vae}, averages):
        sheet(999_999)


if __name__ == "__main__":
    main()
