"""Which benchmark items a model may have seen: runs of N tokens (13 by default) that also occur in its training data.

Every text field of every row of a bundle is tokenized with the store's tokenizer, and its N-grams are looked for in the
training stream, document by document (no item holds a separator). A rolling hash and a bit table sort out nearly all
positions; what is left is compared token by token, so that a match is a match. The memory depends on the bundle and the
threads, not on the store. GPT-3 (Brown et al., 2020, appendix C) counts an item as contaminated from one 13-gram on;
Llama 2 (Touvron et al., 2023, appendix A.6) from 80% of its tokens on: the report has what both need.

Tokens are compared, not words: other capitals, spaces or punctuation hide a copy. Absence of overlap is no proof.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama.data.store import TokenStore, file_sha256
from tinyllama.errors import DataError
from tinyllama.tokenizer.sentencepiece_model import Tokenizer

FORMAT = "tinyllama-contamination-1"
NGRAM = 13
CHUNK_TOKENS = 1 << 20  # scanned at a time by each thread: about 60 MB with everything that is computed
MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that no information is lost modulo 2**64


@dataclasses.dataclass
class Item:
    """One row of a bundle: where it is, and where its texts lie in the tokens of all items (begin, end)."""

    dataset: str
    config: str
    split: str
    row: int
    fields: list[tuple[int, int]]


def _texts(value: Any) -> Iterator[str]:
    """Every string in a row, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _texts(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)


def read_items(bundle: Path, tokenizer: Tokenizer, dtype: str) -> tuple[list[Item], np.ndarray, dict[str, str]]:
    """The items of `<data set>/<config>/<split>.jsonl` files, their tokens end to end, and each file's sha256."""
    files = sorted(bundle.glob("*/*/*.jsonl"))
    if not files:
        raise DataError(f"{bundle} holds no <data set>/<config>/<split>.jsonl", fix="give a bundle's folder, or mini")
    items: list[Item] = []
    tokens: list[np.ndarray] = []
    end = 0
    for path in files:
        rows: list[list[str]] = []
        try:
            with open(path, encoding="utf-8") as stream:
                rows = [list(dict.fromkeys(_texts(json.loads(line)))) for line in stream if line.strip()]
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is corrupt ({error})", fix="fetch or pack the bundle again") from None
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror})", fix="grant read permission") from None
        try:
            encoded = iter(tokenizer.encode_batch(list(itertools.chain.from_iterable(rows)), os.cpu_count() or 1))
        except DataError as error:
            raise DataError(f"{path}: {error.what}", fix=error.fix) from None
        for row, texts in enumerate(rows):
            fields = []
            for ids in itertools.islice(encoded, len(texts)):
                tokens.append(np.array(ids, dtype=dtype))
                fields.append((end, end + len(ids)))
                end += len(ids)
            items.append(Item(path.parent.parent.name, path.parent.name, path.stem, row, fields))
    if not tokens:
        raise DataError(f"{bundle} holds no text", fix="fetch or pack the bundle again")
    digests = {path.relative_to(bundle).as_posix(): file_sha256(path) for path in files}
    return items, np.concatenate(tokens), digests


def rolling_hashes(tokens: np.ndarray, n: int) -> np.ndarray:
    """The hash of each run of `n` tokens: shape (len(tokens) - n + 1,), uint64. Runs are doubled, then joined."""
    if len(tokens) < n:
        return np.empty(0, dtype=np.uint64)
    # Neighbouring ids differ in few bits; an odd multiplier and a shift spread them before they are combined.
    width, power = 1, MULTIPLIER
    run = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    run ^= run >> np.uint64(29)
    whole: np.ndarray | None = None
    whole_width, rest = 0, n
    while rest:
        if rest & 1:
            if whole is None:
                whole, whole_width = run, width
            else:
                # whole covers the first tokens, the current run those after them
                length = len(tokens) - whole_width - width + 1
                whole = whole[:length] * np.uint64(power) + run[whole_width : whole_width + length]
                whole_width += width
        rest >>= 1
        if rest:
            length = len(run) - width
            run = run[:length] * np.uint64(power) + run[width : width + length]
            width, power = 2 * width, power * power % 2**64
    assert whole is not None
    whole = whole[: len(tokens) - n + 1]
    return whole ^ (whole >> np.uint64(32))


class NgramIndex:
    """The distinct N-grams of all items, and how often each is found."""

    def __init__(self, items: Sequence[Item], tokens: np.ndarray, n: int) -> None:
        self.n, self.tokens = n, tokens
        hashes = rolling_hashes(tokens, n)
        inside = np.zeros(len(tokens), dtype=bool)  # runs that lie within one field
        for item in items:
            for begin, end in item.fields:
                inside[begin : max(begin, end - n + 1)] = True
        positions = np.flatnonzero(inside)
        self.hashes, first, numbers = np.unique(hashes[positions], return_index=True, return_inverse=True)
        self.places = positions[first]
        self.number = np.full(len(tokens), -1, dtype=np.int64)  # token position -> number of the N-gram there
        self.number[positions] = numbers
        self.counts = np.zeros(len(self.hashes), dtype=np.int64)
        # A bit for each hash prefix: 16 bits or more for each N-gram, at most 64 MB.
        self.shift = np.uint64(64 - min(29, max(16, (16 * len(self.hashes)).bit_length())))
        table = np.zeros(1 << (64 - int(self.shift)), dtype=bool)
        table[self.hashes >> self.shift] = True
        self.table = np.packbits(table, bitorder="little")

    def find(self, stream: np.ndarray) -> np.ndarray:
        """Numbers of the N-grams that occur in a piece of the training stream, one entry for each occurrence."""
        hashes = rolling_hashes(stream, self.n)
        bits = hashes >> self.shift
        hit = (self.table[bits >> np.uint64(3)] >> (bits & np.uint64(7)).astype(np.uint8)) & 1
        candidates = np.flatnonzero(hit)
        if not len(candidates) or not len(self.hashes):
            return np.empty(0, dtype=np.int64)
        numbers = np.minimum(np.searchsorted(self.hashes, hashes[candidates]), len(self.hashes) - 1)
        same = self.hashes[numbers] == hashes[candidates]
        candidates, numbers = candidates[same], numbers[same]
        offsets = np.arange(self.n)
        exact = (stream[candidates[:, None] + offsets] == self.tokens[self.places[numbers][:, None] + offsets]).all(1)
        return numbers[exact]

    def add(self, numbers: np.ndarray) -> None:
        self.counts += np.bincount(numbers, minlength=len(self.counts))


def scan(
    store: TokenStore, index: NgramIndex, threads: int | None = None, progress: Callable[[int], None] | None = None
) -> None:
    """Count the index's N-grams in a whole training split. progress: called with the tokens of each piece."""
    overlap = index.n - 1

    def piece(start: int) -> tuple[int, np.ndarray]:
        count = min(CHUNK_TOKENS, store.num_tokens - start)
        stream = np.empty(min(count + overlap, store.num_tokens - start), dtype=store.dtype)
        own = TokenStore(store.directory, store.split) if threads != 1 else store  # open files are not shared
        own.read_into(start, stream)
        return count, index.find(stream)

    starts = range(0, store.num_tokens, CHUNK_TOKENS)
    workers = threads or os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        for first in range(0, len(starts), 4 * workers):  # a few pieces ahead of what is counted, never all of them
            for count, numbers in pool.map(piece, starts[first : first + 4 * workers]):
                index.add(numbers)
                if progress:
                    progress(count)


def report(
    stores: Sequence[Path],
    bundle: Path,
    tokenizer: Tokenizer,
    *,
    ngram: int = NGRAM,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """The overlap of each item of `bundle` with the training splits of `stores` together.

    For each item: tokens, ngrams, matched (N-grams found), overlap_frac (share of its tokens that lie in a found one),
    and occurrences (of its most frequent found one). `status` is "clean", "overlap", or "short": no field has N tokens,
    so nothing can be said. DataError if a store was made by another tokenizer.
    """
    if ngram < 1:
        raise DataError(f"--ngram {ngram}", fix="give 1 or more; 13 is usual")
    if threads is not None and threads < 1:
        raise DataError(f"--threads {threads}", fix="give 1 or more")
    opened = [TokenStore(path) for path in stores]
    for store in opened:
        if store.manifest.tokenizer_sha256 != tokenizer.sha256:
            raise DataError(
                f"tokenizer {tokenizer.path} did not make {store.directory}", fix="give the one that did: --tokenizer"
            )
    items, tokens, files = read_items(bundle, tokenizer, opened[0].manifest.dtype)
    index = NgramIndex(items, tokens, ngram)
    for store in opened:
        scan(store, index, threads, progress)
    found = index.counts > 0
    rows = [_describe(item, index, found) for item in items]
    return {
        "format": FORMAT,
        "ngram": ngram,
        "stores": [
            {"path": str(s.directory), "sha256": s.manifest.sha256, "training_tokens": s.num_tokens} for s in opened
        ],
        "bundle": {"path": str(bundle), "files": files},
        "tokenizer_sha256": tokenizer.sha256,
        "distinct_ngrams": len(index.hashes),
        "found_ngrams": int(found.sum()),
        "sets": _summary(rows),
        "items": rows,
    }


def _describe(item: Item, index: NgramIndex, found: np.ndarray) -> dict[str, Any]:
    n, total, ngrams, matched, covered, most = index.n, 0, 0, 0, 0, 0
    for begin, end in item.fields:
        total += end - begin
        if end - begin < n:
            continue
        numbers = index.number[begin : end - n + 1]
        hits = found[numbers]
        ngrams, matched = ngrams + len(numbers), matched + int(hits.sum())
        if hits.any():
            marks = np.zeros(end - begin + 1, dtype=np.int64)
            places = np.flatnonzero(hits)
            np.add.at(marks, places, 1)
            np.add.at(marks, places + n, -1)
            covered += int((np.cumsum(marks[:-1]) > 0).sum())
            most = max(most, int(index.counts[numbers].max()))
    return {
        "set": f"{item.dataset}/{item.config}/{item.split}",
        "row": item.row,
        "status": "overlap" if matched else "clean" if ngrams else "short",
        "tokens": total,
        "ngrams": ngrams,
        "matched": matched,
        "overlap_frac": round(covered / total, 6) if total else 0.0,
        "occurrences": most,
    }


def _summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Counts for each file of the bundle."""
    sets: dict[str, dict[str, Any]] = {}
    for row in rows:
        entry = sets.setdefault(
            row["set"], {"set": row["set"], "items": 0, "clean": 0, "overlap": 0, "short": 0, "overlap_80": 0}
        )
        entry["items"] += 1
        entry[row["status"]] += 1
        entry["overlap_80"] += row["overlap_frac"] >= 0.8
    return list(sets.values())
