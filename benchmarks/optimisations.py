"""Each optimisation of the OpenVINO backend on its own: UNet step and VAE decoding with it and without, in turn.

A row an optimisation: seconds with and without, their ratio, and how far the result is from float32 eager torch (PSNR
against the largest value). Weights are random, of real size; with ``--tiny`` the emoji model's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import weights
from timing import Row, arguments, summary, write
from torch import Tensor, nn

from fourstroke import AutoencoderKL, UNet2DConditionModel
from fourstroke.runtime.calls import replace_forward_
from fourstroke.runtime.openvino import Accelerated, best_precision, openvino_, unopenvino_
from fourstroke.runtime.quantize import in_eight_bits

WITHOUT = {
    "upsampling folded into its convolution": ("doubling",),
    "group norm in the convolutions' layout": ("group_norm",),
    "gated layers split before the product": ("chunk",),
}


def variants(part: nn.Module, precision: str, ranges: Any) -> dict[str, Callable[[], Accelerated | None]]:
    """What is compared: name -> what puts it onto the network; the first is the usual way."""

    def torch_() -> None:
        unopenvino_(part)

    made: dict[str, Callable[[], Accelerated | None]] = {"all": lambda: openvino_(part, precision)}
    for name, without in WITHOUT.items():
        made[name] = lambda without=without: openvino_(part, precision, without=without)
    made[f"{precision} instead of float32"] = lambda: openvino_(part, "f32")
    made["OpenVINO instead of torch"] = torch_
    made["8 bits"] = lambda: openvino_(part, precision, ranges)
    return made


def psnr(value: Tensor, reference: Tensor) -> float:
    """Of ``value`` in dB, against the largest value of ``reference``."""
    error = (value.double() - reference.double()).square().mean().clamp(min=1e-20)
    return float(10 * torch.log10(reference.double().abs().max().square() / error))


@torch.no_grad()
def rows_of(case: str, part: nn.Module, inputs: tuple[Any, ...], options: argparse.Namespace) -> list[Row]:
    """A row a variant. Each takes turns with the usual way alone, for every compiled graph holds all weights."""
    precision = best_precision()
    reference = part(*inputs)
    observer = openvino_(part, "f32")
    observer.observed = {}
    part(*inputs)
    made = variants(part, precision, in_eight_bits(observer.observed))
    usual = made.pop("all")()
    rows = [{"case": case, "variant": "all", "psnr_db": round(psnr(part(*inputs), reference), 1)}]
    for name, put_on in made.items():
        variant = put_on()
        error = psnr(part(*inputs), reference)
        seconds: dict[Any, list[float]] = {usual: [], variant: []}
        for _ in range(options.repeats):
            for forward, values in seconds.items():
                run_with(part, forward)
                start = time.perf_counter()
                part(*inputs)
                values.append(time.perf_counter() - start)
        base = median(seconds[usual])
        rows[0] |= summary(seconds[usual])
        rows.append({"case": case, "variant": name, "psnr_db": round(error, 1), **summary(seconds[variant], base)})
        run_with(part, None)
    return rows


def run_with(part: nn.Module, forward: Accelerated | None) -> None:
    """Let ``part`` run what was compiled before, or its own forward."""
    unopenvino_(part)
    if forward is not None:
        replace_forward_(part, forward)


def main() -> None:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--cache", type=Path, default=weights.CACHE, help="where models are written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = "emoji/base" if options.tiny else str(weights.find("sd15", "repository", options.cache))
    generator = torch.Generator().manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").requires_grad_(False)
    side = unet.config.sample_size
    latents = torch.randn(1, 4, side, side, generator=generator)
    text = torch.randn(1, 77, unet.config.cross_attention_dim, generator=generator)
    rows = rows_of("UNet step", unet, (latents, torch.tensor(759), text), options)
    del unet
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae").requires_grad_(False)
    rows += rows_of("VAE decoder", vae.decoder, (latents,), options)
    write("optimisations", rows, options)


if __name__ == "__main__":
    main()
