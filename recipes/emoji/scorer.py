"""The measure: a small picture encoder that names what it sees. ``python recipes/emoji/scorer.py --minutes 6``

It is trained on the real pictures alone, moved, turned, scaled, blurred, tinted, noised and partly covered, to tell
all of them apart (a cosine classifier: one unit vector a picture). No generator is ever trained with it. A generated
picture is *retrieved* when, of all pictures, the one that was asked for has the nearest vector.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from data import CACHE, load, to_floats
from loop import Run, arguments, optimisers, say, train
from torch import Tensor, nn

SIZE = 64
FEATURES = 64
WIDTHS = (32, 64, 128, 192)
BATCH = 64
INVERSE_TEMPERATURE = 16.0  # of the cosine classifier
MARGIN = 0.1


class Scorer(nn.Module):
    """Pictures (B, 3, 128, 128) in -1..1 -> unit vectors (B, FEATURES); ``names`` (N, FEATURES) holds one a picture."""

    def __init__(self, count: int):
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in WIDTHS:
            layers += [
                nn.Conv2d(before, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1, stride=2), nn.GroupNorm(8, width), nn.SiLU(),
            ]  # fmt: skip
            before = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(before * (SIZE >> len(WIDTHS)) ** 2, FEATURES)
        self.names = nn.Parameter(torch.randn(count, FEATURES))

    def forward(self, pictures: Tensor) -> Tensor:
        small = F.interpolate(pictures, size=(SIZE, SIZE), mode="area")
        return F.normalize(self.head(self.body(small).flatten(1)).float(), dim=-1)

    def ranks(self, features: Tensor, own: Tensor) -> Tensor:
        """How many other pictures are nearer to each feature vector than its own, (B,)."""
        likeness = features @ F.normalize(self.names, dim=-1).T
        return (likeness > likeness.gather(1, own[:, None])).sum(1)


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
    made = made * uniform(0.8, 1.15, count, 1, 1, 1, generator=generator)
    made = made + uniform(-0.12, 0.12, count, 3, 1, 1, generator=generator)
    level = uniform(-0.1, 0.2, count, 1, 1, 1, generator=generator).clamp(min=0)
    made = made + level * torch.randn(made.shape, generator=generator)
    patches = torch.rand(count, 1, 4, 4, generator=generator) < 0.06
    covered = F.interpolate(patches.float(), size=(SIZE, SIZE))
    return made.lerp(torch.ones_like(made), covered).clamp(-1, 1)


@torch.no_grad()
def features(scorer: Scorer, pictures: Tensor) -> Tensor:
    """Feature vectors of float pictures, in batches."""
    return torch.cat([scorer(part) for part in pictures.split(64)])


def frechet(first: Tensor, second: Tensor) -> float:
    """Frechet distance of two sets of feature vectors (N, D), each taken as a normal distribution (arXiv 1706.08500,
    eq. 6)."""
    a, b = first.double(), second.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, axes = torch.linalg.eigh(cov_a)
    root = axes @ torch.diag(values.clamp(min=0).sqrt()) @ axes.T
    mixed = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * mixed
    return max(0.0, float(distance))


def sharpness(pictures: Tensor) -> float:
    """Mean energy of the Laplacian of the grey pictures: blur lowers it, noise raises it."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    return F.conv2d(pictures.mean(1, keepdim=True), kernel).square().mean().item()


def trained(minutes: float = 6, steps: int = 0, seed: int = 0) -> Scorer:
    """The scorer from the cache, trained first when it is missing."""
    torch.manual_seed(seed)
    pictures = to_floats(load()[0])
    scorer = Scorer(len(pictures))
    path = CACHE / "train" / "scorer.ema.pt"
    if not path.exists():

        def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
            chosen = torch.randint(len(pictures), (BATCH,), generator=generator)
            with torch.autocast("cpu", torch.bfloat16):
                seen = scorer(augment(pictures[chosen], generator))
            likeness = seen @ F.normalize(scorer.names, dim=-1).T
            margin = MARGIN * F.one_hot(chosen, len(pictures))
            entropy = F.cross_entropy(INVERSE_TEMPERATURE * (likeness - margin), chosen)
            hit = (likeness.argmax(-1) == chosen).float().mean()
            return {"loss": entropy, "hit": hit}

        run = Run("scorer", CACHE / "train", steps, minutes, seed=seed)
        train(run, {"scorer": scorer}, optimisers({"scorer": (scorer, 2e-3)}, adamw=("names",)), loss)
    scorer.load_state_dict(torch.load(path, weights_only=True)["scorer"])
    return scorer.eval().requires_grad_(False)


def main() -> None:
    """Train, and report how many of all real pictures, plain and augmented, are retrieved."""
    options = arguments(__doc__, minutes=6).parse_args()
    torch.set_num_threads(options.threads)
    scorer = trained(options.minutes, options.steps, options.seed)
    pictures = to_floats(load()[0])
    own = torch.arange(len(pictures))
    for name, seen in (("plain", pictures), ("augmented", augment(pictures, torch.Generator().manual_seed(1)))):
        ranks = scorer.ranks(features(scorer, seen), own)
        say(f"scorer: {name} pictures: top-1 {(ranks < 1).float().mean():.1%}, top-5 {(ranks < 5).float().mean():.1%}")


if __name__ == "__main__":
    main()
