"""``fourstroke distill`` and ``fourstroke train lora``: options, errors in one line, resuming, and what is told."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from fourstroke.cli import app
from fourstroke.cli.train import (
    CHOSEN,
    OTHER_NAMES,
    Show,
    command,
    fields_of,
    flag_of,
    in_flags,
    told_of,
    usual_precision,
)
from fourstroke.train.options import DistillOptions, LoraOptions

from ..unit import tiny

ROOT = Path(__file__).parents[2]
LORA = "pytorch_lora_weights.safetensors"
VERBS = {"distill": (DistillOptions, ["distill"]), "lora": (LoraOptions, ["train", "lora"])}
QUICK = ("--batch-size", "2", "--rank", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny model of Stable Diffusion's shape, 32 x 32 pixels."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny.sd().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with three pictures in ``pictures`` and two prompts in ``prompts.txt``."""
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    for i, caption in enumerate(("a fox", "an owl's nest", "an apple")):
        tiny.picture(i).save(f"pictures/{i}.png")
        Path(f"pictures/{i}.txt").write_text(caption)
    Path("prompts.txt").write_text("a fox\nan owl\n")
    return tmp_path


def run(*words: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


# What it does


def test_a_lora_from_pictures(model: str, here: Path) -> None:
    result = run("train", "lora", model, "--data", "pictures", "-o", "out", "--steps", "3", *QUICK)
    assert result.stdout == f"out/{LORA}\n"
    told = result.stderr.splitlines()
    assert "pictures: 3 of 3" in told and any(re.match(r"training: 3 of 3, loss [\d.]+", line) for line in told)
    found = header(Path("out", LORA))
    assert found["rank"] == "2" and found["steps"] == "3"

    [line] = [line for line in told if line.startswith("Use it: ")]
    words = shlex.split(line.removeprefix("Use it: "))
    assert words[:2] == ["fourstroke", "generate"] and words[2] == "a fox" and words[-2:] == ["--lora", f"out/{LORA}"]
    painted = run(*words[1:], "--no-lcm", "--steps", "1", "--scheduler", "ddim", "-o", "fox.png")
    assert painted.stdout == "fox.png\n" and Path("fox.png").is_file()


def test_an_lcm_lora_from_prompts_alone(model: str, here: Path) -> None:
    words = ["distill", model, "--prompts", "prompts.txt", "-o", "out", "--steps", "2", "--teacher-steps", "2"]
    result = run(*words, "--guidance", "3", "6", "--layout", "peft", *QUICK)
    assert "teacher's pictures: 2 of 2" in result.stderr.splitlines()
    with safe_open(Path("out", LORA), "pt") as file:
        assert all(".lora_A." in key or ".lora_B." in key for key in file.keys())  # noqa: SIM118 - no mapping
    described = run("inspect", f"out/{LORA}").stdout
    assert "LCM" in described, "the file's header tells generate how to run it"


def test_the_same_command_goes_on(model: str, here: Path) -> None:
    words = ["train", "lora", model, "--data", "pictures", "-o", "out", *QUICK]
    run(*words, "--steps", "2")
    told = run(*words, "--steps", "4").stderr
    assert "training: 2 of 4" in told and "training: 0 of" not in told
    assert "pictures:" not in told, "nothing is encoded again"
    whole = run("train", "lora", model, "--data", "pictures", "-o", "whole", *QUICK, "--steps", "4")
    assert whole.exit_code == 0
    with safe_open(Path("out", LORA), "pt") as one, safe_open(Path("whole", LORA), "pt") as other:
        assert all(torch.equal(one.get_tensor(key), other.get_tensor(key)) for key in one.keys())  # noqa: SIM118
    error = run(*words, "--steps", "4", "--learning-rate", "1", code=2).stderr
    assert "--learning-rate was" in error and "another output" in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_between_two_steps(model: str, here: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(number)
    told = Show.__call__

    def pressed(show: Any, what: str, done: int, total: int, figures: Any = None) -> None:
        if what == "training" and done == 1:
            os.kill(os.getpid(), number)
        told(show, what, done, total, figures)

    monkeypatch.setattr(Show, "__call__", pressed)
    monkeypatch.setattr("fourstroke.train.loop.SHOWN_EVERY", 0.0)
    words = ["train", "lora", model, "--data", "pictures", "-o", "out", *QUICK, "--steps", "4"]
    result = run(*words, code=130)
    lines = result.stderr.splitlines()
    assert "note: Stopping after this step; press Ctrl-C again to stop at once." in lines
    assert lines[-2:] == [
        "note: Stopped after step 1 of 4. The same command goes on from the last checkpoint.",
        "error: interrupted",
    ]
    assert signal.getsignal(number) is before
    monkeypatch.setattr(Show, "__call__", told)
    assert "training: 1 of 4" in run(*words).stderr


def test_ctrl_c_while_pictures_are_encoded(model: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fourstroke.train.encoding.PIXELS_A_BATCH", 1)
    told = Show.__call__

    def pressed(show: Any, what: str, done: int, total: int, figures: Any = None) -> None:
        if (what, done) == ("pictures", 2):
            os.kill(os.getpid(), signal.SIGINT)
        told(show, what, done, total, figures)

    monkeypatch.setattr(Show, "__call__", pressed)
    words = ["train", "lora", model, "--data", "pictures", "-o", "out", *QUICK, "--steps", "1"]
    assert "note: Nothing was trained yet; what is encoded is kept." in run(*words, code=130).stderr
    monkeypatch.setattr(Show, "__call__", told)
    assert "pictures: 2 of 3" in run(*words).stderr


# Options


@pytest.mark.parametrize("verb", VERBS)
def test_every_field_is_an_option_with_its_default(verb: str) -> None:
    cls, words = VERBS[verb]
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "250", "NO_COLOR": "1", "TERM": "dumb"})
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", result.output).replace("│", " ").split())
    parameters = {parameter.name: parameter for parameter in command(verb).params}
    for field in fields_of(cls):
        assert " ".join(field.metadata["help"].split()) in text, field.name
        parameter = parameters[field.name]
        assert flag_of(field.name) in parameter.opts
        if field.name not in CHOSEN and field.default not in (None, ()):
            assert parameter.default == field.default
    for panel in ("Data", "Training", "LoRA", "Method", "Speed and memory", "Output"):
        assert f"─ {panel} ─" in text, panel


@pytest.mark.parametrize("verb", VERBS)
def test_defaults_of_the_command_line_are_the_librarys(verb: str, monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    """An empty command line gives the options that the library has without any, but for the precision."""
    cls, words = VERBS[verb]
    seen: list[Any] = []
    work = "distill" if verb == "distill" else "train_lora"
    monkeypatch.setattr(
        f"fourstroke.train.{work}",
        lambda model, data, output, options, progress: seen.append(options) or Path(output, LORA),
        raising=False,
    )
    run(*words, "emoji", "--data", "pictures", "-o", "out")
    assert seen == [dataclasses.replace(cls(), precision=usual_precision(None))]
    typed = ["--target", "to_q", "--target", "to_k", "--betas", "0.9", "0.95", "--no-buckets", "--precision", "bf16"]
    run(*words, "emoji", "--data", "pictures", "-o", "out", *typed, "--crop", "random", "--crops", "2", "--alpha", "4")
    options = seen[1]
    assert (options.targets, options.betas, options.precision, options.alpha) == (
        ("to_q", "to_k"), (0.9, 0.95), "bf16", 4.0
    )  # fmt: skip
    assert (options.data.buckets, options.data.crop, options.data.crops) == (False, "random", 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("distill emoji -o out", "Give either --data or --prompts; neither is given."),
        ("distill emoji --data pictures --prompts prompts.txt -o out", "both are given"),
        ("distill emoji --data pictures", "Missing option '--output' / '-o'"),
        ("distill emoji --data nowhere -o out", "There is no 'nowhere'; give a folder of pictures"),
        ("distill emojy --data nowhere -o out", "or a file of prompts."),
        ("distill emoji --prompts pictures -o out", "--prompts pictures holds pictures; give them with --data."),
        ("distill emoji --data pictures -o out --lr 1", "There is no option --lr. Did you mean '--learning-rate'?"),
        ("distill emoji --data pictures -o out --batch 1", "Did you mean '--batch-size'?"),
        ("distill emoji --data pictures -o out --stepz 1", "There is no option --stepz. Did you mean '--steps'?"),
        ("distill emoji --data pictures -o out --rank x", "Invalid value for '--rank'"),
        ("distill emoji --data pictures -o out --rank 0", "error: --rank is 0; it must be at least 1."),
        ("distill emoji --data pictures -o out --los l2", "Did you mean '--loss'?"),
        ("distill emoji --data pictures -o out --loss l3", "error: --loss is 'l3'; it must be one of huber, l2."),
        (
            "distill emoji --data pictures -o out --crop top",
            "error: --crop is 'top'; it must be one of center, random.",
        ),
        ("distill emoji --data pictures -o out --guidance 0 3", "error: --guidance is 0.0 to 3.0; it must be"),
        ("distill emoji --data pictures -o out --ema-target", "--ema-target needs averaged weights; give --ema-decay"),
        (
            "distill emoji --data pictures -o out --teacher-steps 9",
            "--teacher-steps has no effect: pictures holds pictures.",
        ),
        ("distill emoji --prompts prompts.txt -o out --flip", "--flip has no effect: prompts.txt holds prompts."),
        ("distill emoji/bse --data pictures -o out --rank 2", "Did you mean 'emoji/base'?"),
        ("distill emoji --data pictures -o prompts.txt", "--output prompts.txt is a file; give a folder."),
        ("distill emoji --data pictures -o pictures", "--output pictures holds something else than a training"),
        (
            "train lora emoji --data prompts.txt -o out",
            "--data prompts.txt holds prompts; a LoRA is trained on pictures.",
        ),
        ("train lora emoji -o out", "Missing option '--data'"),
        ("train lroa emoji", "There is no verb 'lroa'; there are lora. Did you mean 'lora'?"),
        ("trian lora emoji", "Did you mean 'train'?"),
    ],
)
def test_errors_are_one_line(words: str, said: str, here: Path) -> None:
    error = run(*shlex.split(words), code=2).stderr
    [line] = [line for line in error.splitlines() if line.startswith("error:")]
    assert said in line and error.count("\n") == 1, error
    assert line.count("Did you mean") == said.count("Did you mean"), "no other name for what was right"
    assert not Path("out").exists(), "nothing was begun"


def test_bad_pictures_are_all_named(here: Path) -> None:
    Path("pictures/0.png").write_bytes(b"")
    Path("pictures/1.txt").unlink()
    error = run("train", "lora", "emoji", "--data", "pictures", "-o", "out", code=2).stderr
    assert error.count("\n") == 1 and "0.png (no picture that can be read)" in error and "1.png (no caption" in error


def test_lack_of_memory_names_this_commands_options(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*arguments: Any) -> Path:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("fourstroke.train.distill", work, raising=False)
    error = run("distill", "emoji", "--data", "pictures", "-o", "out", code=1).stderr
    assert "Tried to allocate 2 GiB. Try --gradient-checkpointing, a smaller --batch-size" in error
    assert "--num" not in error


@pytest.mark.parametrize("verb", VERBS)
def test_names_of_other_trainers_lead_to_options(verb: str) -> None:
    """Every option that is suggested exists in one of the verbs, and never shadows one that exists."""
    flags = {name: {flag for parameter in command(name).params for flag in parameter.opts} for name in VERBS}
    assert set(OTHER_NAMES.values()) <= flags["distill"] | flags["lora"]
    assert not set(OTHER_NAMES) & flags[verb]


def test_fields_in_messages_are_flags() -> None:
    text = in_flags("batch_size is 0; with gradient_accumulation the rank stays", DistillOptions)
    assert text == "--batch-size is 0; with --gradient-accumulation the rank stays"
    assert in_flags("sample_prompts: 20 sample_prompts", DistillOptions).count("--sample-prompt") == 2


def test_precision_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usual_precision("cpu") == "fp32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for bf16, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda bf16=bf16: bf16)
        assert usual_precision("cuda:1") == expected


# What is told


def test_progress_in_words() -> None:
    assert told_of({}) == ""
    assert told_of({"loss": 0.0123, "rate": 2.5, "left": 65.2}) == "loss 0.0123, 2.5 steps/s, 1:05 left"
    assert told_of({"rate": 0.5, "left": 3725}) == "2 s/step, 1:02:05 left"


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 101, 131, 132, 133])
    monkeypatch.setattr("fourstroke.cli.train.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    show = Show(stream)
    for done in (0, 5, 20, 25, 30):
        show("training", done, 30, {"loss": 1.0})
    assert [int(line.split()[1]) for line in stream.getvalue().splitlines()] == [0, 20, 30]


def test_on_a_terminal_there_are_bars() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    show = Show(stream)
    show("pictures", 3, 3)
    show("training", 5, 10, {"loss": 0.5, "rate": 2.0, "left": 2.5})
    show.close()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "pictures" in text and "5/10" in text and "loss 0.5, 2 steps/s, 0:02 left" in text


def test_only_the_first_of_several_processes_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    stream = io.StringIO()
    Show(stream)("training", 1, 1)
    assert stream.getvalue() == ""


# docs/training.md and docs/cli.md

PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def commands(page: str) -> list[str]:
    """The lines of the page's ``sh`` blocks that begin with ``fourstroke``."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    return [line for line in "\n".join(blocks).splitlines() if line.startswith("fourstroke ")]


@pytest.mark.slow
def test_commands_of_the_page_work_with_the_shipped_model(here: Path) -> None:
    """One after the other, as a reader would type them; trainings are cut to two steps."""
    for i, side in enumerate((128, 200, 300)):
        tiny.picture(i, (side, side)).save(f"pictures/{i}.png")
    lines = [line for line in commands(PAGE) if " emoji " in line or "generate" in line]
    assert len(lines) == 4
    for line in lines:
        words = shlex.split(line)[1:]
        if words[0] == "generate":
            assert run(*words).stdout.strip() == words[-1]
        else:
            found = run(*words, "--steps", "2", "--batch-size", "2", "--rank", "2").stdout.strip()
            assert found == f"{words[-1]}/{LORA}"


@pytest.mark.parametrize("line", [line for line in commands(PAGE) if "generate" not in line])
def test_commands_of_the_page_parse(line: str) -> None:
    words = shlex.split(line)[1:]
    verb = words.pop(0) if words[0] == "distill" else words.pop(1)
    context = command(verb).make_context(verb, [word for word in words if word != "train"])
    assert context.params["model"] and context.params["output"]


def test_options_of_the_page_exist() -> None:
    flags = {
        flag
        for verb in VERBS
        for parameter in command(verb).params
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", PAGE))
    assert named <= flags | {"--lora"}, named - flags


def test_work_of_the_page_is_the_formulas() -> None:
    """The table follows from the work of a call, by the formula above it."""
    rows = re.findall(
        r"^\| (.+?), \d+x\d+ \| ([\d.]+) TFLOP \| ([\d.]+) PFLOP \| ([\d.]+) PFLOP \|", PAGE, re.MULTILINE
    )
    assert [name for name, *_ in rows] == ["SD 1.5", "SSD-1B", "SDXL", "emoji"]
    for name, call, lora, distillation in rows:
        calls = (3, 6) if name == "emoji" else (2, 5)
        for told, steps, batch, times in ((lora, 1500, 4, calls[0]), (distillation, 1000, 12, calls[1])):
            assert float(told) == pytest.approx(steps * batch * times * float(call) / 1000, rel=0.02)


def test_work_of_a_call_is_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from fourstroke import DiffusionPipeline

    # Without numbers, all kernels of attention are counted alike.
    unet: Any = DiffusionPipeline.from_pretrained("emoji/base").unet.to("meta")
    inputs = (torch.zeros(1, 4, 16, 16), torch.tensor([499]), torch.zeros(1, 77, 128))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(*(value.to("meta") for value in inputs))
    [told] = re.findall(r"^\| emoji, 128x128 \| ([\d.]+) TFLOP", PAGE, flags=re.MULTILINE)
    assert counter.get_total_flops() / 1e12 == pytest.approx(float(told), rel=0.01)


def test_messages_of_the_page_are_the_librarys() -> None:
    rows = re.findall(r"^\| ([^|]+) \|", PAGE[PAGE.index("| what happens |") :], flags=re.MULTILINE)
    source = "".join(path.read_text() for path in (ROOT / "src" / "fourstroke" / "train").glob("*.py"))
    for said in (
        "to mend or to remove",
        "too small for a resolution",
        "captions are too long",
        "is not a finite number",
    ):
        assert said in source and any(said.removeprefix("captions ") in row for row in rows), said
    for said in ("is of another training", "holds something else than a training"):
        assert said in source and any(said in row for row in rows), said
