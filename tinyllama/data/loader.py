"""Batches of a training mixture: memory-mapped stores read in the exact order of `order`.

A batch is named by its sample numbers alone, so a rank asks for the samples that are its share and nothing needs to be
remembered between calls.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from tinyllama.data.order import Order
from tinyllama.data.store import TokenStore
from tinyllama.errors import ConfigError, DataError

IGNORE_INDEX = -100  # the loss's own convention: a target that does not count


@dataclasses.dataclass(frozen=True)
class Source:
    """A named store and its weight in the mixture, by tokens."""

    name: str
    directory: Path
    weight: float


class Mixture:
    """The training split of several stores, in one order."""

    def __init__(self, sources: Sequence[Source], sequence_length: int, seed: int) -> None:
        self.sources = tuple(sources)
        self.stores = [TokenStore(s.directory, "train") for s in sources]
        first = self.stores[0].manifest
        for source, store in zip(sources, self.stores, strict=True):
            for field in ("tokenizer_sha256", "separator_policy", "separator_id"):
                if getattr(store.manifest, field) != getattr(first, field):
                    raise DataError(
                        f"stores {sources[0].name} and {source.name} differ in {field}",
                        fix="prepare them with the same tokenizer and settings",
                    )
        first_of: dict[str, str] = {}  # the manifest's sha256 -> the first source that has it
        for source, store in zip(sources, self.stores, strict=True):
            other = first_of.setdefault(store.manifest.sha256, source.name)
            if other != source.name:  # its epochs would be counted by halves
                raise DataError(
                    f"sources {other!r} and {source.name!r} are the same store twice",
                    fix="give it once, with the sum of their weights",
                )
        self.tokenizer_sha256, self.vocab_size = first.tokenizer_sha256, first.vocab_size
        self.separator_id = first.separator_id
        names = [s.name for s in sources]
        weights = [s.weight for s in sources]
        self.order = Order([s.num_tokens for s in self.stores], weights, sequence_length, seed, names)
        self.sequence_length = sequence_length

    @property
    def sha256(self) -> str:
        """The identity of the order: seed, sources, weights and the content of every store."""
        parts = [(s.name, s.weight, store.manifest.sha256) for s, store in zip(self.sources, self.stores, strict=True)]
        return hashlib.sha256(repr((self.order.seed, self.sequence_length, parts)).encode()).hexdigest()

    def check_sizes(self) -> None:
        """DataError names the first shard, of any source, that is missing or has the wrong size. Reads no token."""
        for store in self.stores:
            store.check_sizes()

    def fetch(self, samples: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
        """ids and targets, int64, (samples, sequence_length) each; targets are already shifted by one."""
        windows, length = self.order.windows_of(samples), self.sequence_length
        rows = np.empty((len(windows), length + 1), dtype=self.stores[0].dtype)
        for row, (source, start, _) in zip(rows, windows, strict=True):
            self.stores[source].read_into(start, row)
        if rows.max(initial=0) >= self.vocab_size:
            first = int(rows.max(axis=1).argmax())
            self.stores[windows[first][0]].refuse_token(windows[first][1], rows[first])
        ids, targets = rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)
        for row, (*_, repeated) in enumerate(windows):
            if repeated:
                targets[row, :repeated] = IGNORE_INDEX
        return ids, targets

    def num_targets(self, samples: Iterable[int]) -> int:
        """How many targets these samples have, without reading a token."""
        return sum(self.sequence_length - repeated for *_, repeated in self.order.windows_of(samples))

    def epochs(self, num_samples: int) -> dict[str, float]:
        """The ledger: how many epochs of each source the first `num_samples` samples are."""
        return dict(zip((s.name for s in self.sources), self.order.epochs(num_samples), strict=True))

    def check_epochs(self, num_samples: int, max_epochs: float) -> None:
        """ConfigError if the first `num_samples` samples repeat a source more often than `max_epochs`."""
        for name, epochs in self.epochs(num_samples).items():
            if epochs > max_epochs:
                raise ConfigError(
                    f"source {name!r} would be repeated {epochs:.2f} times, data.max_epochs={max_epochs:g}",
                    fix="train on fewer tokens, prepare more of it, or lower its weight (Muennighoff et al., 2023)",
                )


def document_layout(ids: np.ndarray, separator_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Which document of its row each token belongs to, and its position in it: int64, of the shape of `ids` (B, T).

    A separator begins a document, at position 0. So does a row: of a document that began before it, the row sees the
    rest alone.
    """
    begins = ids == separator_id
    index = np.arange(ids.shape[1], dtype=np.int64)
    starts = np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    return np.cumsum(begins, axis=1, dtype=np.int64), index - starts


class HeldOut:
    """The validation split of one store, cut into windows in order; every token but the first is a target once."""

    def __init__(self, source: Source, sequence_length: int) -> None:
        self.name = source.name
        self.store = TokenStore(source.directory, "validation")
        self.sequence_length = sequence_length
        total = self.store.num_tokens
        self.bytes_of_text = self.store.manifest.splits["validation"].bytes_of_text
        self.num_windows = -(-(total - 1) // sequence_length) if total > sequence_length else min(1, max(0, total - 1))

    def check(self, max_windows: int) -> None:
        """DataError names the first shard that is missing or of another size; of those that the first `max_windows`
        windows are read from, also one that does not match its checksum.
        """
        self.store.check_sizes()
        tokens = min(self.store.num_tokens, max_windows * self.sequence_length + 1) if self.num_windows else 0
        self.store.check_sums(-(-tokens // self.store.shard_tokens))

    def fetch(self, windows: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
        """ids and targets (windows, sequence_length); a window number past the end gives a row without targets.

        So every rank can run the same number of batches, whatever the length of the split.
        """
        windows = list(windows)
        ids = np.zeros((len(windows), self.sequence_length), dtype=np.int64)
        targets = np.full((len(windows), self.sequence_length), IGNORE_INDEX, dtype=np.int64)
        for row, number in enumerate(windows):
            if number < self.num_windows:
                start = number * self.sequence_length
                count = min(self.sequence_length + 1, self.store.num_tokens - start)
                tokens = self.store.read(start, count)
                if int(tokens.max()) >= self.store.manifest.vocab_size:
                    self.store.refuse_token(start, tokens)
                ids[row, : count - 1], targets[row, : count - 1] = tokens[:-1], tokens[1:]
        return ids, targets
