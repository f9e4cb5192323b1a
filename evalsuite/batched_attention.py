"""Tree attention for a GPU: few calls of few shapes, where `tree_attention` makes one small call per group of pieces.

A pass is cut into blocks of QUERIES positions. Tokens lie in depth-first order, so every earlier token that a block needs
lies on the path to its first token; its keys are that path and the block itself. Blocks with paths of similar length go
into one call, their keys padded to one of a few lengths. Who sees whom is a comparison on the device: token j is seen by
the positions from j to the end of j's subtree. The heads that share a key head are rows of one product, so keys and
values are never repeated. Runs on any device; `tree_attention` is faster on a CPU, which pays for padding, not for calls.
"""

# Shapes: N tokens of the pass, B blocks of a call, Q positions of a block, S keys of a call, P = S - Q of them on the
# path, H query heads, K key heads, G = H / K, D width of a head.

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from evalsuite.forest import Ints, Pass
from evalsuite.transfer import to_device
from evalsuite.tree_attention import TreeCache

QUERIES = 128  # positions of a block
BLOCKS, FEW = 128, 16  # of a call: most, and what is not split for the sake of padding; a power of two
KEYS = 256  # the lengths of a call's keys are this, times 1, 1.5, 2, 3, 4, 6, 8, ...


def padded_keys(needed: int) -> int:
    """The length S of a call's keys that holds `needed` of them, its blocks' own QUERIES included."""
    length = KEYS
    while length < needed:
        if length * 3 // 2 >= needed:
            return length * 3 // 2
        length *= 2
    return length


def subtree_ends(cut: Pass) -> Ints:
    """Of each token in the store (carried path, then the pass): the position in the pass at which its subtree ends.

    Position i >= j sees the token at position j exactly if i is before j's end; the whole pass comes after the carried path.
    """
    until = np.full(max(piece.last for piece in cut.pieces), cut.size, dtype=np.int64)  # of a token at each depth
    ends = np.empty(cut.carried + cut.size, dtype=np.int64)
    for piece in reversed(cut.pieces):
        begin = cut.carried + piece.offset
        ends[begin : begin + piece.size] = until[piece.first : piece.last]
        until[piece.first :] = piece.offset
    ends[: cut.carried] = until[: cut.carried]
    return ends


def block_paths(cut: Pass) -> list[Ints]:
    """For each block the store's rows of the path to its first token."""
    path = np.empty(max(piece.last for piece in cut.pieces), dtype=np.int64)
    path[: cut.carried] = np.arange(cut.carried)
    found = []
    for piece in cut.pieces:
        path[piece.first : piece.last] = cut.carried + piece.offset + np.arange(piece.size)
        first_block = -(-piece.offset // QUERIES) * QUERIES
        for start in range(first_block, piece.offset + piece.size, QUERIES):
            found.append(path[: piece.first + start - piece.offset].copy())
    return found


def blocks_of_call(keys: list[int]) -> int:
    """How many of the blocks, the ones of most keys first, go into one call: a power of two. keys: padded, of each block.

    Halved down to FEW while the last block would be padded to more than twice its length.
    """
    size = BLOCKS
    while size > 1 and size // 2 >= len(keys):
        size //= 2
    while size > FEW and 2 * keys[min(size, len(keys)) - 1] < keys[0]:
        size //= 2
    return size


def calls_of(paths: list[Ints]) -> list[tuple[Ints, Ints]]:
    """The blocks of each call (B), and the store's rows of the paths to them (B, P), -1 where a path is shorter.

    Blocks beyond the pass fill up the last call.
    """
    order = sorted(range(len(paths)), key=lambda block: -len(paths[block]))
    keys = [padded_keys(len(paths[block]) + QUERIES) for block in order]
    found, first = [], 0
    while first < len(order):
        size = blocks_of_call(keys[first:])
        chosen = order[first : first + size]
        blocks = np.array([*chosen, *range(len(paths), len(paths) + size - len(chosen))], dtype=np.int64)
        rows = np.full((size, keys[first] - QUERIES), -1, dtype=np.int64)
        for row, block in zip(rows, chosen, strict=False):
            row[: len(paths[block])] = paths[block]
        found.append((blocks, rows))
        first += size
    return found


@dataclasses.dataclass
class Call:
    """blocks (B) of the pass; keys (B, S), rows of the store; seen (B, Q, S), who sees whom; mask, the same as a summand."""

    blocks: Tensor
    keys: Tensor
    seen: Tensor
    mask: Tensor | None = None

    def summand(self, groups: int, dtype: torch.dtype) -> Tensor:
        """0 where a key is seen, else -inf, (B, 1, G * Q, S): made once per pass, not once per layer."""
        if self.mask is None:
            mask = torch.zeros(self.seen.shape, dtype=dtype, device=self.seen.device)
            mask.masked_fill_(~self.seen, float("-inf"))
            self.mask = mask.repeat(1, groups, 1).unsqueeze(1)
        return self.mask


def _call(blocks: Tensor, path: Tensor, ends: Tensor, carried: int, size: int) -> Call:
    """blocks (B), path (B, P) as `calls_of` gives them, ends as `subtree_ends`; all on the device."""
    at = blocks[:, None] * QUERIES + torch.arange(QUERIES, device=blocks.device)  # (B, Q), positions in the pass
    own = (carried + at).clamp_max(carried + size - 1)
    # What lies beyond the pass sees itself, so that no row of a softmax is empty.
    own_ends = torch.where(at < size, ends[own], at + 1)
    on_path = path.clamp_min(0)
    path_ends = torch.where(path >= 0, ends[on_path], 0)
    key_ends = torch.cat((path_ends, own_ends), 1)[:, None, :]
    key_at = torch.cat((torch.full_like(path, -1), at), 1)[:, None, :]
    queries_at = at[:, :, None]
    return Call(blocks, torch.cat((on_path, own), 1), (key_at <= queries_at) & (queries_at < key_ends))


def kernels(device_type: str) -> list[SDPBackend] | None:
    """Torch's attention kernels that may be used; None: its own choice. cuDNN would plan anew for each shape."""
    return [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH] if device_type == "cuda" else None


class BatchedTreeCache(TreeCache):
    """`TreeCache` with its attention in calls of many blocks."""

    def _prepare(self, cut: Pass, device: torch.device) -> None:
        paths = block_paths(cut)
        calls = calls_of(paths)
        self.num_blocks = int(max(blocks.max() for blocks, _ in calls)) + 1
        flat = [array for call in calls for array in call]
        ends, *arrays = to_device([subtree_ends(cut), *flat], device)
        pairs = zip(arrays[::2], arrays[1::2], strict=True)
        self.calls = [_call(blocks, path, ends, cut.carried, cut.size) for blocks, path in pairs]

    def _attention(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """q (1, H, N, D) over the store's keys and values (K, carried + N, D): (1, N, H * D)."""
        _, heads, size, width = q.shape
        groups = heads // keys.shape[0]
        rows = F.pad(q[0].transpose(0, 1), (0, 0, 0, 0, 0, self.num_blocks * QUERIES - size))
        rows = rows.view(self.num_blocks, QUERIES, -1, groups, width)  # (blocks, Q, K, G, D)
        out = torch.empty_like(rows)
        allowed = kernels(q.device.type)
        with sdpa_kernel(allowed) if allowed else contextlib.nullcontext():
            for call in self.calls:
                queries = rows[call.blocks].permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B, K, G * Q, D)
                its_keys, its_values = (t[:, call.keys].transpose(0, 1) for t in (keys, values))  # (B, K, S, D)
                mask = call.summand(groups, q.dtype)
                found = F.scaled_dot_product_attention(queries, its_keys, its_values, attn_mask=mask)
                found = found.unflatten(2, (groups, QUERIES))  # (B, K, G, Q, D)
                out[call.blocks] = found.permute(0, 3, 1, 2, 4)
        return out.view(1, -1, heads * width)[:, :size]

    def advance(self, tokens: int) -> None:
        """All layers have attended: the masks are not needed any more."""
        self.calls = []
