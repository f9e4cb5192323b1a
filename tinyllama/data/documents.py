"""Input files to documents: JSON lines (plain, gzip, zstandard), parquet, and text files.

A document is one record of a `.jsonl` or parquet file (its `text` or `content` column), or one whole text file. Nothing
is dropped unsaid: a record that cannot be used is a `DataError` that names the file and the line, or, where `Rules` say
so, is listed with its reason. Knows nothing of tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from tinyllama.data.defaults import MAX_DOCUMENT_BYTES
from tinyllama.data.forms import HEAD_BYTES, SUFFIXES, contradiction, remedy
from tinyllama.data.input_file import HashedStream, InputFile
from tinyllama.errors import DataError, nearest
from tinyllama.tokenizer.sentencepiece_model import lone_surrogate

TEXT_FIELDS = ("text", "content")
PRESETS = Path(__file__).parent / "presets"
READ_BYTES = 1 << 18
BATCH_BYTES = 4 << 20  # of a parquet file, decoded at a time
BOM = b"\xef\xbb\xbf"  # before UTF-8 it says nothing, and is no part of the text

if TYPE_CHECKING:
    from tinyllama.data.part import SkippedRecords


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which documents of an input count.

    text_field: the field that holds the text; None takes the first of `text` and `content`. exclude: documents whose
    field has one of these values do not count. Fields may be dotted, for nested ones. skip_bad: list what is broken or
    too large instead of refusing the file. max_document_bytes: longer texts are always listed as skipped; bounds the
    memory.
    """

    text_field: str | None = None
    exclude: tuple[tuple[str, tuple[str, ...]], ...] = ()
    skip_bad: bool = False
    max_document_bytes: int = MAX_DOCUMENT_BYTES


@dataclasses.dataclass(frozen=True)
class Preset:
    """A well-known data set: where it is, which files, and its rules."""

    name: str
    title: str
    address: str
    suffixes: tuple[str, ...]
    text_field: str
    exclude: tuple[tuple[str, tuple[str, ...]], ...]


def preset_names() -> list[str]:
    """The presets that ship with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def read_preset(name: str | None) -> Preset:
    """A preset by name; None gives the rules for anything. DataError names the nearest for an unknown one."""
    if name is None:
        return Preset("", "", "", SUFFIXES, "", ())
    if name not in preset_names():
        raise DataError(f"preset {name!r} does not exist", fix=nearest(name, preset_names()))
    raw = json.loads((PRESETS / f"{name}.json").read_text())
    exclude = tuple((field, tuple(values)) for field, values in raw["exclude"].items())
    return Preset(name, raw["title"], raw["address"], tuple(raw["suffixes"]), raw["text_field"], exclude)


class _Bad(Exception):
    """One record that cannot be used, and why."""


class Reader:
    """Iterates the documents of one input file, and keeps account of everything that it does not give.

    After the iteration: num_records, excluded (count by reason), sha256 of the file. (record number, reason) of what was
    left out is appended to `skipped`.
    `bytes_read` of `file.size_bytes` says how far it is.
    """

    def __init__(
        self, file: InputFile, rules: Rules | None = None, skipped: list[tuple[int, str]] | SkippedRecords | None = None
    ) -> None:
        self.file = file
        self.rules = rules or Rules()
        self.num_records = 0
        self.excluded: Counter[str] = Counter()
        self.skipped = [] if skipped is None else skipped
        self.sha256 = ""
        self.bytes_read = 0

    def __iter__(self) -> Iterator[str]:
        is_text = self.file.kind == "text"
        records = {"lines": self._lines, "parquet": self._parquet, "text": self._whole}[self.file.kind]()
        for where, record in records:
            number, self.num_records = self.num_records, self.num_records + 1
            try:
                text = self._text_of_file(record) if is_text else self._text(record)
            except _Bad as error:
                if not self.rules.skip_bad:
                    fix = "repair or remove it (data prepare --bad-records skip lists and skips)"
                    raise DataError(f"{where} {error}", fix=fix) from None
                self.skipped.append((number, str(error)))
                continue
            if text is None:
                continue
            if not text:
                self.skipped.append((number, "empty"))
            elif len(text) * 4 > self.rules.max_document_bytes and (
                (size := len(text.encode())) > self.rules.max_document_bytes
            ):
                self.skipped.append((number, f"longer than {self.rules.max_document_bytes:,} bytes ({size:,})"))
            else:
                yield text
        if self._raw.num_bytes != self.file.size_bytes or self.file.has_changed():
            raise DataError(f"{self.file.address} changed while it was read", fix="run the same command again")
        self.bytes_read = self.file.size_bytes

    def _text(self, record: Any) -> str | None:
        """The text of one record; None if it is excluded. _Bad if there is none."""
        if isinstance(record, _Bad):
            raise record
        if not isinstance(record, dict):
            raise _Bad(f"is not a JSON object but {_kind(record)}")
        for field, values in self.rules.exclude:
            found = _field(record, field)
            if found is _ABSENT:
                raise _Bad(f"has no field {field}, by which documents are excluded")
            value = _written(found)
            if value in values:
                self.excluded[f"{field}={value}"] += 1
                return None
        names = (self.rules.text_field,) if self.rules.text_field else TEXT_FIELDS
        for name in names:
            found = record.get(name)
            if found is None and "." in name:
                found = _field(record, name)
            if isinstance(found, str):
                return _checked(found)
        others = {name: found for name in names if (found := _field(record, name)) is not _ABSENT}
        if None in others.values():
            return ""  # a null is an empty text, and listed as one
        fields = self.rules.text_field or " or ".join(TEXT_FIELDS)
        there = "".join(f": its {name} is {_kind(value)}" for name, value in others.items())
        raise _Bad(f"has no {fields} string{there}")

    def _text_of_file(self, content: Any) -> str:
        """The text of a text file, which is one record. _Bad if it cannot be used."""
        if isinstance(content, _Bad):
            raise content
        if self.rules.exclude:
            raise _Bad(f"is a text file and has no field {self.rules.exclude[0][0]}, by which documents are excluded")
        return _checked(content)

    # -- The three kinds of file: (where, record) pairs --------------------------------------------------------------

    def _lines(self) -> Iterator[tuple[str, Any]]:
        name, number = self.file.address, 0
        raw = self._raw = HashedStream(self.file)
        longest = 6 * self.rules.max_document_bytes + (1 << 16)  # JSON writes a character in at most six bytes
        try:
            with _decompressed(self.file, raw) as stream:
                while line := stream.readline(longest):
                    number += 1
                    line = line.removeprefix(BOM) if number == 1 else line
                    self.bytes_read = raw.num_bytes
                    if len(line) == longest and not line.endswith(b"\n"):
                        while (rest := stream.readline(longest)) and not rest.endswith(b"\n"):
                            pass
                        yield f"{name}:{number}", _Bad(f"is longer than {longest:,} bytes")
                    elif line.strip():
                        yield f"{name}:{number}", _parsed(line)
                self.sha256 = raw.finish()
        except (EOFError, OSError, ValueError) as error:
            if isinstance(error, FileNotFoundError | PermissionError):
                raise
            raise DataError(f"{name} breaks off after line {number} ({error})", fix="fetch the file again") from None
        except Exception as error:
            if type(error).__name__ == "ZstdError" or type(error).__module__ == "zlib":
                raise DataError(
                    f"{name} breaks off after line {number} ({error})", fix="fetch the file again"
                ) from None
            raise

    def _parquet(self) -> Iterator[tuple[str, Any]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        name, rules = self.file.address, self.rules
        with contextlib.ExitStack() as stack:
            path: Any = name
            raw = self._raw = HashedStream(self.file)
            if not self.file.is_local:
                # Parquet is read back and forth: from a copy without a name, gone when this file has been read.
                path = stack.enter_context(tempfile.TemporaryFile())
                while data := raw.read(1 << 20):
                    path.write(data)
            self.sha256 = raw.finish()
            _refuse(self.file, raw.head, "parquet")
            try:
                # A buffer instead of whole column chunks keeps the memory small.
                table = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
                names = table.schema_arrow.names
                wanted_fields = (rules.text_field,) if rules.text_field else TEXT_FIELDS
                fields = [f for f in wanted_fields if f in names or f.split(".")[0] in names]
                if not fields:
                    wanted = rules.text_field or " or ".join(TEXT_FIELDS)
                    raise DataError(f"{name} has columns {', '.join(names)}", fix=f"{wanted} is needed")
                rows, total = 0, max(1, table.metadata.num_rows)
                columns = [*fields, *(field for field, _ in rules.exclude)]
                for batch in _batches(table, columns):
                    for record in batch.to_pylist():
                        rows += 1
                        yield f"{name}, row {rows},", record
                    self.bytes_read = self.file.size_bytes * rows // total
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                first = str(error).splitlines()[0]
                raise DataError(f"{name} is not a readable parquet file ({first})", fix="fetch it again") from None

    def _whole(self) -> Iterator[tuple[str, Any]]:
        raw = self._raw = HashedStream(self.file)
        if self.file.size_bytes > 4 * self.rules.max_document_bytes:
            self.sha256 = raw.finish()
            yield self.file.address, _Bad(f"is longer than {self.rules.max_document_bytes:,} bytes")
            return
        data = raw.readall()
        self.sha256 = raw.finish()
        try:
            if what := contradiction("", data[:HEAD_BYTES], "text"):
                yield self.file.address, _Bad(what.strip())
                return
            # No newline translation: a document's line ends are its own.
            yield self.file.address, data.removeprefix(BOM).decode("utf-8")
        except UnicodeDecodeError as error:
            yield self.file.address, _Bad(f"is not UTF-8 ({error})")


def _batches(table: Any, columns: list[str]) -> Iterator[Any]:
    """The rows of a parquet file, so many at a time that they are some megabytes."""
    wanted = {name.split(".")[0] for name in columns}
    for index in range(table.metadata.num_row_groups):
        group = table.metadata.row_group(index)
        chunks = (group.column(number) for number in range(group.num_columns))
        size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in wanted)
        rows = max(1, min(64, group.num_rows * BATCH_BYTES // max(1, size)))
        yield from table.iter_batches(batch_size=rows, row_groups=[index], columns=columns, use_threads=False)


def _refuse(file: InputFile, head: bytes, expected: str) -> None:
    """DataError if a file, or what is packed in it, begins as another form does than its name says."""
    if what := contradiction(file.address, head, expected):
        raise DataError(what, fix=remedy(what))


def _decompressed(file: InputFile, raw: HashedStream) -> IO[bytes]:
    name, buffered = file.name.lower(), io.BufferedReader(raw, READ_BYTES)
    head = buffered.peek(HEAD_BYTES)[:HEAD_BYTES]
    if not name.endswith((".gz", ".zst")):
        _refuse(file, head, "lines")
        return cast(IO[bytes], buffered)
    if not head:
        raise EOFError("it is empty")  # the libraries take nothing at all for a whole file
    _refuse(file, head, "gzip" if name.endswith(".gz") else "zstandard")
    unpacked: Any = gzip.GzipFile(fileobj=buffered) if name.endswith(".gz") else _ZstandardStream(buffered)
    stream = unpacked if name.endswith(".gz") else io.BufferedReader(unpacked, READ_BYTES)
    _refuse(file, stream.peek(HEAD_BYTES)[:HEAD_BYTES], "lines")
    return cast(IO[bytes], stream)


class _ZstandardStream(io.RawIOBase):
    """Decompresses one frame after another, as parallel compressors write them.

    The library's own stream reader takes a file that breaks off for one that ends. This one raises EOFError.
    """

    SLICE_BYTES = 1 << 13  # compressed bytes at a time, so that what comes out stays small

    def __init__(self, source: IO[bytes]) -> None:
        import zstandard

        self._source = source
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame: Any = None
        self._compressed, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._compressed = self._compressed or self._source.read(self.SLICE_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the last zstandard frame is not complete")
                return 0
            if self._frame is None:
                self._frame = self._new_frame()
            self._ready = memoryview(self._frame.decompress(self._compressed))
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _parsed(line: bytes) -> Any:
    """One line of JSON, or what is wrong with it."""
    import orjson

    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as strict:
        try:
            # NaN, which Python writes, and lone surrogates, which are named later. Decoded here, for from bytes json
            # would also take UTF-16.
            return json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            return _Bad(f"is not valid JSON in UTF-8 ({strict})")


_ABSENT = object()


def _field(record: dict[str, Any], name: str) -> Any:
    """The value of a field, whose name may be dotted for a nested one; _ABSENT if there is none."""
    if name in record:
        return record[name]
    found: Any = record
    for key in name.split("."):
        if not isinstance(found, dict) or key not in found:
            return _ABSENT
        found = found[key]
    return found


def _written(value: Any) -> str:
    """A field's value as `--exclude` names it: JSON, without quotes; dates and decimals of parquet as Python writes them."""
    if isinstance(value, dict | list | int | float | None):
        return json.dumps(value, default=str)
    return str(value)


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else f"of type {type(value).__name__}")


def _checked(text: str) -> str:
    """The text, if it can be written in UTF-8."""
    if not text.isascii() and (found := lone_surrogate(text)):
        raise _Bad(f"has {found}")
    return text


def read_documents(file: InputFile, rules: Rules | None = None) -> Iterator[str]:
    """Every document of one input file, in the file's order."""
    return iter(Reader(file, rules))
