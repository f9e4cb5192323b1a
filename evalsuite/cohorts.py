"""Rows that are being continued, by the prefix that they share, and attention of their newest tokens.

`Cohort` attends by itself, as suits a CPU. On a GPU cohorts are joined (`JoinedCohorts`): one attention for many of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

GROWTH = 32  # positions by which the rows' own keys and values grow
CROWDED = 0.75  # of a cohort's rows must be alive, else it is packed anew
SPARE = 256  # slots beyond two per row, so that many prefixes of one row each are joined


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One request: tokens to continue by at most `most` others, the strings that end it, and how a token is chosen.

    temperature 0 takes the most likely token; otherwise tokens are drawn from `seed`'s own stream, whatever else runs.
    """

    ids: list[int]
    most: int
    stops: tuple[str, ...]
    temperature: float = 0.0
    seed: int = 0


@dataclasses.dataclass
class Row:
    """A prompt that is being continued. index: among the requests."""

    index: int
    prompt: Prompt
    made: list[int] = dataclasses.field(default_factory=list)
    ended: bool = False
    generator: torch.Generator | None = None

    def part(self) -> float:
        """How much of what it may make is made; 1 when it has ended."""
        return 1.0 if self.ended else len(self.made) / self.prompt.most

    def take(self, token: int, eos: int) -> None:
        """The next token; the end of text is not kept."""
        self.ended = token == eos
        if not self.ended:
            self.made.append(token)
            self.ended = len(self.made) >= self.prompt.most


class Rows:
    """Rows with keys and values of their own: row r has lengths[r] positions, at most `width`."""

    rows: list[Row]
    lengths: Tensor
    width: int

    def alive(self) -> int:
        return sum(not row.ended for row in self.rows)

    def sparse(self) -> bool:
        """Whether enough rows ended to be worth a packing."""
        return self.alive() < CROWDED * len(self.rows)

    def advance(self) -> None:
        """Every row has one token more."""
        self.lengths += 1
        self.width += 1


class Cohort(Rows):
    """Rows whose prompts share a prefix: its keys and values are kept once, each row's own after it.

    base: per layer keys and values (K, P, D). tails: per layer (R, K, capacity, D), row r filled up to lengths[r].
    """

    def __init__(
        self, rows: list[Row], base: list[tuple[Tensor, Tensor]], tails: list[tuple[Tensor, Tensor]], lengths: list[int]
    ) -> None:
        self.rows, self.base, self.tails = rows, base, tails
        self.lengths = torch.tensor(lengths, device=base[0][0].device)
        self.width = max(lengths)

    @property
    def prefix(self) -> int:
        return self.base[0][0].shape[1]

    def positions(self) -> Tensor:
        """Of the rows' newest tokens, (R)."""
        return self.prefix + self.lengths

    def make_room(self) -> None:
        """Before a step: one more position, and without the rows that ended, where they are many."""
        if self.sparse():
            alive = [number for number, row in enumerate(self.rows) if not row.ended]
            keep = torch.tensor(alive, device=self.lengths.device)
            self.rows = [self.rows[number] for number in alive]
            self.lengths = self.lengths[keep]
            self.tails = [(keys[keep], values[keep]) for keys, values in self.tails]
            self.width = int(self.lengths.max())
        if self.width + 1 > self.tails[0][0].shape[2]:
            grow = (0, 0, 0, GROWTH)
            self.tails = [tuple(torch.nn.functional.pad(t, grow) for t in pair) for pair in self.tails]  # type: ignore[misc]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (R, H, D), k and v (R, K, D) of the rows' newest tokens: (R, H * D)."""
        base_keys, base_values = self.base[layer]
        tail_keys, tail_values = self.tails[layer]
        count, heads, width = q.shape
        groups = base_keys.shape[0]
        each = heads // groups
        number = torch.arange(count, device=q.device)
        tail_keys[number, :, self.lengths] = k
        tail_values[number, :, self.lengths] = v
        used = self.width + 1
        q = q.view(count, groups, each, width) * width**-0.5  # (R, K, G, D)
        own = q @ tail_keys[:, :, :used].transpose(2, 3)  # (R, K, G, used)
        beyond = torch.arange(used, device=q.device) > self.lengths[:, None]
        own = own.masked_fill(beyond[:, None, None], float("-inf"))
        shared = q.transpose(0, 1).reshape(groups, count * each, width) @ base_keys.transpose(1, 2)  # (K, R * G, P)
        shared = shared.view(groups, count, each, self.prefix).transpose(0, 1)  # (R, K, G, P)
        weights = torch.cat((shared, own), -1).float().softmax(-1).to(q.dtype)
        of_base = weights[..., : self.prefix].transpose(0, 1).reshape(groups, count * each, self.prefix) @ base_values
        of_base = of_base.view(groups, count, each, width).transpose(0, 1)  # (R, K, G, D)
        return (of_base + weights[..., self.prefix :] @ tail_values[:, :, :used]).reshape(count, -1)


class JoinedCohorts(Rows):
    """Several cohorts as one: the number of calls of a step no longer grows with the number of prefixes.

    Prefixes are padded to the longest, each has as many slots for rows as the largest has rows. bases: per layer keys and
    values (M, K, P, D) of M cohorts; tails: per layer (R, K, capacity, D), row r filled up to lengths[r]; slot (R): of each
    row among M * (rows of the largest).
    """

    def __init__(self, cohorts: Sequence[Cohort]) -> None:
        device = cohorts[0].lengths.device
        self.rows = [row for cohort in cohorts for row in cohort.rows]
        self.sizes = [len(cohort.rows) for cohort in cohorts]
        self.most = max(self.sizes)
        self.prefixes = [cohort.prefix for cohort in cohorts]
        self.width = max(cohort.width for cohort in cohorts)
        self.lengths = torch.cat([cohort.lengths for cohort in cohorts])
        slots = [number * self.most + i for number, size in enumerate(self.sizes) for i in range(size)]
        self.slot = torch.tensor(slots, device=device)
        self.prefix_of_row = torch.tensor(self.prefixes, device=device)[self.slot // self.most]
        room, capacity = _rounded(max(self.prefixes)), _rounded(self.width + 1)
        self.bases, self.tails = [], []
        for layer in range(len(cohorts[0].base)):
            base = zip(*(cohort.base[layer] for cohort in cohorts), strict=True)
            self.bases.append(tuple(torch.stack([_padded(t, room) for t in tensors]) for tensors in base))
            tail = zip(*(cohort.tails[layer] for cohort in cohorts), strict=True)
            self.tails.append(tuple(torch.cat([_padded(t, capacity) for t in tensors]) for tensors in tail))
        beyond = torch.arange(room, device=device) >= torch.tensor(self.prefixes, device=device)[:, None]
        self.beyond_prefix = beyond[:, None, None]  # (M, 1, 1, P)

    def positions(self) -> Tensor:
        """Of the rows' newest tokens, (R)."""
        return self.prefix_of_row + self.lengths

    def split(self) -> list[Cohort]:
        """The cohorts again, without the rows that ended."""
        lengths = self.lengths.tolist()
        found, first = [], 0
        for number, (size, prefix) in enumerate(zip(self.sizes, self.prefixes, strict=True)):
            keep = [n for n in range(first, first + size) if not self.rows[n].ended]
            first += size
            if not keep:
                continue
            index = torch.tensor(keep, device=self.lengths.device)
            base = [(keys[number, :, :prefix], values[number, :, :prefix]) for keys, values in self.bases]
            tails = [(keys[index], values[index]) for keys, values in self.tails]
            found.append(Cohort([self.rows[n] for n in keep], base, tails, [lengths[n] for n in keep]))
        return found

    def make_room(self) -> None:
        """Before a step: one more position."""
        if self.width + 1 > self.tails[0][0].shape[2]:
            self.tails = [tuple(_padded(t, t.shape[2] + GROWTH) for t in pair) for pair in self.tails]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (R, H, D), k and v (R, K, D) of the rows' newest tokens: (R, H * D)."""
        (base_keys, base_values), (tail_keys, tail_values) = self.bases[layer], self.tails[layer]
        count, heads, width = q.shape
        cohorts, groups, room, _ = base_keys.shape
        each = heads // groups
        number = torch.arange(count, device=q.device)
        tail_keys[number, :, self.lengths] = k
        tail_values[number, :, self.lengths] = v
        q = q.view(count, groups, each, width) * width**-0.5  # (R, K, G, D)
        own = q @ tail_keys.transpose(2, 3)  # (R, K, G, capacity)
        beyond = torch.arange(tail_keys.shape[2], device=q.device) > self.lengths[:, None]
        own = own.masked_fill(beyond[:, None, None], float("-inf"))
        slotted = q.new_zeros(cohorts * self.most, groups, each, width).index_copy_(0, self.slot, q)
        shared = self._by_cohort(slotted) @ base_keys.transpose(2, 3)  # (M, K, slots * G, P)
        shared = shared.masked_fill(self.beyond_prefix, float("-inf"))
        shared = self._by_row(shared, each)  # (R, K, G, P)
        weights = torch.cat((shared, own), -1).float().softmax(-1).to(q.dtype)
        slotted = q.new_zeros(cohorts * self.most, groups, each, room).index_copy_(0, self.slot, weights[..., :room])
        of_base = self._by_row(self._by_cohort(slotted) @ base_values, each)  # (R, K, G, D)
        return (of_base + weights[..., room:] @ tail_values).reshape(count, -1)

    def _by_cohort(self, slotted: Tensor) -> Tensor:
        """(M * slots, K, G, W) as rows of one product for each prefix and key head: (M, K, slots * G, W)."""
        return slotted.unflatten(0, (-1, self.most)).transpose(1, 2).flatten(2, 3)

    def _by_row(self, product: Tensor, each: int) -> Tensor:
        """(M, K, slots * G, W) back to the rows: (R, K, G, W)."""
        return product.unflatten(2, (self.most, each)).transpose(1, 2).flatten(0, 1)[self.slot]


AnyCohort = Cohort | JoinedCohorts


def _rounded(size: int) -> int:
    """Up to a multiple of GROWTH."""
    return -(-size // GROWTH) * GROWTH


def _padded(tensor: Tensor, size: int) -> Tensor:
    """(..., T, D) with T positions of zeros after it, or of room that nothing fills cut off: (..., size, D)."""
    return torch.nn.functional.pad(tensor, (0, 0, 0, size - tensor.shape[-2]))


def together(sizes: Sequence[int]) -> list[list[int]]:
    """Which cohorts of these numbers of rows are joined: at most two slots per row, and SPARE for few rows."""
    found: list[list[int]] = []
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        if found:
            members = [*found[-1], number]
            if sizes[members[0]] * len(members) <= 2 * sum(sizes[m] for m in members) + SPARE:
                found[-1] = members
                continue
        found.append([number])
    return found


def joined(cohorts: Sequence[AnyCohort]) -> list[JoinedCohorts]:
    """All rows of the cohorts that go on, in few joined cohorts."""
    parts = [part for c in cohorts for part in (c.split() if isinstance(c, JoinedCohorts) else [c])]
    return [JoinedCohorts([parts[number] for number in members]) for members in together([len(p.rows) for p in parts])]
