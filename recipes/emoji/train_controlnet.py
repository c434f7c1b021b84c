"""The canny ControlNet of `emoji/base`. ``python recipes/emoji/train_controlnet.py --steps 320``

A copy of the base's way down without its attention, which reads edges and adds to the base's skip connections; the base
is frozen. Pictures are strongly moved, and 30 % of the captions are empty, so that the edges alone must tell what is
where.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from conditions import Cases, Controlled, controlled
from data import CACHE, load
from distill_lcm import Student, trained_networks
from folders import write_model
from latents import cached
from loop import Run, arguments, optimisers, train, use
from sampling import consistency, ddim
from tokenizer import MAX_LENGTH, Tokenizer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_text import Captions, tokenizer_of_ours
from train_unet import alphas_cumprod, noise_errors

from fourstroke.lora.layers import effective_weights
from fourstroke.models.clip import CLIPTextModel
from fourstroke.models.controlnet import ControlNetModel, control_config
from fourstroke.models.unet import UNet2DConditionModel
from fourstroke.schedulers.noise import add_noise

BATCH = 32
EMPTY = 0.3
NOISIER = 0.5  # timestep = 1000 u^0.5: where things stand is settled early
EMBEDDING = (8, 16, 32, 64)  # widths on the way from the picture's size to an eighth of it


def untrained(unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet for ``unet``: its way down without attention."""
    return ControlNetModel(control_config(
        unet.config, down_block_types=("DownBlock2D",) * 3, mid_block_type="UNetMidBlock2D",
        conditioning_embedding_out_channels=EMBEDDING,
    ))  # fmt: skip


@torch.no_grad()
def warm_start(network: ControlNetModel, unet: UNet2DConditionModel, control: Tensor) -> None:
    """The base's weights where it has them; and an embedding that passes edges on, though the network adds nothing yet.

    The embedding's last layer is not zero, unlike the published ones': the layers after the copy are, so that the base
    is left alone all the same, and they hear of the edges from the first step on. Each layer is scaled to give
    ``control`` a spread of one, the last one half.
    """
    own, given = network.state_dict(), unet.state_dict()
    known = {name: given[name] for name, value in own.items() if name in given and given[name].shape == value.shape}
    network.load_state_dict(known, strict=False)
    embedding = network.controlnet_cond_embedding
    x = control
    for layer in (embedding.conv_in, *embedding.blocks, embedding.conv_out):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
        layer.weight.div_(layer(x).std() * (2 if layer is embedding.conv_out else 1))
        x = F.silu(layer(x))


def control_loss(
    network: ControlNetModel, unet: UNet2DConditionModel, encoder: CLIPTextModel, found: Controlled, captions: Captions
) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    """The base's denoising loss with the network's residuals; ``noisy`` is the error at t >= 700."""
    alphas = alphas_cumprod()

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(found.latents.shape[1], (BATCH,), generator=generator)
        clean, control = found.draw(chosen, generator)
        ids = captions.draw(chosen, generator)
        ids[torch.rand(BATCH, generator=generator) < EMPTY] = captions.empty
        timesteps = (1000 * torch.rand(BATCH, generator=generator) ** NOISIER).long().clamp(max=999)
        noise = torch.randn(clean.shape, generator=generator)
        sample = add_noise(clean, noise, alphas[timesteps])
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            with torch.no_grad():
                text = encoder(ids).last_hidden_state
            residuals = network(sample, timesteps, text, condition=network.embed_condition(control))
            predicted = unet(sample, timesteps, text, residuals=residuals).float()
        return noise_errors(predicted, noise, timesteps, alphas)

    return loss


class ControlSheet:
    """Paints moved copies by their names and edges: guided, without the edges, and in four steps of the LCM-LoRA."""

    def __init__(self, network: ControlNetModel, unet: nn.Module, encoder: nn.Module, factor: float, name: str):
        self.network, self.unet, self.encoder, self.name = network, unet, encoder, name
        self.cases = Cases(factor)
        student = Student(unet)
        student.load_state_dict(torch.load(CACHE / "train" / "lcm.ema.pt", weights_only=True)["pairs"])
        self.weights = {key: weight.detach() for key, weight in effective_weights(unet, student.pairs).items()}

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        tokenizer = Tokenizer(CACHE / "tokenizer")
        with torch.autocast("cpu", torch.bfloat16):
            text, empty = (self.encoder(tokenizer(t)).last_hidden_state for t in (self.cases.names, [""]))
            condition = self.network.embed_condition(self.cases.control)

            def steered(sample: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
                return self.unet(sample, t, prompt, residuals=self.network(sample, t, prompt, condition=condition))

            def four(sample: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
                added = self.network(sample, t, prompt, condition=condition)
                return functional_call(self.unet, self.weights, (sample, t, prompt), {"residuals": added})

            self.cases.show(f"{self.name} {step}", f"{self.name}-{step:06d}", [
                ("DDIM 15, guidance 4", lambda: ddim(steered, text, empty, 15, 4.0)),
                ("the same without edges", lambda: ddim(self.unet, text, empty, 15, 4.0)),
                ("LCM-LoRA 4", lambda: consistency(four, text, 4)),
            ])  # fmt: skip


def export(folder: Path, name: str = "controlnet") -> None:
    """The averaged network."""
    network = untrained(trained_networks()[0])
    network.load_state_dict(torch.load(CACHE / "train" / f"{name}.ema.pt", weights_only=True)["controlnet"])
    write_model(network, folder)


def main() -> None:
    """Train, with a sheet now and then."""
    parser = arguments(__doc__, minutes=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--name", default="controlnet")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    latents, emojis = cached(), load()[1]
    captions = Captions(emojis, tokenizer_of_ours(emojis), MAX_LENGTH)
    found = controlled(latents)
    unet, encoder = trained_networks()
    network = untrained(unet).train()
    warm_start(network, unet, found.draw(torch.arange(64), torch.Generator().manual_seed(0))[1])
    sheet = ControlSheet(network, unet, encoder, latents.scaling_factor, options.name)
    run = Run(
        options.name, CACHE / "train", options.steps, options.minutes, warmup=20, ema_decay=0.99, seed=options.seed,
        after=sheet, after_every=175,
    )  # fmt: skip
    peaks = optimisers({"controlnet": (network, options.rate)}, adamw=("conv_in.",))
    averages = train(run, {"controlnet": network}, peaks, control_loss(network, unet, encoder, found, captions))
    with use({"controlnet": network}, averages):
        sheet(999_999)


if __name__ == "__main__":
    main()
