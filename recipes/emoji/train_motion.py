"""The motion adapter. ``python recipes/emoji/train_motion.py --steps 400``

Attention between frames (`fourstroke.models.motion`) is put between the layers of the frozen base UNet and learns to
predict the noise of whole clips (`clips.py`). Only it is trained; its output layers start at zero, where the base
paints every frame for itself.

The betas are the base's own (scaled_linear), since the LCM-LoRA was distilled with them; AnimateDiff's adapters for
SD 1.5 want linear ones. Noise is drawn for every frame by itself, as the pipelines draw it. Two things are
there for few steps, which decide at the noisiest timesteps what moves and how: these are drawn more often, and the
error is that of the velocity, which there is the error of the picture; that of the noise would hardly see it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from clips import LENGTH, Clips, clips
from data import CACHE, load, save_grid
from distill_lcm import Student, trained_networks
from folders import write_model
from latents import cached
from loop import Run, arguments, optimisers, say, train, use
from sampling import consistency
from tokenizer import MAX_LENGTH, Tokenizer
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_text import Captions, tokenizer_of_ours
from train_unet import CONFIG as BASE
from train_unet import EMPTY, alphas_cumprod
from train_vae import trained

from fourstroke.lora.layers import effective_weights
from fourstroke.models.clip import CLIPTextModel
from fourstroke.models.motion import MotionAdapter, attach_motion_
from fourstroke.models.unet import UNet2DConditionModel
from fourstroke.schedulers.noise import add_noise

CONFIG = {
    "block_out_channels": BASE["block_out_channels"], "motion_layers_per_block": BASE["layers_per_block"],
    "motion_transformer_layers_per_block": 1, "motion_num_attention_heads": 4,
    "motion_norm_num_groups": BASE["norm_num_groups"], "motion_max_seq_length": LENGTH, "use_motion_mid_block": False,
}  # fmt: skip
CLIPS = 800
BATCH = 48  # frames: 6 videos of 8, or 3 of 16
SHORT = 8
WHOLE = 0.3  # the part of steps whose videos have all 16 frames
NOISIER = 0.5  # timestep = 1000 u^0.5: three quarters are above 500, a fifth above 900
STEPS = 5  # of the LCM-LoRA, in sheets and measures
PROMPTS = ("a red fox", "a rocket", "a grinning face", "a red apple", "a snowman", "a red car", "an octopus", "a house")
Denoiser = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # (latents, timesteps, text, frames) -> noise


def moving_networks() -> tuple[UNet2DConditionModel, CLIPTextModel, MotionAdapter]:
    """The frozen base with a new adapter in it, and the text encoder; the adapter alone is trained."""
    unet, encoder = trained_networks()
    adapter = MotionAdapter.from_config(CONFIG)
    for name, weight in adapter.named_parameters():
        if ".proj_out." in name:
            torch.nn.init.zeros_(weight)
    attach_motion_(unet, adapter)
    return unet, encoder, adapter.train()


def trained_motion() -> tuple[UNet2DConditionModel, CLIPTextModel, MotionAdapter]:
    """As `moving_networks`, with the trained adapter's averaged weights, frozen."""
    unet, encoder, adapter = moving_networks()
    adapter.load_state_dict(torch.load(CACHE / "train" / "motion.ema.pt", weights_only=True)["adapter"])
    adapter.eval().requires_grad_(False)
    return unet, encoder, adapter


def velocity_error(predicted: Tensor, noise: Tensor, alphas: Tensor) -> Tensor:
    """Mean squared error (V,) of the velocity that follows from a predicted noise (V, F, C, h, w); ``alphas`` (V,).

    v = sqrt(a) e - sqrt(1 - a) x (Salimans & Ho 2022), hence v' - v = (e' - e) / sqrt(a): next to the noise's error
    where a is near 1, and to the picture's where a is near 0.
    """
    return (predicted.float() - noise).square().mean((1, 2, 3, 4)) / alphas


def motion_loss(
    denoise: Callable[[], Denoiser], encoder: CLIPTextModel, moving: Clips, captions: Captions
) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    """The loss of a step; ``noisy`` is its part at t >= 700. ``denoise`` gives the step's denoiser."""
    alphas = alphas_cumprod()

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        frames = LENGTH if torch.rand((), generator=generator) < WHOLE else SHORT
        videos = BATCH // frames
        clean, pictures = moving.draw(videos, frames, generator)
        ids = captions.draw(pictures, generator)
        ids[torch.rand(videos, generator=generator) < EMPTY] = captions.empty
        timesteps = (1000 * torch.rand(videos, generator=generator) ** NOISIER).long().clamp(max=999)
        noise = torch.randn(clean.shape, generator=generator)
        sample = add_noise(clean, noise, alphas[timesteps])
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            with torch.no_grad():
                text = encoder(ids).last_hidden_state.repeat_interleave(frames, 0)
            predicted = denoise()(sample.flatten(0, 1), timesteps.repeat_interleave(frames), text, frames)
        errors = velocity_error(predicted.view_as(noise), noise, alphas[timesteps])
        return {"loss": errors.mean(), "noisy": errors[timesteps >= 700].mean().nan_to_num()}

    return loss


def ink(videos: Tensor) -> Tensor:
    """How much of each frame is drawn: videos (V, F, 3, H, W) in -1..1 -> bool (V, F, H, W), where not nearly white."""
    return videos.amin(2) < 0.85


def jerk(videos: Tensor) -> float:
    """How much videos (V, F, 3, H, W) flicker: second differences over first ones.

    Frames that have nothing to do with one another give sqrt(3) in the mean square, a steady motion far less.
    """
    first = videos.diff(dim=1)
    return (first.diff(dim=1).square().mean().sqrt() / first.square().mean().sqrt().clamp(min=1e-6)).item()


def movement(videos: Tensor) -> float:
    """Mean difference of neighbouring frames of videos (V, F, 3, H, W), as a part of the range from black to white."""
    return videos.diff(dim=1).abs().mean().item() / 2


class MotionSheet:
    """Paints short videos by the LCM-LoRA between training steps, a row a prompt."""

    def __init__(self, unet: UNet2DConditionModel, encoder: CLIPTextModel, tokenizer: Tokenizer, name: str):
        self.unet, self.encoder, self.tokenizer, self.name = unet, encoder, tokenizer, name
        self.vae, self.factor = trained(), cached().scaling_factor
        student = Student(unet.__class__.from_config(BASE))
        student.load_state_dict(torch.load(CACHE / "train" / "lcm.ema.pt", weights_only=True)["pairs"])
        self.pairs = student.pairs

    def weights(self) -> dict[str, Tensor]:
        """The base's weights with the LCM-LoRA in them."""
        return {name: weight.detach() for name, weight in effective_weights(self.unet, self.pairs).items()}

    @torch.no_grad()
    def videos(self, prompts: tuple[str, ...] = PROMPTS, frames: int | None = SHORT, seed: int = 0) -> Tensor:
        """(V, F, 3, 128, 128); without ``frames`` eight frames that do not know of one another."""
        weights, count = self.weights(), frames or SHORT
        text = self.encoder(self.tokenizer(list(prompts))).last_hidden_state.repeat_interleave(count, 0)

        def denoise(sample: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
            return functional_call(self.unet, weights, (sample, timesteps, text), {"frames": frames})

        with torch.autocast("cpu", torch.bfloat16):
            latents = consistency(denoise, text, STEPS, seed).float()
        pictures = torch.cat([self.vae.decode(part / self.factor) for part in latents.split(16)])
        return pictures.clamp(-1, 1).unflatten(0, (-1, count))

    def __call__(self, step: int) -> None:
        videos = self.videos()
        say(f"{self.name} {step}: movement {movement(videos):.4f}, jerk {jerk(videos):.2f}")
        save_grid(videos.flatten(0, 1), CACHE / "samples" / f"{self.name}-{step:06d}.png", columns=videos.shape[1])


def export(folder: Path) -> None:
    """The adapter as diffusers' `MotionAdapter` has it, fp16."""
    write_model(trained_motion()[2], folder)


def main() -> None:
    """Train, with a sheet of videos from time to time; last, how steady they are beside frames without the adapter."""
    parser = arguments(__doc__, minutes=9)
    parser.add_argument("--rate", type=float, default=3e-3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    emojis = load()[1]
    tokenizer = tokenizer_of_ours(emojis)
    moving = clips("motion", CLIPS)
    unet, encoder, adapter = moving_networks()
    sheet = MotionSheet(unet, encoder, tokenizer, "motion")
    run = Run(
        "motion", CACHE / "train", options.steps, options.minutes, warmup=30, ema_decay=0.99, seed=options.seed,
        after=sheet, after_every=100,
    )  # fmt: skip

    def denoise(sample: Tensor, timesteps: Tensor, text: Tensor, frames: int) -> Tensor:
        return unet(sample, timesteps, text, frames=frames)

    loss = motion_loss(lambda: denoise, encoder, moving, Captions(emojis, tokenizer, MAX_LENGTH))
    averages = train(run, {"adapter": adapter}, optimisers({"adapter": (adapter, options.rate)}), loss)
    with use({"adapter": adapter}, averages):
        sheet(999_999)
        for what, frames in (("without the adapter", None), ("8 frames", SHORT), ("16 frames", LENGTH)):
            videos = sheet.videos(frames=frames, seed=1)
            say(f"{what}, LCM-LoRA {STEPS} steps: movement {movement(videos):.4f}, jerk {jerk(videos):.2f}")


if __name__ == "__main__":
    main()
