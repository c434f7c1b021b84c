"""``fourstroke generate``: files, metadata, names, exit codes, errors in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import fourstroke
from fourstroke import (
    AutoencoderKL,
    CLIPTextModel,
    DDIMScheduler,
    Engine,
    EulerDiscreteScheduler,
    GenerateRequest,
    StableDiffusionPipeline,
    Tokenizer,
    UNet2DConditionModel,
)
from fourstroke.cli import app

QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def build_tiny_model(folder: Path) -> None:
    """A pipeline of Stable Diffusion's shape with random weights: 64x64 pictures, byte tokens, factor 8."""
    torch.manual_seed(0)
    symbols = [chr(c) for c in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144))]
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    text = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
    levels = {"layers_per_block": 1, "norm_num_groups": 8}
    unet = {
        "block_out_channels": (32, 64),
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
    }
    vae = {
        "block_out_channels": (16,) * 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    end = len(tokens) - 1
    StableDiffusionPipeline(
        vae=AutoencoderKL.from_config({**levels, **vae}),
        text_encoder=CLIPTextModel.from_config(
            {**text, "vocab_size": len(tokens), "bos_token_id": end - 1, "eos_token_id": end}
        ),
        tokenizer=Tokenizer({token: i for i, token in enumerate(tokens)}, []),
        unet=UNet2DConditionModel.from_config({**levels, **unet}),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny_model(folder)
    return str(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_lora(path: Path, width: int = 32, scale: float = 1.0) -> Path:
    """Rank 2, for one projection of the tiny model (with another ``width``, of no model)."""
    numbers = torch.Generator().manual_seed(5)
    down, up = torch.randn(2, width, generator=numbers), torch.randn(32, 2, generator=numbers) * scale
    save_file({f"{QUERY}.lora_A.weight": down, f"{QUERY}.lora_B.weight": up}, path)
    return path


def run(*arguments: str | Path, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def generate(tiny: str, *arguments: str | Path, prompt: str = "a red fox", code: int = 0) -> Any:
    return run("generate", prompt, "--model", tiny, "--steps", "2", *arguments, code=code)


def paths_of(result: Any) -> list[Path]:
    return [Path(line) for line in result.stdout.splitlines()]


def pixels(path: Path) -> np.ndarray:
    with PIL.Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def chunks(path: Path) -> dict[str, str]:
    """The tEXt and iTXt chunks of a PNG, read by the book (ISO 15948, 11.3.4)."""
    data, place, found = path.read_bytes(), 8, {}
    while place < len(data):
        (length,), kind = struct.unpack(">I", data[place : place + 4]), data[place + 4 : place + 8]
        body = data[place + 8 : place + 8 + length]
        assert struct.unpack(">I", data[place + 8 + length : place + 12 + length])[0] == zlib.crc32(kind + body)
        if kind == b"tEXt":
            key, _, text = body.partition(b"\0")
            found[key.decode("latin-1")] = text.decode("latin-1")
        if kind == b"iTXt":
            key, _, rest = body.partition(b"\0")
            found[key.decode("latin-1")] = rest[2:].split(b"\0", 2)[2].decode("utf-8")
        place += 12 + length
    return found


def parse_parameters(text: str) -> dict[str, str]:
    """What tools read out of an infotext of AUTOMATIC1111's web UI."""
    *lines, last = text.split("\n")
    entries = {key: value for key, value in re.findall(r'([\w /-]+): ("(?:\\.|[^"\\])*"|[^,]*)(?:, |$)', last)}
    negative = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt: ")), len(lines))
    entries["prompt"] = "\n".join(lines[:negative])
    entries["negative"] = "\n".join(lines[negative:]).removeprefix("Negative prompt: ")
    return entries


# Pictures and files


def test_the_picture_is_the_engine_s(tiny: str, here: Path) -> None:
    result = generate(tiny, "--seed", "7", "-o", "fox.png")
    assert result.stdout == "fox.png\n"
    assert result.stderr == ""
    assert os.listdir(here) == ["fox.png"]
    expected = Engine(tiny).generate("a red fox", num_inference_steps=2, seed=7).images[0]
    np.testing.assert_array_equal(pixels(here / "fox.png"), np.asarray(expected))


def test_every_option_reaches_the_request(tiny: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[GenerateRequest] = []
    original = Engine.generate

    def spy(self: Engine, request: GenerateRequest, **options: Any) -> Any:
        seen.append(request)
        return original(self, request, **options)

    monkeypatch.setattr(Engine, "generate", spy)
    generate(
        tiny, "--negative", "blue", "--size", "80x64", "--steps", "3", "--guidance", "1.5", "--num", "2", "--seed", "9",
        "--clip-skip", "1",
    )  # fmt: skip
    assert seen == [
        GenerateRequest(
            prompt="a red fox",
            negative_prompt="blue",
            width=80,
            height=64,
            num_inference_steps=3,
            guidance_scale=1.5,
            num_images_per_prompt=2,
            seed=9,
            clip_skip=1,
        )
    ]
    seen.clear()
    run("generate", "fox", "--model", tiny)
    assert seen == [GenerateRequest(prompt="fox")]


def test_the_same_seed_gives_the_same_bytes(tiny: str, here: Path) -> None:
    for name in ("a.png", "b.png"):
        generate(tiny, "--seed", "3", "-o", name)
    generate(tiny, "--seed", "4", "-o", "c.png")
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()
    assert (pixels(here / "a.png") != pixels(here / "c.png")).any()


def test_without_a_seed_every_run_is_another(tiny: str, here: Path) -> None:
    first, second = (json.loads(generate(tiny, "--json").stdout) for _ in range(2))
    assert first["seeds"] != second["seeds"]
    assert first["settings"]["seed"] == first["seeds"][0]


def test_picture_i_of_many_is_that_of_its_seed_alone(tiny: str, here: Path) -> None:
    assert generate(tiny, "--seed", "5", "--num", "3", "-o", "fox.png").stdout.split() == [
        "fox-1.png", "fox-2.png", "fox-3.png", "fox.png",
    ]  # fmt: skip
    for i in range(3):
        generate(tiny, "--seed", str(5 + i), "-o", "alone.png")
        assert abs(pixels(here / f"fox-{i + 1}.png") - pixels(here / "alone.png")).max() <= 1
        assert chunks(here / f"fox-{i + 1}.png") == chunks(here / "alone.png")
    assert (pixels(here / "fox-1.png") != pixels(here / "fox-2.png")).any()


def test_the_grid_holds_all_pictures(tiny: str, here: Path) -> None:
    generate(tiny, "--seed", "5", "--num", "3", "-o", "fox.png")
    grid = pixels(here / "fox.png")
    assert grid.shape == (128, 128, 3)
    cells = [grid[y : y + 64, x : x + 64] for y in (0, 64) for x in (0, 64)]
    for i in range(3):
        np.testing.assert_array_equal(cells[i], pixels(here / f"fox-{i + 1}.png"))
    assert (cells[3] == 255).all()
    settings = json.loads(chunks(here / "fox.png")["fourstroke"])
    assert settings["seed"] == 5 and settings["num_images_per_prompt"] == 3


def test_no_grid(tiny: str, here: Path) -> None:
    result = generate(tiny, "--num", "2", "--no-grid", "-o", "fox.png")
    assert result.stdout.split() == ["fox-1.png", "fox-2.png"] == sorted(os.listdir(here))


def test_numbers_are_as_wide_as_the_last(tiny: str, here: Path) -> None:
    result = generate(tiny, "--num", "10", "--no-grid", "--steps", "1", "--size", "32", "-o", "x.webp")
    assert result.stdout.split() == [f"x-{i:02}.webp" for i in range(1, 11)]


def test_made_names_replace_nothing(tiny: str, here: Path) -> None:
    names = [generate(tiny, "--seed", "1", prompt="A red, RED fox?").stdout.strip() for _ in range(3)]
    assert names == ["a-red-red-fox-1.png", "a-red-red-fox-1-2.png", "a-red-red-fox-1-3.png"]
    assert generate(tiny, "--seed", "1", prompt="  ").stdout == "picture-1.png\n"
    assert generate(tiny, "--seed", "1", prompt="ein Fuchs, jaune é").stdout == "ein-fuchs-jaune-é-1.png\n"
    long = generate(tiny, "--seed", "1", "--steps", "1", prompt="../../etc/" + "x" * 300).stdout.strip()
    assert long == "etc-" + "x" * 44 + "-1.png"
    several = generate(tiny, "--seed", "8", "--num", "2").stdout.split()
    assert several == ["a-red-fox-8.png", "a-red-fox-9.png", "a-red-fox-8-grid.png"]


def test_an_output_replaces_what_was_there(tiny: str, here: Path) -> None:
    (here / "fox.png").write_bytes(b"old")
    (here / "link.png").symlink_to("real.png")
    generate(tiny, "-o", "fox.png")
    generate(tiny, "-o", "link.png")
    assert pixels(here / "fox.png").shape == (64, 64, 3)
    assert (here / "link.png").is_symlink() and not (here / "real.png").is_symlink()
    assert pixels(here / "real.png").shape == (64, 64, 3)
    umask = os.umask(0)
    os.umask(umask)
    assert (here / "fox.png").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize(
    ("output", "path"),
    [
        ("new/", "new/a-red-fox-1.png"),
        ("there", "there/a-red-fox-1.png"),
        ("deep/in/it.png", "deep/in/it.png"),
        ("fox", "fox.png"),
        ("FOX.PNG", "FOX.PNG"),
        ("v1.5 fox.jpg", "v1.5 fox.jpg"),
    ],
)
def test_where_an_output_goes(tiny: str, here: Path, output: str, path: str) -> None:
    (here / "there").mkdir()
    assert generate(tiny, "--seed", "1", "-o", output).stdout == path + "\n"
    assert pixels(here / path).shape == (64, 64, 3)


# Metadata


def test_png_metadata(tiny: str, here: Path) -> None:
    lora = write_lora(here / "style.safetensors")
    generate(
        tiny, "--negative", "blue: dark, ugly", "--seed", "42", "--size", "72x64", "--clip-skip", "1", "--guidance=2",
        "--lora", f"{lora}:0.5", "--scheduler", "dpmpp-karras", "-o", "fox.png", prompt='a "red" fox,\nrunning',
    )  # fmt: skip
    found = chunks(here / "fox.png")
    assert set(found) == {"parameters", "fourstroke"}
    assert parse_parameters(found["parameters"]) == {
        "prompt": 'a "red" fox,\nrunning',
        "negative": "blue: dark, ugly",
        "Steps": "2",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "CFG scale": "2",
        "Seed": "42",
        "Size": "72x64",
        "Model": tiny,
        "Clip skip": "2",
        "Lora": json.dumps(f"{lora}: 0.5"),
        "Version": f"fourstroke {fourstroke.__version__}",
    }
    settings = json.loads(found["fourstroke"])
    assert settings.pop("versions") == {
        "fourstroke": fourstroke.__version__,
        "torch": torch.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
    }
    assert settings == {
        "prompt": 'a "red" fox,\nrunning',
        "negative_prompt": "blue: dark, ugly",
        "width": 72,
        "height": 64,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "num_images_per_prompt": 1,
        "seed": 42,
        "eta": 0.0,
        "clip_skip": 1,
        "model": tiny,
        "loras": [{"name": str(lora), "weight": 0.5}],
        "scheduler": "DPMSolverMultistepScheduler",
        "scheduler_options": {"use_karras_sigmas": True},
        "device": "cpu",
        "dtype": "float32",
    }


def test_metadata_beyond_latin_1(tiny: str, here: Path) -> None:
    generate(tiny, "-o", "fox.png", prompt="ein 🦊 狐")
    found = chunks(here / "fox.png")
    assert found["parameters"].startswith("ein 🦊 狐\nSteps: 2, Sampler: LCM, CFG scale: 1, Seed: ")
    assert json.loads(found["fourstroke"])["prompt"] == "ein 🦊 狐"


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_metadata_of_other_formats(tiny: str, here: Path, suffix: str) -> None:
    generate(tiny, "--seed", "6", "-o", "fox.png")
    generate(tiny, "--seed", "6", "-o", f"fox.{suffix}")
    with PIL.Image.open(here / f"fox.{suffix}") as image:
        assert image.format == {"jpg": "JPEG", "webp": "WEBP"}[suffix]
        exif = image.getexif()
    comment = exif.get_ifd(0x8769)[0x9286]
    assert comment.startswith(b"UNICODE\0")
    expected = chunks(here / "fox.png")
    assert comment[8:].decode("utf-16-be") == expected["parameters"]
    assert exif[0x010E] == expected["fourstroke"]
    difference = abs(pixels(here / f"fox.{suffix}") - pixels(here / "fox.png"))
    assert difference.max() == 0 if suffix == "webp" else difference.mean() < 12


def test_json(tiny: str, here: Path) -> None:
    result = generate(tiny, "--seed", "2", "--num", "2", "--json", "-o", "x.png")
    told = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1 and result.stderr == ""
    assert set(told) == {"paths", "grid", "seeds", "nsfw_content_detected", "settings", "seconds"}
    assert told["paths"] == ["x-1.png", "x-2.png"] and told["grid"] == "x.png"
    assert told["seeds"] == [2, 3] and told["nsfw_content_detected"] is None
    assert set(told["seconds"]) == {"load", "generate"} and all(value > 0 for value in told["seconds"].values())
    assert told["settings"] == json.loads(chunks(here / "x.png")["fourstroke"])
    alone = json.loads(generate(tiny, "--seed", "2", "--json", "-o", "y.png").stdout)
    assert alone["paths"] == ["y.png"] and alone["grid"] is None


# Models, LoRAs, schedulers


def test_a_lora_and_its_weight(tiny: str, here: Path) -> None:
    write_lora(here / "style.safetensors", scale=20.0)
    pictures = {}
    for name, extra in {
        "without": (),
        "zero": ("--lora", "style.safetensors:0"),
        "one": ("--lora", "style.safetensors"),
        "halves": ("--lora", "style.safetensors:0.5", "--lora", "style.safetensors:0.5"),
    }.items():
        generate(tiny, "--seed", "1", *extra, "-o", f"{name}.png")
        pictures[name] = pixels(here / f"{name}.png")
    np.testing.assert_array_equal(pictures["zero"], pictures["without"])
    assert abs(pictures["one"] - pictures["without"]).mean() > 1
    assert abs(pictures["one"] - pictures["halves"]).max() <= 1


@pytest.mark.parametrize("name", ["euler", "Euler", "EulerDiscreteScheduler"])
def test_another_scheduler(tiny: str, here: Path, name: str) -> None:
    generate(tiny, "--seed", "1", "--scheduler", name, "-o", "x.png")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    expected = pipeline.generate(GenerateRequest(prompt="a red fox", num_inference_steps=2, seed=1)).images[0]
    assert abs(pixels(here / "x.png") - np.asarray(expected).astype(int)).max() <= 1
    assert parse_parameters(chunks(here / "x.png")["parameters"])["Sampler"] == "Euler"


def test_no_lcm_keeps_the_model_s_scheduler(tiny: str, here: Path) -> None:
    generate(tiny, "--no-lcm", "-o", "x.png")
    assert json.loads(chunks(here / "x.png")["fourstroke"])["scheduler"] == "DDIMScheduler"


def test_dtypes(tiny: str, here: Path) -> None:
    half = json.loads(generate(tiny, "--dtype", "bf16", "--json").stdout)
    assert half["settings"]["dtype"] == "bfloat16"
    result = generate(tiny, "--dtype", "float16", "--device", "cpu", "--json")
    assert json.loads(result.stdout)["settings"]["dtype"] == "float32"
    assert result.stderr == "note: float16 is for GPUs: float32 runs on the CPU instead.\n"


def test_offline_asks_no_network(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked: list[str] = []

    def ask(self: HfApi, name: str, **options: Any) -> list[str]:
        asked.append(name)
        raise ConnectionError("no network")

    monkeypatch.setattr(HfApi, "list_repo_files", ask)
    result = run("generate", "fox", "--model", "no/where", "--offline", code=2)
    assert "'no/where' is not in the cache" in result.stderr
    assert asked == [] and constants.HF_HUB_OFFLINE is False
    run("generate", "fox", "--model", "no/where", code=2)
    assert asked == ["no/where"]


def test_the_emoji_model_paints(here: Path) -> None:
    """Needs the shipped weights, src/fourstroke/zoo/emoji; without them the product does not work out of the box."""
    result = run("generate", "a red fox", "--seed", "1", "-o", "fox.png")
    assert result.stdout == "fox.png\n" and result.stderr == ""
    picture = pixels(here / "fox.png")
    assert picture.shape == (128, 128, 3)
    # Orange on white: the corners are the ground, and red is well above blue where there is colour.
    assert picture[:4, :4].min() > 200
    coloured = picture[picture.min(axis=-1) < 160]
    assert len(coloured) > 500 and (coloured[:, 0] - coloured[:, 2]).mean() > 30
    settings = json.loads(chunks(here / "fox.png")["fourstroke"])
    assert settings["loras"] == [{"name": "emoji/lcm-lora", "weight": 1.0}]
    assert settings["scheduler"] == "LCMScheduler" and settings["num_inference_steps"] == 4


# What goes wrong


def assert_one_line(result: Any, *fragments: str) -> None:
    assert result.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    for fragment in fragments:
        assert fragment in result.stderr


BAD_COMMANDS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("generate", "fox", "--stps", "3"), ("There is no option --stps.", "Did you mean '--steps'?")),
    (("generate", "fox", "--guidance-scale", "3"), ("Did you mean '--guidance'?",)),
    (("generate", "fox", "--num_inference_steps=3"), ("Did you mean '--steps'?",)),
    (("generate", "fox", "--cfg", "3"), ("Did you mean '--guidance'?",)),
    (("generate", "fox", "--qqq"), ("There is no option --qqq. See fourstroke generate --help.",)),
    (("generate",), ("Missing argument 'prompt'",)),
    (("generate", "red", "fox"), ("unexpected extra argument", "See fourstroke generate --help.")),
    (
        ("generate", "fox", "--steps", "few"),
        ("'--steps': it should be a valid integer. See fourstroke generate --help.",),
    ),
    (("generate", "fox", "--steps"), ("'--steps' requires an argument",)),
    (("generate", "fox", "--guidance", "much"), ("'--guidance': it should be a valid number. See",)),
    (("generat", "fox"), ("no verb 'generat'; there are generate, distill, bench, models", "Did you mean 'generate'?")),
    (("a red fox",), ("There is no verb 'a red fox'", "Did you mean fourstroke generate 'a red fox'?")),
    (("models", "--jsn"), ("There is no option --jsn. Did you mean '--json'?",)),
    (("--versio",), ("Did you mean '--version'?",)),
]


@pytest.mark.parametrize(("arguments", "fragments"), BAD_COMMANDS, ids=lambda value: " ".join(value)[:40])
def test_bad_command_lines(here: Path, arguments: tuple[str, ...], fragments: tuple[str, ...]) -> None:
    assert_one_line(run(*arguments, code=2), *fragments)


BAD_VALUES: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("--size", "100"), ("--size is 100; it must be a multiple of 8, such as 96 or 104.",)),
    (("--size", "64x100"), ("--size is 100; it must be a multiple of 8",)),
    (("--size", "0"), ("--size is 0; it must be a multiple of 8, such as 8 or 16.",)),
    (("--size", "big"), ("--size is 'big'; write WIDTHxHEIGHT such as 768x512",)),
    (("--size", "64x64x64"), ("--size is '64x64x64'",)),
    (("--size", "64", "--width", "64"), ("--size and --width or --height are both given",)),
    (("--height", "100"), ("--height is 100; it must be a multiple of 8, such as 96 or 104.",)),
    (("--width", "-8"), ("--width is -8; it must be a multiple of 8",)),
    (("--steps", "0"), ("--steps is 0; it must be at least 1.",)),
    (("--steps", "51"), ("51", "50")),
    (("--num", "0"), ("--num is 0; it must be at least 1.",)),
    (("--seed", "-1"), ("--seed is -1; it must be from 0 to 2**63 - 1. Leave it out for a random one.",)),
    (("--seed", str(2**63)), (f"--seed is {2**63}",)),
    (("--guidance", "nan"), ("--guidance is nan; it must be a number.",)),
    (("--clip-skip", "9"), ("--clip-skip is 9", "3 layers")),
    (("--scheduler", "eulr"), ("--scheduler is 'eulr'; it is one of lcm, tcd, ddim", "Did you mean 'euler'?")),
    (("--scheduler", "LMSScheduler"), ("--scheduler is 'LMSScheduler'", "Did you mean 'LCMScheduler'?")),
    (("--device", "cudda"), ("--device is 'cudda'; it is one of cpu, cuda, mps, or such as cuda:1.",)),
    (("--device", "cpu:1"), ("--device is 'cpu:1', but there is no such device here; use --device cpu.",)),
    (("--device", "meta"), ("--device is 'meta'; it is one of",)),
    (("--dtype", "floot16"), ("--dtype is 'floot16'; it is one of float32, bfloat16, float16.", "'float16'?")),
    (("--lora", "style:abc"), ("LoRA 'style:abc': 'abc' is not a number; write NAME:WEIGHT, such as style:0.8.",)),
    (("--lora", "style:inf"), ("LoRA 'style:inf': 'inf' is not a number",)),
    (
        ("--lora", "styl.safetensors"),
        ("LoRA styl.safetensors: there is no such file. Did you mean 'style.safetensors'?"),
    ),
    (("--lora", "sub/styl.safetensors:0.5"), ("Did you mean 'sub/style.safetensors'?",)),
    (("--lora", "other.safetensors"), (f"{QUERY.removeprefix('unet.')}", "48")),
    (("--lora", "text.safetensors"), ("text.safetensors is not a readable .safetensors file",)),
    (("--lora", "style.pt"), ("style.pt is a pickle", "Convert it once")),
    (("--model", "emojy"), ("'emojy' is neither a folder, nor a shipped model", "Did you mean 'emoji'?")),
    (("--model", "emoji/bas"), ("'emoji/bas' is not in the cache", "Did you mean 'emoji/base'?")),
    (("--model", "sub"), ("sub", "model_index.json")),
    (("--model", "nowhere.safetensors"), ("nowhere.safetensors",)),
    (("--model", "style.safetensors"), ("This file is a LoRA",)),
    (("-o", "fox.gif"), ("pictures are written as .png, .jpg, .jpeg, .webp, not .gif. --frames makes an animation.",)),
    (("-o", "fox.pgn"), ("not .pgn. Did you mean '.png'?",)),
    (("-o", "-"), ("--output is '-'; pictures are written to files only, so give a file name.",)),
    (("-o", "/dev/null"), ("--output /dev/null is not an ordinary file; give another name.",)),
    (("-o", "text.safetensors/fox.png"), ("text.safetensors is a file, not a folder.",)),
]


@pytest.mark.parametrize(("arguments", "fragments"), BAD_VALUES, ids=lambda value: " ".join(value)[:40])
def test_bad_values(tiny: str, here: Path, arguments: tuple[str, ...], fragments: tuple[str, ...]) -> None:
    (here / "sub").mkdir()
    write_lora(here / "style.safetensors")
    write_lora(here / "sub" / "style.safetensors")
    write_lora(here / "other.safetensors", width=48)
    (here / "text.safetensors").write_text("no tensors")
    (here / "style.pt").write_text("a pickle")
    before = sorted(here.rglob("*"))
    model = () if "--model" in arguments else ("--model", tiny)
    assert_one_line(run("generate", "fox", "--steps", "2", *model, *arguments, code=2), *fragments)
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("arguments", [("--size", "100"), ("--scheduler", "x"), ("-o", "fox.gif"), ("--steps", "0")])
def test_bad_values_are_seen_before_any_work(
    here: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    def load(*args: Any, **options: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr("fourstroke.engine.Engine.__init__", load)
    run("generate", "fox", *arguments, code=2)


def test_a_folder_that_cannot_be_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")  # root may write anywhere
    result = run("generate", "fox", "-o", "locked/fox.png", code=2)
    assert_one_line(result, f"--output locked/fox.png: you may not write into {here / 'locked'}.")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("the device\nis on fire"), "the device is on fire"),
        (MemoryError(), "MemoryError. Try a smaller --size or fewer pictures (--num)."),
        (RuntimeError("CUDA out of memory."), "CUDA out of memory. Try a smaller --size or fewer pictures (--num)."),
        (KeyError("x"), "KeyError: 'x' (--debug shows where)"),
        (OSError("\x1b[31mred"), " [31mred"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_failures(tiny: str, here: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(Engine, "generate", fail)
    result = generate(tiny, "-o", "fox.png", code=1)
    assert_one_line(result)
    assert result.stderr == f"error: {line}\n"
    assert os.listdir(here) == []
    shown = CliRunner().invoke(app, ["generate", "fox", "--model", tiny, "--debug"])
    assert shown.exit_code == 1
    assert shown.stderr.startswith("Traceback (most recent call last):")
    assert shown.stderr.endswith(f"\nerror: {line}\n")


def test_interrupted(tiny: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "generate", interrupt)
    assert generate(tiny, "-o", "fox.png", code=130).stderr == "error: interrupted\n"
    assert os.listdir(here) == []


@pytest.mark.parametrize("existed", [False, True])
def test_a_full_disk_leaves_no_half_file(tiny: str, here: Path, monkeypatch: pytest.MonkeyPatch, existed: bool) -> None:
    if existed:
        (here / "fox.png").write_bytes(b"old")
    write_bytes = Path.write_bytes

    def half(self: Path, data: bytes) -> int:
        write_bytes(self, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    assert_one_line(generate(tiny, "-o", "fox.png", code=1), "No space left on device")
    assert {path.name: path.read_bytes() for path in here.iterdir()} == ({"fox.png": b"old"} if existed else {})


SLOW = """
import signal, sys, time
from fourstroke.engine import Engine

# A shell that starts the tests in the background has its children ignore the signal.
signal.signal(signal.SIGINT, signal.default_int_handler)

original = Engine.generate

def slow(self, request, *, on_step):
    def step(state):
        on_step(state)
        print("step", file=sys.stderr, flush=True)
        time.sleep(600)
    return original(self, request, on_step=step)

Engine.generate = slow
from fourstroke.cli import app
app()
"""


def test_control_c_in_the_middle(tiny: str, here: Path) -> None:
    (here / "fox.png").write_bytes(b"old")
    command = [sys.executable, "-c", SLOW, "generate", "fox", "--model", tiny, "-o", "fox.png"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None and process.stderr.readline() == "step\n"
        process.send_signal(signal.SIGINT)
        try:
            stdout, stderr = process.communicate(timeout=120)
        finally:
            process.kill()
    assert (process.returncode, stdout, stderr) == (130, "", "error: interrupted\n")
    assert {path.name: path.read_bytes() for path in here.iterdir()} == {"fox.png": b"old"}


# What is said on the side


def test_the_library_s_warnings_are_notes(tiny: str, here: Path) -> None:
    result = generate(tiny, "--guidance", "3", "-o", "x.png", prompt="fox " * 40)
    notes = result.stderr.splitlines()
    assert len(notes) == 2 and all(line.startswith("note: ") for line in notes)
    assert notes[0].startswith("note: --guidance is 3.0: with an LCM-LoRA values above 2 burn the colours")
    assert "this part of it has no effect: 'fox fox" in notes[1]
    assert result.stdout == "x.png\n"


def test_warnings_of_loading_are_notes_too(tiny: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    original = Engine.__init__

    def warn(self: Engine, *args: Any, **options: Any) -> None:
        sys.stderr.write("a progress bar\n")
        for _ in range(2):
            warnings.warn("a strange file", stacklevel=1)
        original(self, *args, **options)

    monkeypatch.setattr(Engine, "__init__", warn)
    assert generate(tiny).stderr == "note: a strange file\n"


def test_the_safety_checker_s_verdict_is_told(tiny: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Engine.generate

    def flag(self: Engine, request: GenerateRequest, **options: Any) -> Any:
        result = original(self, request, **options)
        return dataclasses.replace(result, nsfw_content_detected=[False, True])

    monkeypatch.setattr(Engine, "generate", flag)
    result = generate(tiny, "--seed", "4", "--num", "2", "--json")
    assert result.stderr == "note: The model's safety checker blacked out the picture of seed 5.\n"
    assert json.loads(result.stdout)["nsfw_content_detected"] == [False, True]


# Help and start


def plain_help(*arguments: str) -> str:
    """A help text without the boxes, in one line."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", run(*arguments, "--help").stdout).split())


def test_help_tells_every_option() -> None:
    text = plain_help("generate")
    described = [field for field in dataclasses.fields(GenerateRequest) if "help" in field.metadata]
    assert len(described) >= 8
    for field in described:
        assert field.metadata["help"] in text
    for flag in (
        *("--steps", "--guidance", "--num", "--seed", "--size", "--height", "--width", "--negative", "--clip-skip"),
        *("--model", "--lora", "--lcm", "--no-lcm", "--scheduler", "--device", "--dtype", "--offline"),
        *("--output", "--grid", "--no-grid", "--preview", "--no-preview", "--json", "--debug"),
    ):
        assert f" {flag} " in text
    assert [panel for panel in ("Picture", "Size", "Model", "Output") if panel in text] == [
        "Picture", "Size", "Model", "Output",
    ]  # fmt: skip
    assert "[default: 4]" in text and "[default: 1.0]" in text


def test_defaults_are_the_request_s() -> None:
    from fourstroke.cli import options

    defaults = {parameter.name: parameter.default for parameter in options.request_parameters()}
    request = GenerateRequest(prompt="x")
    assert defaults == {name: getattr(request, name) for name in defaults}


def test_a_field_of_an_unknown_type_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from fourstroke.cli import options

    odd = SimpleNamespace(name="odd", type="complex", default=None, metadata={"help": "Odd."})
    monkeypatch.setattr(options, "request_fields", lambda: [odd])
    with pytest.raises(TypeError, match=r"GenerateRequest\.odd is 'complex': add the type"):
        list(options.request_parameters())


@pytest.mark.parametrize("verb", ["generate", "models", "inspect", "info"])
def test_every_verb_is_in_the_help(verb: str) -> None:
    assert f" {verb} " in plain_help()
    assert f"Usage: fourstroke {verb} " in plain_help(verb) or f"{verb} [OPTIONS]" in plain_help(verb)


def test_no_arguments_show_the_help() -> None:
    assert run().stdout.strip() == run("--help").stdout.strip()


def test_version() -> None:
    assert run("--version").stdout == f"fourstroke {fourstroke.__version__}\n"


NO_TORCH = """
import sys
from fourstroke.cli import app
try:
    app({arguments!r}, prog_name="fourstroke")
except SystemExit as exit:
    assert not exit.code, exit.code
heavy = {{"torch", "numpy", "huggingface_hub", "PIL"}} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["inspect", "--help"], ["--show-completion", "bash"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-c", NO_TORCH.format(arguments=arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert "fourstroke" in result.stdout


def test_the_installed_script() -> None:
    script = Path(sys.executable).with_name("fourstroke")
    result = subprocess.run([script, "generate", "fox", "--size", "100"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: --size is 100; it must be a multiple of 8, such as 96 or 104.\n"


# Completion


def complete(words: str) -> list[str]:
    """What a bash would offer at the end of ``words``."""
    environment = {
        **os.environ,
        "_FOURSTROKE_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    result = CliRunner().invoke(app, [], env=environment, prog_name="fourstroke")
    return result.stdout.split()


def test_completion(tiny: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from fourstroke import hub

    (here / "zoo" / "emoji" / "base").mkdir(parents=True)
    (here / "zoo" / "emoji" / "base" / "model_index.json").write_text("{}")
    (here / "zoo" / "emoji" / "lcm-lora").mkdir()
    write_lora(here / "zoo" / "emoji" / "lcm-lora" / "x.safetensors")
    (here / "cache" / "models--some--model").mkdir(parents=True)
    write_lora(here / "style.safetensors")
    monkeypatch.setattr(hub, "ZOO", here / "zoo")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "cache"))
    assert complete("fourstroke ins") == ["inspect"]
    assert complete("fourstroke generate --scheduler eu") == ["euler", "euler-a"]
    assert complete("fourstroke generate --dtype b") == ["bfloat16", "bf16"]
    assert complete("fourstroke generate --model e") == ["emoji", "emoji/base"]
    assert complete("fourstroke generate --model so") == ["some/model"]
    assert complete("fourstroke generate --model z") == ["zoo/"]
    assert complete("fourstroke generate --lora e") == ["emoji/lcm-lora"]
    assert complete("fourstroke generate --lora st") == ["style.safetensors"]
    assert complete("fourstroke inspect zoo/emoji/lcm-lora/") == ["zoo/emoji/lcm-lora/x.safetensors"]
    assert complete("fourstroke inspect emoji/l") == ["emoji/lcm-lora"]
    assert "--steps" in complete("fourstroke generate --st")
