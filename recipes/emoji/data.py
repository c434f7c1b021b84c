"""The pictures and their captions: Noto emoji, rendered on white, with names and keywords from emojibase.

``python recipes/emoji/data.py`` fetches two npm packages (``@iconify-json/noto``, Apache-2.0, and ``emojibase-data``,
MIT), renders every emoji without flags, skin tones and keycaps at 128x128, and writes to ``recipes/emoji/.cache/data``:

- ``pictures.npy``: uint8 (N, 3, 128, 128), red green blue, white background;
- ``captions.json``: for each picture its hexcode, its name, and a list of ``[caption, weight]``.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tarfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

CACHE = Path(__file__).parent / ".cache"
PACKAGES = {"noto": "@iconify-json/noto@1.2.9", "emojibase": "emojibase-data@17.0.0"}
SIZE = 128
SUPERSAMPLING = 2  # rendered larger and averaged down: cleaner edges than the rasteriser's own coverage
GROUP_PEOPLE, GROUP_COMPONENTS, GROUP_FLAGS = 1, 2, 9
COLOUR_WORDS = {
    "red": ("red",), "orange": ("orange", "red"), "yellow": ("yellow",), "green": ("green",), "blue": ("blue",),
    "purple": ("purple",), "pink": ("pink",), "brown": ("brown",), "black": ("black",), "gray": ("gray", "grey"),
}  # fmt: skip
ALL_COLOURS = {word for words in COLOUR_WORDS.values() for word in words} | {"white"}
FEW = 6  # a keyword that more pictures share names none of them
VOWELS = "aeiou"


@dataclass(frozen=True)
class Emoji:
    """One picture's words: ``captions`` are (text, weight) with weights that sum to one."""

    hexcode: str
    name: str
    captions: list[tuple[str, float]]


def fetch(spec: str, folder: Path) -> Path:
    """Download and unpack one npm package; returns its ``package`` folder. Does nothing when it is already there."""
    target = folder / spec.replace("@", "_").replace("/", "_")
    if not (target / "package" / "package.json").exists():
        target.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", spec, "--silent", "--pack-destination", str(target)]
        archive = target / subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")
    return target / "package"


def render(body: str, width: int, height: int) -> np.ndarray:
    """Rasterise one SVG body on white: uint8 (3, SIZE, SIZE)."""
    import resvg_py

    large = SIZE * SUPERSAMPLING
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=large, height=large, background="white", skip_system_fonts=True)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(picture).transpose(2, 0, 1)


def wanted(entry: dict[str, Any]) -> bool:
    """Whether an emojibase entry is a picture worth painting: no flags, no keycaps, no skin-tone swatches."""
    if entry.get("group") in (None, GROUP_COMPONENTS, GROUP_FLAGS):
        return False
    return not entry["label"].startswith("keycap")


def colour_of(picture: np.ndarray) -> str | None:
    """The one colour that covers most of a picture's inked area, or None when no colour holds 45 % of it."""
    pixels = picture.reshape(3, -1).astype(np.float32) / 255
    pixels = pixels[:, pixels.min(0) < 0.92]
    if pixels.shape[1] < 200:
        return None
    high, low = pixels.max(0), pixels.min(0)
    chroma = high - low
    red, green, blue = pixels
    safe = np.maximum(chroma, 1e-6)
    hue = np.where(high == red, (green - blue) / safe % 6, np.where(high == green, (blue - red) / safe + 2,
                   (red - green) / safe + 4)) * 60  # fmt: skip
    colourful = chroma / np.maximum(high, 1e-6) > 0.25
    warm = (hue < 45) | (hue >= 345)
    masks = {
        "red": colourful & ((hue < 14) | (hue >= 345)) & (high > 0.5),
        "orange": colourful & (hue >= 14) & (hue < 38) & (high > 0.72),
        "yellow": colourful & (hue >= 38) & (hue < 66) & (high > 0.5),
        "green": colourful & (hue >= 66) & (hue < 170),
        "blue": colourful & (hue >= 170) & (hue < 255),
        "purple": colourful & (hue >= 255) & (hue < 300),
        "pink": colourful & (hue >= 300) & (hue < 345),
        "brown": colourful & warm & (high <= 0.72) & (hue >= 14),
        "black": ~colourful & (high < 0.35),
        "gray": ~colourful & (high >= 0.35),
    }
    name, count = max(((name, int(mask.sum())) for name, mask in masks.items()), key=lambda item: item[1])
    return name if count >= 0.45 * pixels.shape[1] else None


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return ("an " if noun[:1] in VOWELS else "a ") + noun


def nouns_of(entry: dict[str, Any], names: set[str], nicknames: list[str]) -> dict[str, float]:
    """What a picture may be called, with weights: its name, its name with or without "face", two short names."""
    name = entry["label"].lower().replace(":", "").replace("“", "").replace("”", "")
    nouns = {name: 1.0}
    if name.endswith(" face") and name.removesuffix(" face") not in names and entry["group"] != 0:
        nouns[name.removesuffix(" face")] = 1.0
    if "face" in entry["tags"] and entry["group"] != 0 and f"{name} face" not in names and "face" not in name:
        nouns[f"{name} face"] = 0.5
    for nickname in nicknames[:2]:
        if nickname not in names and nickname not in nouns:
            nouns[nickname] = 0.3
    return nouns


def captions_of(
    entry: dict[str, Any], nouns: dict[str, float], colour: str | None, spread: Counter[str]
) -> dict[str, float]:
    """Captions of one emoji with their weights (not normalised).

    The names carry most of the weight; keywords follow, alone only where ``spread`` counts few pictures that share
    them; the colour, measured in the picture, makes "a red fox" out of "fox".
    """
    found: dict[str, float] = defaultdict(float)
    for noun, weight in nouns.items():
        share = weight / sum(nouns.values())
        for template, likelihood in (("{a}", 4.0), ("{n}", 3.0), ("a picture of {a}", 1.0), ("the {n}", 0.5),
                                     ("{n} emoji", 0.5), ("a drawing of {a}", 0.5)):  # fmt: skip
            found[template.format(n=noun, a=article(noun))] += likelihood * share
        if colour and not ALL_COLOURS & set(noun.split()) and entry["group"] != GROUP_PEOPLE:
            words = COLOUR_WORDS[colour]
            for word in words:
                found[f"{article(word)} {noun}"] += 3.0 * share / len(words)
                found[f"{word} {noun}"] += 1.0 * share / len(words)
    name = next(iter(nouns))
    keywords = [tag for tag in entry["tags"] if tag not in name.split() and len(tag) > 1]
    for keyword in keywords:
        found[f"{name}, {keyword}"] += 1.2 / len(keywords)
        if spread[keyword] <= FEW:
            found[keyword] += 0.6 / len(keywords)
    return found


def build(folder: Path) -> None:
    """Fetch, render, caption, save."""
    noto, emojibase = (fetch(spec, CACHE / "npm") for spec in PACKAGES.values())
    icons = json.loads((noto / "icons.json").read_text())
    by_code = json.loads((noto / "chars.json").read_text())
    entries = [entry for entry in json.loads((emojibase / "en/data.json").read_text()) if wanted(entry)]
    shortcodes = json.loads((emojibase / "en/shortcodes/emojibase.json").read_text())
    names = {entry["label"].lower() for entry in entries}
    spread = Counter(tag for entry in entries for tag in entry["tags"])
    pictures, records = [], []
    for entry in sorted(entries, key=lambda entry: entry["order"]):
        code = entry["hexcode"].lower()
        icon = by_code.get(code) or by_code.get(code.replace("-fe0f", ""))
        if icon not in icons["icons"]:
            continue
        drawing = icons["icons"][icon]
        picture = render(drawing["body"], drawing.get("width", icons["width"]), drawing.get("height", icons["height"]))
        nicknames = shortcodes.get(entry["hexcode"], [])
        nicknames = [name.replace("_", " ") for name in ([nicknames] if isinstance(nicknames, str) else nicknames)]
        found = captions_of(entry, nouns_of(entry, names, nicknames), colour_of(picture), spread)
        total = sum(found.values())
        captions = [(caption, weight / total) for caption, weight in found.items()]
        pictures.append(picture)
        records.append({"hexcode": entry["hexcode"], "name": entry["label"].lower(), "captions": captions})
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "pictures.npy", np.stack(pictures))
    (folder / "captions.json").write_text(json.dumps(records, ensure_ascii=False))


def load(folder: Path = CACHE / "data") -> tuple[torch.Tensor, list[Emoji]]:
    """The pictures as uint8 (N, 3, 128, 128) and their words, built first when they are missing."""
    if not (folder / "captions.json").exists():
        build(folder)
    pictures = torch.from_numpy(np.load(folder / "pictures.npy"))
    records = json.loads((folder / "captions.json").read_text())
    return pictures, [Emoji(r["hexcode"], r["name"], [(c, w) for c, w in r["captions"]]) for r in records]


def to_floats(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float32 -1..1."""
    return pictures.float() / 127.5 - 1


def save_grid(pictures: torch.Tensor, path: Path, columns: int = 8) -> None:
    """Write float pictures (N, 3, H, W) in -1..1 as one PNG, row by row."""
    count, _, height, width = pictures.shape
    rows = -(-count // columns)
    sheet = torch.ones(3, rows * height, columns * width)
    for index, picture in enumerate(pictures):
        top, left = index // columns * height, index % columns * width
        sheet[:, top : top + height, left : left + width] = picture.float().clamp(-1, 1)
    array = ((sheet + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def main() -> None:
    """Build the data and write a contact sheet beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    build(CACHE / "data")
    pictures, emojis = load()
    save_grid(to_floats(pictures[:: max(1, len(emojis) // 240)]), CACHE / "data" / "sheet.png", columns=20)
    print(f"{len(emojis)} pictures, {sum(len(e.captions) for e in emojis)} captions in {CACHE / 'data'}")  # noqa: T201


if __name__ == "__main__":
    main()
