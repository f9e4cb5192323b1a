"""Files that appear under their name only when they are whole and on disk, and what an error of writing means."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from tinyllama.errors import DataError

MOST_NAME = 255  # bytes of a file's name, of common file systems


def partial_name(path: Path) -> Path:
    """Another name for a file that is being written, which no other process of any host takes."""
    suffix = _partial_suffix()
    name = path.name.encode()[: MOST_NAME - len(suffix.encode())].decode(errors="ignore")
    return path.with_name(f"{name}{suffix}")


def _partial_suffix() -> str:
    return f".{socket.gethostname()}-{os.getpid()}.partial"


def is_special(path: Path) -> bool:
    """Whether it is a device, a pipe or a socket (/dev/null, /dev/stdout): written into. A rename would put a file there."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _behind_links(path: Path) -> Path:
    return Path(os.path.realpath(path)) if path.is_symlink() else path


@contextlib.contextmanager
def durable(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file ("w" of text, "wb" of bytes) that appears when the block ends. Writers of the same file do not meet; the last
    one stays. A link stays one, and so does what is no file.
    """
    encoding = None if "b" in mode else "utf-8"
    if is_special(path):
        with open(path, mode, encoding=encoding) as stream:
            yield stream
        return
    path = _behind_links(path)
    partial = partial_name(path)
    try:
        with open(partial, mode, encoding=encoding) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_text(path: Path, parts: Iterable[str]) -> None:
    """Write a text file atomically, piece after piece; makes its folder. DataError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with durable(path) as stream:
            stream.writelines(parts)
    except OSError as error:
        raise cannot_write(error, path.parent) from None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    with durable(path) as stream:
        json.dump(value, stream)


def read_json(path: Path) -> Any:
    """The content, or None if the file is missing, or no JSON any more: cut off by a crash, or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None


def refuse_existing(path: Path, overwrite: bool) -> None:
    """DataError if there is a file of this name and it is not to be replaced: asked before work that takes long."""
    if not overwrite and os.path.lexists(path) and not path.is_dir():
        raise DataError(f"{path} exists", fix="give another --output, or --overwrite to replace it")


def refuse_root(path: Path) -> None:
    """DataError for `/`, which has no name, and nothing beside it."""
    if not Path(os.path.abspath(path)).name:
        raise DataError(f"{path} is no name of a file or folder", fix="give another --output")


def refuse_foreign(path: Path, is_ours: Callable[[str], bool], what: str) -> None:
    """DataError if a file lies there that is not what a command writes (`what`), by its text: it would be lost."""
    if not path.is_file():
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        text = "\0"  # no text, so none of ours
    except OSError as error:
        raise cannot_write(error, path) from None
    if text.strip() and not is_ours(text):
        raise DataError(f"{path} exists and is not {what}", fix="give another name, or move it away")


def has_format(text: str, family: str) -> bool:
    """Whether a text is JSON whose `format` begins so."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and str(value.get("format", "")).startswith(family)


def refuse_unwritable(path: Path) -> None:
    """DataError if this file could not be written: asked before work that takes long. Makes its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if is_special(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return
        path = _behind_links(path)
        partial_name(path).touch()
        partial_name(path).unlink()
    except OSError as error:
        raise cannot_write(error, path.parent) from None


def cannot_write(error: OSError, folder: Path) -> DataError:
    """What an error of the operating system while writing means for a user."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    fix = "free space and run the same command again; finished files are kept" if full else "give another --output"
    name = str(error.filename or folder).removesuffix(_partial_suffix())  # as the user knows it
    return DataError(f"writing {name} failed ({error.strerror or error})", fix=fix)
