"""How many of those asked were right, and how sure that is."""

import math
from collections.abc import Iterable
from typing import NamedTuple

Z = 1.959964  # deviations of a normal that hold 95%


class Share(NamedTuple):
    """How many of those asked were right, with the bounds of a 95% Wilson interval."""

    right: int
    asked: int
    low: float
    high: float


def share(marks: Iterable[bool]) -> Share:
    """The share of true marks; an empty one is 0 of 0 and could be anything."""
    values = list(marks)
    n, k = len(values), sum(values)
    if not n:
        return Share(0, 0, 0.0, 1.0)
    centre = (k + Z * Z / 2) / (n + Z * Z)
    reach = Z / (n + Z * Z) * math.sqrt(k * (n - k) / n + Z * Z / 4)
    return Share(k, n, max(centre - reach, 0.0), min(centre + reach, 1.0))
