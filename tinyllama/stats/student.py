"""Student's t distribution, without scipy. Pure."""

from __future__ import annotations

import functools
import math

Z95 = 1.959963984540054  # the normal distribution's 97.5% quantile
NORMAL_FROM = 2000  # degrees of freedom from which t is the normal distribution to three digits


def t_central(t: float, freedom: int) -> float:
    """P(|T| <= t) of Student's t with a whole number of degrees of freedom: Abramowitz & Stegun 26.7.3 and 26.7.4."""
    theta = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(theta), math.cos(theta)
    if freedom == 1:
        return 2 * theta / math.pi
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


@functools.lru_cache(4096)
def t_quantile(confidence: float, freedom: int) -> float:
    """The t with P(|T| <= t) = confidence: 12.7062 for 95% and 1 degree of freedom, 2.7764 for 4, 2.0452 for 29."""
    if freedom < 1 or not 0 < confidence < 1:
        raise ValueError(f"t quantile at confidence {confidence} with {freedom} degrees of freedom")
    low, high = 0.0, 1.0
    while t_central(high, freedom) < confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        if t_central(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def t95(dof: float) -> float:
    """The 97.5% quantile for any number of degrees of freedom (infinite too): linear in 1/dof between whole numbers; below
    1 that of 1.
    """
    if dof >= NORMAL_FROM:
        return Z95
    whole = max(1, math.floor(dof))
    low, high = t_quantile(0.95, whole), t_quantile(0.95, whole + 1)
    part = (1 / whole - 1 / max(1.0, dof)) / (1 / whole - 1 / (whole + 1))
    return low + part * (high - low)
