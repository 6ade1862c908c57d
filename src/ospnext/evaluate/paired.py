"""Two settings on the same prompts and seeds: the difference of their shares, with its interval, and of their videos.

Paired marks say far more than two separate shares: where both settings see the same noise, most videos are right in
both or wrong in both, and only the others count.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ospnext.shapes.share import Z, share


class Difference(NamedTuple):
    """Shares of true marks of two settings, and second minus first with the bounds of its 95% interval."""

    asked: int
    first: int
    second: int
    only_first: int
    only_second: int
    difference: float
    low: float
    high: float


def paired_difference(first: Iterable[bool], second: Iterable[bool]) -> Difference:
    """Second share minus first, of marks that belong together one by one.

    The interval is Newcombe's for paired proportions (1998, method 10): both shares' Wilson intervals, squared and
    added with the correlation of the pairs. It holds at shares near 0 and 1, where the normal approximation does not,
    and draws no random numbers.

    Raises:
        ValueError: there are no marks.
    """
    a, b = np.asarray(list(first), bool), np.asarray(list(second), bool)
    if a.shape != b.shape or not len(a):
        raise ValueError(f"{len(a)} and {len(b)} marks: a paired difference needs as many of both, at least one")
    n, both, neither = len(a), int((a & b).sum()), int((~a & ~b).sum())
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    one, other = share(a.tolist()), share(b.tolist())
    p, q = one.right / n, other.right / n
    phi = _correlation(both, only_a, only_b, neither)

    def reach(up: float, down: float) -> float:
        return math.sqrt(max(up * up - 2 * phi * up * down + down * down, 0.0))

    low = (q - p) - reach(q - other.low, one.high - p)
    high = (q - p) + reach(other.high - q, p - one.low)
    return Difference(n, one.right, other.right, only_a, only_b, q - p, low, high)


def _correlation(both: int, only_a: int, only_b: int, neither: int) -> float:
    """Of the marks of a pair, drawn towards 0 by half a pair where it is positive; 0 where one side never varies."""
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    if not margins:
        return 0.0
    product: float = both * neither - only_a * only_b
    if product > 0:
        product = max(product - (both + only_a + only_b + neither) / 2, 0)
    return product / math.sqrt(margins)


class Mean(NamedTuple):
    """A mean over videos with the bounds of its 95% interval (normal approximation)."""

    value: float
    low: float
    high: float


def mean_of(values: Sequence[float]) -> Mean:
    """The mean of some figures; infinite ones, of videos that are equal, count as the largest that is not."""
    x = np.asarray(values, float)
    finite = x[np.isfinite(x)]
    if not len(finite):
        return Mean(math.inf, math.inf, math.inf)
    x = np.minimum(x, finite.max())
    reach = Z * x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.inf
    return Mean(float(x.mean()), float(x.mean() - reach), float(x.mean() + reach))


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal to noise of two videos uint8, in dB over all their pixels; infinite where they are equal."""
    error = np.square(first.astype(np.float32) - second.astype(np.float32)).mean()
    return math.inf if error == 0 else float(10 * np.log10(255**2 / error))


@torch.no_grad()
def ssim(first: np.ndarray, second: np.ndarray, device: torch.device | str = "cpu") -> float:
    """Structural similarity of two videos uint8 ``[T, H, W, 3]``, mean over pixels, channels and frames.

    Wang et al. (2004): Gaussian window of 11 with deviation 1.5, K1 0.01 and K2 0.03, windows inside the picture only.
    """
    x, y = (torch.from_numpy(v).to(device).float().permute(0, 3, 1, 2).flatten(0, 1)[:, None] for v in (first, second))
    line = torch.arange(11, device=device) - 5.0
    window = torch.exp(-(line**2) / (2 * 1.5**2))
    window = (window / window.sum())[None, None]

    def blur(z: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(z, window[..., None, :]), window[..., None])

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    like = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(like.mean())
