"""Continues many prompts at once: shared prefixes are computed and kept once, finished rows make room for waiting ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from evalsuite.budget import Budget
from evalsuite.cohorts import GROWTH, AnyCohort, Cohort, Prompt, Row, joined, padded
from evalsuite.forest import Forest, Pass, common_length
from evalsuite.greedy import GreedyHead, not_numbers
from evalsuite.scoring import Work, passes_of
from evalsuite.transfer import to_device
from evalsuite.tree_attention import TreeCache
from tinyllama.model.llama import Llama

WORTH_SHARING = 32  # tokens: a shorter common prefix is not worth a cohort of its own
REPORTED = 8  # steps between two reports of how much is done
WINDOW = 4  # tokens beyond a stop string's length that are decoded to look for it


class CohortsCache:
    """All cohorts' newest tokens as one row of the model, in the place of a `KVCache`."""

    length = 0

    def __init__(self, cohorts: Sequence[AnyCohort]) -> None:
        self.cohorts = cohorts

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q (1, H, R, D), k and v (1, K, R, D): (1, R, H * D)."""
        sizes = [len(cohort.rows) for cohort in self.cohorts]
        parts = (t[0].transpose(0, 1).split(sizes) for t in (q, k, v))
        out = [cohort.attend(layer, *tensors) for cohort, *tensors in zip(self.cohorts, *parts, strict=True)]
        return torch.cat(out)[None]

    def advance(self, tokens: int) -> None:
        """Every row of every cohort has one token more."""
        for cohort in self.cohorts:
            cohort.advance()


class Generation:
    """One call's state: the rows, the tokenizer's part in stopping, and the counts."""

    def __init__(
        self, model: Llama, prompts: list[Prompt], eos: int, decode: Callable[[list[list[int]]], list[str]]
    ) -> None:
        self.model, self.eos, self.decode = model, eos, decode
        self.device = model.lm_head.weight.device
        self.head = GreedyHead(model.lm_head.weight)
        self.forest = Forest([prompt.ids for prompt in prompts])
        self.rows = [Row(index, prompt) for index, prompt in enumerate(prompts)]
        self.of_sequence: dict[int, list[Row]] = {}
        for row, owner in zip(self.rows, self.forest.owner, strict=True):
            if row.prompt.temperature > 0:
                row.generator = torch.Generator().manual_seed(row.prompt.seed)
            self.of_sequence.setdefault(owner, []).append(row)

    @torch.no_grad()
    def run(self, budget: Budget, work: Work, report: Callable[[float], None]) -> list[list[int]]:
        """The tokens made for each prompt, in the order of the prompts. report: called with the part of them that ended."""
        work.tree += self.forest.size
        work.alone += sum(len(row.prompt.ids) for row in self.rows)
        waiting = self._admitted(budget, work)
        cohorts: list[AnyCohort] = []
        batched = budget.batches(self.device.type)
        more, steps = True, 0
        while more or cohorts:
            changed = False
            while more and sum(cohort.alive() for cohort in cohorts) <= budget.rows // 2:
                found = next(waiting, None)
                more = found is not None
                cohorts += found or []
                changed = changed or found is not None
                report(self._part())
            cohorts = [cohort for cohort in cohorts if cohort.alive()]
            if batched and (changed or any(cohort.sparse() for cohort in cohorts)):
                cohorts = list(joined(cohorts))
            if cohorts:
                self._step(cohorts)
                work.generated += sum(len(cohort.rows) for cohort in cohorts)
            steps += 1
            if steps % REPORTED == 0:
                report(self._part())
        return [row.made for row in self.rows]

    def _part(self) -> float:
        """How much of all that may be made is made."""
        return sum(row.part() for row in self.rows) / max(1, len(self.rows))

    def _admitted(self, budget: Budget, work: Work) -> Iterator[list[Cohort]]:
        """Pass by pass, the cohorts of the prompts that it completes, each row with its first token."""
        small = Budget(min(budget.tokens, 4 * budget.rows * WORTH_SHARING), budget.rows, budget.batched)
        for cut, cache, hidden in passes_of(self.model, self.forest, small, True, work):
            finished = [p for p in cut.pieces if p.last == len(self.forest.sequences[p.sequence])]
            last = torch.tensor([p.offset + p.size - 1 for p in finished], dtype=torch.int64, device=self.device)
            rows = [self.of_sequence[piece.sequence] for piece in finished]
            counts = torch.tensor([len(of_one) for of_one in rows], dtype=torch.int64, device=self.device)
            self._take([row for of_one in rows for row in of_one], hidden[last].repeat_interleave(counts, dim=0))
            yield self._cohorts([p.sequence for p in finished], cut, cache)

    def _cohorts(self, sequences: list[int], cut: Pass, cache: TreeCache) -> list[Cohort]:
        """Cohorts of the sequences that are complete and have rows that go on."""
        sequences = [s for s in sequences if any(not row.ended for row in self.of_sequence[s])]
        return [self._cohort(members, shared, cache) for members, shared in self._shares(sequences)]

    def _shares(self, sequences: list[int]) -> list[tuple[list[int], int]]:
        """Neighbours with a long common prefix together: (sequences, tokens that all of them share)."""
        found: list[tuple[list[int], int]] = []
        for sequence in sequences:
            ids = self.forest.sequences[sequence]
            if found:
                members, shared = found[-1]
                common = common_length(self.forest.sequences[members[-1]], ids)
                now = common if len(members) == 1 else min(shared, common)
                loses = len(members) > 1 and shared >= WORTH_SHARING and now < shared / 2
                could_win = len(members) > 1 and common >= 2 * shared + WORTH_SHARING
                if not loses and not could_win:
                    found[-1] = ([*members, sequence], now)
                    continue
            found.append(([sequence], len(ids) - 1))
        return found

    def _cohort(self, sequences: list[int], shared: int, cache: TreeCache) -> Cohort:
        rows = [row for s in sequences for row in self.of_sequence[s] if not row.ended]
        paths = [cache.paths[s] for s in sequences]
        which = [n for n, s in enumerate(sequences) for row in self.of_sequence[s] if not row.ended]
        lengths = [len(paths[n]) - shared for n in which]
        width = max(lengths)
        own = np.zeros((len(which), width), dtype=np.int64)
        for row_of_own, n, length in zip(own, which, lengths, strict=True):
            row_of_own[width - length :] = paths[n][shared:]
        base_rows, own_rows = to_device([paths[0][:shared], own], self.device)
        base, tails = [], []
        for keys, values in zip(cache.keys, cache.values, strict=True):
            base.append((keys[:, base_rows].transpose(1, 2).contiguous(), values[:, base_rows]))
            own_keys = keys[:, own_rows].transpose(2, 3)  # (K, R, D, width)
            grown = padded(own_keys, values[:, own_rows], right=GROWTH)
            tails.append((grown[0].contiguous(), grown[1].contiguous()))
        return Cohort(rows, base, tails, [width - length for length in lengths], width)

    def _step(self, cohorts: Sequence[AnyCohort]) -> None:
        """One token more for every row of every cohort."""
        for cohort in cohorts:
            cohort.make_room()
        rows = [row for cohort in cohorts for row in cohort.rows]
        # A row that ended but was not yet cleared away is computed once more and not listened to.
        newest = [row.made[-1] if row.made else self.eos for row in rows]
        ids = torch.tensor([newest], device=self.device)
        positions = torch.cat([cohort.positions() for cohort in cohorts])[None]
        hidden = self.model.model(ids, positions=positions, cache=CohortsCache(cohorts))
        self._take(rows, hidden[0])

    def _take(self, rows: list[Row], hidden: Tensor) -> None:
        """Choose a token for each row that goes on, from final hidden states (R, C); end those that meet a stop string."""
        live = [number for number, row in enumerate(rows) if not row.ended]
        if not live:
            return
        drawn = [number for number in live if rows[number].generator is not None]
        tokens = dict(zip(drawn, self._draw([rows[number] for number in drawn], hidden[drawn]), strict=True))
        if len(drawn) < len(live):
            best = self.head(hidden)
            tokens = {number: tokens.get(number, best[number]) for number in live}
        for number in live:
            rows[number].take(tokens[number], self.eos)
        going = [rows[number] for number in live if not rows[number].ended and rows[number].prompt.stops]
        windows = [row.made[-(max(map(len, row.prompt.stops)) + WINDOW) :] for row in going]
        for row, text in zip(going, self.decode(windows) if windows else [], strict=True):
            row.ended = any(stop and stop in text for stop in row.prompt.stops)

    def _draw(self, rows: list[Row], hidden: Tensor) -> list[int]:
        """A token for each of the rows that sample, from hidden (R, C), each from its own stream."""
        if not rows:
            return []
        logits = self.model.lm_head(hidden).float().cpu()
        if not torch.isfinite(logits).all():
            raise not_numbers()
        drawn = []
        for row, row_logits in zip(rows, logits, strict=True):
            chances = (row_logits / row.prompt.temperature).softmax(-1)
            drawn.append(int(torch.multinomial(chances, 1, generator=row.generator)))
        return drawn


def seed_of(ids: list[int], repeat: int, seed: int) -> int:
    """A row's own seed: of its prompt and of which repetition it is, whatever order requests come in."""
    return int(np.random.SeedSequence([seed, repeat, len(ids), *ids]).generate_state(1, np.uint64)[0] >> 1)
