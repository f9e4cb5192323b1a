"""One command at a time in a directory that it writes: held from its first moment, gone with its last process.

The lock is flock on a small file, which falls with the process that holds it and with all to which its descriptor was
given. The file says who holds it, for the message, and for file systems that several machines share without sharing flock:
there the holder's record is renewed every few seconds, and one that stands still is a dead machine's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinyllama.data.durable import cannot_write, refuse_root
from tinyllama.errors import UserError
from tinyllama.processes import Owner

BEAT_S = 5.0  # between two renewals of the record
STALE_S = 20.0  # a record of another machine that stands still for this long is nobody's
SETTLE_S = 1.0  # for a record to reach other machines
ENDING_S = 20.0  # for the last processes of a holder that was killed
NAME = ".lock"
MAX_TRIES = 100
# flock of these is one for all who can see the file.
LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay", "ramfs", "bcachefs"}


_HELD: list[Lock] = []  # by this process


class InUseError(UserError):
    """Another command is writing there."""


def inside(folder: Path) -> Path:
    """The lock of a directory in which files come and go."""
    return folder / NAME


def beside(target: Path) -> Path:
    """The lock of a file or directory that appears by one rename."""
    refuse_root(target)
    absolute = Path(os.path.abspath(target))
    return absolute.with_name(f".{absolute.name}{NAME}")


def read(path: Path) -> dict[str, Any]:
    """Who holds a lock, or held it last; empty if nobody does."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


class Lock:
    """A lock that is held. token: names this holding of it, to those who work under it. descriptor: may be given to them."""

    def __init__(self, path: Path, shown: Path, command: str, descriptor: int, made: list[Path]) -> None:
        self.path, self.token, self.descriptor = path, secrets.token_hex(8), descriptor
        self._shown, self._made, self._closed = shown, made, threading.Event()
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._record = {**dataclasses.asdict(Owner.this()), "token": self.token, "command": command, "since": since}
        self._shared = not is_local(path)
        # Renewed in place, at one length: whoever reads it meanwhile finds it whole.
        self._length = len(json.dumps({**self._record, "beat": 10**12}).encode())
        try:
            os.ftruncate(descriptor, 0)
            self._write(0)
        except OSError:  # the disk is full: nobody could read whose it is
            self._remove()
            raise
        if self._shared:
            time.sleep(SETTLE_S)
            if not self.is_ours():  # two machines at the same moment: the last writer has it
                os.close(descriptor)
                raise _in_use(shown, read(path))
        self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)
        self._thread.start()
        _HELD.append(self)

    def _write(self, beat: int) -> None:
        text = json.dumps({**self._record, "beat": beat}).encode()
        line = text.ljust(self._length) + b"\n"
        if os.pwrite(self.descriptor, line, 0) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(self.descriptor)

    def is_ours(self) -> bool:
        """Whether the record is still this one."""
        return read(self.path).get("token") == self.token

    def _renew(self) -> None:
        beat = 0
        while not self._closed.wait(BEAT_S):
            beat += 1
            with contextlib.suppress(OSError):
                if not self._shared or self.is_ours():
                    self._write(beat)

    def close(self) -> None:
        """Give the lock back, with the file and the folders that were made for it and are empty still."""
        if self._closed.is_set():
            return
        self._closed.set()
        _HELD.remove(self)
        self._thread.join()
        with contextlib.suppress(OSError):
            if self.is_ours():
                self.path.unlink()
        self._let_go()

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()
        self._let_go()

    def _let_go(self) -> None:
        os.close(self.descriptor)
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):
                folder.rmdir()


def take(path: Path, shown: Path, command: str) -> Lock:
    """Hold the lock `path` of `shown`, which `command` will write. InUseError, and nothing touched, if another holds it."""
    try:
        return _take(path, shown, command)
    except OSError as error:
        raise cannot_write(error, path.parent) from None


@contextlib.contextmanager
def held(path: Path, shown: Path, command: str) -> Iterator[Lock]:
    """`take` for the length of a block."""
    lock = take(path, shown, command)
    try:
        yield lock
    finally:
        lock.close()


def refuse_another(path: Path, shown: Path, command: str) -> None:
    """InUseError where a living process of this machine holds the lock for another command than this one."""
    record = read(path)
    owner = Owner.of(record)
    if owner is not None and owner.is_alive() and record.get("command") != command:
        raise _in_use(shown, record)


def give_back_all() -> None:
    """Close every lock of this process, which is about to end without unwinding its stack."""
    for lock in list(_HELD):
        lock.close()


def _take(path: Path, shown: Path, command: str) -> Lock:
    deadline, tries = None, 0
    made: list[Path] = []  # by all tries: whoever is waited for may leave them
    while True:
        made += [folder for folder in _make_folders(path.parent) if folder not in made]
        try:
            # Not through a link, which would have another file overwritten; and not waiting for the writer of a pipe.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except FileNotFoundError:  # the holder before has just removed the folder that it had made
            tries += 1
            if tries > MAX_TRIES:  # or nothing can be made there, as in /proc
                raise
            continue
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UserError(f"{path} is no regular file", fix="remove it, or give another --output")
            free, same = _flock(descriptor), _same(descriptor, path)
            record = read(path)
            owner = Owner.of(record)
            if free is not False and same:
                if owner is None or _is_dead(owner, path, free is True):
                    return Lock(path, shown, command, os.dup(descriptor), made)
                raise _in_use(shown, record)
            if free is False and same:
                if owner is not None and owner.is_alive() is not False:
                    raise _in_use(shown, record)
                # Its last processes are ending, or it has not written its record yet.
                deadline = deadline or time.monotonic() + ENDING_S
                if time.monotonic() > deadline:
                    raise _in_use(shown, record)
        finally:
            os.close(descriptor)
        time.sleep(0.05)


def _make_folders(folder: Path) -> list[Path]:
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for one in reversed(missing):
        one.mkdir(exist_ok=True)
    return missing[::-1]


def _flock(descriptor: int) -> bool | None:
    """Whether this descriptor has the lock now; None where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _same(descriptor: int, path: Path) -> bool:
    """Whether the file is still there under its name: the holder before may have removed it as it ended."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _is_dead(owner: Owner, path: Path, flocked: bool) -> bool:
    """Whether nobody holds the lock any more, though the record names this owner. flocked: whether flock is ours now."""
    if flocked and is_local(path):
        return True  # flock says all: the record is a dead process's, or has come with a copy of a directory in use
    # Machines can share a name: only of one that has not started anew since can a process be told from here.
    alive = owner.is_alive() if owner.boot == Owner.this().boot else None
    if alive is False or (alive and not flocked):
        return not alive
    return _stands_still(path)


def _stands_still(path: Path) -> bool:
    """Whether the record is not renewed."""
    before, until = read(path), time.monotonic() + STALE_S
    while time.monotonic() < until:
        time.sleep(min(1.0, STALE_S / 4))
        if read(path) != before:
            return False
    return True


def is_local(path: Path) -> bool:
    """Whether the file system is one of this machine alone."""
    place, kind = "", ""
    with contextlib.suppress(OSError), open("/proc/self/mountinfo") as mounts:
        wanted = os.path.realpath(path.parent)
        for line in mounts:
            left, _, right = line.partition(" - ")
            point = left.split()[4].encode().decode("unicode_escape")
            if len(point) >= len(place) and (wanted + "/").startswith(point.rstrip("/") + "/"):
                place, kind = point, right.split()[0]
    return kind in LOCAL


def _in_use(shown: Path, record: dict[str, Any]) -> InUseError:
    pid, host, since = record.get("pid"), record.get("host"), record.get("since")
    return InUseError(
        f"{shown} is in use by {record.get('command', 'another command')} (pid {pid} on {host}, since {since})",
        fix=f"wait for it, end it (kill {pid}), or give another --output",
    )
