"""Stage 2: the text encoder, before the UNet. ``python recipes/emoji/train_text.py --minutes 4``

From random weights, a denoiser binds words to pictures only after hours. So the text encoder first learns, alone, to
predict from a caption a 128-component PCA of its picture's latents: regression, and a contrast with the rest of the
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from data import CACHE, Emoji, load
from latents import cached
from loop import Run, arguments, optimisers, say, train, use
from tokenizer import MAX_LENGTH, PRETRAINING_LENGTH, Tokenizer, build
from torch import Tensor, nn

from fourstroke.models.clip import CLIPTextModel

WIDTH, LAYERS, HEADS = 128, 4, 4
COMPONENTS = 128
BATCH = 256
TEMPERATURE = 0.1


def text_config(tokenizer: Tokenizer) -> dict[str, object]:
    """config.json of the text encoder; with its own ids, so that the pooled vector is taken at the first end token."""
    return {
        "vocab_size": len(tokenizer.vocabulary), "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "max_position_embeddings": MAX_LENGTH,
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": WIDTH,
        "bos_token_id": tokenizer.start, "eos_token_id": tokenizer.end, "pad_token_id": tokenizer.end,
    }  # fmt: skip


def tokenizer_of_ours(emojis: Sequence[Emoji]) -> Tokenizer:
    """The tokenizer, learnt first when it is missing."""
    folder = CACHE / "tokenizer"
    if not (folder / "merges.txt").exists():
        build(emojis, folder)
    return Tokenizer(folder)


class Captions:
    """All captions of all pictures as ids, drawn by their weights."""

    def __init__(self, emojis: Sequence[Emoji], tokenizer: Tokenizer, length: int):
        most = max(len(emoji.captions) for emoji in emojis)
        self.weights = torch.zeros(len(emojis), most)
        self.ids = torch.zeros(len(emojis), most, length, dtype=torch.int64)
        for row, emoji in enumerate(emojis):
            texts, weights = zip(*emoji.captions, strict=True)
            self.weights[row, : len(weights)] = torch.tensor(weights)
            self.ids[row, : len(texts)] = tokenizer(texts, length)
        self.empty = tokenizer([""], length)[0]

    def draw(self, pictures: Tensor, generator: torch.Generator) -> Tensor:
        """One caption for each picture index: ids (B, length)."""
        column = torch.multinomial(self.weights[pictures], 1, generator=generator)[:, 0]
        return self.ids[pictures, column]


def principal_components(latents: Tensor, count: int) -> Tensor:
    """Each picture's coordinates (N, count) on the first principal axes, scaled together to unit mean square."""
    flat = latents.flatten(1)
    _, _, axes = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    coordinates = (flat - flat.mean(0)) @ axes[:count].T
    return coordinates / coordinates.square().mean().sqrt()


def initialise(encoder: nn.Module) -> None:
    """CLIP-like: small normal embeddings and linear layers, zero biases."""
    for name, weight in encoder.named_parameters():
        if weight.ndim >= 2:
            nn.init.normal_(weight, std=0.02 if "embedding" in name else weight.shape[-1] ** -0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(weight)


def contrast(predicted: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Squared error plus cross-entropy of each caption against the batch's pictures, both directions."""
    likeness = F.normalize(predicted, dim=-1) @ F.normalize(target, dim=-1).T / TEMPERATURE
    own = torch.arange(len(target))
    contrastive = (F.cross_entropy(likeness, own) + F.cross_entropy(likeness.T, own)) / 2
    regression = F.mse_loss(predicted, target)
    return {"loss": regression + 0.3 * contrastive, "mse": regression, "contrast": contrastive}


def main() -> None:
    """Pretrain, and report how many names retrieve their own picture's components."""
    parser = arguments(__doc__, minutes=4)
    parser.add_argument("--rate", type=float, default=2e-3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    _, emojis = load()
    tokenizer = tokenizer_of_ours(emojis)
    captions = Captions(emojis, tokenizer, PRETRAINING_LENGTH)
    targets = principal_components(cached().plain, COMPONENTS)
    encoder = CLIPTextModel.from_config(text_config(tokenizer))
    initialise(encoder)
    encoder.train()
    head = nn.Linear(WIDTH, COMPONENTS)

    def loss_of() -> Callable[[int, torch.Generator], dict[str, Tensor]]:
        def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
            chosen = torch.randperm(len(emojis), generator=generator)[:BATCH]
            ids = captions.draw(chosen, generator)
            with torch.autocast("cpu", torch.bfloat16):
                pooled = encoder(ids).pooled
            return contrast(head(pooled.float()), targets[chosen])

        return loss

    run = Run("text", CACHE / "train", options.steps, options.minutes, seed=options.seed)
    networks = {"text_encoder": encoder, "head": head}
    peaks = {name: (module, options.rate) for name, module in networks.items()}
    averages = train(run, networks, optimisers(peaks, adamw=("embedding", "head")), loss_of())
    with use(networks, averages), torch.no_grad():
        predicted = head(encoder(tokenizer([emoji.name for emoji in emojis], PRETRAINING_LENGTH)).pooled)
        nearest = (F.normalize(predicted, dim=-1) @ F.normalize(targets, dim=-1).T).argmax(-1)
        own = (nearest == torch.arange(len(emojis))).float().mean().item()
        say(f"text: {own:.1%} of the names retrieve their own picture's components")


if __name__ == "__main__":
    main()
