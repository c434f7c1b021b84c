"""One step of each training against diffusers' networks with peft's LoRA, in float64, and the papers' equations."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fourstroke import CLIPTextModel
from fourstroke.lora.layers import LCM_LORA_TARGETS, init_pairs
from fourstroke.train import distillation, lora
from fourstroke.train.base import Text
from fourstroke.train.encoding import Batch
from fourstroke.train.options import ATTENTION_TARGETS, TEXT_TARGETS, DistillOptions, LoraOptions
from fourstroke.train.student import Student

from ..parity.oracles import UNETS, unet_inputs
from ..unit import tiny
from .toys import ALPHAS, base_of, given_pairs, gradients_agree, unets, with_peft

RANK, ALPHA, ROWS = 3, 2.0, 3


def example(kind: str) -> tuple[Tensor, Text, Text]:
    """Latents, and the text of every row with and without a prompt, in float32."""
    inputs = unet_inputs(UNETS[kind], (8, 8), ROWS)
    nothing = unet_inputs(UNETS[kind], (8, 8), ROWS)
    added, no_added = (values.get("added_cond_kwargs", {}) for values in (inputs, nothing))
    text = Text(inputs["encoder_hidden_states"], added.get("text_embeds"), added.get("time_ids"))
    empty = Text(nothing["encoder_hidden_states"], no_added.get("text_embeds"), added.get("time_ids"))
    return inputs["sample"], text, empty


def peer(network: Any, sample: Tensor, timesteps: Tensor, text: Text) -> Tensor:
    """diffusers' output in float64."""
    added = None
    if text.pooled is not None and text.time_ids is not None:
        added = {"text_embeds": text.pooled.double(), "time_ids": text.time_ids.double()}
    return network(sample, timesteps, text.embeds.double(), added_cond_kwargs=added).sample


def clean(output: Tensor, sample: Tensor, alpha: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The picture and the noise that an output implies: DDPM, eq. 4, and Salimans & Ho, app. D, solved for both."""
    root, rest = alpha.sqrt(), (1 - alpha).sqrt()
    if kind == "epsilon":
        return (sample - rest * output) / root, output
    return root * sample - rest * output, rest * sample + root * output


def scalings(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of LCM, app. C.1 and code: sigma_data 0.5 and timesteps scaled by 10."""
    scaled = 10.0 * timesteps.double()[:, None, None, None]
    return 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()


def distillation_by_hand(
    network: Any,
    teacher: Any,
    latents: Tensor,
    text: Text,
    empty: Text,
    draws: distillation.Draws,
    kind: str,
    loss: str,
) -> Tensor:
    """LCM, alg. 1, with DDIM as the solver (eq. 11, app. B), guidance by eq. 8, and the Huber loss; all in float64."""
    noise, w = draws.noise.double(), draws.w.double()[:, None, None, None]
    at, before = (ALPHAS[steps][:, None, None, None] for steps in (draws.later, draws.earlier))
    sample = at.sqrt() * latents.double() + (1 - at).sqrt() * noise
    with torch.no_grad():
        said = [peer(teacher, sample, draws.later, words) for words in (text, empty)]
        (x_text, e_text), (x_empty, e_empty) = (clean(output, sample, at, kind) for output in said)
        x0 = (1 + w) * x_text - w * x_empty
        e0 = (1 + w) * e_text - w * e_empty
        nearer = before.sqrt() * x0 + (1 - before).sqrt() * e0
        skip, out = scalings(draws.earlier)
        target = skip * nearer + out * clean(peer(network, nearer, draws.earlier, text), nearer, before, kind)[0]
    skip, out = scalings(draws.later)
    value = skip * sample + out * clean(peer(network, sample, draws.later, text), sample, at, kind)[0]
    if loss == "l2":
        return (value - target).square().mean()
    return (((value - target).square() + 1e-3**2).sqrt() - 1e-3).mean()


@pytest.mark.parametrize(
    ("kind", "prediction_type", "loss"),
    [("sd15", "epsilon", "huber"), ("sd21", "v_prediction", "l2"), ("xl", "epsilon", "l2")],
)
def test_distillation_has_the_gradients_of_the_papers_equations(kind: str, prediction_type: str, loss: str) -> None:
    ours, teacher = unets(kind)
    _, network = unets(kind)
    network.load_state_dict(teacher.state_dict())
    targets = [target for target in LCM_LORA_TARGETS if any(n.endswith(target) for n, _ in ours.named_modules())]
    pairs = init_pairs(ours, targets, RANK, ALPHA)
    given_pairs(pairs)
    theirs = with_peft(network, pairs, RANK, ALPHA)
    options = DistillOptions(loss=loss, guidance=(3.0, 9.0))
    latents, text, empty = example(kind)
    task = distillation.Distillation(base_of(ours, prediction_type), empty, options)
    draws = task.draw(latents, torch.Generator().manual_seed(5))
    value = task.loss(Student({"unet": pairs}), latents, text, empty, draws)
    value.backward()
    wanted = distillation_by_hand(network, teacher, latents, text, empty, draws, prediction_type, loss)
    wanted.backward()
    torch.testing.assert_close(value.double(), wanted, rtol=1e-4, atol=0)
    gradients_agree(pairs, theirs, 5e-4)


@pytest.mark.parametrize(
    ("kind", "prediction_type", "gamma"),
    [("sd15", "epsilon", 5.0), ("sd21", "v_prediction", 2.0), ("xl", "epsilon", None)],
)
def test_a_lora_has_the_gradients_of_the_papers_equations(kind: str, prediction_type: str, gamma: float | None) -> None:
    ours, network = unets(kind)
    pairs = init_pairs(ours, ATTENTION_TARGETS, RANK, ALPHA)
    given_pairs(pairs)
    theirs = with_peft(network, pairs, RANK, ALPHA)
    latents, text, empty = example(kind)
    options = LoraOptions(min_snr_gamma=gamma, noise_offset=0.1)
    task = lora.NoisePrediction(base_of(ours, prediction_type), empty, options)
    draws = task.draw(latents, torch.Generator().manual_seed(5))
    value = task.loss(Student({"unet": pairs}), latents, text, draws)
    value.backward()

    noise, alpha = draws.noise.double(), ALPHAS[draws.timesteps][:, None, None, None]
    sample = alpha.sqrt() * latents.double() + (1 - alpha).sqrt() * noise
    target = noise if prediction_type == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * latents.double()
    each = (peer(network, sample, draws.timesteps, text) - target).square().mean((1, 2, 3))
    if (
        gamma is not None
    ):  # as a weight of the loss of x_0, which is the noise's over SNR, or the velocity's over SNR + 1
        snr = (alpha / (1 - alpha)).flatten()
        each = each * snr.clamp(max=gamma) / (snr if prediction_type == "epsilon" else snr + 1)
    wanted = each.mean()
    wanted.backward()
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=0)
    gradients_agree(pairs, theirs)


def test_min_snr_weighs_the_loss_of_the_latents_alike_for_every_kind_of_prediction() -> None:
    """The same network, read as three kinds of prediction, has the same weighted loss."""
    alphas = torch.tensor([0.99, 0.6, 0.05], dtype=torch.float64)
    latents, noise, error = torch.randn(3, 3, 4, 2, 2, dtype=torch.float64)
    a = alphas[:, None, None, None]
    sample = a.sqrt() * latents + (1 - a).sqrt() * noise
    believed = latents + error  # what the network takes for x_0
    epsilon = (sample - a.sqrt() * believed) / (1 - a).sqrt()
    outputs = {"sample": believed, "epsilon": epsilon, "v_prediction": a.sqrt() * epsilon - (1 - a).sqrt() * believed}
    losses = [
        (output - lora.target_of(kind, latents, noise, alphas)).square().mean((1, 2, 3))
        * lora.min_snr_weights(alphas, 5.0, kind)
        for kind, output in outputs.items()
    ]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])
    snr = alphas / (1 - alphas)
    torch.testing.assert_close(losses[0], error.square().mean((1, 2, 3)) * snr.clamp(max=5))


def test_noise_offset_shifts_whole_channels() -> None:
    ours, _ = unets("sd15")
    latents = torch.zeros(64, 4, 8, 8)
    spread = []
    for offset in (0.0, 0.5):
        task = lora.NoisePrediction(base_of(ours), Text(torch.zeros(1, 7, 24)), LoraOptions(noise_offset=offset))
        noise = task.draw(latents, torch.Generator().manual_seed(0)).noise
        spread.append(noise.mean((2, 3)).std().item())
    assert spread[0] == pytest.approx(1 / 8, rel=0.2)  # the mean of 64 independent numbers
    assert spread[1] == pytest.approx((1 / 64 + 0.25) ** 0.5, rel=0.2)


def test_text_encoders_have_peers_gradients_through_the_unet() -> None:
    import transformers

    pipe = tiny.sd(cross_attention_dim=tiny.WIDTH)
    settings = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": tiny.WIDTH, "intermediate_size": 64}
    config = tiny.text_config() | settings
    network = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)).eval()
    tiny.filled(network)
    pipe.text_encoder = CLIPTextModel.from_config(config)
    keys = {pipe.text_encoder.published_name(name): value for name, value in network.state_dict().items()}
    pipe.text_encoder.load_state_dict({name: value for name, value in keys.items() if name is not None})
    pipe.text_encoder.eval().requires_grad_(False)
    base = dataclasses.replace(base_of(pipe.unet), pipe=pipe)
    pairs = {"unet": init_pairs(pipe.unet, ("to_k",), RANK, ALPHA)}
    pairs["text_encoder"] = init_pairs(pipe.text_encoder, TEXT_TARGETS, RANK, ALPHA)
    given_pairs(pairs["text_encoder"])
    # transformers 5 has dropped the name of the inner module.
    prefix = "" if hasattr(network, "text_model") else "text_model."
    theirs = with_peft(network, {n.removeprefix(prefix): p for n, p in pairs["text_encoder"].items()}, RANK, ALPHA)
    task = lora.NoisePrediction(base, Text(torch.zeros(1, 77, tiny.WIDTH)), LoraOptions(train_text_encoder=True))
    batch = Batch(torch.randn(2, 4, 4, 4), torch.zeros(2, 77, tiny.WIDTH), None, None, ["fox", "red fox"])
    text = task.text(Student(pairs), batch, torch.tensor([False, True]))
    chosen = torch.randn_like(text.embeds)
    (text.embeds * chosen).sum().backward()
    network = network.double()
    wanted = network(pipe.tokenizer(["fox", ""])).last_hidden_state
    torch.testing.assert_close(text.embeds.double(), wanted, rtol=1e-4, atol=1e-4)
    (wanted * chosen.double()).sum().backward()
    gradients_agree({n.removeprefix(prefix): p for n, p in pairs["text_encoder"].items()}, theirs)


def test_captions_are_dropped_for_the_part_that_is_asked_for() -> None:
    ours, _ = unets("sd15")
    empty = Text(torch.full((1, 7, 24), 9.0))
    task = distillation.Distillation(base_of(ours), empty, DistillOptions(caption_dropout=0.25))
    dropped = task.draw(torch.zeros(400, 4, 2, 2), torch.Generator().manual_seed(0)).dropped
    rows = (Text(torch.zeros(400, 7, 24)).where(dropped, empty).embeds == 9).flatten(1)
    assert torch.equal(rows.all(1), rows.any(1)) and torch.equal(rows.all(1), dropped)
    assert 0.2 < dropped.float().mean() < 0.3
