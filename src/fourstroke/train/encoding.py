"""Encoded examples: latents and text embeddings, computed once, kept on disk, read back in shuffled batches.

`encode_examples` runs VAE and text encoders (and, where there are prompts only, the whole teacher) over what is not in
the cache yet. Files are written as it goes, so that it may be interrupted at any moment; they are memory-mapped when
they are read, so that examples need not fit into memory. Afterwards nothing but the UNet works: `encoders_on` keeps the
other networks off the device, and brings them for sample pictures.

What a row is computed from is its key: the pixels' file, size and crop; the token ids; and, by the folder's name, the
networks. So nothing is read back that would now be computed differently, and one changed picture is one computed row.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.ImageOps
import torch
from torch import Tensor

from ..conditioning import Components, encode_text
from ..latents import upcast
from ..request import GenerateRequest
from .data import THREADS, DataError, DataOptions, Picture, Source
from .shapes import Frame, bucket, frame
from .store import PIXELS_A_BATCH, Store, folder_of, key_of, pieces
from .teacher import painted

if TYPE_CHECKING:
    from ..pipelines.pipeline import DiffusionPipeline

Progress = Callable[[str, int, int], None]
REAL = 512  # pixels; models trained at this size and above have shapes in multiples of 64
CAPTIONS_A_BATCH, TOKENISED = 32, 4096  # encoded and tokenised at a time
ENLARGED, HARDLY = 4.0, 2.0  # a side that must grow by more is an error, or told of
LONG = "CLIP reads at most"  # how the tokenizer's warning begins


@dataclass(frozen=True)
class Batch:
    """Examples, float32 on the CPU.

    Attributes:
        latents: (B, 4, h, w), in the UNet's scale.
        prompt_embeds: (B, L, D).
        pooled: (B, P), SDXL only.
        time_ids: (B, 6), SDXL only: original size, crop, target size in pixels, height (top) first.
        captions: what ``prompt_embeds`` says.
    """

    latents: Tensor
    prompt_embeds: Tensor
    pooled: Tensor | None
    time_ids: Tensor | None
    captions: list[str]


@dataclass(frozen=True)
class View:
    """One way to look at a picture: its latents' ``key``, and SDXL's ``time_ids``."""

    key: bytes
    time_ids: tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """A picture's views, its captions with their embeddings' keys, and how often it is shown."""

    views: tuple[View, ...]
    captions: tuple[str, ...]
    texts: tuple[bytes, ...]
    repeats: int = 1


class Examples:
    """What is trained on.

    Attributes:
        empty: one row of what the pipeline uses as the negative prompt when none is given; it has no latents (their
            height and width are 0), and its ``time_ids`` are zero.
        shapes: height and width in pixels -> how many examples have them, repeats counted.
    """

    def __init__(self, examples: Sequence[Example], latents: Store, texts: Store, empty: Batch):
        self.empty = empty
        self._examples = list(examples)
        self._latents, self._texts = latents, texts
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, example in enumerate(self._examples):
            groups.setdefault(example.views[0].time_ids[4:], []).extend([i] * example.repeats)
        self.shapes = {(shape[0], shape[1]): len(group) for shape, group in groups.items()}
        self._groups = [np.array(group, dtype=np.int64) for group in groups.values()]
        self._order = functools.lru_cache(maxsize=64)(self._shuffled)
        self._round = functools.lru_cache(maxsize=2)(self._shuffled_round)

    def __len__(self) -> int:
        """How many examples there are, repeats counted."""
        return sum(map(len, self._groups))

    @property
    def captions(self) -> Iterator[str]:
        """The first caption of every example."""
        return (example.captions[0] for example in self._examples)

    def batch(self, index: int, size: int, seed: int) -> Batch:
        """Batch ``index`` of the endless sequence that ``seed`` shuffles; a pure function of its arguments.

        All rows of a batch have one shape. Within a shape every example comes once before one comes again, and shapes
        come as often as they have examples. Captions, crops and mirroring are drawn at every visit.

        Raises:
            ValueError: ``index`` is negative or ``size`` not positive.
        """
        if index < 0 or size < 1:
            raise ValueError(f"batch({index}, {size}) is asked for; index must be at least 0 and size at least 1.")
        drawn = self._drawn(index, size, seed)
        numbers = np.random.default_rng([seed, index, 1])
        views = [example.views[numbers.integers(len(example.views))] for example in drawn]
        chosen = [int(numbers.integers(len(example.captions))) for example in drawn]
        latents = self._latents.read([view.key for view in views])
        texts = self._texts.read([example.texts[i] for example, i in zip(drawn, chosen, strict=True)])
        if "std" in latents:
            generator = torch.Generator().manual_seed(int(numbers.integers(2**63)))
            latents["mean"] += latents["std"] * torch.randn(latents["mean"].shape, generator=generator)
        ids = torch.tensor([view.time_ids for view in views], dtype=torch.float32)
        return Batch(
            latents["mean"],
            texts["embeds"],
            texts.get("pooled"),
            ids if self.empty.time_ids is not None else None,
            [example.captions[i] for example, i in zip(drawn, chosen, strict=True)],
        )

    def _drawn(self, index: int, size: int, seed: int) -> list[Example]:
        """The examples of a batch. Round r holds, of each shape, the batches that its examples fill in epoch r."""
        lowest = index * size // len(self)
        number = next(r for r in itertools.count(lowest) if self._before(r + 1, size) > index)
        group, nth = self._round(number, size, seed)[index - self._before(number, size)]
        count = len(self._groups[group])
        places = range(nth * size, (nth + 1) * size)
        return [self._examples[self._order(group, place // count, seed)[place % count]] for place in places]

    def _before(self, number: int, size: int) -> int:
        """How many batches come before round ``number``."""
        return sum(number * len(group) // size for group in self._groups)

    def _shuffled_round(self, number: int, size: int, seed: int) -> list[tuple[int, int]]:
        """The batches of a round in order: which shape, and the how manieth of that shape."""
        batches = [
            (i, nth)
            for i, group in enumerate(self._groups)
            for nth in range(number * len(group) // size, (number + 1) * len(group) // size)
        ]
        return [batches[i] for i in np.random.default_rng([seed, number, 2]).permutation(len(batches))]

    def _shuffled(self, group: int, epoch: int, seed: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch, 3, group]).permutation(self._groups[group])


def encode_examples(
    pipe: DiffusionPipeline,
    source: Source,
    options: DataOptions | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Examples:
    """Encode what ``source`` holds, or read it from the cache where it is there already.

    Args:
        pipe: a text-to-image pipeline, whose networks run where they are, in their dtype.
        source: of `open_source`.
        options: defaults if not given.
        cache: the folder for latents and embeddings; None keeps them in memory.
        progress: called with what is being done, how much of it is done, and how much there is of it.

    Raises:
        DataError: pictures are too small for the resolution; all are named, before anything is encoded.
        ValueError: the model cannot be trained like this.
    """
    options = options or DataOptions()
    pipe.merge_adapters()
    parts = pipe._parts()
    tell = progress or (lambda what, done, total: None)
    resolution, step = resolution_of(parts, options), step_of(parts)
    views = _views(source, resolution, step, options) if source.pictures else []
    texts = _texts(parts, source, options, cache, tell)
    if source.pictures:
        latents = _encoded_pictures(parts, source, views, options, cache, tell)
        examples = [
            Example(tuple(view for view, _, _ in seen), picture.captions, texts.keys(picture.captions), picture.repeats)
            for picture, seen in zip(source.pictures, views, strict=True)
        ]
    else:
        prompts = [prompt for prompt in source.prompts for _ in range(options.images_per_prompt)]
        size = bucket((1, 1), resolution, step, square=True)
        with _without_long_ones():
            named = [(prompt, texts.by_caption[prompt]) for prompt in prompts]
            latents, keys = painted(pipe, named, size, options, cache, functools.partial(tell, "teacher's pictures"))
        examples = [
            Example((View(key, (*size, 0, 0, *size)),), (prompt,), texts.keys([prompt]))
            for prompt, key in zip(prompts, keys, strict=True)
        ]
    return Examples(examples, latents, texts.store, _empty(parts, options))


def resolution_of(parts: Components, options: DataOptions) -> int:
    """The resolution asked for, or the model's own, in pixels."""
    own = parts.unet.config.sample_size or (128 if parts.xl else 64)
    side = own if isinstance(own, int) else round((own[0] * own[1]) ** 0.5)
    return options.resolution or side * parts.vae.downscale


def step_of(parts: Components) -> int:
    """What pictures' sides are multiples of, so that every level of the UNet halves evenly; 64 for real models."""
    levels = len(parts.unet.config.block_out_channels)
    step = parts.vae.downscale * 2 ** (levels - 1)
    return max(step, 64) if resolution_of(parts, DataOptions()) >= REAL else step


@contextmanager
def encoders_on(pipe: DiffusionPipeline, device: torch.device | str) -> Iterator[None]:
    """Have everything but the UNet on ``device`` inside, and on the CPU afterwards, where it takes no GPU memory."""
    others = [network for network in pipe.networks if network is not pipe.unet]
    for network in others:
        network.to(device)
    try:
        yield
    finally:
        for network in others:
            network.to("cpu")


# Pictures.

Seen = tuple[View, Frame, bool]


def _views(source: Source, resolution: int, step: int, options: DataOptions) -> list[list[Seen]]:
    """For every picture the views that there are of it: crops, each as it is and, if wanted, mirrored."""
    found, small, hardly = [], [], []
    for picture in source.pictures:
        size = picture.height, picture.width
        target = bucket(size, resolution, step, square=not options.buckets)
        growth = max(wanted / own for wanted, own in zip(target, size, strict=True))
        if growth > ENLARGED:
            small.append(f"{picture.name} ({picture.width} x {picture.height} for {target[1]} x {target[0]})")
        hardly += [picture.name] if growth > HARDLY else []
        found.append(_views_of(picture, target, options))
    if small:
        raise DataError(
            f"{source.place}: too small for a resolution of {resolution}: {', '.join(small)}. Their sides would grow "
            f"more than {ENLARGED:g}-fold; remove them, or choose a lower resolution."
        )
    if hardly:
        warnings.warn(
            f"{len(hardly)} of {len(found)} pictures are enlarged more than {HARDLY:g}-fold, {hardly[0]} among them; "
            "what is trained on them will be soft.",
            stacklevel=3,
        )
    return found


def _views_of(picture: Picture, target: tuple[int, int], options: DataOptions) -> list[Seen]:
    size = picture.height, picture.width
    seen: list[Seen] = []
    for copy, mirrored in itertools.product(range(options.crops), (False, True) if options.flip else (False,)):
        where = (0.5, 0.5)
        if options.crop == "random":
            numbers = np.random.default_rng([int(picture.digest, 16), copy, mirrored])
            where = (float(numbers.random()), float(numbers.random()))
        cut = frame(size, target, where)
        key = key_of(picture.digest, cut.scaled, cut.corner, cut.target, mirrored)
        seen.append((View(key, cut.time_ids), cut, mirrored))
    return seen


def _pixels(picture: Picture, cut: Frame, mirrored: bool) -> Tensor:
    """(3, height, width) uint8."""
    try:
        image = picture.open()
    except OSError as error:
        raise DataError(f"{picture.name} has changed while it was used ({error}); start again.") from error
    if mirrored:
        image = PIL.ImageOps.mirror(image)
    return torch.from_numpy(np.array(cut.cut(image))).permute(2, 0, 1)


def _encoded_pictures(
    parts: Components,
    source: Source,
    views: list[list[Seen]],
    options: DataOptions,
    cache: Path | None,
    tell: Progress,
) -> Store:
    """The latents of every view, ``mean`` and, for samples, ``std``, in the UNet's scale."""
    sampled = options.latents == "sample"
    store = Store(folder_of(cache, "latents", parts.vae, sampled, parts.xl))
    wanted: dict[bytes, tuple[Picture, Frame, bool]] = {}
    for picture, seen in zip(source.pictures, views, strict=True):
        wanted |= {view.key: (picture, cut, mirrored) for view, cut, mirrored in seen}
    missing: dict[tuple[int, int], list[bytes]] = {}
    for key, (_, cut, _) in wanted.items():
        if key not in store:
            missing.setdefault(cut.target, []).append(key)
    done = len(wanted) - sum(map(len, missing.values()))
    if missing:
        parts.bring(parts.vae)
        tell("pictures", done, len(wanted))
    with store, ThreadPoolExecutor(THREADS) as pool, upcast(parts.vae, parts.xl) as dtype:
        for (height, width), keys in missing.items():
            batches = pieces(keys, max(1, PIXELS_A_BATCH // (height * width)))
            for batch, pixels in _ahead(pool, batches, lambda key: _pixels(*wanted[key])):
                pictures = torch.stack(pixels).to(parts.vae.device, dtype) / 127.5 - 1
                store.add(batch, _latents_of(parts.vae, pictures, sampled))
                done += len(batch)
                tell("pictures", done, len(wanted))
            store.flush()
    return store


@torch.no_grad()
def _latents_of(vae: Any, pictures: Tensor, sampled: bool) -> dict[str, Tensor]:
    """Mean and, for samples, deviation of the latents of ``pictures`` (N, 3, H, W) in [-1, 1], in the UNet's scale."""
    encoded = vae.encode(pictures)
    mean, std = (encoded, None) if isinstance(encoded, Tensor) else (encoded.mean, encoded.std)
    middle, spread, factor = 0.0, 1.0, vae.config.scaling_factor
    if vae.config.get("latents_mean") is not None and vae.config.get("latents_std") is not None:
        middle, spread = (mean.new_tensor(vae.config.get(name)).view(1, -1, 1, 1) for name in _STATISTICS)
    rows = {"mean": (mean - middle) * factor / spread}
    return rows | {"std": std * factor / spread} if sampled and std is not None else rows


_STATISTICS = ("latents_mean", "latents_std")


def _ahead(
    pool: ThreadPoolExecutor, batches: Sequence[Sequence[bytes]], make: Callable[[bytes], Tensor]
) -> Iterator[tuple[Sequence[bytes], list[Tensor]]]:
    """Each batch with what ``make`` makes of its keys, while the threads of ``pool`` work at the next one."""
    coming: list[list[Future[Tensor]]] = []
    for i, batch in enumerate(batches):
        while len(coming) < 2 and i + len(coming) < len(batches):
            coming.append([pool.submit(make, key) for key in batches[i + len(coming)]])
        yield batch, [future.result() for future in coming.pop(0)]


# Captions.


@dataclass(frozen=True)
class _Texts:
    """The store of embeddings, and the keys of captions in it."""

    store: Store
    by_caption: dict[str, bytes]

    def keys(self, captions: Sequence[str]) -> tuple[bytes, ...]:
        return tuple(self.by_caption[caption] for caption in captions)


def _texts(parts: Components, source: Source, options: DataOptions, cache: Path | None, tell: Progress) -> _Texts:
    """The embeddings of all captions, ``embeds`` and, for SDXL, ``pooled``."""
    captions = dict.fromkeys(itertools.chain(*(picture.captions for picture in source.pictures), source.prompts))
    every = list(captions)
    keys = _keys_of(parts, every)
    store = Store(folder_of(cache, "texts", *parts.text_encoders, options.clip_skip, parts.xl))
    missing = {key: caption for key, caption in zip(keys, every, strict=True) if key not in store}
    done = len(every) - len(missing)
    if missing:
        tell("captions", done, len(every))
    with store:
        for batch in pieces(list(missing), CAPTIONS_A_BATCH):
            prompts = [missing[key] for key in batch]
            with _without_long_ones(), torch.no_grad():
                encoded, _ = encode_text(parts, GenerateRequest(prompt=prompts, clip_skip=options.clip_skip), False)
            store.add(
                batch, {"embeds": encoded.embeds, "pooled": encoded.pooled} if parts.xl else {"embeds": encoded.embeds}
            )
            done += len(batch)
            tell("captions", done, len(every))
    return _Texts(store, dict(zip(every, keys, strict=True)))


def _keys_of(parts: Components, captions: Sequence[str]) -> list[bytes]:
    """The captions' keys, made of their token ids; a warning tells of those that are too long for the encoder."""
    keys: list[bytes] = []
    long: list[str] = []
    for some in pieces(captions, TOKENISED):
        ids = []
        for tokenizer in parts.tokenizers:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                ids.append(tokenizer(some).numpy())
            if len(ids) == 1:
                long += [str(warning.message) for warning in caught]
        keys += [key_of(*(rows[i].tobytes() for rows in ids)) for i in range(len(some))]
    if long:
        warnings.warn(f"{len(long)} of {len(captions)} captions are too long; of the first: {long[0]}", stacklevel=4)
    return keys


@contextmanager
def _without_long_ones() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=LONG)
        yield


@torch.no_grad()
def _empty(parts: Components, options: DataOptions) -> Batch:
    _, encoded = encode_text(parts, GenerateRequest(prompt="", clip_skip=options.clip_skip), True)
    assert encoded is not None
    embeds, pooled = encoded.embeds.float().cpu(), encoded.pooled.float().cpu()
    latents = torch.zeros(1, parts.vae.config.latent_channels, 0, 0)
    return Batch(latents, embeds, pooled if parts.xl else None, torch.zeros(1, 6) if parts.xl else None, [""])
