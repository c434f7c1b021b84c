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
    assert spill.take(taken) is taken


def test_small_ones_stay_in_memory(spill: Spill) -> None:
    small = torch.randn(SMALL // 4 - 1)
    assert spill.take(small) is small and not in_file(spill.empty_like(small))
    assert in_file(spill.empty_like(torch.empty(SMALL // 4)))


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


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system does not reserve room in files")
def test_a_full_disk_is_told_before_anything_is_written(spill: Spill, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*unused: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"no room for 4 MB more in .*\(No space left on device\); free some, .*offload"):
        spill.empty_like(torch.empty(1 << 20))
    assert not [*spill._own.iterdir()]
