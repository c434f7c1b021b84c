"""Each optimisation on a CPU by itself: UNet step, VAE decoding and text encoding with it and without, in turn.

A row an optimisation: seconds with and without, their ratio, and how far the result is from float32 eager torch (PSNR
against the largest value). Weights are random, of real size; with ``--tiny`` the emoji model's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import weights
from pictures import psnr
from timing import Row, arguments, summary, write
from torch import Tensor, nn

from fourstroke import AutoencoderKL, CLIPTextModel, UNet2DConditionModel
from fourstroke.runtime.calls import Forward, replace_forward_
from fourstroke.runtime.memory_format import channels_last_
from fourstroke.runtime.openvino import Accelerated, best_precision
from fourstroke.runtime.quantize import RESULT, Range, in_eight_bits
from fourstroke.runtime.recall import Recalled

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
    layers = {name: found for name, found in ranges.items() if not name.endswith(RESULT)}
    ways["8 bits, but not in attention"] = Accelerated(part, precision, layers)
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
        with_it, without = turns(run_with, (usual, variant), part, inputs, options)
        rows[0] |= summary(with_it)
        rows.append({"case": case, "variant": name, "psnr_db": error, **summary(without, median(with_it))})
    return rows


@torch.no_grad()
def eager_rows(
    case: str,
    part: nn.Module,
    inputs: tuple[Any, ...],
    options: argparse.Namespace,
    variant: str,
    set_up: Callable[[nn.Module, Any], Any],
    ways: Sequence[Any],
) -> list[Row]:
    """The rows of what an engine does for torch itself; ``ways`` are set up in turn, with it and without."""
    reference = first_of(part(*inputs))
    set_up(part, ways[0])
    rows = [{"case": case, "variant": "all", "psnr_db": closeness(first_of(part(*inputs)), reference)}]
    with_it, without = turns(set_up, ways, part, inputs, options)
    rows[0] |= summary(with_it)
    rows.append({"case": case, "variant": variant, "psnr_db": closeness(first_of(part(*inputs)), reference)})
    rows[1] |= summary(without, median(with_it))
    return rows


def first_of(result: Any) -> Tensor:
    """What a network returns, or the first of several tensors."""
    return result if isinstance(result, Tensor) else result[0]


def turns(
    set_up: Callable[[nn.Module, Any], Any],
    ways: Sequence[Any],
    part: nn.Module,
    inputs: tuple[Any, ...],
    options: argparse.Namespace,
) -> list[list[float]]:
    """For each of ``ways`` the seconds of ``part``, set up in that way for every run; the ways take turns."""
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(options.repeats):
        for way, values in zip(ways, seconds, strict=True):
            set_up(part, way)
            start = time.perf_counter()
            part(*inputs)
            values.append(time.perf_counter() - start)
    return seconds


def run_with(part: nn.Module, forward: Forward | None) -> nn.Module:
    """``part``, which runs ``forward`` from now on, or its own forward."""
    vars(part).pop("forward", None)
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
    run_with(vae.decoder, None)
    both = (True, False)
    rows += eager_rows("VAE decoder in torch", vae.decoder, (latents,), options, "channels last", channels_last_, both)
    encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder").requires_grad_(False)
    ids = torch.randint(encoder.config.vocab_size, (1, 77), generator=generator)
    ways = Recalled(encoder), None
    rows += eager_rows("text encoder, the same prompt", encoder, (ids,), options, "answers kept", run_with, ways)
    write("optimisations", rows, options)


if __name__ == "__main__":
    main()
