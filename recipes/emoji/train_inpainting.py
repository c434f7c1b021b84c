"""The 9-channel inpainting UNet. ``python recipes/emoji/train_inpainting.py --steps 300``

It starts from `emoji/base` with five more input channels, the mask and the latents of the masked picture, whose weights
make the known part look denoised already (see `widened`), and goes on with denoising. A fifth of the masks cover the
whole picture, which keeps it a text-to-image model; others take a part out of the picture that the caption names; most
put a part of another picture there, and the caption names that one. All latents are encoded before the first step.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import CACHE, load, save_grid, to_floats
from distill_lcm import Student, trained_networks
from folders import write_model
from latents import cached
from loop import Muon, Run, arguments, say, train, use, write
from measures import psnr
from PIL import Image, ImageDraw
from sampling import consistency, ddim
from scorer import NAME as SCORER
from scorer import Scorer, features
from scorer import trained as trained_scorer
from tokenizer import MAX_LENGTH
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_text import Captions, tokenizer_of_ours
from train_unet import CONFIG as BASE
from train_unet import EMPTY, PROMPTS, Sheet, alphas_cumprod, min_snr_weight
from train_vae import trained as trained_vae

from fourstroke.lora.layers import effective_weights
from fourstroke.models.unet import UNet2DConditionModel
from fourstroke.schedulers.noise import add_noise

CONFIG = {**BASE, "in_channels": 9}
SIZE, GRID = 128, 8  # pixels of a picture, and of one latent
CUT, MIXED = 2, 4  # examples a picture: parts of it cut out; parts of it set into another one
LARGE = 0.7  # of those set into another picture, how many show a large part of it
WHOLE, OWN = 0.2, 0.2  # how often everything is masked, and how often a part of the picture itself
BATCH = 32
HINT = 0.5  # how strongly the known part is told at first
NEW_INPUTS_RATE = 3.0  # the first convolution learns faster, for most of its inputs are new
NOISIER = 0.5  # timestep = 1000 u^0.5
MOST = 10.0  # the largest weight of a noisy timestep
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Examples:
    """What is trained on, all latents times ``scaling_factor`` and in fp16; row i of a kind belongs to one picture.

    ``cut_masked`` (CUT, N, 4, 16, 16) and ``cut_masks`` (CUT, N, 1, 16, 16): a picture without a part of it;
    ``mixed``, ``mixed_masked``, ``mixed_masks`` (MIXED, N, …): a part of a picture set into another one;
    ``grey`` (4, 16, 16): the latents of a picture that is masked all over.
    """

    cut_masked: Tensor
    cut_masks: Tensor
    mixed: Tensor
    mixed_masked: Tensor
    mixed_masks: Tensor
    grey: Tensor

    def draw(self, chosen: Tensor, plain: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Clean latents, masks and masked latents (B, …) for pictures by index, of a kind each by its share."""
        count = len(chosen)
        kind = torch.rand(count, generator=generator)
        cut = torch.randint(CUT, (count,), generator=generator)
        other = torch.randint(MIXED, (count,), generator=generator)
        whole, own = (kind < WHOLE).view(-1, 1, 1, 1), (kind < WHOLE + OWN).view(-1, 1, 1, 1)
        clean = torch.where(own, plain[chosen], self.mixed[other, chosen].float())
        masked = torch.where(own, self.cut_masked[cut, chosen].float(), self.mixed_masked[other, chosen].float())
        mask = torch.where(own, self.cut_masks[cut, chosen].float(), self.mixed_masks[other, chosen].float())
        return clean, torch.where(whole, 1.0, mask), torch.where(whole, self.grey.float(), masked)


def box_mask(box: Box) -> Tensor:
    """(1, 128, 128), 1 in the box."""
    left, top, right, bottom = box
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, top:bottom, left:right] = 1
    return mask


def drawn_mask(draw_on: Callable[[ImageDraw.ImageDraw], None]) -> Tensor:
    """(1, 128, 128), 1 where something is drawn."""
    mask = Image.new("L", (SIZE, SIZE))
    draw_on(ImageDraw.Draw(mask))
    return torch.from_numpy(np.array(mask))[None].float() / 255


def half_box(rng: random.Random, edge: int) -> Box:
    """One side of the picture, ``edge`` pixels wide or high."""
    sides = [(0, 0, edge, SIZE), (SIZE - edge, 0, SIZE, SIZE), (0, 0, SIZE, edge), (0, SIZE - edge, SIZE, SIZE)]
    return rng.choice(sides)


def placed(rng: random.Random, width: int, height: int, step: int = 1) -> Box:
    """A box of this size anywhere in the picture, its corner on a grid of ``step`` pixels."""
    left, top = step * rng.randint(0, (SIZE - width) // step), step * rng.randint(0, (SIZE - height) // step)
    return left, top, left + width, top + height


def free_mask(rng: random.Random) -> Tensor:
    """A rectangle, an ellipse, a thick stroke or about half of the picture."""
    kind = rng.random()
    box = placed(rng, rng.randint(32, 104), rng.randint(32, 104))
    if kind < 0.3:
        return box_mask(box)
    if kind < 0.5:
        return drawn_mask(lambda draw: draw.ellipse(box, fill=255))
    if kind < 0.75:
        points = [(rng.randint(0, SIZE), rng.randint(0, SIZE)) for _ in range(rng.randint(2, 5))]
        width = rng.randint(16, 40)
        return drawn_mask(lambda draw: draw.line(points, fill=255, width=width, joint="curve"))
    return box_mask(half_box(rng, rng.randint(40, 88)))


def large_mask(rng: random.Random) -> Tensor:
    """At least 35 % of the picture: a square or a disc near the middle, or about half of it."""
    kind, size = rng.random(), GRID * rng.randint(10, 14)
    if kind < 0.4:
        return box_mask(half_box(rng, GRID * rng.choice([7, 8, 8, 8, 9])))
    middle = (SIZE - size) // 2 // GRID * GRID
    left, top = (min(max(middle + GRID * rng.choice([-1, 0, 0, 0, 1]), 0), SIZE - size) for _ in range(2))
    box = (left, top, left + size, top + size)
    return box_mask(box) if kind < 0.85 else drawn_mask(lambda draw: draw.ellipse(box, fill=255))


def replaced(picture: Tensor, other: Tensor, rng: random.Random) -> tuple[Tensor, Tensor]:
    """``other``, or a white picture, with a part of ``picture`` in place of its own, and the mask of that part.

    A large part shows the picture where it stands and as large as it is. A small box holds all of it, reduced. So the
    mask alone says what is meant.
    """
    field = other.clone() if rng.random() < 0.75 else torch.ones(3, SIZE, SIZE)
    if rng.random() < LARGE:
        mask = large_mask(rng)
        return torch.where(mask >= 0.5, picture, field), mask
    size = GRID * rng.randint(5, 9)
    left, top, right, bottom = box = placed(rng, size, size, GRID)
    small = F.interpolate(picture[None], size=(size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    field[:, top:bottom, left:right] = small[0]
    return field, box_mask(box)


def hidden(pictures: Tensor, masks: Tensor) -> Tensor:
    """Pictures without their masked part, mid-grey there, as inpainting pipelines make them."""
    return pictures * (masks < 0.5)


def small_masks(masks: Tensor) -> Tensor:
    """Masks (N, 1, 128, 128) at the size of the latents, as inpainting pipelines make them."""
    return F.interpolate((masks >= 0.5).float(), size=(SIZE // GRID, SIZE // GRID))


def encoder(factor: float) -> Callable[[Tensor], Tensor]:
    """Pictures (N, 3, 128, 128) -> scaled latents (N, 4, 16, 16) in fp16."""
    vae = trained_vae().to(memory_format=torch.channels_last)

    @torch.no_grad()
    def encode(pictures: Tensor) -> Tensor:
        parts = pictures.contiguous(memory_format=torch.channels_last).split(32)
        with torch.autocast("cpu", torch.bfloat16):
            means = torch.cat([vae.encode(part).mean.float() for part in parts])
        return (means * factor).half()

    return encode


def compute(pictures: Tensor, factor: float) -> dict[str, Tensor]:
    """The fields of `Examples`."""
    encode, rng = encoder(factor), random.Random(0)
    found: dict[str, list[Tensor]] = {name: [] for name in Examples.__annotations__}
    for _ in range(CUT):
        masks = torch.stack([free_mask(rng) for _ in pictures])
        found["cut_masked"].append(encode(hidden(pictures, masks)))
        found["cut_masks"].append(small_masks(masks).bool())
    for copy in range(MIXED):
        made = [replaced(picture, pictures[rng.randrange(len(pictures))], rng) for picture in pictures]
        fields, masks = (torch.stack(part) for part in zip(*made, strict=True))
        found["mixed"].append(encode(fields))
        found["mixed_masked"].append(encode(hidden(fields, masks)))
        found["mixed_masks"].append(small_masks(masks).bool())
        say(f"inpainting: {copy + 1} of {MIXED} copies encoded")
    grey = encode(torch.zeros(1, 3, SIZE, SIZE))[0]
    return {**{name: torch.stack(parts) for name, parts in found.items() if parts}, "grey": grey}


def examples(factor: float) -> Examples:
    """From the cache, computed first when they are missing."""
    path = CACHE / "train" / "inpainting-latents.pt"
    if not path.exists():
        write(path, compute(to_floats(load()[0]), factor))
    return Examples(**torch.load(path, weights_only=True))


@torch.no_grad()
def widened(base: UNet2DConditionModel, grey: Tensor) -> UNet2DConditionModel:
    """The base with nine input channels, which hears of the known part from the start.

    The base takes what it cannot explain for noise. So the known latents, read with its own weights times ``-HINT``,
    lower the noise that it predicts by a part of them, and raise the picture by it. The mask's weights undo that where
    the picture is masked, whose latents are nearly the mean of ``grey`` (4, 16, 16).
    """
    unet = UNet2DConditionModel.from_config(CONFIG)
    weights = dict(base.state_dict())
    own = weights["conv_in.weight"]
    mask = HINT * (own * grey.mean((1, 2))[:, None, None]).sum(1, keepdim=True)
    weights["conv_in.weight"] = torch.cat([own, mask, -HINT * own], 1)
    unet.load_state_dict(weights)
    return unet


def inpainting_loss(
    unet: nn.Module, text_encoder: nn.Module, plain: Tensor, found: Examples, captions: Captions
) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    """The loss of a step; ``inside`` is the noise's error where the mask is, ``outside`` the rest's.

    Where there is more noise than signal, the weight is that of the picture's error, at most `MOST`: the known part
    must be told there, and in the noise's error it hardly shows.
    """
    alphas = alphas_cumprod()
    weights = min_snr_weight(alphas) * ((1 - alphas) / alphas).clamp(1, MOST)

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(plain), (BATCH,), generator=generator)
        clean, mask, masked = found.draw(chosen, plain, generator)
        ids = captions.draw(chosen, generator)
        ids[torch.rand(BATCH, generator=generator) < EMPTY] = captions.empty
        timesteps = (1000 * torch.rand(BATCH, generator=generator) ** NOISIER).long().clamp(max=999)
        noise = torch.randn(clean.shape, generator=generator)
        sample = add_noise(clean, noise, alphas[timesteps])
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            with torch.no_grad():
                text = text_encoder(ids).last_hidden_state
            predicted = unet(torch.cat([sample, mask, masked], 1), timesteps, text).float()
        square = (predicted - noise).square()
        inside = (square * mask).sum() / (4 * mask.sum()).clamp(min=1)
        outside = (square * (1 - mask)).sum() / (4 * (1 - mask).sum()).clamp(min=1)
        total = (square.mean((1, 2, 3)) * weights[timesteps]).mean()
        return {"loss": total, "inside": inside, "outside": outside}

    return loss


def optimisers(unet: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """As the base's: Muon inside, AdamW for the rest, with the first convolution at its own rate."""
    first, outer, inner = [], [], []
    for name, weight in unet.named_parameters():
        first_layer = name.startswith("conv_in.")
        (first if first_layer else inner if weight.ndim >= 2 and "conv_out" not in name else outer).append(weight)
    groups = [{"params": first, "lr": rate * NEW_INPUTS_RATE}, {"params": outer, "lr": rate}]
    return [torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0), Muon(inner, lr=rate)]


class InpaintingSheet(Sheet):
    """Sets 32 emoji into the middle and 32 into the right half of other emoji, and paints from empty pictures."""

    text_encoder: nn.Module
    student: Student

    def prepare(self, pictures: Tensor, factor: float) -> None:
        """Choose the cases; ``cases`` is a list of (boxes' name, box, masked picture latents, masks)."""
        self.targets = torch.arange(11, len(pictures), len(pictures) // 32)[:32]
        self.names_inside = [load()[1][i].name for i in self.targets.tolist()]
        shown, encode = pictures[self.targets.flip(0)], encoder(factor)
        self.shown, self.cases = shown, []
        edge = GRID * 2
        for what, box in (("middle", (edge, edge, SIZE - edge, SIZE - edge)), ("half", (SIZE // 2, 0, SIZE, SIZE))):
            masks = box_mask(box).expand(len(shown), -1, -1, -1)
            extra = torch.cat([small_masks(masks), encode(hidden(shown, masks)).float()], 1)
            self.cases.append((what, box, extra))
        self.grey = encode(torch.zeros(1, 3, SIZE, SIZE)).float()
        known = (CACHE / "train" / f"{SCORER}.ema.pt").exists()
        self.scorer: Scorer | None = trained_scorer() if known else None

    def judged(self, drawn: Tensor, box: Box) -> tuple[Tensor, str]:
        """Pictures as painted; how often what is inside, on white, is retrieved (not a number, until there is a
        scorer); and how well the outside is kept, in decibels."""
        mask, right = box_mask(box), float("nan")
        made = self.decode(drawn).clamp(-1, 1)
        if self.scorer is not None:
            ranks = self.scorer.ranks(features(self.scorer, made * mask + 1 - mask), self.targets)
            right = (ranks < 1).float().mean().item()
        kept = psnr(made, self.shown, mask[None] < 0.5).mean()
        return made, f"{right:.1%} of 32 right, {kept:.1f} dB outside"

    def __call__(self, step: int) -> None:
        weights = {name: weight.detach() for name, weight in effective_weights(self.unet, self.student.pairs).items()}
        rows = []

        def plain(extra: Tensor) -> Callable[..., Tensor]:
            return lambda sample, t, text: self.unet(torch.cat([sample, extra], 1), t, text)

        def adapted(extra: Tensor) -> Callable[..., Tensor]:
            return lambda sample, t, text: functional_call(self.unet, weights, (torch.cat([sample, extra], 1), t, text))

        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            text, empty = self.text(self.names_inside), self.text([""])
            for what, box, extra in self.cases:
                guided, how = self.judged(ddim(plain(extra), text, empty, 15, 4.0).float(), box)
                four, how_four = self.judged(consistency(adapted(extra), text, 4).float(), box)
                say(f"{self.name} {step}: {what}: DDIM 15, guidance 4: {how}; LCM-LoRA 4: {how_four}")
                rows += [guided, four]
            extra = F.pad(self.grey, (0, 0, 0, 0, 1, 0), value=1.0).expand(len(PROMPTS), -1, -1, -1)
            drawn = consistency(adapted(extra), self.text(list(PROMPTS)), 4)
        rows.append(self.decode(drawn.float()))
        save_grid(torch.cat(rows), CACHE / "samples" / f"{self.name}-{step:06d}.png", columns=16)


def export(folder: Path, name: str = "inpainting") -> None:
    """The averaged UNet to ``folder/unet``; all else of an inpainting pipeline is `emoji/base`'s."""
    unet = UNet2DConditionModel.from_config(CONFIG)
    unet.load_state_dict(torch.load(CACHE / "train" / f"{name}.ema.pt", weights_only=True)["unet"])
    write_model(unet, folder / "unet")


def main() -> None:
    """Train, with a sheet of cases now and then."""
    parser = arguments(__doc__, minutes=8)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--name", default="inpainting")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    latents, (pictures, emojis) = cached(), load()
    tokenizer = tokenizer_of_ours(emojis)
    found = examples(latents.scaling_factor)
    base, text_encoder = trained_networks()
    unet = widened(base, found.grey.float()).train()
    sheet = InpaintingSheet(unet, text_encoder, tokenizer, latents, options.name)
    sheet.student = Student(base)
    sheet.student.load_state_dict(torch.load(CACHE / "train" / "lcm.ema.pt", weights_only=True)["pairs"])
    sheet.prepare(to_floats(pictures), latents.scaling_factor)
    run = Run(
        options.name, CACHE / "train", options.steps, options.minutes, warmup=30, ema_decay=0.99, seed=options.seed,
        after=sheet, after_every=200,
    )  # fmt: skip
    loss = inpainting_loss(unet, text_encoder, latents.plain, found, Captions(emojis, tokenizer, MAX_LENGTH))
    averages = train(run, {"unet": unet}, optimisers(unet, options.rate), loss)
    with use({"unet": unet}, averages):
        sheet(999_999)


if __name__ == "__main__":
    main()
