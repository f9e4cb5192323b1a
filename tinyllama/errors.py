"""Errors that a user can act on.

A `UserError` says what was wrong, with the value, and how to fix it. The command line prints it as one red line and
exits with code 2; any other exception is a bug (or a failure of the machine) and keeps its traceback, exit code 1.
"""

from __future__ import annotations

import errno
import os
from typing import TextIO

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a file system answers where there is no more room


class UserError(Exception):
    """A mistake in the input: `what` names the thing and its value, `fix` says what to do about it."""

    def __init__(self, what: str, *, fix: str | None = None) -> None:
        self.what = what
        self.fix = fix
        super().__init__(f"{what}; {fix}" if fix else what)

    def __reduce__(self) -> tuple:
        """Errors come back from worker processes as they were."""
        return _rebuild, (type(self), self.what, self.fix, str(self))


def first_line(error: BaseException) -> str:
    """The first line that an exception says; its type's name where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def send_nowhere(stream: TextIO) -> None:
    """Drop what a stream still holds, and all that follows: it cannot be written."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _rebuild(kind: type[UserError], what: str, fix: str | None, text: str) -> UserError:
    error = kind.__new__(kind)
    error.what, error.fix = what, fix
    error.args = (text,)
    return error


class MissingExtraError(UserError):
    """An optional dependency is not installed. Names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        self.package = package
        self.extra = extra
        super().__init__(f"{package} is not installed", fix=f"pip install 'tinyllama[{extra}]'")


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete or does not belong to this run."""


class DataError(UserError):
    """A token store or an input file is missing, corrupt or does not match."""


class ConfigError(UserError):
    """A recipe or a DeepSpeed JSON asks for something unknown or impossible."""


def nearest(name: str, valid: list[str]) -> str:
    """The fix to offer for an unknown `name`: the nearest valid one, else the whole list."""
    import difflib

    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"valid: {', '.join(sorted(valid))}"
