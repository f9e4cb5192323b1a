"""Token sequences as a forest in which every shared beginning stands once, cut into passes of bounded size.

Four endings of one question share the question, the questions of a subject share five solved examples. Sorted, each
sequence adds to the one before it only what follows their common beginning (its tail); all tails, one after another, are
the forest's tokens in depth-first order. A pass is a run of these tokens. Whatever a pass needs of earlier ones lies on
one path from a root, the beginning of its first sequence, so that keys and values of a single path are all that is
carried from pass to pass.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Tail:
    """What one sequence adds to those before it: its tokens [shared, length), at [start, ...) in the forest."""

    sequence: int
    shared: int
    length: int
    start: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch [first, last) of one sequence's tokens inside a pass, where it begins at `offset`."""

    sequence: int
    first: int
    last: int
    offset: int

    @property
    def size(self) -> int:
        return self.last - self.first


@dataclasses.dataclass(frozen=True)
class Pass:
    """Tokens that go through the model together.

    start: of its first token in the forest. carried: how many tokens of the first piece's sequence earlier passes have
    computed. next_carried: the same for the pass after this one (0 at the end), on the path of `next_sequence`.
    """

    start: int
    size: int
    pieces: list[Piece]
    carried: int
    next_carried: int
    next_sequence: int


def common_length(a: Ints, b: Ints) -> int:
    """How many tokens two sequences begin with in common."""
    size = min(len(a), len(b))
    differs = a[:size] != b[:size]
    return int(differs.argmax()) if size and differs.any() else size


class Forest:
    """The forest of given sequences of token ids, none of them empty.

    order: indices of the distinct sequences, sorted. owner[i]: the distinct sequence that sequence i equals.
    tokens: the forest's tokens, `size` of them.
    """

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.sequences = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
        if any(not len(sequence) for sequence in self.sequences):
            raise ValueError("an empty sequence has no place in a forest")
        # Big-endian bytes sort as the numbers do.
        keys = [sequence.astype(">i4").tobytes() for sequence in self.sequences]
        first: dict[bytes, int] = {}
        self.owner = [first.setdefault(key, index) for index, key in enumerate(keys)]
        self.order = sorted(first.values(), key=keys.__getitem__)
        self.tails: list[Tail] = []
        start, before = 0, np.empty(0, dtype=np.int64)
        for index in self.order:
            sequence = self.sequences[index]
            shared = common_length(before, sequence)
            self.tails.append(Tail(index, shared, len(sequence), start))
            start += len(sequence) - shared
            before = sequence
        self.size = start
        self.longest = max(map(len, self.sequences), default=0)
        parts = [self.sequences[tail.sequence][tail.shared :] for tail in self.tails]
        self.tokens = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def places(self, wanted: Sequence[tuple[int, int]]) -> list[Ints]:
        """Where in the forest the tokens [first, last) of each sequence stand: wanted has a (first, last) per sequence."""
        if any(not 0 <= f <= last <= len(s) for (f, last), s in zip(wanted, self.sequences, strict=True)):
            raise ValueError("a stretch lies outside of its sequence")
        path = np.zeros(self.longest, dtype=np.int64)
        by_owner: dict[int, list[int]] = {}
        for index, owner in enumerate(self.owner):
            by_owner.setdefault(owner, []).append(index)
        found: list[Ints] = [path] * len(self.sequences)
        for tail in self.tails:
            path[tail.shared : tail.length] = tail.start + np.arange(tail.length - tail.shared)
            for index in by_owner[tail.sequence]:
                first, last = wanted[index]
                found[index] = path[first:last].copy()
        return found


class Passes:
    """Cuts a forest into passes, one at a time, so that the size can change on the way (`take` again after `back`)."""

    def __init__(self, forest: Forest) -> None:
        self.forest = forest
        self._tail, self._done = 0, 0  # the next tail, and how many of its tokens are behind us
        self._before = (0, 0)

    def take(self, size: int) -> Pass | None:
        """The next pass, of at most `size` tokens; None at the end."""
        tails = self.forest.tails
        if self._tail == len(tails):
            return None
        self._before = (self._tail, self._done)
        first = tails[self._tail]
        start, carried = first.start + self._done, first.shared + self._done
        pieces: list[Piece] = []
        used = 0
        while self._tail < len(tails) and used < size:
            tail = tails[self._tail]
            begin = tail.shared + self._done
            end = min(tail.length, begin + size - used)
            pieces.append(Piece(tail.sequence, begin, end, used))
            used += end - begin
            if end == tail.length:
                self._tail, self._done = self._tail + 1, 0
            else:
                self._done += end - begin
        if self._tail == len(tails):
            return Pass(start, used, pieces, carried, 0, -1)
        following = tails[self._tail]
        return Pass(start, used, pieces, carried, following.shared + self._done, following.sequence)

    def back(self) -> None:
        """Undo the last `take`."""
        self._tail, self._done = self._before


CUT_SLACK = 0.1  # of a share, by which a cut may move to a place where less is shared


def shares(sequences: Sequence[Sequence[int]], number: int, extra: Sequence[int] | None = None) -> list[list[int]]:
    """The sequences' indices in `number` shares of about equal work, neighbours of the forest together; some may be empty.

    Work is the tokens that a sequence adds to the forest, and `extra` of it (tokens to generate). What both sides of a cut
    begin with is computed in both, so cuts go where that is little.
    """
    forest = Forest(sequences)
    members: dict[int, list[int]] = {}
    for index, owner in enumerate(forest.owner):
        members.setdefault(owner, []).append(index)
    work = [
        tail.length - tail.shared + sum(extra[i] for i in members[tail.sequence])
        if extra
        else tail.length - tail.shared
        for tail in forest.tails
    ]
    before = np.concatenate(([0], np.cumsum(work)))  # of each tail, and the total at the end
    share = before[-1] / number
    shared = np.array([tail.shared for tail in forest.tails])
    cuts = [0]
    for target in share * np.arange(1, number):
        first, last = np.searchsorted(before, [target - CUT_SLACK * share, target + CUT_SLACK * share])
        places = np.arange(max(first, cuts[-1]), min(max(last, first + 1), len(work)))
        # The least shared; of several, the nearest to an equal share.
        best = min(places, key=lambda p: (shared[p], abs(before[p] - target)), default=len(work))
        cuts.append(int(max(best, cuts[-1])))
    cuts.append(len(work))
    return [
        [index for tail in forest.tails[begin:end] for index in members[tail.sequence]]
        for begin, end in itertools.pairwise(cuts)
    ]
