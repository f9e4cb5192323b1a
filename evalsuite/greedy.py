"""The most likely token of each row, exactly, without all of its fp32 logits.

Where the processor multiplies bfloat16 much faster than float32, the vocabulary is screened in bfloat16. The distance of a
screened logit from the true one is bounded (Cauchy and Schwarz, for what rounding took from the row and from the weights);
only tokens that the bound cannot exclude, a few in 32,000, get their fp32 logit. The choice is that of the fp32 logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinyllama.errors import UserError

HALF_STEP = 2.0**-8  # relative error of a number rounded to bfloat16, twice over
BLOCK = 64  # tokens: the smallest part of the vocabulary that is passed over as one
CROWD = 1 / 64  # of the vocabulary: with more candidates than that, all fp32 logits are cheaper


class GreedyHead:
    """Chooses tokens from final hidden states. weight (V, C): the output projection, used as it is at each call."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.screens = weight.dtype == torch.float32 and weight.device.type == "cpu" and fast_bfloat16()
        self.num_screened = self.num_candidates = 0
        if not self.screens:
            return
        self.rounded = weight.bfloat16()
        self.largest = weight.norm(dim=1).amax()
        self.lost = (weight - self.rounded.float()).norm(dim=1).amax()
        self.scratch = torch.empty(0, dtype=torch.bfloat16)

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> list[int]:
        """hidden (R, C): the index of each row's largest logit. UserError if logits are not numbers."""
        if self.screens:
            if not torch.isfinite(hidden).all():
                raise not_numbers()
            screened = self._screened(hidden)
            if screened is not None:
                return screened.tolist()
        best, index = torch.nn.functional.linear(hidden, self.weight).float().max(-1)
        numbers = torch.isfinite(best) & torch.isfinite(hidden).all(-1)
        chosen = torch.where(numbers, index, -1).tolist()  # one copy from the device says both
        if -1 in chosen:
            raise not_numbers()
        return chosen

    def _screened(self, hidden: Tensor) -> Tensor | None:
        """As __call__; None where the bound excludes too few tokens."""
        rows, width = hidden.shape
        rounded = hidden.bfloat16()
        if self.scratch.numel() < rows * len(self.weight):
            self.scratch = torch.empty(rows * len(self.weight), dtype=torch.bfloat16)
        screened = self.scratch[: rows * len(self.weight)].view(rows, -1)
        torch.mm(rounded, self.rounded.t(), out=screened)
        size = hidden.norm(dim=1)
        lost = (hidden - rounded.float()).norm(dim=1)
        # Sums of C products in float32 are off by at most C half-steps of it, in both computations.
        bound = lost * self.largest + (size + lost) * self.lost + 2 * width * 2.0**-24 * size * self.largest
        blocks = _largest_of_blocks(screened)
        top = blocks.amax(-1).float()
        lowest = top - bound - top.abs() * HALF_STEP  # the best true logit is no less
        floor = lowest - bound
        floor = floor - 2 * floor.abs() * HALF_STEP  # for the rounding of the candidate, and of the floor itself
        floor = floor.bfloat16()[:, None]
        row, token = _reaching(screened, blocks, floor)
        self.num_screened += rows
        self.num_candidates += len(row)
        if len(row) > rows * len(self.weight) * CROWD or not torch.isfinite(floor).all():  # of weights, too
            return None
        exact = (hidden[row] * self.weight[token]).sum(-1)
        if not torch.isfinite(exact).all():
            raise not_numbers()
        best = torch.full((rows,), float("-inf")).scatter_reduce_(0, row, exact, "amax")
        winners = exact == best[row]
        none = torch.full((rows,), len(self.weight))
        return none.scatter_reduce_(0, row[winners], token[winners], "amin")


def _largest_of_blocks(logits: Tensor) -> Tensor:
    """(R, V): the largest of each BLOCK of the vocabulary, the last one shorter, (R, blocks)."""
    whole = logits.shape[1] // BLOCK * BLOCK
    found = logits[:, :whole].unflatten(1, (-1, BLOCK)).amax(-1)
    if whole == logits.shape[1]:
        return found
    return torch.cat((found, logits[:, whole:].amax(-1, keepdim=True)), 1)


def _reaching(logits: Tensor, blocks: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and tokens of the logits (R, V) that are floor (R, 1) or more. blocks: as `_largest_of_blocks`.

    Blocks whose largest is below are not read again.
    """
    row, block = (blocks >= floor).nonzero(as_tuple=True)
    token = block[:, None] * BLOCK + torch.arange(BLOCK)
    reaching = logits[row[:, None], token.clamp_max(logits.shape[1] - 1)] >= floor[row]
    which, place = (reaching & (token < logits.shape[1])).nonzero(as_tuple=True)
    return row[which], token[which, place]


def fast_bfloat16() -> bool:
    """Whether this processor has instructions for bfloat16 products."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def not_numbers() -> UserError:
    """The error for a model that yields NaN."""
    return UserError("the model's logits are not numbers", fix="check the model's weights for NaN")
