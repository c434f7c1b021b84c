"""Helpers for scripts, under diffusers' names: pictures and animations from files and into files, and grids."""

from __future__ import annotations

import contextlib
import http.client
import os
import tempfile
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import PIL.ImageSequence

from .images import TOO_BRIGHT, read_pictures, to_pil

__all__ = [
    "export_to_gif",
    "export_to_video",
    "load_image",
    "load_video",
    "make_image_grid",
    "save_animation",
]

# Suffix -> ffmpeg's name of the format.
VIDEO_FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".avi": "avi"}
ANIMATION_SUFFIXES = (".gif", ".webp", *VIDEO_FORMATS)


def load_image(
    image: str | os.PathLike[str] | PIL.Image.Image,
    convert_method: Callable[[PIL.Image.Image], PIL.Image.Image] | None = None,
) -> PIL.Image.Image:
    """Open a picture from a path, a ``http(s)`` URL or a PIL image, turned upright by its EXIF tag.

    Args:
        image: where the picture is.
        convert_method: what to do with it; conversion to RGB if not given, of 16-bit grey by its upper eight bits.

    Raises:
        TypeError: ``image`` is none of these.
        FileNotFoundError: there is no such file.
        ValueError: the file is not a picture, is damaged, or has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``.
        OSError: the URL cannot be read.
    """
    if isinstance(image, PIL.Image.Image):
        picture = PIL.ImageOps.exif_transpose(image)
    else:
        with _local(image, "picture") as path, _opened(path, str(image)) as file:
            file.load()
            picture = PIL.ImageOps.exif_transpose(file)
    return _to_rgb(picture) if convert_method is None else convert_method(picture)


@contextlib.contextmanager
def _opened(path: Path, place: str) -> Iterator[PIL.Image.Image]:
    """The picture in the file ``path``; whatever goes wrong while it is read becomes a ValueError."""
    try:
        with warnings.catch_warnings():
            # Above its limit Pillow only warns, and raises above twice the limit; here the limit is one.
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(path) as picture:
                yield picture
    except PIL.UnidentifiedImageError:
        raise ValueError(f"{place} cannot be read as a picture: it is in no format that Pillow knows.") from None
    except Exception as error:  # on damaged files the decoders raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{place} cannot be read as a picture: {reason.rstrip('.')}.") from None


def _to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    # Pillow would cut 16-bit grey (depth maps) off at 255: all white.
    if picture.mode.startswith("I;16"):
        picture = PIL.Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return picture.convert("RGB")


@contextlib.contextmanager
def _local(place: Any, kind: str) -> Iterator[Path]:
    """The file at ``place``, a path or a URL; what was downloaded is removed afterwards."""
    if not isinstance(place, (str, os.PathLike)):
        raise TypeError(f"A {kind} is loaded from a path or a URL, not from an object of type {type(place).__name__}.")
    place = os.fspath(place)
    if not place.startswith(("http://", "https://")):
        if not Path(place).is_file():
            raise FileNotFoundError(f"There is no {kind} {place!r}; give the path of a file or a URL.")
        yield Path(place)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "download").with_suffix(Path(urllib.parse.urlparse(place).path).suffix)
        try:
            # Some hosts turn away those who do not say who they are.
            request = urllib.request.Request(place, headers={"User-Agent": "fourstroke"})
            with urllib.request.urlopen(request, timeout=60) as response:
                path.write_bytes(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise OSError(f"{place} cannot be fetched: {error}.") from None
        yield path


def load_video(
    video: str | os.PathLike[str],
    convert_method: Callable[[list[PIL.Image.Image]], list[PIL.Image.Image]] | None = None,
    return_fps: bool = False,
) -> list[PIL.Image.Image] | tuple[list[PIL.Image.Image], float]:
    """Read all frames of a GIF, a WebP or a video from a path or a ``http(s)`` URL, as RGB pictures.

    Args:
        video: where it is.
        convert_method: what to do with the list of frames.
        return_fps: return (frames, frames a second).

    Raises:
        TypeError: ``video`` is neither a path nor a URL.
        FileNotFoundError: there is no such file.
        ValueError: the file is neither an animation nor a video, or does not tell its frame rate.
        ImportError: it is a video, and the extra ``video`` is not installed.
        OSError: the URL cannot be read.
    """
    with _local(video, "video") as path:
        read = _read_pictures if path.suffix.lower() in (".gif", ".webp") else _read_video
        frames, fps = read(path, str(video))
    if convert_method is not None:
        frames = convert_method(frames)
    if not return_fps:
        return frames
    if not fps:
        raise ValueError(f"{video} does not tell its frame rate; load it without return_fps.")
    return frames, fps


def _read_pictures(path: Path, place: str) -> tuple[list[PIL.Image.Image], float | None]:
    with _opened(path, place) as animation:
        animation.load()
        duration = animation.info.get("duration")
        frames = [frame.convert("RGB") for frame in PIL.ImageSequence.Iterator(animation)]
    return frames, 1000 / duration if duration else None


def _read_video(path: Path, place: str) -> tuple[list[PIL.Image.Image], float | None]:
    av = _av()
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            # Telephones hold the sensor sideways and say so in the file.
            frames = [frame.to_image().rotate(frame.rotation, expand=True) for frame in container.decode(stream)]
            return frames, float(stream.average_rate) if stream.average_rate else None
    except (av.error.FFmpegError, IndexError) as error:
        reason = "it has no pictures" if isinstance(error, IndexError) else error.strerror
        raise ValueError(f"{place} cannot be read as a video: {reason}.") from None


def _av() -> Any:
    try:
        import av
        import av.error
    except ImportError:
        raise ImportError(
            "Videos need PyAV, which is not installed: pip install 'fourstroke[video]'. GIF and WebP work without it."
        ) from None
    return av


def export_to_gif(image: Any, output_gif_path: str | os.PathLike[str] | None = None, fps: int = 10) -> str:
    """Write frames as a GIF that loops for ever.

    Args:
        image: frames, see `save_animation`.
        output_gif_path: where to write it; a temporary file if not given.
        fps: frames a second.

    Returns:
        The path.

    Raises:
        TypeError, ValueError: see `save_animation`; or the path does not end in ``.gif``.
    """
    path = _target(output_gif_path, ".gif")
    if path.suffix.lower() != ".gif":
        raise ValueError(f"{path} does not end in .gif; save_animation writes other formats, by the suffix.")
    return save_animation(image, path, fps)


def export_to_video(
    video_frames: Any,
    output_video_path: str | os.PathLike[str] | None = None,
    fps: float = 10,
    quality: float | None = 5.0,
    bitrate: int | None = None,
    macro_block_size: int | None = 16,
) -> str:
    """Write frames as a video (H.264).

    Args:
        video_frames: frames, see `save_animation`.
        output_video_path: where to write it, with a suffix of `VIDEO_FORMATS`; a temporary ``.mp4`` if not given.
        fps: frames a second.
        quality: 0 to 10, or None for the encoder's own; ignored with ``bitrate``.
        bitrate: bits a second.
        macro_block_size: both sides are enlarged to a multiple of this, in pixels; None leaves them as they are.

    Returns:
        The path.

    Raises:
        TypeError, ValueError: see `save_animation`; or ``quality`` or the suffix is none of these, or a side is odd.
        ImportError: the extra ``video`` is not installed.
        OSError: the encoder failed.
    """
    path = _target(output_video_path, ".mp4")
    if path.suffix.lower() not in VIDEO_FORMATS:
        raise ValueError(f"{path} is no video's name; it must end in one of {', '.join(VIDEO_FORMATS)}.")
    if quality is not None and not 0 <= quality <= 10:
        raise ValueError(f"quality is {quality}; it must be 0 (worst) to 10 (best), or None.")
    frames = [frame.convert("RGB") for frame in _frames(video_frames, fps)]
    block = macro_block_size or 1
    width, height = frames[0].size
    if block % 2 and (width % 2 or height % 2):
        raise ValueError(f"The frames are {width} x {height} pixels, but a video has even sides: macro_block_size=2.")
    size = (-(-width // block) * block, -(-height // block) * block)
    av = _av()

    def write(temporary: Path) -> None:
        with av.open(str(temporary), "w", format=VIDEO_FORMATS[path.suffix.lower()]) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.width, stream.height = size
            stream.pix_fmt = "yuv420p"
            if bitrate is not None:
                stream.bit_rate = bitrate
            elif quality is not None:
                # x264's "constant rate factor": 0 is lossless and 51 the worst.
                stream.options = {"crf": str(int((1 - quality / 10) * 51))}
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_image(frame.resize(size))))
            container.mux(stream.encode(None))

    try:
        return _write(path, write)
    except av.error.FFmpegError as error:
        raise OSError(f"{path} cannot be written as a video: {error.strerror}.") from None


def save_animation(frames: Any, path: str | os.PathLike[str], fps: float = 10) -> str:
    """Write frames as a GIF, a WebP or a video, as the suffix of ``path`` says; the first two loop for ever.

    Args:
        frames: PIL images, a (F, H, W, 3) array or a (F, 3, H, W) tensor of floats in [0, 1] or of bytes, or a list of
            single ones; all of one size.
        path: where to write it, atomically.
        fps: frames a second. GIF counts in hundredths of a second.

    Returns:
        The path.

    Raises:
        TypeError: a frame is of another type.
        ValueError: there are no frames, their sizes differ, their channels are not 1, 3 or 4, values lie far above 1,
            ``fps`` is not above 0, or the suffix is unknown.
        ImportError, OSError: see `export_to_video`.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in ANIMATION_SUFFIXES:
        raise ValueError(f"{path} is no animation's name; it must end in one of {', '.join(ANIMATION_SUFFIXES)}.")
    if suffix in VIDEO_FORMATS:
        return export_to_video(frames, path, fps)
    first, *others = _frames(frames, fps)
    options: dict[str, Any] = {"save_all": True, "append_images": others, "duration": int(1000 // fps), "loop": 0}
    options |= {"format": "GIF", "optimize": False} if suffix == ".gif" else {"format": "WEBP", "quality": 90}
    return _write(path, lambda temporary: first.save(temporary, **options))


def _frames(frames: Any, fps: float) -> list[PIL.Image.Image]:
    if fps <= 0:
        raise ValueError(f"fps is {fps}; it must be above 0.")
    pictures = read_pictures(frames, "frames", floats_only=False)
    images = [
        picture if isinstance(picture, PIL.Image.Image) else to_pil(_channels_last(picture)[None])[0]
        for picture in pictures
    ]
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise ValueError(f"The frames have the sizes {sorted(sizes)}; resize them to one.")
    return images


def _channels_last(picture: Any) -> np.ndarray:
    """(H, W, C) in [0, 1] of an array or a tensor of floats or bytes."""
    if not isinstance(picture, np.ndarray):
        picture = (picture.permute(1, 2, 0) if picture.ndim == 3 else picture).cpu()
        picture = (picture.float() if picture.is_floating_point() else picture).numpy()
    picture = picture if picture.ndim == 3 else picture[..., None]
    if picture.shape[-1] not in (1, 3, 4):
        raise ValueError(f"A frame has {picture.shape[-1]} channels; it must have 3 (RGB), or 1, or 4 with an alpha.")
    if picture.dtype == np.uint8:
        return picture / 255
    if picture.dtype.kind != "f":
        raise TypeError(f"The frames are arrays of {picture.dtype}; they must hold floats in [0, 1], or bytes.")
    if picture.max() > TOO_BRIGHT:
        raise ValueError(f"The frames have values up to {picture.max():g}; floats must lie in [0, 1].")
    return picture.clip(0, 1)


def _target(path: str | os.PathLike[str] | None, suffix: str) -> Path:
    if path is not None:
        return Path(path)
    handle, name = tempfile.mkstemp(suffix=suffix)
    os.close(handle)
    return Path(name)


def _write(path: Path, write: Callable[[Path], object]) -> str:
    from .loading import write_atomically

    write_atomically(path, write)
    return str(path)


def make_image_grid(
    images: Sequence[PIL.Image.Image], rows: int, cols: int, resize: int | None = None
) -> PIL.Image.Image:
    """Lay ``rows * cols`` pictures out in one, row by row, in cells of the first one's size.

    Args:
        images: the pictures.
        rows, cols: the layout.
        resize: side in pixels to which every picture is resized first.

    Raises:
        ValueError: there are more or fewer pictures than cells.
    """
    if len(images) != rows * cols:
        raise ValueError(f"{len(images)} pictures do not fill {rows} rows of {cols}; give rows * cols of them.")
    if resize is not None:
        images = [image.resize((resize, resize)) for image in images]
    width, height = images[0].size
    grid = PIL.Image.new("RGB", (cols * width, rows * height))
    for i, image in enumerate(images):
        grid.paste(image, (i % cols * width, i // cols * height))
    return grid
