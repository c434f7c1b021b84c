"""The examples that want networks of the hub, on the fake one."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import PIL.Image
import pytest

from fourstroke.utils import save_animation

from ..unit.tiny import picture

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(
    name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[Path]:
    """The files whose paths the example prints."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return [Path(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.usefixtures("hub")
def test_an_inpainted_controlled_styled_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(0, (64, 64)).save("photo.png")
    mask = PIL.Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    mask.save("mask.png")
    [made] = run("everything_at_once.py", ["photo.png", "mask.png"], monkeypatch, capsys)
    with PIL.Image.open(made) as painted:
        assert painted.size == (64, 64) and len(painted.getcolors(1 << 16) or []) > 100


@pytest.mark.usefixtures("hub")
def test_animations_long_repainted_and_steered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_animation([picture(i, (64, 64)) for i in range(6)], "video.gif", fps=8)
    made = run("animation.py", ["video.gif"], monkeypatch, capsys)
    assert [path.name for path in made] == ["long.gif", "repainted.gif", "steered.gif"]
    for path, frames in zip(made, (32, 6, 6), strict=True):
        with PIL.Image.open(path) as animation:
            assert animation.n_frames == frames  # type: ignore[attr-defined]
