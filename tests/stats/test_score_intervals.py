"""Intervals of scores: printed and independent values, and how often they hold the true score in simulated evaluations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsuite.aggregate import suite_mean
from tinyllama.stats import intervals
from tinyllama.stats.intervals import Estimate, combined, describe, interval, score_limits, wilson
from tinyllama.stats.student import t95

Y = [1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0.5, 0.25, 1]
GROUPS = [0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 4, 4, 4]
SIZES = [3, 1, 2, 5, 1, 1, 4, 2, 2, 6, 1, 3, 2]


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    # Newcombe (1998), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_is_the_printed_one(successes, count, low, high):
    found = wilson(successes, count)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)
    same = score_limits(np.array([[successes / count]]), np.array([[float(count)]]), np.ones(1))
    assert [float(end[0]) for end in same] == pytest.approx([found.low, found.high], abs=1e-9)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_holds_the_share_and_mirrors(counts):
    successes, count = counts
    found, mirrored = wilson(successes, count), wilson(count - successes, count)
    assert 0 <= found.low <= successes / count <= found.high <= 1
    assert found.low == pytest.approx(1 - mirrored.high, abs=1e-12)
    wider = wilson(4 * successes, 4 * count)
    assert found.high - found.low > wider.high - wider.low


@pytest.mark.parametrize(
    ("sizes", "stderr"),
    # statsmodels 0.15.0: OLS (WLS with weights=SIZES) of Y on a constant, fit(cov_type="cluster", groups=GROUPS).bse
    [(None, 0.1637441), (SIZES, 0.18514838)],
)
def test_clusters_have_the_standard_error_of_statsmodels(sizes, stderr):
    assert describe(Y, GROUPS, sizes).stderr == pytest.approx(stderr, rel=1e-6)
    place = np.arange(400)
    values, groups = ((place * 37) % 11 < 5).astype(float), (place * place) % 23
    assert describe(values, groups.tolist()).stderr == pytest.approx(0.00656206, rel=1e-5)


def test_clusters_of_one_item_are_no_clusters():
    assert describe(Y, list(range(13))) == describe(Y) == describe(Y, [None] * 13)
    assert describe([0, 1, 1, 1]) == Estimate(0.75, 0.25, 4.0, math.inf, 4.0)
    assert interval(describe([0, 1, 1, 1])) == wilson(3, 4)


def test_few_items_have_an_error():
    """Of two items that are all right, and of one task at 0 of 3 beside another one."""
    two = combined([0.5, 0.5], [describe([1.0]), describe([1.0])])
    assert two[0] == 1.0
    assert two[1] > 0.1
    assert two[2].low == pytest.approx(wilson(2, 2).low)
    without = combined([0.5, 0.5], [describe([1.0] * 50 + [0.0] * 50), describe([0.0] * 3000)])
    value, stderr, found = combined([0.5, 0.5], [describe([1.0] * 50 + [0.0] * 50), describe([0.0] * 3)])
    assert value == without[0] == 0.25
    assert stderr > 2 * without[1]
    assert found.high - found.low > 2 * (without[2].high - without[2].low)
    for values in ([0.5] * 5, [0.3], [0.0] * 5, [1.0] * 2, [0.2, 0.2, 0.2]):
        own = interval(describe(values))
        assert own.high - own.low > 0.1


def test_what_rounding_does_to_a_share_is_no_error():
    """A metric of a user's own may add up parts to a last digit above 1, in an entry of results.json too."""
    assert describe([1.0000000001, 0.5, -1e-12]) == describe([1, 0.5, 0])
    entry = {"value": 1.0000000001, "stderr": 0.0, "n": 4, "unit": "share", "protocol": "harness"}
    found = suite_mean({"a": entry, "b": entry}, ["a", "b"])
    assert found
    assert found["ci95"]["high"] == 1


def test_clusters_whose_every_item_is_the_mean():
    """Nothing shows how alike their items are: they count as one each."""
    found = describe([0.5] * 6, [0, 0, 1, 1, 2, 2])
    around = interval(found)
    assert (found.value, found.stderr) == (0.5, 0.0)
    assert 2 < found.effective_n < 200
    assert around
    assert 0 < around.low < 0.5 < around.high < 1


def test_other_units_have_students_interval():
    found = interval(describe([10.0, 2.0, -6.0], share=False))
    # mean 2, standard error 8 / sqrt(3), t of 2 degrees of freedom 4.3027
    assert (found.low, found.high) == (
        pytest.approx(2 - 4.30265 * 8 / 3**0.5, abs=1e-3),
        pytest.approx(21.873, abs=1e-2),
    )
    assert interval(describe([3.7], share=False)) is None
    assert [t95(dof) for dof in (1, 4, 29, math.inf)] == pytest.approx([12.7062, 2.7764, 2.0452, 1.96], abs=1e-4)
    assert t95(4) > t95(4.5) > t95(5)


@pytest.mark.parametrize("values", [[], [math.nan, 1.0], [math.inf], [1.2], [-0.1]])
def test_what_is_no_share_is_refused(values):
    with pytest.raises(ValueError, match=r"not finite|outside of 0 to 1"):
        describe(values)


@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0, 1)), min_size=1, max_size=8))
def test_an_interval_of_shares_stays_between_0_and_1(tasks):
    parts = [describe([1.0] * round(n * p) + [0.0] * (n - round(n * p))) for n, p in tasks]
    value, _, found = combined([1 / len(parts)] * len(parts), parts)
    assert 0 <= found.low <= value <= found.high <= 1
    assert found.high - found.low > 1e-3


def suite_coverage(sizes, shares, weights=None, runs=2000, seed=0) -> float:
    """How often the interval of a suite of right and wrong answers holds the true score."""
    sizes, shares = np.array(sizes), np.array(shares)
    weights = np.full(len(sizes), 1 / len(sizes)) if weights is None else np.array(weights)
    means = np.random.default_rng(seed).binomial(sizes, shares, (runs, len(sizes))) / sizes
    low, high = score_limits(means, sizes.astype(float), weights)
    true = float(weights @ shares)
    return float(((low <= true + 1e-12) & (true <= high + 1e-12)).mean())


SUITES = {
    "4 tasks of 5 at 2%": ([5] * 4, [0.02] * 4),
    "4 tasks of 5 at 50%": ([5] * 4, [0.5] * 4),
    "12 tasks of 5 at 5%": ([5] * 12, [0.05] * 12),
    "12 tasks of 20 at 95%": ([20] * 12, [0.95] * 12),
    "12 tasks of 500 at 98%": ([500] * 12, [0.98] * 12),
    "mixed": ([5, 500, 500, 500], [0.02, 0.5, 0.98, 0.3]),
    "one task of 3 at 10%": ([3, 100, 100, 100], [0.1, 0.5, 0.5, 0.5]),
    "57 subjects of 10": ([10] * 57, list(np.linspace(0.02, 0.98, 57))),
}


@pytest.mark.parametrize("name", SUITES)
def test_suite_intervals_hold_the_score(name):
    assert 0.92 <= suite_coverage(*SUITES[name]) <= 0.985


def test_a_micro_average_is_weighed_by_its_tasks():
    sizes = np.arange(5, 62)
    shares = np.linspace(0.02, 0.98, 57)
    assert 0.93 <= suite_coverage(sizes, shares, sizes / sizes.sum()) <= 0.97


def clustered(generator, clusters, size, share, alike, geometric=False):
    """Values and cluster numbers of beta-binomial clusters with this intra-class correlation, of different sizes."""
    sizes = generator.integers(size // 2, size + size // 2 + 1, clusters)
    if geometric:
        sizes = generator.geometric(1 / size, clusters)
    scale = 1 / alike - 1
    rates = generator.beta(share * scale, (1 - share) * scale, clusters)
    groups = np.repeat(np.arange(clusters), sizes)
    return (generator.random(len(groups)) < rates[groups]).astype(float), groups


def cluster_coverage(clusters, share, runs, seed=0, alike=0.3, size=16, geometric=False) -> tuple[float, float]:
    """How often the interval holds the share, with the clusters and without knowing of them."""
    generator, held = np.random.default_rng(seed), np.zeros(2)
    for _ in range(runs):
        values, groups = clustered(generator, clusters, size, share, alike, geometric)
        for place, known in enumerate((groups.tolist(), None)):
            found = interval(describe(values, known))
            held[place] += found.low <= share <= found.high
    return held[0] / runs, held[1] / runs


@pytest.mark.parametrize("clusters", [10, 40])
def test_intervals_of_clusters_hold_the_score(clusters):
    """16 items to a text on average, correlated by 0.3: as independent items they would cover about 60%."""
    known, unknown = cluster_coverage(clusters, 0.4, 300)
    assert 0.91 <= known <= 0.99
    assert unknown < 0.75


def test_scores_between_0_and_1_are_held():
    generator, held = np.random.default_rng(1), 0
    for _ in range(400):
        values = np.where(generator.random(20) < 0.6, 0, generator.beta(2, 2, 20))
        found = interval(describe(values))
        held += found.low <= 0.2 <= found.high
    assert 0.91 <= held / 400 <= 0.99


@pytest.mark.slow
def test_coverage_of_many_simulated_suites():
    """The table of docs/evaluation.md: 10,000 evaluations of each suite, and 200 drawn ones of 2,000 each."""
    for name, suite in SUITES.items():
        found = suite_coverage(*suite, runs=10_000)
        print(name, found)
        assert 0.93 <= found <= 0.975, name
    generator, all_found = np.random.default_rng(7), []
    for seed in range(200):
        tasks = int(generator.integers(4, 13))
        sizes = np.exp(generator.uniform(math.log(5), math.log(500.9), tasks)).astype(int)
        all_found.append(suite_coverage(sizes, generator.uniform(0.02, 0.98, tasks), seed=seed))
    print("drawn", np.mean(all_found), np.quantile(all_found, [0, 0.05, 0.95, 1]))
    assert 0.945 <= np.mean(all_found) <= 0.965
    assert np.quantile(all_found, 0.05) >= 0.93


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("clusters", [5, 10, 20, 40, 100])
def test_coverage_of_many_simulated_clusters(clusters, share):
    known, unknown = cluster_coverage(clusters, share, 10_000)
    print(clusters, share, known, unknown)
    assert 0.93 <= known <= (0.97 if clusters >= 20 else 0.995)  # few: wide rather than wrong
    assert unknown < 0.75


@pytest.mark.slow
@pytest.mark.parametrize("geometric", [False, True])
@pytest.mark.parametrize("clusters", [20, 40, 100])
def test_coverage_of_clusters_that_are_nearly_all_wrong(clusters, geometric):
    """At 5%, where the clusters that were seen say little of how much they differ."""
    known, _ = cluster_coverage(clusters, 0.05, 4000, geometric=geometric)
    print(clusters, geometric, known)
    assert 0.925 <= known <= 0.985


def test_degrees_of_freedom_of_equal_clusters():
    assert intervals._freedom(np.full(7, 1 / 7), np.ones(7)) == pytest.approx(6)
    assert intervals._freedom(np.full(1000, 1e-3), np.ones(1000)) == pytest.approx(999)


def test_degrees_of_freedom_of_clusters_of_several_sizes():
    """As Bell and McCaffrey define them: of the clusters' deviations I - p 1' from the mean, weighed for CR2."""
    parts, variances = np.array([0.4, 0.3, 0.2, 0.1]), np.array([3.0, 2.0, 2.0, 0.5])
    deviations = np.eye(4) - np.outer(parts, np.ones(4))
    scale = np.diag(1 / np.sqrt(1 - parts))
    matrix = scale @ deviations @ np.diag(variances) @ deviations.T @ scale
    wanted = np.trace(matrix) ** 2 / np.trace(matrix @ matrix)
    assert intervals._freedom(parts, variances) == pytest.approx(wanted)
