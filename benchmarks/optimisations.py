"""Each optimisation of a CPU's backends on its own: UNet step and VAE decoding with it and without, in turn.

A row an optimisation: seconds with and without, their ratio, and how far the result is from float32 eager torch (PSNR
against the largest value). Weights are random, of real size; with ``--tiny`` the emoji model's.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import weights
from pictures import psnr
from timing import Row, arguments, summary, write
from torch import Tensor, nn

from fourstroke import AutoencoderKL, UNet2DConditionModel
from fourstroke.runtime.calls import replace_forward_
from fourstroke.runtime.memory_format import channels_last_
from fourstroke.runtime.openvino import Accelerated, best_precision, unopenvino_
from fourstroke.runtime.quantize import Range, in_eight_bits

WITHOUT = {
    "upsampling folded into its convolution": ("doubling",),
    "group norm in the convolutions' layout": ("group_norm",),
    "gated layers split before the product": ("chunk",),
}


def variants(part: nn.Module, precision: str, ranges: Any) -> dict[str, Accelerated | None]:
    """What is compared, the usual way first; None is torch. Each is compiled in its first run."""
    ways: dict[str, Accelerated | None] = {"all": Accelerated(part, precision)}
    ways |= {name: Accelerated(part, precision, without=without) for name, without in WITHOUT.items()}
    ways[f"{precision} instead of float32"] = Accelerated(part, "f32")
    ways["OpenVINO instead of torch"] = None
    ways["8 bits"] = Accelerated(part, precision, ranges)
    return ways


def closeness(value: Tensor, reference: Tensor) -> float:
    """PSNR of ``value`` in dB, against the largest value of ``reference``."""
    wide = reference.double().numpy()
    return round(psnr(value.double().numpy(), wide, abs(wide).max()), 1)


@torch.no_grad()
def rows_of(case: str, part: nn.Module, inputs: tuple[Any, ...], options: argparse.Namespace) -> list[Row]:
    """A row a variant. Each takes turns with the usual way alone, for every compiled graph holds all weights."""
    reference = part(*inputs)
    found: dict[str, Range] = {}
    observer = Accelerated(part, "f32")
    observer.observed = found
    run_with(part, observer)(*inputs)
    del observer
    ways = variants(part, best_precision(), in_eight_bits(found))
    usual = ways.pop("all")
    rows = [{"case": case, "variant": "all", "psnr_db": closeness(run_with(part, usual)(*inputs), reference)}]
    for name in [*ways]:
        variant = ways.pop(name)  # the one before goes, with its graph
        error = closeness(run_with(part, variant)(*inputs), reference)
        seconds: dict[Any, list[float]] = {usual: [], variant: []}
        for _ in range(options.repeats):
            for forward, values in seconds.items():
                run_with(part, forward)
                start = time.perf_counter()
                part(*inputs)
                values.append(time.perf_counter() - start)
        rows[0] |= summary(seconds[usual])
        base = median(seconds[usual])
        rows.append({"case": case, "variant": name, "psnr_db": error, **summary(seconds[variant], base)})
    return rows


@torch.no_grad()
def eager_rows(case: str, part: nn.Module, inputs: tuple[Any, ...], options: argparse.Namespace) -> list[Row]:
    """The rows of what an engine does for torch itself: convolutions that work pixel by pixel."""
    reference = part(*inputs)
    variants = {"all": True, "channels last": False}
    errors, seconds = {}, {name: [] for name in variants}
    for i in range(options.repeats + 1):
        for name, on in variants.items():
            channels_last_(part, on)
            start = time.perf_counter()
            result = part(*inputs)
            elapsed = time.perf_counter() - start
            errors[name] = closeness(result, reference)
            seconds[name] += [elapsed] if i else []  # the first is to warm up
    base = median(seconds["all"])
    rows: list[Row] = []
    for name, values in seconds.items():
        rows.append({"case": case, "variant": name, "psnr_db": errors[name], **summary(values, base)})
    return rows


def run_with(part: nn.Module, forward: Accelerated | None) -> nn.Module:
    """``part``, which runs ``forward`` from now on, or its own forward."""
    unopenvino_(part)
    if forward is not None:
        replace_forward_(part, forward)
    return part


def main() -> None:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--cache", type=Path, default=weights.CACHE, help="where models are written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = "emoji/base" if options.tiny else str(weights.find("sd15", "repository", options.cache))
    generator = torch.Generator().manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").requires_grad_(False)
    config: Any = unet.config
    side = config.sample_size
    latents = torch.randn(1, 4, side, side, generator=generator)
    text = torch.randn(1, 77, config.cross_attention_dim, generator=generator)
    rows = rows_of("UNet step", unet, (latents, torch.tensor(759), text), options)
    del unet
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae").requires_grad_(False)
    rows += rows_of("VAE decoder", vae.decoder, (latents,), options)
    unopenvino_(vae.decoder)
    rows += eager_rows("VAE decoder in torch", vae.decoder, (latents,), options)
    write("optimisations", rows, options)


if __name__ == "__main__":
    main()
