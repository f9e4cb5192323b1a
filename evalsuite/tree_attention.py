"""Runs the passes of a forest through our Llama: attention along the paths of the tree, the rest of the model dense.

All tokens of a pass lie in one row without padding. Attention alone knows of the tree: pieces that lie together are
taken in groups, a group's queries against the path to it and the group's own keys, with a mask of who descends from whom.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from evalsuite.forest import Forest, Ints, Pass, Piece
from evalsuite.transfer import to_device
from tinyllama.model import ops
from tinyllama.model.llama import Llama

# A group grows while what its mask wastes stays small beside the path that it would otherwise copy again.
GROUP_TOKENS, GROUP_SHARE, LOST_PATH = 128, 4, 64
# A long piece attends in blocks, so that no query meets the many keys after it.
BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Group:
    """Queries [first, last) of a pass; the store's rows of the path to them; mask (queries, path + queries)."""

    first: int
    last: int
    path: Tensor | slice
    mask: Tensor


def grouped(pieces: list[Piece]) -> list[list[Piece]]:
    """Consecutive pieces, the long ones cut into blocks, in groups that attend together."""
    groups: list[list[Piece]] = []
    size = 0
    for piece in itertools.chain.from_iterable(map(_blocks, pieces)):
        base = groups[-1][0].first if groups else 0
        limit = GROUP_TOKENS + base // GROUP_SHARE
        if groups and size + piece.size <= limit and base - piece.first <= LOST_PATH:
            groups[-1].append(piece)
            size += piece.size
        else:
            groups.append([piece])
            size = piece.size
    return groups


def _blocks(piece: Piece) -> Iterator[Piece]:
    """The piece itself, or its parts of up to BLOCK tokens."""
    for first in range(piece.first, piece.last, BLOCK):
        last = min(first + BLOCK, piece.last)
        yield Piece(piece.sequence, first, last, piece.offset + first - piece.first)


def _mask(pieces: list[Piece]) -> Tensor:
    """Who sees whom in a group: (queries, path + queries), True for a token itself and what it continues."""
    base, queries = pieces[0].first, sum(piece.size for piece in pieces)
    mask = np.zeros((queries, base + queries), dtype=bool)
    column = np.zeros(max(piece.last for piece in pieces), dtype=np.int64)  # of each depth on the current path
    column[:base] = np.arange(base)
    row = 0
    for piece in pieces:
        column[piece.first : piece.last] = base + row + np.arange(piece.size)
        causal = np.arange(piece.last)[None] <= np.arange(piece.first, piece.last)[:, None]
        mask[row : row + piece.size, column[: piece.last]] = causal
        row += piece.size
    return torch.from_numpy(mask)


class TreeCache:
    """One pass's keys and values, in the place of a `KVCache`: the carried path first, then the pass's tokens.

    carried: per layer keys and values (K, carried, D), or None. After the forward pass `next_carried` is what the next
    pass needs; with keep, `paths[sequence]` are the rows of `keys` and `values` that make up a sequence.
    """

    length = 0  # positions are given, a mask is not: the decoder must not make its own

    def __init__(
        self, cut: Pass, carried: list[tuple[Tensor, Tensor]] | None, device: torch.device, keep: bool = False
    ) -> None:
        self.carried, self.keep = carried, keep
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.next_carried: list[tuple[Tensor, Tensor]] = []
        self.paths = _paths(cut)
        self._prepare(cut, device)
        following = self.paths[cut.pieces[-1].sequence][: cut.next_carried]
        self._next = _rows(following, device)

    def _prepare(self, cut: Pass, device: torch.device) -> None:
        """What all layers' attention has in common."""
        self.groups: list[Group] = []
        for pieces in grouped(cut.pieces):
            path = self.paths[pieces[0].sequence][: pieces[0].first]
            first = pieces[0].offset
            last = pieces[-1].offset + pieces[-1].size
            self.groups.append(Group(first, last, _rows(path, device), _mask(pieces).to(device)))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q (1, H, N, D), k and v (1, K, N, D) of the pass: (1, N, H * D)."""
        keys, values = k[0], v[0]
        if self.carried is not None:
            old_keys, old_values = self.carried[layer]
            keys, values = torch.cat((old_keys, keys), 1), torch.cat((old_values, values), 1)
        out = self._attention(q, keys, values)
        self.next_carried.append((keys[:, self._next].clone(), values[:, self._next].clone()))
        if self.keep:
            self.keys.append(keys)
            self.values.append(values)
        return out

    def _attention(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """q (1, H, N, D) over the store's keys and values (K, carried + N, D): (1, N, H * D)."""
        past = keys.shape[1] - q.shape[2]
        out = q.new_empty(1, q.shape[2], q.shape[1] * q.shape[3])
        for group in self.groups:
            own = slice(past + group.first, past + group.last)
            if isinstance(group.path, slice) and group.path.stop == own.start:
                seen_keys, seen_values = keys[:, : own.stop], values[:, : own.stop]
            else:
                seen_keys = torch.cat((keys[:, group.path], keys[:, own]), 1)
                seen_values = torch.cat((values[:, group.path], values[:, own]), 1)
            queries = q[:, :, group.first : group.last]
            out[:, group.first : group.last] = ops.sdpa(queries, seen_keys[None], seen_values[None], group.mask)
        return out

    def advance(self, tokens: int) -> None:
        """Nothing to count: a pass is one call."""


def _paths(cut: Pass) -> dict[int, Ints]:
    """For each piece's sequence its rows in the store (carried path, then the pass's tokens), up to the piece's last."""
    longest = max(piece.last for piece in cut.pieces)
    path = np.zeros(longest, dtype=np.int64)
    path[: cut.carried] = np.arange(cut.carried)
    found = {}
    for piece in cut.pieces:
        path[piece.first : piece.last] = cut.carried + piece.offset + np.arange(piece.size)
        found[piece.sequence] = path[: piece.last].copy()
    return found


def _rows(path: Ints, device: torch.device) -> Tensor | slice:
    """Rows of the store, as a slice where they are its beginning."""
    if not len(path) or path[-1] == len(path) - 1:
        return slice(0, len(path))
    return to_device([path], device)[0]


def run_pass(model: Llama, forest: Forest, cut: Pass, cache: TreeCache) -> Tensor:
    """Hidden states (N, C) of a pass's tokens; `cache` then holds the keys and values."""
    device = model.lm_head.weight.device
    depths = np.concatenate([np.arange(piece.first, piece.last) for piece in cut.pieces])
    ids, positions = to_device([forest.tokens[cut.start : cut.start + cut.size], depths], device)
    return model.model(ids[None], positions=positions[None], cache=cache)[0]
