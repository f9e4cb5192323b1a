"""Which window of which source is sample number i: a pure function, O(1) in time and memory for any i.

The order depends on the seed, the sources' sizes and weights alone; not on ranks, workers, accumulation or the length
of the run. So a resume is a seek, and changing the number of ranks changes nothing. Two pieces:

- `Permutation`: a pseudo-random permutation of 0..n-1 computed on the fly (a Feistel network with cycle walking), a
  fresh one for every epoch of every source;
- `Schedule`: which source each sample comes from, so that at every prefix each source has its share to within one
  sample.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import threading
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np

from tinyllama.errors import ConfigError

ROUNDS = 6
LONGEST_PERIOD = 100_000
BLOCK = 1024  # samples whose windows are computed together, which is many times faster than one by one
BLOCKS = 16  # kept


class Permutation:
    """A pseudo-random permutation of range(size), keyed by strings and numbers.

    A balanced Feistel network over the next power of four, walking the cycle until the value falls inside the range
    (Black and Rogaway, 2002). At most 4 evaluations of the network on average.
    """

    def __init__(self, size: int, *key: object) -> None:
        if not 1 <= size <= 1 << 62:
            raise ValueError(f"size={size}")
        self.size = size
        self.half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self.mask = (1 << self.half_bits) - 1
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
        self.keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS)]

    def __call__(self, index: int) -> int:
        """Where `index` goes; IndexError outside range(size)."""
        if not 0 <= index < self.size:
            raise IndexError(f"{index} of {self.size}")
        while True:
            left, right = index >> self.half_bits, index & self.mask
            for key in self.keys:
                left, right = right, left ^ (self._mix(right ^ key) & self.mask)
            index = (left << self.half_bits) | right
            if index < self.size:
                return index

    def many(self, indices: np.ndarray) -> np.ndarray:
        """The same for an array of indices (uint64, all inside the range), at once."""
        out = self._network(indices)
        while (outside := np.flatnonzero(out >= self.size)).size:
            out[outside] = self._network(out[outside])
        return out

    def _network(self, indices: np.ndarray) -> np.ndarray:
        half, mask = np.uint64(self.half_bits), np.uint64(self.mask)
        left, right = indices >> half, indices & mask
        for key in self.keys:
            left, right = right, left ^ (self._mix_many(right ^ np.uint64(key)) & mask)
        return (left << half) | right

    @staticmethod
    def _mix(x: int) -> int:
        """The finaliser of splitmix64 (Steele et al., 2014): every input bit reaches every output bit."""
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        return x ^ (x >> 31)

    @staticmethod
    def _mix_many(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


class Schedule:
    """Interleaves sources by weight. After any number of samples each count is within one of its exact share.

    The weights are taken as they are written, as decimal fractions; the order of one period is Tijdeman's (1980): of
    the sources whose next sample is not too early, the one whose deadline comes first.
    """

    def __init__(self, weights: Sequence[float], names: Sequence[str] | None = None) -> None:
        given = f"{dict(zip(names, weights, strict=True)) if names else list(weights)}"
        if not weights or not all(0 < w < math.inf for w in weights):
            raise ConfigError(f"source weights {given}", fix="every weight must be above zero")
        shares = [Fraction(repr(w)) for w in weights]
        total = sum(shares)
        self.shares = [share / total for share in shares]
        self.period = math.lcm(*(s.denominator for s in self.shares))
        if self.period > LONGEST_PERIOD:
            raise ConfigError(
                f"source weights {given} have a common period of {self.period:,} samples",
                fix=f"use rounder weights, such as 7 and 3 (at most {LONGEST_PERIOD:,})",
            )
        counts = [int(share * self.period) for share in self.shares]
        period, sources = self.period, len(counts)
        taken = [0] * sources
        order, before = [], []
        # In integers: a sample of source k is not too early once share * (position + 1) - given >= 1 / (2K - 2).
        slack = max(1, 2 * sources - 2)
        for position in range(period):
            before.append(tuple(taken))
            ready = [
                k for k in range(sources) if (counts[k] * (position + 1) - taken[k] * period) * slack >= period
            ] or list(range(sources))
            chosen = min(ready, key=lambda k: (Fraction((taken[k] + 1) * slack - 1, counts[k]), k))
            order.append(chosen)
            taken[chosen] += 1
        self.counts = np.array(counts, dtype=np.int64)
        self.sources = np.array(order, dtype=np.int64)
        self.before = np.array(before, dtype=np.int64)  # (period, sources)

    def __call__(self, index: int) -> tuple[int, int]:
        """(source, how many samples of that source came before) for sample `index`."""
        round_, position = divmod(index, self.period)
        source = int(self.sources[position])
        return source, round_ * int(self.counts[source]) + int(self.before[position, source])

    def many(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same for an array of samples (int64): sources and earlier counts."""
        rounds, positions = np.divmod(indices, self.period)
        sources = self.sources[positions]
        return sources, rounds * self.counts[sources] + self.before[positions, sources]

    def taken(self, num_samples: int) -> list[int]:
        """How many of the first `num_samples` samples come from each source."""
        round_, position = divmod(num_samples, self.period)
        pairs = zip(self.counts.tolist(), self.before[position].tolist(), strict=True)
        return [round_ * count + before for count, before in pairs]


@dataclasses.dataclass(frozen=True)
class Window:
    """One sample: `sequence_length` + 1 tokens of a source from `start`; the first `repeated` targets do not count.

    Every token but a source's first is a target exactly once in an epoch: the last window of a source is moved back
    to end with it, and the targets it shares with the window before are left out.
    """

    source: int
    start: int
    repeated: int
    epoch: int


class Order:
    """Sample number -> Window, for sources of given lengths and weights."""

    def __init__(
        self,
        num_tokens: Sequence[int],
        weights: Sequence[float],
        sequence_length: int,
        seed: int,
        names: Sequence[str] | None = None,
    ) -> None:
        for name, n in zip(names or range(len(num_tokens)), num_tokens, strict=True):
            if n < sequence_length + 1:
                raise ConfigError(
                    f"source {name!r} has {n:,} tokens, one sample of sequence_length={sequence_length} needs "
                    f"{sequence_length + 1:,}",
                    fix="prepare more text or shorten data.sequence_length",
                )
        self.num_tokens = tuple(num_tokens)
        self.sequence_length = sequence_length
        self.seed = seed
        self.windows = [-(-(n - 1) // sequence_length) for n in num_tokens]
        self.schedule = Schedule(weights, names)
        self._permutations: dict[int, tuple[int, Permutation]] = {}
        self._blocks: dict[int, list[tuple[int, int, int]]] = {}
        self._lock = threading.Lock()  # training asks for the next samples while a thread reads ahead

    def _permutation(self, source: int, epoch: int) -> Permutation:
        held = self._permutations.get(source)
        if held is None or held[0] != epoch:
            held = (epoch, Permutation(self.windows[source], self.seed, source, epoch))
            self._permutations[source] = held
        return held[1]

    def __call__(self, index: int) -> Window:
        source, nth = self.schedule(index)
        epoch, position = divmod(nth, self.windows[source])
        number = self._permutation(source, epoch)(position)
        start = number * self.sequence_length
        repeated = max(0, start + self.sequence_length + 1 - self.num_tokens[source])
        return Window(source, start - repeated, repeated, epoch)

    def windows_of(self, samples: Iterable[int]) -> list[tuple[int, int, int]]:
        """(source, start, repeated) of each sample: what the call gives one by one, much faster."""
        found = []
        for sample in samples:
            number, place = divmod(sample, BLOCK)
            with self._lock:
                block = self._blocks.get(number)
                if block is None:
                    while len(self._blocks) >= BLOCKS:
                        del self._blocks[next(iter(self._blocks))]
                    block = self._blocks[number] = self._block(number)
            found.append(block[place])
        return found

    def _block(self, number: int) -> list[tuple[int, int, int]]:
        sources, nth = self.schedule.many(np.arange(number * BLOCK, (number + 1) * BLOCK, dtype=np.int64))
        starts, repeated = np.empty_like(nth), np.empty_like(nth)
        for source in range(len(self.windows)):
            mine = np.flatnonzero(sources == source)
            epochs, positions = np.divmod(nth[mine], self.windows[source])
            numbers = np.empty_like(positions)
            for epoch in np.unique(epochs).tolist():
                now = epochs == epoch
                permutation = self._permutation(source, epoch)
                numbers[now] = permutation.many(positions[now].astype(np.uint64)).astype(np.int64)
            begin = numbers * self.sequence_length
            over = np.maximum(0, begin + self.sequence_length + 1 - self.num_tokens[source])
            starts[mine], repeated[mine] = begin - over, over
        return list(zip(sources.tolist(), starts.tolist(), repeated.tolist(), strict=True))

    def epochs(self, num_samples: int) -> list[float]:
        """How many epochs of each source the first `num_samples` samples are."""
        return [t / w for t, w in zip(self.schedule.taken(num_samples), self.windows, strict=True)]
