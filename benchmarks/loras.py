"""LoRAs: the time to load, switch, re-weigh and unload them, the memory that they take, and what they cost a step.

A rank-64 LCM-LoRA and three rank-32 styles; Fourstroke and diffusers (set_adapters and fuse_lora, as its documentation
recommends for speed) do the same in turn. Whether a switch to another mix and back gives the same weights, to the bit,
is in the last column. Of SDXL the steps are left out.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from cases import Case
from pictures import PeerError, add_options, take_turns
from timing import Row, arguments, summary, write

LIBRARIES = ("diffusers", "fourstroke")


def main() -> None:
    parser = add_options(arguments(__doc__, repeats=3))
    parser.add_argument("--models", nargs="+", choices=("sd15", "sdxl", "emoji"), default=["sd15", "sdxl"])
    parser.add_argument("--dtype", default="bfloat16", help="of the networks; default bfloat16")
    options = parser.parse_args()
    for model in options.models:
        case = Case("loras", model, size=512, steps=0 if model == "sdxl" else 1, styles=True)
        write(f"loras_{model}", rows_of(case.shrunk() if options.tiny else case, options), options)


def rows_of(case: Case, options: Any) -> list[Row]:
    """A row of each thing that is timed, a library."""
    base = case.job({"dtype": options.dtype}, options.cache, options.device)
    jobs: Any = {name: ("adapters", {**base, "library": name}) for name in LIBRARIES}
    repeats = 1 if options.tiny else options.repeats
    found = take_turns(jobs, [{}] * repeats, options)
    rows: list[Row] = []
    medians: dict[str, float] = {}
    for name, answers in found.items():
        if isinstance(answers, PeerError):
            rows.append({"model": case.model, "what": "all", "library": name, "note": str(answers)[:200]})
            continue
        ready, *runs = answers
        for what in runs[0]["seconds"]:
            seconds = [run["seconds"][what] for run in runs]
            medians.setdefault(what, median(seconds))
            row: Row = {"model": case.model, "what": what, "library": name, **summary(seconds, medians[what])}
            if what == "switch back to A":
                row |= {"exact": all(run["exact"] for run in runs)}
            if what == "switch to all":
                row |= {"added_mb": round(max(run["added"] for run in runs) / 2**20)}
                row |= {"peak_mb": round(max(run["memory"] for run in answers) / 2**20)}
            rows.append(row)
    return sorted(rows, key=lambda row: list(medians).index(row["what"]) if row["what"] in medians else -1)


if __name__ == "__main__":
    main()
