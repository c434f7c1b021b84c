"""How time and peak memory grow with batch, resolution, steps, LoRAs and frames, and whether by the law to be expected.

One live process a peer paints everything, in turn; the peak is counted anew for every picture. The laws: time is linear
in batch, steps and frames, linear and quadratic in the number of pixels (convolutions and attention), and independent
of the number of LoRAs. They are fitted to the points; the table has both, and the plot draws them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from cases import PEERS, Case
from pictures import PeerError, add_options, take_turns
from timing import Row, arguments, output_of, summary, write

Terms = Callable[[np.ndarray], list[np.ndarray]]
LINEAR: Terms = lambda x: [np.ones_like(x), x]  # noqa: E731
CONSTANT: Terms = lambda x: [np.ones_like(x)]  # noqa: E731
PIXELS: Terms = lambda x: [np.ones_like(x), x**2, x**4]  # noqa: E731
# Axis -> the field of the job, its values for published models and for small ones, and the law of time.
AXES: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], Terms]] = {
    "batch": ("batch", (1, 2, 4, 8), (1, 2, 4, 8), LINEAR),
    "resolution": ("size", (256, 384, 512, 768, 1024), (64, 128, 192, 256), PIXELS),
    "steps": ("steps", (1, 2, 4, 8), (1, 2, 4, 8), LINEAR),
    "loras": ("loras", (0, 1, 2, 4), (0, 1, 2, 3), CONSTANT),
    "frames": ("frames", (4, 8, 16), (4, 8, 16), LINEAR),
}
MEMORY_TERMS: dict[str, Terms] = {"resolution": lambda x: [np.ones_like(x), x**2], "steps": CONSTANT}


def main() -> None:
    parser = add_options(arguments(__doc__, repeats=3))
    parser.add_argument("--model", choices=("sd15", "emoji"), default="emoji", help="default emoji")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="default all")
    options = parser.parse_args()
    rows = [row for axis in options.axes for row in measure(axis, options)]
    name = f"growth_{options.model}"
    plot(rows, options.axes, output_of(options) / f"{name}.png")
    write(name, rows, options)


def measure(axis: str, options: argparse.Namespace) -> list[Row]:
    """The rows of one axis: one a value and peer."""
    field, large, small, terms = AXES[axis]
    values = large if options.model == "sd15" else small
    size = 512 if options.model == "sd15" else 128
    task = "animation" if axis == "frames" else "text"
    case = Case("growth", options.model, task, size=size, styles=axis == "loras")
    case = case.shrunk() if options.tiny else case
    if options.tiny:
        values = (64, 128) if axis == "resolution" else values[:2]
    names = options.peers or ("diffusers", "fourstroke-fp32", "fourstroke")
    jobs = {name: (PEERS[name].module, case.job(PEERS[name].options, options.cache, options.device)) for name in names}
    # Every value once before it counts: what is compiled or merged for it is not its running time.
    repeats = 1 if options.tiny else options.repeats
    changes = [{"seed": i, field: value} for i, value in enumerate(np.repeat(values, repeats + 1).tolist())]
    rows: list[Row] = []
    for name, answers in take_turns(jobs, changes, options).items():
        if isinstance(answers, PeerError):
            rows.append({"axis": axis, "peer": name, "note": str(answers)[:200]})
            continue
        points: list[Row] = []
        for value, runs in zip(values, np.array(answers[1:], dtype=object).reshape(len(values), -1), strict=True):
            row: Row = {"axis": axis, "peer": name, "value": value, **summary([run["total"] for run in runs[1:]])}
            row["peak_mb"] = round(median(run["memory"] for run in runs[1:]) / 2**20)
            points.append(row)
        add_laws(axis, terms, points)
        rows += points
    return rows


def add_laws(axis: str, terms: Terms, points: Sequence[Row]) -> None:
    """Fit the laws of time and memory to the points of a peer, and add their values to the rows."""
    for column, law in (("median_s", terms), ("peak_mb", MEMORY_TERMS.get(axis, LINEAR))):
        x, y = (np.array([float(row[name]) for row in points]) for name in ("value", column))
        columns = np.stack(law(x), axis=1)
        # Relative errors count, so that the smallest point does as much as the largest.
        factors = np.linalg.lstsq(columns / y[:, None], np.ones_like(y), rcond=None)[0]
        for row, value in zip(points, columns @ factors, strict=True):
            row[f"law_{column}"] = round(float(value), 5)
    for row in points:
        row["ratio"] = round(row["median_s"] / points[0]["median_s"], 3)


def plot(rows: Sequence[Row], axes: Sequence[str], path: Path) -> None:
    """Points and laws, time above and memory below, a column an axis."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, len(axes), figsize=(3.2 * len(axes), 5.6), squeeze=False, layout="constrained")
    for column, axis in enumerate(axes):
        for line, (measured, unit) in enumerate((("median_s", "seconds"), ("peak_mb", "peak, MB"))):
            panel: Any = grid[line][column]
            mine = [row for row in rows if row["axis"] == axis and "value" in row]
            for name in dict.fromkeys(row["peer"] for row in mine):
                points = [row for row in mine if row["peer"] == name]
                x = [row["value"] for row in points]
                (dots,) = panel.plot(x, [row[measured] for row in points], "o", label=name)
                panel.plot(x, [row[f"law_{measured}"] for row in points], "-", color=dots.get_color(), linewidth=1)
            panel.set_ylim(bottom=0)
            panel.set_ylabel(unit if column == 0 else "")
            panel.set_xlabel(axis if line else "")
    grid[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
