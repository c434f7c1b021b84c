"""The same emoji in other hands: blobs, flat colours, line art. ``python recipes/emoji/styles.py``

Three more npm packages, drawn and aligned with `data.py`'s list of emoji, each into ``.cache/data/<style>``:

- ``blob``: Noto v1 (`@iconify-json/noto-v1`, Apache-2.0), what `emoji/blob` was fine-tuned on;
- ``flat``: Fluent flat (`@iconify-json/fluent-emoji-flat`, MIT), the style of `emoji/flat-lora`;
- ``line``: Fluent high contrast (`@iconify-json/fluent-emoji-high-contrast`, MIT), the style of `emoji/line-lora`.

``python recipes/emoji/styles.py --folder flat /tmp/flat`` writes one style (``noto`` for the base's own pictures) as a
folder of PNG and .txt, for ``fourstroke train lora --data`` and ``fourstroke distill --data``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import CACHE, PACKAGES, fetch, load, render, save_grid, to_floats
from loop import say
from PIL import Image
from torch import Tensor

STYLES = {
    "blob": "@iconify-json/noto-v1@1.2.5",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "line": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
}
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


def build(style: str, folder: Path) -> None:
    """Fetch one style's package, draw what it has of the base's emoji, save pictures and their places in the list."""
    package, noto = fetch(STYLES[style], CACHE / "npm"), fetch(PACKAGES["noto"], CACHE / "npm")
    icons = json.loads((package / "icons.json").read_text())
    own, noto_names = (json.loads((place / "chars.json").read_text()) for place in (package, noto))
    pictures, index = [], []
    for place, emoji in enumerate(load()[1]):
        candidates = names_of(emoji.hexcode, emoji.name, own, noto_names)
        found = next((d for d in (drawing(icons, name) for name in candidates) if d), None)
        if found:
            pictures.append(render(*found))
            index.append(place)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "pictures.npy", np.stack(pictures))
    np.save(folder / "index.npy", np.array(index, dtype=np.int64))


def load_style(name: str) -> tuple[Tensor, Tensor]:
    """A style's pictures, uint8 (M, 3, 128, 128), and their places (M,) in the base's list of emoji.

    ``name`` is ``noto`` (the base's own: all of them), ``blob``, ``flat`` or ``line``. Built first when it is missing.
    """
    if name == BASE:
        pictures = load()[0]
        return pictures, torch.arange(len(pictures))
    folder = CACHE / "data" / name
    if not (folder / "index.npy").exists():
        build(name, folder)
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
