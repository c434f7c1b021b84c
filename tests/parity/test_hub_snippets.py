"""Whole pictures under both libraries: the guide's snippets, every kind of model, every LoRA dialect.

Both libraries read the same files of one fake hub from huggingface_hub's cache. A second group of tests guards the
first: what it compares would change if a condition were left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageSequence
import pytest
import torch

from .. import fakehub
from ..fakehub import ANIMAGINE, DREAMSHAPER_LCM, SD15, SD21, SSD1B, XL
from .guide import SNIPPETS, for_library
from .pictures import (
    EFFECT,
    LIBRARIES,
    LORAS,
    NEGATIVE,
    OTHER_PROMPT,
    PROMPT,
    assert_same_pictures,
    both,
    hole,
    load,
    paint,
    shapes,
)

# What the peer says about itself and about the snippet's own words; none of it is ours.
pytestmark = [
    pytest.mark.usefixtures("peer_without_words"),
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:peft"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]


# The guide


# The picture on the web -> what lies in its place.
DATASET = "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/diffusers"
PICTURES = {
    f"{DATASET}/img2img-init.png": shapes(1),
    "https://hf.co/datasets/huggingface/documentation-images/resolve/main/diffusers/input_image_vermeer.png": shapes(2),
    "https://huggingface.co/Adapter/t2iadapter/resolve/main/figs_SDXLV1.0/org_canny.jpg": shapes(3),
    f"{DATASET}/inpaint.png": shapes(4),
    f"{DATASET}/inpaint_mask.png": hole(),
}
# Pictures of 512 and 1024 pixels: once is enough.
LARGE = ("controlnet", "t2i-adapter")
RUNS = [(form, name) for name in SNIPPETS for form in fakehub.FORMS if form == "old" or name not in LARGE]
# What a snippet makes ours say, where the peer is silent.
WARNINGS = {"t2i-adapter": "varient", "inpainting": "guidance_scale is 4"}


def run_snippet(snippet: str, library: str, folder: Path) -> dict[str, Any]:
    """The variables that a snippet leaves, run in ``folder``."""
    files = {}
    for i, (url, picture) in enumerate(PICTURES.items()):
        files[url] = str(folder / f"{i}.png")
        picture.save(files[url])
    module = __import__(f"{library}.utils", fromlist=["make_image_grid"])
    # Two snippets go on from the imports of others.
    names: dict[str, Any] = {"torch": torch, "make_image_grid": module.make_image_grid}
    code = compile(for_library(SNIPPETS[snippet], library, files), f"{snippet} ({library})", "exec")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(code, names)
    if library == "fourstroke":
        expected = WARNINGS.get(snippet)
        assert [expected in str(warning.message) for warning in caught] == [True] * (expected is not None)
    return names


def read_gif(path: Path) -> tuple[np.ndarray, list[int], int]:
    """(F, H, W, 3) in [0, 1], each frame's milliseconds, and how often it plays (0: for ever)."""
    with PIL.Image.open(path) as gif:
        frames = [(frame.convert("RGB"), frame.info["duration"]) for frame in PIL.ImageSequence.Iterator(gif)]
        return np.stack([frame for frame, _ in frames]) / 255, [time for _, time in frames], gif.info["loop"]


@pytest.mark.parametrize(("form", "snippet"), RUNS, indirect=["form"])
def test_snippet(snippet: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = {}
    for library in LIBRARIES:
        folder = tmp_path / library
        folder.mkdir()
        monkeypatch.chdir(folder)
        left[library] = run_snippet(snippet, library, folder)
    ours, theirs = (
        np.stack([np.asarray(picture) for picture in names.get("frames") or [names["image"]]]) / 255
        for names in left.values()
    )
    assert_same_pictures(ours, theirs)
    if snippet != "animatediff":
        return
    for library, names in left.items():
        frames, durations, loop = read_gif(tmp_path / library / "animation.gif")
        assert (len(frames), durations, loop) == (24, [100] * 24, 0)
        # GIF's palettes turn over where one value is one off; of the same frames the two write the same file.
        other = left["diffusers" if library == "fourstroke" else "fourstroke"]["export_to_gif"]
        again = other(names["frames"], str(tmp_path / f"{library}.gif"))
        assert Path(again).read_bytes() == (tmp_path / library / "animation.gif").read_bytes()


# Every kind of model, in both forms, with its LCM-LoRA and with its own scheduler


@pytest.mark.parametrize("name", [SD15, XL, SSD1B])
def test_lcm_lora(name: str, form: str) -> None:
    assert_same_pictures(*both(name, setup={"lora": LORAS[name]}))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_full_lcm(form: str, variant: str | None) -> None:
    assert_same_pictures(*both(DREAMSHAPER_LCM, setup={"variant": variant, "lcm": False}, guidance_scale=8.5))


def test_v_prediction(form: str) -> None:
    """SD 2.1 with its own DDIM and guidance, and with LCM's steps."""
    assert_same_pictures(*both(SD21, setup={"lcm": False}, guidance_scale=7.5, num_inference_steps=5))
    assert_same_pictures(*both(SD21))


@pytest.mark.parametrize("name", [XL, ANIMAGINE])
def test_own_scheduler(name: str, hub: Path) -> None:
    """SDXL's Euler with the defaults of diffusers' call."""
    ours, theirs = both(name, setup={"lcm": False}, guidance_scale=5.0, num_inference_steps=5)
    assert_same_pictures(ours, theirs)


def test_defaults_of_the_call(hub: Path) -> None:
    """Nothing but the prompt and the generator: 50 steps, guidance 7.5."""
    pictures = []
    for library, module in LIBRARIES.items():
        pipe = load(library, SD15, lcm=False)
        pipe.scheduler = module.DDIMScheduler.from_config(pipe.scheduler.config)
        pictures.append(pipe(PROMPT, generator=torch.manual_seed(0), output_type="np").images)
    assert_same_pictures(*pictures)


# LoRA dialects


@pytest.mark.parametrize("dialect", fakehub.DIALECTS)
@pytest.mark.parametrize("name", [SD15, XL, SSD1B])
def test_dialects_of_the_lcm_lora(dialect: str, name: str, hub: Path, tmp_path: Path) -> None:
    state = fakehub.DIALECTS[dialect](fakehub.lcm_lora(hub, name))
    file = fakehub.write_lora(tmp_path, state)
    pipes = {library: load(library, name) for library in LIBRARIES}
    for pipe in pipes.values():
        pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    ours, theirs = (paint(pipe) for pipe in pipes.values())
    assert_same_pictures(ours, theirs)
    published = paint(load("fourstroke", name, lora=LORAS[name]))
    assert np.abs(ours - published).max() <= 1 / 255, "every dialect says the same"


def test_lora_scale(hub: Path) -> None:
    setup = {"lora": LORAS[SD15]}
    assert_same_pictures(*both(SD15, setup=setup, cross_attention_kwargs={"scale": 0.4}))


def test_lora_comes_and_goes(hub: Path) -> None:
    """Load, weigh, fuse, unload: after each step the pictures are the peer's."""
    pipes = [load(library, XL, lora=LORAS[XL]) for library in LIBRARIES]
    plain = paint(load("fourstroke", XL))
    for pipe in pipes:
        pipe.set_adapters(pipe.get_active_adapters(), [0.6])
    assert_same_pictures(*(paint(pipe) for pipe in pipes))
    for pipe in pipes:
        pipe.fuse_lora(lora_scale=0.5)
    assert_same_pictures(*(paint(pipe) for pipe in pipes))
    for pipe in pipes:
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
    ours, theirs = (paint(pipe) for pipe in pipes)
    assert_same_pictures(ours, theirs)
    assert np.array_equal(ours, plain), "undone to the bit"


# Arguments of the call

CALLS: dict[str, dict[str, Any]] = {
    "guidance": {"guidance_scale": 1.5},
    "guidance and negative prompt": {"guidance_scale": 1.8, "negative_prompt": NEGATIVE},
    "empty negative prompt": {"guidance_scale": 1.8, "negative_prompt": ""},
    "negative prompt without guidance": {"negative_prompt": NEGATIVE},
    "guidance below one": {"guidance_scale": 0.5},
    "guidance rescale": {"guidance_scale": 2.0, "guidance_rescale": 0.7},
    "batch of prompts": {"prompt": [PROMPT, OTHER_PROMPT]},
    "images a prompt": {"num_images_per_prompt": 2},
    "batch times images, guided": {
        "prompt": [PROMPT, OTHER_PROMPT],
        "num_images_per_prompt": 2,
        "guidance_scale": 1.5,
        "negative_prompt": [NEGATIVE, ""],
    },
    "a generator a picture": {"prompt": [PROMPT, OTHER_PROMPT], "num_images_per_prompt": 2, "seed": [3, 1, 4, 5]},
    "one step": {"num_inference_steps": 1},
    "eight steps": {"num_inference_steps": 8},
    "custom timesteps": {"timesteps": [999, 679, 339]},
    "size": {"height": 48, "width": 80},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
@pytest.mark.parametrize("name", [SD15, XL])
def test_call(name: str, call: dict[str, Any], loaded: Callable[..., Any], hub: Path) -> None:
    assert_same_pictures(*both(name, setup={"lora": LORAS[name]}, loader=loaded, **call))


XL_CALLS: dict[str, dict[str, Any]] = {
    "clip skip": {"clip_skip": 1},
    "second prompt": {"prompt_2": OTHER_PROMPT},
    "second negative prompt": {"guidance_scale": 1.5, "negative_prompt": "night", "negative_prompt_2": "low quality"},
    "sizes": {"original_size": (96, 128), "crops_coords_top_left": (8, 16), "target_size": (64, 72)},
    "negative sizes": {
        "guidance_scale": 1.5,
        "negative_original_size": (32, 32),
        "negative_crops_coords_top_left": (4, 0),
        "negative_target_size": (96, 96),
    },
    "end of denoising": {"denoising_end": 0.3},
}


@pytest.mark.parametrize("call", XL_CALLS.values(), ids=list(XL_CALLS))
def test_xl_call(call: dict[str, Any], loaded: Callable[..., Any], hub: Path) -> None:
    assert_same_pictures(*both(XL, setup={"lora": LORAS[XL]}, loader=loaded, **call))


@pytest.mark.parametrize(
    "call", [CALLS["batch of prompts"], {"original_inference_steps": 10}, {"timesteps": [999, 499]}]
)
def test_full_lcm_call(call: dict[str, Any], loaded: Callable[..., Any], hub: Path) -> None:
    call = {"guidance_scale": 6.0, **call}
    assert_same_pictures(*both(DREAMSHAPER_LCM, setup={"lcm": False}, loader=loaded, **call))


@pytest.mark.parametrize("name", [SD15, XL])
def test_embeddings_in_place_of_prompts(name: str, hub: Path) -> None:
    """What `encode_prompt` of one library gives, the other one takes."""
    pipes = {library: load(library, name) for library in LIBRARIES}
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    encoded = [pipe.encode_prompt(PROMPT, negative_prompt=NEGATIVE, **options) for pipe in pipes.values()]
    for ours, theirs in zip(*encoded, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    given = dict(zip(names, encoded[0], strict=False))
    call = {"prompt": None, "guidance_scale": 1.5, **given}
    pictures = [paint(pipe, **call) for pipe in pipes.values()]
    assert_same_pictures(*pictures)
    assert_same_pictures(pictures[0], paint(pipes["diffusers"], guidance_scale=1.5, negative_prompt=NEGATIVE))


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_clip_skip(clip_skip: int, hub: Path) -> None:
    """diffusers 0.42 fails here with transformers 5, so its embeddings are made by hand."""
    ours, theirs = (load(library, SD15) for library in LIBRARIES)
    tokens = theirs.tokenizer(PROMPT, padding="max_length", max_length=77, return_tensors="pt")
    states = theirs.text_encoder(tokens.input_ids, output_hidden_states=True).hidden_states
    norm = dict(theirs.text_encoder.named_modules())["final_layer_norm"]
    embeds = norm(states[-1 - clip_skip]).detach()
    picture = paint(ours, clip_skip=clip_skip)
    assert_same_pictures(picture, paint(theirs, prompt=None, prompt_embeds=embeds))
    assert np.abs(picture - paint(ours)).mean() >= EFFECT


@pytest.mark.parametrize("output_type", ["pil", "pt", "latent"])
def test_output_types(output_type: str, hub: Path) -> None:
    ours, theirs = both(SD15, output_type=output_type)
    if output_type == "pil":
        difference = np.abs(np.asarray(ours[0], dtype=int) - np.asarray(theirs[0], dtype=int))
        assert type(ours[0]) is type(theirs[0]) and ours[0].size == theirs[0].size and difference.max() <= 2
    else:
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_given_latents(hub: Path) -> None:
    latents = torch.randn(1, 4, 8, 8)
    before = latents.clone()
    assert_same_pictures(*both(SD15, latents=latents))
    assert torch.equal(latents, before), "the caller's tensor is left alone"


@pytest.mark.parametrize("name", [SD15, XL])
def test_every_step(name: str, hub: Path) -> None:
    """The latents after each step, seen and changed by ``callback_on_step_end``."""
    seen: dict[str, list[tuple[int, int, torch.Tensor]]] = {}
    pictures = []
    for library in LIBRARIES:
        steps = seen.setdefault(library, [])

        def look(_pipe: Any, step: int, timestep: Any, tensors: dict[str, Any], steps: Any = steps) -> dict[str, Any]:
            assert set(tensors) == {"latents"}
            steps.append((step, int(timestep), tensors["latents"].clone()))
            return {"latents": tensors["latents"] * 0.9} if step == 1 else {}

        pictures.append(paint(load(library, name), callback_on_step_end=look))
    assert_same_pictures(*pictures)
    assert [step[:2] for step in seen["fourstroke"]] == [step[:2] for step in seen["diffusers"]]
    assert [step[1] for step in seen["fourstroke"]] == [999, 759, 499, 259]
    for ours, theirs in zip(seen["fourstroke"], seen["diffusers"], strict=True):
        torch.testing.assert_close(ours[2], theirs[2], rtol=1e-4, atol=1e-4)


def test_long_prompt_is_cut_as_the_peer_cuts_it(hub: Path) -> None:
    prompt = " ".join([PROMPT] * 20)
    with pytest.warns(UserWarning, match="CLIP reads at most 75 tokens"):
        ours = paint(load("fourstroke", SD15), prompt)
    assert_same_pictures(ours, paint(load("diffusers", SD15), prompt))


# Round trips


@pytest.mark.parametrize("name", [SD15, XL, DREAMSHAPER_LCM])
def test_the_peer_reads_what_is_saved(name: str, hub: Path, tmp_path: Path) -> None:
    pipe = load("fourstroke", name, lcm=False)
    pipe.save_pretrained(tmp_path)
    ours, theirs = (load(library, str(tmp_path)) for library in LIBRARIES)
    assert type(ours).__name__ == type(theirs).__name__ == type(pipe).__name__
    assert_same_pictures(paint(ours), paint(theirs))


def test_a_batch_is_its_pictures(hub: Path) -> None:
    """A picture depends on its own generator only, not on its neighbours."""
    pipe = load("fourstroke", SD15)
    together = paint(pipe, [PROMPT, OTHER_PROMPT], seed=[1, 2])
    alone = [paint(pipe, PROMPT, seed=1), paint(pipe, OTHER_PROMPT, seed=2)]
    assert_same_pictures(together, np.concatenate(alone))


# Guards: everything compared above has an effect

EFFECTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "prompt": (SD15, {}, {"prompt": OTHER_PROMPT}),
    "no prompt": (SD15, {}, {"prompt": ""}),
    "seed": (SD15, {}, {"seed": 1}),
    "steps": (SD15, {}, {"num_inference_steps": 8}),
    "timesteps": (SD15, {}, {"timesteps": [999, 679, 339]}),
    "guidance": (SD15, {}, {"guidance_scale": 1.5}),
    "negative prompt": (SD15, {"guidance_scale": 1.8}, {"guidance_scale": 1.8, "negative_prompt": NEGATIVE}),
    "clip skip": (XL, {}, {"clip_skip": 1}),
    "v-prediction's prompt": (SD21, {}, {"prompt": ""}),
    "XL prompt": (XL, {}, {"prompt": ""}),
    "XL second prompt": (XL, {}, {"prompt_2": OTHER_PROMPT}),
    "XL original size": (XL, {}, {"original_size": (96, 128)}),
    "XL crop": (XL, {}, {"crops_coords_top_left": (8, 16)}),
    "XL target size": (XL, {}, {"target_size": (96, 64)}),
    "XL zeros for no negative prompt": (XL, {"guidance_scale": 2.0}, {"guidance_scale": 2.0, "negative_prompt": ""}),
    "XL negative sizes": (
        XL,
        {"guidance_scale": 2.0},
        {"guidance_scale": 2.0, "negative_original_size": (32, 32), "negative_target_size": (96, 96)},
    ),
    "XL end": (XL, {}, {"denoising_end": 0.3}),
    "SSD-1B prompt": (SSD1B, {}, {"prompt": ""}),
    "LCM guidance embedding": (DREAMSHAPER_LCM, {"guidance_scale": 8.5}, {"guidance_scale": 4.0}),
    "LCM training grid": (DREAMSHAPER_LCM, {}, {"original_inference_steps": 10}),
}


@pytest.mark.parametrize("effect", EFFECTS)
def test_conditions_have_an_effect(effect: str, loaded: Callable[..., Any], hub: Path) -> None:
    name, one, other = EFFECTS[effect]
    pipe = loaded("diffusers", name)
    assert np.abs(paint(pipe, **one) - paint(pipe, **other)).mean() >= EFFECT


@pytest.mark.parametrize("name", LORAS)
def test_loras_have_an_effect(name: str, hub: Path) -> None:
    without, full = load("diffusers", name), load("diffusers", name, lora=LORAS[name])
    pictures = [paint(without), paint(full, cross_attention_kwargs={"scale": 0.4}), paint(full)]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert np.abs(pictures[one] - pictures[other]).mean() >= EFFECT


def test_every_layer_of_a_lora_has_an_effect(hub: Path, tmp_path: Path) -> None:
    """Each target group of the LCM-LoRA alone moves the picture."""
    lora = fakehub.lcm_lora(hub, SD15)
    plain = paint(load("diffusers", SD15))
    for group in (
        "attn1",
        "attn2",
        "ff.net",
        "proj_in",
        "proj_out",
        "conv1",
        "conv_shortcut",
        "samplers",
        "time_emb_proj",
    ):
        part = {name: pair for name, pair in lora.items() if group in name}
        assert part, group
        pipe = load("diffusers", SD15)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe.load_lora_weights(fakehub.kohya("lora_unet", part))
        assert np.abs(paint(pipe) - plain).mean() >= EFFECT, group


def test_hub_is_what_it_says(hubs: dict[str, Path]) -> None:
    """The two forms differ as published files do."""
    from safetensors import safe_open

    def keys(form: str, name: str, file: str) -> set[str]:
        with safe_open(fakehub.snapshot(hubs[form], name) / file, framework="pt") as handle:
            return set(handle.keys())

    old, new = (fakehub.snapshot(hubs[form], XL) for form in fakehub.FORMS)
    assert (old / "tokenizer_2" / "merges.txt").exists() and not (old / "tokenizer_2" / "tokenizer.json").exists()
    assert (new / "tokenizer_2" / "tokenizer.json").exists() and not (new / "tokenizer_2" / "vocab.json").exists()
    for folder in (old, new):
        assert (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()
        assert (folder / "unet" / "diffusion_pytorch_model.safetensors").exists()
    assert any(".query." in key for key in keys("old", SD15, "vae/diffusion_pytorch_model.safetensors"))
    assert any(".to_q." in key for key in keys("new", SD15, "vae/diffusion_pytorch_model.safetensors"))
    assert "text_model.embeddings.position_ids" in keys("old", SD15, "text_encoder/model.safetensors")
    assert not any(key.startswith("text_model.") for key in keys("new", SD15, "text_encoder/model.safetensors"))
