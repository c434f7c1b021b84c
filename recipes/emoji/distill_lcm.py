"""Stage 4: the LCM-LoRA. ``python recipes/emoji/distill_lcm.py --minutes 12``

Latent consistency distillation of the trained UNet into low-rank pairs on the published targets, by the pure functions
of `fourstroke.train.lcd`: skipping-step DDIM with k = 20, guidance drawn from a range, pseudo-Huber loss, and the
student itself without gradient as the target. The pairs are saved in the layout of the published LCM-LoRAs (kohya,
with alpha).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from data import CACHE, load, save_grid
from latents import Latents, cached
from loop import Run, arguments, say, train, use
from sampling import consistency as sample_consistency
from sampling import retrieval
from tokenizer import MAX_LENGTH
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_text import Captions, text_config, tokenizer_of_ours
from train_unet import CONFIG, PLAIN_REFINED, PROMPTS, Sheet, alphas_cumprod

from fourstroke.lora.layers import LCM_LORA_TARGETS, effective_weights, init_pairs
from fourstroke.lora.pairs import LoraPair
from fourstroke.models.clip import CLIPTextModel
from fourstroke.models.unet import UNet2DConditionModel
from fourstroke.schedulers.noise import add_noise
from fourstroke.train import lcd

RANK, ALPHA = 48, 8.0
BATCH = 32
GUIDANCE = (3.0, 6.0)


def trained_networks() -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """The UNet and the text encoder of stage 3, refined when that is done: averaged weights, frozen."""
    refined = CACHE / "train" / "unet-refine.ema.pt"
    unet = UNet2DConditionModel.from_config(CONFIG)
    encoder = CLIPTextModel.from_config(text_config(tokenizer_of_ours(load()[1])))
    saved = torch.load(refined if refined.exists() else CACHE / "train" / "unet.ema.pt", weights_only=True)
    unet.load_state_dict(saved["unet"])
    encoder.load_state_dict(saved["text_encoder"])
    return unet.eval().requires_grad_(False), encoder.eval().requires_grad_(False)


class Student(nn.Module):
    """The pairs, by parameter name; their tensors are this module's parameters, so that the loop averages and saves
    them."""

    def __init__(self, unet: UNet2DConditionModel, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.pairs: dict[str, LoraPair] = {}
        for path, pair in init_pairs(unet, LCM_LORA_TARGETS, rank=RANK, alpha=ALPHA, generator=generator).items():
            down, up = nn.Parameter(pair.down.detach()), nn.Parameter(pair.up.detach())
            self.register_parameter(f"{path.replace('.', '/')}/down", down)
            self.register_parameter(f"{path.replace('.', '/')}/up", up)
            self.pairs[path] = LoraPair(down, up, pair.alpha)


def distillation_loss(
    unet: UNet2DConditionModel, encoder: CLIPTextModel, student: Student, latents: Latents, captions: Captions,
    guidance: tuple[float, float],
) -> Callable[[int, torch.Generator], dict[str, Tensor]]:  # fmt: skip
    """The loss of a step; ``early`` is its part at t >= 700."""
    alphas = alphas_cumprod()
    with torch.no_grad():
        empty = encoder(captions.empty[None]).last_hidden_state

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(latents.plain), (BATCH,), generator=generator)
        clean = latents.draw(chosen, generator, PLAIN_REFINED)
        later, earlier = lcd.draw_timesteps(BATCH, generator=generator)
        w = lcd.draw_guidance(BATCH, *guidance, generator=generator)
        sample = add_noise(clean, torch.randn(clean.shape, generator=generator), alphas[later])
        weights = effective_weights(unet, student.pairs)
        fixed = {name: weight.detach() for name, weight in weights.items()}
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            with torch.no_grad():
                text = encoder(captions.draw(chosen, generator)).last_hidden_state
                conditional = unet(sample, later, text).float()
                unconditional = unet(sample, later, empty.expand_as(text)).float()
                nearer = lcd.teacher_step(conditional, unconditional, sample, later, earlier, w, alphas)
                output = functional_call(unet, fixed, (nearer, earlier, text)).float()
                target = lcd.consistency(output, nearer, earlier, alphas)
            output = functional_call(unet, weights, (sample, later, text)).float()
        distance = lcd.pseudo_huber(lcd.consistency(output, sample, later, alphas), target).mean((1, 2, 3))
        return {"loss": distance.mean(), "early": distance[later >= 700].mean().nan_to_num()}

    return loss


class LcmSheet(Sheet):
    """Four unguided steps with the pairs as far as they are averaged."""

    student: Student

    def __call__(self, step: int) -> None:
        weights = {name: weight.detach() for name, weight in effective_weights(self.unet, self.student.pairs).items()}

        def denoise(sample: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
            return functional_call(self.unet, weights, (sample, timesteps, text))

        with torch.autocast("cpu", torch.bfloat16):
            drawn = sample_consistency(denoise, self.text(list(PROMPTS)), 4)
            named = sample_consistency(denoise, self.text(self.names), 4)
        first, five = retrieval(named.float(), self.own, self.latents.plain)
        say(f"{self.name} {step}: LCM 4: {first:.1%} of 96 names retrieved, {five:.1%} in the top five")
        save_grid(self.decode(drawn.float()), CACHE / "samples" / f"{self.name}-{step:06d}.png")


def main() -> None:
    """Distil, with sample sheets of four steps from time to time."""
    parser = arguments(__doc__, minutes=12)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--guidance", type=float, nargs=2, default=GUIDANCE, metavar=("LOW", "HIGH"))
    parser.add_argument("--name", default="lcm")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    latents, emojis = cached(), load()[1]
    tokenizer = tokenizer_of_ours(emojis)
    unet, encoder = trained_networks()
    student = Student(unet, options.seed)
    sheet = LcmSheet(unet, encoder, tokenizer, latents, options.name)
    sheet.student = student
    run = Run(
        options.name, CACHE / "train", options.steps, options.minutes, warmup=30, ema_decay=0.99, seed=options.seed,
        after=sheet, after_every=250,
    )  # fmt: skip
    loss = distillation_loss(
        unet, encoder, student, latents, Captions(emojis, tokenizer, MAX_LENGTH), tuple(options.guidance)
    )
    optimizer = torch.optim.AdamW(student.parameters(), options.rate, betas=(0.9, 0.99), weight_decay=0.0)
    averages = train(run, {"pairs": student}, [optimizer], loss)
    with use({"pairs": student}, averages):
        sheet(999_999)


if __name__ == "__main__":
    main()
