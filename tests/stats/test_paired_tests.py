"""Paired tests: independent values, symmetry, and false alarms between equal models of every number of items."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllama.stats.intervals import describe, standard_error
from tinyllama.stats.means import ALPHA, holm
from tinyllama.stats.paired import (
    Pairs,
    binomial_p,
    mcnemar,
    mean_of,
    normal_tail,
    paired,
    separate,
    sign_flip_p,
)

SHARES = st.lists(st.floats(0, 1), min_size=1, max_size=12)
ANSWERS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80)


def one(first, second, **more):
    return paired([Pairs(first, second, **more)])


def answers(both: int, only_first: int, only_second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    first = [1.0] * (both + only_first) + [0.0] * (only_second + neither)
    second = [1.0] * both + [0.0] * only_first + [1.0] * only_second + [0.0] * neither
    return np.array(first), np.array(second)


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (0, 0, 1.0), (5, 0, 2 / 32), (1, 9, 2 * (1 + 10) / 1024), (4, 4, 1.0), (30, 30, 1.0),
        # statsmodels 0.15.0: stats.contingency_tables.mcnemar([[0, b], [c, 0]], exact=True).pvalue
        (20, 40, 0.01348929373119186), (121, 59, 4.4344492637551645e-06), (700, 600, 0.0060157938610449395),
    ],
)  # fmt: skip
def test_mcnemar_counts_only_where_one_is_right(gained, lost, p):
    first, second = answers(40, lost, gained, 100)
    found = one(first, second)
    assert found.method == "McNemar, exact"
    assert found.p == pytest.approx(p, rel=1e-9)
    assert binomial_p(gained, lost) == found.p
    assert found.pairs == 140 + gained + lost
    assert found.difference == pytest.approx((gained - lost) / found.pairs)


def test_mcnemars_interval_is_agresti_and_mins():
    """Agresti (2013), section 11.1: 944 of 1600 approve, then 880; difference -0.04, standard error 0.0095."""
    found = mcnemar(*answers(794, 150, 86, 570))
    assert found.difference == pytest.approx(-0.04)
    assert found.stderr == pytest.approx(0.0095, abs=1e-4)
    interval = (found.interval.low, found.interval.high)
    assert interval == (pytest.approx(-0.0587, abs=1e-4), pytest.approx(-0.0213, abs=1e-4))
    # Four items, all lost: by hand, -4/6 -+ 1.96 sqrt(4 + 1 - 16/6) / 6, and not below -1
    few = mcnemar(*answers(0, 4, 0, 0))
    assert few.stderr == pytest.approx(0.25459, abs=1e-5)
    assert (few.interval.low, few.interval.high) == (-1.0, pytest.approx(-0.1677, abs=1e-4))


@given(ANSWERS)
def test_mcnemar_is_symmetric(pairs):
    first, second = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    there, back = one(first, second), one(second, first)
    assert there.p == back.p
    assert there.difference == -back.difference
    assert 0 < there.p <= 1
    assert sign_flip_p(second - first)[0] == pytest.approx(there.p, abs=0.02)


def test_signs_are_flipped_as_scipy_does():
    differences = np.array([0.3, -0.1, 0.25, 0.4, 0.05, 0.2, -0.02, 0.31])
    # scipy 1.17: permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=inf).pvalue
    assert sign_flip_p(differences) == (pytest.approx(0.046875), "exact")
    assert sign_flip_p(np.concatenate([differences, np.zeros(50)]))[0] == pytest.approx(0.046875)
    assert sign_flip_p(0.1 * np.ones(6))[0] == 2 / 64
    assert sign_flip_p(np.zeros(4)) == (1.0, "exact")


def test_drawn_and_normal_signs_agree_with_all_of_them():
    generator = np.random.default_rng(0)
    differences = generator.normal(0.25, 0.5, 17)
    exact = sign_flip_p(differences)[0]
    small = sign_flip_p(np.concatenate([differences, np.full(2, 1e-9)]))
    assert small == (pytest.approx(exact, abs=0.01), "20,000 draws")
    many = generator.normal(0.03, 1, 4000)
    p, how = sign_flip_p(many)
    assert how == "normal"
    signs = 2.0 * generator.integers(0, 2, (4000, 4000)) - 1
    assert p == pytest.approx(np.mean(np.abs(signs @ many) >= abs(many.sum())), abs=0.03)
    heavy = np.concatenate([many / 100, [5.0]])
    assert sign_flip_p(heavy)[1] == "20,000 draws"


@pytest.mark.parametrize("count", range(1, 6))
def test_fewer_than_six_items_are_never_significant(count):
    """One item at .3 against .7 says nothing, whatever the scores are."""
    found = one([0.3] * count, [0.7] * count)
    assert found.p == 2.0 ** (1 - count) > ALPHA
    assert found.interval.low <= 0.4 - 0.1 * (count < 5)
    assert found.stderr > 0.1
    assert one([0.0] * count, [1.0] * count).p > ALPHA
    assert one([0.3] * 6, [0.7] * 6).p < ALPHA


def test_items_of_a_text_are_flipped_together():
    first, second = [0.0] * 32, [1.0] * 32
    groups = [number // 8 for number in range(32)]
    alone, together = one(first, second), one(first, second, clusters=groups)
    assert alone.p < 1e-8
    assert together.p == 2 / 16
    assert (together.pairs, together.clusters) == (32, 4)
    assert together.stderr > 2 * alone.stderr
    assert one(first, second, clusters=list(range(32))).method == "McNemar, exact"
    assert one(first, second, clusters=[None] * 32) == alone


def test_a_mean_of_tasks_is_tested_by_all_of_its_items():
    """Two tasks of three items: six signs, of which the weights follow the tasks."""
    parts = [Pairs([0.0] * 3, [0.5] * 3, 0.5), Pairs([0.2, 0.2, 0.2], [0.4, 0.4, 0.4], 0.5)]
    found = paired(parts)
    assert (found.difference, found.p, found.pairs) == (pytest.approx(0.35), 2 / 64, 6)
    assert found.method == "sign flip, exact"


@given(SHARES, st.integers(0, 2**32 - 1))
def test_an_interval_holds_the_difference(shares, seed):
    second = np.random.default_rng(seed).permutation(shares)
    found, back = one(shares, second), one(second, shares)
    assert 0 < found.p <= 1
    assert found.p == pytest.approx(back.p)
    assert -1 <= found.interval.low < found.interval.high <= 1
    assert found.interval.low <= found.difference + 1e-9
    assert found.difference - 1e-9 <= found.interval.high


@pytest.mark.parametrize("values", [([], []), ([1.0], [1.0, 0.0]), ([math.nan], [1.0]), ([0.5], [math.inf])])
def test_what_cannot_be_paired_is_refused(values):
    with pytest.raises(ValueError, match=r"no pairs|not finite"):
        one(*values)


def test_other_units_have_no_bounds():
    found = paired([Pairs([3.7, 2.0, 5.0], [9.7, 8.2, 11.5])], share=False)
    assert found.difference == pytest.approx(6.2333, abs=1e-4)
    assert found.interval.high > 6.2333 > found.interval.low
    assert found.p == 0.25


def test_separate_scores():
    """Agresti and Caffo (2000): one right and one wrong answer more for each; 2 of 2 against 0 of 2 is no difference."""
    found = separate(describe([1.0, 1.0]), describe([0.0, 0.0]))
    assert found.difference == -1
    # z of 0.5, and Student's t of 2 * (2 + 1) degrees of freedom, 2.4469 at 5%
    assert found.p == pytest.approx(normal_tail(0.5 / math.sqrt(2 * 0.1875 / 4) * 1.959964 / 2.446912), rel=1e-5)
    assert found.p > ALPHA
    assert found.pairs is None
    large = separate(describe([1.0] * 500 + [0.0] * 500), describe([1.0] * 560 + [0.0] * 440))
    # z of 0.06 with an error of sqrt(.25 / 1000 + .2464 / 1000)
    assert large.p == pytest.approx(normal_tail(0.06 / math.sqrt(0.0004964)), abs=1e-3)
    other = separate(describe([1.0, 2.0, 3.0], share=False), describe([1.5, 2.5, 3.5], share=False))
    assert (other.difference, other.method) == (0.5, "unpaired t")
    assert other.p > ALPHA
    # Items that are hard for both cancel: the same means, unpaired, say nothing.
    generator = np.random.default_rng(1)
    first = generator.random(400)
    second = np.clip(first + generator.normal(0.02, 0.1, 400), 0, 1)
    assert separate(describe(first), describe(second)).p > 3 * one(first, second).p
    assert standard_error(first) == pytest.approx(first.std(ddof=1) / 20)


def test_the_mean_of_tasks_that_are_not_all_paired():
    parts = [separate(describe([1.0] * 50 + [0.0] * 50), describe([1.0] * 60 + [0.0] * 40)) for _ in range(4)]
    found = mean_of(parts)
    assert found.difference == pytest.approx(0.1)
    assert found.stderr == pytest.approx(parts[0].stderr / 2)
    assert (found.method, found.pairs) == ("unpaired t over tasks", None)


def test_false_alarms_of_scores_that_are_not_paired():
    """Exactly, over all outcomes: the share of them where equal models differ "significantly", whatever they are."""
    for first, second in ((2, 2), (4, 4), (12, 12), (25, 25), (1, 50), (2, 100), (10, 60)):
        scores = [[describe([1.0] * k + [0.0] * (n - k)) for k in range(n + 1)] for n in (first, second)]
        found = np.array([[separate(a, b).p < ALPHA for b in scores[1]] for a in scores[0]])
        for share in (0.1, 0.3, 0.5, 0.8):
            chances = [
                [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)] for n in (first, second)
            ]
            assert (np.outer(*chances) * found).sum() <= 0.06, (first, second, share)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_false_alarms_of_means_of_tasks_that_are_not_paired(count):
    """At most 6%, with the error of 400 comparisons; the plain differences of few items would be "significant" in 12%."""
    generator = np.random.default_rng(count)
    values = generator.integers(0, 2, (400, 10, 2, count)).astype(float)
    found = [mean_of([separate(describe(a), describe(b)) for a, b in tasks]).p < ALPHA for tasks in values]
    assert np.mean(found) <= 0.09


def rare(generator, count):
    """Mostly about the same, rarely far apart."""
    return np.where(generator.random(count) < 0.08, generator.random(count), 0.5 + 0.001 * generator.random(count))


KINDS = {
    "right or wrong": lambda generator, count: (generator.random(count) < 0.6).astype(float),
    "shares": lambda generator, count: generator.random(count),
    "many zeros": lambda generator, count: np.where(generator.random(count) < 0.7, 0, generator.beta(2, 2, count)),
    "ties": lambda generator, count: generator.integers(0, 3, count) / 2,
    "rare and large": rare,
    "nearly all right": lambda generator, count: (generator.random(count) < 0.97).astype(float),
}


def alarms(kind, count, runs, seed=0) -> float:
    """The share of comparisons of two equal models that are "significant"."""
    generator, found = np.random.default_rng(seed), 0
    for _ in range(runs):
        found += one(KINDS[kind](generator, count), KINDS[kind](generator, count)).p < ALPHA
    return found / runs


@pytest.mark.parametrize("kind", KINDS)
def test_false_alarms_of_few_items(kind):
    """At most 6%, with the error of 300 comparisons: 6% and three standard errors."""
    for count in (1, 2, 4, 6, 8):
        assert alarms(kind, count, 300) <= 0.1


def test_false_alarms_of_clusters():
    generator, found = np.random.default_rng(2), np.zeros(2)
    groups = np.repeat(np.arange(12), 8).tolist()
    for _ in range(300):
        first, second = (
            (generator.random(96) < np.repeat(generator.beta(1, 1.5, 12), 8)).astype(float) for _ in range(2)
        )
        found += [one(first, second, clusters=groups).p < ALPHA, one(first, second).p < ALPHA]
    assert found[0] / 300 <= 0.09
    assert found[1] / 300 > 0.15


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_false_alarms_of_many_comparisons(kind):
    """10,000 comparisons of equal models for each number of items up to 16, 1,000 above, where signs are drawn."""
    found = {count: alarms(kind, count, 10_000) for count in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)}
    found |= {count: alarms(kind, count, 1000) for count in (25, 60)}
    print(kind, found)
    assert all(share <= 0.06 for count, share in found.items() if count <= 16)
    assert all(share <= 0.075 for share in found.values())


def test_holms_own_example():
    """By hand: sorted .01 .03 .04, times 3, 2, 1, and none smaller than the one before it."""
    assert holm([0.04, 0.01, 0.03]) == [pytest.approx(0.06), pytest.approx(0.03), pytest.approx(0.06)]
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=20))
def test_holm_keeps_the_order_and_never_helps(p_values):
    corrected = holm(p_values)
    assert all(p <= c <= 1 for p, c in zip(p_values, corrected, strict=True))
    ranked = [c for _, c in sorted(zip(p_values, corrected, strict=True))]
    assert ranked == sorted(ranked)
    # Refusing anything at 5% is exactly refusing the smallest by Bonferroni.
    if p_values:
        assert min(corrected) == pytest.approx(min(1.0, len(p_values) * min(p_values)))


@pytest.mark.parametrize(("z", "p"), [(0, 1.0), (1, 0.317311), (-1.644854, 0.1), (2.575829, 0.01)])
def test_the_tails_of_the_normal_distribution(z, p):
    assert normal_tail(z) == pytest.approx(p, abs=1e-6)
