"""The order of training: every property that TinyLlama's loader lacked."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama.data.order import Order, Permutation, Schedule
from tinyllama.errors import ConfigError


@given(st.integers(1, 5000), st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_permutation_is_one(size, key):
    permutation = Permutation(size, key)
    assert sorted(permutation(i) for i in range(size)) == list(range(size))


def test_permutations_of_epochs_differ_and_look_random():
    first, second = ([Permutation(1000, 1, 0, epoch)(i) for i in range(1000)] for epoch in (0, 1))
    assert first != second
    # A random permutation has one fixed point on average, and neighbours land a third of the range apart.
    assert sum(i == p for i, p in enumerate(first)) < 8
    assert 250 < sum(abs(a - b) for a, b in itertools.pairwise(first)) / 999 < 420


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_every_prefix_has_the_right_shares_to_within_one_sample(weights):
    schedule = Schedule(weights)
    counts = [0] * len(weights)
    for index in range(2 * sum(weights)):
        source, nth = schedule(index)
        assert nth == counts[source]
        counts[source] += 1
        assert counts == schedule.taken(index + 1)
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - (index + 1) * weight / sum(weights)) < 1


def test_seven_to_three():
    assert Schedule([0.7, 0.3]).taken(10_000_000_001) in (
        [7_000_000_001, 3_000_000_000],
        [7_000_000_000, 3_000_000_001],
    )


@given(st.lists(st.integers(18, 400), min_size=1, max_size=3), st.integers(1, 16), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_every_token_is_a_target_once_in_each_epoch(sizes, length, seed):
    order = Order(sizes, [1.0] * len(sizes), length, seed)
    seen = [[[0] * n for n in sizes] for _ in range(2)]
    index = 0
    while min(order.epochs(index)) < 2:
        window = order(index)
        index += 1
        if window.epoch < 2:
            for target in range(window.start + 1 + window.repeated, window.start + 1 + length):
                seen[window.epoch][window.source][target] += 1
    for epoch in seen:
        for counts in epoch:
            assert counts[0] == 0
            assert set(counts[1:]) == {1}


def test_seeking_far_ahead_is_instant():
    order = Order([10**13, 4 * 10**12], [0.7, 0.3], 2048, 1)
    started = time.perf_counter()
    windows = [order(10**9 + i) for i in range(1000)]
    assert time.perf_counter() - started < 1
    assert len({(w.source, w.start) for w in windows}) == 1000


def test_impossible_orders_are_refused():
    with pytest.raises(ConfigError, match="sequence_length=64"):
        Order([64], [1.0], 64, 0)
    with pytest.raises(ConfigError, match="weights"):
        Schedule([1, 0])
