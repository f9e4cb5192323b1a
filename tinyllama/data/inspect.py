"""What a person wants to know of a token store: counts, lengths, separators, decoded samples."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tinyllama.data.store import SPLITS, TokenStore
from tinyllama.errors import DataError
from tinyllama.tokenizer.sentencepiece_model import Tokenizer

SAMPLE_TOKENS = 120


def unigram_entropy(directory: str | os.PathLike[str], split: str = "validation") -> float:
    """Entropy of the split's token frequencies, in nats: the loss of a model that knows frequencies and no context."""
    import numpy as np

    store = TokenStore(directory, split)
    counts = np.zeros(store.manifest.vocab_size, dtype=np.int64)
    for start in range(0, store.num_tokens, 1 << 24):
        piece = store.read(start, min(1 << 24, store.num_tokens - start))
        counts += np.bincount(piece, minlength=len(counts))
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(-(shares * np.log(shares)).sum())


def describe(directory: str | os.PathLike[str], tokenizer: Path | None, samples: int) -> dict[str, Any]:
    """Counts for each split, a histogram of document lengths by powers of two, and `samples` decoded documents."""
    import numpy as np

    store = TokenStore(directory, "train")
    manifest = store.manifest
    loaded = Tokenizer.load(tokenizer) if tokenizer else None
    if loaded and loaded.sha256 != manifest.tokenizer_sha256:
        raise DataError(f"tokenizer {tokenizer} did not make {directory}", fix="give the one that did: --tokenizer")
    lengths = []
    for index, shard in enumerate(store.shards):
        lengths.append(np.diff(store.boundaries(index), append=np.uint64(shard.num_tokens)))
    all_lengths = np.concatenate(lengths).astype(np.int64)
    bins = np.bincount(np.log2(all_lengths).astype(int))
    decoded: list[dict[str, Any]] = []
    total = len(all_lengths)
    for number in range(0, total, max(1, total // samples) if samples else total + 1):
        if len(decoded) == samples:
            break
        index, local = 0, number
        while local >= len(lengths[index]):
            local -= len(lengths[index])
            index += 1
        ids = store.document(index, local)
        text = loaded.decode(ids[1 : 1 + SAMPLE_TOKENS].tolist()) if loaded else "(no tokenizer.model beside the store)"
        decoded.append({"shard": store.shards[index].name, "document": local, "tokens": len(ids), "text": text})
    return {
        "splits": {s: {"tokens": manifest.tokens(s), "documents": manifest.documents(s)} for s in SPLITS},
        "separator_id": manifest.separator_id,
        "separators": total,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "lengths": [
            {"from": 1 << power, "to": (2 << power) - 1, "documents": int(count)}
            for power, count in enumerate(bins)
            if count
        ],
        "samples": decoded,
    }
