"""What the report measures, a function a section: each paints through `painting.Painter` and returns plain figures.

A section that has pictures to show writes them to ``<folder>/<section>.png``.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from clips import LENGTH, drawn, habits, pan_left, zoom_in
from conditions import as_picture, edges, moved
from data import Emoji, load, to_floats
from loop import say
from measures import edge_f1, frechet, movement, pan, psnr, sharpness, smoothness, zoom
from painting import FULL, GUIDANCE, LCM_LORA, SHOWN, XL_LCM_LORA, Painter, Way, lcm, save_sheet, to_pil
from scorer import STYLE_NAMES, Scorer, features, style_of
from styles import BASE, load_style
from torch import Tensor

from fourstroke import (
    AnimateDiffPipeline,
    AutoencoderTiny,
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    MotionAdapter,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
)

EVERY = 8  # every eighth emoji is asked for: 204 names
CALLS = (1, 2, 4, 8)
BASELINES = {"DDIM": DDIMScheduler, "Euler": EulerDiscreteScheduler, "DPM++ 2M": DPMSolverMultistepScheduler}
TRAILING = "trailing"  # begins at the noisiest timestep, which a few steps need
GUIDANCES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
WEIGHTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
ACROSS = 12  # pictures in a row of a sheet
TOLERANCES = (1, 2)  # pixels
EDGE = 16  # the inpainted square's distance from the picture's edges
VIDEOS = 24
VIDEO_STEPS = 5
Row = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """What all sections share: the emoji, which are asked for, the scorer, the seeds, where sheets go."""

    emojis: list[Emoji]
    pictures: Tensor  # of the base's style, float
    own: Tensor
    scorer: Scorer
    seeds: tuple[int, ...]
    folder: Path

    def names(self, own: Tensor | None = None) -> list[str]:
        """The names of emoji by index."""
        return [self.emojis[i].name for i in (self.own if own is None else own).tolist()]

    def sheet(self, name: str, *rows: Tensor) -> None:
        """Write ``<name>.png``."""
        save_sheet([row[:ACROSS] for row in rows], self.folder / f"{name}.png")


class Judge:
    """Scores sets of pictures against the emoji that were asked for, and against real pictures of them in a style."""

    def __init__(self, context: Context, own: Tensor | None = None, style: str = BASE):
        self.scorer, self.style = context.scorer, STYLE_NAMES.index(style)
        self.own = context.own if own is None else own
        pictures, index = load_style(style)
        self.real = to_floats(pictures[torch.isin(index, self.own)])
        self.real_features, self.real_sharpness = features(self.scorer, self.real), sharpness(self.real)

    def top(self, made: Tensor, most: int = 1) -> float:
        """How many of the pictures (a multiple of ``own``, in its order) have their own name among the nearest."""
        own = self.own.repeat(len(made) // len(self.own))
        return (self.scorer.ranks(features(self.scorer, made.clamp(-1, 1)), own) < most).float().mean().item()

    def row(self, what: str, made: Tensor, **more: Any) -> Row:
        """All figures of a set of pictures."""
        made = made.clamp(-1, 1)
        row = {
            "what": what, "top1": self.top(made), "top5": self.top(made, 5),
            "style": (style_of(self.scorer, made) == self.style).float().mean().item(),
            "frechet": frechet(features(self.scorer, made), self.real_features),
            "sharpness": sharpness(made) / self.real_sharpness, **more,
        }  # fmt: skip
        say(f"  {what:34s} top-1 {row['top1']:6.1%}  top-5 {row['top5']:6.1%}  style {row['style']:6.1%}  "
            f"Frechet {row['frechet']:.4f}  sharpness {row['sharpness']:.2f}")  # fmt: skip
        return row


def label(way: Way) -> str:
    """A way's name in the tables."""
    names = {scheduler: name for name, scheduler in BASELINES.items()}
    guided = f", guidance {way.guidance:g}" if way.guidance > 1 else ""
    spaced = f", {way.spacing}" if way.spacing else ""
    return f"{names.get(way.scheduler, 'LCM-LoRA')} {way.steps}{guided}{spaced}"


def judged(judge: Judge, painter: Painter, names: Sequence[str], way: Way, seeds: Sequence[int], **more: Any) -> Row:
    """Paint the names and judge them."""
    begun = time.perf_counter()
    made = painter.paint(names, way, seeds)
    seconds = (time.perf_counter() - begun) / len(made)
    return judge.row(label(way), made, steps=way.steps, guidance=way.guidance, calls=way.calls, seconds=seconds, **more)


def controls(context: Context) -> Row:
    """What the scorer says of real pictures, of the autoencoders' work, and of noise."""
    painter = Painter(StableDiffusionPipeline.from_pretrained("emoji/base"))
    rows = []
    for style in STYLE_NAMES:
        pictures, index = load_style(style)
        asked = torch.isin(index, context.own)
        judge, real = Judge(context, index[asked], style), to_floats(pictures[asked])
        rows.append(judge.row(f"real pictures, {style}", real))
        rows.append(judge.row(f"autoencoder, {style}", painter.reconstruct(real)))
    painter.pipe.vae = AutoencoderTiny.from_pretrained("emoji/tiny-vae")
    judge = Judge(context)
    with torch.no_grad():
        small = torch.cat([painter.pipe.vae.decode(painter.pipe.vae.encode(p)) for p in judge.real.split(16)])
    rows.append(judge.row(f"tiny autoencoder, {BASE}", small))
    noise = torch.rand(judge.real.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"rows": [*rows, judge.row("noise", noise)]}


def base(context: Context) -> Row:
    """Few steps with the LCM-LoRA beside few steps without it, and fifty."""
    painter, judge = Painter(StableDiffusionPipeline.from_pretrained("emoji/base")), Judge(context)
    ways = [FULL, *(lcm(steps) for steps in (4, 8, 2, 1))]
    ways += [Way(DDIMScheduler, 4), Way(DDIMScheduler, 2, GUIDANCE), Way(DDIMScheduler, 4, GUIDANCE)]
    for scheduler in BASELINES.values():
        ways += [Way(scheduler, calls, spacing=TRAILING) for calls in CALLS]
        ways += [Way(scheduler, calls // 2, GUIDANCE, spacing=TRAILING) for calls in CALLS[1:]]
    rows = [judged(judge, painter, context.names(), way, context.seeds) for way in ways]
    shown = (FULL, lcm(), Way(DDIMScheduler, 4, spacing=TRAILING), Way(DDIMScheduler, 2, GUIDANCE, spacing=TRAILING))
    context.sheet("base", *(painter.paint(SHOWN[:ACROSS], way) for way in shown))
    return {"rows": rows}


def guidance(context: Context) -> Row:
    """Four steps of the LCM-LoRA at rising guidance."""
    painter, judge = Painter(StableDiffusionPipeline.from_pretrained("emoji/base")), Judge(context)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that guidance above 2 is too much is what is measured
        rows = [judged(judge, painter, context.names(), lcm(4, scale), context.seeds) for scale in GUIDANCES]
        context.sheet("guidance", *(painter.paint(SHOWN[:ACROSS], lcm(4, scale)) for scale in (1.0, 2.0, 4.0, 8.0)))
    return {"rows": rows}


def blob(context: Context) -> Row:
    """The unchanged LCM-LoRA on a fine-tuned base, asked for emoji that this was tuned on."""
    index = load_style("blob")[1]
    own = index[:: max(1, len(index) // len(context.own))]
    painter = Painter(StableDiffusionPipeline.from_pretrained("emoji/blob"))
    judge = Judge(context, own, "blob")
    ways = (FULL, lcm(), Way(DDIMScheduler, 4, spacing=TRAILING))
    rows = [judged(judge, painter, context.names(own), way, context.seeds) for way in ways]
    original = Painter(StableDiffusionPipeline.from_pretrained("emoji/base")).paint(SHOWN[:ACROSS], lcm())
    context.sheet("blob", original, *(painter.paint(SHOWN[:ACROSS], way) for way in (FULL, lcm())))
    return {"rows": rows, "prompts": len(own)}


def style(context: Context, name: str) -> Row:
    """A style LoRA beside the LCM-LoRA at rising weight."""
    painter = Painter(StableDiffusionPipeline.from_pretrained("emoji/base"))
    judge, lora = Judge(context, style=name), f"emoji/{name}-lora"
    rows = []
    for weight in WEIGHTS:
        made = painter.paint(context.names(), lcm().plus(lora, weight), context.seeds)
        rows.append(judge.row(f"[1.0, {weight:g}]", made, weight=weight))
    shown = [painter.paint(SHOWN[:ACROSS], lcm().plus(lora, weight)) for weight in (0.0, 0.4, 0.8, 1.2)]
    context.sheet(name, *shown)
    return {"rows": rows}


def controlled(context: Context, name: str, painter: Painter, plain: Painter, way: Way, scale: str) -> Row:
    """Edges of strongly moved real pictures are given, and looked for in what is painted by the emoji's name."""
    given = moved(context.pictures[context.own], torch.Generator().manual_seed(2024))
    wanted = edges(given)
    pictures, judge = to_pil(as_picture(wanted) * 2 - 1), Judge(context)
    steered = painter.paint(context.names(), way, each={"image": pictures}, **{scale: 1.0})
    free = plain.paint(context.names(), way)
    rows = []
    for what, made in (
        ("the moved pictures themselves, through the autoencoder", plain.reconstruct(given)),
        ("with control", steered), ("without", free),
    ):  # fmt: skip
        found = edges(made)
        scores = {f"f1_{t}": edge_f1(wanted, found, t).mean().item() for t in TOLERANCES}
        rows.append(judge.row(what, made, **scores))
    context.sheet(name, given, as_picture(wanted) * 2 - 1, steered, free)
    return {"rows": rows}


def controlnet(context: Context) -> Row:
    """The canny ControlNet with the LCM-LoRA."""
    network = ControlNetModel.from_pretrained("emoji/controlnet-canny")
    pipe = StableDiffusionControlNetPipeline.from_pretrained("emoji/base", controlnet=network)
    plain = Painter(StableDiffusionPipeline.from_pretrained("emoji/base"))
    return controlled(context, "controlnet", Painter(pipe), plain, lcm(), "controlnet_conditioning_scale")


def t2i(context: Context) -> Row:
    """The canny T2I-Adapter with the XL's LCM-LoRA."""
    adapter = T2IAdapter.from_pretrained("emoji/t2i-canny")
    pipe = StableDiffusionXLAdapterPipeline.from_pretrained("emoji/xl", adapter=adapter)
    plain = Painter(StableDiffusionXLPipeline.from_pretrained("emoji/xl"))
    return controlled(context, "t2i", Painter(pipe), plain, lcm(lora=XL_LCM_LORA), "adapter_conditioning_scale")


def inpainting(context: Context) -> Row:
    """A square of one emoji's picture is replaced by another emoji, named by the prompt."""
    given, judge = context.pictures[context.own.flip(0)], Judge(context)
    size = given.shape[-1]
    mask = torch.zeros(1, 1, size, size)
    mask[..., EDGE : size - EDGE, EDGE : size - EDGE] = 1
    masks, outside = to_pil(mask.expand(len(given), 3, -1, -1) * 2 - 1), mask < 0.5
    painter = Painter(StableDiffusionInpaintPipeline.from_pretrained("emoji/inpainting"))
    plain = Painter(StableDiffusionPipeline.from_pretrained("emoji/base"))
    each = {"image": to_pil(given), "mask_image": masks}
    own = painter.paint(context.names(), lcm(), each=each)
    put_back = painter.paint(
        context.names(), lcm(), batch=1, each=each, output_type="pil", padding_mask_crop=EDGE
    )  # fmt: skip
    painted = plain.paint(context.names(), lcm())
    rows = []
    for what, made, kept in (
        ("real pictures of the emoji named", context.pictures[context.own], None),
        ("text to image, LCM-LoRA 4", painted, None), ("through the autoencoder", plain.reconstruct(given), given),
        ("inpainted, LCM-LoRA 4", own, given), ("inpainted, padding_mask_crop", put_back, given),
    ):  # fmt: skip
        quality = None if kept is None else psnr(made.clamp(-1, 1), kept, outside).mean().item()
        row = {"what": what, "psnr": quality, "top1": judge.top(made), "inside": judge.top(made * mask + 1 - mask)}
        say(f"  {what:34s} PSNR outside {quality or 0:.1f} dB  inside top-1 {row['inside']:.1%}")
        rows.append(row)
    context.sheet("inpainting", given, given * (mask < 0.5), own, put_back)
    return {"rows": rows}


def motion(context: Context) -> Row:
    """Animations in five steps, without and with the motion LoRAs, beside clips that were drawn."""
    count = min(VIDEOS, len(context.own))
    chosen = torch.arange(0, len(context.emojis), len(context.emojis) // VIDEOS)[:count]
    names, judge = context.names(chosen), Judge(context, chosen.repeat_interleave(LENGTH))
    adapter = MotionAdapter.from_pretrained("emoji/motion-adapter")
    painter = Painter(AnimateDiffPipeline.from_pretrained("emoji/base", motion_adapter=adapter))
    plain, way = Painter(StableDiffusionPipeline.from_pretrained("emoji/base")), lcm(VIDEO_STEPS)
    moves, pictures = habits(), context.pictures[chosen]

    def animated(*loras: str) -> Tensor:
        chosen_way = way
        for lora in loras:
            chosen_way = chosen_way.plus(lora, 1.0)
        return painter.paint(names, chosen_way, batch=2, num_frames=LENGTH)

    sets = {
        "drawn, all motions": torch.stack([drawn(p, moves[i]()) for i, p in zip(chosen, pictures, strict=True)]),
        "drawn, zoom-in": torch.stack([drawn(p, zoom_in()) for p in pictures]),
        "drawn, pan-left": torch.stack([drawn(p, pan_left()) for p in pictures]),
        "frames one by one": plain.paint([n for n in names for _ in range(LENGTH)], way).unflatten(0, (-1, LENGTH)),
        "animation": animated(), "animation, zoom-in LoRA": animated("emoji/zoom-in-lora"),
        "animation, pan-left LoRA": animated("emoji/pan-left-lora"),
    }  # fmt: skip
    rows = []
    for what, videos in sets.items():
        row: Row = {"what": what, "top1": judge.top(videos.flatten(0, 1))}
        for measure in (smoothness, movement, zoom, pan):
            row[measure.__name__] = torch.tensor([measure(v.clamp(-1, 1)) for v in videos]).nanmedian().item()
        say(f"  {what:34s} smoothness {row['smoothness']:.2f}  movement {row['movement']:.2f}  zoom {row['zoom']:.3f}  "
            f"pan {row['pan']:+.3f}  top-1 {row['top1']:.1%}")  # fmt: skip
        rows.append(row)
    shown = list(sets.values())[-3:]
    context.sheet("motion", *(videos[i, ::2] for i in (1, 5) for videos in shown if i < len(videos)))
    return {"rows": rows, "videos": len(chosen), "frames": LENGTH, "steps": VIDEO_STEPS}


def xl(context: Context) -> Row:
    """The SDXL-shaped base and its LCM-LoRA."""
    painter, judge = Painter(StableDiffusionXLPipeline.from_pretrained("emoji/xl")), Judge(context)
    ways = [FULL, *(lcm(steps, lora=XL_LCM_LORA) for steps in (4, 8, 2, 1))]
    few = [Way(DDIMScheduler, 4, spacing=TRAILING), Way(DDIMScheduler, 2, GUIDANCE, spacing=TRAILING)]
    rows = [judged(judge, painter, context.names(), way, context.seeds) for way in [*ways, *few]]
    context.sheet("xl", *(painter.paint(SHOWN[:ACROSS], way) for way in (FULL, lcm(lora=XL_LCM_LORA), few[0])))
    return {"rows": rows}


class Section(NamedTuple):
    """A function that measures, and the shipped weights that it rests on."""

    measure: Callable[[Context], Row]
    needs: tuple[str, ...]


SECTIONS = {
    "controls": Section(controls, ("emoji/base", "emoji/tiny-vae")),
    "base": Section(base, ("emoji/base", LCM_LORA)),
    "guidance": Section(guidance, ("emoji/base", LCM_LORA)),
    "blob": Section(blob, ("emoji/base", "emoji/blob", LCM_LORA)),
    "flat": Section(partial(style, name="flat"), ("emoji/base", LCM_LORA, "emoji/flat-lora")),
    "line": Section(partial(style, name="line"), ("emoji/base", LCM_LORA, "emoji/line-lora")),
    "controlnet": Section(controlnet, ("emoji/base", LCM_LORA, "emoji/controlnet-canny")),
    "t2i": Section(t2i, ("emoji/xl", XL_LCM_LORA, "emoji/t2i-canny")),
    "inpainting": Section(inpainting, ("emoji/base", LCM_LORA, "emoji/inpainting")),
    "motion": Section(
        motion, ("emoji/base", LCM_LORA, "emoji/motion-adapter", "emoji/zoom-in-lora", "emoji/pan-left-lora")
    ),
    "xl": Section(xl, ("emoji/xl", XL_LCM_LORA)),
}


def context_of(scorer: Scorer, seeds: Sequence[int], most: int, folder: Path) -> Context:
    """The emoji that are asked for: every eighth, at most ``most`` of them."""
    pictures, emojis = load()
    own = torch.arange(0, len(emojis), EVERY)[:most]
    return Context(emojis, to_floats(pictures), own, scorer, tuple(seeds), folder)
