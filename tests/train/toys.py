"""What the tests of trainings share: batches without data, bases from UNets, and peft's pairs set to ours."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fourstroke import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from fourstroke.lora.layers import trainable
from fourstroke.lora.pairs import LoraPair
from fourstroke.train.base import Base
from fourstroke.train.devices import Devices
from fourstroke.train.encoding import Batch
from fourstroke.train.loop import Run
from fourstroke.train.options import TrainOptions
from fourstroke.train.student import Student

from ..parity.oracles import UNETS, randomise
from ..unit import tiny

# Stable Diffusion's schedule, in float64.
ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


@dataclass(frozen=True)
class Rows:
    """Batch ``i`` of size B holds rows i B to i B + B - 1 of fixed random latents, whatever the seed."""

    latents: Tensor

    def batch(self, index: int, size: int, seed: int) -> Batch:
        rows = self.latents[torch.arange(index * size, (index + 1) * size) % len(self.latents)]
        return Batch(rows, torch.zeros(size, 1, 1), None, None, [""] * size)


def base_of(unet: UNet2DConditionModel, prediction_type: str = "epsilon", dtype: torch.dtype = torch.float32) -> Base:
    """A base with this UNet, and nothing else that works."""
    kind: Any = StableDiffusionXLPipeline if unet.config.addition_embed_type else StableDiffusionPipeline
    pipe = kind(**dict.fromkeys(kind.component_names) | {"unet": unet, "scheduler": tiny.scheduler()})
    return Base("tiny", pipe, ALPHAS.float(), prediction_type, dtype)


def unets(kind: str) -> tuple[UNet2DConditionModel, nn.Module]:
    """Our UNet of a kind in `oracles.UNETS` in float32, and diffusers' with the same weights in float64."""
    from diffusers import UNet2DConditionModel as Peer

    theirs = randomise(Peer(**UNETS[kind]))
    ours = UNet2DConditionModel.from_config({**UNETS[kind]})
    ours.load_state_dict(theirs.state_dict())
    return ours.eval().requires_grad_(False), theirs.double()


def given_pairs(pairs: Mapping[str, LoraPair], seed: int = 0) -> None:
    """Random numbers in the upper halves, which are zero at first and would hide the gradients of the lower."""
    generator = torch.Generator().manual_seed(seed)
    for pair in pairs.values():
        pair.up.data.normal_(std=0.05, generator=generator)


def with_peft(network: nn.Module, pairs: Mapping[str, LoraPair], rank: int, alpha: float) -> dict[str, Tensor]:
    """Give a peer's network peft's LoRA with the weights of ``pairs``, in float64; returns its tensors by our names."""
    from peft import LoraConfig, inject_adapter_in_model

    modules = [name.removesuffix(".weight") for name in pairs]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules), network)
    found = {}
    for name, pair in pairs.items():
        layer: Any = network.get_submodule(name.removesuffix(".weight"))
        for half, ours, letter in (("down", pair.down, "A"), ("up", pair.up, "B")):
            weight = getattr(layer, f"lora_{letter}")["default"].to(torch.float64).weight
            weight.data.copy_(ours.detach())
            found[f"{name}/{half}"] = weight.requires_grad_()
    return found


def gradients_agree(pairs: Mapping[str, LoraPair], theirs: Mapping[str, Tensor], tolerance: float = 1e-4) -> None:
    """Our float32 gradients are those of float64, relative to the largest of each tensor."""
    for name, pair in pairs.items():
        for half, tensor in (("down", pair.down), ("up", pair.up)):
            wanted = theirs[f"{name}/{half}"].grad
            assert tensor.grad is not None and wanted is not None, name
            scale = wanted.abs().max()
            assert scale > 0, name
            torch.testing.assert_close(tensor.grad.double() / scale, wanted / scale, rtol=0, atol=tolerance)


def one_pair(averaged: bool = False) -> Student:
    """A student of one small pair, perhaps with averages."""
    generator = torch.Generator().manual_seed(1)
    down, up = (torch.randn(shape, generator=generator) for shape in ((2, 4), (3, 2)))
    averages = {"unet": {"layer.weight": LoraPair(down.clone(), up.clone(), 4.0)}} if averaged else None
    return Student({"unet": {"layer.weight": LoraPair(down.requires_grad_(), up.requires_grad_(), 4.0)}}, averages)


def regression(student: Student, batch: Batch, generator: torch.Generator) -> Tensor:
    """Mean squared distance of ``up down x`` from 1, for x the batch's latents as vectors; nothing random."""
    pair = student.pairs["unet"]["layer.weight"]
    return ((batch.latents.flatten(1) @ pair.down.T @ pair.up.T - 1).square().sum(1)).mean()


def run_of(output: Path, options: TrainOptions, **more: Any) -> Run:
    """A run of `regression` on fixed rows."""
    rows = Rows(torch.randn(12, 4, 1, 1, generator=torch.Generator().manual_seed(2)))
    return Run(**{"loss": regression, "data": rows, "output": output, "options": options,
                  "devices": Devices(torch.device("cpu")), **more})  # fmt: skip


def table(path: Path) -> list[list[str]]:
    """The rows of a CSV file, the names first."""
    with path.open(newline="") as file:
        return list(csv.reader(file))


def bits(student: Student) -> list[Tensor]:
    """All tensors of the pairs, copied."""
    return [tensor.detach().clone() for pairs in student.pairs.values() for tensor in trainable(pairs)]
