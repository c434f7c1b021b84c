"""``--help`` tells the truth: its options are the request's fields, its defaults are theirs, its examples parse."""

from __future__ import annotations

import dataclasses
import re

import pytest
from typer.testing import CliRunner

from fourstroke import GenerateRequest
from fourstroke.cli import app

VERBS = ["generate", "models", "inspect", "info"]


def help_of(*words: str) -> str:
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    return re.sub(r"\x1b\[[0-9;]*m", "", result.output)


def test_verbs() -> None:
    text = help_of()
    for verb in VERBS:
        assert re.search(rf"^\W*{verb}\b", text, flags=re.MULTILINE), verb


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    text = help_of(verb)
    assert f"fourstroke {verb}" in text.replace("root", "fourstroke") and "--help" in text
    for option in re.findall(r"--[a-z][a-z-]*", text):
        line = next(line for line in text.splitlines() if option in line)
        assert len(line.split(option, 1)[1].strip(" │")) > 0, f"{option} has no explanation"


def fields() -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(GenerateRequest) if "help" in field.metadata]


@pytest.mark.parametrize("field", fields(), ids=lambda field: field.name)
def test_options_of_generate_are_the_fields_of_the_request(field: dataclasses.Field) -> None:
    text = " ".join(help_of("generate").replace("│", " ").split())
    sentence = " ".join(field.metadata["help"].split())
    assert sentence in text
    if field.default is not None:
        shown = re.search(rf"{re.escape(sentence)}\s*\[default:\s*([^\]]+)\]", text)
        assert shown and shown[1].strip() == str(field.default)
