"""The canny T2I-Adapter of `emoji/xl`. ``python recipes/emoji/train_t2i.py --steps 900``, after `train_xl.py`

Of the shape of SDXL's adapters: one reading of the edges a picture, at a sixteenth of its size, whose features are
added to the outputs of the UNet's levels and of its middle. The UNet is frozen, and so are both text encoders. Pictures
are strongly moved, 30 % of the captions are empty, and noisy timesteps come more often, by the paper's cubic rule (Mou
et al. 2023, arXiv 2302.08453, sec. 3.4).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from conditions import Cases, Controlled, controlled
from data import CACHE, load
from folders import write_model
from latents import cached
from loop import Run, arguments, optimisers, train, use
from sampling import ddim
from tokenizer import MAX_LENGTH, Tokenizer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_text import Captions, tokenizer_of_ours
from train_unet import alphas_cumprod, noise_errors
from train_xl import CONFIG as XL
from train_xl import PLAIN_IDS, WIDTH_2, TextEncoders, trained_xl

from fourstroke.models.t2i_adapter import AdapterResnet, T2IAdapter
from fourstroke.models.unet import Residuals, UNet2DConditionModel
from fourstroke.schedulers.noise import add_noise

# The widths must be the UNet's. Three channels, as SDXL's published adapters have.
CONFIG = {
    "in_channels": 3, "channels": [*XL["block_out_channels"], XL["block_out_channels"][-1]], "num_res_blocks": 1,
    "downscale_factor": 16, "adapter_type": "full_adapter_xl",
}  # fmt: skip
BATCH = 32
EMPTY = 0.3
FIRST_SPREAD = 0.1  # of the untrained features: heard by the UNet, and too faint to disturb it


@torch.no_grad()
def warm_start(adapter: T2IAdapter, control: Tensor) -> None:
    """Residual branches that add nothing yet, and features of a small spread for ``control``."""
    first = adapter.adapter.conv_in
    nn.init.kaiming_normal_(first.weight)
    nn.init.zeros_(first.bias)
    first.weight.div_(first(adapter.adapter.unshuffle(control)).std() / FIRST_SPREAD)
    for module in adapter.modules():
        if isinstance(module, AdapterResnet):
            nn.init.kaiming_normal_(module.block1.weight, nonlinearity="relu")
            nn.init.zeros_(module.block2.weight)
            nn.init.zeros_(module.block2.bias)


def steered(
    unet: UNet2DConditionModel, sample: Tensor, timesteps: Tensor, text: Tensor, features: tuple[Tensor, ...]
) -> Tensor:
    """The UNet's output for text from `TextEncoders`, whole pictures, and the adapter's features, if any."""
    ids = torch.tensor(PLAIN_IDS).float().expand(len(sample), -1)
    added = {"text_embeds": text[:, -1, :WIDTH_2], "time_ids": ids}
    return unet(sample, timesteps, text[:, :-1], added_cond_kwargs=added, residuals=Residuals(intra=features))


def adapter_loss(
    adapter: T2IAdapter, unet: UNet2DConditionModel, encoders: TextEncoders, found: Controlled, captions: Captions
) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    """The denoising loss with the adapter's features; ``noisy`` is the error at t >= 700."""
    alphas = alphas_cumprod()

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(found.latents.shape[1], (BATCH,), generator=generator)
        clean, control = found.draw(chosen, generator)
        ids = captions.draw(chosen, generator)
        ids[torch.rand(BATCH, generator=generator) < EMPTY] = captions.empty
        timesteps = (1000 * (1 - torch.rand(BATCH, generator=generator) ** 3)).long().clamp(max=999)
        noise = torch.randn(clean.shape, generator=generator)
        sample = add_noise(clean, noise, alphas[timesteps])
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            with torch.no_grad():
                text = encoders(ids)
            predicted = steered(unet, sample, timesteps, text, adapter(control)).float()
        return noise_errors(predicted, noise, timesteps, alphas)

    return loss


class AdapterSheet:
    """Paints moved copies by their names and edges, and by their names alone."""

    def __init__(self, adapter: T2IAdapter, unet: nn.Module, encoders: TextEncoders, factor: float, name: str):
        self.adapter, self.unet, self.encoders, self.name = adapter, unet, encoders, name
        self.cases = Cases(factor)

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        tokenizer = Tokenizer(CACHE / "tokenizer")
        with torch.autocast("cpu", torch.bfloat16):
            text, empty = (self.encoders(tokenizer(prompts)) for prompts in (self.cases.names, [""]))
            features = self.adapter(self.cases.control)
            ways = (("DDIM 15, guidance 4", features), ("the same without edges", ()))

            def paint(given: tuple[Tensor, ...]) -> Tensor:
                return ddim(lambda x, t, prompt: steered(self.unet, x, t, prompt, given), text, empty, 15, 4.0)

            self.cases.show(f"{self.name} {step}", f"{self.name}-{step:06d}",
                            [(what, lambda given=given: paint(given)) for what, given in ways])  # fmt: skip


def export(folder: Path, name: str = "t2i") -> None:
    """The averaged adapter."""
    adapter = T2IAdapter.from_config(CONFIG)
    adapter.load_state_dict(torch.load(CACHE / "train" / f"{name}.ema.pt", weights_only=True)["adapter"])
    write_model(adapter, folder)


def main() -> None:
    """Train, with a sheet now and then."""
    parser = arguments(__doc__, minutes=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--name", default="t2i")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    latents, emojis = cached(), load()[1]
    captions = Captions(emojis, tokenizer_of_ours(emojis), MAX_LENGTH)
    found = controlled(latents)
    unet, encoders = trained_xl()
    adapter = T2IAdapter.from_config(CONFIG).train()
    warm_start(adapter, found.draw(torch.arange(64), torch.Generator().manual_seed(0))[1])
    sheet = AdapterSheet(adapter, unet, encoders, latents.scaling_factor, options.name)
    run = Run(
        options.name, CACHE / "train", options.steps, options.minutes, warmup=20, ema_decay=0.99, seed=options.seed,
        after=sheet, after_every=175,
    )  # fmt: skip
    peaks = optimisers({"adapter": (adapter, options.rate)}, adamw=())
    averages = train(run, {"adapter": adapter}, peaks, adapter_loss(adapter, unet, encoders, found, captions))
    with use({"adapter": adapter}, averages):
        sheet(999_999)


if __name__ == "__main__":
    main()
