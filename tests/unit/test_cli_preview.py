"""Previews: which terminal gets what, and that what it gets shows the picture."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from fourstroke import AutoencoderTiny, hub
from fourstroke.cli import preview
from fourstroke.cli.preview import Preview, fit, previewer, rough_pictures, terminal_kind

from .test_cli_generate import here, tiny  # noqa: F401 - fixtures


@pytest.mark.parametrize(
    ("environ", "kind"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "xterm-256color"}, "blocks"),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, "blocks"),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux"}, "blocks"),
        ({}, "blocks"),
    ],
)
def test_terminals(environ: dict[str, str], kind: str) -> None:
    assert terminal_kind(environ, truecolor=True) == kind
    assert terminal_kind(environ, truecolor=False) == (None if kind == "blocks" else kind)


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((64, 64), (48, 24)),
        ((512, 1024), (24, 24)),
        ((1024, 256), (80, 10)),
        ((8, 8000), (1, 24)),
        ((8000, 8), (80, 1)),
    ],
)
def test_fit(size: tuple[int, int], box: tuple[int, int]) -> None:
    assert fit(size, 80, 24) == box


class Terminal(io.StringIO):
    """As much of a terminal as a preview needs (ECMA-48, and DEC's save and restore): cells of text and two colours."""

    def __init__(self, columns: int = 100, lines: int = 30, tty: bool = True, encoding: str = "utf-8"):
        super().__init__()
        self.columns, self.lines, self.tty, self._encoding = columns, lines, tty, encoding
        self.cells: dict[tuple[int, int], tuple[str, tuple[int, ...] | None, tuple[int, ...] | None]] = {}
        self.row = self.column = 0
        self.saved = (0, 0)
        self.colours: dict[str, tuple[int, ...]] = {}

    encoding = property(lambda self: self._encoding)  # type: ignore[assignment]

    def isatty(self) -> bool:
        return self.tty

    def write(self, text: str) -> int:
        for token in re.findall(r"\x1b\[\??[\d;]*[A-Za-z]|\x1b[78]|[^\x1b]", text):
            self._take(token)
        return len(text)

    def _take(self, token: str) -> None:
        if token == "\r":
            self.column = 0
        elif token == "\n":
            self.row, self.column = self.row + 1, 0
            if self.row == self.lines:
                self.row -= 1
                self.cells = {(row - 1, column): cell for (row, column), cell in self.cells.items() if row}
        elif token == "\x1b7":
            self.saved = self.row, self.column
        elif token == "\x1b8":
            self.row, self.column = self.saved
        elif token.startswith("\x1b["):
            self._control(token[2:-1], token[-1])
        else:
            assert self.column < self.columns, "a line is too long"
            self.cells[self.row, self.column] = (token, self.colours.get("38"), self.colours.get("48"))
            self.column += 1

    def _control(self, values: str, kind: str) -> None:
        if kind == "A":
            assert self.row >= int(values), "above the screen"
            self.row -= int(values)
        elif kind == "B":
            self.row += int(values)
            assert self.row < self.lines, "below the screen"
        elif kind == "K":
            self.cells = {place: cell for place, cell in self.cells.items() if place[0] != self.row}
        elif kind == "m":
            if values in ("", "0"):
                self.colours = {}
            else:
                which, _, *rgb = values.split(";")
                self.colours[which] = tuple(map(int, rgb))
        else:
            raise AssertionError(f"unexpected control {kind!r}")

    def text(self, row: int) -> str:
        """The text of a line, half blocks left out."""
        cells = sorted((column, cell[0]) for (line, column), cell in self.cells.items() if line == row)
        return "".join(text for _, text in cells if text != "▀")

    def picture(self) -> tuple[int, np.ndarray]:
        """The line in which half blocks begin, and the picture that they show."""
        blocks = {place: cell for place, cell in self.cells.items() if cell[0] == "▀"}
        top = min(row for row, _ in blocks)
        shape = (2 * (1 + max(row for row, _ in blocks) - top), 1 + max(column for _, column in blocks), 3)
        shown = np.full(shape, -1)
        for (row, column), (_, upper, lower) in blocks.items():
            shown[2 * (row - top), column], shown[2 * (row - top) + 1, column] = upper, lower
        return top, shown


def noise(width: int, height: int, seed: int = 0) -> PIL.Image.Image:
    numbers = np.random.default_rng(seed)
    return PIL.Image.fromarray(numbers.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("start", [0, 3, 29], ids=["top", "middle", "bottom"])
def test_blocks_show_every_pixel_in_one_place(start: int) -> None:
    terminal = Terminal()
    terminal.write("$ fourstroke generate fox\n" + "\n" * (start - 1) + "steps 0/4")
    screen = Preview(terminal, "blocks", columns=80, rows=24)
    for i in range(3):
        image = noise(48, 48, seed=i)
        screen.show([image])
        top, shown = terminal.picture()
        np.testing.assert_array_equal(shown, np.asarray(image))
        # The cursor is below the picture, where the progress bar goes on.
        assert terminal.row == top + 24
        terminal.write(f"\r\x1b[2Ksteps {i + 1}/4")
        assert terminal.text(top + 24) == f"steps {i + 1}/4"
        assert all("steps" not in terminal.text(row) for row in range(terminal.lines) if row != top + 24)


def test_blocks_average_larger_pictures() -> None:
    terminal = Terminal()
    image = noise(96, 96)
    Preview(terminal, "blocks", columns=80, rows=24).show([image])
    expected = np.asarray(image, dtype=float).reshape(48, 2, 48, 2, 3).mean((1, 3))
    assert abs(terminal.picture()[1] - expected).max() <= 1


def test_several_pictures_are_a_grid() -> None:
    terminal = Terminal()
    images = [noise(24, 24, seed=i) for i in range(3)]
    Preview(terminal, "blocks", columns=80, rows=24).show(images)
    shown = terminal.picture()[1]
    for image, (y, x) in zip(images, ((0, 0), (0, 24), (24, 0)), strict=True):
        np.testing.assert_array_equal(shown[y : y + 24, x : x + 24], np.asarray(image))
    assert (shown[24:, 24:] == 255).all()


def written_by(kind: Any, image: PIL.Image.Image) -> str:
    stream = io.StringIO()
    screen = Preview(stream, kind, columns=40, rows=10)
    screen.show([image])
    screen.show([image])
    opening, *shown = re.findall(r"^.*?(?=\x1b7)|\x1b7\x1b\[10A\r(.*?)\x1b8", stream.getvalue(), re.DOTALL)
    assert stream.getvalue().startswith("\r\x1b[2K" + "\n" * 10 + "\x1b7")
    assert len(shown) == 2 and shown[0] == shown[1]
    return shown[0]


def decoded(data: str) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data))))


def test_kitty() -> None:
    image = noise(100, 50)
    shown = written_by("kitty", image)
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", shown)
    assert "".join(f"\x1b_G{control};{data}\x1b\\" for control, data in pieces) == shown
    assert len(pieces) > 1 and all(len(data) <= 4096 for _, data in pieces)
    assert all(len(data) % 4 == 0 for _, data in pieces)
    controls = [dict(entry.split("=") for entry in control.split(",")) for control, _ in pieces]
    assert controls[0] == {
        **{"a": "T", "f": "100", "i": str(os.getpid()), "p": "1", "c": "40", "r": "10", "C": "1", "q": "2", "m": "1"}
    }
    assert [control["m"] for control in controls] == ["1"] * (len(pieces) - 1) + ["0"]
    np.testing.assert_array_equal(decoded("".join(data for _, data in pieces)), np.asarray(image))


def test_iterm2() -> None:
    image = noise(100, 50)
    found = re.fullmatch(r"\x1b\]1337;File=([^:]*):([^\x07]*)\x07", written_by("iterm2", image))
    assert found is not None
    assert set(found[1].split(";")) == {"inline=1", "width=40", "height=10", "preserveAspectRatio=0"}
    np.testing.assert_array_equal(decoded(found[2]), np.asarray(image))


def test_large_pictures_are_sent_smaller() -> None:
    found = re.search(r":([^\x07:]*)\x07", written_by("iterm2", PIL.Image.new("RGB", (1600, 800), "red")))
    assert found is not None and decoded(found[1]).shape == (384, 768, 3)


@pytest.fixture
def window(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    size = SimpleNamespace(columns=100, lines=40)
    monkeypatch.setattr(preview.shutil, "get_terminal_size", lambda: size)
    return size


def test_where_there_are_previews(window: Any) -> None:
    xterm = {"TERM": "xterm-256color"}
    there = Preview.on(Terminal(), xterm, truecolor=True)
    assert there is not None and (there.columns, there.rows) == (80, 24)
    assert Preview.on(Terminal(tty=False), {"TERM": "xterm-kitty"}, truecolor=True) is None
    assert Preview.on(Terminal(encoding="latin-1"), xterm, truecolor=True) is None
    assert Preview.on(Terminal(encoding="latin-1"), {"TERM": "xterm-kitty"}, truecolor=True) is not None
    assert Preview.on(Terminal(), xterm, truecolor=False) is None
    window.columns, window.lines = 60, 20
    small = Preview.on(Terminal(), xterm, truecolor=True)
    assert small is not None and (small.columns, small.rows) == (59, 16)
    window.lines = 7
    assert Preview.on(Terminal(), xterm, truecolor=True) is None


# What is drawn


def test_rough_pictures_of_sd() -> None:
    """The published factors: a picture of (1, 0, 0, 0) is the first row, and so on; [-1, 1] becomes [0, 255]."""
    latents = torch.eye(4).view(4, 4, 1, 1)
    shown = np.stack([np.asarray(picture)[0, 0] for picture in rough_pictures(latents, xl=False)])
    published = np.array(
        [[0.298, 0.207, 0.208], [0.187, 0.286, 0.173], [-0.158, 0.189, 0.264], [-0.184, -0.271, -0.473]]
    )
    assert abs(shown - (published + 1) / 2 * 255).max() <= 0.5


def test_rough_pictures_of_sdxl() -> None:
    latents = torch.cat([torch.zeros(1, 4), torch.eye(4)]).view(5, 4, 1, 1).bfloat16()
    shown = np.stack([np.asarray(picture)[0, 0] for picture in rough_pictures(latents, xl=True)])
    published = np.array([[60, 60, 60], [-60, -5, 10], [25, 15, -5], [-70, -50, -35]])
    offset = np.array([150, 140, 130])
    assert abs(shown - np.concatenate([offset[None], offset + published])).max() <= 0.51


def test_rough_pictures_keep_places() -> None:
    latents = torch.randn(2, 4, 3, 5)
    shown = rough_pictures(latents, xl=False)
    assert [picture.size for picture in shown] == [(5, 3), (5, 3)]
    alone = rough_pictures(latents[1:, :, 2:, 4:], xl=False)[0]
    assert shown[1].getpixel((4, 2)) == alone.getpixel((0, 0))


def engine_like(model: str, addition: str | None = None) -> Any:
    unet = SimpleNamespace(config=SimpleNamespace(addition_embed_type=addition))
    return SimpleNamespace(
        base=SimpleNamespace(family=SimpleNamespace(name=model)),
        pipeline=SimpleNamespace(unet=unet, device=torch.device("cpu"), dtype=torch.float32),
    )


def test_emoji_models_are_decoded_by_the_tiny_vae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = {
        "encoder_block_out_channels": (8,) * 4,
        "decoder_block_out_channels": (8,) * 4,
        "num_encoder_blocks": (1,) * 4,
        "num_decoder_blocks": (1,) * 4,
    }
    tiny_vae = AutoencoderTiny.from_config(levels)
    tiny_vae.save_pretrained(tmp_path / "emoji" / "tiny-vae")
    monkeypatch.setattr(hub, "ZOO", tmp_path)
    latents = torch.randn(2, 4, 4, 4)
    shown = previewer(engine_like("emoji"))(latents)
    expected = (tiny_vae.decode(latents).detach().numpy().clip(-1, 1) + 1) / 2 * 255
    for picture, array in zip(shown, expected, strict=True):
        assert picture.size == (32, 32)
        assert abs(np.asarray(picture) - array.transpose(1, 2, 0)).max() <= 0.51
    assert previewer(engine_like("other"))(latents)[0].size == (4, 4)
    np.testing.assert_array_equal(
        np.asarray(previewer(engine_like("other", "text_time"))(latents)[0]),
        np.asarray(rough_pictures(latents, xl=True)[0]),
    )


# In a real terminal

IN_A_TERMINAL = """
import fcntl, os, pty, struct, sys, termios
pid, terminal = pty.fork()
if pid == 0:
    os.execv(sys.executable, [sys.executable, "-m", "fourstroke.cli", *sys.argv[1:]])
fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
while True:
    try:
        data = os.read(terminal, 65536)
    except OSError:
        break
    if not data:
        break
    os.write(1, data)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def in_a_terminal(*arguments: str, **variables: str) -> str:
    """What a terminal of 100 x 40 cells is sent."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TMUX", "TERM_PROGRAM", "NO_COLOR")}
    environment = {**kept, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40", **variables}
    command = [sys.executable, "-c", IN_A_TERMINAL, *arguments]
    result = subprocess.run(command, capture_output=True, env=environment)
    assert result.returncode == 0, result.stdout.decode() + result.stderr.decode()
    return result.stdout.decode()


def test_a_run_in_a_terminal(tiny: str, here: Path) -> None:  # noqa: F811
    arguments = ("generate", "fox", "--model", tiny, "--steps", "2", "--seed", "1", "-o", "fox.png")
    sent = in_a_terminal(*arguments, COLORTERM="truecolor")
    assert "0/2" in sent and "2/2" in sent
    assert "seed 1, 64x64, " in sent
    assert sent.rstrip().endswith("fox.png")
    # Two steps and the finished picture, each of 24 lines and 48 columns.
    frames = sent.split("\x1b[24A\r")[1:]
    assert [frame.split("\x1b8")[0].count("▀") for frame in frames] == [24 * 48] * 3
    terminal = Terminal()
    terminal.write("\n" * 24 + "\x1b7\x1b[24A\r" + frames[-1].split("\x1b8")[0])
    with PIL.Image.open(here / "fox.png") as image:
        expected = np.asarray(image.convert("RGB").resize((48, 48), PIL.Image.Resampling.BOX)).astype(int)
    np.testing.assert_array_equal(terminal.picture()[1], expected)


@pytest.mark.parametrize("extra", [("--no-preview",), ()], ids=["not wanted", "no colours"])
def test_a_run_without_previews(tiny: str, here: Path, extra: tuple[str, ...]) -> None:  # noqa: F811
    colours = {"COLORTERM": "truecolor"} if extra else {"COLORTERM": ""}
    sent = in_a_terminal("generate", "fox", "--model", tiny, "--steps", "1", "-o", "fox.png", *extra, **colours)
    assert "▀" not in sent and "1/1" in sent
    assert (here / "fox.png").exists()
