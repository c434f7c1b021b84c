"""Text encoders that keep their last answers: when they do, when they forget, and that no picture changes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from fourstroke import CLIPTextModel, Engine
from fourstroke.runtime import recall
from fourstroke.runtime.openvino import openvino_
from fourstroke.runtime.options import RuntimeOptions
from fourstroke.runtime.recall import recall_, unrecall_
from fourstroke.runtime.widening import widen_
from tests.unit import tiny

FOX, OWL = torch.tensor([[0, 5, 9, 1, 1]]), torch.tensor([[0, 7, 1, 1, 1]])


@pytest.fixture
def encoder() -> Any:
    return tiny.filled(CLIPTextModel.from_config(tiny.text_config())).requires_grad_(False)


def count(encoder: Any) -> list[int]:
    """An entry each time that the encoder computes."""
    calls: list[int] = []
    encoder.text_model.register_forward_pre_hook(lambda *unused: calls.append(1))
    return calls


@pytest.mark.parametrize("wide", [True, False])
@torch.no_grad()
def test_what_was_asked_before_is_not_computed(encoder: Any, wide: bool) -> None:
    if wide:
        widen_(encoder.half())
    fox, owl = encoder(FOX), encoder(OWL)
    calls = count(encoder)
    recall_(encoder)
    for ids, expected in ((FOX, fox), (OWL, owl)) * 2:
        found = encoder(ids.clone())
        assert torch.equal(found.pooled, expected.pooled)
        assert all(map(torch.equal, found.hidden_states, expected.hidden_states))
    assert len(calls) == 2
    encoder(torch.cat([FOX, OWL]))  # rows of a batch may differ from single ones in their last bits
    assert len(calls) == 3
    unrecall_(encoder)
    encoder(FOX)
    assert len(calls) == 4 and "forward" not in vars(encoder)


@torch.no_grad()
def test_those_used_last_are_kept(encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "CALLS", 2)
    calls = count(encoder)
    recall_(encoder)
    for ids, computed in ((FOX, 1), (OWL, 2), (FOX, 2), (FOX + 1, 3), (FOX, 3), (OWL, 4)):
        encoder(ids)
        assert len(calls) == computed


def written(encoder: Any) -> None:
    encoder.text_model.final_layer_norm.weight.mul_(2)


def replaced(encoder: Any) -> None:
    table = encoder.text_model.embeddings.token_embedding
    table.weight = nn.Parameter(table.weight.flip(0), requires_grad=False)


def converted(encoder: Any) -> None:
    encoder.double()


@pytest.mark.parametrize("change", [written, replaced, converted])
@torch.no_grad()
def test_other_weights_give_other_answers(encoder: Any, change: Any) -> None:
    other = copy.deepcopy(encoder)
    recall_(encoder)
    encoder(FOX)
    change(encoder)
    change(other)
    found, expected = encoder(FOX).last_hidden_state, other(FOX).last_hidden_state
    assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_gradients_flow(encoder: Any) -> None:
    recall_(encoder)
    with torch.no_grad():
        encoder(FOX)
    encoder.requires_grad_(True)
    for _ in range(2):
        encoder(FOX).pooled.sum().backward()
    assert encoder.text_model.final_layer_norm.bias.grad.abs().sum() > 0


def test_where_writes_are_not_counted_all_is_computed(encoder: Any) -> None:
    with torch.inference_mode():
        other = copy.deepcopy(encoder)
        calls = count(other)
        recall_(other)
        before = other(FOX).pooled
        written(other)
        assert not torch.equal(other(FOX).pooled, before) and len(calls) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
@torch.no_grad()
def test_copies_remember_for_themselves(encoder: Any, copied: Any) -> None:
    recall_(encoder)
    before = encoder(FOX).pooled
    other = copied(encoder)
    assert torch.equal(other(FOX).pooled, before)
    written(other)
    assert torch.equal(encoder(FOX).pooled, before) and not torch.equal(other(FOX).pooled, before)


def test_a_backend_is_not_replaced(encoder: Any) -> None:
    unet = tiny.unet()
    openvino_(unet)
    with pytest.raises(RuntimeError, match="one backend"):
        recall_(unet)


def test_an_engine_reads_a_prompt_once() -> None:
    engine = Engine(runtime=RuntimeOptions("eager"))
    encoder: Any = engine.pipeline.text_encoder  # pyright: ignore[reportAttributeAccessIssue]
    calls = count(encoder)
    first, second = (
        engine.generate("a red fox", seed=seed, num_inference_steps=1, output_type="latent").images for seed in (1, 2)
    )
    assert len(calls) == 1 and not torch.equal(first, second)
    unrecall_(encoder)
    again = engine.generate("a red fox", seed=2, num_inference_steps=1, output_type="latent").images
    assert len(calls) == 2 and torch.equal(again, second)
