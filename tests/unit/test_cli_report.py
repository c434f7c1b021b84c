"""``fourstroke models``, ``inspect`` and ``info``."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fourstroke
from fourstroke import StableDiffusionPipeline, hub
from fourstroke.lora import recommended

from .test_cli_generate import assert_one_line, generate, here, run, tiny, write_lora  # noqa: F401 - fixtures


def told(*arguments: str | Path) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


def shown(*arguments: str | Path) -> dict[str, str]:
    """The rows of a two-column table."""
    lines = run(*arguments).stdout.splitlines()
    return dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in lines)


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


@pytest.fixture
def zoo(tiny: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """A package that ships a model, a LoRA and a network, and a cache with one repository."""
    from huggingface_hub import constants

    zoo = here / "zoo"
    shutil.copytree(tiny, zoo / "emoji" / "base")
    (zoo / "emoji" / "lcm-lora").mkdir()
    write_lora(zoo / "emoji" / "lcm-lora" / "pytorch_lora_weights.safetensors")
    shutil.copytree(Path(tiny) / "vae", zoo / "emoji" / "vae")
    commit = "0123456789" * 4
    repository = here / "cache" / "models--some--style"
    blobs, refs, snapshot = (repository / name for name in ("blobs", "refs", f"snapshots/{commit}"))
    for folder in (blobs, refs, snapshot):
        folder.mkdir(parents=True)
    (refs / "main").write_text(commit)
    write_lora(blobs / "123")
    (snapshot / "style.safetensors").symlink_to(blobs / "123")
    (here / "cache" / "models--without--files").mkdir()
    monkeypatch.setattr(hub, "ZOO", zoo)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "cache"))
    return zoo


# models


def test_models(zoo: Path, here: Path) -> None:  # noqa: F811
    facts = told("models")
    assert [(row["name"], row["kind"], row["alias"]) for row in facts["shipped"]] == [
        ("emoji/base", "StableDiffusionPipeline", "emoji"),
        ("emoji/lcm-lora", "LoRA", None),
        ("emoji/vae", "AutoencoderKL", None),
    ]
    for row in facts["shipped"]:
        assert row["folder"] == str(zoo / row["name"]) and row["bytes"] == bytes_in(zoo / row["name"])
    assert facts["cache"] == str(here / "cache")
    [cached] = facts["cached"]
    blob = here / "cache" / "models--some--style" / "blobs" / "123"  # and 40 bytes that name the commit
    assert (cached["name"], cached["kind"], cached["bytes"]) == ("some/style", "LoRA", blob.stat().st_size + 40)
    table = run("models").stdout
    for words in ("emoji/base (emoji)", "StableDiffusionPipeline", "emoji/lcm-lora", "AutoencoderKL", "some/style"):
        assert words in table


def test_no_models(zoo: Path, monkeypatch: pytest.MonkeyPatch, here: Path) -> None:  # noqa: F811
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "ZOO", here / "none")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "none"))
    assert told("models") == {"shipped": [], "cached": [], "cache": str(here / "none")}
    assert "Shipped: nothing" in run("models").stdout


# inspect: pipelines and networks


def test_inspect_a_pipeline(tiny: str) -> None:  # noqa: F811
    facts = told("inspect", tiny)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny)
    assert (facts["name"], facts["kind"], facts["class"]) == (tiny, "pipeline", "StableDiffusionPipeline")
    total = 0
    for name in ("unet", "vae", "text_encoder"):
        network = getattr(pipeline, name)
        count = sum(parameter.numel() for parameter in network.parameters())
        part = facts["components"][name]
        assert part["class"] == type(network).__name__
        assert part["parameters"] == count and part["dtypes"] == ["float32"]
        assert part["bytes"] == sum(path.stat().st_size for path in (Path(tiny) / name).glob("*.safetensors"))
        total += count
    assert facts["parameters"] == total and facts["dtypes"] == ["float32"]
    assert facts["components"]["scheduler"]["class"] == "DDIMScheduler"
    assert facts["components"]["scheduler"]["parameters"] == 0
    assert "safety_checker" not in facts["components"]
    assert facts["settings"] == {"requires_safety_checker": False} and facts["recommended"] is None
    rows = shown("inspect", tiny)
    assert rows["kind"] == "StableDiffusionPipeline"
    assert rows["tokenizer"] == "CLIPTokenizer"
    assert re.fullmatch(r"UNet2DConditionModel, \d+\.\d [kM], float32", rows["unet"])


def test_inspect_a_shipped_name_and_a_network(zoo: Path) -> None:
    assert told("inspect", "emoji") | {"name": ""} == told("inspect", "emoji/base") | {"name": ""}
    facts = told("inspect", "emoji/vae")
    assert (facts["kind"], facts["class"], facts["dtypes"]) == ("network", "AutoencoderKL", ["float32"])
    assert facts["parameters"] == told("inspect", "emoji/base")["components"]["vae"]["parameters"]
    assert shown("inspect", "emoji/vae")["kind"] == "AutoencoderKL"
    assert told("inspect", "emoji/lcm-lora")["kind"] == "lora"


def test_variants_are_not_counted_twice(tiny: str, here: Path) -> None:  # noqa: F811
    folder = here / "model"
    shutil.copytree(tiny, folder)
    unet = StableDiffusionPipeline.from_pretrained(tiny).unet
    count = sum(parameter.numel() for parameter in unet.parameters())
    unet.half().save_pretrained(folder / "unet", variant="fp16")
    assert told("inspect", folder)["components"]["unet"]["parameters"] == count
    assert told("inspect", folder)["components"]["unet"]["dtypes"] == ["float32"]
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert told("inspect", folder)["components"]["unet"]["parameters"] == count
    assert told("inspect", folder)["components"]["unet"]["dtypes"] == ["float16"]


def test_inspect_a_cached_repository(zoo: Path) -> None:
    facts = told("inspect", "some/style", "--offline")
    assert (facts["name"], facts["kind"], facts["rank"]) == ("some/style", "lora", 2)


# inspect: files


def write_kohya(path: Path) -> Path:
    numbers = {"lora_down.weight": torch.ones(8, 768), "lora_up.weight": torch.ones(320, 8), "alpha": torch.tensor(4.0)}
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    metadata = {
        "ss_sd_model_name": "base.safetensors",
        "modelspec.author": "somebody",
        "ss_tag_frequency": json.dumps({"1_fox": {"red fox": 9, "snow": 3}}),
    }
    save_file({f"{module}.{name}": tensor.half() for name, tensor in numbers.items()}, path, metadata)
    return path


def test_inspect_a_lora(here: Path) -> None:  # noqa: F811
    path = write_kohya(here / "fox-style.safetensors")
    facts = told("inspect", path)
    targets = facts.pop("targets")
    assert list(targets) == ["unet"] and len(targets["unet"]) == 1 and "attn2_to_k" in targets["unet"][0]
    assert facts.pop("metadata")["ss_sd_model_name"] == "base.safetensors"
    assert facts == {
        "name": str(path),
        "kind": "lora",
        "family": "SD 1.5",
        "dialect": "kohya",
        "kinds": ["lora"],
        "fits": ["stable-diffusion-v1-5/stable-diffusion-v1-5"],
        "rank": 8,
        "ranks": [8],
        "alpha": 4.0,
        "alphas": [4.0],
        "base_model": "base.safetensors",
        "trigger_words": ["red fox", "snow"],
        "recommended": None,
        "unknown_keys": [],
        "parameters": 8 * 768 + 320 * 8 + 1,
        "bytes": path.stat().st_size,
        "dtypes": ["float16"],
    }
    rows = shown("inspect", path)
    assert rows["kind"] == "LoRA (lora)" and rows["family"] == "SD 1.5" and rows["rank"] == "8"
    assert rows["alpha"] == "4" and rows["targets"] == "unet (1 modules)"
    assert rows["trigger words"] == "red fox, snow" and rows["trained on"] == "base.safetensors"
    assert rows["made for"] == "stable-diffusion-v1-5/stable-diffusion-v1-5" and rows["author"] == "somebody"
    assert "run with" not in rows and "unknown keys" not in rows


@pytest.mark.parametrize(
    ("file", "line"),
    [
        (
            "Hyper-SD15-1step-lora",
            "Hyper-SD: --lora {}.safetensors, which brings scheduler=TCD, steps=1, guidance=1, eta=1.0",
        ),
        (
            "sdxl_lightning_8step_lora",
            "SDXL-Lightning: --lora {}.safetensors, which brings scheduler=Euler, steps=8, guidance=1, "
            "timestep_spacing=trailing",
        ),
        (
            "AnimateLCM_sd15_t2v_lora",
            "AnimateLCM: --lora {}.safetensors, which brings scheduler=LCM, steps=6, guidance=2, weight=0.8, "
            "beta_schedule=linear",
        ),
        (
            "dmd2_sdxl_4step_lora",
            "DMD2: --lora {}.safetensors, which brings scheduler=LCM, steps=4, guidance=1, "
            "timesteps=(999, 749, 499, 249)",
        ),
    ],
)
def test_inspect_tells_how_to_run_a_few_step_lora(here: Path, file: str, line: str) -> None:  # noqa: F811
    path = write_kohya(here / f"{file}.safetensors")
    told_ = told("inspect", path.name)["recommended"]
    assert told_ == json.loads(json.dumps(dataclasses.asdict(recommended(path))))
    assert shown("inspect", path.name)["run with"] == line.format(file)


def test_inspect_tells_how_to_run_a_few_step_model(tiny: str, here: Path) -> None:  # noqa: F811
    path = write_checkpoint(here / "sd_xl_turbo.safetensors")
    line = "Turbo: --model {}, which brings scheduler=Euler a, steps=1, guidance=1, timestep_spacing=trailing"
    assert told("inspect", path.name)["recommended"]["scheduler"] == "EulerAncestralDiscreteScheduler"
    assert shown("inspect", path.name)["run with"] == line.format(path.name)
    shutil.copytree(tiny, here / "sd-turbo")
    assert told("inspect", "sd-turbo")["recommended"]["method"] == "Turbo"
    assert shown("inspect", "sd-turbo")["run with"] == line.format("sd-turbo")


def test_metadata_cannot_steer_the_terminal(here: Path) -> None:  # noqa: F811
    tensors = {"lora_unet_x_attn2_to_k.lora_down.weight": torch.ones(2, 768)}
    save_file(tensors, here / "evil.safetensors", {"ss_trigger_words": "a\x1b]0;evil\x07,b\nc"})
    text = run("inspect", "evil.safetensors").stdout
    assert "\x1b" not in text and "\x07" not in text and "evil" in text


def write_checkpoint(path: Path) -> Path:
    """The few tensors of an SD 1.5 checkpoint by which one knows it."""
    unet, text = "model.diffusion_model.", "cond_stage_model.transformer.text_model."
    shapes = {
        f"{unet}input_blocks.0.0.weight": (320, 4, 3, 3),
        f"{unet}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "first_stage_model.encoder.norm_out.weight": (512,),
        f"{text}final_layer_norm.weight": (768,),
    }
    metadata = {"modelspec.title": "Foxes", "modelspec.prediction_type": "epsilon"}
    save_file({name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}, path, metadata)
    return path


def test_inspect_a_checkpoint(here: Path) -> None:  # noqa: F811
    path = write_checkpoint(here / "foxes.safetensors")
    facts = told("inspect", path)
    unet = 320 * 4 * 9 + 320 * 768
    assert facts == {
        "name": str(path),
        "kind": "checkpoint",
        "family": "sd15",
        "prediction_type": "epsilon",
        "components": {
            "unet": {"parameters": unet, "layout": "original"},
            "vae": {"parameters": 512, "layout": "original"},
            "text_encoder": {"parameters": 768, "layout": "published"},
        },
        "parameters": unet + 512 + 768,
        "bytes": path.stat().st_size,
        "dtypes": ["float16"],
        "metadata": {"modelspec.title": "Foxes", "modelspec.prediction_type": "epsilon"},
        "recommended": None,
    }
    rows = shown("inspect", path)
    assert rows["family"] == "sd15" and rows["title"] == "Foxes"
    assert rows["holds"] == "unet (257.3 k), vae (512), text_encoder (768)"


def test_inspect_something_else(here: Path) -> None:  # noqa: F811
    save_file({"controlnet_cond_embedding.conv_in.weight": torch.ones(16, 3, 3, 3)}, here / "x.safetensors")
    facts = told("inspect", "x.safetensors")
    assert facts["kind"] == "other" and "a ControlNet" in facts["about"] and facts["parameters"] == 16 * 27
    assert "a ControlNet" in shown("inspect", "x.safetensors")["about"]


def test_inspect_a_picture(tiny: str, here: Path) -> None:  # noqa: F811
    generate(tiny, "--seed", "3", "--negative", "blue", "-o", "fox.png")
    generate(tiny, "--seed", "3", "--negative", "blue", "-o", "fox.jpg")
    settings = told("inspect", "fox.png")["settings"]
    assert settings["prompt"] == "a red fox" and settings["seed"] == 3
    assert told("inspect", "fox.jpg")["settings"] == settings
    text = " ".join(run("inspect", "fox.png").stdout.split())
    assert text.startswith("a red fox Negative prompt: blue Steps: 2, Sampler: LCM, CFG scale: 1, Seed: 3")


# inspect: errors


@pytest.mark.parametrize(
    ("what", "fragments"),
    [
        ("emoji/bass", ("emoji/bass", "Did you mean 'emoji/base'?")),
        ("emojy", ("'emojy' is neither a folder", "Did you mean 'emoji'?")),
        ("fox-styl.safetensors", ("Did you mean 'fox-style.safetensors'?",)),
        ("model.ckpt", ("model.ckpt is a pickle",)),
        ("broken.safetensors", ("broken.safetensors is not a readable .safetensors file",)),
        ("plain.png", ("plain.png is a picture without fourstroke's settings in it.",)),
        ("empty", ("empty",)),
        ("bad", ("model_index.json is not valid JSON",)),
        ("torn", ("model.safetensors is not a readable .safetensors file",)),
    ],
)
def test_inspect_errors(zoo: Path, here: Path, what: str, fragments: tuple[str, ...]) -> None:  # noqa: F811
    write_kohya(here / "fox-style.safetensors")
    (here / "model.ckpt").write_bytes(b"pickle")
    (here / "broken.safetensors").write_bytes(b"\xff" * 100)
    (here / "plain.png").write_bytes(b"no picture")
    (here / "empty").mkdir()
    for name in ("bad", "torn"):
        (here / name).mkdir()
    (here / "bad" / "model_index.json").write_text("{")
    (here / "torn" / "config.json").write_text("{}")
    (here / "torn" / "model.safetensors").write_bytes(b"\x00\x00")
    assert_one_line(run("inspect", what, code=2), *fragments)


# info


def test_info() -> None:
    facts = told("info")
    assert facts["versions"]["fourstroke"] == fourstroke.__version__
    assert facts["versions"]["python"] == platform.python_version()
    for name in ("torch", "safetensors", "tokenizers", "huggingface_hub", "numpy", "pillow", "typer", "rich"):
        assert facts["versions"][name] == version(name)
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert facts["cores"] == len(os.sched_getaffinity(0))
    assert [device["name"] for device in facts["devices"]][0] == "cpu"
    assert sum(device["name"].startswith("cuda") for device in facts["devices"]) == torch.cuda.device_count()
    assert facts["backends"]["eager"] is True
    assert set(facts["extras"]) >= {"openvino", "fastapi", "ray", "accelerate", "av"}
    rows = shown("info")
    assert rows["torch"] == version("torch")
    assert facts["cpu_capability"] in rows["threads"] and "eager" in rows["backends"]
    assert rows["system"].startswith(platform.system())


def test_packages_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from fourstroke.cli import report

    monkeypatch.setattr(report, "EXTRAS", {"no-such-package": "wings (fourstroke[wings])"})
    assert told("info")["extras"] == {"no-such-package": None}
    assert shown("info")["no-such-package"] == "not installed: wings (fourstroke[wings])"
