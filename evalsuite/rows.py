"""Reads rows that users bring, JSON Lines, CSV, Parquet or text, into one kind of table, with every mistake told in a line.

What is checked here is what is evaluated: the rows are written as Arrow files, which lm-eval's tasks read in the place of
the user's, so that no other reader takes "2020-01-01" for a time, "007" for 7 or "NA" for nothing.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from evalsuite.names import short
from evalsuite.yaml_files import refuse_unreadable
from tinyllama.errors import UserError

FORMATS = ("json", "csv", "parquet", "text")  # dataset_path of tasks that bring their own files
MOST_BYTES = 1 << 30  # of a file, unpacked
MOST_LINE = 64 << 20
FIX = "correct the file"
BATCH = 10_000  # rows
EXACT = 2**53  # whole numbers up to here are float64s as they are
Row = dict[str, Any]
OPTIONS: dict[str, tuple[str, ...]] = {"json": ("field",), "csv": ("sep", "delimiter"), "parquet": (), "text": ()}


class BadRowError(Exception):
    """What is wrong with a row, and its line's number."""

    def __init__(self, number: int, reason: str) -> None:
        self.number, self.reason = number, reason
        super().__init__(f"line {number}: {reason}")


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a file. lines: the line that each begins in; None where rows have no lines of their own.

    schema: a pyarrow.Schema, where the file has one.
    """

    path: Path
    rows: list[Row]
    lines: list[int] | None
    schema: Any = None

    def place(self, index: int) -> str:
        """Where a row is, for a message."""
        return f"{self.path}:{self.lines[index]}" if self.lines else f"{self.path}: row {index + 1}"


def json_line(text: str, strict: bool = False) -> Row:
    """A row of JSON; ValueError says what is wrong. strict: also where a name is there twice."""
    try:
        row = json.loads(text, parse_constant=_no_number, object_pairs_hook=_pairs if strict else None)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError("not an object")
    if "\\ud" in text or "\\uD" in text:
        _refuse_surrogates(row, "")
    return row


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _pairs(pairs: list[tuple[str, Any]]) -> Row:
    row: Row = {}
    for name, value in pairs:
        if name in row:
            raise ValueError(f"field {short(name)} is there twice")
        row[name] = value
    return row


def _refuse_surrogates(value: Any, field: str) -> None:
    """ValueError for half of a surrogate pair: it is no character, and no file can hold it."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"field {field or 'name'}: \\u{ord(value[error.start]):04x} is no character") from None
    elif isinstance(value, dict):
        for name, inner in value.items():
            _refuse_surrogates(name, field)
            _refuse_surrogates(inner, f"{field}.{name}" if field else name)
    elif isinstance(value, list):
        for inner in value:
            _refuse_surrogates(inner, field)


def numbered_lines(stream: IO[bytes]) -> Iterator[tuple[int, str]]:
    """The lines of a file of UTF-8 text, from 1; BadRowError for bytes that are none, and where it is endless."""
    size, number = 0, 0
    while line := stream.readline(MOST_LINE + 1):
        number, size = number + 1, size + len(line)
        if len(line) > MOST_LINE:
            raise BadRowError(number, f"a line of more than {MOST_LINE >> 20} MiB")
        if size > MOST_BYTES:
            raise BadRowError(number, f"more than {MOST_BYTES >> 30} GiB")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRowError(number, f"not UTF-8 (byte 0x{line[error.start]:02x})") from None
        yield number, text.removeprefix("\ufeff") if number == 1 else text


def read(path: Path, form: str, options: dict[str, Any]) -> Rows:
    """The rows of a file of one of the FORMATS; UserError, naming file, line and field, for one that is none."""
    refuse_unreadable(path, fix="paths are relative to the task's file")
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path} has more than {MOST_BYTES >> 30} GiB", fix="give fewer rows")
    readers: dict[str, Callable[[Path, dict[str, Any]], Rows]] = {
        "json": _read_json, "csv": _read_csv, "parquet": _read_parquet, "text": _read_text,
    }  # fmt: skip
    try:
        found = readers[form](path, options)
    except BadRowError as error:
        raise UserError(f"{path}:{error.number}: {error.reason}", fix=FIX) from None
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})", fix=FIX) from None
    if not found.rows:
        raise UserError(f"{path} has no rows", fix="give at least one")
    return found


def _opened(path: Path) -> IO[bytes]:
    if path.suffix in (".zst", ".xz", ".bz2", ".zip"):
        raise UserError(f"{path} is packed", fix="unpack it, or use gzip")
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _read_json(path: Path, options: dict[str, Any]) -> Rows:
    """JSON Lines; or one JSON list of objects, on the top or in a field."""
    with _opened(path) as stream:
        lines = list(numbered_lines(stream))
    first = next((text.lstrip()[:1] for _, text in lines if text.strip()), "")
    if first == "[" or options.get("field") is not None:
        return _read_json_list(path, "".join(text for _, text in lines), options.get("field"))
    rows, numbers = [], []
    for number, text in lines:
        if text.strip():
            try:
                rows.append(json_line(text, strict=True))
            except ValueError as error:
                raise BadRowError(number, f"no JSON object ({_json_reason(error)})") from None
            numbers.append(number)
    return Rows(path, rows, numbers)


def _json_reason(error: ValueError) -> str:
    """Of Python's message the part that holds for the one line."""
    return f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _read_json_list(path: Path, text: str, field: str | None) -> Rows:
    try:
        found = json.loads(text, parse_constant=_no_number, object_pairs_hook=_pairs)
        if field is not None:
            if not isinstance(found, dict) or field not in found:
                raise ValueError(f"no field {field!r} on the top")
            found = found[field]
        if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
            raise ValueError("not a list of objects")
        for row in found:
            _refuse_surrogates(row, "")
    except (ValueError, RecursionError) as error:
        number = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise BadRowError(number, f"no JSON ({error})") from None
    return Rows(path, found, None)


def _read_text(path: Path, options: dict[str, Any]) -> Rows:
    with _opened(path) as stream:
        lines = list(numbered_lines(stream))
    return Rows(path, [{"text": text.rstrip("\r\n")} for _, text in lines], [number for number, _ in lines])


def _read_csv(path: Path, options: dict[str, Any]) -> Rows:
    """A column is numbers, or true and false, only if each of its values is written as Python writes it."""
    csv.field_size_limit(MOST_LINE)
    with _opened(path) as stream:
        text = "".join(text for _, text in numbered_lines(stream))
    separator = options.get("sep", options.get("delimiter", ","))
    if not isinstance(separator, str) or len(separator) != 1:
        raise UserError(f"{path}: delimiter {short(separator)}", fix="give one character")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    cells: list[list[str]] = []
    numbers: list[int] = []
    header: list[str] = []
    before = 0
    try:
        for cell in reader:
            number, before = before + 1, reader.line_num
            if not cell:
                continue
            if not header:
                header = _header(cell, number)
                continue
            if len(cell) != len(header):
                raise BadRowError(number, f"{len(cell)} fields, the header has {len(header)}")
            cells.append(cell)
            numbers.append(number)
    except csv.Error as error:
        raise BadRowError(before + 1, f"no CSV ({error})") from None
    columns = [_values(list(column)) for column in zip(*cells, strict=True)]
    return Rows(path, [dict(zip(header, row, strict=True)) for row in zip(*columns, strict=True)], numbers)


def _header(cells: list[str], number: int) -> list[str]:
    if not cells[0].strip():  # pandas' index, under the name that pandas reads it by
        cells = ["Unnamed: 0", *cells[1:]]
    for cell in cells:
        if not cell.strip() or cells.count(cell) > 1:
            raise BadRowError(
                number, f"field {cell!r} has no name" if not cell.strip() else f"field {cell!r} is there twice"
            )
    return cells


def _values(column: list[str]) -> list[Any]:
    """A CSV column's values; None where nothing stands."""
    given = [text for text in column if text]
    for kind in (_whole, _decimal, {"True": True, "False": False}.get):
        if given and all(kind(text) is not None for text in given):
            return [kind(text) if text else None for text in column]
    return [text or None for text in column]


def _whole(text: str) -> int | None:
    return int(text) if re.fullmatch(r"0|-?[1-9]\d{0,17}", text, re.ASCII) else None


def _decimal(text: str) -> float | None:
    try:
        found = float(text)
    except ValueError:
        return None
    return found if math.isfinite(found) and str(found) == text else None


def _read_parquet(path: Path, options: dict[str, Any]) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path).read()
        if table.nbytes > MOST_BYTES:
            raise UserError(f"{path} has more than {MOST_BYTES >> 30} GiB", fix="give fewer rows")
        if len(set(table.column_names)) < table.num_columns:
            raise UserError(f"{path}: two columns have one name", fix=FIX)
        table.validate(full=True)
        rows = table.to_pylist()
    except (pa.ArrowException, UnicodeDecodeError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path} is no whole Parquet file ({short(reason)})", fix="write it again") from None
    return Rows(path, rows, None, table.schema)


@dataclasses.dataclass
class Field:
    """What a field holds in all rows: one kind, first seen at a place. inner: of a list; fields: of a mapping.

    large: where a whole number is beyond what a float64 holds exactly.
    """

    kind: str | None = None
    place: str = ""
    large: str = ""
    inner: Field | None = None
    fields: dict[str, Field] = dataclasses.field(default_factory=dict)

    def see(self, value: Any, place: str, name: str) -> None:
        """Take a value in; UserError where it is of another kind than those before."""
        if value is None:
            return
        kind = KINDS.get(type(value))
        if kind is None:
            raise UserError(f"{place}: field {name} is {type(value).__name__}", fix=FIX)
        if {kind, self.kind} == {"a number", "a whole number"}:
            kind = self.kind = "a number"
        if self.kind not in (None, kind):
            raise UserError(
                f"{place}: field {name} is {kind} ({short(value)}), in {self.place} it is {self.kind}",
                fix="give one kind in all rows",
            )
        if self.kind is None:
            self.kind, self.place = kind, place
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise UserError(f"{place}: field {name} is beyond 64 bits", fix="give it as text")
        if KINDS[type(value)] == "a whole number" and abs(value) > EXACT and not self.large:
            self.large = place
        if kind == "a number" and self.large:
            raise UserError(
                f"{self.large}: field {name} is a whole number beyond 2^53, in {place} it is a fraction",
                fix="give it as text in all rows",
            )
        if kind == "a number" and not math.isfinite(value):
            raise UserError(f"{place}: field {name} is {value}", fix=FIX)
        if isinstance(value, list):
            self.inner = self.inner or Field()
            for number, inner in enumerate(value):
                self.inner.see(inner, place, f"{name}[{number}]")
        elif isinstance(value, dict):
            for key, inner in value.items():
                self.fields.setdefault(key, Field()).see(inner, place, f"{name}.{key}")

    def arrow(self) -> Any:
        """Its Arrow type."""
        import pyarrow as pa

        if self.kind == "a list":
            return pa.list_((self.inner or Field()).arrow())
        if self.kind == "a mapping":
            return pa.struct([(name, field.arrow()) for name, field in self.fields.items()])
        plain = {
            None: pa.null(), "true or false": pa.bool_(), "a whole number": pa.int64(), "a number": pa.float64(),
            "text": pa.string(),
        }  # fmt: skip
        return plain[self.kind]


KINDS: dict[type, str] = {
    str: "text", int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "a mapping",
}  # fmt: skip


def schema_of(tables: list[Rows]) -> Any:
    """One Arrow schema for the files of a task; UserError where a field is of two kinds."""
    import pyarrow as pa

    if tables[0].schema is not None:
        for other in tables[1:]:
            if not other.schema.equals(tables[0].schema):
                raise UserError(f"{other.path} has other columns than {tables[0].path}", fix="write them alike")
        return tables[0].schema.remove_metadata()
    fields: dict[str, Field] = {}
    for table in tables:
        for index, row in enumerate(table.rows):
            for name, value in row.items():
                fields.setdefault(sys.intern(name), Field()).see(value, table.place(index), name)
    return pa.schema([(name, field.arrow()) for name, field in fields.items()])


def write(table: Rows, schema: Any, path: Path) -> None:
    """Rows as an Arrow file, in batches."""
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        for start in range(0, len(table.rows), BATCH):
            stream.write_batch(pa.RecordBatch.from_pylist(table.rows[start : start + BATCH], schema=schema))
