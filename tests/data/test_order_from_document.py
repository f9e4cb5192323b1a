"""A second reader, written from docs/data.md alone: sources, windows and tokens of any sample, without our code of it.

Nothing here imports `tinyllama.data.order` but the comparison; division is exact, in fractions.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from fractions import Fraction

import numpy as np
import pytest
from conftest import ROOT

U64 = 2**64


def mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % U64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % U64
    return x ^ (x >> 31)


def permute(place: int, windows: int, text: str) -> int:
    """Section 2 of the document."""
    half = max(1, math.ceil(len(f"{windows - 1:b}") / 2)) if windows > 1 else 1
    digest = hashlib.blake2b(text.encode("ascii"), digest_size=48).digest()
    keys = [int.from_bytes(digest[n : n + 8], "little") for n in range(0, 48, 8)]
    while True:
        left, right = place // 2**half, place % 2**half
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) % 2**half)
        place = left * 2**half + right
        if place < windows:
            return place


def period(weights: list[str]) -> tuple[list[int], list[tuple[int, int]]]:
    """Section 1: c, and (source, a) at every position. Weights as they are written."""
    shares = [Fraction(weight) for weight in weights]
    shares = [share / sum(shares) for share in shares]
    length = math.lcm(*(share.denominator for share in shares))
    per_period = [int(share * length) for share in shares]
    slack = max(1, 2 * len(weights) - 2)
    taken, found = [0] * len(weights), []
    for p in range(length):
        everyone = range(len(weights))
        ready = [k for k in everyone if (per_period[k] * (p + 1) - taken[k] * length) * slack >= length] or everyone
        chosen = min((Fraction((taken[k] + 1) * slack - 1, per_period[k]), k) for k in ready)[1]
        found.append((chosen, taken[chosen]))
        taken[chosen] += 1
    return per_period, found


def sample(i: int, tokens: list[int], weights: list[str], length: int, seed: int) -> tuple[int, int, int, int]:
    """(source, epoch, start, r) of sample `i`."""
    per_period, positions = period(weights)
    source, before = positions[i % len(positions)]
    number = i // len(positions) * per_period[source] + before
    windows = math.ceil(Fraction(tokens[source] - 1, length))
    epoch, place = divmod(number, windows)
    window = permute(place, windows, f"({seed}, {source}, {epoch})")
    moved = max(0, window * length + length + 1 - tokens[source])
    return source, epoch, window * length - moved, moved


def vectors() -> list[tuple[list[int], list[str], list[int]]]:
    """(tokens, weights, [L, S, sample, source, epoch, start, r]) of every row of the document's table."""
    text = (ROOT / "docs" / "data.md").read_text()
    found = []
    for row in re.findall(r"^\| ([\d,]+ x [^|]*)\|(.*)\|$", text.split("## The order")[1], re.MULTILINE):
        pairs = [pair.split(" x ") for pair in row[0].strip().split(", ")]
        tokens = [int(count.replace(",", "")) for count, _ in pairs]
        found.append((tokens, [weight for _, weight in pairs], [int(cell) for cell in row[1].split("|")]))
    return found


def test_the_documents_test_vectors_follow_from_its_text_and_are_ours():
    from tinyllama.data.order import Order

    rows = vectors()
    assert len({(tuple(tokens), length, seed) for tokens, _, (length, seed, *_) in rows}) == 3
    assert len(rows) >= 14
    assert sum(numbers[-1] > 0 for *_, numbers in rows) >= 2
    for tokens, weights, (length, seed, i, *expected) in rows:
        assert list(sample(i, tokens, weights, length, seed)) == expected
        ours = Order(tokens, [float(weight) for weight in weights], length, seed)(i)
        assert [ours.source, ours.epoch, ours.start, ours.repeated] == expected


CONFIGURATIONS = [
    ([2], ["1"], 1, 0),
    ([65], ["3.5"], 64, 2**64 - 1),
    ([300, 301], ["7", "3"], 10, 1337),
    ([5000, 5000, 5000], ["1", "1", "1"], 64, 7),
    ([90_001, 4097, 70_000, 257], ["0.53", "0.25", "0.19", "0.03"], 256, 3407),
    ([10**13, 4 * 10**12], ["0.6936", "0.3064"], 2048, 42),
    ([1000, 2000], ["1e-05", "0.001"], 16, 1),
]


@pytest.mark.parametrize(("tokens", "weights", "length", "seed"), CONFIGURATIONS)
def test_a_reader_of_the_document_rebuilds_the_order(tokens, weights, length, seed):
    from tinyllama.data.order import Order

    order = Order(tokens, [float(weight) for weight in weights], length, seed)
    generator = random.Random(seed)
    for i in [*range(150), *(generator.randrange(10**10) for _ in range(50))]:
        source, epoch, start, moved = sample(i, tokens, weights, length, seed)
        ours = order(i)
        assert (ours.source, ours.epoch, ours.start, ours.repeated) == (source, epoch, start, moved), i
        assert order.windows_of([i]) == [(source, start, moved)]


def test_the_tokens_of_a_step_are_read_as_the_document_says(stores):
    """Steps, ranks and micro-steps; separators and positions inside a document; from the files alone, by numpy."""
    import json

    from tinyllama.data.loader import Mixture, Source, document_layout
    from train.plan import BatchPlan

    names, weights, length, seed = ["prose", "code"], ["0.7", "0.3"], 32, 11
    streams = []
    for name in names:
        manifest = json.loads((stores / name / "manifest.json").read_text())
        shards = range(-(-manifest["splits"]["train"]["tokens"] // manifest["shard_tokens"]))
        parts = [np.fromfile(stores / name / f"train-{n:06d}.tokens", dtype=manifest["dtype"]) for n in shards]
        streams.append(np.concatenate(parts).astype(np.int64))
    separator = manifest["separator_id"]
    mixture = Mixture([Source(n, stores / n, float(w)) for n, w in zip(names, weights, strict=True)], length, seed)
    plan = BatchPlan(micro=2, accumulation=3, ranks=2, sequence_length=length, reduce_once=False)
    batch = 12
    for step, rank, micro_step in ((0, 0, 0), (3, 1, 2), (500, 0, 1)):
        first = step * batch + (micro_step * 2 + rank) * 2
        assert list(plan.samples(step, rank, micro_step)) == [first, first + 1]
        ids, targets = mixture.fetch([first, first + 1])
        for row in (0, 1):
            source, _, start, moved = sample(first + row, [len(s) for s in streams], weights, length, seed)
            expected = streams[source][start : start + length + 1]
            assert ids[row].tolist() == expected[:-1].tolist()
            assert targets[row].tolist() == [-100] * moved + expected[1 + moved :].tolist()
        documents, positions = document_layout(ids, separator)
        for row in (0, 1):
            for place in range(length):
                begins = [b for b in range(place + 1) if ids[row][b] == separator or b == 0]
                assert positions[row][place] == place - begins[-1]
                same = documents[row][: place + 1] == documents[row][place]
                assert same.nonzero()[0][0] == begins[-1]
