"""Trainable pairs: what peft's layers compute, with gradients to the pairs alone."""

from __future__ import annotations

import json
from importlib.resources import files

import diffusers
import peft
import pytest
import torch
from torch import nn

from fourstroke.lora import LoraError
from fourstroke.lora.layers import LCM_LORA_TARGETS, effective_weights, init_pairs, trainable
from fourstroke.models.unet import UNet2DConditionModel

from .lora_toys import TINY_UNET, toy, unet


def test_forward_and_gradients_are_peft_s() -> None:
    model = unet()
    pairs = init_pairs(model, rank=3, alpha=2.0, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for pair in pairs.values():
            pair.up.normal_()
    oracle = diffusers.UNet2DConditionModel(**TINY_UNET).eval().requires_grad_(False)
    oracle.load_state_dict(model.state_dict())
    config = peft.LoraConfig(r=3, lora_alpha=2, target_modules=list(LCM_LORA_TARGETS))
    peft.inject_adapter_in_model(config, oracle, "a")
    layers = {n: m for n, m in oracle.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert {f"{name}.weight" for name in layers} == set(pairs)
    for name, layer in layers.items():
        layer.lora_A["a"].weight.data = pairs[f"{name}.weight"].down.detach().clone()
        layer.lora_B["a"].weight.data = pairs[f"{name}.weight"].up.detach().clone()
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 768))
    base = model(*inputs)
    ours = torch.func.functional_call(model, effective_weights(model, pairs), inputs)
    theirs = oracle(*inputs).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, base, atol=0.1)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    for name, layer in layers.items():
        for found, expected in (
            (pairs[f"{name}.weight"].down, layer.lora_A["a"]),
            (pairs[f"{name}.weight"].up, layer.lora_B["a"]),
        ):
            torch.testing.assert_close(found.grad, expected.weight.grad, rtol=1e-3, atol=1e-5)
    assert torch.equal(model(*inputs), base) and all(p.grad is None for p in model.parameters())


def test_a_new_pair_changes_nothing_and_is_drawn_from_the_generator() -> None:
    model = unet()
    draws = [init_pairs(model, rank=2, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    for name, weight in effective_weights(model, draws[0]).items():
        assert torch.equal(weight, model.get_parameter(name))
    first, again, other = ([pair.down for pair in pairs.values()] for pairs in draws)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    for name, pair in draws[0].items():
        bound = model.get_parameter(name)[0].numel() ** -0.5
        assert 0.5 * bound < float(pair.down.detach().abs().max()) <= bound
        assert pair.scale == 1.0 and pair.down.is_leaf and pair.up.requires_grad
    assert len(trainable(draws[0])) == 2 * len(draws[0])


def test_dtype_of_the_model_is_kept() -> None:
    model = toy(torch.bfloat16)
    pairs = init_pairs(model, ["conv", "inner.0"], rank=2)
    assert {weight.dtype for weight in effective_weights(model, pairs).values()} == {torch.bfloat16}
    assert {pair.down.dtype for pair in pairs.values()} == {torch.float32}
    assert pairs["conv.weight"].down.shape == (2, 4, 3, 3) and pairs["conv.weight"].up.shape == (6, 2, 1, 1)


@pytest.mark.parametrize(
    ("targets", "rank", "message"),
    [
        (["conv"], 0, "rank must be at least 1, got 0"),
        (["conv", "to_q"], 2, r"no module of Toy is named \['to_q'\]"),
        (["table"], 2, "target table is a Embedding"),
    ],
)
def test_wrong_targets(targets: list[str], rank: int, message: str) -> None:
    with pytest.raises(LoraError, match=message):
        init_pairs(toy(), targets, rank=rank)


def test_grouped_convolution() -> None:
    with pytest.raises(LoraError, match="0 is a grouped convolution"):
        init_pairs(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), ["0"], rank=2)


def test_pairs_of_another_model() -> None:
    pairs = init_pairs(unet(), rank=2)
    with pytest.raises(LoraError, match=r"Toy has no parameter .*to_q\.weight"):
        effective_weights(toy(), pairs)


@pytest.mark.parametrize(
    ("folder", "millions", "tensors"), [("sd15", 67.5, 834), ("ssd-1b", 105, 1269), ("sdxl", 197, 2364)]
)
def test_the_targets_are_those_of_the_published_loras(folder: str, millions: float, tensors: int) -> None:
    """The paper's table of trainable parameters at rank 64 (arXiv 2311.05556), and the keys of the published files."""
    config = json.loads((files("fourstroke") / "configs" / folder / "unet" / "config.json").read_text())
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(config)
    pairs = init_pairs(model, rank=1)
    assert 3 * len(pairs) == tensors
    assert 64 * sum(tensor.numel() for tensor in trainable(pairs)) == pytest.approx(1e6 * millions, rel=5e-3)
