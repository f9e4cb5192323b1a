"""95% intervals of scores: of one task, of a mean over leaf tasks, of a suite; items independent or in clusters.

A share (0 to 1) of right answers has the variance p(1-p)/n. Every share is described by the number of independent right or
wrong answers with the same error, its effective count: of F1 scores it is larger than their number, of questions about
shared texts smaller. One interval then serves for all of them: the score interval of a weighted sum of proportions, which
for one proportion is Wilson's (1927). Scores in other units have Student's t interval.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

import numpy as np

from tinyllama.stats.student import Z95, t95

STEPS = 60  # of the bisection: more digits than a double has
ROUNDING = 1e-9  # by which a share may be outside of 0 to 1: a mean of parts of it, say


@dataclasses.dataclass(frozen=True)
class Interval:
    """A 95% confidence interval and how it was found: "wilson", "score" (a weighted sum of shares, or an effective count),
    "t" (Student's), "MOVER" (a difference of two scores), "Agresti-Min" or "normal".
    """

    low: float
    high: float
    method: str


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A score with what its error follows from.

    stderr: None for a single item or cluster; of clusters the cluster-robust one (CR1). effective_n: of a share, the number
    of independent right or wrong answers with its error. dof: degrees of freedom of that error; infinite where it follows
    from the share itself. units: independent items or clusters, by Kish's (1965) count where clusters differ in size.
    """

    value: float
    stderr: float | None
    effective_n: float
    dof: float
    units: float
    share: bool = True


def is_binary(values: np.ndarray) -> bool:
    """Whether every item is right or wrong, with nothing between."""
    return bool(((values == 0) | (values == 1)).all())


def standard_error(values: np.ndarray) -> float:
    """Of the mean of at least two independent values."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def cluster_numbers(clusters: Sequence[Hashable] | None, count: int) -> np.ndarray | None:
    """The clusters' numbers, (count,); None where every item is its own cluster. None among them: an item by itself."""
    if clusters is None:
        return None
    seen: dict[Hashable, int] = {}
    found = np.array([seen.setdefault((i,) if c is None else c, len(seen)) for i, c in enumerate(clusters)])
    return None if len(seen) == count else found


def describe(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    sizes: Sequence[float] | np.ndarray | None = None,
    share: bool = True,
) -> Estimate:
    """The mean of items and its error. clusters: what items share, e.g. their passage. sizes: weights of items in the mean
    (bytes, of a mean per byte). ValueError for no items, values that are not finite, and a share outside of 0 to 1.
    """
    array = np.asarray(values, dtype=float)
    if not len(array) or not np.isfinite(array).all():
        raise ValueError(f"{len(array)} items, {int((~np.isfinite(array)).sum())} of them not finite")
    if share and (array.min() < -ROUNDING or array.max() > 1 + ROUNDING):
        raise ValueError(f"a share outside of 0 to 1: {array.min():g} to {array.max():g}")
    array = array.clip(0, 1) if share else array
    numbers = cluster_numbers(clusters, len(array))
    weights = np.full(len(array), 1 / len(array)) if sizes is None else np.asarray(sizes, float) / math.fsum(sizes)
    mean = math.fsum(weights * array)
    if sizes is None:
        mean = math.fsum(array) / len(array)
    if numbers is None and sizes is None and share and is_binary(array):
        stderr = standard_error(array) if len(array) > 1 else None
        return Estimate(mean, stderr, float(len(array)), math.inf, float(len(array)))
    numbers = np.arange(len(array)) if numbers is None else numbers
    parts = np.bincount(numbers, weights)  # of each cluster in the mean, (G,)
    sums = np.bincount(numbers, weights * (array - mean))
    count = len(parts)
    units = 1 / float((parts**2).sum())
    if count < 2:
        return Estimate(mean, None, 1.0, math.inf if share else 0.0, 1.0, share)
    stderr = math.sqrt(count / (count - 1) * float((sums**2).sum()))
    if not share:
        return Estimate(mean, stderr, units, _freedom(parts, parts**2), units, share)
    effective, alike = _effective(mean, sums, array, weights, numbers)
    alone = np.bincount(numbers, weights**2)
    return Estimate(mean, stderr, effective, _freedom(parts, alike * parts**2 + (1 - alike) * alone), units)


def _effective(
    mean: float, sums: np.ndarray, values: np.ndarray, weights: np.ndarray, numbers: np.ndarray
) -> tuple[float, float]:
    """The number of independent right or wrong answers with the variance of the clusters (sums: their weighted deviations,
    (G,)), at least one for each cluster, and how alike (0 to 1) the items of a cluster are.

    Where the mean is near 0 or 1, so that most clusters look alike, and where all are, the few seen say little about their
    spread: a cluster whose items are all right or all wrong is added to what was seen, with the weight k. Its growth with
    the number of clusters is that of the skewness that is left in the variance; simulated, not derived. Items of a cluster
    are never taken to be less alike than independent ones.
    """
    parts, alone = np.bincount(numbers, weights), float((weights**2).sum())
    together, most, count = float((parts**2).sum()), mean * (1 - mean), len(sums)
    if most <= 0:
        return 1 / together, 1.0
    variance = float((sums**2 / (1 - parts)).sum())  # CR2 (Bell and McCaffrey 2002), for a mean
    k = 0.1 + 0.3 * math.sqrt(count) * (1 - 2 * mean) ** 2
    variance = ((count - 1) * variance + k * most * together) / (count - 1 + k)
    if count == len(values):
        return most / variance, 0.0
    spread = float((weights**2 * (values - mean) ** 2).sum()) * len(values) / (len(values) - 1)
    variance = max(variance, spread)
    if spread == 0:  # every item is the mean
        return most / variance, 1.0
    return most / variance, min(1.0, (variance / spread - 1) * alone / (together - alone))


def _freedom(parts: np.ndarray, variances: np.ndarray) -> float:
    """Bell and McCaffrey's (2002) degrees of freedom of the variance, for clusters' sums that vary in these proportions.

    parts: of each cluster in the mean, (G,). Of equal clusters G - 1. Trace and squares of (I - 1 p') V (I - p 1') between
    the CR2 factors, written out, as the matrix of many clusters is large.
    """
    scale, total = 1 / np.sqrt(1 - parts), float(variances.sum())
    a, b, diagonal = parts * scale, variances * scale, variances * scale**2
    trace = float((diagonal - 2 * a * b + total * a**2).sum())
    aa, ab, bb = float(a @ a), float(a @ b), float(b @ b)
    squares = float((diagonal * (diagonal + 2 * total * a**2 - 4 * a * b)).sum())
    squares += 2 * aa * bb + 2 * ab**2 + total**2 * aa**2 - 4 * total * aa * ab
    return max(1.0, trace**2 / squares)


def wilson(successes: float, count: float, quantile: float = Z95) -> Interval:
    """Wilson's (1927) score interval of a share: right for few items and near 0 and 1, where the normal one is not."""
    if count <= 0 or not 0 <= successes <= count:
        raise ValueError(f"{successes} of {count}")
    share, square = successes / count, quantile**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = quantile / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    # At 0 and at all of them the formula touches the share itself, but for rounding.
    return Interval(min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half)), "wilson")


def lower_limits(means: np.ndarray, counts: np.ndarray, weights: np.ndarray, quantile: np.ndarray) -> np.ndarray:
    """Lower limits (...) of weighted sums of proportions: means (..., K) of `counts` (..., K), `weights` (K).

    The score interval: the least sum that the data do not contradict, (estimate - sum)^2 <= quantile^2 variance, with the
    variance at the most likely proportions that have this sum (Martin Andres and Alvarez Hernandez 2011, Stat Methods Med
    Res). These solve mean - p = c p (1 - p) with c = lambda weight / count. As all proportions but one combination are
    fitted, the variance is multiplied by n / (n - 1 + s), s the part's share of it: for one proportion by 1 (Wilson's).
    """
    low, high = np.full(means.shape[:-1], -14.0), np.full(means.shape[:-1], 14.0)

    def at(exponent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        c = 10.0 ** exponent[..., None] * weights / counts
        p = 2 * means / (1 + c + np.sqrt(np.maximum((1 + c) ** 2 - 4 * c * means, 0)))
        parts = weights**2 * p * (1 - p) / counts
        total = parts.sum(-1, keepdims=True)
        shares = np.divide(parts, total, out=np.ones_like(parts), where=total > 0)
        corrected = (parts * np.clip(counts / np.maximum(counts - 1 + shares, 1e-9), 1, 2)).sum(-1)
        total = total[..., 0]
        squared = np.divide((10.0**exponent * total) ** 2, corrected, out=np.zeros_like(total), where=corrected > 0)
        return (weights * p).sum(-1), squared

    for _ in range(STEPS):
        middle = (low + high) / 2
        beyond = at(middle)[1] >= quantile**2
        low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
    return np.where((means == 0).all(-1), 0.0, at((low + high) / 2)[0])


def score_limits(
    means: np.ndarray, counts: np.ndarray, weights: np.ndarray, quantile: np.ndarray | float = Z95
) -> tuple[np.ndarray, np.ndarray]:
    """Both limits (...) of weighted sums of proportions, as `lower_limits` has them; the upper mirrors the lower."""
    wide = np.broadcast_to(np.asarray(quantile, dtype=float), means.shape[:-1])
    low = lower_limits(means, counts, weights, wide)
    return low, weights.sum() - lower_limits(1 - means, counts, weights, wide)


def combined(weights: Sequence[float], parts: Sequence[Estimate]) -> tuple[float, float | None, Interval | None]:
    """Value, standard error and interval of a weighted sum of independent scores of one unit.

    A part that is all right or all wrong has an error all the same: that of Agresti and Coull's (1998) estimate.
    """
    if len({part.share for part in parts}) > 1:
        raise ValueError("shares and other units have no common mean")
    value = math.fsum(w * part.value for w, part in zip(weights, parts, strict=True))
    given = len(parts)
    factors, parts = _collapsed(np.asarray(weights, dtype=float), parts)
    if len(parts) == 1 and math.isclose(factors[0], 1):
        return value, parts[0].stderr if given == 1 else _error(parts[0]), interval(parts[0])
    errors = [_error(part) for part in parts]
    known = [error for error in errors if error is not None]
    if len(known) < len(parts):
        return value, None, None
    variances = (factors * np.array(known)) ** 2
    stderr = math.sqrt(math.fsum(variances))
    dof = _satterthwaite(variances, [part.dof for part in parts])
    if not parts[0].share:
        half = t95(dof) * stderr
        return value, stderr, Interval(value - half, value + half, "t")
    means, counts = np.array([part.value for part in parts]), np.array([part.effective_n for part in parts])
    low, high = score_limits(means, counts, factors, t95(dof))
    if math.isfinite(dof):
        # A share varies at most as right and wrong answers do: where that is narrower than Student's t, it holds.
        units = score_limits(means, np.array([min(part.units, part.effective_n) for part in parts]), factors)
        low, high = np.maximum(low, units[0]), np.minimum(high, units[1])
    top = float(factors.sum())
    return value, stderr, Interval(min(value, max(0.0, float(low))), max(value, min(top, float(high))), "score")


def _collapsed(weights: np.ndarray, parts: Sequence[Estimate]) -> tuple[np.ndarray, Sequence[Estimate]]:
    """Shares of one item each as one part: none of them shows a spread by itself (collapsed strata, Cochran 1977)."""
    single = [i for i, part in enumerate(parts) if part.share and part.effective_n <= 1 and weights[i] > 0]
    if len(single) < 2:
        return weights, parts
    values, own = np.array([parts[i].value for i in single]), weights[single]
    joined = describe(values, sizes=None if np.ptp(own) <= 1e-12 * own.max() else own)
    rest = [i for i in range(len(parts)) if i not in single]
    return np.array([*weights[rest], own.sum()]), [*(parts[i] for i in rest), joined]


def _error(part: Estimate) -> float | None:
    if not part.share:
        return part.stderr
    if 0 < part.value < 1 and part.stderr:
        return part.stderr
    shrunk = (part.value * part.effective_n + 2) / (part.effective_n + 4)
    return math.sqrt(shrunk * (1 - shrunk) / (part.effective_n + 4))


def _satterthwaite(variances: np.ndarray, dofs: Sequence[float]) -> float:
    """Degrees of freedom of a sum of variances (Satterthwaite 1946)."""
    spread = math.fsum(v**2 / max(dof, 1e-9) for v, dof in zip(variances, dofs, strict=True))
    return math.fsum(variances) ** 2 / spread if spread else math.inf


def interval(part: Estimate) -> Interval | None:
    """The interval of one score; None where nothing is known of its error (one item of a unit without bounds)."""
    if not part.share:
        if part.stderr is None:
            return None
        half = t95(part.dof) * part.stderr
        return Interval(part.value - half, part.value + half, "t")
    if math.isinf(part.dof):
        return wilson(part.value * part.effective_n, part.effective_n)
    found = wilson(part.value * part.effective_n, part.effective_n, t95(part.dof))
    # A share varies at most as right and wrong answers do: where that is narrower than Student's t, it holds.
    units = wilson(part.value * min(part.units, part.effective_n), min(part.units, part.effective_n))
    return Interval(max(found.low, units.low), min(found.high, units.high), "score")
