"""Whether two small pictures show the same: one is laid over the other, and what then agrees is measured.

A copy that was cropped, squeezed or encoded again is a region of the original, stretched to the same square. The region
is found by inverse compositional alignment (S. Baker and I. Matthews, "Lucas-Kanade 20 Years On", IJCV 2004) with four
parameters, two an axis, from coarse to fine.
"""

from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Side of the coarser pictures and steps on each; the last level is the pictures' own.
_LEVELS = ((32, 5), (64, 3))
_LARGEST_STEP = 0.06  # of the side: beyond it the linear picture of an image no longer holds
_DAMPING = 1e-3

# Edges of the three bands, from fine to coarse, as standard deviations of Gaussians in pixels of a 64 x 64 picture.
_BAND_EDGES = (0.7, 1.7, 2.8, 5.7)
#: Variance, in squared grey levels, that strong JPEG compression leaves in a band; detail below it counts little.
CODING_NOISE = 2.0
#: The same of colours, which are compressed more.
COLOUR_NOISE = 8.0


def whole(count: int, margin: float = 0.0) -> Floats:
    """Regions that leave out the same margin on each side.

    Args:
        count: how many.
        margin: share of the side, in [0, 0.5).

    Returns:
        ``(count, 4)``: horizontal offset of the region's centre from the picture's, its width, vertical offset, height;
        all as shares of the side.
    """
    return np.tile(np.array([0, 1 - 2 * margin, 0, 1 - 2 * margin], np.float32), (count, 1))


def cut(pictures: Floats, regions: Floats) -> tuple[Floats, Floats]:
    """Regions of pictures, stretched to the pictures' size.

    Args:
        pictures: ``(P, n, n)``.
        regions: ``(P, 4)`` as :func:`whole` returns them; they may reach beyond the edge.

    Returns:
        The regions ``(P, n, n)``, and a mask ``(P, n, n)``, 1 where they lie inside the picture and 0 elsewhere.
    """
    x, width, y, height = regions.T
    rows, inside_y = _resample_rows(pictures, y, height)
    columns, inside_x = _resample_rows(rows.transpose(0, 2, 1), x, width)
    return columns.transpose(0, 2, 1), inside_y[:, :, None] * inside_x[:, None, :]


def _resample_rows(pictures: Floats, offset: Floats, size: Floats) -> tuple[Floats, Floats]:
    side = pictures.shape[1]
    place = (offset[:, None] + size[:, None] * _grid(side) + 0.5) * side - 0.5
    lower = np.clip(np.floor(place), 0, side - 2).astype(np.intp)
    weight = np.clip(place - lower, 0, 1).astype(np.float32)[:, :, None]
    which = np.arange(len(pictures))[:, None]
    first, second = pictures[which, lower], pictures[which, lower + 1]
    return first + weight * (second - first), ((place >= -0.5) & (place <= side - 0.5)).astype(np.float32)


def _grid(side: int) -> Floats:
    return ((np.arange(side) + 0.5) / side - 0.5).astype(np.float32)


def displaced(first: Floats, second: Floats) -> Floats:
    """The regions of the first pictures that the second ones show, if at the same scale, by phase correlation.

    C. D. Kuglin and D. C. Hines, "The Phase Correlation Image Alignment Method", 1975.

    Args:
        first: grey, ``(P, n, n)``.
        second: likewise.

    Returns:
        ``(P, 4)`` as :func:`whole` returns them.
    """
    side = first.shape[1]
    window = np.outer(np.hanning(side), np.hanning(side)).astype(np.float32)
    one, two = (np.fft.rfft2((pictures - _blur(pictures, _BAND_EDGES[-1])) * window) for pictures in (first, second))
    cross = one * two.conj()
    peaks = np.fft.irfft2(cross / (np.abs(cross) + 1e-6), (side, side)).reshape(len(first), side * side).argmax(1)
    down, right = ((peaks // side + side // 2) % side - side // 2, (peaks % side + side // 2) % side - side // 2)
    ones = np.ones(len(first))
    return np.clip(np.stack([right / side, ones, down / side, ones], 1), -0.3, 1).astype(np.float32)


def register(first: Floats, second: Floats, start: Floats) -> Floats:
    """The region of each first picture that its second one shows.

    Args:
        first: grey, ``(P, 64, 64)``.
        second: likewise.
        start: regions to begin with, ``(P, 4)``.

    Returns:
        The regions, ``(P, 4)``.
    """
    regions = start.copy()
    for side, steps in _LEVELS:
        regions = _align(_shrink(first, side), _shrink(second, side), regions, steps)
    return regions


def _shrink(pictures: Floats, side: int) -> Floats:
    factor = pictures.shape[1] // side
    if factor == 1:
        return pictures
    return pictures.reshape(len(pictures), side, factor, side, factor).mean((2, 4))


def _align(first: Floats, second: Floats, regions: Floats, steps: int) -> Floats:
    count, side, _ = second.shape
    target = _standardised(second.reshape(count, side * side))
    along_y, along_x = np.gradient(target.reshape(second.shape), axis=(1, 2))
    grid = _grid(side)
    slopes = (
        np.stack([along_x, along_x * grid, along_y, along_y * grid[:, None]], 1).reshape(count, 4, side * side) * side
    )
    # Brightness and contrast are no part of the question: what they explain is taken out of the slopes.
    slopes -= slopes.mean(2, keepdims=True)
    slopes -= (slopes @ target[:, :, None]) * target[:, None, :] / target.shape[1]
    normal = slopes @ slopes.transpose(0, 2, 1)
    size = np.trace(normal, axis1=1, axis2=2)[:, None, None]
    normal += (_DAMPING * size / 4 + 1e-6) * np.eye(4, dtype=np.float32)
    for _ in range(steps):
        seen, _inside = cut(first, regions)
        values = _standardised(seen.reshape(count, side * side))
        agreement = np.maximum((values * target).mean(1), 0.3)[:, None]
        step = np.linalg.solve(normal, slopes @ values[:, :, None])[:, :, 0] / agreement
        step = np.clip(step, -_LARGEST_STEP, _LARGEST_STEP)
        x, width, y, height = regions.T
        width, height = width / (1 + step[:, 1]), height / (1 + step[:, 3])
        moved = np.stack([x - width * step[:, 0], width, y - height * step[:, 2], height], 1)
        regions = np.clip(moved, [-0.3, 0.4, -0.3, 0.4], [0.3, 1.6, 0.3, 1.6]).astype(np.float32)
    return regions


def _standardised(rows: Floats) -> Floats:
    centred = rows - rows.mean(1, keepdims=True)
    return centred / (centred.std(1, keepdims=True) + 1e-3)


def shared(regions: Floats) -> Floats:
    """What pictures have in common of what either shows: the area of each region ``(P, 4)`` inside its picture, divided
    by the area of both together; ``(P,)`` in [0, 1]."""
    inside = np.ones(len(regions), np.float32)
    for offset, size in (regions[:, 0:2].T, regions[:, 2:4].T):
        low, high = np.maximum(offset - size / 2, -0.5), np.minimum(offset + size / 2, 0.5)
        inside *= np.maximum(high - low, 0)
    return inside / (1 + regions[:, 1] * regions[:, 3] - inside)


def structure(first: Floats, second: Floats, regions: Floats) -> Floats:
    """How much of two pictures agrees, brightness and contrast apart.

    Normalised cross-correlation in three bands of detail. The finest says most, because different things in the same
    scene are lit alike; where it holds no more than coding noise, the coarser ones stand in.

    Args:
        first: grey levels 0 to 255, ``(P, 64, 64)``.
        second: likewise.
        regions: of the first that the second shows, ``(P, 4)``.

    Returns:
        In [-1, 1], ``(P,)``.
    """
    seen, inside = cut(first, regions)
    left = np.ones(len(first), np.float32)
    total = np.zeros(len(first), np.float32)
    one, two = _bands(seen), _bands(second)
    for number, (ours, theirs) in enumerate(zip(one, two, strict=True)):
        correlation, power = _correlate(ours[:, None], theirs[:, None], inside)
        last = number == len(one) - 1
        weight = left if last else left * power / (power + CODING_NOISE)
        total += weight * correlation
        left = left - weight
    return total


def colour(first: Floats, second: Floats, regions: Floats) -> Floats:
    """How much of two pictures' colours agrees; 1 where one of them has none.

    Args:
        first: Cb and Cr, ``(P, 2, 16, 16)``.
        second: likewise.
        regions: of the first that the second shows, ``(P, 4)``.

    Returns:
        In [-1, 1], ``(P,)``.
    """
    parts = [cut(first[:, band], regions) for band in range(first.shape[1])]
    seen, inside = np.stack([part for part, _ in parts], 1), parts[0][1]
    correlation, power = _correlate(seen, second, inside)
    weight = power / (power + COLOUR_NOISE)
    return weight * correlation + 1 - weight


def _correlate(first: Floats, second: Floats, inside: Floats) -> tuple[Floats, Floats]:
    """Normalised cross-correlation of bands ``(P, B, n, n)`` where ``inside`` is 1; the smaller of their variances."""
    inside = inside[:, None]
    count = inside.sum((2, 3), keepdims=True) + 1e-6
    one, two = ((bands - (bands * inside).sum((2, 3), keepdims=True) / count) * inside for bands in (first, second))
    total = count[:, 0, 0, 0]
    powers = [(bands**2).sum((1, 2, 3)) / total for bands in (one, two)]
    correlation = (one * two).sum((1, 2, 3)) / total / np.sqrt(powers[0] * powers[1] + 1e-6)
    return correlation, np.minimum(*powers)


def _bands(pictures: Floats) -> list[Floats]:
    blurred = [_blur(pictures, deviation) for deviation in _BAND_EDGES]
    return [fine - coarse for fine, coarse in pairwise(blurred)]


def _blur(pictures: Floats, deviation: float) -> Floats:
    matrix = _gaussian(pictures.shape[1], deviation)
    return (matrix @ pictures @ matrix.T).astype(np.float32, copy=False)


@cache
def _gaussian(side: int, deviation: float) -> Floats:
    place = np.arange(side)
    matrix = np.exp(-((place[:, None] - place) ** 2) / (2 * deviation**2))
    return (matrix / matrix.sum(1, keepdims=True)).astype(np.float32)
