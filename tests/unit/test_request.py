"""Requests refuse what breaks a rule, before any network runs, and say which rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fourstroke import GenerateRequest


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "either prompt or prompt_embeds; neither"),
        ({"prompt": "fox", "prompt_embeds": torch.ones(1, 2, 3)}, "either prompt or prompt_embeds; both"),
        (
            {"prompt": "fox", "negative_prompt": "x", "negative_prompt_embeds": torch.ones(1, 2, 3)},
            "either negative_prompt or negative_prompt_embeds",
        ),
        ({"prompt": ["fox", "cat"], "negative_prompt": ["x"]}, "negative_prompt has 1 texts, but there are 2 prompts"),
        ({"prompt": "fox", "num_inference_steps": 0}, "num_inference_steps is 0; it must be at least 1"),
        ({"prompt": "fox", "num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"prompt": "fox", "denoising_end": 1.5}, r"denoising_end is 1.5; it must be a fraction of the schedule"),
        ({"prompt": "fox", "timesteps": [999], "sigmas": [14.0]}, "Both timesteps and sigmas"),
        (
            {"prompt": "fox", "output_type": "jpg"},
            "output_type is 'jpg'; it must be one of 'pil', 'np', 'pt', 'latent'",
        ),
        ({"prompt": "fox", "generator": [torch.Generator()] * 2}, "2 generators for a batch of 1 pictures"),
        (
            {"prompt_embeds": torch.ones(1, 2, 3), "negative_prompt_embeds": torch.ones(1, 2, 4)},
            r"prompt_embeds \(1, 2, 3\) and negative_prompt_embeds \(1, 2, 4\) must have the same shape",
        ),
    ],
)
def test_a_broken_rule_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerateRequest(**fields)


@pytest.mark.parametrize("value", [3, [1, 2]])
def test_a_prompt_that_is_no_text_is_named(value: Any) -> None:
    with pytest.raises(TypeError, match="prompt must be a string or a list of strings"):
        GenerateRequest(prompt=value)


def test_prompts_times_images_is_the_batch() -> None:
    request = GenerateRequest(prompt=["fox", "cat"], negative_prompt="bad", num_images_per_prompt=3)
    assert (request.prompt_count, request.batch_size) == (2, 6)
    assert request.texts("negative_prompt") == ["bad", "bad"]
    assert request.texts("prompt_2") is None
    assert GenerateRequest(prompt_embeds=torch.ones(4, 2, 3)).batch_size == 4


def test_a_request_is_a_value() -> None:
    request = GenerateRequest(prompt="fox")
    with pytest.raises(AttributeError):
        request.prompt = "cat"  # type: ignore[misc]
