"""Large tensors in parts."""

from __future__ import annotations

import pytest
import torch

from fourstroke import parts
from fourstroke.parts import cast, in_rows

HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("block", [1, 7, 1 << 21])
@pytest.mark.parametrize("shape", [(5,), (5, 3), (6, 2, 3, 3), (1, 40)])
def test_rows_come_one_after_the_other(block: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "BLOCK", block)
    tensor = torch.randn(shape).half()
    found = torch.zeros(shape)
    ends = [0]
    for rows, values in in_rows(tensor):
        assert rows.start == ends[-1] and values.dtype == torch.float32 and values.ndim == 2
        assert values.numel() <= max(block, tensor[0].numel())
        found[rows] = values.view(found[rows].shape)
        ends.append(rows.stop)
    assert ends[-1] == len(tensor) and torch.equal(found, tensor.float())


@pytest.mark.parametrize("block", [10, 1 << 21])
@pytest.mark.parametrize("shape", [(), (0,), (33,), (3, 4, 5)])
@pytest.mark.parametrize("given", [*HALVES, torch.float32])
@pytest.mark.parametrize("wanted", [*HALVES, torch.float32])
def test_a_cast_is_torch_s(
    given: torch.dtype, wanted: torch.dtype, shape: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "BLOCK", block)
    # Beyond what float16 holds, and below what it holds precisely.
    sizes = torch.logspace(-9, 6, 60)[: torch.Size(shape).numel()].view(shape)
    tensor = (torch.randn(shape) * sizes).to(given)
    assert torch.equal(cast(tensor, wanted), tensor.to(wanted))
    if tensor.ndim > 1:
        assert torch.equal(cast(tensor.transpose(0, 1), wanted), tensor.transpose(0, 1).to(wanted))
