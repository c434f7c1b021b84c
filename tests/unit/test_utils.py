"""Pictures and animations from files and into files: what is written is read again, and what fails is named."""

from __future__ import annotations

import http.server
import io
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fourstroke.utils import export_to_gif, export_to_video, load_image, load_video, save_animation


def frames(count: int = 5, width: int = 48, height: int = 32) -> list[PIL.Image.Image]:
    """A white disc that wanders over a few colours, so that GIF's palette holds them all."""
    rows, columns = np.mgrid[:height, :width]
    pictures = []
    for i in range(count):
        pixels = np.full((height, width, 3), (200, 40 * i, 90), np.uint8)
        pixels[(rows - 16) ** 2 + (columns - 8 * (i + 1)) ** 2 < 60] = 255
        pictures.append(PIL.Image.fromarray(pixels))
    return pictures


FRAMES = frames()
ARRAY = np.stack([np.asarray(frame) for frame in FRAMES]).astype(np.float32) / 255
KINDS = {
    "pil": FRAMES,
    "np": ARRAY,
    "np-list": list(ARRAY),
    "np-bytes": np.stack([np.asarray(frame) for frame in FRAMES]),
    "pt": torch.from_numpy(ARRAY).permute(0, 3, 1, 2),
    "pt-half": torch.from_numpy(ARRAY).permute(0, 3, 1, 2).half(),
    "pt-list": list(torch.from_numpy(ARRAY).permute(0, 3, 1, 2)),
}


def error_of(one: PIL.Image.Image, other: PIL.Image.Image) -> float:
    return float(np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean())


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".mp4", ".mov", ".mkv", ".avi", ".MP4"])
def test_animations_come_back(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / f"animation{suffix}"
    assert save_animation(FRAMES, path, fps=8) == str(path)
    read, fps = load_video(path, return_fps=True)
    assert [(frame.mode, frame.size) for frame in read] == [("RGB", (48, 32))] * 5
    # GIF counts in hundredths of a second, and 1000 // 8 is 125 thousandths.
    assert fps == pytest.approx(1000 / 120 if suffix == ".gif" else 8)
    for mine, other in zip(FRAMES, read, strict=True):
        assert error_of(mine, other) < (1e-9 if suffix == ".gif" else 8)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "no temporary file remains"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_frames_is_written_alike(kind: str, tmp_path: Path) -> None:
    export_to_gif(FRAMES, tmp_path / "a.gif")
    export_to_gif(KINDS[kind], tmp_path / "b.gif")
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()


def test_grey_frames_and_single_ones(tmp_path: Path) -> None:
    save_animation(list(ARRAY[..., 0]), tmp_path / "grey.gif")
    grey = load_video(tmp_path / "grey.gif")
    assert np.array_equal(np.asarray(grey[3])[..., 1], np.asarray(FRAMES[3])[..., 0])
    export_to_gif(FRAMES[:1], tmp_path / "one.gif")
    assert len(load_video(tmp_path / "one.gif")) == 1


def test_animations_loop_for_ever(tmp_path: Path) -> None:
    for suffix in (".gif", ".webp"):
        with PIL.Image.open(save_animation(FRAMES, tmp_path / f"a{suffix}")) as animation:
            assert animation.info["loop"] == 0


def test_without_a_path_a_temporary_file_is_written() -> None:
    for path in (export_to_gif(FRAMES), export_to_video(FRAMES)):
        assert Path(path).suffix in (".gif", ".mp4")
        assert len(load_video(path)) == 5
        Path(path).unlink()


def test_a_better_video_is_closer_and_larger(tmp_path: Path) -> None:
    sizes, errors = [], []
    for quality in (0, 5, 10):
        path = Path(export_to_video(FRAMES, tmp_path / f"{quality}.mp4", quality=quality))
        sizes.append(path.stat().st_size)
        errors.append(sum(map(error_of, FRAMES, load_video(path))))
    assert sizes == sorted(sizes) and sizes[0] < sizes[2]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(("degrees", "size"), [(90, (32, 48)), (180, (48, 32)), (-90, (32, 48))])
def test_videos_held_sideways_are_turned_upright(degrees: int, size: tuple[int, int], tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.set_display_rotation(degrees)
        for frame in FRAMES:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))
    read = load_video(tmp_path / "a.mp4")
    assert read[3].size == size
    assert error_of(read[3], FRAMES[3].rotate(degrees, expand=True)) < 8


def test_sides_of_videos_are_enlarged_to_blocks(tmp_path: Path) -> None:
    odd = frames(2, 50, 34)
    assert load_video(export_to_video(odd, tmp_path / "a.mp4"))[0].size == (64, 48)
    assert load_video(export_to_video(odd, tmp_path / "a.mp4", macro_block_size=None))[0].size == (50, 34)
    with pytest.raises(ValueError, match="51 x 34 pixels, but a video has even sides: macro_block_size=2"):
        export_to_video(frames(2, 51, 34), tmp_path / "b.mp4", macro_block_size=1)
    assert not (tmp_path / "b.mp4").exists()


@pytest.mark.parametrize(
    ("given_frames", "error", "message"),
    [
        ([], ValueError, "frames is an empty list"),
        ([FRAMES], TypeError, "frames is one of type list"),
        (ARRAY[None], ValueError, r"frames has the shape \(1, 5, 32, 48, 3\)"),
        ([*FRAMES, *frames(1, 16, 16)], ValueError, r"sizes \[\(16, 16\), \(48, 32\)\]; resize them to one"),
        ((ARRAY * 255).astype(np.int64), TypeError, "arrays of int64; they must hold floats"),
        (ARRAY * 255, ValueError, "values up to 255; floats must lie in"),
        (ARRAY[..., 0], ValueError, "A frame has 48 channels"),
    ],
)
def test_bad_frames_are_named(given_frames: object, error: type[Exception], message: str, tmp_path: Path) -> None:
    for suffix in (".gif", ".mp4"):
        with pytest.raises(error, match=message):
            save_animation(given_frames, tmp_path / f"a{suffix}")
    assert not list(tmp_path.iterdir())


def test_bad_names_and_numbers_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a.png is no animation's name; it must end in one of .gif, .webp, .mp4"):
        save_animation(FRAMES, tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.mp4 does not end in .gif; save_animation"):
        export_to_gif(FRAMES, tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=r"a.gif is no video's name"):
        export_to_video(FRAMES, tmp_path / "a.gif")
    with pytest.raises(ValueError, match="fps is 0; it must be above 0"):
        export_to_gif(FRAMES, tmp_path / "a.gif", fps=0)
    with pytest.raises(ValueError, match="quality is 11; it must be 0"):
        export_to_video(FRAMES, tmp_path / "a.mp4", quality=11)


def test_videos_need_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mp4").write_bytes(b"film")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'fourstroke\[video\]'"):
        load_video(tmp_path / "a.mp4")
    with pytest.raises(ImportError, match="GIF and WebP work without it"):
        export_to_video(FRAMES, tmp_path / "b.mp4")
    assert len(load_video(export_to_gif(FRAMES, tmp_path / "a.gif"))) == 5


def test_what_is_no_animation_is_named(tmp_path: Path) -> None:
    for suffix in (".gif", ".mp4"):
        path = tmp_path / f"text{suffix}"
        path.write_text("not a film")
        with pytest.raises(ValueError, match=rf"text\{suffix} cannot be read as a (picture|video)"):
            load_video(path)
    with pytest.raises(FileNotFoundError, match="no video 'missing.mp4'"):
        load_video("missing.mp4")
    FRAMES[0].save(tmp_path / "still.webp")
    assert len(load_video(tmp_path / "still.webp")) == 1
    with pytest.raises(ValueError, match=r"still.webp does not tell its frame rate"):
        load_video(tmp_path / "still.webp", return_fps=True)
    assert len(load_video(tmp_path / "still.webp", lambda pictures: pictures * 3)) == 3


@pytest.mark.parametrize("factor", [1, 3], ids=["above the limit", "far above it"])
def test_decompression_bombs_are_refused(factor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PIL.Image.new("L", (40 * factor, 30)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(
        ValueError, match=rf"bomb.png cannot be read as a picture: Image size \({1200 * factor} pixels\)"
    ):
        load_image(tmp_path / "bomb.png")
    assert PIL.Image.MAX_IMAGE_PIXELS == 1000


def encoded(format: str) -> bytes:
    file = io.BytesIO()
    FRAMES[0].save(file, format=format)
    return file.getvalue()


FILES = {format: encoded(format) for format in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")}


@pytest.mark.filterwarnings("ignore")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(st.sampled_from(sorted(FILES)), st.data())
def test_damaged_pictures_give_one_line(tmp_path: Path, format: str, data: st.DataObject) -> None:
    content = bytearray(FILES[format])
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=8)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert load_image(path).mode == "RGB"
    except ValueError as error:
        assert str(error).startswith(f"{path} cannot be read as a picture: ")
        assert "\n" not in str(error) and len(str(error)) < 500


def test_what_is_neither_path_nor_picture_is_named() -> None:
    with pytest.raises(TypeError, match="picture is loaded from a path or a URL, not from an object of type ndarray"):
        load_image(ARRAY)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="of type NoneType"):
        load_video(None)  # pyright: ignore[reportArgumentType]


def test_sixteen_bit_grey_keeps_its_shades(tmp_path: Path) -> None:
    depths = np.linspace(0, 65535, 48 * 32).astype(np.uint16).reshape(32, 48)
    PIL.Image.fromarray(depths).save(tmp_path / "depth.png")
    assert np.array_equal(np.asarray(load_image(tmp_path / "depth.png"))[..., 1], depths // 256)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """A web server on this machine that serves ``tmp_path``."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(tmp_path))  # pyright: ignore[reportArgumentType]

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_files_are_fetched_from_urls(site: str, tmp_path: Path) -> None:
    FRAMES[0].save(tmp_path / "a.png")
    export_to_gif(FRAMES, tmp_path / "a.gif")
    export_to_video(FRAMES, tmp_path / "a.mp4")
    assert error_of(load_image(f"{site}/a.png"), FRAMES[0]) == 0
    assert len(load_video(f"{site}/a.gif?download=true")) == 5
    assert len(load_video(f"{site}/a.mp4")) == 5
    with pytest.raises(OSError, match=r"/missing.png cannot be fetched: HTTP Error 404"):
        load_image(f"{site}/missing.png")
    with pytest.raises(OSError, match="cannot be fetched"):
        load_image("http://")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=rf"{site}/text.png cannot be read as a picture: it is in no format"):
        load_image(f"{site}/text.png")
