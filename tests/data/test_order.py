"""The order of training: every property that TinyLlama's loader lacked."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama.data import order as module
from tinyllama.data.order import Order, Permutation, Schedule
from tinyllama.errors import ConfigError


@given(st.integers(1, 5000), st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_permutation_is_one(size, key):
    permutation = Permutation(size, key)
    values = [permutation(i) for i in range(size)]
    assert sorted(values) == list(range(size))
    assert permutation.many(np.arange(size, dtype=np.uint64)).tolist() == values


@given(st.integers(1, 2**62), st.integers(0, 99), st.data())
@settings(max_examples=60, deadline=None)
def test_arrays_and_numbers_are_permuted_alike_at_any_size(size, key, data):
    permutation = Permutation(size, key)
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))
    expected = [permutation(i) for i in indices]
    assert permutation.many(np.array(indices, dtype=np.uint64)).tolist() == expected


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
    length = 2 * sum(weights)
    for index in range(length):
        source, nth = schedule(index)
        assert nth == counts[source]
        counts[source] += 1
        assert counts == schedule.taken(index + 1)
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - (index + 1) * weight / sum(weights)) < 1
    sources, nth = schedule.many(np.arange(length))
    assert list(zip(sources.tolist(), nth.tolist(), strict=True)) == [schedule(i) for i in range(length)]


def test_seven_to_three():
    assert Schedule([0.7, 0.3]).taken(10_000_000_001) in (
        [7_000_000_001, 3_000_000_000],
        [7_000_000_000, 3_000_000_001],
    )


def test_weights_are_taken_as_they_are_written():
    """TinyLlama's own two weights: exact to the last of ten billion samples, not merely close."""
    assert Schedule([0.6936, 0.3064]).taken(10**10) == [6_936_000_000, 3_064_000_000]
    with pytest.raises(ConfigError, match="rounder weights"):
        Schedule([0.123456789, 0.876543211])


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


@given(
    st.lists(st.integers(18, 10**13), min_size=1, max_size=3),
    st.integers(1, 17),
    st.integers(0, 10**12),
    st.integers(0, 70),
)
@settings(max_examples=50, deadline=None)
def test_many_windows_at_once_are_those_of_one_by_one(sizes, length, first, count):
    order = Order(sizes, list(range(1, len(sizes) + 1)), length, 7)
    samples = [first + 3 * i for i in range(count)]
    one_by_one = [(w.source, w.start, w.repeated) for w in map(order, samples)]
    assert order.windows_of(samples) == one_by_one
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCKS", 2)
        far = [10**6, 2 * 10**6, 3 * 10**6]  # push out what was kept
        assert order.windows_of([*far, *samples])[len(far) :] == one_by_one


@pytest.mark.parametrize("epochs", [1.0, 2.5])
def test_each_window_is_seen_as_often_as_the_epochs_say(epochs):
    """Fault 6 of TinyLlama's loader: the last files of every rank were never read, and nobody was told."""
    order = Order([1000], [1.0], 10, 3)
    windows = order.windows[0]
    seen = np.zeros(windows, dtype=int)
    for index in range(int(epochs * windows)):
        seen[-(-order(index).start // 10)] += 1
    assert seen.min() == int(epochs)
    assert seen.max() == -(-int(epochs * 2) // 2)
    assert order.epochs(int(epochs * windows)) == [epochs]


def test_seeking_far_ahead_is_instant():
    order = Order([10**13, 4 * 10**12], [0.7, 0.3], 2048, 1)
    started = time.process_time()
    windows = [order(10**9 + i) for i in range(1000)]
    assert time.process_time() - started < 1
    assert len({(w.source, w.start) for w in windows}) == 1000


def test_impossible_orders_are_refused():
    with pytest.raises(ConfigError, match="sequence_length=64"):
        Order([64], [1.0], 64, 0)
    for weights in ([1, 0], [1, -1], [float("nan")], [float("inf")], []):
        with pytest.raises(ConfigError, match="weights"):
            Schedule(weights)
