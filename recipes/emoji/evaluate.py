"""Quality, printed by one command: ``python recipes/emoji/evaluate.py``. Writes report.md, report.json and sheets
beside it.

What is exported under the names ``emoji/base``, ``emoji/lcm-lora`` and ``emoji/tiny-vae`` paints, through fourstroke's
own pipelines and schedulers, every eighth emoji by its name (204 prompts) with two fixed seeds; the scorer
(`scorer.py`) says how many are retrieved among all pictures, the Frechet distance of its feature vectors to those of
the real pictures, and the energy of the Laplacian relative to theirs (sharpness).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from data import CACHE, Emoji, load, save_grid, to_floats
from loop import say
from scorer import features, frechet, sharpness, trained
from torch import Tensor

from fourstroke import AutoencoderTiny, DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, StableDiffusionPipeline

RECIPE = Path(__file__).parent
EVERY = 8
SEEDS = (0, 1)
GUIDANCE = 4.0
BATCH = 16
LORA = "emoji/lcm-lora"
SHOWN = ("a red fox", "a cat face", "a red heart", "a pine tree", "a red apple", "a rocket", "a pizza", "an octopus",
         "a guitar", "a snowman", "a house", "a strawberry", "a unicorn", "a lion", "a cactus", "a crown")  # fmt: skip
# what: (scheduler, steps, guidance, adapter)
SETTINGS: dict[str, tuple[type, int, float, bool]] = {
    "DDIM 50, guidance 4": (DDIMScheduler, 50, GUIDANCE, False),
    "LCM-LoRA 4": (LCMScheduler, 4, 1.0, True),
    "LCM-LoRA 8": (LCMScheduler, 8, 1.0, True),
    "LCM-LoRA 2": (LCMScheduler, 2, 1.0, True),
    "LCM-LoRA 1": (LCMScheduler, 1, 1.0, True),
    "DDIM 4, no guidance": (DDIMScheduler, 4, 1.0, False),
    "Euler 4, no guidance": (EulerDiscreteScheduler, 4, 1.0, False),
    "DDIM 2, guidance 4 (four network calls)": (DDIMScheduler, 2, GUIDANCE, False),
    "DDIM 4, guidance 4 (eight network calls)": (DDIMScheduler, 4, GUIDANCE, False),
}


class Painter:
    """The exported pipeline, and its settings by name."""

    def __init__(self) -> None:
        self.pipe = StableDiffusionPipeline.from_pretrained("emoji/base")
        self.pipe.set_progress_bar_config(disable=True)
        self.config = self.pipe.scheduler.config
        self.adapted = False

    def choose(self, scheduler: type, adapter: bool) -> None:
        """Swap the scheduler, and load or unload the LCM-LoRA."""
        self.pipe.scheduler = scheduler.from_config(self.config)
        if adapter and not self.adapted:
            self.pipe.load_lora_weights(LORA)
        elif self.adapted and not adapter:
            self.pipe.unload_lora_weights()
        self.adapted = adapter

    def paint(self, prompts: Sequence[str], what: str, seed: int) -> Tensor:
        """Pictures (N, 3, 128, 128) in -1..1; picture i has the generator seed ``1000 seed + i``."""
        scheduler, steps, guidance, adapter = SETTINGS[what]
        self.choose(scheduler, adapter)
        found = []
        for start in range(0, len(prompts), BATCH):
            part = list(prompts[start : start + BATCH])
            generators = [torch.Generator().manual_seed(1000 * seed + start + i) for i in range(len(part))]
            made = self.pipe(
                part, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="pt"
            )
            found.append(made.images.float() * 2 - 1)
        return torch.cat(found)

    @torch.no_grad()
    def reconstruct(self, pictures: Tensor, tiny: bool) -> Tensor:
        """Real pictures through an autoencoder."""
        if tiny:
            small = AutoencoderTiny.from_pretrained("emoji/tiny-vae")
            return torch.cat([small.decode(small.encode(part)) for part in pictures.split(BATCH)])
        return torch.cat([self.pipe.vae.decode(self.pipe.vae.encode(part).mean) for part in pictures.split(BATCH)])


class Judge:
    """Scores sets of pictures against the pictures that were asked for."""

    def __init__(self, own: Tensor, pictures: Tensor, minutes: float):
        self.scorer = trained(minutes)
        self.own, self.real = own, pictures[own]
        self.real_features = features(self.scorer, pictures)
        self.real_sharpness = sharpness(self.real)

    def row(self, what: str, made: Tensor, seconds: float = 0.0) -> dict[str, Any]:
        """Figures of pictures (a multiple of ``own``), in the order of ``own``."""
        seen = features(self.scorer, made.clamp(-1, 1))
        own = self.own.repeat(len(made) // len(self.own))
        ranks = self.scorer.ranks(seen, own)
        row = {
            "what": what, "top1": (ranks < 1).float().mean().item(), "top5": (ranks < 5).float().mean().item(),
            "frechet": frechet(seen, self.real_features[self.own]),
            "sharpness": sharpness(made.clamp(-1, 1)) / self.real_sharpness, "seconds": seconds,
        }  # fmt: skip
        say(f"{what:42s} top-1 {row['top1']:6.1%}  top-5 {row['top5']:6.1%}  Frechet {row['frechet']:.4f}  "
            f"sharpness {row['sharpness']:.2f}  {seconds:.2f} s a picture")  # fmt: skip
        return row


def judge(emojis: Sequence[Emoji], pictures: Tensor, minutes: float) -> list[dict[str, Any]]:
    """All rows of the table; also writes a sheet of the first pictures of every setting."""
    own = torch.arange(0, len(emojis), EVERY)
    names = [emojis[i].name for i in own.tolist()]
    scorer, painter = Judge(own, pictures, minutes), Painter()
    real = scorer.real
    noise = torch.rand(real.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows = [
        scorer.row("real pictures", real),
        scorer.row("autoencoder", painter.reconstruct(real, tiny=False)),
        scorer.row("tiny autoencoder", painter.reconstruct(real, tiny=True)),
    ]
    for what in SETTINGS:
        begun = time.perf_counter()
        made = torch.cat([painter.paint(names, what, seed) for seed in SEEDS])
        rows.append(scorer.row(what, made, (time.perf_counter() - begun) / len(made)))
        save_grid(made[:64], CACHE / "samples" / f"eval-{what.replace(' ', '-').replace(',', '')}.png", columns=16)
    rows.append(scorer.row("noise", noise))
    picture_sheet(painter)
    return rows


def picture_sheet(painter: Painter) -> None:
    """pictures.png: the shown prompts by DDIM 50 with guidance, LCM-LoRA 4, and DDIM 4 without it, row by row."""
    rows = [painter.paint(SHOWN, what, 0) for what in ("DDIM 50, guidance 4", "LCM-LoRA 4", "DDIM 4, no guidance")]
    save_grid(torch.cat(rows), RECIPE / "pictures.png", columns=len(SHOWN))


def verdict(rows: list[dict[str, Any]]) -> list[tuple[str, str, bool]]:
    """The bars: what is claimed, the figure, and whether it holds."""
    by = {row["what"]: row for row in rows}
    full, lcm, bare = by["DDIM 50, guidance 4"], by["LCM-LoRA 4"], by["DDIM 4, no guidance"]
    two = by["DDIM 2, guidance 4 (four network calls)"]
    kept, gain = lcm["top1"] / max(full["top1"], 1e-9), lcm["top1"] / max(bare["top1"], 1e-9)
    return [
        ("50 guided DDIM steps: top-1 at least 0.85", f"{full['top1']:.3f}", full["top1"] >= 0.85),
        ("four LCM-LoRA steps keep at least 0.9 of it", f"{kept:.3f}", kept >= 0.9),
        ("at least 1.3 times DDIM 4 without guidance", f"{gain:.2f}", gain >= 1.3),
        ("against DDIM 2 with guidance: top-1 no lower", f"{lcm['top1']:.3f} : {two['top1']:.3f}",
         lcm["top1"] >= two["top1"]),
        ("against DDIM 2 with guidance: Frechet distance lower", f"{lcm['frechet']:.4f} : {two['frechet']:.4f}",
         lcm["frechet"] < two["frechet"]),
        ("against DDIM 2 with guidance: sharpness nearer to real", f"{lcm['sharpness']:.2f} : {two['sharpness']:.2f}",
         abs(1 - lcm["sharpness"]) < abs(1 - two["sharpness"])),
    ]  # fmt: skip


def report(rows: list[dict[str, Any]], count: int) -> str:
    """report.md."""
    lines = [
        "# Quality of the emoji family", "",
        f"`python recipes/emoji/evaluate.py`: {count} names (every {EVERY}th emoji), seeds {SEEDS}, CPU. Retrieval is "
        "among all pictures, by a scorer that no generator was trained with; top-1 of real pictures is its control, "
        "noise its floor. Frechet distance is in the scorer's features, sharpness relative to the real pictures.", "",
        "| | top-1 | top-5 | Frechet | sharpness |", "|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {r['what']} | {r['top1']:.3f} | {r['top5']:.3f} | {r['frechet']:.4f} | {r['sharpness']:.2f} |" for r in rows
    ]
    lines += ["", "| bar | figure | |", "|---|---|---|"]
    lines += [f"| {claim} | {figure} | {'holds' if holds else 'missed'} |" for claim, figure, holds in verdict(rows)]
    lines += ["", "![DDIM 50 with guidance, LCM-LoRA 4, DDIM 4](pictures.png)", "",
              "Rows: 50 guided DDIM steps; four LCM-LoRA steps; four DDIM steps without guidance. Prompts: "
              + ", ".join(SHOWN) + ".", ""]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Judge everything and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scorer-minutes", type=float, default=6, help="training time of a scorer not yet trained")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pictures, emojis = load()
    rows = judge(emojis, to_floats(pictures), options.scorer_minutes)
    text = report(rows, len(range(0, len(emojis), EVERY)))
    (RECIPE / "report.md").write_text(text)
    (RECIPE / "report.json").write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    say("\n" + text)


if __name__ == "__main__":
    main()
