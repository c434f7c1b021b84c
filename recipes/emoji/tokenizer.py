"""A CLIP-style tokenizer of our own: byte-level BPE with ``</w>``, learnt on the captions.

``python recipes/emoji/tokenizer.py FOLDER`` writes vocab.json, merges.txt, tokenizer_config.json and
special_tokens_map.json, which transformers' CLIPTokenizer and fourstroke's own tokenizer read.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from data import CACHE, Emoji, load
from loop import say
from torch import Tensor

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 2500
MAX_LENGTH = 77  # what the files promise
PRETRAINING_LENGTH = 24  # no caption is longer, and attention is causal: more padding does not change the pooled vector
WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|[^\s\w]+|_+", re.IGNORECASE)


def byte_symbols() -> tuple[list[str], dict[int, str]]:
    """The 256 byte characters in CLIP's vocabulary order (printable bytes first), and byte -> character."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    symbol = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [symbol[byte] for byte in printable + others], symbol


def words(text: str) -> list[str]:
    """Lower-cased words, single digits and punctuation runs: CLIP's split."""
    return WORD.findall(" ".join(text.lower().split()))


def learn(counts: Counter[str], merges: int) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, ties by the pair itself, until ``merges`` or no pair occurs twice."""
    _, symbol = byte_symbols()
    pieces = {word: [symbol[b] for b in word.encode()] for word in counts}
    for parts in pieces.values():
        parts[-1] += "</w>"
    learnt: list[tuple[str, str]] = []
    while len(learnt) < merges:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in zip(parts, parts[1:], strict=False):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < 2:
            break
        learnt.append(best)
        for word, parts in pieces.items():
            pieces[word] = merge(parts, best)
    return learnt


def merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of ``pair``, left to right."""
    joined: list[str] = []
    index = 0
    while index < len(parts):
        if index + 1 < len(parts) and (parts[index], parts[index + 1]) == pair:
            joined.append(parts[index] + parts[index + 1])
            index += 2
        else:
            joined.append(parts[index])
            index += 1
    return joined


def build(emojis: Sequence[Emoji], folder: Path, merges: int = MERGES) -> None:
    """Learn the merges on all captions and write the four files."""
    counts: Counter[str] = Counter()
    for emoji in emojis:
        for caption, _ in emoji.captions:
            counts.update(words(caption))
    learnt = learn(counts, merges)
    symbols, _ = byte_symbols()
    tokens = symbols + [s + "</w>" for s in symbols] + [a + b for a, b in learnt] + [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(f"{a} {b}" for a, b in learnt) + "\n")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH, "do_lower_case": True,
              "add_prefix_space": False, "errors": "replace", **special}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


class Tokenizer:
    """Text -> token ids, from the files that :func:`build` wrote."""

    def __init__(self, folder: Path):
        self.vocabulary: dict[str, int] = json.loads((folder / "vocab.json").read_text())
        lines = (folder / "merges.txt").read_text().splitlines()[1:]
        self.ranks = {tuple(line.split(" ")): rank for rank, line in enumerate(lines)}
        self.start, self.end = self.vocabulary[START], self.vocabulary[END]
        self.symbol = byte_symbols()[1]
        self.known: dict[str, list[int]] = {}  # words seen before

    def word(self, word: str) -> list[int]:
        """The ids of one word."""
        if word in self.known:
            return self.known[word]
        parts = [self.symbol[b] for b in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            pair = min(zip(parts, parts[1:], strict=False), key=lambda p: self.ranks.get(p, 1 << 30))
            if pair not in self.ranks:
                break
            parts = merge(parts, pair)
        return self.known.setdefault(word, [self.vocabulary[part] for part in parts])

    def __call__(self, texts: Sequence[str], length: int = MAX_LENGTH) -> Tensor:
        """Ids (B, length) int64: start, words, end, and end again as padding; too long a text is cut."""
        rows = []
        for text in texts:
            ids = [i for word in words(text) for i in self.word(word)][: length - 2]
            rows.append([self.start, *ids, self.end] + [self.end] * (length - 2 - len(ids)))
        return torch.tensor(rows)


def main() -> None:
    """Build the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=CACHE / "tokenizer")
    folder = parser.parse_args().folder
    _, emojis = load()
    build(emojis, folder)
    tokenizer = Tokenizer(folder)
    lengths = [int((ids != tokenizer.end).sum()) + 1 for e in emojis for ids in tokenizer([c for c, _ in e.captions])]
    mean = sum(lengths) / len(lengths)
    say(f"{len(tokenizer.vocabulary)} tokens; longest caption {max(lengths)} ids, mean {mean:.1f}")


if __name__ == "__main__":
    main()
