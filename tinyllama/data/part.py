"""One input file's share of an unfinished store: its tokens, where its documents start, and what was left out.

    PART.train.tokens, PART.train.documents             the same for validation
    PART.skipped.jsonl                                   [record number, reason] for each record left out, if any
    PART.json                                            the record: with it, the part is whole

Nothing is held in memory but one buffer a file.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tinyllama.data.durable import partial_name, write_json
from tinyllama.data.store import SPLITS

if TYPE_CHECKING:
    from tinyllama.data.documents import Reader
    from tinyllama.data.work import Work

KINDS = ("tokens", "documents")


class SkippedRecords:
    """Takes (record number, reason) from a reader and writes them; a file is made for the first."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self.stream: IO[str] | None = None

    def append(self, entry: tuple[int, str]) -> None:
        if self.stream is None:
            self.stream = open(partial_name(self.path), "w", encoding="utf-8")
        self.stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.count += 1

    def __len__(self) -> int:
        return self.count


class PartWriter:
    """Writes the part of one input file; nothing counts before `finish`."""

    def __init__(self, work: Work, index: int) -> None:
        self.work, self.index = work, index
        self.separator = int(work.plan.settings.separator_id).to_bytes(work.width, "little")
        self.counts = {split: {"tokens": 0, "documents": 0, "bytes_of_text": 0} for split in SPLITS}
        work.part(index).parent.mkdir(parents=True, exist_ok=True)
        self.skipped = SkippedRecords(work.skipped_file(index))
        self._paths = {(split, kind): work.part_file(index, split, kind) for split in SPLITS for kind in KINDS}
        self._streams = {key: open(partial_name(path), "wb", 1 << 20) for key, path in self._paths.items()}

    def add(self, split: str, encoded: bytes, bytes_of_text: int) -> None:
        """One document: the separator, then its tokens (little-endian, in the store's dtype)."""
        counts, stream = self.counts[split], self._streams[split, "tokens"]
        self._streams[split, "documents"].write(counts["tokens"].to_bytes(8, "little"))
        stream.write(self.separator)
        stream.write(encoded)
        counts["tokens"] += 1 + len(encoded) // self.work.width
        counts["documents"] += 1
        counts["bytes_of_text"] += bytes_of_text

    def finish(self, reader: Reader) -> None:
        """Make everything durable, then write the record that makes it valid."""
        written: list[tuple[Any, Path]] = [(self._streams[key], path) for key, path in self._paths.items()]
        if self.skipped.stream is not None:
            written.append((self.skipped.stream, self.skipped.path))
        for stream, path in written:
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
            os.replace(partial_name(path), path)
        file = self.work.plan.files[self.index]
        record = {
            "settings": self.work.plan.settings.key,
            "version": file.version,
            "identity": {"name": file.name, "bytes": file.size_bytes, "sha256": reader.sha256},
            "records": reader.num_records,
            "excluded": dict(sorted(reader.excluded.items())),
            "skipped": len(self.skipped),
            "splits": self.counts,
        }
        write_json(self.work.part(self.index).with_suffix(".json"), record)

    def abandon(self) -> None:
        """Close and remove what was written, unless it is finished."""
        streams: list[Any] = [*self._streams.values(), *([self.skipped.stream] if self.skipped.stream else [])]
        for stream in streams:
            with contextlib.suppress(OSError):
                stream.close()
        for path in (*self._paths.values(), self.skipped.path):
            partial_name(path).unlink(missing_ok=True)
