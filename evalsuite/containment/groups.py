"""A control group for each program, where this process may make one: memory and processes of a program as a whole.

Version 2: beside the own group, or below it where that is allowed. Version 1: below the own groups. Linux gives neither to
an ordinary user whose system does not delegate groups; then there are none, and the measured limits hold alone.

A group is named after nobody but us and locked (flock) by the processes that use it, so that what a killed sandbox has left
is told from what another one uses.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from typing import NamedTuple

PREFIX = "tinyllama-program-"
RANDOM_BYTES = 8
MAKES = 5  # tries, as others clear away what nobody has locked yet
PAUSE_S, REMOVES = 0.002, 1000  # the kernel may take a moment to end a program's processes
NEAR_BYTES = 1 << 20  # the most that was used is less than the limit by what was asked for last
TRIED_BYTES, TRIED_PROCESSES = 64 << 20, 16
# A group beside the own one would escape what these say of the own one.
OWN_LIMITS = {"memory.max": "max", "memory.high": "max", "cpu.max": "max", "cpuset.cpus": ""}


# By version: the file that counts processes killed for want of memory, those that say whether the group's own limit was
# reached, and by which name: a count, or "" for files with the most that was used (version 1's failcnt
# stays 0 in Linux 6.18).
_COUNTS = {
    1: ("memory.oom_control", ("memory.max_usage_in_bytes", "memory.memsw.max_usage_in_bytes"), ""),
    2: ("memory.events", ("memory.events",), "oom"),
}


class Place(NamedTuple):
    """Where groups are made: the folder in the memory controller's tree, and in that of processes if there is one."""

    version: int
    memory: str
    processes: str | None

    def folders(self) -> list[str]:
        return list(dict.fromkeys(folder for folder in (self.memory, self.processes) if folder))


def find() -> Place | None:
    """Where groups can be made and used: tried with a process. Clears away what killed sandboxes have left there."""
    try:
        found = places(_text("/proc/self/cgroup"), _text("/proc/self/mountinfo"))
    except (OSError, ValueError):
        return None
    for place in found:
        remove_stale(place)
        if _works(place):
            return place
    return None


def places(groups: str, mounts: str) -> list[Place]:
    """Where groups might be made, the best first, by the texts of /proc/self/cgroup and /proc/self/mountinfo."""
    own: dict[str, str] = {}
    for line in groups.splitlines():
        _, names, path = line.split(":", 2)
        own |= dict.fromkeys(names.split(","), path)  # "" for version 2
    found = []
    for point, folder in _folders(mounts, "cgroup2", "", own.get("")):
        found += _unified(point, folder)
    processes = [folder for _, folder in _folders(mounts, "cgroup", "pids", own.get("pids"))]
    for _, folder in _folders(mounts, "cgroup", "memory", own.get("memory")):
        found += [Place(1, folder, one) for one in (*processes, None)]
    return found


def _unified(point: str, folder: str) -> list[Place]:
    """Version 2: beside the own group, below it. point: the top of what is visible here."""
    wanted = []
    if folder != point and not _has_limits(folder):
        wanted.append(os.path.dirname(folder))
    wanted.append(folder)
    found = []
    for parent in wanted:
        given = _given(f"{parent}/cgroup.subtree_control").split()
        if "memory" in given:
            found.append(Place(2, parent, parent if "pids" in given else None))
    return found


def _has_limits(folder: str) -> bool:
    """Whether the own group, version 2, has limits of its own."""
    for name, none in OWN_LIMITS.items():
        found = _given(f"{folder}/{name}").split()
        if found and found[0] != none:
            return True
    return False


def _folders(mounts: str, kind: str, controller: str, path: str | None) -> list[tuple[str, str]]:
    """The mount points where a group of that path is visible, and its folder there."""
    found: list[tuple[str, str]] = []
    for line in mounts.splitlines() if path is not None else ():
        mounted, _, rest = line.partition(" - ")
        fields, (what, _, options) = mounted.split(), rest.split()[:3]
        if what != kind or (controller and controller not in options.split(",")):
            continue
        root, point = (_unescaped(text).rstrip("/") for text in fields[3:5])
        own = (path or "").rstrip("/")
        if (own + "/").startswith(root + "/") and ".." not in own[len(root) :].split("/"):
            found.append((point, point + own[len(root) :]))
    return found


def _unescaped(text: str) -> str:
    """A path as mountinfo has it: white space and backslashes are three octal digits."""
    first, *parts = text.split("\\")
    return first + "".join(chr(int(part[:3], 8)) + part[3:] for part in parts)


class Group:
    """A group, locked by this process and those it forks. OSError where it cannot be made."""

    def __init__(self, place: Place, name: str) -> None:
        self.place, self.name, self._memory_bytes = place, name, 0
        self._opened: list[int] = []
        memory = f"{place.memory}/{name}"
        try:
            self._opened += [_locked(f"{folder}/{name}") for folder in place.folders()]
            self._entries = [self._open(f"{folder}/{name}/cgroup.procs", os.O_RDWR) for folder in place.folders()]
            # Descriptors, as a program's world does not show the folders.
            kills, hits, self._hit = _COUNTS[place.version]
            self._killed = self._open(f"{memory}/{kills}", os.O_RDONLY)
            self._reached = [
                self._open(f"{memory}/{hit}", os.O_RDONLY) for hit in hits if os.path.exists(f"{memory}/{hit}")
            ]
        except BaseException:
            self.close()
            raise

    def limit(self, memory_bytes: int, processes: int) -> None:
        """Set its limits."""
        self._memory_bytes = memory_bytes
        for name, value, needed in _limits(self.place.version, memory_bytes):
            _set(f"{self.place.memory}/{self.name}/{name}", value, needed)
        if self.place.processes:
            _set(f"{self.place.processes}/{self.name}/pids.max", str(processes), True)

    def _open(self, path: str, flags: int) -> int:
        self._opened.append(os.open(path, flags))
        return self._opened[-1]

    def close(self) -> None:
        """Give the lock up."""
        while self._opened:
            os.close(self._opened.pop())

    def enter(self) -> None:
        """Move this process into the group, and with it all that it starts."""
        for entry in self._entries:
            os.write(entry, b"0")

    def holds(self, process: int) -> bool:
        """Whether a process is in the group."""
        return all(str(process) in os.pread(entry, 1 << 16, 0).decode().split() for entry in self._entries)

    def out_of_memory(self) -> bool:
        """Whether the kernel has ended a process of the group and the group's own limit was reached. The kernel counts
        before it kills; what it kills because the machine is full counts as well, but does not reach the limit.
        """
        if _count(self._killed, "oom_kill") == 0:
            return False
        least = 1 if self._hit else self._memory_bytes - NEAR_BYTES
        return any(_count(descriptor, self._hit) >= least for descriptor in self._reached)


def enter(place: Place | None, name: str) -> Group | None:
    """Make a group and move this process into it; None where there are none, or none can be made any longer."""
    if place is None:
        return None
    try:
        group = Group(place, name)
        group.enter()
        return group
    except OSError:
        return None


def new_name() -> str:
    return PREFIX + os.urandom(RANDOM_BYTES).hex()


def remove(place: Place, name: str) -> None:
    """Remove a group whose processes have ended, or are about to."""
    for folder in place.folders():
        for _ in range(REMOVES):
            try:
                os.rmdir(f"{folder}/{name}")
            except OSError as error:
                if error.errno == errno.EBUSY:
                    time.sleep(PAUSE_S)
                    continue
            break


def remove_stale(place: Place) -> None:
    """Remove groups of ours that nobody uses: neither locked nor with a process in them."""
    for folder in place.folders():
        for name in _ours(folder):
            try:
                descriptor = os.open(f"{folder}/{name}", os.O_RDONLY | os.O_DIRECTORY)
            except OSError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.rmdir(f"{folder}/{name}")
            except OSError:
                continue  # in use
            finally:
                os.close(descriptor)


def _ours(folder: str) -> list[str]:
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return [name for name in names if name.startswith(PREFIX) and _is_random(name.removeprefix(PREFIX))]


def _is_random(text: str) -> bool:
    """Whether `new_name` may have made a text."""
    return len(text) == 2 * RANDOM_BYTES and not text.strip("0123456789abcdef")


def _works(place: Place) -> bool:
    """Whether a group can be made there, has its limits, and takes a process."""
    name, group = new_name(), None
    try:
        group = Group(place, name)
        group.limit(TRIED_BYTES, TRIED_PROCESSES)
        limit = "memory.max" if place.version == 2 else "memory.limit_in_bytes"
        if int(_text(f"{place.memory}/{name}/{limit}")) != TRIED_BYTES:
            return False
        child = os.fork()
        if child == 0:
            held = False
            try:
                group.enter()
                held = group.holds(os.getpid())
            finally:
                os._exit(0 if held else 1)
        return os.waitpid(child, 0)[1] == 0
    except (OSError, ValueError):
        return False
    finally:
        if group is not None:
            group.close()
        remove(place, name)


def _locked(folder: str) -> int:
    """Make a group's folder; returns a descriptor that locks it."""
    for _ in range(MAKES):
        os.mkdir(folder)
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                return descriptor
            os.close(descriptor)
        except FileNotFoundError:
            continue  # another sandbox has taken it for one that was left
    raise OSError(errno.EAGAIN, f"{folder} is removed by others")


def _limits(version: int, memory_bytes: int) -> list[tuple[str, str, bool]]:
    """File, value, and whether it is needed: kernels without a swap account lack some."""
    if version == 2:
        # Not memory.oom.group, which would end the supervisor too: that ends all, and says why.
        return [("memory.max", str(memory_bytes), True), ("memory.swap.max", "0", False)]
    return [
        ("memory.limit_in_bytes", str(memory_bytes), True),
        ("memory.memsw.limit_in_bytes", str(memory_bytes), False),
        ("memory.swappiness", "0", False),
        ("memory.oom_control", "0", True),  # 1, which the own group may have, would let a program hang instead
    ]


def _set(path: str, value: str, needed: bool) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY)
        try:
            os.write(descriptor, value.encode())
        finally:
            os.close(descriptor)
    except OSError:
        if needed:
            raise


def _count(descriptor: int, name: str) -> int:
    """A number of an open file of lines NAME NUMBER, or of the number alone where the name is empty."""
    text = os.pread(descriptor, 1 << 12, 0).decode()
    if not name:
        return int(text)
    return next((int(line.split()[1]) for line in text.splitlines() if line.split()[0] == name), 0)


def _given(path: str) -> str:
    """The text of a file, "" where there is none."""
    try:
        return _text(path)
    except OSError:
        return ""


def _text(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape") as stream:
        return stream.read()
