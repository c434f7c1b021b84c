"""Pictures in the terminal while they come into being: kitty's and iTerm2's graphics, or half blocks in true colour."""

from __future__ import annotations

import base64
import io
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TextIO

import PIL.Image

from .output import make_grid

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine import Engine

Kind = Literal["kitty", "iterm2", "blocks"]

MAX_ROWS, MAX_COLUMNS = 24, 80
ROWS_FOR_TEXT = 4  # that a preview leaves free below itself
KITTY_CHUNK = 4096  # bytes of base64 in one escape sequence, as the protocol wants
MAX_PIXELS = 768  # a side, of what is sent to a terminal
UPPER_HALF = "▀"

# Latents -> RGB in [-1, 1] by one matrix, (4, 3), and an offset: rough colours at an eighth of the size, for nothing.
# SD 1.x: https://discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204/2
SD_FACTORS = ((0.298, 0.207, 0.208), (0.187, 0.286, 0.173), (-0.158, 0.189, 0.264), (-0.184, -0.271, -0.473))
SD_OFFSET = (0.0, 0.0, 0.0)
# SDXL: https://huggingface.co/blog/TimothyAlexisVass/explaining-the-sdxl-latent-space, there for 0 to 255.
XL_FACTORS = tuple(
    tuple(value / 127.5 for value in row) for row in ((60, 60, 60), (-60, -5, 10), (25, 15, -5), (-70, -50, -35))
)
XL_OFFSET = (150 / 127.5 - 1, 140 / 127.5 - 1, 130 / 127.5 - 1)

TINY_VAE = "emoji/tiny-vae"


def terminal_kind(environ: Mapping[str, str], truecolor: bool) -> Kind | None:
    """How the terminal described by its environment variables can show pictures; None when it cannot.

    Terminal multiplexers do not pass graphics on, so in them it is half blocks at best.
    """
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    blocks: Kind | None = "blocks" if truecolor else None
    if environ.get("TMUX") or term.startswith(("screen", "tmux")):
        return blocks
    if environ.get("KITTY_WINDOW_ID") or term in ("xterm-kitty", "xterm-ghostty") or program == "ghostty":
        return "kitty"
    if program in ("iTerm.app", "WezTerm", "mintty") or environ.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    return blocks


def fit(size: tuple[int, int], columns: int, rows: int) -> tuple[int, int]:
    """Columns and rows of the largest box of at most ``columns`` by ``rows`` cells for a picture of ``size``.

    A cell is taken to be twice as high as it is wide.
    """
    width, height = size
    scale = min(columns / width, 2 * rows / height)
    return max(1, round(width * scale)), max(1, round(height * scale / 2))


class Preview:
    """A place above the cursor's line in which a picture is drawn again and again.

    Args:
        stream: the terminal.
        kind: how it shows pictures.
        columns, rows: at most so many cells.
    """

    def __init__(self, stream: TextIO, kind: Kind, columns: int = MAX_COLUMNS, rows: int = MAX_ROWS):
        self.stream = stream
        self.draw = DRAWERS[kind]
        self.columns, self.rows = columns, rows
        self._box: tuple[int, int] | None = None

    @classmethod
    def on(cls, stream: TextIO, environ: Mapping[str, str], truecolor: bool) -> Preview | None:
        """A preview on ``stream``, or None when it is no terminal, cannot show pictures, or is too small."""
        kind = terminal_kind(environ, truecolor) if stream.isatty() else None
        if kind == "blocks" and "utf" not in (stream.encoding or "").lower():
            kind = None
        size = shutil.get_terminal_size()
        rows = min(MAX_ROWS, size.lines - ROWS_FOR_TEXT)
        return cls(stream, kind, min(MAX_COLUMNS, size.columns - 1), rows) if kind and rows >= 4 else None

    def show(self, images: Sequence[PIL.Image.Image]) -> None:
        """Draw ``images``, several as a grid; the cursor stays in its line."""
        picture = make_grid(images) if len(images) > 1 else images[0]
        if self._box is None:
            self._box = fit(picture.size, self.columns, self.rows)
            # Make room: the line that the cursor is in becomes the picture's first, and the cursor goes below it.
            self.stream.write("\r\x1b[2K" + "\n" * self._box[1])
        columns, rows = self._box
        drawn = self.draw(picture, columns, rows)
        self.stream.write(f"\x1b7\x1b[{rows}A\r{drawn}\x1b8")
        self.stream.flush()


def draw_blocks(picture: PIL.Image.Image, columns: int, rows: int) -> str:
    """Two pixels a cell: the upper one is the colour of a half block, the lower one that of its background."""
    small = picture.convert("RGB").resize((columns, 2 * rows), PIL.Image.Resampling.BOX)
    lines = []
    for row in range(rows):
        cells = []
        for column in range(columns):
            top, bottom = (_colour(small.getpixel((column, 2 * row + half))) for half in (0, 1))
            cells.append(f"\x1b[38;2;{top}m\x1b[48;2;{bottom}m{UPPER_HALF}")
        lines.append("".join(cells) + "\x1b[0m")
    return "\x1b[1B\r".join(lines)


def _colour(pixel: Any) -> str:
    return ";".join(map(str, pixel))


def draw_kitty(picture: PIL.Image.Image, columns: int, rows: int) -> str:
    """https://sw.kovidgoyal.net/kitty/graphics-protocol: one image id a process, so a picture replaces the last one."""
    data = _png(picture)
    chunks = [data[i : i + KITTY_CHUNK] for i in range(0, len(data), KITTY_CHUNK)]
    control = f"a=T,f=100,i={os.getpid()},p=1,c={columns},r={rows},C=1,q=2,"
    parts = []
    for i, chunk in enumerate(chunks):
        parts.append(f"\x1b_G{control if i == 0 else 'q=2,'}m={int(i < len(chunks) - 1)};{chunk}\x1b\\")
    return "".join(parts)


def draw_iterm2(picture: PIL.Image.Image, columns: int, rows: int) -> str:
    """https://iterm2.com/documentation-images.html."""
    return f"\x1b]1337;File=inline=1;width={columns};height={rows};preserveAspectRatio=0:{_png(picture)}\x07"


def _png(picture: PIL.Image.Image) -> str:
    buffer = io.BytesIO()
    small = picture.convert("RGB")
    small.thumbnail((MAX_PIXELS, MAX_PIXELS))
    small.save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


DRAWERS: Mapping[Kind, Callable[[PIL.Image.Image, int, int], str]] = {
    "kitty": draw_kitty,
    "iterm2": draw_iterm2,
    "blocks": draw_blocks,
}


# What is drawn.


def rough_pictures(latents: Tensor, xl: bool) -> list[PIL.Image.Image]:
    """Latents (N, 4, h, w) of SD 1.x, 2.x or SDXL in the UNet's scale -> N rough pictures of w x h pixels."""
    import torch

    from ..images import postprocess

    factors = torch.tensor(XL_FACTORS if xl else SD_FACTORS)
    offset = torch.tensor(XL_OFFSET if xl else SD_OFFSET).view(1, 3, 1, 1)
    return postprocess(torch.einsum("nchw,cr->nrhw", latents[:, :4].float().cpu(), factors) + offset)


def previewer(engine: Engine) -> Callable[[Tensor], list[PIL.Image.Image]]:
    """What turns the latents of ``engine`` into pictures: for emoji models the shipped tiny VAE, else a matrix."""
    from .. import hub

    pipeline = engine.pipeline
    if engine.base.family.name == "emoji" and TINY_VAE in hub.shipped():
        from ..images import postprocess
        from ..latents import decode
        from ..models.vae_tiny import AutoencoderTiny

        tiny = AutoencoderTiny.from_pretrained(TINY_VAE).to(pipeline.device, pipeline.dtype)
        return lambda latents: postprocess(decode(tiny, latents))
    xl = pipeline.unet.config.addition_embed_type is not None
    return lambda latents: rough_pictures(latents, xl)
