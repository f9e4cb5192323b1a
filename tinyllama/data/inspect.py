"""What a person wants to know of a token store: counts, lengths, special tokens, decoded samples."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama.data.store import AGAIN, CHUNK_TOKENS, SPLITS, TokenStore
from tinyllama.errors import DataError
from tinyllama.tokenizer.sentencepiece_model import BYTE, Tokenizer

SAMPLE_TOKENS = 120


def unigram_entropy(directory: str | os.PathLike[str], split: str = "validation") -> float:
    """Entropy of the split's token frequencies, in nats: the loss of a model that knows frequencies and no context."""
    counts, _ = _count(TokenStore(directory, split), 0)
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(-(shares * np.log(shares)).sum())


def _count(store: TokenStore, special: int) -> tuple[np.ndarray, list[int]]:
    """How often each id occurs, and the longest run of each of the first `special` ids. Reads the split in pieces."""
    counts = np.zeros(store.manifest.vocab_size, dtype=np.int64)
    longest, current = [0] * special, [0] * special
    for start in range(0, store.num_tokens, CHUNK_TOKENS):
        piece = store.read(start, min(CHUNK_TOKENS, store.num_tokens - start))
        largest = int(piece.max())
        if largest >= len(counts):
            raise DataError(f"{store.directory} holds token {largest} of {len(counts)}", fix=AGAIN)
        counts += np.bincount(piece, minlength=len(counts))
        for token in range(special):
            # Borders of runs, with the run that reaches over from the piece before.
            edges = np.flatnonzero(np.diff(np.concatenate(([0], (piece == token).view(np.int8), [0]))))
            lengths = edges[1::2] - edges[::2]
            if len(lengths) and edges[0] == 0:
                lengths[0] += current[token]
            longest[token] = max([longest[token], *lengths[-1:].tolist(), int(lengths.max(initial=0))])
            current[token] = int(lengths[-1]) if len(lengths) and edges[-1] == len(piece) else 0
    return counts, longest


def describe(directory: str | os.PathLike[str], tokenizer: Path | None, samples: int) -> dict[str, Any]:
    """Counts for each split, document lengths by powers of two, special tokens, and `samples` decoded documents.

    tokenizer: a tokenizer.model; None takes the one beside the store, or does without where there is none. Special tokens
    are the ids below the tokenizer's first ordinary piece (unk, bos, eos) and, together, the byte pieces. A run of
    separators longer than 2 would mean padding. Reads the whole training split.
    """
    if samples < 0:
        raise DataError(f"--samples {samples}", fix="give 0 or more")
    store = TokenStore(directory, "train")
    manifest = store.manifest
    beside = store.directory.parent / "tokenizer.model"
    loaded = Tokenizer.load(tokenizer or beside) if tokenizer or beside.exists() else None
    if loaded and loaded.sha256 != manifest.tokenizer_sha256:
        raise DataError(f"tokenizer {loaded.path} did not make {directory}", fix="give the one that did: --tokenizer")
    bins = np.zeros(64, dtype=np.int64)
    wanted = set(np.linspace(0, store.num_documents - 1, min(samples, store.num_documents), dtype=int).tolist())
    chosen: list[tuple[int, int, int]] = []
    number, before = 0, 0
    for index in range(manifest.num_shards("train")):
        starts = store.starts(index).astype(np.int64) + index * store.shard_tokens
        if not len(starts):
            continue
        ends = np.append(starts[1:], -1)
        ends[-1] = _next_start(store, index)
        bins += np.bincount(np.log2(ends - starts).astype(int), minlength=64)
        chosen += [
            (n, int(starts[n - number]), int(ends[n - number]))
            for n in sorted(wanted)
            if number <= n < number + len(starts)
        ]
        number, before = number + len(starts), int(ends[-1])
    if number != store.num_documents or before != store.num_tokens:
        raise DataError(
            f"{store.directory} has {number:,} documents, its manifest says {store.num_documents:,}", fix=AGAIN
        )
    counts, longest = _count(store, 3)
    decoded = []
    for n, start, end in chosen:
        ids = store.read(start + 1, min(SAMPLE_TOKENS, end - start - 1)).tolist()
        text = loaded.decode(ids) if loaded else "(no tokenizer.model beside the store)"
        decoded.append({"document": n, "tokens": end - start, "text": text})
    special = {}
    if loaded:
        for name, token in (("unk", loaded.unk_id), ("bos", loaded.bos_id), ("eos", loaded.eos_id)):
            if 0 <= token < 3:
                special[name] = {"id": token, "count": int(counts[token]), "longest_run": longest[token]}
        pieces = [token for token, (_, kind) in enumerate(loaded.pieces()) if kind == BYTE]
        special["bytes"] = {"ids": len(pieces), "count": int(counts[pieces].sum())}
    return {
        "splits": {s: {"tokens": manifest.tokens(s), "documents": manifest.documents(s)} for s in SPLITS},
        "separator_id": manifest.separator_id,
        "separators": int(counts[manifest.separator_id]),
        "special_tokens": special,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "inputs": manifest.inputs,
        "lengths": [
            {"from": 1 << power, "to": (2 << power) - 1, "documents": int(count)}
            for power, count in enumerate(bins)
            if count
        ],
        "samples": decoded,
    }


def _next_start(store: TokenStore, index: int) -> int:
    """Where the first document after shard `index` starts, or the split ends."""
    for later in range(index + 1, store.manifest.num_shards(store.split)):
        starts = store.starts(later)
        if len(starts):
            return later * store.shard_tokens + int(starts[0])
    return store.num_tokens
