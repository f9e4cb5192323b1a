"""Files that appear under their name only when they are whole and on disk, and what an error of writing means."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tinyllama.errors import DataError


def partial_name(path: Path) -> Path:
    """Another name for a file that is being written, which no other process of any host takes."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.partial")


@contextlib.contextmanager
def durable(path: Path) -> Iterator[IO[str]]:
    """A text file that appears when the block ends. Writers of the same file do not meet; the last one stays."""
    partial = partial_name(path)
    try:
        with open(partial, "w", encoding="utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    with durable(path) as stream:
        json.dump(value, stream)


def read_json(path: Path) -> Any:
    """The content, or None if the file is missing or was cut off by a crash."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def cannot_write(error: OSError, folder: Path) -> DataError:
    """What an error of the operating system while writing means for a user."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    fix = "free space and run the same command again; finished files are kept" if full else "give another --output"
    return DataError(f"writing {error.filename or folder} failed ({error.strerror or error})", fix=fix)
