"""Where examples come from: folders, shards, prompts; bad files by name; shapes against what Pillow does."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourstroke.train.data import DataError, DataOptions, Picture, braces, open_source, plain
from fourstroke.train.shapes import bucket, bucket_shapes, frame

ORIENTATION = 0x0112


def noise(size: tuple[int, int] = (40, 32), mode: str = "RGB", seed: int = 0) -> PIL.Image.Image:
    """A picture of ``size`` (width, height)."""
    shape = (size[1], size[0], len(mode)) if len(mode) > 1 else (size[1], size[0])
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def put(folder: Path, name: str, text: str | None = None, **picture: object) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(**picture).save(path)
    if text is not None:
        path.with_suffix(".txt").write_text(text, encoding="utf-8")
    return path


def by_name(source: object) -> dict[str, Picture]:
    return {picture.name: picture for picture in source.pictures}


# Folders


def test_captions_of_a_folder(tmp_path: Path) -> None:
    put(tmp_path, "fox.png", "\ufeffa red fox\n\n  a fox, red  \n")
    put(tmp_path, "inside/owl.jpg").with_suffix(".caption").write_text("an owl")
    put(tmp_path, ".hidden/x.png")
    put(tmp_path, "told/cat.webp")
    (tmp_path / "told" / "metadata.jsonl").write_text('{"file_name": "cat.webp", "text": ["a cat", "cat"]}\n')
    put(tmp_path, "csv/dog.png")
    (tmp_path / "csv" / "metadata.csv").write_text('file_name,text\ndog.png,"a dog, brown"\n')
    found = by_name(open_source(tmp_path))
    assert {name: picture.captions for name, picture in found.items()} == {
        "fox.png": ("a red fox", "a fox, red"),
        "inside/owl.jpg": ("an owl",),
        "told/cat.webp": ("a cat", "cat"),
        "csv/dog.png": ("a dog, brown",),
    }
    fox = found["fox.png"]
    assert (fox.width, fox.height, fox.repeats) == (40, 32, 1)
    assert fox.digest == hashlib.blake2b((tmp_path / "fox.png").read_bytes(), digest_size=16).hexdigest()
    np.testing.assert_array_equal(fox.open(), noise())


def test_kohya_folders_tell_repeats_and_words(tmp_path: Path) -> None:
    put(tmp_path, "10_red fox/a.png")
    put(tmp_path, "10_red fox/b.png", "a fox asleep")
    put(tmp_path, "3_owl/c.png")
    found = {name: (picture.repeats, picture.captions) for name, picture in by_name(open_source(tmp_path)).items()}
    assert found == {
        "10_red fox/a.png": (10, ("red fox",)),
        "10_red fox/b.png": (10, ("a fox asleep",)),
        "3_owl/c.png": (3, ("owl",)),
    }
    assert by_name(open_source(tmp_path / "10_red fox"))["a.png"].repeats == 10


def test_one_caption_for_all_or_around_all(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    put(tmp_path, "b.png", "an owl")
    assert [picture.captions for picture in open_source(tmp_path, "a thing").pictures] == [("a thing",), ("an owl",)]
    (tmp_path / "a.txt").write_text("a fox")
    around = open_source(tmp_path, "{}, in flat style").pictures
    assert [picture.captions[0] for picture in around] == ["a fox, in flat style", "an owl, in flat style"]


def test_text_files_without_a_picture_are_told_of(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "a")
    (tmp_path / "b.txt").write_text("b")
    with pytest.warns(UserWarning, match=r"No picture has the name of b\.txt"):
        assert len(open_source(tmp_path)) == 1


# Bad files


def truncated(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut.png": (lambda path: (noise((64, 64)).save(path), truncated(path)), "cut.png ("),
    "cut.jpg": (lambda path: (noise((64, 64)).save(path), truncated(path)), "cut.jpg (image file is truncated"),
    "empty.png": (lambda path: path.write_bytes(b""), "empty.png (no picture that can be read)"),
    "page.jpg": (lambda path: path.write_text("<html>"), "page.jpg (no picture that can be read)"),
    "dot.png": (lambda path: noise((40, 8)).save(path), "dot.png (40 x 8 pixels; the shorter side"),
    "phone.heic": (lambda path: path.write_bytes(b"x"), "phone.heic (this kind is not read; convert it"),
}


def test_every_bad_file_is_named_at_once(tmp_path: Path) -> None:
    put(tmp_path, "good.png", "good")
    put(tmp_path, "silent.png")
    put(tmp_path, "blank.png", "\n")
    put(tmp_path, "latin.png").with_suffix(".txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "gone.png", "text": "x"}\n{"file": 1}\nnot json\n', encoding="utf-8"
    )
    for name, (make, _) in BAD.items():
        make(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("x")
    with pytest.raises(DataError) as caught:
        open_source(tmp_path)
    text = str(caught.value)
    expected = [
        *(said for _, said in BAD.values()),
        "silent.png (no caption: write silent.txt",
        "blank.png (no caption",
        "latin.txt (not UTF-8)",
        "metadata.jsonl line 1 (there is no gone.png)",
        "metadata.jsonl line 2 (must have file_name and text; it has file)",
        "metadata.jsonl line 3 (not a JSON object)",
    ]
    for said in expected:
        assert said in text, said
    assert "good.png" not in text and f"there are {len(expected)} files to mend" in text


@pytest.mark.parametrize(
    ("place", "error", "said"),
    [
        ("nowhere", FileNotFoundError, "There is no"),
        ("https://example.org/shard.tar", DataError, "is an address; download"),
        ("a-{0..1}.tar", FileNotFoundError, r"There is no .*a-0\.tar, .*a-1\.tar\."),
        ("none", DataError, "holds no pictures"),
        ("x.docx", DataError, "is no file of prompts"),
        ("void.txt", DataError, "holds no prompts"),
    ],
)
def test_places_that_are_none(
    place: str, error: type[Exception], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("none").mkdir()
    Path("x.docx").touch()
    Path("void.txt").touch()
    with pytest.raises(error, match=said):
        open_source(place)


# Shards and prompts


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as shard:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))


def encoded(kind: str, seed: int) -> bytes:
    buffer = io.BytesIO()
    noise(seed=seed).save(buffer, kind)
    return buffer.getvalue()


def test_shards_are_read_in_place(tmp_path: Path) -> None:
    first, second = encoded("PNG", 1), encoded("JPEG", 2)
    write_shard(tmp_path / "s-00.tar", {"000.png": first, "000.txt": b"one\nuno", "000.cls": b"7"})
    write_shard(tmp_path / "s-01.tar", {"a/001.jpg": second, "a/001.json": json.dumps({"caption": "two"}).encode()})
    for pattern in ("s-{00..01}.tar", "s-*.tar", "s-{00,01}.tar"):
        one, two = open_source(tmp_path / pattern).pictures
        assert (one.name, one.captions, one.read()) == ("s-00.tar: 000", ("one", "uno"), first)
        assert (two.name, two.captions, two.read()) == ("s-01.tar: a/001", ("two",), second)
    np.testing.assert_array_equal(one.open(), noise(seed=1))


def test_bad_shards_are_named(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "0.tar", {"a.txt": b"no picture", "b.png": b"broken", "b.txt": b"b", "c.png": encoded("PNG", 0)}
    )
    (tmp_path / "1.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "2.tar.gz").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        open_source(f"{tmp_path}/{{0,1}}.tar")
    without = ("a (no picture; it has .txt)", "b (no picture that can be read)", "c (no caption")
    for said in (*(f"0.tar: {said}" for said in without), "1.tar ("):
        assert said in str(caught.value), said
    with pytest.raises(DataError, match=r"2\.tar\.gz \(compressed; unpack it"):
        open_source(tmp_path / "2.tar.gz")


@given(st.integers(0, 120), st.integers(0, 120), st.integers(0, 4))
def test_braces_count_as_a_shell_does(first: int, last: int, digits: int) -> None:
    step = 1 if last >= first else -1
    width = digits if len(str(first).zfill(digits)) > len(str(first)) else 0
    numbers = [str(value).zfill(width) for value in range(first, last + step, step)]
    assert braces(f"x-{{{str(first).zfill(digits)}..{last}}}-{{a,b}}") == [
        f"x-{number}-{letter}" for number in numbers for letter in "ab"
    ]


def test_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a fox\n\nan owl\n")
    (tmp_path / "p.jsonl").write_text('{"text": "a fox"}\n{"prompt": "an owl"}\n')
    (tmp_path / "p.csv").write_text("text\na fox\nan owl\n")
    for name in ("p.txt", "p.jsonl", "p.csv"):
        source = open_source(tmp_path / name, "{}, flat")
        assert source.prompts == ("a fox, flat", "an owl, flat") and not source.pictures and len(source) == 2


# Pixels


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(orientation: int, tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = orientation
    noise((48, 32)).save(tmp_path / "a.png", exif=exif)
    [picture] = open_source(tmp_path, "x").pictures
    with PIL.Image.open(tmp_path / "a.png") as image:
        upright = PIL.ImageOps.exif_transpose(image)
    assert (picture.width, picture.height) == upright.size == picture.open().size
    np.testing.assert_array_equal(picture.open(), upright)


def test_warnings_are_silenced_by_the_main_thread_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that do so put back what they found, which is what another one has set: warnings stay silent for good."""
    entered: list[threading.Thread] = []
    enter = warnings.catch_warnings.__enter__

    def noted(self: Any) -> Any:
        entered.append(threading.current_thread())
        return enter(self)

    monkeypatch.setattr(warnings.catch_warnings, "__enter__", noted)
    for i in range(3):
        noise((32, 32)).save(tmp_path / f"{i}.png")
    assert len(open_source(tmp_path, "x").pictures) == 3
    assert set(entered) == {threading.main_thread()}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK"])
def test_any_mode_becomes_rgb_on_white(mode: str) -> None:
    image = noise(mode=mode) if mode in ("RGBA", "LA") else noise().convert(mode)
    if mode in ("RGBA", "LA"):
        array = np.asarray(image).astype(float)
        alpha = array[..., -1:] / 255
        expected = np.broadcast_to(array[..., :-1] * alpha + 255 * (1 - alpha), (32, 40, 3))
    else:
        expected = np.asarray(image.convert("RGB")).astype(float)
    assert np.abs(np.asarray(plain(image)).astype(float) - expected).max() <= 1


def test_transparent_palette_and_sixteen_bits() -> None:
    palette = PIL.Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.info["transparency"] = 1
    assert plain(palette).getcolors() == [(16, (255, 255, 255))]
    deep = PIL.Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    np.testing.assert_array_equal(np.asarray(plain(deep))[..., 0], [[0, 100, 255]])


SIZES = st.tuples(st.integers(16, 3000), st.integers(16, 3000))


@given(SIZES, st.sampled_from([(128, 32), (512, 64), (1024, 64), (500, 64), (48, 64)]))
def test_buckets(size: tuple[int, int], model: tuple[int, int]) -> None:
    resolution, step = model
    shape = bucket(size, resolution, step)
    side = max(round(resolution / step), 1) * step
    assert shape[0] % step == shape[1] % step == 0
    assert max(shape) <= 2.5 * min(shape) and shape[0] * shape[1] <= max(side, resolution) ** 2
    wanted = np.log(size[0] / size[1])
    off = [abs(np.log(height / width) - wanted) for height, width in bucket_shapes(resolution, step)]
    assert abs(np.log(shape[0] / shape[1]) - wanted) == pytest.approx(min(off))
    assert bucket(size[::-1], resolution, step) in (shape[::-1], shape), "lying or standing"
    assert bucket(size, resolution, step, square=True) == (side, side)


def test_buckets_use_the_area() -> None:
    """Those of SDXL as its authors list them (Podell et al. 2023, app. I) within 5:2 come out, or larger ones."""
    published = {(1024, 1024), (1088, 960), (1152, 896), (1216, 832), (1344, 768), (1408, 704), (1472, 704)}
    for height, width in published:
        assert any(width == w and h >= height for h, w in bucket_shapes(1024, 64)), (height, width)


@given(SIZES, st.sampled_from([(128, 128), (96, 160), (512, 512)]), st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_frames_cover_and_keep_proportions(
    size: tuple[int, int], target: tuple[int, int], where: tuple[float, float]
) -> None:
    cut = frame(size, target, where)
    for i in range(2):
        assert cut.scaled[i] >= target[i] and 0 <= cut.corner[i] <= cut.scaled[i] - target[i]
    assert cut.scaled[0] == target[0] or cut.scaled[1] == target[1]
    scale = max(target[0] / size[0], target[1] / size[1])
    assert all(abs(cut.scaled[i] - size[i] * scale) <= 0.5 + 1e-6 for i in range(2))
    assert cut.time_ids == (*size, *cut.corner, *target)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (128, 128), (50, 70)])
def test_cropping_is_pillows(size: tuple[int, int]) -> None:
    image = noise(size)
    cut = frame(size[::-1], (96, 96)).cut(image)
    scale = max(96 / size[0], 96 / size[1])
    sides = [max(round(side * scale), 96) for side in size]
    resized = image.resize(sides, PIL.Image.Resampling.LANCZOS)
    left, top = round((resized.width - 96) / 2), round((resized.height - 96) / 2)
    np.testing.assert_array_equal(cut, resized.crop((left, top, left + 96, top + 96)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"crop": "middle"}, "crop is 'middle'; it must be one of center, random."),
        ({"latents": "x"}, "latents is 'x'"),
        ({"crops": 3}, "crops is 3, but there is one central crop"),
        ({"crops": 0, "crop": "random"}, "crops is 0; it must be at least 1"),
        ({"resolution": 8}, "resolution is 8"),
    ],
)
def test_options_are_checked(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        DataOptions(**options)
