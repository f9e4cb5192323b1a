"""Log-likelihoods of many continuations at once, every shared prefix computed once, logits only where they are read."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from evalsuite.batched_attention import BatchedTreeCache
from evalsuite.budget import Budget, is_out_of_memory, logit_rows
from evalsuite.forest import Forest, Ints, Pass, Passes
from evalsuite.transfer import to_device
from evalsuite.tree_attention import TreeCache, run_pass
from tinyllama.errors import UserError
from tinyllama.model.llama import Llama


@dataclasses.dataclass
class Work:
    """What was computed, in tokens. alone: what every distinct request would have needed by itself."""

    computed: int = 0
    tree: int = 0
    alone: int = 0
    generated: int = 0

    def add(self, other: Work) -> None:
        """Count what another has done as well."""
        for field in dataclasses.fields(Work):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def passes_of(
    model: Llama, forest: Forest, budget: Budget, keep: bool, work: Work
) -> Iterator[tuple[Pass, TreeCache, Tensor]]:
    """Run a forest pass by pass: the pass, its cache and hidden states (N, C). keep: the caches keep keys and values."""
    cuts, carried = Passes(forest), None
    device = model.lm_head.weight.device
    kind = BatchedTreeCache if budget.batches(device.type) else TreeCache
    found: tuple[TreeCache, Tensor] | None = None
    while (cut := cuts.take(budget.tokens)) is not None:
        try:
            found = _computed(model, forest, cut, kind(cut, carried, device, keep))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            found = None
            budget.halve(error)
            cuts.back()
            continue
        work.computed += cut.size
        cache, hidden = found
        carried = cache.next_carried
        yield cut, cache, hidden
        del cache, hidden


def _computed(model: Llama, forest: Forest, cut: Pass, cache: TreeCache) -> tuple[TreeCache, Tensor]:
    """A pass's cache and hidden states (N, C)."""
    return cache, run_pass(model, forest, cut, cache)


@dataclasses.dataclass(frozen=True)
class Continuation:
    """One request: what the model reads, and the targets that its last len(targets) positions are scored on."""

    read: list[int]
    targets: list[int]

    def __post_init__(self) -> None:
        if not 0 < len(self.targets) <= len(self.read):
            raise ValueError(f"{len(self.targets)} targets have no positions among {len(self.read)}")


@torch.no_grad()
def log_likelihoods(
    model: Llama,
    wanted: list[Continuation],
    budget: Budget,
    work: Work,
    report: Callable[[float], None] = lambda _: None,
) -> list[tuple[float, bool]]:
    """Sum of the targets' log-probabilities, and whether each is the most likely token, of every request in order.

    Log-probabilities are in fp32 whatever the model's dtype. report is called with the part that is done, 0 to 1. UserError
    where the model yields NaN.
    """
    if not wanted:
        return []
    forest = Forest([request.read for request in wanted])
    work.tree += forest.size
    work.alone += sum(len(forest.sequences[index]) for index in forest.order)
    spans = [(len(request.read) - len(request.targets), len(request.read)) for request in wanted]
    places = forest.places(spans)
    place = np.concatenate(places)  # of every scored position, request after request
    target = np.array([token for request in wanted for token in request.targets], dtype=np.int64)
    by_place = np.argsort(place, kind="stable")
    sorted_place = place[by_place]
    # A position that no pass reports would stay NaN, which is an error below, and not a log-probability of 0.
    scores, greedy = torch.full((len(place),), torch.nan), torch.zeros(len(place), dtype=torch.bool)

    def collect(entries: Ints, found: Tensor, done: int) -> None:
        """Fetch what a pass found: the one time that the host waits for it."""
        values = found.cpu()
        which = torch.from_numpy(entries)
        scores[which], greedy[which] = values[0], values[1] > 0
        report(done / forest.size)

    before: tuple[Ints, Tensor, int] | None = None
    for cut, _, hidden in passes_of(model, forest, budget, False, work):
        begin, end = np.searchsorted(sorted_place, [cut.start, cut.start + cut.size])
        entries = by_place[begin:end]
        found = _score_pass(model, hidden, place[entries] - cut.start, target[entries])
        if before is not None:
            collect(*before)  # only now, so that a GPU has the next pass to work on while the host waits
        before = entries, found, cut.start + cut.size
    assert before is not None
    collect(*before)
    if not torch.isfinite(scores).all():
        raise UserError("the model's log-probabilities are not numbers", fix="check the model's weights for NaN")
    ends = np.cumsum([len(p) for p in places])[:-1].tolist()
    return [
        (float(s.sum()), bool(g.all()))
        for s, g in zip(torch.tensor_split(scores, ends), torch.tensor_split(greedy, ends), strict=True)
    ]


def _score_pass(model: Llama, hidden: Tensor, position: Ints, target: Ints) -> Tensor:
    """Log-probability of each target (E) at its position in a pass of hidden states (N, C), and whether it is the most
    likely token, 1 or 0: (2, E) fp32 on the model's device. position: ascending.
    """
    device = hidden.device
    found = torch.empty(2, len(position), device=device)
    if not len(position):
        return found
    rows, row_of_entry = np.unique(position, return_inverse=True)
    at_once = logit_rows(device.type, model.config.vocab_size)
    bounds = np.searchsorted(row_of_entry, np.arange(0, len(rows) + at_once, at_once))
    rows_there, row_there, target_there = to_device([rows, row_of_entry, target], device)
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        chosen = rows_there[number * at_once : (number + 1) * at_once]
        logits = model.lm_head(hidden[chosen]).float()  # (rows, V)
        normalizer = logits.logsumexp(-1)
        best = logits.argmax(-1)
        local = row_there[begin:end] - number * at_once
        wanted = target_there[begin:end]
        found[0, begin:end] = logits[local, wanted] - normalizer[local]
        found[1, begin:end] = best[local] == wanted
    return found
