"""Latents and embeddings against diffusers' own, the cache, and the order in which examples come."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fourstroke import DDIMScheduler, DiffusionPipeline, LCMScheduler
from fourstroke.train.data import DataError, DataOptions, open_source
from fourstroke.train.encoding import Example, Examples, View, encode_examples, encoders_on
from fourstroke.train.store import Store, fingerprint, key_of
from fourstroke.train.teacher import many_step_scheduler

from .. import fakehub
from ..parity.oracles import assert_close
from ..parity.pictures import unheard
from ..unit import tiny

CAPTIONS = ["a red fox", "an owl, sitting in a tree", "a green apple"]
TEXTS = [*CAPTIONS, "a snowman"]
# Widths and heights; with multiples of 32 (XL) and 16 (SD) at 64 pixels they fall into several shapes.
SIZES = [(64, 64), (130, 90), (70, 120)]


@pytest.fixture(scope="module", params=["sd15", "xl"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The same tiny model in both libraries: ours, diffusers'."""
    make = {"sd15": fakehub.stable_diffusion, "xl": fakehub.stable_diffusion_xl}[request.param]
    theirs = make(f"train/{request.param}", request.param, TEXTS)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    fakehub.put_into_form(folder, TEXTS, "old")
    ours = DiffusionPipeline.from_pretrained(folder)
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    return ours, theirs


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures of three sizes with a caption each."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, (size, caption) in enumerate(zip(SIZES, CAPTIONS, strict=True)):
        tiny.picture(i, size).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


@pytest.fixture(autouse=True)
def quiet_peer() -> Any:
    diffusers.utils.logging.set_verbosity_error()
    with torch.no_grad():
        yield


def rows(examples: Examples, seed: int = 0) -> dict[str, Any]:
    """Caption -> (latents, embeddings, pooled, time ids), from batches of one."""
    found = {}
    for i in range(len(examples)):
        batch = examples.batch(i, 1, seed)
        one = (batch.latents, batch.prompt_embeds, batch.pooled, batch.time_ids)
        found[batch.captions[0]] = [None if value is None else value[0] for value in one]
    return found


def cropped(image: PIL.Image.Image, target: tuple[int, int]) -> Tensor:
    """(1, 3, h, w) in [-1, 1] by Pillow alone: cover, then keep the middle."""
    scale = max(target[1] / image.width, target[0] / image.height)
    sides = max(round(image.width * scale), target[1]), max(round(image.height * scale), target[0])
    image = image.resize(sides, PIL.Image.Resampling.LANCZOS)
    left, top = round((sides[0] - target[1]) / 2), round((sides[1] - target[0]) / 2)
    image = image.crop((left, top, left + target[1], top + target[0]))
    return diffusers.image_processor.VaeImageProcessor().preprocess(image)


# Against diffusers


def test_latents_and_embeddings_are_diffusers(both: tuple[Any, Any], pictures: Path) -> None:
    ours, theirs = both
    found = rows(encode_examples(ours, open_source(pictures), DataOptions(resolution=128)))
    xl = hasattr(theirs, "text_encoder_2")
    shapes = set()
    for i, caption in enumerate(CAPTIONS):
        latents, embeds, pooled, ids = found[caption]
        target = latents.shape[1] * 8, latents.shape[2] * 8
        shapes.add(target)
        with PIL.Image.open(pictures / f"{i}.png") as image:
            encoded = theirs.vae.encode(cropped(image, target)).latent_dist.mean * theirs.vae.config.scaling_factor
            original = (image.height, image.width)
        assert_close(latents, encoded[0])
        told = theirs.encode_prompt(caption, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        assert_close(embeds, told[0][0])
        if not xl:
            assert pooled is None and ids is None
            continue
        assert_close(pooled, told[2][0])
        assert tuple(ids[:2].tolist()) == original and tuple(ids[4:].tolist()) == target
    assert len(shapes) == 3 and (128, 128) in shapes


def test_the_empty_prompt_is_the_pipelines_negative_one(both: tuple[Any, Any], pictures: Path) -> None:
    ours, theirs = both
    empty = encode_examples(ours, open_source(pictures)).empty
    told = theirs.encode_prompt("x", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    torch.testing.assert_close(empty.prompt_embeds, told[1], rtol=1e-5, atol=1e-5)
    assert empty.captions == [""] and empty.latents.shape == (1, 4, 0, 0)
    if hasattr(theirs, "text_encoder_2"):
        assert theirs.config.force_zeros_for_empty_prompt
        assert torch.equal(empty.pooled, told[3]) and torch.equal(empty.time_ids, torch.zeros(1, 6))


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_clip_skip(both: tuple[Any, Any], pictures: Path, clip_skip: int) -> None:
    ours, theirs = both
    found = rows(encode_examples(ours, open_source(pictures), DataOptions(clip_skip=clip_skip)))
    if hasattr(theirs, "text_encoder_2"):
        expected = theirs.encode_prompt(CAPTIONS[0], do_classifier_free_guidance=False, clip_skip=clip_skip)[0]
    else:  # diffusers' own way to it does not work with today's transformers
        ids = theirs.tokenizer(CAPTIONS[0], padding="max_length", max_length=77, return_tensors="pt").input_ids
        states = theirs.text_encoder(ids, output_hidden_states=True).hidden_states
        norm = next(module for name, module in theirs.text_encoder.named_modules() if name.endswith("final_layer_norm"))
        expected = norm(states[-(clip_skip + 1)])
    assert_close(found[CAPTIONS[0]][1], expected[0])


def test_samples_are_of_the_vaes_distribution(both: tuple[Any, Any], pictures: Path) -> None:
    """The mean over many visits, and the spread about it, are those of diffusers' distribution."""
    ours, theirs = both
    examples = encode_examples(ours, open_source(pictures), DataOptions(latents="sample", buckets=False))
    drawn: dict[str, list[Tensor]] = {}
    for i in range(40):
        batch = examples.batch(i, 30, 0)
        for caption, latents in zip(batch.captions, batch.latents, strict=True):
            drawn.setdefault(caption, []).append(latents)
    with PIL.Image.open(pictures / "1.png") as image:
        told = theirs.vae.encode(cropped(image, (64, 64))).latent_dist
    many, factor = torch.stack(drawn[CAPTIONS[1]]), theirs.vae.config.scaling_factor
    assert len(many) == 400
    standard = (many.mean(0) - told.mean[0] * factor) / (told.std[0] * factor / len(many) ** 0.5)
    assert standard.abs().max() < 5 and (standard.std() - 1).abs() < 0.2
    assert ((many.std(0) / (told.std[0] * factor)).mean() - 1).abs() < 0.02


def test_mirrored_and_random_crops(both: tuple[Any, Any], pictures: Path) -> None:
    """Every visit shows a window of the resized picture, as it is or mirrored, where its time ids say."""
    ours, theirs = both
    (pictures / "0.png").unlink(), (pictures / "2.png").unlink()
    (pictures / "0.txt").unlink(), (pictures / "2.txt").unlink()
    options = DataOptions(flip=True, crop="random", crops=3, buckets=False)
    examples = encode_examples(ours, open_source(pictures), options)
    with PIL.Image.open(pictures / "1.png") as image:
        scaled = image.resize((round(130 * 64 / 90), 64), PIL.Image.Resampling.LANCZOS)
        mirrored = PIL.ImageOps.mirror(image).resize(scaled.size, PIL.Image.Resampling.LANCZOS)
    windows = {}
    for kind, left in itertools.product((scaled, mirrored), range(scaled.width - 63)):
        windows[kind is mirrored, left] = cropped(kind.crop((left, 0, left + 64, 64)), (64, 64))
    encoded = theirs.vae.encode(torch.cat([*windows.values()])).latent_dist.mean * theirs.vae.config.scaling_factor
    windows = dict(zip(windows, encoded, strict=True))
    seen = set()
    for i in range(30):
        batch = examples.batch(i, 1, 0)
        near = min(windows, key=lambda window: float((windows[window] - batch.latents[0]).abs().max()))
        assert_close(batch.latents[0], windows[near])
        if batch.time_ids is not None:
            assert batch.time_ids[0].tolist() == [90, 130, 0, near[1], 64, 64]
        seen.add(near)
    assert 4 <= len(seen) <= 6 and {side for side, _ in seen} == {False, True}


def test_half_precision_vaes_are_upcast_where_the_pipelines_do_it(pictures: Path) -> None:
    """SDXL's VAE overflows in float16, and says so in its configuration; SD's does not run in float32 by itself."""
    pipe = tiny.xl()
    expected = rows(encode_examples(pipe, open_source(pictures)))[CAPTIONS[0]][0]
    pipe.vae.to(torch.float16)
    assert pipe.vae.config.force_upcast
    seen = []
    pipe.vae.encoder.conv_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    found = rows(encode_examples(pipe, open_source(pictures)))[CAPTIONS[0]][0]
    assert set(seen) == {torch.float32} and pipe.vae.dtype == torch.float16
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.01)


def test_painted_latents_are_the_teachers(both: tuple[Any, Any], tmp_path: Path) -> None:
    """From the same start noise, diffusers' pipeline with DDIM paints the same latents."""
    ours, theirs = both
    (tmp_path / "p.txt").write_text("a red fox\na green apple\n")
    options = DataOptions(teacher_steps=3, images_per_prompt=2)
    started: list[Tensor] = []
    generate = ours.generate

    def watched(request: Any, **more: Any) -> Any:
        states = [torch.Generator().set_state(one.get_state()) for one in request.generator]
        started.append(torch.cat([torch.randn(1, 4, 8, 8, generator=one) for one in states]))
        return generate(request, **more)

    before = ours.scheduler
    ours.generate = watched
    try:
        examples = encode_examples(ours, open_source(tmp_path / "p.txt"), options)
    finally:
        del ours.generate
    assert ours.scheduler is before and len(examples) == 4 and not torch.equal(started[0][0], started[0][1])
    prompts = ["a red fox", "a red fox", "a green apple", "a green apple"]
    own = theirs.scheduler
    with unheard(theirs):
        if not hasattr(theirs, "text_encoder_2"):  # SD's own scheduler, PNDM, is not run here
            theirs.scheduler = diffusers.DDIMScheduler.from_config(own.config, clip_sample=False)
        call = {"num_inference_steps": 3, "guidance_scale": 7.5, "output_type": "latent"}
        expected = theirs(prompts, latents=torch.cat(started), **call).images
    theirs.scheduler = own
    found: dict[str, list[Tensor]] = {}
    for i in range(4):
        batch = examples.batch(i, 1, 0)
        found.setdefault(batch.captions[0], []).append(batch.latents[0])
        if batch.time_ids is not None:
            assert batch.time_ids.tolist() == [[64, 64, 0, 0, 64, 64]]
    for caption, latents in zip(prompts, expected, strict=True):
        nearest = min(found[caption], key=lambda one: float((one - latents).abs().max()))
        torch.testing.assert_close(nearest, latents, rtol=1e-3, atol=1e-3 * float(latents.abs().max()))


def test_schedulers_for_few_steps_do_not_teach() -> None:
    ddim = DDIMScheduler(beta_schedule="scaled_linear")
    assert many_step_scheduler(ddim) is ddim
    found = many_step_scheduler(LCMScheduler.from_config(ddim.config))
    assert isinstance(found, DDIMScheduler) and found.config.beta_schedule == "scaled_linear"
    assert not found.config.clip_sample, "latents are no pictures in [-1, 1]"


# The cache


class Counted:
    """How many pictures, captions and UNet rows a pipeline's networks see."""

    def __init__(self, pipe: Any):
        self.seen: Counter[str] = Counter()
        for name, module in (("pictures", pipe.vae.encoder), ("captions", pipe.text_encoder), ("unet", pipe.unet)):
            module.register_forward_pre_hook(self._count(name), with_kwargs=True)

    def _count(self, name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            value = args[0] if args else next(iter(kwargs.values()))
            # The empty prompt is encoded anew every time.
            self.seen[name] += 0 if name == "captions" and len(value) == 1 else len(value)

        return hook

    def since(self) -> dict[str, int]:
        found, self.seen = +self.seen, Counter()
        return dict(found)


def test_what_is_cached_is_not_computed_again(pictures: Path, tmp_path: Path) -> None:
    pipe, cache = tiny.sd(), tmp_path / "cache"
    counted = Counted(pipe)
    told: list[tuple[str, int, int]] = []
    first = rows(encode_examples(pipe, open_source(pictures), None, cache, lambda *now: told.append(now)))
    assert counted.since() == {"pictures": 3, "captions": 3}
    assert told[0] == ("captions", 0, 3) and told[-1] == ("pictures", 3, 3)

    del told[:]
    again = rows(encode_examples(tiny.sd(), open_source(pictures), None, cache, lambda *now: told.append(now)))
    assert not told, "also for a model that is loaded from elsewhere"
    for caption, values in first.items():
        assert all(torch.equal(a, b) for a, b in zip(values, again[caption], strict=True) if a is not None)

    tiny.picture(9, SIZES[1]).save(pictures / "1.png")
    (pictures / "2.txt").write_text("a blue apple\na red fox")
    encode_examples(pipe, open_source(pictures), None, cache)
    seen = counted.since()
    assert seen.pop("pictures") == 1, "one changed picture is one computed row"
    assert seen == {}, "one changed caption is one row, which `Counted` takes for the empty prompt's"
    encode_examples(pipe, open_source(pictures), DataOptions(resolution=64, buckets=False), cache)
    assert counted.since() == {"pictures": 3}
    encode_examples(pipe, open_source(pictures), DataOptions(resolution=64), cache)
    assert counted.since() == {"pictures": 2}, "the square one has the same shape as before"


def test_other_networks_have_other_caches(pictures: Path, tmp_path: Path) -> None:
    pipe = tiny.sd()
    counted = Counted(pipe)
    encode_examples(pipe, open_source(pictures), None, tmp_path / "cache")
    counted.since()
    pipe.vae.encoder.conv_in.weight.data *= 1.5
    encode_examples(pipe, open_source(pictures), None, tmp_path / "cache")
    assert counted.since() == {"pictures": 3}
    pipe.text_encoder.text_model.final_layer_norm.weight.data *= 1.5
    encode_examples(pipe, open_source(pictures), None, tmp_path / "cache")
    assert counted.since() == {"captions": 3}


def test_fingerprints_are_of_what_is_computed() -> None:
    one, same = tiny.sd(), tiny.sd()
    assert fingerprint(one.unet, 1) == fingerprint(same.unet, 1) != fingerprint(one.unet, 2)
    for name, parameter in itertools.islice(same.unet.named_parameters(), 0, None, 17):
        before = fingerprint(same.unet)
        parameter.data += 1e-3
        assert fingerprint(same.unet) != before, name
    assert fingerprint(one.vae.half()) != fingerprint(same.vae)


def test_an_interrupted_encoding_goes_on(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been written when the power fails is used; a half-written file is not there."""
    monkeypatch.setattr("fourstroke.train.store.ROWS_A_FILE", 1)
    monkeypatch.setattr("fourstroke.train.encoding.PIXELS_A_BATCH", 1)
    pipe = tiny.sd()
    counted = Counted(pipe)

    class Power(BaseException):
        pass

    def fails(what: str, done: int, total: int) -> None:
        if (what, done) == ("pictures", 2):
            raise Power

    with pytest.raises(Power):
        encode_examples(pipe, open_source(pictures), None, tmp_path / "cache", fails)
    assert counted.since() == {"captions": 3, "pictures": 2}
    encode_examples(pipe, open_source(pictures), None, tmp_path / "cache")
    assert counted.since() == {"pictures": 1}
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".safetensors"]


def test_damaged_files_are_computed_again(pictures: Path, tmp_path: Path) -> None:
    pipe, cache = tiny.sd(), tmp_path / "cache"
    expected = rows(encode_examples(pipe, open_source(pictures), None, cache))
    for path in cache.glob("latents-*/*"):
        path.write_bytes(path.read_bytes()[:50])
    with pytest.warns(UserWarning, match="is not a readable .safetensors file"):
        found = rows(encode_examples(pipe, open_source(pictures), None, cache))
    assert all(torch.equal(found[caption][0], expected[caption][0]) for caption in CAPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_examples(pipe, open_source(pictures), None, cache)


def test_painting_goes_on_where_it_stopped(tmp_path: Path) -> None:
    pipe = tiny.sd()
    counted = Counted(pipe)
    (tmp_path / "p.txt").write_text("a\nb\nc\n")
    options = DataOptions(teacher_steps=2)
    encode_examples(pipe, open_source(tmp_path / "p.txt"), options, tmp_path / "cache")
    assert counted.since()["unet"] == 3 * 2 * 2, "prompts x steps x guidance"
    (tmp_path / "p.txt").write_text("b\nd\nc\n")
    examples = encode_examples(pipe, open_source(tmp_path / "p.txt"), options, tmp_path / "cache")
    assert counted.since()["unet"] == 2 * 2 and set(rows(examples)) == {"b", "c", "d"}
    encode_examples(pipe, open_source(tmp_path / "p.txt"), DataOptions(teacher_steps=1), tmp_path / "cache")
    assert counted.since()["unet"] == 3 * 2, "other settings, other pictures"


def test_rows_are_read_from_mapped_memory(tmp_path: Path) -> None:
    store = Store(tmp_path)
    keys = [key_of(i) for i in range(5)]
    store.add(keys, {"mean": torch.arange(10.0).reshape(5, 2)})
    assert keys[0] not in store, "not before it is written"
    store.flush()
    assert torch.equal(Store(tmp_path).read([keys[3], keys[0]])["mean"], torch.tensor([[6.0, 7], [0, 1]]))
    maps = Path("/proc/self/maps")
    if maps.exists():
        held = Store(tmp_path)
        assert str(tmp_path) in maps.read_text() and len(held) == 5


# The order


def toy(groups: dict[tuple[int, int], int], repeats: int = 1, captions: int = 1) -> Examples:
    """Examples whose latents hold their number."""
    latents, texts, examples = Store(None), Store(None), []
    for shape, count in groups.items():
        for _ in range(count):
            number = len(examples)
            key = key_of(number)
            latents.add([key], {"mean": torch.full((1, 4, *(side // 8 for side in shape)), float(number))})
            latents.flush()
            keys = tuple(key_of(number, i) for i in range(captions))
            texts.add(keys, {"embeds": torch.arange(captions).reshape(-1, 1, 1) + 10.0 * number})
            view = View(key, (*shape, 0, 0, *shape))
            examples.append(Example((view,), tuple(f"{number}-{i}" for i in range(captions)), keys, repeats))
    texts.flush()
    from fourstroke.train.encoding import Batch

    return Examples(examples, latents, texts, Batch(torch.zeros(1, 4, 0, 0), torch.zeros(1, 1, 1), None, None, [""]))


def numbers(examples: Examples, index: int, size: int, seed: int = 0) -> list[int]:
    return [int(row[0, 0, 0]) for row in examples.batch(index, size, seed).latents]


COUNTS = st.lists(st.integers(1, 30), min_size=1, max_size=4)


@settings(max_examples=15, deadline=None)
@given(COUNTS, st.integers(1, 40), st.integers(0, 3), st.integers(0, 500))
def test_batches_are_pure_and_have_one_shape(counts: list[int], size: int, seed: int, index: int) -> None:
    groups = {(8 * (i + 1), 8): count for i, count in enumerate(counts)}
    examples, fresh = toy(groups), toy(groups)
    for other in (index + 3, 0, index // 2):
        examples.batch(other, size, seed + 1)
    one, same = examples.batch(index, size, seed), fresh.batch(index, size, seed)
    assert torch.equal(one.latents, same.latents) and one.captions == same.captions
    assert len(one.latents) == len(one.captions) == size
    assert [int(row[0, 0, 0]) for row in one.latents] == [int(caption.split("-")[0]) for caption in one.captions]


@settings(max_examples=12, deadline=None)
@given(COUNTS, st.integers(1, 12))
def test_every_example_comes_equally_often(counts: list[int], size: int) -> None:
    """After `size` rounds each has come exactly `size` times, whatever the shapes' sizes."""
    examples = toy({(8 * (i + 1), 8): count for i, count in enumerate(counts)})
    total = len(examples)
    seen = Counter(itertools.chain(*(numbers(examples, i, size) for i in range(total))))
    assert seen == Counter(dict.fromkeys(range(total), size))


def test_an_epoch_shows_each_example_once_in_a_new_order() -> None:
    examples = toy({(8, 8): 24})
    epochs = [list(itertools.chain(*(numbers(examples, 4 * e + i, 6) for i in range(4)))) for e in range(3)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(24))
    assert numbers(examples, 0, 6, seed=1) != epochs[0][:6]


def test_repeats_and_captions() -> None:
    examples = toy({(8, 8): 3}, repeats=4, captions=3)
    assert len(examples) == 12 and examples.shapes == {(8, 8): 12}
    captions = Counter()
    for i in range(300):
        batch = examples.batch(i, 3, 0)
        for caption, embeds, row in zip(batch.captions, batch.prompt_embeds, batch.latents, strict=True):
            number, which = map(int, caption.split("-"))
            assert float(embeds) == 10 * number + which and float(row[0, 0, 0]) == number
            captions[which] += 1
    assert all(abs(count - 300) < 75 for count in captions.values()), "five standard deviations"
    with pytest.raises(ValueError, match="index must be at least 0"):
        examples.batch(-1, 1, 0)


# What is told


def test_pictures_that_are_too_small_are_named_before_any_work(tmp_path: Path) -> None:
    pipe = tiny.sd()
    counted = Counted(pipe)
    for i, side in enumerate((16, 20, 300)):
        tiny.picture(i, (side, side)).save(tmp_path / f"{side}.png")
    with pytest.raises(
        DataError, match=r"too small for a resolution of 128: 16\.png \(16 x 16 for 128 x 128\), 20\.png"
    ):
        encode_examples(pipe, open_source(tmp_path, "x"), DataOptions(resolution=128))
    assert not counted.since()
    with pytest.warns(UserWarning, match=r"2 of 3 pictures are enlarged more than 2-fold, 16\.png among them"):
        encode_examples(pipe, open_source(tmp_path, "x"), DataOptions(resolution=48))


def test_long_captions_are_told_of_once(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join(f"{i} " + "fox " * 90 for i in range(3)) + "\nshort")
    with pytest.warns(UserWarning) as caught:
        encode_examples(tiny.xl(), open_source(tmp_path / "p.txt"), DataOptions(teacher_steps=1))
    assert len(caught) == 1 and "3 of 4 captions are too long; of the first: CLIP reads at most 75" in str(
        caught[0].message
    )


def test_pictures_are_decoded_while_the_vae_works(pictures: Path) -> None:
    """By other threads than the one that encodes."""
    pipe, source = tiny.sd(), open_source(pictures)
    threads = set()
    opened = type(source.pictures[0]).open

    def watched(picture: Any) -> Any:
        threads.add(threading.get_ident())
        return opened(picture)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fourstroke.train.data.Picture.open", watched)
        encode_examples(pipe, source)
    assert threads and threading.get_ident() not in threads


def test_encoders_are_off_the_device_but_inside() -> None:
    pipe = tiny.sd()
    pipe.unet.to("meta")
    with encoders_on(pipe, "cpu"):
        assert pipe.vae.device.type == pipe.text_encoder.device.type == "cpu" and pipe.unet.device.type == "meta"
    assert pipe.unet.device.type == "meta" and pipe.vae.device.type == "cpu"


def test_numbers_of_a_view_do_not_depend_on_the_order_of_files(pictures: Path) -> None:
    options = DataOptions(crop="random", buckets=False)
    pipe = tiny.sd()
    one = rows(encode_examples(pipe, open_source(pictures), options))
    (pictures / "0.png").rename(pictures / "z.png"), (pictures / "0.txt").rename(pictures / "z.txt")
    other = rows(encode_examples(pipe, open_source(pictures), options))
    assert all(torch.equal(one[caption][0], other[caption][0]) for caption in CAPTIONS)
