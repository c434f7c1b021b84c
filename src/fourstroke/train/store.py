"""Rows of tensors by key, in memory-mapped files of a folder: what was computed once is never computed again."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..loading import WeightError, open_tensors, save_tensors

T = TypeVar("T")
SUFFIX = ".safetensors"
KEYS = "keys"
ROWS_A_FILE, SECONDS_A_FILE = 256, 30.0
SAMPLED = 64  # elements of each parameter that a fingerprint looks at
PIXELS_A_BATCH = 2**20  # for VAE and teacher; the memory they take at a time


def key_of(*parts: object) -> bytes:
    """16 bytes that stand for ``parts``, whose ``repr`` tells them apart."""
    return hashlib.blake2b("\n".join(map(repr, parts)).encode(), digest_size=16).digest()


def fingerprint(*parts: nn.Module | object) -> str:
    """16 hexadecimal digits that stand for networks and settings.

    Of a network its class, configuration, dtype and names count, and 64 elements of every parameter, spread evenly. So
    it is the same wherever the files lie, and another one once a LoRA is merged.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if not isinstance(part, nn.Module):
            digest.update(repr(part).encode())
            continue
        digest.update(f"{type(part).__name__} {getattr(part, 'config', None)!r}".encode())
        for name, value in part.state_dict().items():
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            flat = value.detach().flatten()
            digest.update(flat[:: max(1, -(-len(flat) // SAMPLED))].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def folder_of(cache: Path | None, kind: str, *parts: nn.Module | object) -> Path | None:
    """The folder in ``cache`` for what networks and settings make; None without a cache."""
    return None if cache is None else cache / f"{kind}-{fingerprint(*parts)}"


def pieces(values: Sequence[T], size: int) -> list[Sequence[T]]:
    """``values`` in pieces of ``size``, the last one shorter."""
    return [values[i : i + size] for i in range(0, len(values), size)]


class Store:
    """Rows by key. Rows of one file have one shape; a row may be several tensors, by name.

    Args:
        folder: where the files are; None keeps the rows in memory.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._parts: list[Mapping[str, Tensor]] = []
        self._places: dict[bytes, tuple[int, int]] = {}
        self._pending: list[tuple[bytes, Mapping[str, Tensor]]] = []
        self._since = time.monotonic()
        for path in sorted(folder.glob("*" + SUFFIX)) if folder is not None and folder.is_dir() else ():
            try:
                self._load(path)
            except WeightError as error:
                warnings.warn(f"{error} Its contents are computed again.", stacklevel=2)

    def __enter__(self) -> Store:
        """Inside, rows are added; what has been added is written at the end, also when that is an interruption."""
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def add(self, keys: Sequence[bytes], rows: Mapping[str, Tensor]) -> None:
        """Take ``rows``, name -> (len(keys), …), all of one shape between two calls of `flush`.

        They are written, and can be read, when 256 have come together or half a minute has passed, and by `flush`.
        """
        for i, key in enumerate(keys):
            # A copy, which keeps no more in memory than itself.
            self._pending.append((key, {name: value[i].detach().cpu().clone() for name, value in rows.items()}))
        if len(self._pending) >= ROWS_A_FILE or time.monotonic() - self._since > SECONDS_A_FILE:
            self.flush()

    def flush(self) -> None:
        """Write what has been added, as one file that is whole or not there."""
        self._since = time.monotonic()
        if not self._pending:
            return
        keys = [key for key, _ in self._pending]
        names = list(self._pending[0][1])
        part = {name: torch.stack([row[name] for _, row in self._pending]) for name in names}
        part[KEYS] = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).reshape(len(keys), -1)
        self._pending = []
        if self.folder is None:
            self._take(part)
            return
        # Named after what is in it, so that two processes do not get into each other's way.
        path = self.folder / (key_of(*keys).hex() + SUFFIX)
        save_tensors(path, part)
        self._load(path)

    def _load(self, path: Path) -> None:
        file = open_tensors(path)
        self._take({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping

    def _take(self, part: Mapping[str, Tensor]) -> None:
        number = len(self._parts)
        self._parts.append(part)
        for row, key in enumerate(part[KEYS].numpy()):
            self._places.setdefault(key.tobytes(), (number, row))

    def read(self, keys: Sequence[bytes]) -> dict[str, Tensor]:
        """The rows of ``keys``, name -> (len(keys), …), float32 on the CPU.

        Raises:
            KeyError: there is no such row.
        """
        places = [self._places[key] for key in keys]
        names = [name for name in self._parts[places[0][0]] if name != KEYS]
        return {name: torch.stack([self._parts[part][name][row].float() for part, row in places]) for name in names}
