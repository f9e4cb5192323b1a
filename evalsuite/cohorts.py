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
    ends: tokens after which a text ends, beside the tokenizer's end of text.
    """

    ids: list[int]
    most: int
    stops: tuple[str, ...]
    temperature: float = 0.0
    seed: int = 0
    ends: tuple[int, ...] = ()


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
            self.ended = len(self.made) >= self.prompt.most or token in self.prompt.ends


class Rows:
    """Rows with keys and values of their own, the newest in the same place: row r's lie from starts[r] up to `width`.

    tails: per layer keys (K, R, D, capacity) and values (K, R, capacity, D), as the products read them.
    """

    rows: list[Row]
    starts: Tensor
    width: int
    tails: list[tuple[Tensor, Tensor]]
    mask: Tensor  # of this step, added to the scores of the rows' own positions: 0, or -inf outside of a row, (R, 1, used)

    def alive(self) -> int:
        return sum(not row.ended for row in self.rows)

    def sparse(self) -> bool:
        """Whether enough rows ended to be worth a packing."""
        return self.alive() < CROWDED * len(self.rows)

    def keep(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k and v (R, K, D) of the rows' newest tokens beside what is kept: keys and values as in `tails`."""
        keys, values = self.tails[layer]
        keys[..., self.width] = k.transpose(0, 1)
        values[:, :, self.width] = v.transpose(0, 1)
        return keys, values

    def advance(self) -> None:
        """Every row has one token more."""
        self.width += 1

    def _tails_of(self, numbers: list[int], first: int) -> list[tuple[Tensor, Tensor]]:
        """The tails of some rows, without the positions before `first`."""
        index = torch.tensor(numbers, device=self.starts.device)
        return [(keys[:, index, :, first:], values[:, index, first:]) for keys, values in self.tails]

    def _make_room(self, used: int | None = None) -> None:
        """For one more position. used: positions that the step's products meet; all that there is room for unless given."""
        keys, values = self.tails[0]
        if self.width + 1 > values.shape[2]:
            self.tails = [padded(*pair, right=GROWTH) for pair in self.tails]
        place = torch.arange(used or self.tails[0][1].shape[2], device=keys.device)
        outside = (place < self.starts[:, None]) | (place > self.width)
        mask = torch.zeros(outside.shape, dtype=keys.dtype, device=keys.device).masked_fill_(outside, float("-inf"))
        self.mask = mask[:, None]


class Cohort(Rows):
    """Rows whose prompts share a prefix: its keys and values are kept once, each row's own after it.

    base: per layer keys (K, D, P) and values (K, P, D).
    """

    def __init__(
        self,
        rows: list[Row],
        base: list[tuple[Tensor, Tensor]],
        tails: list[tuple[Tensor, Tensor]],
        starts: list[int],
        width: int,
    ) -> None:
        self.rows, self.base, self.tails, self.width = rows, base, tails, width
        self.starts = torch.tensor(starts, device=base[0][0].device)
        self.prefix = base[0][1].shape[1]

    def positions(self) -> Tensor:
        """Of the rows' newest tokens, (R)."""
        return self.prefix + self.width - self.starts

    def make_room(self) -> None:
        """Before a step: one more position, and without the rows that ended, where they are many."""
        if self.sparse():
            alive = [number for number, row in enumerate(self.rows) if not row.ended]
            starts = self.starts[alive]
            first = int(starts.min())
            self.tails = self._tails_of(alive, first)
            self.rows = [self.rows[number] for number in alive]
            self.starts, self.width = starts - first, self.width - first
        self._make_room(self.width + 1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (R, H, D), k and v (R, K, D) of the rows' newest tokens: (R, H * D)."""
        base_keys, base_values = self.base[layer]
        tail_keys, tail_values = self.keep(layer, k, v)
        count, heads, width = q.shape
        groups, prefix, used = len(base_keys), self.prefix, self.width + 1
        each = heads // groups
        q = q.view(count, groups, each, width).transpose(0, 1) * width**-0.5
        q = q.reshape(groups, count * each, width)
        own = q.view(-1, each, width) @ tail_keys[..., :used].flatten(0, 1)  # (K * R, G, used)
        weights = q.new_empty(groups, count * each, prefix + used)
        weights[..., :prefix] = q @ base_keys
        torch.add(own.unflatten(0, (groups, count)), self.mask, out=weights[..., prefix:].unflatten(1, (count, each)))
        weights = weights.float().softmax(-1).to(q.dtype)
        of_own = weights[..., prefix:].view(-1, each, used) @ tail_values[:, :, :used].flatten(0, 1)  # (K * R, G, D)
        out = weights[..., :prefix] @ base_values + of_own.view(groups, -1, width)  # (K, R * G, D)
        return out.view(groups, count, -1).transpose(0, 1).reshape(count, -1)


class JoinedCohorts(Rows):
    """Several cohorts as one: the number of calls of a step no longer grows with the number of prefixes.

    Prefixes are padded to the longest, each has as many slots for rows as the largest has rows. bases: per layer keys
    (M, K, D, P) and values (M, K, P, D) of M cohorts; slot (R): of each row among M * (rows of the largest).
    """

    def __init__(self, cohorts: Sequence[Cohort]) -> None:
        device = cohorts[0].starts.device
        self.rows = [row for cohort in cohorts for row in cohort.rows]
        self.sizes = [len(cohort.rows) for cohort in cohorts]
        self.most = max(self.sizes)
        self.prefixes = [cohort.prefix for cohort in cohorts]
        self.width = max(cohort.width for cohort in cohorts)
        self.starts = torch.cat([cohort.starts + self.width - cohort.width for cohort in cohorts])
        slots = [number * self.most + i for number, size in enumerate(self.sizes) for i in range(size)]
        self.slot = torch.tensor(slots, device=device)
        self.prefix_of_row = torch.tensor(self.prefixes, device=device)[self.slot // self.most]
        room, capacity = _rounded(max(self.prefixes)), _rounded(self.width + 1)
        self.bases: list[tuple[Tensor, Tensor]] = []
        self.tails = []
        for layer in range(len(cohorts[0].base)):
            bases = [padded(*c.base[layer], right=room - c.prefix) for c in cohorts]
            keys, values = zip(*bases, strict=True)
            self.bases.append((torch.stack(keys), torch.stack(values)))
            tails = []
            for cohort in cohorts:
                left = self.width - cohort.width
                right = capacity - left - cohort.tails[layer][1].shape[2]
                tails.append(padded(*cohort.tails[layer], left=left, right=right))
            keys, values = zip(*tails, strict=True)
            self.tails.append((torch.cat(keys, 1), torch.cat(values, 1)))
        beyond = torch.arange(room, device=device) >= torch.tensor(self.prefixes, device=device)[:, None]
        self.beyond_prefix = beyond[:, None, None]  # (M, 1, 1, P)

    def positions(self) -> Tensor:
        """Of the rows' newest tokens, (R)."""
        return self.prefix_of_row + self.width - self.starts

    def split(self) -> list[Cohort]:
        """The cohorts again, without the rows that ended."""
        starts = self.starts.tolist()
        found, end = [], 0
        for number, (size, prefix) in enumerate(zip(self.sizes, self.prefixes, strict=True)):
            keep = [n for n in range(end, end + size) if not self.rows[n].ended]
            end += size
            if not keep:
                continue
            base = [(keys[number, ..., :prefix], values[number, :, :prefix]) for keys, values in self.bases]
            first = min(starts[n] for n in keep)
            rows, kept_starts = [self.rows[n] for n in keep], [starts[n] - first for n in keep]
            found.append(Cohort(rows, base, self._tails_of(keep, first), kept_starts, self.width - first))
        return found

    def make_room(self) -> None:
        """Before a step: one more position."""
        self._make_room()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (R, H, D), k and v (R, K, D) of the rows' newest tokens: (R, H * D)."""
        base_keys, base_values = self.bases[layer]
        tail_keys, tail_values = self.keep(layer, k, v)
        count, heads, width = q.shape
        cohorts, groups, _, room = base_keys.shape
        each = heads // groups
        q = q.view(count, groups, each, width) * width**-0.5  # (R, K, G, D)
        own = q.transpose(0, 1) @ tail_keys + self.mask  # (K, R, G, capacity)
        slotted = q.new_zeros(cohorts * self.most, groups, each, width).index_copy_(0, self.slot, q)
        shared = self._by_cohort(slotted) @ base_keys  # (M, K, slots * G, P)
        shared = shared.masked_fill(self.beyond_prefix, float("-inf"))
        shared = self._by_row(shared, each)  # (R, K, G, P)
        weights = torch.cat((shared, own.transpose(0, 1)), -1).float().softmax(-1).to(q.dtype)
        slotted = q.new_zeros(cohorts * self.most, groups, each, room).index_copy_(0, self.slot, weights[..., :room])
        of_base = self._by_row(self._by_cohort(slotted) @ base_values, each)  # (R, K, G, D)
        of_own = weights[..., room:].transpose(0, 1) @ tail_values  # (K, R, G, D)
        return (of_base + of_own.transpose(0, 1)).reshape(count, -1)

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


def padded(keys: Tensor, values: Tensor, left: int = 0, right: int = 0) -> tuple[Tensor, Tensor]:
    """Keys (..., D, T) and values (..., T, D) with zeros before and after their positions, or with some cut off (< 0)."""
    pad = torch.nn.functional.pad
    return pad(keys, (left, right)), pad(values, (0, 0, left, right))


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
