"""Part by part: text encoder, UNet step, VAE full and tiny, for each peer, beside what the machine can do at most.

The rate of a large matrix product is measured in turn with the peers; the share is what the UNet's step reaches of it,
its operations counted by torch. Pictures have one step, so that each run gives one value of every part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
import weights
from cases import PEERS, Case
from pictures import PeerError, add_options, groups, peers_of, take_turns
from timing import Row, arguments, summary, write
from torch.utils.flop_counter import FlopCounterMode

from fourstroke import UNet2DConditionModel

SIZES = {"sd15": 512, "sdxl": 1024}


def unet_flops(case: Case) -> int:
    """Floating-point operations of one UNet step, counted without computing anything."""
    with torch.device("meta"), torch.no_grad():
        unet = UNet2DConditionModel.from_config(weights.config_of(case.model, "unet")).eval()
        config, side = unet.config, case.size // 8
        added = None
        if config["addition_embed_type"]:
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            added = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
        text = torch.empty(1, 77, config["cross_attention_dim"])
        with FlopCounterMode(display=False) as counter:
            unet(torch.empty(1, 4, side, side), torch.empty((), dtype=torch.int64), text, added_cond_kwargs=added)
    return counter.get_total_flops()


def main() -> None:
    parser = add_options(arguments(__doc__, repeats=5))
    parser.add_argument("--model", choices=SIZES, default="sd15")
    options = parser.parse_args()
    full = Case("parts", options.model, size=SIZES[options.model], steps=1)
    case = full.shrunk() if options.tiny else full
    rows = []
    for tiny_vae in (False, True):
        chosen = dataclasses.replace(case, tiny_vae=tiny_vae)
        names = [name for name in peers_of(options) if PEERS[name].can(chosen)]
        rows += rows_of(chosen, names, options)
    write(f"parts_{options.model}", rows, options)


def rows_of(case: Case, names: Sequence[str], options: Any) -> list[Row]:
    """Run the peers in turn with the matrix product, and make a row of each part of each."""
    rows: list[Row] = []
    changes = [{"seed": seed} for seed in range(1 if options.tiny else options.repeats)]
    gemm = {"device": options.device, "gemm": 256 if options.tiny else 4096, "warm_up": True}
    for group in groups(["gemm", *names], options.live):
        jobs: Any = {
            name: (PEERS[name].module, case.job(PEERS[name].options, options.cache, options.device))
            for name in group
            if name != "gemm"
        }
        found = take_turns({"gemm": ("gemm", gemm), **jobs}, changes, options)
        machine = found.pop("gemm")[1:]
        rates = {kind: median(run[f"{kind}_flops"] for run in machine) for kind in ("fp32", "half")}
        for name, answers in found.items():
            if isinstance(answers, PeerError):
                rows.append({"part": "all", "peer": name, "note": str(answers)[:200]})
                continue
            parts = ("vae",) if case.tiny_vae else ("text", "unet", "vae")
            told = answers[-1]["parts"]
            rows += [part_row(case, name, part, answers[1:], rates) for part in parts if part in told]
    return rows


def part_row(case: Case, name: str, part: str, runs: Sequence[Any], rates: dict[str, float]) -> Row:
    """The seconds of a part; of the UNet's also its rate and that of the machine, in GFLOP/s."""
    seconds = [sum(run["parts"][part]) if part == "text" else value for run in runs for value in run["parts"][part]]
    row: Row = {"part": "tiny vae" if case.tiny_vae else part, "peer": name, **summary(seconds)}
    del row["ratio"]
    if part == "unet":
        rate = unet_flops(case) / row["median_s"]
        row |= {"gflops": round(rate / 1e9), "gemm_fp32": round(rates["fp32"] / 1e9)}
        row |= {"gemm_half": round(rates["half"] / 1e9), "share_of_half": round(rate / rates["half"], 3)}
    return row


if __name__ == "__main__":
    main()
