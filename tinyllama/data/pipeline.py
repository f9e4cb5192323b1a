"""The preparation as datatrove pipelines: read and tokenize, lay out, pack, publish.

Each stage is a list of datatrove steps. The steps keep no state but what `work` has on disk, so any of them can be
killed and run again, by any of the `executors`. Other datatrove steps (filters, say) can stand between `ReadInputs` and
`TokenizeAndWrite`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinyllama.data.documents import Reader
from tinyllama.data.durable import cannot_write, write_json
from tinyllama.data.part import PartWriter
from tinyllama.data.work import Work
from tinyllama.errors import DataError, MissingExtraError, UserError
from tinyllama.tokenizer.cached import CachedEncoder
from tinyllama.tokenizer.sentencepiece_model import Tokenizer

try:
    from datatrove.data import Document
    from datatrove.pipeline.base import PipelineStep
except ImportError:
    raise MissingExtraError("datatrove", "data") from None

REPORT_SECONDS = 0.5
CHECKED = 256  # one document in so many is compared with SentencePiece,
CHECKED_CHARACTERS = 1 << 18  # unless it is longer: SentencePiece needs some fifty times the text's memory


def is_validation(data: bytes, seed: int, fraction: float) -> bool:
    """Whether a document is held out: a function of its UTF-8 and the seed alone, so that copies stay on one side."""
    digest = hashlib.blake2b(data, digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def share(sizes: list[int], rank: int, world_size: int) -> list[int]:
    """The files of one task: dealt out by size, back and forth, so that the tasks are about equal."""
    by_size = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    period = 2 * world_size
    mine = [i for n, i in enumerate(by_size) if n % period in (rank, period - 1 - rank)]
    return sorted(mine)


class _Shared:
    """What the two steps of a task tell each other; they are copied together."""

    def __init__(self) -> None:
        self.open: dict[int, tuple[Reader, PartWriter]] = {}  # begun and not finished, in order
        self.error: UserError | None = None  # of the last one begun


class ReadInputs(PipelineStep):
    """Reads the unfinished files of a task, one after another, into datatrove documents."""

    name, type = "tinyllama inputs", "📖 - READER"

    def __init__(self, folder: str, shared: _Shared, secrets: dict[int, str]) -> None:
        super().__init__()
        self.folder, self.shared, self.secrets = folder, shared, secrets

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        work = Work.load(Path(self.folder), self.secrets)
        files = work.plan.files
        for index in share([file.size_bytes for file in files], rank, world_size):
            if work.is_finished(index):
                continue
            part = PartWriter(work, index)
            reader = Reader(files[index], work.plan.settings.rules, part.skipped)
            self.shared.open[index] = reader, part
            try:
                for text in reader:
                    name = f"{files[index].name}/{reader.num_records - 1}"
                    yield Document(text=text, id=name, metadata={"input": index})
            except UserError as error:  # raised by the writer, when it has finished the files before
                self.shared.error = error
                return


class TokenizeAndWrite(PipelineStep):
    """Tokenizes with SentencePiece's ids and writes each input file's part."""

    name, type = "tinyllama tokens", "🔢 - TOKENIZER"

    def __init__(self, folder: str, shared: _Shared, plain: bool = False) -> None:
        super().__init__()
        self.folder, self.shared, self.plain = folder, shared, plain

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:  # type: ignore[override]
        work = Work.load(Path(self.folder))
        settings = work.plan.settings
        encoder = _encoder(work.folder / "tokenizer.model", settings.tokenizer_sha256, settings.dtype, self.plain)
        report = _Report(work, rank)
        try:
            for index, documents in itertools.groupby(data, key=lambda document: document.metadata["input"]):
                self._finish(report, before=index)
                self._write(work, index, documents, encoder, report)
            if self.shared.error:
                self._finish(report, before=next(reversed(self.shared.open)))
                raise self.shared.error
            self._finish(report)
            report.write()
        except OSError as error:
            raise cannot_write(error, work.folder) from None
        finally:
            for _, part in self.shared.open.values():
                part.abandon()
            self.shared.open.clear()

    def _finish(self, report: _Report, before: int | None = None) -> None:
        """Everything has been written of the files that were begun earlier."""
        for index in [i for i in self.shared.open if i != before]:
            reader, part = self.shared.open[index]
            part.finish(reader)
            report.file_done(reader)
            del self.shared.open[index]

    def _write(self, work: Work, index: int, documents: Any, encoder: CachedEncoder, report: _Report) -> None:
        settings = work.plan.settings
        reader, part = self.shared.open[index]
        for number, document in enumerate(documents):
            text: str = document.text
            utf8, encoded = text.encode(), encoder.encode(text)
            if number % CHECKED == 0 and len(text) <= CHECKED_CHARACTERS:
                encoder.check(text, encoded)
            # SentencePiece does not tell "\u2581" from a space: texts of the same tokens stay on the same side.
            same = utf8.replace("\u2581".encode(), b" ")
            held_out = is_validation(same, settings.seed, settings.validation_fraction)
            part.add("validation" if held_out else "train", encoded, len(utf8))
            report.add(reader, len(utf8), 1 + len(encoded) // work.width)


@functools.lru_cache(maxsize=1)
def _encoder(model: Path, sha256: str, dtype: str, plain: bool) -> CachedEncoder:
    """One for all tasks of a process: what it has learnt is worth keeping."""
    tokenizer = Tokenizer.load(model)
    if tokenizer.sha256 != sha256:
        raise DataError(f"{model} is not the tokenizer of the plan", fix="run the same command again")
    encoder = CachedEncoder(tokenizer, dtype)
    if plain:
        encoder.pattern = None
    return encoder


class _Report:
    """Tells, in a file, how far one task is."""

    def __init__(self, work: Work, rank: int) -> None:
        self.path = work.folder / "progress" / f"{rank:06d}.json"
        self.counts = {"read_bytes": 0, "text_bytes": 0, "documents": 0, "tokens": 0, "files": 0}
        self.in_file = 0
        self.due = 0.0

    def add(self, reader: Reader, text_bytes: int, tokens: int) -> None:
        counts = self.counts
        counts["text_bytes"] += text_bytes
        counts["documents"] += 1
        counts["tokens"] += tokens
        self.in_file = reader.bytes_read
        if (now := time.monotonic()) >= self.due:
            self.due = now + REPORT_SECONDS
            self.write()

    def file_done(self, reader: Reader) -> None:
        self.counts["read_bytes"] += reader.file.size_bytes
        self.counts["files"] += 1
        self.in_file = 0

    def write(self) -> None:
        write_json(self.path, {**self.counts, "read_bytes": self.counts["read_bytes"] + self.in_file})


class _OnWork(PipelineStep):
    """A step that needs nothing but the unfinished store."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:  # type: ignore[override]
        work = Work.load(Path(self.folder))
        try:
            self.act(work, rank, world_size)
        except OSError as error:
            raise cannot_write(error, work.folder) from None

    def act(self, work: Work, rank: int, world_size: int) -> None:
        raise NotImplementedError


class LayOut(_OnWork):
    """Decides which tokens go to which shard, once every part is there."""

    name, type = "tinyllama layout", "🧮 - LAYOUT"

    def act(self, work: Work, rank: int, world_size: int) -> None:
        work.lay_out()


class Pack(_OnWork):
    """Writes a task's share of the shards."""

    name, type = "tinyllama shards", "💾 - WRITER"

    def act(self, work: Work, rank: int, world_size: int) -> None:
        for split, number in work.shards()[rank::world_size]:
            work.pack(split, number)


class Publish(_OnWork):
    """Writes the manifest and gives the store its name."""

    name, type = "tinyllama manifest", "✅ - MANIFEST"

    def __init__(self, folder: str, target: str) -> None:
        super().__init__(folder)
        self.target = target

    def act(self, work: Work, rank: int, world_size: int) -> None:
        work.publish(Path(self.target))


@dataclasses.dataclass(frozen=True)
class Stage:
    """One pipeline, and into how many tasks it is divided."""

    name: str
    steps: list[PipelineStep]
    tasks: int


def stages(work: Work, target: Path, tasks: int, plain: bool = False) -> list[Stage]:
    """The whole preparation. `tasks` bounds how finely the work is divided; it does not change the result."""
    folder, shared = str(work.folder.resolve()), _Shared()
    secrets = {number: file.opens for number, file in enumerate(work.plan.files) if file.opens}
    # How many shards there will be is not known yet; a task for each half a gigabyte of compressed input is about right.
    shard_bytes = work.plan.settings.shard_tokens * work.width
    packers = 1 + 4 * sum(file.size_bytes for file in work.plan.files) // shard_bytes
    return [
        Stage(
            "tokenize",
            [ReadInputs(folder, shared, secrets), TokenizeAndWrite(folder, shared, plain)],
            max(1, min(tasks, len(work.plan.files))),
        ),
        Stage("layout", [LayOut(folder)], 1),
        Stage("pack", [Pack(folder)], min(tasks, packers)),
        Stage("publish", [Publish(folder, str(target.resolve()))], 1),
    ]
