"""Trainings from end to end on tiny models: files, samples, errors, processes that are killed or work together."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fourstroke.lora.pairs import LoraError
from fourstroke.lora.reading import read_lora
from fourstroke.train import DataError, DistillOptions, LoraOptions, distill, train_lora
from fourstroke.train.base import load_base
from fourstroke.train.data import open_source
from fourstroke.train.encoding import Examples, encode_examples
from fourstroke.train.loop import generator_for
from fourstroke.train.lora import NoisePrediction
from fourstroke.train.student import make_student

from ..unit import tiny
from .toys import table

ROOT = Path(__file__).parents[2]
QUICK: dict[str, Any] = {"steps": 4, "batch_size": 2, "rank": 2, "learning_rate": 0.01, "save_precision": "fp32"}
MAKE = {"sd": tiny.sd, "xl": tiny.xl}


def quiet(*_: Any) -> None:
    """No bars."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, text in enumerate(("fox", "red fox", "red", "a fox")):
        tiny.picture(i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def examples(data: Path) -> dict[str, Examples]:
    """The same, encoded by each tiny model."""
    return {kind: encode_examples(make(), open_source(data)) for kind, make in MAKE.items()}


def weights(pipe: Any) -> dict[str, Tensor]:
    parts = {name: value for name, value in pipe.components.items() if isinstance(value, torch.nn.Module)}
    return {f"{part}.{name}": t.clone() for part, net in parts.items() for name, t in net.state_dict().items()}


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_a_distillation_leaves_files_and_the_pipeline_as_it_was(
    kind: str, examples: dict[str, Examples], tmp_path: Path
) -> None:
    pipe = MAKE[kind]()
    before, flags = weights(pipe), [p.requires_grad for p in pipe.unet.parameters()]
    scheduler = pipe.scheduler
    options = DistillOptions(
        **QUICK, alpha=3.0, guidance=(2.0, 5.0), sample_every=2, sample_prompts=("fox", "red", "a fox"), keep=1,
        save_every=2, ema_decay=0.9, ema_target=True, gradient_checkpointing=True, caption_dropout=0.5,
    )  # fmt: skip
    path = distill(pipe, examples[kind], tmp_path, options, quiet)
    found = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file())
    assert found == [
        "checkpoint.safetensors", "loras/step-000002.safetensors", "metrics.csv", "pytorch_lora_weights.safetensors",
        "samples/step-000002.png", "samples/step-000004.png", "training.json",
    ]  # fmt: skip
    assert [row[0] for row in table(tmp_path / "metrics.csv")] == ["step", "1", "2", "3", "4"]
    with PIL.Image.open(tmp_path / "samples" / "step-000004.png") as grid:
        assert grid.size == (64, 64)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    wanted = {"base_model": type(pipe).__name__, "rank": "2", "alpha": "3", "steps": "4", "guidance": "2-5"}
    assert header.items() >= (wanted | {"method": "latent consistency distillation"}).items()
    after = weights(pipe)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [p.requires_grad for p in pipe.unet.parameters()] == flags
    assert not any("forward" in vars(module) for module in pipe.unet.modules())
    assert pipe.scheduler is scheduler and not pipe.adapters.names
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["options"]["rank"] == 2 and record["options"]["data"]["crop"] == "center"


def test_samples_are_the_pipelines_own_pictures(examples: dict[str, Examples], tmp_path: Path) -> None:
    from fourstroke import LCMScheduler

    options = DistillOptions(**QUICK, sample_every=4, sample_prompts=("fox",))
    path = distill(tiny.sd(), examples["sd"], tmp_path, options, quiet)
    pipe = tiny.sd()
    plain = pipe("fox", num_inference_steps=4, guidance_scale=1.0, generator=torch.Generator().manual_seed(0)).images[0]
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(path)
    wanted = pipe("fox", num_inference_steps=4, guidance_scale=1.0, generator=torch.Generator().manual_seed(0)).images[
        0
    ]
    with PIL.Image.open(tmp_path / "samples" / "step-000004.png") as sample:
        assert sample.tobytes() == wanted.tobytes() != plain.tobytes()


@pytest.mark.parametrize("layout", ["kohya", "peft"])
@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_diffusers_loads_the_lora(kind: str, layout: str, examples: dict[str, Examples], tmp_path: Path) -> None:
    """With peft it changes diffusers' UNet and text encoders as ours: the effective weights are equal."""
    import diffusers

    options = LoraOptions(**QUICK, alpha=3.0, layout=layout, train_text_encoder=True, save_every=0)
    pipe = MAKE[kind]()
    path = train_lora(pipe, examples[kind], tmp_path / "out", options, quiet)
    pipe.save_pretrained(tmp_path / "model")
    diffusers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None)
        theirs.load_lora_weights(path.parent, weight_name=path.name)
        theirs.fuse_lora(components=parts_of(pipe))
        theirs.unload_lora_weights()
    before = weights(pipe)
    pipe.load_lora_weights(path)
    pipe.merge_adapters()
    lora = read_lora(path, {part: getattr(pipe, part) for part in parts_of(pipe)})
    acting = {f"{part}.{name}" for part, name, pair in lora.items() if pair.tensors()["lora_up.weight"].abs().max() > 0}
    changed = set()
    for part in parts_of(pipe):
        network = getattr(pipe, part)
        peer = {type(network).published_name(key): value for key, value in getattr(theirs, part).state_dict().items()}
        for name, value in network.state_dict().items():
            torch.testing.assert_close(value, peer[name], rtol=1e-5, atol=1e-6)
            changed |= set() if torch.equal(value, before[f"{part}.{name}"]) else {f"{part}.{name}"}
    assert changed == acting and {name.split(".")[0] for name in changed} == set(parts_of(pipe))


def parts_of(pipe: Any) -> list[str]:
    return [part for part in ("unet", "text_encoder", "text_encoder_2") if getattr(pipe, part, None) is not None]


def test_training_lowers_the_loss(examples: dict[str, Examples], tmp_path: Path) -> None:
    """On fixed draws, with the LoRA that was written, against none."""
    options = LoraOptions(**QUICK | {"steps": 8, "batch_size": 4}, caption_dropout=0.0)
    path = train_lora(tiny.sd(), examples["sd"], tmp_path, options, quiet)
    first, last = evaluated(options, examples["sd"], None), evaluated(options, examples["sd"], path)
    assert last < 0.95 * first


def evaluated(options: LoraOptions, examples: Examples, path: Path | None, batches: int = 4) -> float:
    """The mean loss over batches that training has not drawn."""
    base, _ = load_base(tiny.sd(), options)
    student = make_student(base, options)
    if path is not None:
        for name, pair in read_lora(path, {"unet": base.unet}).components["unet"].items():
            mine: Any = student.pairs["unet"][name]
            mine.down.data.copy_(pair.down)
            mine.up.data.copy_(pair.up)
    text = base.text_of(examples.empty)
    loss = NoisePrediction(base, text, options)
    with torch.no_grad():
        found = [loss(student, examples.batch(i, 4, 1), generator_for(9, i)) for i in range(batches)]
    return float(torch.stack(found).mean())


def test_prior_pictures_count_with_their_weight(examples: dict[str, Examples], data: Path, tmp_path: Path) -> None:
    losses = []
    for weight in (0.0, 1.0, 3.0):
        options = LoraOptions(**QUICK | {"steps": 1}, prior_data=str(data), prior_weight=weight)
        train_lora(tiny.sd(), examples["sd"], tmp_path / str(weight), options, quiet)
        losses.append(float(table(tmp_path / str(weight) / "metrics.csv")[1][1]))
    assert losses[1] > losses[0] * 1.1
    assert losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-3)


def test_a_lora_is_gone_on_from(examples: dict[str, Examples], tmp_path: Path) -> None:
    options = DistillOptions(**QUICK, alpha=3.0)
    path = distill(tiny.sd(), examples["sd"], tmp_path / "first", options, quiet)
    base, _ = load_base(tiny.sd(), options)
    wanted = read_lora(path, {"unet": base.unet}).components["unet"]
    again = make_student(
        base, DistillOptions(**QUICK, alpha=6.0, init_from=str(path))
    )  # another scale, the same change
    for name, pair in again.pairs["unet"].items():
        torch.testing.assert_close(pair.scale * pair.up @ pair.down if pair.up.ndim == 2 else pair.delta(
            torch.zeros(pair.up.shape[0], *pair.down.shape[1:])), wanted[name].delta(
            torch.zeros(pair.up.shape[0], *pair.down.shape[1:])))  # fmt: skip
    for change, message in (
        ({"rank": 3}, r"is of rank 2, and rank is 3; give it as rank"),
        ({"targets": ("to_q",)}, r"its targets are not those asked for: it has unet\..*Name the file's targets"),
    ):
        with pytest.raises(LoraError, match=message):
            make_student(base, DistillOptions(**QUICK | change, init_from=str(path)))
    with pytest.raises(FileNotFoundError, match="init_from: there is no file 'nowhere'"):
        make_student(base, DistillOptions(init_from="nowhere"))


# Errors, all before anything is computed.


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("work was begun")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (DistillOptions(targets=("to_q", "wings")), r"no module of UNet2DConditionModel is named \['wings'\]"),
        (DistillOptions(num_ddim_timesteps=2000), "num_ddim_timesteps is 2000; .* has 1000 timesteps"),
        (DistillOptions(base_precision="bf16"), "The base's weights are .*float32|weights are bfloat16"),
        (DistillOptions(precision="fp16", base_precision="fp16"), "base_precision fp16 is for GPUs"),
        (DistillOptions(sample_prompts=("fox",) * 17), "17 sample_prompts; give at most 16"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    options: DistillOptions, message: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fourstroke.train import entry

    monkeypatch.setattr(entry, "encode_examples", refuse)
    tiny.sd().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        distill(str(tmp_path / "model"), data, tmp_path / "out", options, quiet)
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_trained_are_refused(data: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"in_channels": 9}, r"its UNet reads 9 channels \(inpainting\?\); train on its base model"),
        ({"time_cond_proj_dim": 8}, r"is a distilled model \(an LCM, with guidance as an input\)"),
    ):
        with pytest.raises(ValueError, match=message):
            distill(tiny.sd(**changes), data, tmp_path / "out", DistillOptions(), quiet)
    pipe = tiny.sd()
    lora = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.randn(2, 32, 1, 1),
            "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.randn(32, 2, 1, 1)}  # fmt: skip
    pipe.load_lora_weights(lora)
    with pytest.raises(ValueError, match="The pipeline has LoRAs; unload them"):
        distill(pipe, data, tmp_path / "out", DistillOptions(), quiet)


def test_bad_places_are_refused(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("")
    for output, message in ((other, "holds something else than a training"), (other / "thesis.tex", "is a file")):
        with pytest.raises(ValueError, match=message):
            distill(tiny.sd(), data, output, DistillOptions(), quiet)
    assert [file.name for file in other.iterdir()] == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        distill(tiny.sd(), tmp_path / "empty", tmp_path / "out", DistillOptions(), quiet)
    with pytest.raises(FileNotFoundError):
        distill("no/such-model", data, tmp_path / "out", DistillOptions(), quiet)
    with pytest.raises(RuntimeError, match="There is no 'cuda' device here"):
        distill(tiny.sd(), data, tmp_path / "out", DistillOptions(device="cuda"), quiet)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (DistillOptions, {"steps": 0}, "steps is 0; it must be at least 1"),
        (DistillOptions, {"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
        (DistillOptions, {"precision": "fp8"}, "precision is 'fp8'; it must be one of fp32, bf16, fp16"),
        (DistillOptions, {"schedule": "linear"}, "schedule is 'linear'; it must be one of constant, cosine"),
        (DistillOptions, {"guidance": (0.5, 3.0)}, "guidance is 0.5 to 3.0; it must be 1 <= low <= high"),
        (DistillOptions, {"guidance": (5.0, 3.0)}, "guidance is 5.0 to 3.0"),
        (DistillOptions, {"ema_decay": 1.5}, "ema_decay is 1.5; it must be between 0 and 1"),
        (DistillOptions, {"ema_target": True}, "ema_target needs averaged weights; give ema_decay"),
        (DistillOptions, {"warmup": 10, "steps": 10}, "warmup is 10 of 10 steps; it must be less than steps"),
        (DistillOptions, {"betas": (0.9, 1.0)}, "betas are"),
        (DistillOptions, {"targets": ()}, "targets is empty"),
        (LoraOptions, {"min_snr_gamma": 0.0}, "min_snr_gamma is 0"),
        (LoraOptions, {"caption_dropout": -0.1}, "caption_dropout is -0.1"),
        (LoraOptions, {"text_targets": ("q_proj",)}, "text_targets has no effect without train_text_encoder"),
        (LoraOptions, {"layout": "diffusers"}, "layout is 'diffusers'; it must be one of kohya, peft"),
    ],
)
def test_bad_options_are_refused(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**values)


def test_a_checkpoint_of_another_training_is_refused_before_anything_is_encoded(
    data: Path, examples: dict[str, Examples], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fourstroke.train import entry

    distill(tiny.sd(), examples["sd"], tmp_path, DistillOptions(**QUICK), quiet)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entry, "encode_examples", refuse)
        with pytest.raises(ValueError, match=r"of another training: seed was 0 and is 1\. Give the same"):
            distill(tiny.sd(), data, tmp_path, DistillOptions(**QUICK, seed=1), quiet)
        other = tiny.sd()
        other.unet.conv_in.weight.data += 1
        with pytest.raises(ValueError, match="of another training: model was"):
            distill(other, data, tmp_path, DistillOptions(**QUICK), quiet)
    (tmp_path / "more").mkdir()
    tiny.picture(7).save(tmp_path / "more" / "fox.png")
    with pytest.raises(ValueError, match="of another training: data was .'4 examples"):
        distill(tiny.sd(), tmp_path / "more", tmp_path, DistillOptions(**QUICK, caption="fox"), quiet)


# Processes.


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_killed_process_goes_on_to_the_bit(data: Path, tmp_path: Path) -> None:
    """Signal 9 in the middle of a write."""
    options = {**QUICK, "steps": 5, "save_every": 2, "ema_decay": 0.9, "schedule": "cosine"}
    ended = run("-m", "tests.train.worker", str(data), str(tmp_path / "killed"), json.dumps(options), "kill")
    assert ended.returncode == -9, ended.stderr
    left = [file.name for file in (tmp_path / "killed").glob(".checkpoint.*")]
    assert len(left) == 1
    resumed = distill(tiny.sd(), data, tmp_path / "killed", DistillOptions(**options), quiet)
    whole = distill(tiny.sd(), data, tmp_path / "whole", DistillOptions(**options), quiet)
    ours, theirs = load_file(resumed), load_file(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not list((tmp_path / "killed").glob(".checkpoint.*"))
    rows = [[row[:3] for row in table(tmp_path / name / "metrics.csv")] for name in ("killed", "whole")]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_two_processes_do_what_one_does_that_accumulates_twice(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    options = {**QUICK, "device": "cpu"}
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tests.train.worker")
    ended = run(*command, str(data), str(tmp_path / "two"), json.dumps(options))
    assert ended.returncode == 0, ended.stderr
    one = distill(tiny.sd(), data, tmp_path / "one", DistillOptions(**options, gradient_accumulation=2), quiet)
    ours, theirs = load_file(tmp_path / "two" / one.name), load_file(one)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-4)
    rows = [table(tmp_path / name / "metrics.csv")[1:] for name in ("two", "one")]
    assert [row[0] for row in rows[0]] == ["1", "2", "3", "4"]
    for two, single in zip(*rows, strict=True):
        assert float(two[1]) == pytest.approx(float(single[1]), rel=1e-3)
