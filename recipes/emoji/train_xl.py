"""The SDXL-shaped base. ``python recipes/emoji/train_xl.py --steps 900``

Two text encoders (the first is `emoji/base`'s, the second is new and small), micro-conditioning, linear projections,
and a deeper transformer at the lowest level. The UNet does not start from nothing: it is `emoji/base`'s, with a fifth
of the lowest level's channels left out, the middle's attention dropped, and new parts that add zero (see `warm_start`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from data import CACHE, load, save_grid, to_floats
from distill_lcm import trained_networks
from latents import Latents, cached
from loop import Run, arguments, optimisers, say, train, use, write
from sampling import ddim, retrieval
from tokenizer import MAX_LENGTH, PRETRAINING_LENGTH, Tokenizer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_text import COMPONENTS, Captions, contrast, initialise, principal_components, text_config, tokenizer_of_ours
from train_unet import CONFIG as BASE
from train_unet import EMPTY, PROMPTS, alphas_cumprod, draw_timesteps, noise_errors
from train_vae import trained as trained_vae

from fourstroke.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from fourstroke.models.unet import UNet2DConditionModel
from fourstroke.schedulers.noise import add_noise

WIDTH_2, LAYERS_2 = 64, 3
TIME_WIDTH = 32
CONFIG = {
    **BASE, "block_out_channels": [64, 128, 128], "mid_block_type": "UNetMidBlock2D", "use_linear_projection": True,
    "transformer_layers_per_block": [1, 1, 2], "reverse_transformer_layers_per_block": [1, 1, 1],
    "cross_attention_dim": BASE["cross_attention_dim"] + WIDTH_2, "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME_WIDTH, "projection_class_embeddings_input_dim": WIDTH_2 + 6 * TIME_WIDTH,
}  # fmt: skip
SIZE = 128
PLAIN_IDS = (SIZE, SIZE, 0, 0, SIZE, SIZE)  # original size, crop's top and left, target size
COPIES, PLAIN = 4, 0.8
SMALLEST, WIDEST = 48, 152  # original sizes, and the size before a crop, in pixels
BATCH, TEXT_BATCH = 64, 256
KEPT_OF_TEN = 8  # of every ten channels of the lowest level


def text_config_2(tokenizer: Tokenizer) -> dict[str, object]:
    """config.json of the second text encoder."""
    return {**text_config(tokenizer), "hidden_size": WIDTH_2, "intermediate_size": 4 * WIDTH_2,
            "num_hidden_layers": LAYERS_2, "projection_dim": WIDTH_2, "hidden_act": "gelu"}  # fmt: skip


class TextEncoders(nn.Module):
    """Both encoders; gives the prompt's states and its pooled vector as one tensor (B, L + 1, 192).

    The pooled vector travels as a last row, filled up with zeros, so that the samplers see one text tensor.
    """

    def __init__(self, first: CLIPTextModel, second: CLIPTextModelWithProjection):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            states = self.first(ids).hidden_states[-2]
        output = self.second(ids)
        both = torch.cat([states, output.hidden_states[-2]], -1)
        return torch.cat([both, F.pad(output.pooled, (0, both.shape[-1] - WIDTH_2))[:, None].to(both.dtype)], 1)


def denoise(unet: UNet2DConditionModel, sample: Tensor, timesteps: Tensor, text: Tensor, ids: Tensor) -> Tensor:
    """The UNet's output for text from `TextEncoders` and time ids (B, 6)."""
    added = {"text_embeds": text[:, -1, :WIDTH_2], "time_ids": ids}
    return unet(sample, timesteps, text[:, :-1], added_cond_kwargs=added)


@dataclass(frozen=True)
class Crops:
    """Latents (COPIES, N, 4, 16, 16) of coarsened and cropped pictures, and their time ids (COPIES, N, 6)."""

    latents: Tensor
    ids: Tensor


@torch.no_grad()
def crops(factor: float) -> Crops:
    """From the cache, computed first when missing: each copy loses detail or is cut, or both, as its ids tell."""
    path = CACHE / "train" / "xl-latents.pt"
    if not path.exists():
        vae, pictures, generator = trained_vae(), to_floats(load()[0]), torch.Generator().manual_seed(0)
        latents, ids = [], []
        for _ in range(COPIES):
            for picture in pictures:
                draw = torch.rand(5, generator=generator)
                original = int(SMALLEST + (SIZE - SMALLEST) * draw[1]) if draw[0] < 0.5 else SIZE
                wide = int(SIZE + (WIDEST - SIZE) * draw[2])
                top, left = (int((wide - SIZE + 1) * value) for value in draw[3:])
                small = F.interpolate(picture[None], size=(original, original), mode="area")
                large = F.interpolate(small, size=(wide, wide), mode="bicubic").clamp(-1, 1)
                latents.append(large[0, :, top : top + SIZE, left : left + SIZE])
                ids.append((original, original, top, left, SIZE, SIZE))
        with torch.autocast("cpu", torch.bfloat16):
            encoded = torch.cat([vae.encode(part).mean.float() for part in torch.stack(latents).split(32)]) * factor
        shape = (COPIES, len(pictures))
        write(path, {"latents": encoded.unflatten(0, shape), "ids": torch.tensor(ids).float().unflatten(0, shape)})
    return Crops(**torch.load(path, weights_only=True))


def train_text(options: object, tokenizer: Tokenizer, captions: Captions, latents: Latents) -> dict[str, Tensor]:
    """The second encoder alone, as in `train_text.py`: its pooled vector foretells the picture."""
    targets = principal_components(latents.plain, COMPONENTS)
    encoder = CLIPTextModelWithProjection.from_config(text_config_2(tokenizer))
    initialise(encoder)
    networks = {"text_encoder_2": encoder.train(), "head": nn.Linear(WIDTH_2, COMPONENTS)}

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randperm(len(latents.plain), generator=generator)[:TEXT_BATCH]
        ids = captions.draw(chosen, generator)[:, :PRETRAINING_LENGTH]
        with torch.autocast("cpu", torch.bfloat16):
            pooled = encoder(ids).pooled
        return contrast(networks["head"](pooled.float()), targets[chosen])

    run = Run("xl-text", CACHE / "train", options.text_steps, seed=options.seed)
    peaks = {name: (module, 3e-3) for name, module in networks.items()}
    return train(run, networks, optimisers(peaks, adamw=("embedding", "head")), loss)["text_encoder_2"]


def pruned(weight: Tensor) -> Tensor:
    """A weight of the base with eight of every ten of the lowest level's 160 channels kept, in every dimension.

    Ten channels are a normalisation group, forty a head: both keep their place. 288 channels are the level's own 160
    and 128 from the level above.
    """
    for dimension, width in enumerate(weight.shape):
        if width in (160, 288, 320, 640, 1280):
            level = torch.arange(160 if width == 288 else width)
            kept = level[level % 10 < KEPT_OF_TEN]
            kept = torch.cat([kept, torch.arange(160, 288)]) if width == 288 else kept
            weight = weight.index_select(dimension, kept)
    return weight


@torch.no_grad()
def reading(first: CLIPTextModel, captions: Captions) -> Tensor:
    """The matrix (128, 128) that best turns the last but one states into the last, which the base was trained on."""
    ids = captions.ids[:, 0][::4]
    output = first(ids)
    known, wanted = output.hidden_states[-2].flatten(0, 1).double(), output.last_hidden_state.flatten(0, 1).double()
    found = torch.linalg.lstsq(known, wanted).solution
    left = (known @ found - wanted).square().mean() / wanted.var()
    say(f"xl: the last states follow from the last but one with {left:.1%} of their variance left over")
    return found.float()


@torch.no_grad()
def warm_start(unet: UNet2DConditionModel, base: UNet2DConditionModel, read: Tensor) -> None:
    """Fill ``unet`` from the base: pruned where shapes differ, the second encoder unread, new layers adding zero."""
    old = base.state_dict()
    for name, weight in unet.named_parameters():
        if name not in old:
            if name.endswith(("to_out.0.weight", "net.2.weight", "linear_2.weight", "bias")) and "norm" not in name:
                nn.init.zeros_(weight)
            continue
        value = pruned(old[name])
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            value = F.pad(value @ read.T, (0, WIDTH_2))
        weight.copy_(value.view_as(weight))  # 1x1 convolutions become linear layers


def denoising_loss(
    unet: UNet2DConditionModel, encoders: TextEncoders, latents: Latents, copies: Crops, captions: Captions
) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    """As in `train_unet.py`, with the time ids of what is shown."""
    alphas = alphas_cumprod()
    plain_ids = torch.tensor(PLAIN_IDS).float()

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(latents.plain), (BATCH,), generator=generator)
        which = torch.randint(COPIES, (BATCH,), generator=generator)
        plain = (torch.rand(BATCH, generator=generator) < PLAIN)[:, None]
        clean = torch.where(plain[..., None, None], latents.plain[chosen], copies.latents[which, chosen])
        time_ids = torch.where(plain, plain_ids, copies.ids[which, chosen])
        ids = captions.draw(chosen, generator)
        ids[torch.rand(BATCH, generator=generator) < EMPTY] = captions.empty
        timesteps = draw_timesteps(BATCH, generator)
        noise = torch.randn(clean.shape, generator=generator)
        sample = add_noise(clean, noise, alphas[timesteps])
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            predicted = denoise(unet, sample, timesteps, encoders(ids), time_ids).float()
        return noise_errors(predicted, noise, timesteps, alphas)

    return loss


class Sheet:
    """Draws the sample prompts and tests the binding of 96 names between training steps."""

    def __init__(self, unet: UNet2DConditionModel, encoders: TextEncoders, tokenizer: Tokenizer, latents: Latents):
        self.unet, self.encoders, self.tokenizer, self.latents = unet, encoders, tokenizer, latents
        emojis = load()[1]
        self.own = torch.arange(0, len(emojis), len(emojis) // 96)[:96]
        self.names = [emojis[i].name for i in self.own.tolist()]

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        def denoiser(sample: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
            return denoise(self.unet, sample, timesteps, text, torch.tensor([PLAIN_IDS] * len(sample)).float())

        with torch.autocast("cpu", torch.bfloat16):
            empty = self.encoders(self.tokenizer([""]))
            drawn = ddim(denoiser, self.encoders(self.tokenizer(list(PROMPTS))), empty, 20, 4.0)
            named = ddim(denoiser, self.encoders(self.tokenizer(self.names)), empty, 12, 4.0)
        first, five = retrieval(named.float(), self.own, self.latents.plain)
        say(f"xl {step}: DDIM 12, guidance 4: {first:.1%} of 96 names retrieved, {five:.1%} in the top five")
        vae, factor = trained_vae(), self.latents.scaling_factor
        pictures = torch.cat([vae.decode(part / factor) for part in drawn.float().split(16)])
        save_grid(pictures, CACHE / "samples" / f"xl-{step:06d}.png")


def trained_xl() -> tuple[UNet2DConditionModel, TextEncoders]:
    """The averaged networks, frozen."""
    tokenizer = tokenizer_of_ours(load()[1])
    saved = torch.load(CACHE / "train" / "xl.ema.pt", weights_only=True)
    unet = UNet2DConditionModel.from_config(CONFIG)
    second = CLIPTextModelWithProjection.from_config(text_config_2(tokenizer))
    unet.load_state_dict(saved["unet"])
    second.load_state_dict(saved["text_encoder_2"])
    encoders = TextEncoders(trained_networks()[1], second)
    return unet.eval().requires_grad_(False), encoders.eval().requires_grad_(False)


def main() -> None:
    """Train the second text encoder, then both networks."""
    parser = arguments(__doc__, minutes=30)
    parser.add_argument("--rate", type=float, default=1.6e-3)
    parser.add_argument("--text-steps", type=int, default=500)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    latents, emojis = cached(), load()[1]
    tokenizer = tokenizer_of_ours(emojis)
    captions = Captions(emojis, tokenizer, MAX_LENGTH)
    base, first = trained_networks()
    copies = crops(latents.scaling_factor)
    second = CLIPTextModelWithProjection.from_config(text_config_2(tokenizer))
    second.load_state_dict(train_text(options, tokenizer, captions, latents))
    unet = UNet2DConditionModel.from_config(CONFIG)
    warm_start(unet, base, reading(first, captions))
    encoders = TextEncoders(first, second)
    networks: dict[str, nn.Module] = {"unet": unet.train(), "text_encoder_2": second.train()}
    sheet = Sheet(unet, encoders, tokenizer, latents)
    run = Run("xl", CACHE / "train", options.steps, options.minutes, seed=options.seed, after=sheet, after_every=300)
    peaks = {"unet": (unet, options.rate), "text_encoder_2": (second, options.rate / 5)}
    averages = train(run, networks, optimisers(peaks), denoising_loss(unet, encoders, latents, copies, captions))
    with use(networks, averages):
        sheet(999_999)


if __name__ == "__main__":
    main()
