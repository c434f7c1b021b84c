"""The same emoji in other hands: blobs, poster colours, line art. ``python recipes/emoji/styles.py``

Aligned with `data.py`'s list of emoji, each into ``.cache/data/<style>``:

- ``blob``: Noto v1 (npm `@iconify-json/noto-v1`, Apache-2.0), what `emoji/blob` was fine-tuned on;
- ``flat``: the base's pictures in a few flat poster colours on a cream ground, the style of `emoji/flat-lora`;
- ``line``: their outlines in black ink, the style of `emoji/line-lora`.

``python recipes/emoji/styles.py --folder flat /tmp/flat`` writes one style (``noto`` for the base's own pictures) as a
folder of PNG and .txt, for ``fourstroke train lora --data`` and ``fourstroke distill --data``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import CACHE, PACKAGES, fetch, load, render, save_grid, to_floats
from loop import say
from PIL import Image
from torch import Tensor

BLOB = "@iconify-json/noto-v1@1.2.5"
CREAM = (250, 226, 176)
COLOURS = 4  # of a poster, beside its ground
WHITE = 245  # a pixel with no channel below is ground
INK = 90  # a pixel with no channel above is ink, however flat its surroundings
EDGE = 48  # levels by which colours differ across a line
BASE = "noto"
MOST_CAPTIONS = 8  # a picture in a folder has its weightiest captions; a trainer draws among them


def names_of(hexcode: str, label: str, *tables: dict[str, str]) -> Iterator[str]:
    """The names that an icon set may give an emoji: by code point in each table, then made of the label."""
    code = hexcode.lower()
    for table in tables:
        for key in (code, code.replace("-fe0f", "")):
            if key in table:
                yield table[key]
    plain = "".join(letter for letter in label.lower() if letter.isalnum() or letter in " -")
    yield "-".join(plain.split())


def drawing(icons: dict[str, Any], name: str) -> tuple[str, int, int] | None:
    """The SVG body, width and height of an icon or of an alias (which may mirror its parent); None: not there."""
    alias = icons.get("aliases", {}).get(name, {})
    icon = icons["icons"].get(alias.get("parent", name))
    if icon is None:
        return None
    width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    body = icon["body"]
    if alias.get("hFlip"):
        body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
    return body, width, height


def build_blobs(folder: Path) -> None:
    """Fetch the blobs, draw what there is of the base's emoji, save pictures and their places in the list."""
    package, noto = fetch(BLOB, CACHE / "npm"), fetch(PACKAGES["noto"], CACHE / "npm")
    icons = json.loads((package / "icons.json").read_text())
    own, noto_names = (json.loads((place / "chars.json").read_text()) for place in (package, noto))
    pictures, index = [], []
    for place, emoji in enumerate(load()[1]):
        candidates = names_of(emoji.hexcode, emoji.name, own, noto_names)
        found = next((d for d in (drawing(icons, name) for name in candidates) if d), None)
        if found:
            pictures.append(render(*found))
            index.append(place)
    save(folder, pictures, index)


def save(folder: Path, pictures: list[np.ndarray], index: list[int]) -> None:
    """Write what `load_style` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "pictures.npy", np.stack(pictures))
    np.save(folder / "index.npy", np.array(index, dtype=np.int64))


def poster(picture: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) in a few flat colours, found by k-means in its own, more vivid, on cream."""
    import cv2

    ground = picture.min(-1) >= WHITE
    calm = cv2.medianBlur(picture, 5)
    inked = calm[~ground].astype(np.float32)
    painted = np.empty_like(picture)
    painted[:] = CREAM
    if len(inked) >= COLOURS:
        cv2.setRNGSeed(0)
        stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 20, 1.0)
        _, nearest, centres = cv2.kmeans(inked, COLOURS, np.empty(0), stop, 2, cv2.KMEANS_PP_CENTERS)
        grey = centres.mean(-1, keepdims=True)
        vivid = (grey + 1.35 * (centres - grey)).clip(0, 255).round().astype(np.uint8)
        painted[~ground] = vivid[nearest[:, 0]]
    return cv2.medianBlur(painted, 3)


def outline(picture: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) in black ink on white: where its colours change, and where it is dark."""
    import cv2

    calm = cv2.bilateralFilter(picture, 5, 40, 3)
    square = np.ones((3, 3), np.uint8)
    change = cv2.morphologyEx(calm, cv2.MORPH_GRADIENT, square).max(-1)
    ink = np.where((change >= EDGE) | (calm.max(-1) <= INK), 0, 255).astype(np.uint8)
    return np.repeat(cv2.medianBlur(ink, 3)[..., None], 3, axis=-1)


FILTERS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {"flat": poster, "line": outline}
STYLES = ("blob", *FILTERS)


def build_filtered(name: str, folder: Path) -> None:
    """Draw all of the base's pictures through a filter, twice as large and averaged down, and save them."""
    found = []
    for picture in load()[0].permute(0, 2, 3, 1).numpy():
        height, width = picture.shape[:2]
        large = Image.fromarray(picture).resize((2 * width, 2 * height), Image.Resampling.BICUBIC)
        drawn = Image.fromarray(FILTERS[name](np.asarray(large))).resize((width, height), Image.Resampling.BOX)
        found.append(np.asarray(drawn).transpose(2, 0, 1))
    save(folder, found, list(range(len(found))))


def load_style(name: str) -> tuple[Tensor, Tensor]:
    """A style's pictures, uint8 (M, 3, 128, 128), and their places (M,) in the base's list of emoji.

    ``name`` is ``noto`` (the base's own: all of them), ``blob``, ``flat`` or ``line``. Built first when it is missing.
    """
    if name == BASE:
        pictures = load()[0]
        return pictures, torch.arange(len(pictures))
    folder = CACHE / "data" / name
    if not (folder / "index.npy").exists():
        build_blobs(folder) if name == "blob" else build_filtered(name, folder)
    return torch.from_numpy(np.load(folder / "pictures.npy")), torch.from_numpy(np.load(folder / "index.npy"))


def style_folder(name: str, folder: Path) -> int:
    """Write a style's pictures as ``<hexcode>.png`` with ``<hexcode>.txt``, one caption a line; returns how many.

    The captions are those that the base knows, so that a LoRA of the style needs no word of its own to show.
    """
    pictures, index = load_style(name)
    emojis = load()[1]
    folder.mkdir(parents=True, exist_ok=True)
    for picture, place in zip(pictures, index.tolist(), strict=True):
        emoji = emojis[place]
        best = sorted(emoji.captions, key=lambda caption: -caption[1])[:MOST_CAPTIONS]
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{emoji.hexcode}.png")
        (folder / f"{emoji.hexcode}.txt").write_text("\n".join(caption for caption, _ in best) + "\n")
    return len(pictures)


def sheet(name: str, path: Path) -> None:
    """A style's pictures under the base's, pair by pair."""
    pictures, index = load_style(name)
    chosen = torch.arange(0, len(index), max(1, len(index) // 100))[:100]
    pairs = []
    for part in chosen.split(20):
        pairs += [load()[0][index[part]], pictures[part]]
    save_grid(to_floats(torch.cat(pairs)), path, columns=20)


def main() -> None:
    """Build every style, or write one as a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", nargs=2, metavar=("STYLE", "FOLDER"), help="write one style as PNG and .txt files")
    options = parser.parse_args()
    if options.folder:
        style, folder = options.folder
        say(f"{style_folder(style, Path(folder))} pictures of {style} in {folder}")
        return
    for style in STYLES:
        pictures, _ = load_style(style)
        sheet(style, CACHE / "data" / style / "sheet.png")
        say(f"{style}: {len(pictures)} pictures in {CACHE / 'data' / style}")


if __name__ == "__main__":
    main()
