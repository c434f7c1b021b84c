"""What a single file lacks: the configurations and CLIP's vocabulary, shipped in ``configs/``."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

from .. import hub
from ..loading import CONFIG_NAME, read_json
from ..text import END, START, Tokenizer
from ..text import FILES as TOKENIZER_FILES

CONFIGS = Path(__file__).parents[1] / "configs"
INDEX_NAME = "model_index.json"


def families() -> list[str]:
    """The families whose configurations are shipped, such as ``sd15`` and ``sdxl``."""
    return sorted(path.parent.name for path in CONFIGS.glob("*/model_index.json"))


def config_folder(config: str | os.PathLike[str], **where: Any) -> Path:
    """The folder of component configurations that ``config`` names: a family, a folder, a shipped model or a hub id.

    Raises:
        FileNotFoundError: there is none.
    """
    if str(config) in families():
        return CONFIGS / str(config)

    def select(files: list[str]) -> list[str]:
        names = {INDEX_NAME, CONFIG_NAME, "scheduler_config.json", *TOKENIZER_FILES}
        return [file for file in files if file.rsplit("/", 1)[-1] in names]

    return hub.fetch(config, select, **where)


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary (49,408 tokens) and byte-pair merges (48,894), derived from the shipped merges.

    The first 256 tokens are the bytes and the next 256 are bytes that end a word; then come the merges' results, in
    order, and the two special tokens. A byte that is not a printable character of Latin-1 is written as the next free
    character from U+0100 on (Radford et al. 2019).
    """
    text = gzip.decompress((CONFIGS / "clip" / "merges.txt.gz").read_bytes()).decode("utf-8")
    merges = [(first, second) for first, second in (line.split(" ") for line in text.strip().split("\n"))]
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [*map(chr, printable), *(chr(0x100 + i) for i in range(256 - len(printable)))]
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, merges), START, END]
    return {token: i for i, token in enumerate(tokens)}, merges


def clip_tokenizer(pad_token: str = END) -> Tokenizer:
    """CLIP's tokenizer from the shipped vocabulary.

    Args:
        pad_token: SD 2.x's and SDXL's second tokenizer fill up with ``"!"``.
    """
    return Tokenizer(*clip_vocabulary(), pad_token=pad_token)


def tokenizer_of(folder: Path, vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """The tokenizer in ``folder`` if it has a vocabulary, else CLIP's with the padding that its settings name."""
    if (folder / "vocab.json").exists() or (folder / "tokenizer.json").exists():
        return Tokenizer.from_folder(folder)
    settings = folder / "tokenizer_config.json"
    pad_token = read_json(settings).get("pad_token") if settings.exists() else None
    return Tokenizer(vocab, merges, pad_token=pad_token["content"] if isinstance(pad_token, dict) else pad_token or END)
