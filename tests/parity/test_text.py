"""Tokenizer and prompt encoding against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from fourstroke.text import Tokenizer, encode_prompts
from tests.unit import tiny

PROMPTS = [
    "",
    "a red fox",
    "  Red   FOX\tfox's 42 foxes!?  ",
    "naïve café — “quotes” … 日本語 🦊 Ünïcödé",
    "<|startoftext|> a fox <|endoftext|> red",
    "it's we're I'd they'll don't",
]


@pytest.fixture(scope="module", params=["<|endoftext|>", "!"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer(request.param).save_pretrained(path)
    return path


def test_ids_are_transformers_ids(folder: Path) -> None:
    theirs = CLIPTokenizer.from_pretrained(folder)
    expected = theirs(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(Tokenizer.from_pretrained(folder)(PROMPTS), expected)


def test_the_one_file_form_gives_the_same_ids(folder: Path, tmp_path: Path) -> None:
    theirs = CLIPTokenizer.from_pretrained(folder)
    theirs.save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    assert (tmp_path / "tokenizer.json").exists()
    ours = Tokenizer.from_pretrained(tmp_path)
    assert ours.pad_token == theirs.pad_token
    assert torch.equal(ours(PROMPTS), Tokenizer.from_pretrained(folder)(PROMPTS))


def test_a_long_prompt_is_cut_as_transformers_cuts_it_and_the_warning_says_what_was_lost(folder: Path) -> None:
    prompt = "fox " * 75 + "red tail"
    with pytest.warns(UserWarning, match=r"at most 75 tokens, and the prompt has \d+; .* 'red tail'"):
        ours = Tokenizer.from_pretrained(folder)([prompt])
    theirs = CLIPTokenizer.from_pretrained(folder)
    expected = theirs(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ours, expected)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_vocabulary_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no token '<\|startoftext\|>'"):
        Tokenizer({"a": 0}, [])


@pytest.mark.parametrize("clip_skip", [None, 0, 1, 2])
def test_clip_skip_goes_back_through_the_layers_and_keeps_the_last_norm(clip_skip: int | None) -> None:
    pipe = tiny.sd()
    encoder, tokenizer = pipe.text_encoder, pipe.tokenizer
    encoding = encode_prompts([["a red fox"]], [tokenizer], [encoder], penultimate=False, clip_skip=clip_skip)
    states = encoder(tokenizer(["a red fox"])).hidden_states
    expected = encoder.text_model.final_layer_norm(states[-1 - (clip_skip or 0)])
    assert torch.equal(encoding.embeds, expected)


def test_too_large_a_clip_skip_is_named() -> None:
    pipe = tiny.sd()
    with pytest.raises(ValueError, match="clip_skip is 9, but this text encoder has 3 layers"):
        encode_prompts([["fox"]], [pipe.tokenizer], [pipe.text_encoder], penultimate=False, clip_skip=9)
