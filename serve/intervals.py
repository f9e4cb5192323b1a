"""Means with confidence intervals and percentiles. Pure, torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Two-sided 95 % points of Student's t for 1 to 30 degrees of freedom (any statistics table); 1.96 beyond.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
        2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, half-width of its 95% t-interval); None for the half-width of a single value."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, None
    variance = sum((v - mean) ** 2 for v in values) / (n - 1)
    t = T_95[n - 2] if n - 1 <= len(T_95) else 1.96
    return mean, t * math.sqrt(variance / n)


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100), linear between neighbours, as numpy's default."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * q / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
