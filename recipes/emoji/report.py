"""From figures to words: the bars, report.md's tables, and the plotted curves. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
Figures = Mapping[str, Any]  # of a section: "rows", and what else it says
Bar = tuple[str, str, bool]  # what is claimed, the figure, whether it holds
CALLS = (1, 2, 4, 8)
BASELINES = ("DDIM", "Euler", "DPM++ 2M")
STYLE_WEIGHT = 0.8
LCM = "LCM-LoRA 4"


def by_name(figures: Figures) -> dict[str, Row]:
    """A section's rows by what they are of."""
    return {row["what"]: row for row in figures["rows"]}


def ratio(first: float, second: float) -> float:
    """A quotient that survives a zero."""
    return first / max(second, 1e-9)


def best(rows: Mapping[str, Row], *starts: str) -> Row:
    """Of the rows whose names begin so, apart from the timesteps' spacing, the one with the best top-1."""
    found = [row for what, row in rows.items() if what.removesuffix(", trailing") in starts]
    return max(found, key=lambda row: row["top1"])


def few_step_bars(figures: Figures) -> list[Bar]:
    """What four steps must reach, for the base and for the XL."""
    rows = by_name(figures)
    full, four = rows["DDIM 50, guidance 4"], rows[LCM]
    bare, guided = best(rows, "DDIM 4"), best(rows, "DDIM 2, guidance 4")
    kept, gain = ratio(four["top1"], full["top1"]), ratio(four["top1"], bare["top1"])
    return [
        ("top-1 of four LCM-LoRA steps / of 50 guided DDIM steps: at least 0.9",
         f"{four['top1']:.3f} / {full['top1']:.3f} = {kept:.3f}", kept >= 0.9),
        ("top-1 of four LCM-LoRA steps / of DDIM 4 without guidance: at least 1.3",
         f"{four['top1']:.3f} / {bare['top1']:.3f} = {gain:.2f}", gain >= 1.3),
        ("top-1 no lower than DDIM 2 with guidance (as many network calls)",
         f"{four['top1']:.3f} : {guided['top1']:.3f}", four["top1"] >= guided["top1"]),
        ("Frechet distance lower than DDIM 2 with guidance",
         f"{four['frechet']:.4f} : {guided['frechet']:.4f}", four["frechet"] < guided["frechet"]),
        ("sharpness nearer to real pictures' than DDIM 2 with guidance",
         f"{four['sharpness']:.2f} : {guided['sharpness']:.2f}",
         abs(1 - four["sharpness"]) < abs(1 - guided["sharpness"])),
    ]  # fmt: skip


def curves(figures: Figures) -> dict[str, dict[int, float]]:
    """Top-1 by network calls: the LCM-LoRA, and each baseline from the noisiest timestep on, unguided and guided."""
    found: dict[str, dict[int, float]] = {}
    for row in figures["rows"]:
        family = row["what"].split(",")[0].rpartition(" ")[0]
        if row["steps"] >= 50 or (family in BASELINES and not row["what"].endswith(", trailing")):
            continue
        name = f"{family}, guidance {row['guidance']:g}" if row["guidance"] > 1 else family
        found.setdefault(name, {})[row["calls"]] = row["top1"]
    return {name: dict(sorted(points.items())) for name, points in found.items()}


def base_bars(figures: Figures) -> list[Bar]:
    """The few steps' bars, and that the LCM-LoRA is on top up to eight network calls."""
    lines = curves(figures)
    own = lines.pop("LCM-LoRA")
    others = {calls: max(points.get(calls, 0.0) for points in lines.values()) for calls in CALLS}
    figure = ", ".join(f"{calls}: {own[calls]:.3f} : {others[calls]:.3f}" for calls in CALLS)
    on_top = all(own[calls] >= others[calls] for calls in CALLS)
    full = by_name(figures)["DDIM 50, guidance 4"]["top1"]
    return [
        ("top-1 of 50 guided DDIM steps: at least 0.85", f"{full:.3f}", full >= 0.85), *few_step_bars(figures),
        ("top-1 above the best of DDIM, Euler and DPM++ 2M at 1, 2, 4 and 8 network calls", figure, on_top),
    ]  # fmt: skip


def blob_bars(figures: Figures) -> list[Bar]:
    """On a fine-tuned base."""
    rows = by_name(figures)
    full, four = rows["DDIM 50, guidance 4"]["top1"], rows[LCM]["top1"]
    claim = "fine-tuned base, the same LCM-LoRA: top-1 of four steps / of 50 guided DDIM steps: at least 0.85"
    return [(claim, f"{four:.3f} / {full:.3f} = {ratio(four, full):.3f}", ratio(four, full) >= 0.85)]


def style_bars(figures: Figures, name: str) -> list[Bar]:
    """A style LoRA at the guide's weights."""
    row = next(row for row in figures["rows"] if abs(row["weight"] - STYLE_WEIGHT) < 1e-6)
    return [
        (f"{name} LoRA at [1.0, {STYLE_WEIGHT}]: {what} at least 0.8", f"{row[key]:.3f}", row[key] >= 0.8)
        for what, key in (("pictures in the style", "style"), ("top-1", "top1"))
    ]


def control_bars(figures: Figures, name: str) -> list[Bar]:
    """Edges with control and without."""
    rows = by_name(figures)
    steered, free = rows["with control"]["f1_1"], rows["without"]["f1_1"]
    gain = ratio(steered, free)
    return [(f"{name}: edge F1 with control / without: at least 2", f"{steered:.3f} / {free:.3f} = {gain:.2f}",
             gain >= 2)]  # fmt: skip


def inpainting_bars(figures: Figures) -> list[Bar]:
    """Left alone outside, right inside."""
    rows = by_name(figures)
    own, put_back = rows["inpainted, LCM-LoRA 4"], rows["inpainted, padding_mask_crop"]
    painted = rows["text to image, LCM-LoRA 4"]["top1"]
    kept = ratio(own["inside"], painted)
    return [
        ("outside the mask, put back by `padding_mask_crop`: PSNR above 35 dB", decibels(put_back["psnr"]),
         put_back["psnr"] > 35),
        ("outside the mask, the pipeline's own result: PSNR above 35 dB", decibels(own["psnr"]), own["psnr"] > 35),
        ("inside the mask: top-1 / of text to image: at least 0.7",
         f"{own['inside']:.3f} / {painted:.3f} = {kept:.3f}", kept >= 0.7),
    ]  # fmt: skip


def motion_bars(figures: Figures) -> list[Bar]:
    """Zoom with and without the LoRA, and frames that follow from one another."""
    rows = by_name(figures)
    zoomed, plain = rows["animation, zoom-in LoRA"], rows["animation"]
    alone = rows["frames one by one"]
    return [
        ("zoom-in LoRA: things grow more than 1.15 times", f"{zoomed['zoom']:.2f}", zoomed["zoom"] > 1.15),
        ("without it they stay (0.95 to 1.05)", f"{plain['zoom']:.2f}", 0.95 <= plain["zoom"] <= 1.05),
        ("optical flow steadier than that of frames painted one by one",
         f"{plain['smoothness']:.2f} : {alone['smoothness']:.2f}", plain["smoothness"] > alone["smoothness"]),
    ]  # fmt: skip


def decibels(value: float) -> str:
    """A PSNR; 99 stands for pictures of which not a bit differs."""
    return "exact" if value >= 98.9 else f"{value:.1f} dB"


def bars(sections: Mapping[str, Figures]) -> dict[str, list[Bar]]:
    """All bars, by the part of the family that they are about."""
    found: dict[str, list[Bar]] = {}
    makers: dict[str, tuple[str, Callable[[Figures], list[Bar]]]] = {
        "base": ("base", base_bars), "xl": ("xl", few_step_bars), "blob": ("blob", blob_bars),
        "flat": ("styles", lambda f: style_bars(f, "flat")), "line": ("styles", lambda f: style_bars(f, "line")),
        "controlnet": ("control", lambda f: control_bars(f, "ControlNet")),
        "t2i": ("control", lambda f: control_bars(f, "T2I-Adapter")),
        "inpainting": ("inpainting", inpainting_bars), "motion": ("motion", motion_bars),
    }  # fmt: skip
    for section, (part, make) in makers.items():
        if section in sections:
            found.setdefault(part, []).extend(make(sections[section]))
    return found


# Tables


class Column(NamedTuple):
    """A column of a table: its head, the key in the rows, how a number is written."""

    head: str
    key: str
    form: str = "{:.3f}"


TOP = (Column("top-1", "top1"), Column("top-5", "top5"))
SET = (*TOP, Column("Frechet", "frechet", "{:.4f}"), Column("sharpness", "sharpness", "{:.2f}"))
STYLED = (*TOP, Column("in the style", "style"))
EDGES = (Column("edge F1, 1 px", "f1_1"), Column("edge F1, 2 px", "f1_2"), *TOP)
INSIDE = (Column("PSNR outside", "psnr", "dB"), Column("top-1", "top1"), Column("top-1 inside", "inside"))
MOVING = (
    Column("zoom", "zoom", "{:.2f}"), Column("pan, widths", "pan", "{:+.2f}"),
    Column("flow smoothness", "smoothness", "{:.2f}"), Column("pixels a frame", "movement", "{:.2f}"),
    Column("top-1 of frames", "top1"),
)  # fmt: skip


def table(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    """Markdown lines; an empty cell where a row has no such figure."""

    def cell(row: Row, column: Column) -> str:
        value = row.get(column.key)
        if value is None:
            return ""
        return decibels(value) if column.form == "dB" else column.form.format(value)

    lines = [f"| | {' | '.join(c.head for c in columns)} |", "|---" * (len(columns) + 1) + "|"]
    return [*lines, *(f"| {row['what']} | {' | '.join(cell(row, c) for c in columns)} |" for row in rows), ""]


def curve_table(figures: Figures) -> list[str]:
    """Top-1 by network calls, a row a sampler."""
    lines = [f"| top-1 at network calls | {' | '.join(map(str, CALLS))} |", "|---" * (len(CALLS) + 1) + "|"]
    for name, points in curves(figures).items():
        cells = [f"{points[calls]:.3f}" if calls in points else "" for calls in CALLS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


class Part(NamedTuple):
    """A part of the report: the section, its title, what was done, its columns, the sheet's rows."""

    section: str
    title: str
    text: str
    columns: tuple[Column, ...]
    sheet: str = ""


PARTS = (
    Part("controls", "The scorer, held against real pictures",
         "Every eighth emoji in each drawing style, which the style's head has never seen, as they are and through "
         "`emoji/base`'s autoencoder, which knows Noto only.", (*STYLED, *SET[2:])),
    Part("base", "Few steps", "`emoji/base` with `emoji/lcm-lora` and without. \"Trailing\" spacing begins at the "
         "noisiest timestep; without the word the spacing is the repository's own, leading, as Stable Diffusion's.",
         SET, "DDIM 50 with guidance 4; LCM-LoRA 4; DDIM 4 without guidance; DDIM 2 with guidance 4 (both trailing)"),
    Part("guidance", "Guidance with the LCM-LoRA", "Four steps; above 1 every step calls the network twice.", SET,
         "guidance 1, 2, 4, 8"),
    Part("blob", "A fine-tuned base, the LCM-LoRA unchanged",
         "`emoji/blob`, asked for {prompts} emoji of its pictures; Frechet distance, sharpness and style against the "
         "real blobs.", (*STYLED, *SET[2:]),
         "`emoji/base`, LCM-LoRA 4; `emoji/blob`, DDIM 50 with guidance 4; `emoji/blob`, LCM-LoRA 4"),
    Part("flat", "The flat style LoRA beside the LCM-LoRA",
         "`set_adapters([\"lcm\", \"flat\"], [1.0, w])`, four steps.",
         STYLED, "w = 0, 0.4, 0.8, 1.2"),
    Part("line", "The line-art style LoRA beside the LCM-LoRA",
         "`set_adapters([\"lcm\", \"line\"], [1.0, w])`, four steps.", STYLED, "w = 0, 0.4, 0.8, 1.2"),
    Part("controlnet", "ControlNet", "Canny edges of real pictures that were scaled, turned, shifted and mirrored at "
         "random are given to `emoji/controlnet-canny`, and are looked for in what is painted by the emoji's name in "
         "four steps.", EDGES, "the moved pictures; their edges, which are given; with control; without"),
    Part("t2i", "T2I-Adapter", "The same with `emoji/t2i-canny` on `emoji/xl`.", EDGES,
         "the moved pictures; their edges, which are given; with control; without"),
    Part("inpainting", "Inpainting", "A square of 96 pixels in the middle of one emoji's picture is replaced by the "
         "emoji that the prompt names, in four steps. Inside: the square alone, on white. The pipeline's own result is "
         "decoded from latents everywhere: outside it can at best be what the autoencoder makes of the picture. "
         "`padding_mask_crop` puts the rest of the picture back.", INSIDE,
         "the picture; what is left of it; painted; painted with `padding_mask_crop`"),
    Part("motion", "Animation",
         "{videos} animations of {frames} frames in {steps} steps of the LCM-LoRA, medians. Zoom and pan are from the "
         "first frame to the last. Drawn clips, such as the adapter and its LoRAs learnt from, show what the measures "
         "make of the truth.", MOVING, "every second frame of two animations: without LoRA, zoom-in, pan-left"),
    Part("xl", "The SDXL-shaped base", "`emoji/xl` with `emoji/xl-lcm-lora` and without.", SET,
         "DDIM 50 with guidance 4; LCM-LoRA 4; DDIM 4 without guidance (trailing)"),
)  # fmt: skip
PLOTS = {"base": "curves.png", "guidance": "curves-guidance.png", "flat": "curves-styles.png"}


# Beginning of a claim -> why it is missed when it is, and what was tried.
REASONS: Mapping[str, str] = {
    "top-1 of four LCM-LoRA steps / of DDIM 4": (
        "this small model knows its 1,631 pictures by heart and needs no guidance: four unguided DDIM steps from the "
        "noisiest timestep name as many; Frechet distance and sharpness show the blur that the names do not. With the "
        "repository's own leading spacing DDIM names fewer (see the table), which is not enough for 1.3 either"
    ),
    "top-1 above the best of": "the same; the differences are within one and a half standard errors",
    "line LoRA at [1.0, 0.8]: top-1": (
        "rank 8, which the size of the package allows, draws either lines or the right thing: at 0.4 three quarters "
        "are named, and few are in the style. All layers as targets and 420 more steps were tried; Fluent's own line "
        "drawings fitted worse than the filter"
    ),
    "T2I-Adapter": "it was trained for 900 steps, a quarter of an hour, and its loss still fell",
    "outside the mask, the pipeline's own": (
        "the nine-channel model repaints its surroundings, and the autoencoder alone leaves 34.3 dB. Two recipes were "
        "tried; with new inputs that begin unread, nothing stayed in place. `padding_mask_crop` keeps the rest exactly"
    ),
}


def reasons(results: Mapping[str, Sequence[tuple[str, str, bool]]]) -> list[str]:
    """Why the claims that are missed are, once each."""
    missed = [claim for group in results.values() for claim, _, holds in group if not holds]
    found = [(claim, why) for begin, why in REASONS.items() for claim in missed if claim.startswith(begin)]
    lines = [f"- {claim}: {why}." for claim, why in dict(found).items()]
    return ["Missed, why, and what was tried:", "", *lines, ""] if lines else []


def render(results: Mapping[str, Any], pictures: Path) -> str:
    """report.md of `evaluate.evaluate`'s results; shows those of the pictures that are there."""
    sections = results["sections"]
    count, error = results["prompts"], (0.9 * 0.1 / max(1, results["prompts"] * len(results["seeds"]))) ** 0.5
    lines = [
        "# Quality of the emoji family", "",
        f"`python recipes/emoji/evaluate.py`: {count} names (every eighth emoji), "
        f"seed{'s' if len(results['seeds']) > 1 else ''} {', '.join(map(str, results['seeds']))}, CPU, float32. Top-1 "
        "and top-5: how many pictures are nearest to their own name among all 1,631, by a scorer that no generator was "
        f"trained with; at 0.9 the standard error is {error:.2f}. Frechet distance is in the scorer's features, "
        "sharpness (energy of the Laplacian) relative to the real pictures.", "",
        "| bar | figure | |", "|---|---|---|",
    ]  # fmt: skip
    judged = bars(sections)
    for group in judged.values():
        lines += [f"| {claim} | {figure} | {'holds' if holds else '**missed**'} |" for claim, figure, holds in group]
    lines += ["", *reasons(judged)]
    if results["left_out"]:
        lines += ["Left out:", "", *(f"- {name}: {reason}" for name, reason in results["left_out"].items()), ""]
    for part in PARTS:
        figures = sections.get(part.section)
        if figures is None:
            continue
        lines += [f"## {part.title}", "", part.text.format_map({k: v for k, v in figures.items() if k != "rows"}), ""]
        rows = [row for row in figures["rows"] if part.section != "base" or shown_in_table(row)]
        lines += table(rows, part.columns)
        if part.section == "base":
            lines += curve_table(figures)
        for file, alt in ((PLOTS.get(part.section), "curves"), (f"{part.section}.png", part.sheet)):
            if file and (pictures / file).exists():
                lines += [f"![{alt}](pictures/{file})", ""]
        if part.sheet:
            lines += [f"Rows: {part.sheet}.", ""]
    return "\n".join(lines)


def shown_in_table(row: Row) -> bool:
    """Whether a row of the base's is in the first table; all trailing ones are in the second, DDIM's in both."""
    return row["what"].startswith(("LCM", "DDIM 50", "DDIM 4", "DDIM 2,"))


# Plots


def plot(sections: Mapping[str, Figures], folder: Path) -> None:
    """curves.png (network calls), curves-guidance.png and curves-styles.png, of what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    if "base" in sections:
        lines = curves(sections["base"])
        draw(folder / "curves.png", lines, "network calls", "top-1", logarithmic=True)
    if "guidance" in sections:
        rows = sections["guidance"]["rows"]
        lines = {
            "top-1": {row["guidance"]: row["top1"] for row in rows},
            "sharpness": {row["guidance"]: row["sharpness"] for row in rows},
            "10 x Frechet distance": {row["guidance"]: 10 * row["frechet"] for row in rows},
        }
        draw(folder / "curves-guidance.png", lines, "guidance scale, LCM-LoRA, 4 steps", "")
    styles = {name: sections[name]["rows"] for name in ("flat", "line") if name in sections}
    if styles:
        lines = {
            f"{name}: {what}": {row["weight"]: row[key] for row in rows}
            for name, rows in styles.items()
            for what, key in (("in the style", "style"), ("top-1", "top1"))
        }
        draw(folder / "curves-styles.png", lines, "weight of the style LoRA, LCM-LoRA at 1.0", "")


def draw(
    path: Path, lines: Mapping[str, Mapping[float, float]], across: str, up: str, logarithmic: bool = False
) -> None:  # fmt: skip
    """One plot of named lines; those of guided samplers are dashed, the LCM-LoRA's is thick."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    colours: dict[str, str] = {}
    for name, points in lines.items():
        family = name.split(", guidance")[0]
        colour = colours.setdefault(family, f"C{len(colours)}")
        axes.plot(
            list(points), list(points.values()), label=name, color=colour, marker="o", markersize=4,
            linestyle="--" if ", guidance" in name else "-", linewidth=2.5 if family == "LCM-LoRA" else 1.3,
        )  # fmt: skip
    if logarithmic:
        axes.set_xscale("log", base=2)
        axes.set_xticks(CALLS, [str(calls) for calls in CALLS])
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
