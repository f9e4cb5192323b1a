"""Input files to documents: JSON lines (plain, gzip, zstandard), parquet, and text files.

A document is one record of a `.jsonl` or parquet file (its `text` or `content` column), or one whole text file. Every
failure is a `DataError` that names the file and the line. Knows nothing of tokens.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, cast

from tinyllama.errors import DataError

TEXT_FIELDS = ("text", "content")
LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")


@dataclasses.dataclass(frozen=True)
class InputFile:
    """One input file. `name` is its path relative to the input it was found under: stable from machine to machine."""

    path: Path
    name: str

    @property
    def kind(self) -> str:
        """ "lines", "parquet" or "text"."""
        lower = self.path.name.lower()
        if lower.endswith(LINE_SUFFIXES):
            return "lines"
        return "parquet" if lower.endswith(".parquet") else "text"


def find_inputs(inputs: Iterable[str | os.PathLike[str]]) -> list[InputFile]:
    """The files behind paths and folders, in an order that does not depend on the directory listing.

    A folder contributes its readable kinds, recursively; a file named directly is taken whatever its suffix.
    """
    found: list[InputFile] = []
    known = (*LINE_SUFFIXES, *TEXT_SUFFIXES, ".parquet")
    for given in inputs:
        root = Path(given)
        if root.is_dir():
            files = [p for p in root.rglob("*") if p.is_file() and p.name.lower().endswith(known)]
            if not files:
                raise DataError(f"{root} holds no input files", fix=f"expected one of: {', '.join(known)}")
            found += sorted((InputFile(p, p.relative_to(root).as_posix()) for p in files), key=lambda f: f.name)
        elif root.exists():
            found.append(InputFile(root, root.name))
        else:
            raise DataError(f"input {root} does not exist", fix="give files or folders of .jsonl, .parquet or text")
    if not found:
        raise DataError("no input files given", fix="give files or folders of .jsonl, .parquet or text")
    return found


def _open_bytes(path: Path) -> IO[bytes]:
    name = path.name.lower()
    try:
        if name.endswith(".gz"):
            return cast(IO[bytes], gzip.open(path, "rb"))
        if name.endswith(".zst"):
            import zstandard

            # read_across_frames: concatenated frames, as parallel compressors write them, are one stream.
            return io.BufferedReader(
                zstandard.ZstdDecompressor().stream_reader(open(path, "rb"), read_across_frames=True)
            )
        return open(path, "rb")
    except PermissionError:
        raise DataError(f"{path} is not readable", fix="grant read permission") from None


def _text_of(record: object, where: str) -> str:
    if isinstance(record, dict):
        for field in TEXT_FIELDS:
            if isinstance(record.get(field), str):
                return record[field]
    raise DataError(f"{where} has no {' or '.join(TEXT_FIELDS)} string", fix="give records with one of these fields")


def _read_lines(path: Path) -> Iterator[str]:
    number = 0
    try:
        with _open_bytes(path) as stream:
            for line in stream:
                number += 1
                if line.strip():
                    yield _text_of(json.loads(line), f"{path}:{number}")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}:{number} is not valid JSON in UTF-8 ({error})", fix="repair or remove the line"
        ) from None
    except (EOFError, OSError, ValueError) as error:
        raise DataError(f"{path} breaks off after line {number} ({error})", fix="fetch the file again") from None
    except Exception as error:
        if type(error).__module__.startswith("zstandard") or type(error).__name__ == "ZstdError":
            raise DataError(f"{path} breaks off after line {number} ({error})", fix="fetch the file again") from None
        raise


def _read_parquet(path: Path) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
        fields = [f for f in TEXT_FIELDS if f in table.schema_arrow.names]
        if not fields:
            raise DataError(
                f"{path} has columns {', '.join(table.schema_arrow.names)}", fix=f"one of {TEXT_FIELDS} is needed"
            )
        for batch in table.iter_batches(batch_size=1024, columns=fields[:1]):
            for text in batch.column(0).to_pylist():
                if text:
                    yield text
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file ({error})", fix="fetch the file again") from None


def read_documents(file: InputFile) -> Iterator[str]:
    """Every document of one input file, in the file's order."""
    if file.kind == "lines":
        yield from _read_lines(file.path)
    elif file.kind == "parquet":
        yield from _read_parquet(file.path)
    else:
        try:
            # newline="": a document's line ends are its own; translating them would change the text.
            yield file.path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{file.path} is not UTF-8 ({error})", fix="convert it or leave it out") from None
        except PermissionError:
            raise DataError(f"{file.path} is not readable", fix="grant read permission") from None
