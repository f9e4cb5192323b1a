"""Log-likelihoods of many continuations at once, every shared prefix computed once, logits only where they are read."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from evalsuite.forest import Forest, Pass, Passes
from evalsuite.tree_attention import TreeCache, run_pass
from tinyllama import host_memory
from tinyllama.errors import UserError
from tinyllama.model.llama import Llama

LOGIT_ROWS = 512  # positions whose logits (V each, fp32) exist at a time
SMALLEST_PASS = 64


@dataclasses.dataclass
class Work:
    """What was computed, in tokens. alone: what every distinct request would have needed by itself."""

    computed: int = 0
    tree: int = 0
    alone: int = 0
    generated: int = 0


@dataclasses.dataclass
class Budget:
    """How much goes through the model at once: tokens of a pass, rows of a generation step. Halved where memory ends."""

    tokens: int
    rows: int

    def halve(self, error: Exception) -> None:
        """After an out-of-memory error: half of it, or the error again where little is left."""
        if self.tokens <= SMALLEST_PASS:
            raise UserError(
                f"not enough memory for a pass of {self.tokens} tokens", fix="use a smaller dtype or a larger machine"
            ) from error
        self.tokens, self.rows = self.tokens // 2, max(1, self.rows // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        host_memory.trim()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory ended, on a GPU or in the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def passes_of(
    model: Llama, forest: Forest, budget: Budget, keep: bool, work: Work
) -> Iterator[tuple[Pass, TreeCache, Tensor]]:
    """Run a forest pass by pass: the pass, its cache and hidden states (N, C). keep: the caches keep keys and values."""
    cuts, carried = Passes(forest), None
    device = model.lm_head.weight.device
    while (cut := cuts.take(budget.tokens)) is not None:
        try:
            cache = TreeCache(cut, carried, device, keep)
            hidden = run_pass(model, forest, cut, cache)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            budget.halve(error)
            cuts.back()
            continue
        work.computed += cut.size
        carried = cache.next_carried
        yield cut, cache, hidden


@dataclasses.dataclass(frozen=True)
class Continuation:
    """One request: what the model reads, and the targets that its last len(targets) positions are scored on."""

    read: list[int]
    targets: list[int]


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
    target = torch.tensor([token for request in wanted for token in request.targets])
    by_place = np.argsort(place, kind="stable")
    sorted_place = place[by_place]
    scores, greedy = torch.zeros(len(place)), torch.zeros(len(place), dtype=torch.bool)
    for cut, _, hidden in passes_of(model, forest, budget, False, work):
        begin, end = np.searchsorted(sorted_place, [cut.start, cut.start + cut.size])
        _score_pass(model, cut, hidden, by_place[begin:end], place, target, scores, greedy)
        report((cut.start + cut.size) / forest.size)
    if not torch.isfinite(scores).all():
        raise UserError("the model's log-probabilities are not numbers", fix="check the model's weights for NaN")
    ends = np.cumsum([len(p) for p in places])[:-1].tolist()
    return [
        (float(s.sum()), bool(g.all()))
        for s, g in zip(torch.tensor_split(scores, ends), torch.tensor_split(greedy, ends), strict=True)
    ]


def _score_pass(
    model: Llama,
    cut: Pass,
    hidden: Tensor,
    entries: np.ndarray,
    place: np.ndarray,
    target: Tensor,
    scores: Tensor,
    greedy: Tensor,
) -> None:
    """Fill in the scores of the entries (indices into place) whose positions lie in this pass."""
    if not len(entries):
        return
    rows, row_of_entry = np.unique(place[entries] - cut.start, return_inverse=True)
    bounds = np.searchsorted(row_of_entry, np.arange(0, len(rows) + LOGIT_ROWS, LOGIT_ROWS))
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        chosen = rows[number * LOGIT_ROWS : (number + 1) * LOGIT_ROWS]
        logits = model.lm_head(hidden[torch.from_numpy(chosen).to(hidden.device)]).float()  # (rows, V)
        normalizer = logits.logsumexp(-1)
        best = logits.argmax(-1)
        local = torch.from_numpy(row_of_entry[begin:end] - number * LOGIT_ROWS).to(hidden.device)
        which = torch.from_numpy(entries[begin:end])
        wanted = target[which].to(hidden.device)
        scores[which] = (logits[local, wanted] - normalizer[local]).cpu()
        greedy[which] = (best[local] == wanted).cpu()
