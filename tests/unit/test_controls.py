"""Control pictures: edges as OpenCV finds them, and networks of a library that need not be installed."""

from __future__ import annotations

import sys
import types

import cv2
import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest

from fourstroke.controls import DETECTORS, canny


def drawing(size: tuple[int, int] = (90, 70)) -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(0, 40, (size[1], size[0], 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(pixels)
    draw = PIL.ImageDraw.Draw(picture)
    draw.ellipse((10, 10, 60, 50), fill=(200, 30, 60))
    draw.line((0, 60, 89, 20), fill=(90, 160, 90), width=3)
    return picture


@pytest.mark.parametrize("thresholds", [(), (100, 200), (10, 30), (250, 400)], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_edges_are_those_of_the_guide(mode: str, thresholds: tuple[int, int]) -> None:
    picture = drawing().convert(mode)
    edges = cv2.Canny(np.array(picture.convert("RGB")), *(thresholds or (100, 200)))
    expected = np.concatenate([edges[:, :, None]] * 3, axis=2)
    found = canny(picture, *thresholds)
    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found), expected)
    assert thresholds == (250, 400) or 0 < (expected > 0).mean() < 0.9


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("canny", "cv2", "controls"),
        ("lineart", "controlnet_aux", "annotators"),
        ("depth", "controlnet_aux", "annotators"),
        ("pose", "controlnet_aux", "annotators"),
    ],
)
def test_a_missing_library_is_named(name: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{name} needs .*: pip install 'fourstroke\[{extra}\]'"):
        DETECTORS[name](drawing())


@pytest.mark.parametrize(
    ("name", "kind"), [("lineart", "LineartDetector"), ("depth", "MidasDetector"), ("pose", "OpenposeDetector")]
)
def test_the_librarys_answer_gets_the_pictures_size(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    class Detector:
        @classmethod
        def from_pretrained(cls, repository: str) -> Detector:
            calls.append(repository)
            return cls()

        def __call__(self, picture: PIL.Image.Image, **options: object) -> PIL.Image.Image:
            calls.append((picture.mode, options))
            return PIL.Image.new("L", (128, 64), 90)

    library = types.ModuleType("controlnet_aux")
    setattr(library, kind, Detector)
    monkeypatch.setitem(sys.modules, "controlnet_aux", library)
    found = DETECTORS[name](drawing().convert("RGBA"))
    assert (found.mode, found.size, found.getpixel((0, 0))) == ("RGB", (90, 70), (90, 90, 90))
    assert calls == ["lllyasviel/Annotators", ("RGB", {"detect_resolution": 512, "image_resolution": 70})]


@pytest.mark.parametrize("name", DETECTORS)
def test_other_types_are_named(name: str) -> None:
    with pytest.raises(TypeError, match=r"A str is no PIL image; open files with fourstroke.utils.load_image"):
        DETECTORS[name]("cat.png")  # pyright: ignore[reportArgumentType]
