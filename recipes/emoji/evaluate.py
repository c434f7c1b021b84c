"""Quality, printed by one command: ``python recipes/emoji/evaluate.py``. Writes report.md, report.json and pictures.

The shipped models paint, through fourstroke's own pipelines and with fixed seeds, every eighth emoji by its name (204
prompts); `sections.py` says what is painted, `scorer.py` and `measures.py` what is measured, `report.py` what that
means. A section whose weights are not there is left out and named.

Figures stay in ``.cache/eval/<section>.json`` under a hash of the weights that they rest on, of the scorer and of the
code that measures, so that a second run computes only what has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import measures
import painting
import torch
from data import CACHE
from loop import say
from report import bars, plot, render
from scorer import NAME, trained
from sections import SECTIONS, Context, Section, context_of

from fourstroke import hub

RECIPE = Path(__file__).parent
WEIGHTS = ".safetensors"
HASHED = (WEIGHTS, ".json", ".txt")  # of a model's folder; not its card


def files_of(name: str) -> Iterator[Path]:
    """The files of a shipped model that its pictures depend on, those of its shared components too."""
    folder = hub.local_folder(name)
    if folder is None:
        return
    for file in hub.listing(folder):
        component, _, rest = file.partition("/")
        path = hub.part(folder, component) / rest if rest else folder / file
        if path.suffix in HASHED:
            yield path


def missing(section: Section) -> list[str]:
    """The names among a section's needs that hold no weights."""
    return [name for name in section.needs if not any(path.suffix == WEIGHTS for path in files_of(name))]


def key_of(section: Section, context: Context) -> str:
    """A hash of all that a section's figures depend on."""
    measure = section.measure.func if isinstance(section.measure, partial) else section.measure
    value = hashlib.sha256(repr((context.seeds, context.own.tolist())).encode())
    value.update(inspect.getsource(measure).encode())
    code = [Path(inspect.getfile(module)) for module in (measures, painting)]
    paths = [path for name in section.needs for path in files_of(name)]
    for path in [*code, *paths, CACHE / "train" / f"{NAME}.ema.pt"]:
        value.update(path.read_bytes())
    return value.hexdigest()


def measured(name: str, context: Context, fresh: bool, compute: bool) -> dict[str, Any] | None:
    """A section's figures: from the cache when nothing that they rest on has changed, else computed, if that is
    wanted."""
    section, path = SECTIONS[name], CACHE / "eval" / f"{name}.json"
    key = key_of(section, context)
    known = json.loads(path.read_text()) if path.exists() else {}
    if known.get("key") == key and not (fresh and compute):
        say(f"{name}: from {path}")
        return known["figures"]
    if not compute:
        return None
    say(f"{name}:")
    begun = time.perf_counter()
    figures = section.measure(context)
    seconds = round(time.perf_counter() - begun)
    say(f"{name}: {seconds} s")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"key": key, "seconds": seconds, "figures": figures}, indent=1))
    return figures


def evaluate(context: Context, fresh: bool, chosen: Sequence[str]) -> dict[str, Any]:
    """All figures, and what there is none of: section -> the reason."""
    figures, left_out = {}, {}
    for name, section in SECTIONS.items():
        if absent := missing(section):
            left_out[name] = f"there is no {', '.join(absent)} yet"
        elif (found := measured(name, context, fresh, name in chosen)) is not None:
            figures[name] = found
        else:
            left_out[name] = f"not measured: `evaluate.py --only {name}`"
    for name, reason in left_out.items():
        say(f"{name}: left out; {reason}")
    return {"prompts": len(context.own), "seeds": list(context.seeds), "left_out": left_out, "sections": figures}


def main() -> None:
    """Judge everything and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION",
        help=f"compute these alone: {', '.join(SECTIONS)}; the others' figures come from the cache",
    )  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="compute again what is known already")
    parser.add_argument("--seeds", type=int, default=1, help="pictures a prompt, where retrieval is measured")
    parser.add_argument("--prompts", type=int, default=10_000, help="ask for this many names at most")
    parser.add_argument("--output", type=Path, default=RECIPE, help="folder of report.md, report.json and pictures/")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pictures = options.output / "pictures"
    context = context_of(trained(), range(options.seeds), options.prompts, pictures)
    results = evaluate(context, options.fresh, options.only)
    plot(results["sections"], pictures)
    text = render(results, pictures)
    (options.output / "report.md").write_text(text)
    (options.output / "report.json").write_text(json.dumps({**results, "bars": bars(results["sections"])}, indent=1))
    say("\n" + text)


if __name__ == "__main__":
    main()
