"""Attention inside packed documents by FlexAttention: a block-sparse kernel that torch's compiler generates (GPU only).

Blocks of queries and keys without a common document are left out, and no (T, T) mask is made: which blocks meet comes
from the smallest and largest document number of each, on the device, once for all layers.
"""

# Shapes: B batch, T positions, N = T / 128 blocks rounded up; others as in `ops.py`.

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # positions; the block size that FlexAttention's kernels are made for


def _meeting(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Of document numbers (B, T): block pairs (B, N, N) where some query may see some key, and where all see all.

    The first may hold pairs without a common document where numbers do not rise along a row: they cost time alone.
    """
    length = documents.shape[1]
    padded = torch.cat((documents, documents[:, -1:].expand(-1, -length % BLOCK)), 1).unflatten(1, (-1, BLOCK))
    least, most = padded.amin(-1), padded.amax(-1)  # (B, N)
    number = torch.arange(least.shape[1], device=documents.device)
    before, same = number[:, None] > number, number[:, None] == number
    overlap = (least[:, :, None] <= most[:, None, :]) & (most[:, :, None] >= least[:, None, :])
    one = (least == most) & (number < length // BLOCK)  # a block that the row does not fill is never whole
    whole = one[:, :, None] & one[:, None, :] & overlap & before
    return (overlap & (before | same)) & ~whole, whole


def _ordered(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (B, N, N) as FlexAttention wants them: how many in each row (B, 1, N), and which, first (B, 1, N, N).

    Contiguous: its kernels read a row of the table without asking for the stride, and sorting keeps that of its input.
    """
    order = torch.argsort(pairs.to(torch.int32), dim=-1, descending=True, stable=True)
    order = order.to(torch.int32, memory_format=torch.contiguous_format)
    return pairs.sum(-1, dtype=torch.int32).contiguous().unsqueeze(1), order.unsqueeze(1)


def layout(documents: Tensor) -> tuple[Tensor, ...]:
    """(B, T) document numbers to what `attention` takes: themselves, and the blocks that meet, by queries and by keys."""
    partial, whole = _meeting(documents)
    tables = [table for pairs in (partial, whole) for table in (*_ordered(pairs), *_ordered(pairs.transpose(1, 2)))]
    return (documents, *tables)


def block_mask(documents: tuple[Tensor, ...]) -> BlockMask:
    """FlexAttention's own form of `layout`."""
    numbers, some, which, some_q, which_q, whole, which_whole, whole_q, which_whole_q = documents

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (numbers[batch, query] == numbers[batch, key])

    length = numbers.shape[1]
    return BlockMask(
        seq_lengths=(length, length),
        kv_num_blocks=some,
        kv_indices=which,
        full_kv_num_blocks=whole,
        full_kv_indices=which_whole,
        q_num_blocks=some_q,
        q_indices=which_q,
        full_q_num_blocks=whole_q,
        full_q_indices=which_whole_q,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=allowed,
    )


@functools.cache
def _compiled() -> Any:
    """For a caller that is not compiled itself: eager FlexAttention would make all scores."""
    return torch.compile(flex_attention, dynamic=False)


def attention(q: Tensor, k: Tensor, v: Tensor, documents: tuple[Tensor, ...]) -> Tensor:
    """Causal grouped-query attention inside documents (`layout`): q (B, H, T, D), k and v (B, K, T, D) to (B, T, H * D)."""
    inside = flex_attention if torch.compiler.is_compiling() else _compiled()
    found = inside(q, k, v, block_mask=block_mask(documents), enable_gqa=q.shape[1] != k.shape[1])
    return found.transpose(1, 2).flatten(2)
