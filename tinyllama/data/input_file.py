"""One input file, here or behind an fsspec address, and its bytes: counted, hashed, read on when a connection breaks."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import time
from typing import IO, Any

from tinyllama.data.addresses import filesystem, identity, is_address, without_secrets
from tinyllama.data.forms import FIX, HEAD_BYTES, kind_of
from tinyllama.errors import DataError

TRIES = 5  # of reading from a remote address, with waits of 0.5 to 4 seconds between them


@dataclasses.dataclass(frozen=True)
class InputFile:
    """One input file.

    address: a local path, or an fsspec address, without any secret. name: its path below the input it was found under,
    stable from machine to machine, and no other input's. version: changes when the file does (modification time, or the
    remote store's own mark). key: names this input's part of the work, the same when others are added and when the
    address is signed again. opens: the address with its secrets, if it has any: never written anywhere.
    """

    address: str
    name: str
    size_bytes: int
    version: str
    key: str = ""
    opens: str = dataclasses.field(default="", repr=False)

    @property
    def is_local(self) -> bool:
        return not is_address(self.address)

    @property
    def kind(self) -> str:
        """ "lines", "parquet" or "text"."""
        return kind_of(self.name) or "text"

    def __post_init__(self) -> None:
        if not self.key:
            told_by = identity(self.opens) if self.opens else self.address
            object.__setattr__(self, "key", hashlib.sha256(f"{self.name}\0{told_by}".encode()).hexdigest()[:24])

    def named(self, name: str) -> InputFile:
        """The same file under another name."""
        return dataclasses.replace(self, name=name, key="")

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
            source, path = filesystem(self.opens or self.address)
            stream = source.open(path, "rb")
            with contextlib.suppress(AttributeError):
                stream.filesystem_of_input = source  # an archive is closed with its last reference
            return stream
        except PermissionError:
            raise DataError(f"{self.address} is not readable", fix="grant read permission") from None
        except OSError as error:
            reason = without_secrets(error.strerror or error)
            raise DataError(f"{self.address} cannot be opened ({reason})", fix=FIX) from None

    def head(self) -> bytes:
        """The first bytes. DataError if they cannot be read."""
        source = self.open()
        try:
            return source.read(HEAD_BYTES) or b""
        except Exception as error:  # every remote store has exceptions of its own
            raise DataError(
                f"{self.address} cannot be read ({without_secrets(error)})", fix="check the address"
            ) from None
        finally:
            source.close()


class HashedStream(io.RawIOBase):
    """A file's bytes, counted and hashed as they pass, so that provenance costs no second reading.

    A remote file whose connection breaks is opened again and continued. DataError if the file cannot be read.
    """

    def __init__(self, file: InputFile) -> None:
        self._file = file
        self._source = file.open()
        self._digest = hashlib.sha256()
        self.num_bytes = 0
        self.head = b""  # the first bytes, by which a file may object to its name

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._read(len(buffer))
        if not self.num_bytes:
            self.head = data[:HEAD_BYTES]
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
                reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {without_secrets(error)}"
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
