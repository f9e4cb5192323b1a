"""Tests of two models on the same items, and of two separate scores: a difference, its interval, and its p-value.

If two models are equal, which of them has which of an item's two scores is a coin's toss: the differences of the items are
symmetric around 0, whatever their distribution, their ties and their bounds. The sign-flip test (Fisher 1935) compares the
observed mean with its value under every assignment of signs; of right and wrong answers it is McNemar's exact test. Both
err in at most 5% of the comparisons of equal models, for any number of items: fewer than six that differ are never
significant. Items that share a text are flipped together. What the tests ask is whether the models are exchangeable: of two
that differ in their spread alone, with equal means, the sign-flip test may find that they differ.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

import numpy as np

from tinyllama.stats.intervals import Estimate, Interval, cluster_numbers, is_binary
from tinyllama.stats.student import Z95, t95

ALL_SIGNS = 17  # units that differ, up to which every assignment of signs is looked at
DRAWS = 19_999
SEED = 0
DRAWN_AT_A_TIME = 1 << 21  # signs: 16 MB
NORMAL_BELOW = 1e-3  # of sum(d^4) / sum(d^2)^2, below which the sum of random signs is normal to three digits
EXACT_BELOW = 1000  # discordant answers below which binomial numbers are whole ones


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Two models' scores of the same items, and the weight of their mean in the score that is compared.

    clusters: what items share. sizes: weights of the items in their mean. share: whether scores are between 0 and 1.
    """

    first: Sequence[float] | np.ndarray
    second: Sequence[float] | np.ndarray
    weight: float = 1.0
    clusters: Sequence[Hashable] | None = None
    sizes: Sequence[float] | None = None


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference, its standard error and interval, and the p-value: how often equal models differ as much.

    interval: None where nothing is known of the error. pairs: items that both models answered; None where the test is not
    paired. clusters: that these items are in; None where each is by itself. center, dof: of the interval before it is cut;
    None where it is around the difference itself.
    """

    difference: float
    stderr: float
    interval: Interval | None
    p: float
    method: str
    pairs: int | None = None
    clusters: int | None = None
    center: float | None = None
    dof: float = math.inf


def normal_tail(z: float) -> float:
    """The probability that a normal variable is further from 0 than z, either way."""
    return math.erfc(abs(z) / math.sqrt(2))


def binomial_p(gained: int, lost: int) -> float:
    """McNemar's exact two-sided p-value: of so uneven a split of the answers that changed, if either way is as likely."""
    count, least = gained + lost, min(gained, lost)
    if count < EXACT_BELOW:
        return min(1.0, 2 * sum(math.comb(count, k) for k in range(least + 1)) / 2**count)
    logs = (math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in range(least + 1))
    return min(1.0, 2 * math.fsum(math.exp(log - count * math.log(2)) for log in logs))


def mcnemar(first: np.ndarray, second: np.ndarray) -> Difference:
    """McNemar's (1947) exact test of two models' right and wrong answers to the same items.

    Only the items count that exactly one of them got right: if the models are equal, each of these is a fair coin. The
    interval is Agresti and Min's (2005), of half an item more in each of the four cells: few items have an error too.
    """
    gained, lost = int(((second == 1) & (first == 0)).sum()), int(((second == 0) & (first == 1)).sum())
    count, discordant = len(first), gained + lost
    middle = (gained - lost) / (count + 2)
    stderr = math.sqrt(discordant + 1 - (gained - lost) ** 2 / (count + 2)) / (count + 2)
    interval = Interval(max(-1.0, middle - Z95 * stderr), min(1.0, middle + Z95 * stderr), "Agresti-Min")
    p = binomial_p(gained, lost)
    return Difference((gained - lost) / count, stderr, interval, p, "McNemar, exact", count, center=middle)


def sign_flip_p(parts: np.ndarray, draws: int = DRAWS, seed: int = SEED) -> tuple[float, str]:
    """The two-sided p-value of the sum of `parts` under random signs of them, and how it was found.

    All signs of up to ALL_SIGNS parts, else `draws` of them (with the observed ones as one more, which keeps the level:
    Phipson and Smyth 2010), or the normal distribution where there are many parts and none weighs much.
    """
    parts = parts[parts != 0]
    if not len(parts):
        return 1.0, "exact"
    parts = parts / np.abs(parts).max()
    # The same numbers added in another order have other last digits: a tie must stay one.
    far = abs(math.fsum(parts)) - 1e-9 * float(np.abs(parts).sum())
    if len(parts) <= ALL_SIGNS:
        sums = np.zeros(1)
        for part in parts[1:]:  # of the first part one sign: the other half mirrors these
            sums = np.concatenate([sums + part, sums - part])
        return float((np.abs(sums + parts[0]) >= far).mean()), "exact"
    squares = float((parts**2).sum())
    if float((parts**4).sum()) < NORMAL_BELOW * squares**2:
        return normal_tail(far / math.sqrt(squares)), "normal"
    generator, rows = np.random.default_rng(seed), max(1, DRAWN_AT_A_TIME // len(parts))
    beyond = 0
    for done in range(0, draws, rows):
        bits = generator.integers(0, 2, (min(rows, draws - done), len(parts)), dtype=np.int8)
        beyond += int((np.abs((2.0 * bits - 1) @ parts) >= far).sum())
    return (1 + beyond) / (1 + draws), f"{draws + 1:,} draws"


def paired(parts: Sequence[Pairs], share: bool = True) -> Difference:
    """The paired test of a weighted sum of means (one mean: a single part): McNemar's where every item is right or wrong and
    by itself, else the sign-flip test. ValueError for no items, and scores that are not finite.
    """
    cleaned = [(np.asarray(p.first, dtype=float), np.asarray(p.second, dtype=float), p) for p in parts]
    for first, second, _ in cleaned:
        if len(first) != len(second) or not len(first):
            raise ValueError(f"{len(first)} and {len(second)} items are no pairs")
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            raise ValueError("scores that are not finite")
    first, second, only = cleaned[0]
    numbers = [cluster_numbers(p.clusters, len(a)) for a, _, p in cleaned]
    plain = len(parts) == 1 and numbers[0] is None and only.sizes is None
    if plain and share and is_binary(first) and is_binary(second):
        return mcnemar(first, second)
    units, variances, dofs, largest = [], [], [], 0.0
    for (before, after, part), number in zip(cleaned, numbers, strict=True):
        sizes = np.ones(len(before)) if part.sizes is None else np.asarray(part.sizes, dtype=float)
        own = part.weight * sizes / sizes.sum()
        number = np.arange(len(before)) if number is None else number
        weights = np.bincount(number, own)
        sums = np.bincount(number, own * (after - before))
        units.append(sums)
        count, mean = len(sums), float(sums.sum()) / part.weight
        spread = float(((sums - weights * mean) ** 2).sum())
        # A single unit shows no spread: its own size stands for it.
        variances.append(count / (count - 1) * spread if count > 1 else float((sums**2).sum()))
        dofs.append(max(1.0, 1 / float(((weights / part.weight) ** 2).sum()) - 1))
        scale = 1.0 if share else float(np.abs(after - before).max())
        largest = max(largest, scale * float(weights.max()))
    p, how = sign_flip_p(np.concatenate(units))
    # One unit more, as far from the mean as one can be: units that are all alike have an error too.
    variance = math.fsum(variances) + largest**2
    difference = math.fsum(math.fsum(unit) for unit in units)
    spread = math.fsum(v**2 / dof for v, dof in zip(variances, dofs, strict=True))
    stderr, dof = math.sqrt(variance), variance**2 / spread if spread else math.inf
    quantile = t95(dof)
    low, high = difference - quantile * stderr, difference + quantile * stderr
    found = Interval(max(-1.0, low), min(1.0, high), "t") if share else Interval(low, high, "t")
    clusters = None if all(n is None for n in numbers) else sum(map(len, units))
    pairs = sum(len(before) for before, _, _ in cleaned)
    return Difference(difference, stderr, found, p, f"sign flip, {how}", pairs, clusters, dof=dof)


def separate(first: Estimate, second: Estimate) -> Difference:
    """Two scores from items that cannot be paired. Shares: Agresti and Caffo's (2000) test, with one right and one wrong
    answer more for each, so that few items that are all right have an error too, and Student's t for the normal
    distribution, which finds too many differences between few items or few and many. Other units: Welch's t-test.
    """
    if not first.share:
        errors = [part.stderr or 0.0 for part in (first, second)]
        dofs = [max(1.0, part.dof) for part in (first, second)]
        difference = second.value - first.value
        return _student(difference, difference, errors, dofs, "unpaired t")
    values, errors, dofs = [], [], []
    for part in (first, second):
        count = part.effective_n
        shrunk = (part.value * count + 1) / (count + 2)
        values.append(shrunk)
        errors.append(math.sqrt(shrunk * (1 - shrunk) / (count + 2)))
        dofs.append(max(1.0, min(part.dof, count + 1)))
    found = _student(second.value - first.value, values[1] - values[0], errors, dofs, "unpaired t")
    return _within_shares(found)


def _within_shares(found: Difference) -> Difference:
    """With an interval of shares, which differ by at most 1."""
    assert found.interval is not None
    low, high = max(-1.0, found.interval.low), min(1.0, found.interval.high)
    return dataclasses.replace(found, interval=dataclasses.replace(found.interval, low=low, high=high))


def _student(
    difference: float, center: float, errors: Sequence[float], dofs: Sequence[float], method: str
) -> Difference:
    """Of independent errors, with Satterthwaite's degrees of freedom. center: what is tested, and the interval's middle."""
    variance = math.fsum(error**2 for error in errors)
    if not variance:
        return Difference(difference, 0.0, None, 1.0, method)
    dof = variance**2 / math.fsum(error**4 / dof for error, dof in zip(errors, dofs, strict=True))
    stderr, quantile = math.sqrt(variance), t95(dof)
    found = Interval(center - quantile * stderr, center + quantile * stderr, "t")
    # The normal tail of a z that is 1.96 where t is at its 97.5% quantile: exact at 5%, near it elsewhere.
    p = normal_tail(center / stderr * Z95 / quantile)
    return Difference(difference, stderr, found, p, method, center=center, dof=dof)


def mean_of(tests: Sequence[Difference], share: bool = True) -> Difference:
    """The difference of unweighted means of independent parts (a suite's tasks), not all paired, from their tests.

    Where a part's error is that of a shrunken difference (few right or wrong answers), so is what is tested here.
    """
    difference = math.fsum(test.difference for test in tests) / len(tests)
    center = math.fsum(test.difference if test.center is None else test.center for test in tests) / len(tests)
    errors = [test.stderr / len(tests) for test in tests]
    found = _student(difference, center, errors, [test.dof for test in tests], "unpaired t over tasks")
    return _within_shares(found) if share and found.interval else found
