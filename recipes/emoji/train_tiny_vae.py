"""Stage 5: the tiny autoencoder, for previews and fast decoding. ``python recipes/emoji/train_tiny_vae.py --minutes 8``

Encoder and decoder learn at once and apart: pictures to the large encoder's scaled latents, and these latents, with a
little noise, to pictures. Both work on latents of unit spread, so that its ``scaling_factor`` is 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from data import CACHE, load, save_grid, to_floats
from latents import Latents, cached
from loop import Run, arguments, optimisers, train, use
from torch import Tensor
from train_vae import LATENT_NOISE, batch, reconstruction, trained

from fourstroke.models.vae import AutoencoderKL
from fourstroke.models.vae_tiny import AutoencoderTiny

WIDTH = 32
CONFIG = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "act_fn": "relu", "scaling_factor": 1.0,
    "encoder_block_out_channels": [WIDTH] * 4, "decoder_block_out_channels": [WIDTH] * 4,
    "num_encoder_blocks": [1, 1, 1, 1], "num_decoder_blocks": [2, 2, 2, 1],
}  # fmt: skip


def tiny_loss(
    tiny: AutoencoderTiny, vae: AutoencoderKL, latents: Latents, pictures: Tensor
) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    """Reconstruction by the decoder, and squared error of the encoder's latents."""

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        picture = batch(pictures, step, generator, whole=True)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                target = vae.encode(picture).mean.float() * latents.scaling_factor
            level = LATENT_NOISE * torch.rand(len(target), 1, 1, 1, generator=generator)
            made = tiny.decode(target + level * torch.randn(target.shape, generator=generator))
            encoded = tiny.encode(picture).float()
        parts = reconstruction(made, picture)
        parts["latents"] = (encoded - target).square().mean()
        return {"loss": parts["l1"] + parts["edges"] + parts["l2"] + parts["latents"], **parts}

    return loss


def main() -> None:
    """Train, with sheets of originals, reconstructions and the large decoder's pictures of the tiny encoder's
    latents."""
    parser = arguments(__doc__, minutes=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    vae, latents, pictures = trained(), cached(), load()[0]
    tiny = AutoencoderTiny.from_config(CONFIG)
    tiny.train()
    shown = to_floats(pictures[:: len(pictures) // 16][:16])

    def sheet(step: int) -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            decoded = tiny.decode(vae.encode(shown).mean.float() * latents.scaling_factor).float()
            encoded = vae.decode(tiny.encode(shown).float() / latents.scaling_factor).float()
        save_grid(torch.cat([shown, decoded, encoded]), CACHE / "samples" / f"tiny-{step:06d}.png", columns=16)

    run = Run("tiny", CACHE / "train", options.steps, options.minutes, seed=options.seed, after=sheet)
    loss = tiny_loss(tiny, vae, latents, pictures)
    averages = train(run, {"tiny": tiny}, optimisers({"tiny": (tiny, options.rate)}), loss)
    with use({"tiny": tiny}, averages):
        sheet(999_999)


if __name__ == "__main__":
    main()
