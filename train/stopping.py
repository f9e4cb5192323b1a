"""Signals that ask a rank to stop, from its first moment: noted while it trains, which then saves; an end at once before.

A thread reads the signals from a pipe that the interpreter's own handler writes to, because the main thread may be where no
Python runs for minutes: in a rendezvous, or in a library that is being loaded. Must stay free of heavy imports: it is the
first thing that a rank does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

STOPPED_BY_SIGNAL = 75  # EX_TEMPFAIL
NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
BEFORE = "stopped by a signal before the first step; run the same command again"


def heeded() -> list[signal.Signals]:
    """The signals that stop a run: not SIGHUP where nohup has had it ignored."""
    return [n for n in NUMBERS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]


def say() -> None:
    """One line, where no launcher of ours will write it."""
    if "--lock" not in sys.argv and os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"{BEFORE}\n".encode())


class Stop:
    """Whether this rank has been asked to stop. `hold` ends the time in which it leaves at once."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.last_words: Callable[[], None] = say  # before leaving at once
        self._held = False
        self._mutex = threading.Lock()

    def install(self) -> None:
        """Take the signals over; in the main thread."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are its own
        for number in heeded():
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()

    def _listen(self, reader: int) -> None:
        while True:
            for number in os.read(reader, 64):
                if number in NUMBERS:
                    self.note(number)

    def note(self, number: int) -> None:
        """A signal has come, or something that means the same."""
        with self._mutex:
            self.received.append(number)
            if not self._held:
                try:
                    self.last_words()
                finally:
                    os._exit(STOPPED_BY_SIGNAL)

    def hold(self) -> None:
        """From now on signals are only noted: there is something to save."""
        with self._mutex:
            self._held = True


def launchers_above(script: str) -> list[int]:
    """The processes above this one's parent that were started with this script as an argument: DeepSpeed's runner."""
    found: list[int] = []
    pid = _parent(os.getppid())
    while pid > 1:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            break
        if not any(os.path.basename(word) == script.encode() for word in words):
            break
        found.append(pid)
        pid = _parent(pid)
    return found


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
