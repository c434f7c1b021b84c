"""Tensors in files: values, the files' names and their room, and a disk that is full."""

from __future__ import annotations

import copy
import errno
import os
import pickle
from pathlib import Path

import pytest
import torch

from fourstroke.runtime.spill import SMALL, Spill


@pytest.fixture
def spill(tmp_path: Path) -> Spill:
    return Spill(tmp_path / "made" / "when missing")


def in_file(tensor: torch.Tensor) -> bool:
    return not tensor.untyped_storage().resizable()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_values_come_and_stay(spill: Spill, dtype: torch.dtype) -> None:
    given = torch.randn(7, 3, SMALL // 8).mul(10).to(dtype).transpose(0, 1)
    taken = spill.take(given)
    assert torch.equal(taken, given) and taken.dtype == dtype and taken.is_contiguous() and in_file(taken)
    taken.add_(1)
    assert torch.equal(taken, given + 1)
    assert spill.take(taken).data_ptr() == taken.data_ptr()


def test_small_ones_stay_in_memory(spill: Spill) -> None:
    small = torch.randn(SMALL // 4 - 1)
    assert spill.take(small).data_ptr() == small.data_ptr()
    assert in_file(spill.take(torch.randn(SMALL // 4)))


def test_no_file_is_left(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    taken = spill.take(torch.randn(SMALL))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    del spill
    assert not [*tmp_path.iterdir()]
    assert taken.isfinite().all()


def test_copies_have_a_folder_of_their_own(spill: Spill) -> None:
    for other in (copy.deepcopy(spill), pickle.loads(pickle.dumps(spill))):
        assert other._own != spill._own and other._own.parent == spill._own.parent


def test_a_full_disk_is_told(spill: Spill, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: memoryview) -> int:
        path.open("wb").close()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"4 MB cannot be put into .*\(No space left on device\); make room .*offload"):
        spill.take(torch.empty(1 << 20))
    assert not [*spill._own.iterdir()]
