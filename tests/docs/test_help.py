"""``--help`` tells the truth: its options are the request's fields, its defaults are theirs, its examples parse."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fourstroke import GenerateRequest
from fourstroke.cli import app
from fourstroke.cli.bench import command as of_benchmark
from fourstroke.cli.generate import command
from fourstroke.cli.train import command as of_training
from fourstroke.families import FAMILIES, KINDS

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")

VERBS = ["generate", "distill", "train lora", "bench", "models", "inspect", "info"]


def help_of(*words: str) -> str:
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    return re.sub(r"\x1b\[[0-9;]*m", "", result.output)


def test_verbs() -> None:
    text = help_of()
    for verb in VERBS:
        assert re.search(rf"^\W*{verb.split()[0]}\b", text, flags=re.MULTILINE), verb


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    text = help_of(*verb.split())
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


# docs/cli.md


def options_of_generate() -> set[str]:
    return {flag for parameter in command().params for flag in (*parameter.opts, *parameter.secondary_opts)}


def test_options_of_the_page_exist() -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", PAGE)) - {"--help"}
    training = {
        flag for verb in ("distill", "lora") for parameter in of_training(verb).params for flag in parameter.opts
    }
    benchmark = {flag for parameter in of_benchmark().params for flag in parameter.opts}
    assert named <= options_of_generate() | training | benchmark
    tasks = ("image", "strength", "mask", "mask-crop", "control", "adapter", "detect", "no-detect", "ip-image")
    for option in (*tasks, "ip-adapter", "frames", "motion", "windows", "window-length", "fps", "no-lcm", "size"):
        assert f"--{option}" in named, option


@pytest.mark.parametrize("line", re.findall(r"^fourstroke generate (.+)$", PAGE, flags=re.MULTILINE))
def test_commands_of_the_page_parse(line: str) -> None:
    context = command().make_context("generate", shlex.split(line))
    assert context.params["prompt"] and context.params["output"]


def test_short_names_of_the_page_are_those_of_the_families() -> None:
    header, *rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in re.search(r"^\| option \| SD 1\.5.*?\n\n", PAGE, flags=re.MULTILINE | re.DOTALL)[0].splitlines()
        if line.startswith("|") and "---" not in line
    ]
    kinds = {"--control": "ControlNet", "--adapter": "T2I-Adapter", "--ip-adapter": "IP-Adapter"}
    assert {row[0] for row in rows} == set(kinds) and set(kinds.values()) == set(KINDS)
    for option, *cells in rows:
        for family, cell in zip(header[1:], cells, strict=True):
            assert [name for name in cell.split(", ") if name] == list(FAMILIES[family].known(kinds[option]))


def test_panels_group_the_options() -> None:
    panels = re.findall(r"─ ([A-Z][\w ]+?) ─", help_of("generate"))
    for panel in ("Picture", "Size", "Start picture", "Control", "Animation", "LoRA", "Model", "Runtime", "Output"):
        assert panel in panels
