"""Numbers out of pictures: likeness of sets, sharpness, edges that agree, what was left alone, how videos move.

Pictures are float tensors (N, 3, H, W) in -1..1, videos (V, F, 3, H, W), unless said otherwise. Nothing here knows of
models; `tests/unit/test_recipe_measures.py` holds every measure against a synthetic truth.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PEAK = 2.0  # from black to white
EXACT = 99.0  # decibels that stand for "not a bit differs"
INK = 0.9  # a pixel whose darkest channel is below this is drawn on
STILL = 0.25  # pixels a frame; where nothing moves faster, a flow says nothing
ECC_STOP = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 100, 1e-5)
ECC_BLUR = 5  # pixels


def frechet(first: Tensor, second: Tensor) -> float:
    """Frechet distance of two sets of feature vectors (N, D), each taken as a normal distribution (arXiv 1706.08500,
    eq. 6)."""
    a, b = first.double(), second.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, axes = torch.linalg.eigh(cov_a)
    root = axes @ torch.diag(values.clamp(min=0).sqrt()) @ axes.T
    mixed = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * mixed
    return max(0.0, float(distance))


def sharpness(pictures: Tensor) -> float:
    """Mean energy of the Laplacian of the grey pictures: blur lowers it, noise raises it."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    return F.conv2d(pictures.mean(1, keepdim=True), kernel).square().mean().item()


def edge_f1(given: Tensor, found: Tensor, tolerance: int) -> Tensor:
    """F1 (N,) of edge maps, bool (N, H, W): an edge is met when the other map has one within ``tolerance`` pixels.

    Of the harmonic mean, precision counts the found edges that are met, and recall the given ones. Two maps without
    any edge agree; one without edges agrees with no other.
    """
    span = 2 * tolerance + 1

    def near(edges: Tensor) -> Tensor:
        return F.max_pool2d(edges[:, None].float(), span, stride=1, padding=tolerance)[:, 0] > 0

    def share(met: Tensor, edges: Tensor) -> Tensor:
        return met.sum((1, 2)) / edges.sum((1, 2)).clamp(min=1)

    precision, recall = share(found & near(given), found), share(given & near(found), given)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-9)
    return torch.where(given.flatten(1).any(1) | found.flatten(1).any(1), f1, 1.0)


def psnr(first: Tensor, second: Tensor, where: Tensor) -> Tensor:
    """Peak signal to noise ratio (N,) in decibels over the pixels of ``where``, bool (N or 1, 1, H, W)."""
    where = where.expand(len(first), 1, *first.shape[2:])
    error = ((first - second).square() * where).sum((1, 2, 3)) / (first.shape[1] * where.sum((1, 2, 3)))
    return (10 * torch.log10(PEAK**2 / error.clamp(min=1e-12))).clamp(max=EXACT)


def grey(video: Tensor) -> list[np.ndarray]:
    """The frames of one video (F, 3, H, W) as uint8 (H, W), black on white turned to white on black."""
    levels = ((1 - video.mean(1)).clamp(0, PEAK) * (255 / PEAK)).round().byte()
    return list(levels.numpy())


def growth_between(before: np.ndarray, after: np.ndarray) -> float:
    """How many times larger things are in the second grey frame: the root of the determinant of the affine map that
    fits best (Evangelidis & Psarakis 2008, ECC); NaN when the fit fails."""
    mapping = np.eye(2, 3, dtype=np.float32)
    try:
        cv2.findTransformECC(before, after, mapping, cv2.MOTION_AFFINE, ECC_STOP, None, ECC_BLUR)
    except cv2.error:  # no convergence, or an empty frame
        return math.nan
    determinant = float(np.linalg.det(mapping[:, :2]))
    return math.sqrt(determinant) if determinant > 0 else math.nan


def zoom(video: Tensor) -> float:
    """How many times larger things are in the last frame of a video (F, 3, H, W) than in the first.

    The product over neighbouring frames, so that what leaves the picture on the way does no harm. Where a fit fails,
    the others' mean stands in; NaN when all do.
    """
    frames = grey(video)
    steps = np.array([growth_between(a, b) for a, b in zip(frames, frames[1:], strict=False)])
    known = np.log(steps[np.isfinite(steps)])
    return float(np.exp(known.mean() * len(steps))) if len(known) else math.nan


def pan(video: Tensor) -> float:
    """How far things move to the right from the first frame of a video (F, 3, H, W) to the last, in widths.

    The sum of the shifts between neighbouring frames by phase correlation.
    """
    frames = [frame.astype(np.float32) for frame in grey(video)]
    window = cv2.createHanningWindow(frames[0].shape[::-1], cv2.CV_32F)
    shifts = [cv2.phaseCorrelate(a, b, window)[0][0] for a, b in zip(frames, frames[1:], strict=False)]
    return float(np.sum(shifts)) / frames[0].shape[1]


def flows(video: Tensor) -> np.ndarray:
    """Optical flow (Farneback 2003) between neighbouring frames of a video (F, 3, H, W): (F - 1, H, W, 2) in pixels."""
    frames = grey(video)
    found = [
        cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 15, 3, 5, 1.2, 0)  # type: ignore[call-overload]
        for a, b in zip(frames, frames[1:], strict=False)
    ]
    return np.stack(found)


def smoothness(video: Tensor) -> float:
    """How steadily a video (F, 3, H, W) moves, 0..1: 1 - |u' - u| / (|u'| + |u|) for flows u and u' one frame apart.

    Lengths are summed over all pixels and frames where something moves. A steady motion gives 1, one that turns back
    with every frame 0, flows of unrelated frames about 0.3; NaN when nothing moves.
    """
    found = flows(video)
    lengths = np.linalg.norm(found, axis=-1)
    sums, changes = lengths[1:] + lengths[:-1], np.linalg.norm(np.diff(found, axis=0), axis=-1)
    moving = sums > 2 * STILL
    return float(1 - changes[moving].sum() / sums[moving].sum()) if moving.any() else math.nan


def movement(video: Tensor) -> float:
    """Mean length of the flow in pixels a frame, over what is drawn on."""
    drawn = (video.amin(1) < INK).numpy()[:-1]
    return float(np.linalg.norm(flows(video), axis=-1)[drawn].mean()) if drawn.any() else 0.0
