"""Stage 3: the UNet, with the text encoder along at a fifth of its rate.

``python recipes/emoji/train_unet.py --minutes 65``, then ``--refine --steps 3000``: the second goes on from the first
with few moved copies, so that where a picture stands is no question any more and four steps can be sharp.

Epsilon prediction on cached latents, scaled_linear betas, min-SNR weights (Hang et al. 2023, gamma 5), 10 % empty
captions for guidance. Noisy timesteps are drawn more often than clean ones: four-step sampling stands on them, and
tinted backgrounds are the sign of too little training there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from data import CACHE, load, save_grid
from latents import Latents, cached
from loop import Run, arguments, optimisers, say, train, use
from sampling import SCHEDULE, ddim, retrieval
from tokenizer import MAX_LENGTH, Tokenizer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_text import WIDTH, Captions, text_config, tokenizer_of_ours
from train_vae import trained

from fourstroke.models.clip import CLIPTextModel
from fourstroke.models.unet import UNet2DConditionModel
from fourstroke.schedulers.noise import add_noise, make_betas

CONFIG = {
    "sample_size": 16, "in_channels": 4, "out_channels": 4, "block_out_channels": [64, 128, 160],
    "layers_per_block": 1, "norm_num_groups": 16, "attention_head_dim": 4, "cross_attention_dim": WIDTH,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
BATCH, BATCH_REFINED = 32, 64
PLAIN, PLAIN_REFINED = 0.6, 0.9  # the part of plain latents; the rest are moved copies
EMPTY = 0.1
GAMMA = 5.0
NOISIER = 0.7  # timestep = 1000 u^0.7: the noisiest tenth is drawn twice as often as the cleanest
PROMPTS = ("a red fox", "a cat face", "a red heart", "a pine tree", "a red apple", "sunglasses", "a rocket", "a pizza",
           "a grinning face", "a dog", "an octopus", "a bicycle", "a guitar", "a snowman", "a house", "the sun",
           "a blue whale", "a crab", "a unicorn", "a lion", "a strawberry", "a cactus", "a red car", "a ghost",
           "a crown", "a key", "a fox", "a panda", "a rainbow", "a robot", "a mushroom", "a bee")  # fmt: skip


def alphas_cumprod() -> Tensor:
    """The forward process' cumulative alphas, (1000,)."""
    betas = make_betas(SCHEDULE["beta_schedule"], SCHEDULE["beta_start"], SCHEDULE["beta_end"], 1000)
    return torch.cumprod(1 - betas, 0)


def min_snr_weight(alphas: Tensor, gamma: float = GAMMA) -> Tensor:
    """min(SNR, gamma) / SNR with SNR = a / (1 - a): the weight of the noise's squared error (arXiv 2303.09556, eq.
    6)."""
    snr = alphas / (1 - alphas)
    return snr.clamp(max=gamma) / snr


def draw_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """Timesteps 0..999, the noisy ones more often."""
    return (1000 * torch.rand(count, generator=generator) ** NOISIER).long().clamp(max=999)


def noise_errors(predicted: Tensor, noise: Tensor, timesteps: Tensor, alphas: Tensor) -> dict[str, Tensor]:
    """The weighted squared error as ``loss``; unweighted, ``error``, and ``noisy``, its part at t >= 700."""
    errors = (predicted - noise).square().mean((1, 2, 3))
    noisy = errors[timesteps >= 700].mean().nan_to_num()
    return {"loss": (errors * min_snr_weight(alphas[timesteps])).mean(), "error": errors.mean(), "noisy": noisy}


def denoising_loss(
    unet: UNet2DConditionModel, encoder: CLIPTextModel, latents: Latents, captions: Captions, batch: int, plain: float
) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    """The loss of a step; ``noisy`` is its part at t >= 700, unweighted.

    Plain attention: its backward pass is faster here than the flash kernel's (64 pixels, 77 tokens).
    """
    alphas = alphas_cumprod()

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(latents.plain), (batch,), generator=generator)
        clean = latents.draw(chosen, generator, plain)
        ids = captions.draw(chosen, generator)
        ids[torch.rand(batch, generator=generator) < EMPTY] = captions.empty
        timesteps = draw_timesteps(batch, generator)
        noise = torch.randn(clean.shape, generator=generator)
        sample = add_noise(clean, noise, alphas[timesteps])
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            predicted = unet(sample, timesteps, encoder(ids).last_hidden_state)
        return noise_errors(predicted.float(), noise, timesteps, alphas)

    return loss


def initialise(unet: nn.Module) -> None:
    """Every residual branch starts at zero, and so does the output."""
    for name, weight in unet.named_parameters():
        if name.endswith(("conv2.weight", "conv_out.weight", "proj_out.weight", "to_out.0.weight", "net.2.weight")):
            nn.init.zeros_(weight)


class Sheet:
    """Draws the sample prompts and tests the binding of 96 names between training steps."""

    def __init__(self, unet: nn.Module, encoder: nn.Module, tokenizer: Tokenizer, latents: Latents, name: str):
        self.unet, self.encoder, self.tokenizer, self.latents, self.name = unet, encoder, tokenizer, latents, name
        self.vae = trained()
        emojis = load()[1]
        self.own = torch.arange(0, len(emojis), len(emojis) // 96)[:96]
        self.names = [emojis[i].name for i in self.own.tolist()]

    def text(self, prompts: list[str]) -> Tensor:
        """Hidden states (B, L, D) of prompts."""
        with torch.no_grad():
            return self.encoder(self.tokenizer(prompts)).last_hidden_state

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of scaled latents."""
        with torch.no_grad():
            return torch.cat([self.vae.decode(p / self.latents.scaling_factor) for p in latents.split(16)])

    def __call__(self, step: int) -> None:
        empty = self.text([""])
        with torch.autocast("cpu", torch.bfloat16):
            drawn = ddim(self.unet, self.text(list(PROMPTS)), empty, 25, 4.0)
            named = ddim(self.unet, self.text(self.names), empty, 15, 4.0)
        first, five = retrieval(named.float(), self.own, self.latents.plain)
        say(f"{self.name} {step}: DDIM 15, guidance 4: {first:.1%} of 96 names retrieved, {five:.1%} in the top five")
        save_grid(self.decode(drawn.float()), CACHE / "samples" / f"{self.name}-{step:06d}.png")


def main() -> None:
    """Train both networks, from the pretrained text encoder."""
    parser = arguments(__doc__, minutes=70)
    parser.add_argument("--rate", type=float, default=1.6e-3)
    parser.add_argument(
        "--refine", action="store_true", help="go on from the finished first run, with few moved copies"
    )
    options = parser.parse_args()
    name, plain, batch = ("unet-refine", PLAIN_REFINED, BATCH_REFINED) if options.refine else ("unet", PLAIN, BATCH)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    latents = cached()
    emojis = load()[1]
    tokenizer = tokenizer_of_ours(emojis)
    captions = Captions(emojis, tokenizer, MAX_LENGTH)
    encoder = CLIPTextModel.from_config(text_config(tokenizer))
    encoder.load_state_dict(torch.load(CACHE / "train" / "text.ema.pt", weights_only=True)["text_encoder"])
    unet = UNet2DConditionModel.from_config(CONFIG)
    initialise(unet)
    if options.refine:
        saved = torch.load(CACHE / "train" / "unet.ema.pt", weights_only=True)
        unet.load_state_dict(saved["unet"])
        encoder.load_state_dict(saved["text_encoder"])
    networks: dict[str, nn.Module] = {"unet": unet.train(), "text_encoder": encoder.train()}
    sheet = Sheet(unet, encoder, tokenizer, latents, name)
    run = Run(name, CACHE / "train", options.steps, options.minutes, seed=options.seed, after=sheet, after_every=1000)
    peaks = {"unet": (unet, options.rate), "text_encoder": (encoder, options.rate / 5)}
    averages = train(run, networks, optimisers(peaks), denoising_loss(unet, encoder, latents, captions, batch, plain))
    with use(networks, averages):
        sheet(999_999)


if __name__ == "__main__":
    main()
