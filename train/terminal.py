"""Standard output that a run outlives: a terminal that has been closed, a reader that has gone, a log on a full disk."""

from __future__ import annotations

import contextlib
import errno
from typing import Any, TextIO

from tinyllama.errors import send_nowhere


class Lasting:
    """A stream whose errors of writing are not the program's. What cannot be written is lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Of a reader that will not come back; there may be room on a disk again."""
        if error.errno in (errno.EIO, errno.EPIPE):
            with contextlib.suppress(OSError):
                send_nowhere(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
