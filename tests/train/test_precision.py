"""Half precision and gradient checkpointing: what must be the same, and what must not get lost."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fourstroke.lora.layers import effective_weights, init_pairs, trainable
from fourstroke.lora.pairs import LoraPair
from fourstroke.train.adapted import Beside, adapted_weights
from fourstroke.train.base import Text
from fourstroke.train.checkpointing import checkpointing_
from fourstroke.train.distillation import Distillation
from fourstroke.train.options import DistillOptions
from fourstroke.train.student import Student

from ..unit import tiny
from .toys import base_of, given_pairs

TARGETS = ("to_q", "to_out.0", "ff.net.2", "proj_in", "conv1", "downsamplers.0.conv", "time_emb_proj", "conv_shortcut")


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, 8, 8), torch.tensor([3, 400]), torch.randn(2, 7, tiny.WIDTH)


def gradients(
    unet: nn.Module, weights: dict[str, Tensor], pairs: dict[str, LoraPair], arguments: tuple
) -> list[Tensor]:
    output = functional_call(unet, weights, arguments)
    return [output, *torch.autograd.grad(output.float().square().mean(), trainable(pairs))]


def test_a_pair_beside_its_weight_is_their_sum() -> None:
    unet, arguments = tiny.unet(), inputs()
    pairs = init_pairs(unet, TARGETS, 2, 3.0)
    given_pairs(pairs)
    beside: dict[str, Tensor] = {name: Beside(unet.get_parameter(name), pair) for name, pair in pairs.items()}
    wanted = gradients(unet, effective_weights(unet, pairs), pairs, arguments)
    for one, other in zip(gradients(unet, beside, pairs, arguments), wanted, strict=True):
        scale = other.detach().abs().max()
        assert scale > 0
        torch.testing.assert_close(one / scale, other / scale, rtol=0, atol=1e-4)


def test_what_is_no_layer_gets_the_sum() -> None:
    weight = torch.randn(3, 4).bfloat16()
    pair = LoraPair(torch.randn(2, 4), torch.randn(3, 2), 3.0)
    beside = Beside(weight, pair)
    assert (beside.dtype, beside.shape, beside.device) == (weight.dtype, weight.shape, weight.device)
    wanted = (weight.float() + 1.5 * pair.up @ pair.down).bfloat16()
    assert torch.equal(beside + 0, wanted)
    assert torch.equal(beside.float(), wanted.float())
    assert torch.equal(torch.nn.functional.embedding(torch.tensor([2]), beside), wanted[2:])


def test_float32_is_merged_and_half_precision_is_not() -> None:
    unet = tiny.unet()
    pairs = init_pairs(unet, ("to_q", "conv1"), 2)
    assert not any(isinstance(weight, Beside) for weight in adapted_weights(unet, pairs).values())
    assert all(isinstance(weight, Beside) for weight in adapted_weights(unet.bfloat16(), pairs).values())
    assert adapted_weights(unet, pairs).keys() == pairs.keys()


def test_changes_below_a_bfloat16s_last_bit_act() -> None:
    """A change of a thousandth of the weights is mostly lost in their sum, though it adds up to 3 % of the output."""
    layer = nn.Sequential(nn.Linear(1024, 64, bias=False)).bfloat16().requires_grad_(False)
    pair = LoraPair(torch.ones(1, 1024), torch.full((64, 1), 2e-5))
    x = (1 + 0.1 * torch.randn(8, 1024)).bfloat16()
    wanted = x.float() @ (pair.up @ pair.down).T
    assert wanted.abs().mean() > 0.02 * layer(x).float().abs().mean()

    def error(weights: dict[str, Tensor]) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            change = functional_call(layer, weights, (x,)).float() - layer(x).float()
        return float((change - wanted).norm() / wanted.norm())

    assert error(adapted_weights(layer, {"0.weight": pair})) < 0.15
    assert error(effective_weights(layer, {"0.weight": pair})) > 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_changes_no_bit(dtype: torch.dtype) -> None:
    unet, arguments = tiny.unet().to(dtype), inputs()
    arguments = (arguments[0].to(dtype), arguments[1], arguments[2].to(dtype))
    pairs = init_pairs(unet, TARGETS, 2, 3.0)
    given_pairs(pairs)
    wanted = gradients(unet, adapted_weights(unet, pairs), pairs, arguments)
    before = {name: dict(vars(module)) for name, module in unet.named_modules()}
    checkpointing_(unet)
    # The weights are given for one call; when blocks are computed again it is over, and the unet's own are back.
    for one, other in zip(gradients(unet, adapted_weights(unet, pairs), pairs, arguments), wanted, strict=True):
        assert torch.equal(one, other)
    plain = unet(*arguments)
    checkpointing_(unet, False)
    assert torch.equal(plain, unet(*arguments))
    assert {name: vars(module).keys() for name, module in unet.named_modules()} == {
        n: v.keys() for n, v in before.items()
    }


def test_checkpointing_keeps_less() -> None:
    unet, arguments = tiny.unet(), inputs()
    pairs = init_pairs(unet, TARGETS, 2)
    kept = []
    for enabled in (False, True):
        checkpointing_(unet, enabled)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):  # noqa: B023
            functional_call(unet, adapted_weights(unet, pairs), arguments)
        kept.append(len(sizes))
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_mixed_precision_has_nearly_the_gradients_of_float32(base: torch.dtype) -> None:
    unet = tiny.unet()
    pairs = init_pairs(unet, TARGETS, 2, 3.0)
    given_pairs(pairs)
    options = DistillOptions(guidance=(1.0, 3.0), loss="l2")
    latents, text = torch.randn(4, 4, 8, 8), Text(torch.randn(4, 7, tiny.WIDTH))
    found = []
    for dtype, weights in ((torch.float32, torch.float32), (torch.bfloat16, base)):
        task = Distillation(dataclasses.replace(base_of(unet.to(weights)), dtype=dtype), text, options)
        draws = task.draw(latents, torch.Generator().manual_seed(0))
        for tensor in trainable(pairs):
            tensor.grad = None
        task.loss(Student({"unet": pairs}), latents, text, text, draws).backward()
        assert all(tensor.grad is not None and tensor.grad.dtype == torch.float32 for tensor in trainable(pairs))
        found.append(torch.cat([tensor.grad.flatten() for tensor in trainable(pairs) if tensor.grad is not None]))
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.98
