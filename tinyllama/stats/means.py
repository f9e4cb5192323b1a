"""Tests of differences that more than one package needs. Pure: numbers in, numbers out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

ALPHA = 0.05


@dataclasses.dataclass(frozen=True)
class Welch:
    """A difference of two means (second less first), its 95% interval, and the chance p of one as large without any."""

    difference: float
    low: float
    high: float
    p: float
    freedom: float


def welch(first: Sequence[float], second: Sequence[float]) -> Welch:
    """Welch's (1947) t-test of two means whose spreads may differ; scipy's, which gives the interval too.

    ValueError unless there are two samples of each. Samples that all agree have no spread: any difference then counts.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError(f"{len(first)} and {len(second)} samples: Welch's test needs two of each")
    difference = math.fsum(second) / len(second) - math.fsum(first) / len(first)
    if len(set(first)) == len(set(second)) == 1:
        return Welch(difference, difference, difference, float(difference == 0), math.inf)
    from scipy import stats

    found = stats.ttest_ind(list(second), list(first), equal_var=False)
    interval = found.confidence_interval(1 - ALPHA)
    return Welch(difference, float(interval.low), float(interval.high), float(found.pvalue), float(found.df))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) correction: each p-value as it stands when all of these tests were made, in the order given.

    Of many differences that are none, one in twenty looks like one; after the correction, one table in twenty has any.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
