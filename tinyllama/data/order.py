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
from collections.abc import Sequence
from fractions import Fraction
from math import lcm

from tinyllama.errors import ConfigError

ROUNDS = 6


class Permutation:
    """A pseudo-random permutation of range(size), keyed by strings and numbers.

    A balanced Feistel network over the next power of four, walking the cycle until the value falls inside the range
    (Black and Rogaway, 2002). At most 4 evaluations of the network on average.
    """

    def __init__(self, size: int, *key: object) -> None:
        if size < 1:
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

    @staticmethod
    def _mix(x: int) -> int:
        """The finaliser of splitmix64 (Steele et al., 2014): every input bit reaches every output bit."""
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        return x ^ (x >> 31)


class Schedule:
    """Interleaves sources by weight. After any number of samples each count is within one of its exact share.

    The weights are taken as fractions with a denominator of at most 1000; the order of one period is Tijdeman's (1980):
    of the sources whose next sample is not too early, the one whose deadline comes first.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or any(w <= 0 for w in weights):
            raise ConfigError(f"source weights {list(weights)}", fix="every weight must be above zero")
        shares = [Fraction(w).limit_denominator(1000) for w in weights]
        if not all(shares):
            raise ConfigError(f"source weights {list(weights)}", fix="no weight may be below 0.001 of the others")
        shares = [s / sum(shares) for s in shares]
        self.shares = shares
        self.period = lcm(*(s.denominator for s in shares))
        if self.period > 1_000_000:
            raise ConfigError(f"source weights {list(weights)} repeat after {self.period}", fix="use rounder weights")
        self.counts = [int(s * self.period) for s in shares]
        self.sources: list[int] = []
        self.before: list[tuple[int, ...]] = []
        given = [0] * len(shares)
        slack = Fraction(1, 2 * len(shares) - 2) if len(shares) > 1 else Fraction(0)
        for position in range(self.period):
            self.before.append(tuple(given))
            ready = [k for k, s in enumerate(shares) if s * (position + 1) - given[k] >= slack] or list(
                range(len(shares))
            )
            chosen = min(ready, key=lambda k: ((given[k] + 1 - slack) / shares[k], k))
            self.sources.append(chosen)
            given[chosen] += 1

    def __call__(self, index: int) -> tuple[int, int]:
        """(source, how many samples of that source came before) for sample `index`."""
        round_, position = divmod(index, self.period)
        source = self.sources[position]
        return source, round_ * self.counts[source] + self.before[position][source]

    def taken(self, num_samples: int) -> list[int]:
        """How many of the first `num_samples` samples come from each source."""
        round_, position = divmod(num_samples, self.period)
        return [round_ * c + b for c, b in zip(self.counts, self.before[position], strict=True)]


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

    def __init__(self, num_tokens: Sequence[int], weights: Sequence[float], sequence_length: int, seed: int) -> None:
        for k, n in enumerate(num_tokens):
            if n < sequence_length + 1:
                raise ConfigError(
                    f"source {k} has {n:,} tokens, one sample of sequence_length={sequence_length} needs "
                    f"{sequence_length + 1:,}",
                    fix="prepare more text or shorten data.sequence_length",
                )
        self.num_tokens = tuple(num_tokens)
        self.sequence_length = sequence_length
        self.seed = seed
        self.windows = [-(-(n - 1) // sequence_length) for n in num_tokens]
        self.schedule = Schedule(weights)
        self._permutations: dict[int, tuple[int, Permutation]] = {}

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

    def epochs(self, num_samples: int) -> list[float]:
        """How many epochs of each source the first `num_samples` samples are."""
        return [t / w for t, w in zip(self.schedule.taken(num_samples), self.windows, strict=True)]
