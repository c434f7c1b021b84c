"""``fourstroke generate`` with pictures: start pictures, masks, controls, image prompts, animations."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
import torch
from safetensors.torch import save_file

from fourstroke import Control, ControlNetModel, Engine, GenerateRequest, T2IAdapter, Windows, utils
from fourstroke.cli import pictures

from . import tiny, tinyhub
from .test_cli_generate import (  # noqa: F401 - fixtures
    assert_one_line,
    chunks,
    generate,
    here,
    parse_parameters,
    paths_of,
    pixels,
    run,
)
from .tiny import picture

EMOJI_SIZE = 128


def scene(size: tuple[int, int] = (32, 32)) -> PIL.Image.Image:
    """A bright disc on a grey ground."""
    image = PIL.Image.new("RGB", size, (90, 100, 120))
    PIL.ImageDraw.Draw(image).ellipse((size[0] // 4, size[1] // 4, size[0] * 3 // 4, size[1] * 3 // 4), fill="orange")
    return image


def mask(size: tuple[int, int] = (32, 32)) -> PIL.Image.Image:
    image = PIL.Image.new("L", size)
    image.paste(255, (size[0] // 2, 0, *size))
    return image


@pytest.fixture
def files(here: Path) -> Path:  # noqa: F811
    """What the commands of these tests name."""
    scene().save(here / "photo.png")
    picture(5).save(here / "other.png")
    mask().save(here / "mask.png")
    edges = PIL.Image.fromarray(cv2.Canny(np.asarray(scene((64, 64))), 100, 200)).convert("RGB")
    edges.save(here / "edges.png")
    frames = [picture(i) for i in range(6)]
    frames[0].save(here / "clip.gif", save_all=True, append_images=frames[1:], duration=100, loop=0)
    return here


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[GenerateRequest]]:
    """The requests that reach the engine."""
    found: list[GenerateRequest] = []
    original = Engine.generate

    def spy(self: Engine, request: GenerateRequest, **options: Any) -> Any:
        found.append(request)
        return original(self, request, **options)

    monkeypatch.setattr(Engine, "generate", spy)
    yield found


def settings_in(path: Path) -> dict[str, Any]:
    return json.loads(chunks(path)["fourstroke"])


def array(image: Any) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


# Start pictures and masks


def test_the_emoji_model_repaints_the_more_the_stronger(here: Path) -> None:  # noqa: F811
    run("generate", "a red fox", "--seed", "4", "-o", "fox.png")
    start = pixels(here / "fox.png")
    distances = []
    for strength in ("0.1", "0.4", "0.95"):
        run(
            "generate",
            "a cat",
            "--image",
            "fox.png",
            "--strength",
            strength,
            "--num",
            "3",
            "--seed",
            "1",
            "-o",
            "x.png",
        )
        distances.append(np.mean([abs(pixels(here / f"x-{i}.png") - start).mean() for i in (1, 2, 3)]))
    # At a tenth most of the picture is left; at the end it is another.
    assert distances[0] < 0.7 * distances[2]
    assert distances == sorted(distances)
    assert settings_in(here / "x-1.png")["image"] == "fox.png"
    assert parse_parameters(chunks(here / "x-1.png")["parameters"])["Denoising strength"] == "0.95"


def test_the_emoji_model_paints_what_is_masked_and_keeps_the_rest(here: Path) -> None:  # noqa: F811
    run("generate", "a red fox", "--seed", "4", "-o", "fox.png")
    mask((EMOJI_SIZE, EMOJI_SIZE)).save(here / "mask.png")
    run("generate", "a green apple", "--image", "fox.png", "--mask", "mask.png", "--seed", "1", "-o", "x.png")
    change = abs(pixels(here / "x.png") - pixels(here / "fox.png")).mean(axis=-1)
    kept, painted = change[:, :48], change[:, 64:]
    assert kept.mean() < 8 < painted.mean()
    settings = settings_in(here / "x.png")
    assert settings["mask_image"] == "mask.png" and settings["strength"] == 1.0


def test_a_mask_s_surroundings_are_painted_into_the_whole_picture(here: Path) -> None:  # noqa: F811
    run("generate", "a red fox", "--seed", "4", "-o", "fox.png")
    large = utils.load_image("fox.png").resize((400, 300))
    large.save("large.png")
    small = PIL.Image.new("L", (400, 300))
    small.paste(255, (200, 150, 260, 210))
    small.save("mask.png")
    options = ("--image", "large.png", "--mask", "mask.png", "--mask-crop", "16", "--seed", "1", "-o", "x.png")
    result = run("generate", "a green apple", *options)
    assert result.stderr.startswith("note: large.png has 400x300 pixels, and emoji is made for 128x128: it is painted")
    change = abs(pixels(here / "x.png") - array(large)).max(axis=-1)
    assert change.shape == (300, 400)
    outside = np.asarray(small) == 0
    assert change[outside].max() == 0 and change[~outside].mean() > 10


def test_pictures_reach_the_request(sd15: str, files: Path, seen: list[GenerateRequest]) -> None:
    generate(sd15, "--image", "photo.png", "--mask", "mask.png", "--strength", "0.7", "--seed", "1", "-o", "x.png")
    (request,) = seen
    np.testing.assert_array_equal(array(request.image), array(scene()))
    np.testing.assert_array_equal(array(request.mask_image), array(mask()))
    assert request.strength == 0.7 and request.strength_mode == "noise" and (request.height, request.width) == (32, 32)
    expected = Engine(sd15).generate(request).images[0]
    np.testing.assert_array_equal(pixels(files / "x.png"), array(expected))


@pytest.mark.parametrize(
    ("size", "options", "painted", "noted"),
    [
        ((36, 30), (), (32, 24), False),
        ((120, 60), (), (40, 16), True),
        ((120, 60), ("--size", "48x32"), (48, 32), False),
        ((120, 60), ("--width", "64"), (64, 32), False),
        ((120, 60), ("--height", "64"), (128, 64), False),
        ((12, 12), (), (32, 32), True),
    ],
)
def test_the_size_follows_the_picture(
    sd15: str, files: Path, size: tuple[int, int], options: tuple[str, ...], painted: tuple[int, int], noted: bool
) -> None:
    scene(size).save(files / "start.png")
    result = generate(sd15, "--image", "start.png", "-o", "x.png", *options)
    assert pixels(files / "x.png").shape == (painted[1], painted[0], 3)
    assert ("it is painted at" in result.stderr) == noted


# Controls


def expected_with(model: str, **fields: Any) -> np.ndarray:
    """What the engine makes of the request that a command should come to."""
    request = GenerateRequest(**{"prompt": "a red fox", "num_inference_steps": 2, "seed": 1, **fields})
    return array(Engine(model).generate(request).images[0])


def test_edges_of_a_photo_steer_the_picture(sd15: str, files: Path) -> None:
    generate(sd15, "--seed", "1", "--control", "canny:photo.png:0.8", "-o", "x.png")
    edges = PIL.Image.fromarray(cv2.Canny(np.asarray(scene()), 100, 200)).convert("RGB")
    sized = {"height": 32, "width": 32}
    expected = expected_with(sd15, controls=[Control(edges, 0.8, model="canny")], **sized)
    np.testing.assert_array_equal(pixels(files / "x.png"), expected)
    assert abs(expected - expected_with(sd15, controls=[Control(scene(), 0.8, model="canny")], **sized)).mean() > 0.2
    assert settings_in(files / "x.png")["controls"] == [
        {"model": "canny", "picture": "photo.png", "scale": 0.8, "detector": "canny"}
    ]
    parameters = parse_parameters(chunks(files / "x.png")["parameters"])
    assert json.loads(parameters["ControlNet 0"]) == "Module: canny, Model: canny, Weight: 0.8"


def test_edges_are_drawn_at_the_size_that_is_painted(sd15: str, files: Path, seen: list[GenerateRequest]) -> None:
    scene((640, 320)).save(files / "large.png")
    generate(sd15, "--control", "canny:large.png", "--size", "64x32")
    drawn = PIL.Image.fromarray(cv2.Canny(np.asarray(scene((640, 320)).resize((64, 32))), 100, 200))
    np.testing.assert_array_equal(array(seen[0].controls[0].image), array(drawn.convert("RGB")))


@pytest.mark.parametrize(
    ("picture", "options", "drawn", "noted"),
    [
        ("photo.png", (), True, False),
        ("photo.png", ("--no-detect",), False, False),
        ("edges.png", (), False, True),
        ("edges.png", ("--no-detect",), False, False),
        ("edges.png", ("--detect",), True, False),
    ],
)
def test_a_drawing_is_not_drawn_again(
    sd15: str,
    files: Path,
    seen: list[GenerateRequest],
    picture: str,
    options: tuple[str, ...],
    drawn: bool,
    noted: bool,
) -> None:
    result = generate(sd15, "--size", "64", "--adapter", f"canny:{picture}", *options)
    source = utils.load_image(picture)
    edges = PIL.Image.fromarray(cv2.Canny(np.asarray(source.resize((64, 64))), 100, 200)).convert("RGB")
    np.testing.assert_array_equal(array(seen[0].adapters[0].image), array(edges if drawn else source))
    assert ("is white on black already" in result.stderr) == noted


def test_what_is_a_drawing() -> None:
    edges = PIL.Image.fromarray(cv2.Canny(np.asarray(scene((64, 64))), 100, 200))
    assert pictures.is_drawing(edges) and pictures.is_drawing(edges.resize((100, 90)))
    inverted = PIL.Image.fromarray(255 - np.asarray(edges))
    for photo in (scene(), inverted, scene().convert("L"), picture(1), PIL.Image.new("RGB", (9, 9), "blue")):
        assert not pictures.is_drawing(photo)


def test_several_networks_in_their_order_and_from_anywhere(sd15: str, files: Path, seen: list[GenerateRequest]) -> None:
    ControlNetModel.from_pretrained(tinyhub.DEPTH).save_pretrained(files / "net")
    T2IAdapter.from_pretrained(tinyhub.T2I_CANNY).save_pretrained(files / "t2i")
    generate(
        sd15, "--control", "./net:photo.png:0.5", "--control", f"{tinyhub.CANNY}:other.png", "--adapter",
        "./t2i:other.png:0.7", "--ip-image", "photo.png:0.4", "--ip-image", "other.png", "--ip-adapter", "plus-face",
        "--lora", f"{tinyhub.LCM_LORA}:0.9", "--seed", "1", "-o", "x.png",
    )  # fmt: skip
    (request,) = seen
    assert [(control.model, control.scale) for control in request.controls] == [("./net", 0.5), (tinyhub.CANNY, 1.0)]
    assert [(control.model, control.scale) for control in request.adapters] == [("./t2i", 0.7)]
    prompts = request.ip_adapter_image
    assert [(control.model, control.scale) for control in prompts] == [("plus-face", 0.4), ("plus-face", 1.0)]
    for control, place in zip((*request.controls, *request.adapters), ("photo", "other", "other"), strict=True):
        np.testing.assert_array_equal(array(control.image), array(utils.load_image(f"{place}.png")))
    settings = settings_in(files / "x.png")
    assert settings["adapters"] == [{"model": "./t2i", "picture": "other.png", "scale": 0.7}]
    assert settings["ip_adapter_image"][0] == {"model": "plus-face", "picture": "photo.png", "scale": 0.4}
    assert settings["loras"] == [{"name": tinyhub.LCM_LORA, "weight": 0.9}]
    plain = pixels(paths_of(generate(sd15, "--seed", "1", "--lora", f"{tinyhub.LCM_LORA}:0.9"))[0])
    assert abs(pixels(files / "x.png") - plain).mean() > 0.2


# Animations


def frames_of(path: Path) -> tuple[list[np.ndarray], float]:
    frames, fps = utils.load_video(path, return_fps=True)
    return [array(frame) for frame in frames], fps  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.mp4", "X.GIF"])
def test_frames_become_an_animation(sd15: str, files: Path, name: str) -> None:
    result = generate(sd15, "--frames", "4", "--fps", "5", "--seed", "1", "-o", name)
    assert result.stdout == f"{name}\n" and result.stderr == ""
    frames, fps = frames_of(files / name)
    assert len(frames) == 4 and frames[0].shape == (32, 32, 3) and fps == pytest.approx(5)
    request = GenerateRequest(prompt="a red fox", num_frames=4, num_inference_steps=2, seed=1)
    expected = Engine(sd15).generate(request).images[0]
    distance = np.mean([abs(frame - array(image)).mean() for frame, image in zip(frames, expected, strict=True)])
    assert distance < 25  # 256 colours, or a lossy format


def test_animations_have_names_and_numbers_as_pictures_do(sd15: str, files: Path) -> None:
    told = json.loads(generate(sd15, "--frames", "2", "--num", "2", "--seed", "8", "--json").stdout)
    assert told["paths"] == ["a-red-fox-8.gif", "a-red-fox-9.gif"] and told["grid"] is None
    assert told["seeds"] == [8, 9]
    settings = told["settings"]
    assert (settings["num_frames"], settings["fps"], settings["motion"]) == (2, 10.0, tinyhub.MOTION)
    assert "windows" not in settings and settings["width"] == 32
    both = [frames_of(files / path)[0] for path in told["paths"]]
    assert abs(both[0][0] - both[1][0]).mean() > 1


def test_windows(sd15: str, files: Path, seen: list[GenerateRequest]) -> None:
    told = json.loads(generate(sd15, "--frames", "10", "--window-length", "6", "--json").stdout)
    assert seen[0].windows == Windows(6, 4) and told["settings"]["windows"] == [6, 4]
    assert len(frames_of(Path(told["paths"][0]))[0]) == 10
    generate(sd15, "--frames", "10", "--window-length", "3", "--steps", "1")
    assert seen[1].windows == Windows(3, 3)
    result = generate(sd15, "--frames", "30", "--windows", code=2)
    assert_one_line(result, "16 frames at a time", "trained on at most 8", "(--window-length 8)")


def test_a_video_is_repainted_frame_by_frame(sd15: str, files: Path, seen: list[GenerateRequest]) -> None:
    generate(
        sd15, "--frames", "4", "--image", "clip.gif", "--strength", "0.5", "--control", f"{tinyhub.CANNY}:clip.gif",
        "--control", "depth:photo.png", "--no-detect", "-o", "x.gif",
    )  # fmt: skip
    (request,) = seen
    assert len(request.image) == len(request.controls[0].image) == 4
    assert isinstance(request.controls[1].image, PIL.Image.Image)
    for i, frame in enumerate(request.image):
        assert abs(array(frame) - array(picture(i))).mean() < 12
    assert len(frames_of(files / "x.gif")[0]) == 4
    result = generate(sd15, "--frames", "8", "--image", "clip.gif", code=2)
    assert_one_line(result, "--image clip.gif has 6 frames, but --frames is 8")
    generate(sd15, "--image", "clip.gif", "-o", "still.png")
    assert isinstance(seen[1].image, PIL.Image.Image)


def test_edges_of_each_frame(sd15: str, files: Path, seen: list[GenerateRequest]) -> None:
    generate(sd15, "--frames", "2", "--adapter", "canny:clip.gif", "-o", "x.gif")
    for i, frame in enumerate(seen[0].adapters[0].image):
        source = array(utils.load_video("clip.gif")[i]).astype(np.uint8)
        np.testing.assert_array_equal(array(frame)[..., 0], cv2.Canny(source, 100, 200))


def test_a_preview_shows_the_middle_of_an_animation(sd15: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verb = importlib.import_module("fourstroke.cli.generate")
    shown: list[Any] = []
    screen = SimpleNamespace(show=shown.append)
    monkeypatch.setattr(verb, "open_preview", lambda engine, console: (screen, lambda latents: latents))
    generate(sd15, "--frames", "5", "--num", "2", "-o", "x.gif")
    assert [latents.shape for latents in shown[:-1]] == [(2, 4, 4, 4)] * 2
    frames = [frames_of(files / f"x-{i}.gif")[0] for i in (1, 2)]
    for image, own in zip(shown[-1], frames, strict=True):
        distances = [abs(array(image) - frame).mean() for frame in own]
        assert min(distances) == distances[2]


# What is wrong


def write_lora_of(width: int, path: Path) -> None:
    module = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    rank = {"lora_down.weight": torch.ones(4, width), "lora_up.weight": torch.ones(640, 4)}
    save_file({f"{module}.{role}": tensor for role, tensor in rank.items()}, path)


WRONG: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("--image", "photo.png", "--mask", "wide.png"), ("--mask is 40x32 and --image 32x32 pixels; resize one",)),
    (("--mask", "mask.png"), ("--mask is given without a picture; pass --image as well.",)),
    (("--image", "photo.png", "--mask-crop", "8"), ("--mask-crop is given without a mask; pass --mask as well.",)),
    (("--image", "nowhere.png"), ("--image: There is no picture 'nowhere.png'; give the path of a file or a URL.",)),
    (("--image", "text.png"), ("--image: text.png cannot be read as a picture: it is in no format",)),
    (("--image", "cut.png"), ("--image: cut.png cannot be read as a picture",)),
    (("--image", "bomb.png"), ("--image: bomb.png cannot be read as a picture", "decompression bomb")),
    (("--image", "photo.png", "--mask", "bomb.png"), ("--mask: bomb.png", "decompression bomb")),
    (("--image", "https://x.invalid/a.png", "--offline"), ("--offline leaves alone; give a file",)),
    (("--image", "photo.png", "--strength", "1.5"), ("--strength is 1.5; it must be a number from 0 to 1.",)),
    (("--image", "photo.png", "--strength", "-0.1"), ("--strength is -0.1; it must be",)),
    (("--image", "photo.png", "--strength", "nan"), ("--strength is nan; it must be",)),
    (("--strength", "0.5"), ("--strength has no effect without --image.",)),
    (("--image", "photo.png", "--size", "100"), ("--size is 100; it must be a multiple of 8",)),
    (("--control", "canny"), ("--control 'canny': write NAME:PICTURE or NAME:PICTURE:SCALE, such as canny:photo",)),
    (("--control", "photo.png:0.8"), ("--control 'photo.png:0.8': write NAME:PICTURE",)),
    (("--control", "canny:nowhere.png"), ("--control: There is no picture 'nowhere.png'",)),
    (("--control", "canny:photo.png:much"), ("--control 'photo.png:much': 'much' is not a number",)),
    (("--control", "canny:photo.png:inf"), ("--control 'photo.png:inf': 'inf' is not a number",)),
    (("--control", "cany:photo.png"), ("no ControlNet 'cany' for SD 1.5; there are canny, depth, pose, lineart.",)),
    (("--adapter", "lines:photo.png"), ("no T2I-Adapter 'lines' for SD 1.5; there are canny, depth, pose, sketch.",)),
    (("--control", "pose:photo.png", "--no-detect"), ("ControlNet lllyasviel/control_v11p_sd15_openpose", "Go online")),
    (("--ip-adapter", "plus"), ("--ip-adapter has no effect without --ip-image.",)),
    (("--ip-image", "photo.png", "--ip-adapter", "x"), ("no IP-Adapter 'x' for SD 1.5; there are base, plus,",)),
    (("--detect",), ("--detect has no effect without --control or --adapter.",)),
    (("--fps", "5"), ("--fps has no effect without --frames.",)),
    (("--windows",), ("--windows has no effect without --frames.",)),
    (("--frames", "0"), ("--frames is 0; it must be at least 1.",)),
    (("--frames", "2", "--window-length", "0"), ("Windows of 0 frames",)),
    (("--frames", "2", "--fps", "0"), ("'--fps'", "it should be greater than or equal to 0.1. See")),
    (("--frames", "24"), ("24 frames at a time", "at most 8: ask for fewer", "--window-length 8")),
    (("--frames", "2", "-o", "x.png"), ("animations are written as .gif, .webp, .mp4", "not .png")),
    (("-o", "x.gif"), ("not .gif. --frames makes an animation.",)),
    (
        ("--lora", "xl.safetensors"),
        ("it was made for SDXL or SSD-1B, the model is SD 1.5; use a LoRA of the model's family",),
    ),
    (("--device", "cuda:99"), ("--device is 'cuda:99', but there is no such device here; use --device cpu.",)),
    (("--frames", "2", "--motion", "no/where"), ("Motion adapter no/where", "not in the cache")),
    (("--strenght", "0.5"), ("There is no option --strenght. Did you mean '--strength'?",)),
    (("--controlnet", "x"), ("There is no option --controlnet. Did you mean '--control'?",)),
]


@pytest.mark.parametrize(("arguments", "fragments"), WRONG, ids=lambda value: " ".join(value)[:48])
def test_wrong_input_is_one_line_and_no_file(
    sd15: str, files: Path, arguments: tuple[str, ...], fragments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    mask((40, 32)).save(files / "wide.png")
    (files / "text.png").write_text("no picture")
    data = (files / "other.png").read_bytes()
    (files / "cut.png").write_bytes(data[: len(data) // 2])
    PIL.Image.new("1", (3000, 3000)).save(files / "bomb.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 5_000_000)
    write_lora_of(2048, files / "xl.safetensors")
    before = sorted(files.rglob("*"))
    assert_one_line(generate(sd15, *arguments, code=2), *fragments)
    assert sorted(files.rglob("*")) == before


EARLY = [
    *(("--image", "photo.png", "--mask", "wide.png"), ("--image", "nowhere.png"), ("--control", "canny:nowhere.png")),
    *(("--control", "cany:photo.png"), ("--lora", "xl.safetensors"), ("--image", "photo.png", "--strength", "2")),
    *(("--device", "cuda:99"), ("--frames", "0"), ("--frames", "2", "-o", "x.png"), ("--lora", "no/where")),
]


@pytest.mark.parametrize("arguments", EARLY, ids=" ".join)
def test_most_of_it_is_seen_before_the_model_is_loaded(
    sd15: str, files: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    mask((40, 32)).save(files / "wide.png")
    write_lora_of(2048, files / "xl.safetensors")
    monkeypatch.setattr("fourstroke.engine.load_pipeline", lambda *args, **options: pytest.fail("a model was loaded"))
    assert_one_line(generate(sd15, *arguments, code=2))


def test_a_missing_library_is_told_before_the_model_is_loaded(
    sd15: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fourstroke.engine.load_pipeline", lambda *args, **options: pytest.fail("a model was loaded"))
    monkeypatch.setitem(sys.modules, "controlnet_aux", None)
    result = generate(sd15, "--control", "depth:photo.png", code=2)
    assert_one_line(result, "--control: depth needs controlnet-aux: pip install", "give --no-detect.")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = generate(sd15, "--frames", "2", "-o", "x.mp4", code=2)
    assert_one_line(result, "--output x.mp4: videos need PyAV", ".gif and .webp work without it.")


def test_a_long_prompt_is_cut_and_that_is_told(sd15: str, files: Path) -> None:
    result = generate(sd15, "-o", "x.png", prompt="z" * 80)
    assert (
        result.stderr.startswith("note: CLIP reads at most 75 tokens, and the prompt has 80")
        and "zzzzz" in result.stderr
    )


def test_float16_on_a_cpu_runs_as_float32(sd15: str, files: Path) -> None:
    result = generate(sd15, "--dtype", "fp16", "--device", "cpu", "-o", "x.png")
    assert result.stderr == "note: float16 is for GPUs: float32 runs on the CPU instead.\n"
    assert settings_in(files / "x.png")["dtype"] == "float32"


def test_a_known_few_step_lora_brings_its_settings_unless_they_are_typed(
    sd15: str, files: Path, seen: list[GenerateRequest]
) -> None:
    tinyhub.lora(tiny.sd(cross_attention_dim=768).unet, files / "Hyper-SD15-8steps-lora.safetensors", scale=0.02)
    lora = ("--lora", "Hyper-SD15-8steps-lora.safetensors")
    run("generate", "fox", "--model", sd15, *lora, "-o", "x.png")
    settings = settings_in(files / "x.png")
    assert seen[0].num_inference_steps == settings["num_inference_steps"] == 8
    assert settings["scheduler"] == "DDIMScheduler"
    assert settings["scheduler_options"] == {"timestep_spacing": "trailing"}
    run("generate", "fox", "--model", sd15, *lora, "--steps", "4", "--scheduler", "euler", "-o", "x.png")
    assert seen[1].num_inference_steps == 4 and settings_in(files / "x.png")["scheduler"] == "EulerDiscreteScheduler"
