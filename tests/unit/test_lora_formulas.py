"""Each adapter's formula against the same mathematics in float64, or against the layers that it stands for."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fourstroke.lora import AdapterWeights, Diff, Dora, LoHa, LoKr, LoraError, LoraPair, merge_weight
from fourstroke.lora.pairs import map_tensors, misfit


def r(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def close(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alpha", [None, 8.0, 0.5])
def test_pair_of_a_linear_layer(alpha: float | None) -> None:
    weights = LoraPair(r(3, 5), r(7, 3), alpha)
    scale = 1.0 if alpha is None else alpha / 3
    close(weights.delta(r(7, 5), 0.7), 0.7 * scale * (weights.up.numpy() @ weights.down.numpy()))
    assert weights.rank == 3 and weights.scale == scale


@pytest.mark.parametrize("kernel", [1, 3])
def test_pair_of_a_convolution_is_two_convolutions(kernel: int) -> None:
    weights = LoraPair(r(3, 5, kernel, kernel), r(7, 3, 1, 1), 2.0)
    x, base = r(1, 5, 6, 6), r(7, 5, kernel, kernel)
    expected = functional.conv2d(functional.conv2d(x, weights.down), weights.up) * 2 / 3
    close(functional.conv2d(x, weights.delta(base)), expected)


def test_pair_with_a_core_is_three_convolutions() -> None:
    weights = LoraPair(r(3, 5, 1, 1), r(7, 4, 1, 1), 2.0, mid=r(4, 3, 3, 3))
    x, base = r(1, 5, 6, 6), r(7, 5, 3, 3)
    layers = functional.conv2d(functional.conv2d(functional.conv2d(x, weights.down), weights.mid), weights.up)
    close(functional.conv2d(x, weights.delta(base)), layers * 2 / 3)
    folded = map_tensors(weights, Tensor.float).folded()
    assert folded.mid is None
    assert weights.folded().mid is None and LoraPair(r(3, 5), r(7, 3)).folded().down.shape == (3, 5)


def test_folding_a_core_keeps_the_change() -> None:
    """The ranks of ``down`` and of ``up`` may differ around a core; alpha counts by ``down``."""
    weights = LoraPair(r(3, 5, 1, 1).float(), r(7, 3, 1, 1).float(), 2.0, mid=r(3, 3, 3, 3).float())
    base = r(7, 5, 3, 3).float()
    torch.testing.assert_close(weights.folded().delta(base), weights.delta(base), rtol=1e-5, atol=1e-5)


def test_loha_of_a_linear_layer() -> None:
    """LyCORIS, equation of section 3.2: a Hadamard product of two products."""
    weights = LoHa(r(7, 3), r(3, 5), r(7, 3), r(3, 5), alpha=2.0)
    first = weights.w1_a.numpy() @ weights.w1_b.numpy()
    second = weights.w2_a.numpy() @ weights.w2_b.numpy()
    close(weights.delta(r(7, 5), 0.5), first * second * 2 / 3 * 0.5)
    assert weights.rank == 3
    close(LoHa(weights.w1_a, weights.w1_b, weights.w2_a, weights.w2_b).delta(r(7, 5)), first * second)


def test_loha_of_a_convolution() -> None:
    weights = LoHa(r(7, 3), r(3, 5 * 9), r(7, 3), r(3, 5 * 9), alpha=2.0)
    product = (weights.w1_a @ weights.w1_b) * (weights.w2_a @ weights.w2_b)
    close(weights.delta(r(7, 5, 3, 3)), product.numpy().reshape(7, 5, 3, 3) * 2 / 3)


def tucker(core: Tensor, a: Tensor, b: Tensor) -> np.ndarray:
    """``W[o, c, x, y] = sum over i, j of core[i, j, x, y] a[i, o] b[j, c]``, term by term."""
    out = np.zeros((a.shape[1], b.shape[1], *core.shape[2:]))
    for i in range(core.shape[0]):
        for j in range(core.shape[1]):
            out += core[i, j].numpy()[None, None] * np.multiply.outer(a[i].numpy(), b[j].numpy())[:, :, None, None]
    return out


def test_loha_with_cores() -> None:
    weights = LoHa(r(3, 7), r(3, 5), r(3, 7), r(3, 5), t1=r(3, 3, 2, 2), t2=r(3, 3, 2, 2), alpha=1.0)
    assert weights.t1 is not None and weights.t2 is not None
    expected = tucker(weights.t1, weights.w1_a, weights.w1_b) * tucker(weights.t2, weights.w2_a, weights.w2_b)
    close(weights.delta(r(7, 5, 2, 2)), expected / 3)


LOKR = {
    "both full": {"w1": (2, 3), "w2": (4, 5)},
    "first decomposed": {"w1_a": (2, 3), "w1_b": (3, 3), "w2": (4, 5)},
    "second decomposed": {"w1": (2, 3), "w2_a": (4, 2), "w2_b": (2, 5)},
    "both decomposed": {"w1_a": (2, 2), "w1_b": (2, 3), "w2_a": (4, 2), "w2_b": (2, 5)},
}


@pytest.mark.parametrize("case", LOKR)
def test_lokr_of_a_linear_layer(case: str) -> None:
    """LyCORIS, equation of section 3.3: a Kronecker product."""
    tensors = {name: r(*shape) for name, shape in LOKR[case].items()}
    weights = LoKr(**tensors, alpha=5.0)
    w1 = tensors.get("w1", tensors.get("w1_a", r(1, 1)) @ tensors.get("w1_b", r(1, 1)) if "w1_a" in tensors else None)
    w2 = tensors.get("w2", tensors.get("w2_a", r(1, 1)) @ tensors.get("w2_b", r(1, 1)) if "w2_a" in tensors else None)
    rank = {"both full": None, "first decomposed": 3, "second decomposed": 2, "both decomposed": 2}[case]
    scale = 1.0 if rank is None else 5.0 / rank  # without a decomposition there is nothing to scale
    close(weights.delta(r(8, 15)), np.kron(w1.numpy(), w2.numpy()) * scale)
    assert weights.rank == rank


@pytest.mark.parametrize("form", ["full", "decomposed", "core"])
def test_lokr_of_a_convolution(form: str) -> None:
    """The kernel belongs to the second factor: block (i, j) of the change is ``w1[i, j] * w2``."""
    w1 = r(2, 3)
    if form == "full":
        w2, tensors, scale = (w := r(4, 5, 3, 3)).numpy(), {"w2": w}, 1.0
    elif form == "decomposed":
        a, b = r(4, 2), r(2, 5 * 9)
        w2, tensors, scale = (a @ b).numpy().reshape(4, 5, 3, 3), {"w2_a": a, "w2_b": b}, 3 / 2
    else:
        core, a, b = r(2, 2, 3, 3), r(2, 4), r(2, 5)
        w2, tensors, scale = tucker(core, a, b), {"t2": core, "w2_a": a, "w2_b": b}, 3 / 2
    found = LoKr(w1=w1, **tensors, alpha=3.0).delta(r(8, 15, 3, 3))
    for i in range(2):
        for j in range(3):
            close(found[4 * i : 4 * i + 4, 5 * j : 5 * j + 5], w1[i, j].item() * w2 * scale)


def test_diff() -> None:
    close(Diff(torch.ones(3, dtype=torch.float64), 2.0).delta(r(3), 0.25), np.full(3, 0.5))


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 3, 3)], ids=str)
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_dora_norms_rows_or_columns(shape: tuple[int, ...], weight: float) -> None:
    """DoRA, equation 5: magnitude times the moved weight over its norm along what the magnitude does not count."""
    pair = LoraPair(r(2, *shape[1:]), r(7, 2, *[1] * (len(shape) - 2)), 1.0)
    base = r(*shape)
    moved = (base + pair.delta(base, weight)).numpy()
    rows, columns = r(7).abs(), r(5).abs()
    by_row = np.stack([rows[i].item() * moved[i] / np.linalg.norm(moved[i]) for i in range(7)])
    for size in ((7,), (7, 1), (7, *[1] * (len(shape) - 1))):
        found = base + Dora(pair, rows.reshape(size)).delta(base, weight)
        close(found, by_row)
    by_column = np.stack([columns[j].item() * moved[:, j] / np.linalg.norm(moved[:, j]) for j in range(5)], axis=1)
    for size in ((1, 5), (1, 5, *[1] * (len(shape) - 2))):
        close(base + Dora(pair, columns.reshape(size)).delta(base, weight), by_column)


def test_dora_around_loha_and_of_a_row_of_zeros() -> None:
    loha = LoHa(r(4, 2), r(2, 3), r(4, 2), r(2, 3))
    base = r(4, 3)
    moved = (base + loha.delta(base)).numpy()
    found = base + Dora(loha, torch.ones(4, 1)).delta(base)
    close(found, moved / np.linalg.norm(moved, axis=1, keepdims=True))
    zeros = torch.zeros(4, 3)
    dead = Dora(LoraPair(torch.zeros(1, 3), torch.zeros(4, 1)), torch.ones(4, 1))
    assert torch.equal(merge_weight(zeros, [(dead, 1.0)]), zeros)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merge_rounds_once(dtype: torch.dtype) -> None:
    """The result is the number of the dtype that is nearest to the exact sum, but for float32's own error."""
    base = r(64, 48).to(dtype)
    terms = [(LoraPair(r(4, 48).half(), r(64, 4).half(), 2.0), 0.7), (Diff(r(64, 48).half()), -0.3)]
    exact = base.double()
    for weights, factor in terms:
        exact = exact + map_tensors(weights, Tensor.double).delta(base.double(), factor)
    found = merge_weight(base, terms)
    assert found.dtype == dtype
    spacing = torch.finfo(dtype).eps * 2.0 ** exact.abs().log2().floor()
    float32_error = 2e-6
    assert bool(((found.double() - exact).abs() <= 0.5 * spacing + float32_error).all())


def test_merge_of_nothing_is_the_base_itself() -> None:
    base = r(4, 3)
    assert merge_weight(base, []) is base
    assert merge_weight(base, [(LoraPair(r(1, 3), r(4, 1)), 0.0)]) is base


def test_merge_carries_gradients() -> None:
    pair = LoraPair(r(2, 3).requires_grad_(), r(4, 2).requires_grad_(), 1.0)
    assert torch.autograd.gradcheck(
        lambda down, up: merge_weight(torch.ones(4, 3, dtype=torch.float64), [(LoraPair(down, up, 1.0), 0.5)]),
        (pair.down, pair.up),
    )


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (LoraPair(r(3, 5), r(7, 2)), "do not multiply"),
        (LoraPair(r(3, 5), r(8, 3)), r"change of shape \(8, 5\), the parameter has \(7, 5\)"),
        (LoraPair(r(3, 5, 1, 1), r(7, 3, 1, 1), mid=r(2, 3, 3, 3)), "do not multiply"),
        (LoHa(r(7, 3), r(3, 5), r(7, 3), r(3, 6)), "do not multiply"),
        (LoHa(r(7, 3), r(2, 5), r(7, 3), r(3, 5)), "do not multiply"),
        (LoHa(r(3, 7), r(3, 5), r(3, 7), r(3, 5), r(2, 3, 1, 1), r(3, 3, 1, 1)), "do not multiply"),
        (LoKr(w1=r(2, 2), w2=r(4, 5)), "change of shape"),
        (Diff(r(7, 6)), "change of shape"),
        (Dora(LoraPair(r(3, 5), r(7, 3)), r(6, 1)), "magnitude of shape"),
        (Dora(LoraPair(r(3, 5), r(7, 3)), r(1, 7)), "magnitude of shape"),
    ],
)
def test_what_does_not_fit_says_why(weights: AdapterWeights, reason: str) -> None:
    message = misfit(weights, torch.Size((7, 5)))
    assert message is not None and re.search(reason, message)


def test_what_fits() -> None:
    shape = torch.Size((7, 5))
    assert misfit(LoraPair(r(3, 5, 1, 1), r(7, 3, 1, 1)), shape) is None
    assert misfit(Dora(LoraPair(r(3, 5), r(7, 3)), r(7, 1)), shape) is None


@pytest.mark.parametrize(
    "tensors",
    [{"w1": (2, 3)}, {"w1": (2, 3), "w1_a": (2, 1), "w1_b": (1, 3), "w2": (4, 5)}, {"w2": (4, 5), "w1_a": (2, 1)}],
)
def test_half_a_kronecker_product_is_an_error(tensors: dict[str, tuple[int, int]]) -> None:
    with pytest.raises(LoraError, match="LoKr needs either lokr_w"):
        LoKr(**{name: r(*shape) for name, shape in tensors.items()})
