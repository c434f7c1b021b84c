"""Networks that keep half precision and compute in float32: the same bits as converted ones, and the way back."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

from fourstroke import CLIPTextModelWithProjection
from fourstroke.runtime.device import avoid_half_on_cpu_
from fourstroke.runtime.openvino import openvino_
from fourstroke.runtime.widening import is_widened, result_dtype, unwiden_, widen_
from fourstroke.text import encode_prompts
from tests.unit import tiny

IDS = torch.tensor([[0, 5, 9, 1, 1], [0, 7, 1, 1, 1]])


@pytest.fixture(params=[torch.float16, torch.bfloat16])
def encoder(request: pytest.FixtureRequest) -> Any:
    with torch.no_grad():
        made = tiny.filled(CLIPTextModelWithProjection.from_config({**tiny.text_config(), "projection_dim": 12}))
        yield made.to(request.param)


def same(first: Any, second: Any) -> bool:
    states = zip(first.hidden_states, second.hidden_states, strict=True)
    return torch.equal(first.pooled, second.pooled) and all(torch.equal(a, b) for a, b in states)


def test_results_are_those_of_converted_weights(encoder: Any) -> None:
    dtype, converted = encoder.dtype, copy.deepcopy(encoder).float()
    before = encoder(IDS)
    widen_(encoder)
    found = encoder(IDS)
    assert encoder.dtype == dtype and found.last_hidden_state.dtype == found.pooled.dtype == torch.float32
    assert same(found, converted(IDS))
    unwiden_(encoder)
    assert same(encoder(IDS), before) and not any("forward" in vars(layer) for layer in encoder.modules())


def test_copies_compute_with_their_own_weights(encoder: Any) -> None:
    widen_(encoder)
    other = copy.deepcopy(encoder)
    assert is_widened(other) and same(other(IDS), encoder(IDS))
    before = encoder(IDS)
    for parameter in other.parameters():
        parameter.mul_(2)
    assert same(encoder(IDS), before) and not same(other(IDS), before)


@pytest.mark.parametrize("clip_skip", [None, 1])
def test_prompts_are_float32_embeddings(encoder: Any, clip_skip: int | None) -> None:
    converted = copy.deepcopy(encoder).float()
    widen_(encoder)
    found, expected = (
        encode_prompts([["a red fox"]], [tiny.tokenizer()], [it], penultimate=False, clip_skip=clip_skip)
        for it in (encoder, converted)
    )
    assert found.embeds.dtype == torch.float32
    assert torch.equal(found.embeds, expected.embeds) and torch.equal(found.pooled, expected.pooled)


def test_widened_networks_stay_as_they_are_on_a_cpu(encoder: Any) -> None:
    half = encoder.dtype == torch.float16
    network = tiny.filled(CLIPTextModelWithProjection.from_config({**tiny.text_config(), "projection_dim": 12}))
    other, unet = network.half(), tiny.unet().half()
    openvino_(unet)
    widen_(encoder)
    dtype = encoder.dtype
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        avoid_half_on_cpu_([encoder, other, unet], torch.device("cpu"))
    assert encoder.dtype == dtype and other.dtype == torch.float32 and unet.dtype == torch.float16
    assert result_dtype(encoder) == (torch.float32 if half else torch.bfloat16)
