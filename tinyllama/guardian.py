"""Ends a family of processes with its head. `processes.guarded` runs this text in a bare Python; nobody imports it.

The family is every process whose environment, as it was when it started, holds MARK: children of children too, whoever
started them and whoever has adopted them since. Once the head is gone, or has closed our standard input, each gets SIGKILL;
but for Python's resource trackers, which remove the shared memory of the others once those are gone, and end by themselves.
Given by the text before this one: PID and MARK (bytes).
"""

import contextlib
import os
import select
import signal
import time

WAIT_S = 30  # for processes that the kernel cannot end yet: they wait for a disk
TRACKER_S = 5  # for the trackers, once they are alone
CALM = 3  # looks in a row that find nobody: one who was just being started has begun by then
pid_of_head: int = globals()["PID"]
mark: bytes = globals()["MARK"]


def family() -> list[int]:
    """Process ids of those that are left."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in (os.getpid(), pid_of_head):
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as stream:
                if mark in stream.read():
                    found.append(int(name))
    return found


def is_tracker(pid: int) -> bool:
    """Whether it is multiprocessing's resource tracker, or joblib's."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as stream:
        return b"resource_tracker" in stream.read()
    return False


def wait_for_the_end() -> None:
    """Until the head is gone or says that it is done."""
    poll = select.poll()
    poll.register(0, select.POLLIN | select.POLLHUP)
    with contextlib.suppress(OSError, AttributeError):  # of an old kernel: looked at instead
        poll.register(os.pidfd_open(pid_of_head), select.POLLIN)
    while os.getppid() == pid_of_head and not poll.poll(500):
        pass


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    wait_for_the_end()
    deadline, calm = time.monotonic() + WAIT_S, 0
    patience = time.monotonic() + TRACKER_S
    while calm < CALM and time.monotonic() < deadline:
        left = family()
        doomed = [pid for pid in left if not is_tracker(pid)]
        if doomed:
            patience = time.monotonic() + TRACKER_S
        for pid in doomed if time.monotonic() < patience else left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        calm = 0 if left else calm + 1
        time.sleep(0.02)


main()
