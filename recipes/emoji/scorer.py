"""The measure: a small picture encoder that names what it sees. ``python recipes/emoji/scorer.py``

It is trained on real pictures alone, of all four drawing styles (`styles.py`), moved, turned, scaled, blurred, tinted,
noised and partly covered, to tell all emoji apart (a cosine classifier: one unit vector an emoji, whatever its style)
and to say the style. No generator is ever trained with it. A generated picture is *retrieved* when, of all emoji, the
one that was asked for has the nearest vector.

The style is learnt without every eighth emoji, which are those that `evaluate.py` asks for, so that it cannot be known
by heart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from data import CACHE, load, to_floats
from loop import Run, arguments, optimisers, say, train
from styles import BASE, STYLES, load_style
from torch import Tensor, nn

NAME = "scorer-four"
STEPS = 2500
STYLE_NAMES = (BASE, *STYLES)
STYLE_SHARES = (0.34, 0.22, 0.22, 0.22)  # of a batch
STYLE_WEIGHT = 0.3  # of the style's cross-entropy in the loss
HELD_OUT = 8  # every eighth emoji is kept from the style's head
SIZE = 64
FEATURES = 64
STEM = 32
WIDTHS = (64, 128, 192)
STYLE_WIDTH = 64
LEVELS = 8  # of each of red, green and blue in the palette
COLOURS = LEVELS**3
BATCH = 96
INVERSE_TEMPERATURE = 16.0  # of the cosine classifier
MARGIN = 0.1


class Scorer(nn.Module):
    """Pictures (B, 3, 128, 128) in -1..1 -> unit vectors (B, FEATURES); ``names`` (N, FEATURES) holds one an emoji."""

    def __init__(self, count: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, STEM, 4, padding=1, stride=2), nn.GroupNorm(8, STEM), nn.SiLU())
        self.stages, before, seen = nn.ModuleList(), STEM, 2 * STEM
        for width in WIDTHS:
            self.stages.append(nn.Sequential(
                nn.Conv2d(before, width, 3, padding=1, stride=2), nn.GroupNorm(8, width), nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
            ))  # fmt: skip
            before, seen = width, seen + 2 * width
        self.head = nn.Linear(before * (SIZE // 2 >> len(WIDTHS)) ** 2, FEATURES)
        self.style_head = nn.Sequential(nn.Linear(seen + COLOURS, STYLE_WIDTH), nn.SiLU(),
                                        nn.Linear(STYLE_WIDTH, len(STYLE_NAMES)))  # fmt: skip
        self.names = nn.Parameter(torch.randn(count, FEATURES))

    def look(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """The unit vectors, and the logits of the styles (B, 4).

        A style is in how often things occur, not where: its head sees each layer's mean and spread, and the colours.
        """
        small = F.interpolate(pictures, size=(SIZE, SIZE), mode="area")
        seen = self.stem(small)
        moments = [palette(small), *mean_and_spread(seen)]
        for stage in self.stages:
            seen = stage(seen)
            moments += mean_and_spread(seen)
        vectors = F.normalize(self.head(seen.flatten(1)).float(), dim=-1)
        return vectors, self.style_head(torch.cat(moments, 1)).float()

    def forward(self, pictures: Tensor) -> Tensor:
        return self.look(pictures)[0]

    def ranks(self, features: Tensor, own: Tensor) -> Tensor:
        """How many other emoji are nearer to each feature vector than its own, (B,)."""
        likeness = features @ F.normalize(self.names, dim=-1).T
        return (likeness > likeness.gather(1, own[:, None])).sum(1)


def mean_and_spread(seen: Tensor) -> list[Tensor]:
    """Mean and standard deviation of each channel over the picture, (B, C) each."""
    seen = seen.float()
    return [seen.mean((2, 3)), (seen.var((2, 3)) + 1e-6).sqrt()]


def palette(pictures: Tensor) -> Tensor:
    """How much of each of COLOURS colours a picture in -1..1 has: (B, COLOURS), the root of its share."""
    levels = ((pictures.float().clamp(-1, 1) + 1) * (LEVELS / 2)).long().clamp(max=LEVELS - 1)
    place = (levels[:, 0] * LEVELS + levels[:, 1]) * LEVELS + levels[:, 2]
    place = place.flatten(1)
    counts = torch.zeros(len(place), COLOURS).scatter_add_(1, place, torch.ones(place.shape))
    return (counts / place.shape[1]).sqrt()


@dataclass(frozen=True)
class Drawings:
    """Pictures of all styles: uint8 (M, 3, SIZE, SIZE), which emoji (M,) and which style (M,) each is."""

    pictures: Tensor
    emoji: Tensor
    style: Tensor

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Indices (count,), the styles by their shares."""
        weights = torch.tensor(STYLE_SHARES) / self.style.bincount(minlength=len(STYLE_NAMES))
        return torch.multinomial(weights[self.style], count, replacement=True, generator=generator)


def drawings() -> Drawings:
    """Every picture there is, at the size that the scorer looks at."""
    small, emoji, style = [], [], []
    for number, name in enumerate(STYLE_NAMES):
        pictures, index = load_style(name)
        small += [F.interpolate(p.float(), size=(SIZE, SIZE), mode="area").round().byte() for p in pictures.split(256)]
        emoji.append(index)
        style.append(torch.full_like(index, number))
    return Drawings(torch.cat(small), torch.cat(emoji), torch.cat(style))


def uniform(low: float, high: float, *shape: int, generator: torch.Generator) -> Tensor:
    """Random numbers in [low, high)."""
    return low + (high - low) * torch.rand(*shape, generator=generator)


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """What a generator may do to a picture without making it another one; returns (B, 3, SIZE, SIZE)."""
    count = len(pictures)
    angle = uniform(-0.2, 0.2, count, generator=generator)
    zoom = uniform(0.85, 1.2, count, generator=generator)
    affine = torch.stack([angle.cos() / zoom, -angle.sin() / zoom, angle.sin() / zoom, angle.cos() / zoom], 1)
    affine = torch.cat([affine.view(count, 2, 2), uniform(-0.12, 0.12, count, 2, 1, generator=generator)], 2)
    grid = F.affine_grid(affine, [count, 3, SIZE, SIZE], align_corners=False)
    small = F.interpolate(pictures, size=(SIZE, SIZE), mode="area")
    made = F.grid_sample(small - 1, grid, align_corners=False) + 1
    coarse = F.interpolate(F.avg_pool2d(made, 2), scale_factor=2, mode="bilinear")
    blur = uniform(-0.5, 1, count, 1, 1, 1, generator=generator).clamp(min=0)
    made = made.lerp(coarse, blur)
    tinted = torch.rand(count, 1, 1, 1, generator=generator) ** 2  # most a little, some a lot
    made = made * (1 + tinted * uniform(-0.2, 0.15, count, 1, 1, 1, generator=generator))
    made = made + tinted * uniform(-0.12, 0.12, count, 3, 1, 1, generator=generator)
    level = uniform(-0.1, 0.2, count, 1, 1, 1, generator=generator).clamp(min=0)
    made = made + level * torch.randn(made.shape, generator=generator)
    patches = torch.rand(count, 1, 4, 4, generator=generator) < 0.06
    covered = F.interpolate(patches.float(), size=(SIZE, SIZE))
    return made.lerp(torch.ones_like(made), covered).clamp(-1, 1)


@torch.no_grad()
def features(scorer: Scorer, pictures: Tensor) -> Tensor:
    """Feature vectors of float pictures, in batches."""
    return torch.cat([scorer(part) for part in pictures.split(64)])


@torch.no_grad()
def style_of(scorer: Scorer, pictures: Tensor) -> Tensor:
    """The number of each float picture's likeliest style in STYLE_NAMES, (B,)."""
    return torch.cat([scorer.look(part)[1].argmax(-1) for part in pictures.split(64)])


def trained(steps: int = STEPS, seed: int = 0) -> Scorer:
    """The scorer from the cache, trained first when it is missing."""
    torch.manual_seed(seed)
    count = len(load()[1])
    scorer = Scorer(count)
    path = CACHE / "train" / f"{NAME}.ema.pt"
    if not path.exists():
        shown = drawings()

        def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
            chosen = shown.draw(BATCH, generator)
            own, style = shown.emoji[chosen], shown.style[chosen]
            with torch.autocast("cpu", torch.bfloat16):
                seen, styles = scorer.look(augment(to_floats(shown.pictures[chosen]), generator))
            likeness = seen @ F.normalize(scorer.names, dim=-1).T
            entropy = F.cross_entropy(INVERSE_TEMPERATURE * (likeness - MARGIN * F.one_hot(own, count)), own)
            told = torch.where(own % HELD_OUT == 0, -100, style)  # -100: not part of the loss
            style_entropy = F.cross_entropy(styles, told)
            return {
                "loss": entropy + STYLE_WEIGHT * style_entropy, "hit": (likeness.argmax(-1) == own).float().mean(),
                "style": (styles.argmax(-1) == style).float().mean(),
            }  # fmt: skip

        run = Run(NAME, CACHE / "train", steps, seed=seed)
        train(run, {"scorer": scorer}, optimisers({"scorer": (scorer, 2e-3)}, adamw=("names", "style_head")), loss)
    scorer.load_state_dict(torch.load(path, weights_only=True)["scorer"])
    return scorer.eval().requires_grad_(False)


def main() -> None:
    """Train, and report how many of all real pictures, plain and augmented, are retrieved."""
    options = arguments(__doc__, minutes=0).parse_args()
    torch.set_num_threads(options.threads)
    scorer = trained(options.steps or STEPS, options.seed)
    for number, name in enumerate(STYLE_NAMES):
        pictures, own = load_style(name)
        unseen = own % HELD_OUT == 0
        moved = augment(to_floats(pictures), torch.Generator().manual_seed(1))
        for what, seen in (("plain", to_floats(pictures)), ("augmented", moved)):
            ranks = scorer.ranks(features(scorer, seen), own)
            right = (style_of(scorer, seen[unseen]) == number).float().mean()
            say(f"scorer: {name}, {what}: top-1 {(ranks < 1).float().mean():.1%}, top-5 "
                f"{(ranks < 5).float().mean():.1%}, style of held-out emoji {right:.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
