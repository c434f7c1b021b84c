"""The recipe's training loop: a run that was killed goes on bit for bit, and Muon's update is a polar factor."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

LOOP = Path(__file__).parents[2] / "recipes" / "emoji" / "loop.py"


@pytest.fixture(scope="module")
def loop() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("recipe_loop", LOOP)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


class Killed(Exception):
    """Stands for kill -9."""


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 3))


def loss_of(net: nn.Module, die_at: int = -1) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        if step == die_at:
            raise Killed
        sample = torch.randn(2, 3, 8, 8, generator=generator)
        return {"loss": (net(sample) - sample.mean()).square().mean()}

    return loss


def run(loop: ModuleType, folder: Path, die_at: int = -1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Twelve steps, saved after each; the averages and the weights themselves."""
    net = network()
    options = loop.Run("net", folder, steps=12, warmup=3, save_every_s=-1.0)
    averages = loop.train(options, {"net": net}, loop.optimisers({"net": (net, 1e-2)}), loss_of(net, die_at))
    return averages["net"], net.state_dict()


def test_a_killed_run_goes_on_exactly(loop: ModuleType, tmp_path: Path) -> None:
    whole = run(loop, tmp_path / "whole")
    with pytest.raises(Killed):
        run(loop, tmp_path / "killed", die_at=7)
    resumed = run(loop, tmp_path / "killed")
    for expected, found in zip(whole, resumed, strict=True):
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_finished_run_ends_at_once(loop: ModuleType, tmp_path: Path) -> None:
    first = run(loop, tmp_path)
    again = run(loop, tmp_path, die_at=12)
    assert all(torch.equal(first[0][name], again[0][name]) for name in first[0])


def test_a_time_budget_becomes_a_number_of_steps(loop: ModuleType, tmp_path: Path) -> None:
    net = network()
    options = loop.Run("net", tmp_path, minutes=1e-9)
    loop.train(options, {"net": net}, loop.optimisers({"net": (net, 1e-2)}), loss_of(net))
    saved = torch.load(tmp_path / "net.pt", weights_only=True)
    assert saved["step"] == saved["steps"] == 2 * loop.MEASURED_STEPS


def test_the_averaged_weights_are_lent_and_given_back(loop: ModuleType) -> None:
    net = network()
    own = {name: value.clone() for name, value in net.state_dict().items()}
    with loop.use({"net": net}, {"net": {name: torch.zeros_like(value) for name, value in own.items()}}):
        assert not net.training and all((value == 0).all() for value in net.state_dict().values())
    assert net.training and all(torch.equal(net.state_dict()[name], value) for name, value in own.items())


def test_cosine_rises_then_falls_to_zero(loop: ModuleType) -> None:
    assert loop.cosine(0, 100, 10) == pytest.approx(0.1, rel=1e-3)
    assert loop.cosine(50, 100, 10) == pytest.approx(0.5)
    assert loop.cosine(100, 100, 10) == pytest.approx(0.0)
    assert loop.cosine(500, 0, 10) == 1.0


@pytest.mark.parametrize("shape", [(16, 60), (60, 16)])
def test_muon_orthogonalises(loop: ModuleType, shape: tuple[int, int]) -> None:
    """Singular vectors stay; singular values come near one, as five steps of this quintic bring them."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    core = left.T @ loop.orthogonal(matrix) @ right.T
    values = core.diagonal()
    assert ((values > 0.65) & (values < 1.25)).all()
    torch.testing.assert_close(core, torch.diag(values), rtol=0, atol=1e-4)


def test_muon_moves_against_the_gradient(loop: ModuleType) -> None:
    weight = nn.Parameter(torch.zeros(4, 6))
    weight.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    loop.Muon([weight], lr=0.1).step()
    assert (weight.detach() * weight.grad).sum() < 0


def test_matrices_go_to_muon_and_the_rest_to_adamw(loop: ModuleType) -> None:
    net = nn.ModuleDict({"conv_in": nn.Conv2d(3, 8, 3), "inner": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
    adamw, muon = loop.optimisers({"net": (net, 1e-3)})
    assert [tuple(w.shape) for w in muon.param_groups[0]["params"]] == [(8, 8)]
    assert len(adamw.param_groups[0]["params"]) == 5
