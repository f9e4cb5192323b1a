"""Input files: found in folders, on this machine or at any fsspec address (s3://, gs://, hf://, https://).

Knows names, sizes and versions of files, and opens them as bytes. What is in them is the business of `documents`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from tinyllama.errors import DataError, MissingExtraError

LINE_SUFFIXES = (
    *(".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst"),
    *(".json.gz", ".json.zst"),
)
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
SUFFIXES = (*LINE_SUFFIXES, *TEXT_SUFFIXES, ".parquet")
# Data in forms that are not read: as text they would be nonsense.
FOREIGN_SUFFIXES = (
    *(".json", ".csv", ".tsv", ".bz2", ".xz", ".lz4", ".gz", ".zst", ".zip", ".tar", ".tgz", ".7z"),
    *(".arrow", ".feather", ".avro", ".orc", ".npy", ".bin", ".safetensors"),
)
# What file systems call the mark of a file's content: S3, GCS, others, Hugging Face, HTTP.
VERSION_MARKS = (
    *("ETag", "LastModified", "etag", "md5Hash", "mtime", "oid"),
    *("blob_id", "xet_hash", "Last-Modified", "Content-MD5"),
)
TRIES = 5  # of reading from a remote address, with waits of 0.5 to 4 seconds between them
FIX = "give files or folders of .jsonl, .parquet or text"
# What brings each kind of address; huggingface_hub (hf://) and aiohttp (https://) come with the data extra.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


@dataclasses.dataclass(frozen=True)
class InputFile:
    """One input file.

    address: a local path, or an fsspec address. name: its path below the input it was found under, stable from machine
    to machine. version: changes when the file does (modification time, or the remote store's own mark).
    """

    address: str
    name: str
    size_bytes: int
    version: str

    @property
    def is_local(self) -> bool:
        return "://" not in self.address

    @property
    def kind(self) -> str:
        """ "lines", "parquet" or "text"."""
        lower = self.name.lower()
        if lower.endswith(LINE_SUFFIXES):
            return "lines"
        return "parquet" if lower.endswith(".parquet") else "text"

    def has_changed(self) -> bool:
        """Whether a local file is no longer the one that was found. Of a remote one this cannot be told."""
        if not self.is_local:
            return False
        try:
            status = os.stat(self.address)
        except OSError:
            return True
        return (status.st_size, str(status.st_mtime_ns)) != (self.size_bytes, self.version)

    def open(self) -> IO[bytes]:
        """The file's raw bytes. DataError if it cannot be opened."""
        try:
            if self.is_local:
                return open(self.address, "rb", buffering=0)
            filesystem, path = _filesystem(self.address)
            return filesystem.open(path, "rb")
        except PermissionError:
            raise DataError(f"{self.address} is not readable", fix="grant read permission") from None
        except OSError as error:
            raise DataError(f"{self.address} cannot be opened ({error.strerror or error})", fix=FIX) from None


class HashedStream(io.RawIOBase):
    """A file's bytes, counted and hashed as they pass, so that provenance costs no second reading.

    A remote file whose connection breaks is opened again and continued. DataError if the file cannot be read.
    """

    def __init__(self, file: InputFile) -> None:
        self._file = file
        self._source = file.open()
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        self._digest.update(data)
        self.num_bytes += len(data)
        return len(data)

    def _read(self, count: int) -> bytes:
        wait_s = 0.5
        for attempt in range(1, TRIES + 1):
            try:
                if attempt > 1:
                    self._open_again()
                data = self._source.read(count)
                if data or count == 0 or self._file.is_local or self.num_bytes >= self._file.size_bytes:
                    return data
                raise ConnectionError(f"ended after {self.num_bytes:,} of {self._file.size_bytes:,} bytes")
            except Exception as error:  # every remote store has exceptions of its own
                reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                if self._file.is_local:
                    raise DataError(f"{self._file.address} cannot be read ({reason})", fix="check its disk") from None
                if attempt == TRIES:
                    raise DataError(
                        f"{self._file.address} cannot be read ({reason}), tried {TRIES} times",
                        fix="run the same command again when it answers; finished files are kept",
                    ) from None
                time.sleep(wait_s)
                wait_s *= 2
        raise AssertionError("the last try returns or raises")

    def _open_again(self) -> None:
        self._source = self._file.open()
        try:
            self._source.seek(self.num_bytes)
        except (OSError, ValueError):  # a server that sends whole files only
            rest = self.num_bytes
            while rest and (data := self._source.read(min(rest, 1 << 20))):
                rest -= len(data)

    def finish(self) -> str:
        """Read what is left, close, and give the sha256 of the whole."""
        while self.read(1 << 20):
            pass
        self._source.close()
        return self._digest.hexdigest()


def _filesystem(address: str) -> tuple[Any, str]:
    import fsspec

    protocol = address.split("://", 1)[0]
    try:
        return fsspec.core.url_to_fs(address)
    except ImportError as error:
        if protocol in EXTRAS:
            raise MissingExtraError(f"the package for {protocol}://", EXTRAS[protocol]) from None
        raise DataError(f"{protocol}:// needs a package that is not installed ({error})", fix="install it") from None
    except ValueError as error:
        raise DataError(f"{address} is not an address that can be read ({error})", fix=FIX) from None


def _version(info: dict[str, Any]) -> str:
    marks = {key: str(info[key]) for key in VERSION_MARKS if key in info}
    return repr(sorted(marks.items()))


def _find_local(given: str, suffixes: tuple[str, ...], left_out: list[str]) -> list[InputFile]:
    root = Path(given)

    def refuse(error: OSError) -> None:
        raise error  # os.walk would leave out what it may not read

    try:
        if not root.is_dir():
            return [_local_input(root, root.name)] if root.exists() else []
        found, visited = [], set()
        for folder, _, names in os.walk(root, onerror=refuse, followlinks=True):
            real = os.path.realpath(folder)
            if real in visited:
                raise DataError(f"{folder} is reached twice, by a link", fix="remove the link")
            visited.add(real)
            for path in (Path(folder) / name for name in names):
                if path.name.lower().endswith(suffixes):
                    found.append(_local_input(path, path.relative_to(root).as_posix()))
                else:
                    left_out.append(str(path))
        return found
    except FileNotFoundError as error:
        raise DataError(
            f"{error.filename} is a link to a file that is not there", fix="fetch it, or remove it"
        ) from None
    except PermissionError as error:
        raise DataError(f"{error.filename} is not readable", fix="grant read permission") from None
    except OSError as error:  # a link to itself, a name that is too long
        raise DataError(f"{error.filename} cannot be looked at ({error.strerror})", fix="remove it") from None


def _local_input(path: Path, name: str) -> InputFile:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise DataError(f"the name of {str(path)!a} is not UTF-8", fix="rename it") from None
    status = path.stat()
    return InputFile(str(path), name, status.st_size, str(status.st_mtime_ns))


def _find_remote(given: str, suffixes: tuple[str, ...], left_out: list[str]) -> list[InputFile]:
    filesystem, root = _filesystem(given)
    protocol = given.split("://", 1)[0]

    def as_input(path: str, info: dict[str, Any], name: str) -> InputFile:
        if info.get("size") is None:
            raise DataError(f"{given}: the server does not say how large the file is", fix="fetch it first")
        address = path if "://" in path else f"{protocol}://{path}"
        return InputFile(address, name, int(info["size"]), _version(info))

    try:
        if any(mark in root for mark in "*?["):
            base = root.split("*")[0].split("?")[0].split("[")[0].rpartition("/")[0]
            found = {p: i for p, i in filesystem.glob(root, detail=True).items() if i.get("type") != "directory"}
            return [as_input(p, i, p.removeprefix(base).lstrip("/")) for p, i in found.items()]
        info = filesystem.info(root)
        if info.get("type") != "directory":
            return [as_input(root, info, root.rstrip("/").rpartition("/")[2])]
        found = filesystem.find(root, detail=True)
    except FileNotFoundError:
        raise DataError(f"input {given} does not exist", fix=FIX) from None
    except DataError:
        raise
    except Exception as error:  # every remote store has exceptions of its own
        raise DataError(
            f"{given} cannot be listed ({type(error).__name__}: {error})", fix="check the address"
        ) from None
    base = root.rstrip("/") + "/"
    left_out += [path for path in found if not path.lower().endswith(suffixes)]
    return [as_input(p, i, p.removeprefix(base)) for p, i in found.items() if p.lower().endswith(suffixes)]


def find_inputs(
    inputs: Iterable[str | os.PathLike[str]], suffixes: tuple[str, ...] = SUFFIXES, left_out: list[str] | None = None
) -> list[InputFile]:
    """The files behind paths, folders and addresses, in an order that does not depend on any directory's listing.

    A folder contributes its files with one of `suffixes`, recursively, and the others are added to `left_out`; a file named
    directly is taken for text if its suffix says nothing. DataError if an input is missing, empty, or of a form that is
    not read, or if a file would be read twice.
    """
    found: list[InputFile] = []
    others: list[str] = [] if left_out is None else left_out
    for given in map(str, inputs):
        given = given.removeprefix("file://")
        find = _find_remote if "://" in given else _find_local
        files = find(given, suffixes, others)
        if not files and "://" not in given and not os.path.lexists(given):
            raise DataError(f"input {given} does not exist", fix=FIX)
        if not files:
            raise DataError(f"{given} holds no input files", fix=f"expected one of: {', '.join(suffixes)}")
        for file in files:
            if file.kind == "text" and file.name.lower().endswith(FOREIGN_SUFFIXES):
                raise DataError(f"{file.address} is of a form that is not read", fix=FIX)
        found += sorted(files, key=lambda file: file.name)
    if not found:
        raise DataError("no input files given", fix=FIX)
    seen: set[str] = set()
    for file in found:
        address = os.path.realpath(file.address) if file.is_local else file.address
        if address in seen:
            raise DataError(f"input {file.address} is given twice", fix="name each file once")
        seen.add(address)
    return found
