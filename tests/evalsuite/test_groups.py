"""A control group bounds each program as a whole, says so, and is gone afterwards."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from conftest import until

from evalsuite import sandbox as sandbox_module
from evalsuite.containment import groups
from evalsuite.containment.groups import Group, Place, find, new_name, places, remove, remove_stale
from evalsuite.sandbox import GROUP_BYTES, GROUPED, MEASURED, Limits, Sandbox

pytestmark = pytest.mark.alone  # other sandboxes of this machine have groups in the same place

MIB = 1 << 20
PLACE = find()
needs_groups = pytest.mark.skipif(PLACE is None, reason="this user may make no control groups on this machine")
BOMBS = {
    "a mapping filled at once": "import mmap\nm = mmap.mmap(-1, 600 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x8000)",
    "forks, and swallows their end": (
        "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n        x = bytearray(b'x') * (40 << 20)\n"
        "        time.sleep(60)\nfor _ in range(8):\n    os.wait()"
    ),
    "the kernel's memory for mappings": (
        "import ctypes, mmap, os, time\nlibc = ctypes.CDLL(None)\n"
        "libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]\n"
        "m = mmap.mmap(-1, 512 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "base = ctypes.addressof(ctypes.c_char.from_buffer(m))\nfor _ in range(4):\n    os.fork()\n"
        "for n in range(0, 1 << 17, 2):\n    libc.mprotect(base + n * 4096, 4096, 1)\ntime.sleep(60)"
    ),
}  # fmt: skip


def peak(folder: Path) -> int:
    name = "memory.peak" if (folder / "memory.peak").exists() else "memory.max_usage_in_bytes"
    return int((folder / name).read_text())


def ours(place: Place) -> list[str]:
    return [name for folder in place.folders() for name in groups._ours(folder)]


def none_is_left() -> bool:
    """Whether all groups are gone that nobody uses; the kernel may take a moment to end their processes."""

    def gone() -> bool:
        remove_stale(PLACE)
        return not ours(PLACE)

    return until(gone)


@pytest.fixture
def peaks():
    """Name -> most memory that was seen in each of our groups, while the test runs."""
    found, over = {}, threading.Event()

    def look() -> None:
        while not over.is_set():
            for name in groups._ours(PLACE.memory):
                try:
                    found[name] = peak(Path(PLACE.memory) / name)
                except (OSError, ValueError):
                    continue
            time.sleep(0.001)

    thread = threading.Thread(target=look)
    thread.start()
    yield found
    over.set()
    thread.join()


@needs_groups
@pytest.mark.parametrize("name", BOMBS)
def test_the_group_alone_bounds_a_bomb(monkeypatch, peaks, name):
    """With a limit that is passed before the measured one, which the verdict names."""
    limit = 128 * MIB
    ask = sandbox_module._Server.ask
    monkeypatch.setattr(
        sandbox_module._Server, "ask", lambda self, task, most_s: ask(self, task | {"group_bytes": limit}, most_s)
    )
    sandbox = Sandbox(Limits(wall_s=30.0, memory_bytes=1 << 40, processes=256))
    assert sandbox.run("assert 1 == 2").reason == "AssertionError: "
    verdict = sandbox.run(BOMBS[name])
    assert verdict.reason == f"out of memory: more than {1 << 20} MiB in all processes together"
    assert not verdict.passed
    assert sandbox.record()["memory"] == GROUPED
    sandbox.close()
    assert limit * 0.9 < max(peaks.values()) <= limit
    assert none_is_left()


@needs_groups
def test_bombs_stay_within_the_limits_of_an_evaluation(peaks):
    sandbox = Sandbox(Limits(wall_s=30.0, memory_bytes=256 * MIB))
    for bomb in BOMBS.values():
        assert "out of memory: more than 256 MiB" in sandbox.run(bomb).reason
    sandbox.close()
    assert max(peaks.values()) <= 256 * MIB + GROUP_BYTES
    assert none_is_left()


@needs_groups
def test_the_pages_of_files_are_no_want_of_memory(peaks):
    """The kernel charges them to the group, and takes them back."""
    size = 400 * MIB
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as stream:  # /tmp is hidden from programs
        stream.truncate(size)  # read as zeros, through pages in memory
        os.chmod(stream.name, 0o644)
        sandbox = Sandbox(Limits(wall_s=30.0, memory_bytes=64 * MIB))
        sandbox.roots = [*sandbox.roots, "/var/tmp"]
        verdict = sandbox.run(
            f"found = 0\nwith open({stream.name!r}, 'rb') as stream:\n    while part := stream.read(1 << 20):\n"
            f"        found += len(part)\nassert found == {size}"
        )
        sandbox.close()
    assert verdict.passed, verdict.reason
    assert max(peaks.values()) > 64 * MIB  # they were charged


@needs_groups
def test_a_program_sees_no_control_group():
    sandbox = Sandbox()
    for text in (
        "import os\nassert os.path.exists('/sys') or os.path.exists('/proc/self')",
        "import os\nopened = 0\nfor number in range(3, 255):\n    try:\n        opened += bool(os.fstat(number))\n"
        "    except OSError:\n        pass\nassert opened",
    ):
        assert not sandbox.run(text).passed
    sandbox.close()


@needs_groups
def test_a_group_of_a_killed_evaluation_is_removed():
    """With the evaluation its server is killed too: the next start removes what they left, and nothing that is in use."""
    code = (
        "from evalsuite.sandbox import *\nimport threading\ns = Sandbox(Limits(wall_s=60, cpu_s=60))\ns.run('')\n"
        "print(s._servers[0].process.pid, flush=True)\ns.run('import time\\ntime.sleep(60)')"
    )
    others = set(ours(PLACE))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        server = int(process.stdout.readline())
        before = set(ours(PLACE)) - others
        assert before
    finally:
        os.kill(server, signal.SIGKILL)
        process.kill()
        process.wait()
        process.stdout.close()
    assert until(lambda: all(_is_free(name) for name in before))
    sandbox = Sandbox()
    assert sandbox.run("").passed
    live = set(ours(PLACE)) - others
    assert live, "the next program's is in use"
    assert not before & live
    remove_stale(PLACE)
    assert set(ours(PLACE)) & live
    assert sandbox.run("").passed
    assert sandbox.record()["memory"] == GROUPED
    sandbox.close()
    assert none_is_left()


def _is_free(name: str) -> bool:
    """Whether the processes that used a group have ended."""
    descriptor = os.open(f"{PLACE.memory}/{name}", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return Path(f"{PLACE.memory}/{name}/cgroup.procs").read_text() == ""
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


@needs_groups
def test_what_is_locked_or_foreign_is_left_alone():
    name = new_name()
    group = Group(PLACE, name)
    foreign = [Path(PLACE.memory) / "tinyllama-program-mine", Path(PLACE.memory) / f"x{new_name()}"]
    for folder in foreign:
        folder.mkdir()
    try:
        remove_stale(PLACE)
        assert name in ours(PLACE)
        assert all(folder.is_dir() for folder in foreign)
        group.close()
        remove_stale(PLACE)
        assert name not in ours(PLACE)
    finally:
        for folder in foreign:
            folder.rmdir()
        group.close()
        remove(PLACE, name)


def test_where_no_group_is_to_be_had_memory_is_measured():
    sandbox = Sandbox(Limits(memory_bytes=256 * MIB))
    assert sandbox.record()["memory"] == MEASURED  # nothing has run
    sandbox.run("")
    assert sandbox.record()["memory"] == (MEASURED if PLACE is None else GROUPED)
    sandbox.close()


V1 = """31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
39 31 0:36 /box /c/pids\\040here rw,relatime - cgroup cgroup rw,cpu,pids
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
"""


def test_version_1_is_found_by_its_mounts():
    own = "9:name=systemd:/\n8:cpu,pids:/box/one\n4:memory:/a/b\n0::/\n"
    expected = "/c/pids here/one"
    assert places(own, V1) == [
        Place(1, "/sys/fs/cgroup/memory/a/b", expected), Place(1, "/sys/fs/cgroup/memory/a/b", None)
    ]  # fmt: skip
    assert places(own.replace("/box/one", "/boxes"), V1) == [Place(1, "/sys/fs/cgroup/memory/a/b", None)]
    assert places(own.replace("/a/b", "/../b"), V1) == []  # outside of this cgroup namespace
    together = "3:memory,pids:/x\n"
    mounted = "35 31 0:32 / /g rw - cgroup cgroup rw,memory,pids\n"
    assert places(together, mounted)[0].folders() == ["/g/x"]
    assert places("", "") == []


@pytest.fixture
def unified(tmp_path):
    """The texts of a process in /user/scope of a version 2 tree that is made of files; its top folder."""
    scope = tmp_path / "user" / "scope"
    scope.mkdir(parents=True)
    for folder, given in ((tmp_path, "cpu memory pids"), (tmp_path / "user", "memory pids"), (scope, "")):
        (folder / "cgroup.subtree_control").write_text(f"{given}\n")
    for name, value in groups.OWN_LIMITS.items():
        (scope / name).write_text({"cpu.max": "max 100000"}.get(name, value) + "\n")
    return f"30 23 0:26 / {tmp_path} rw - cgroup2 cgroup rw,nsdelegate\n", tmp_path


def test_version_2_is_used_beside_the_own_group_or_below_it(unified):
    mounts, top = unified
    user, scope = str(top / "user"), str(top / "user" / "scope")
    assert places("0::/user/scope\n", mounts) == [Place(2, user, user)]
    (top / "user" / "cgroup.subtree_control").write_text("memory\n")
    assert places("0::/user/scope\n", mounts) == [Place(2, user, None)]
    (top / "user" / "cgroup.subtree_control").write_text("cpu pids\n")
    assert places("0::/user/scope\n", mounts) == []
    (top / "user" / "scope" / "cgroup.subtree_control").write_text("memory pids\n")
    assert places("0::/user/scope\n", mounts) == [Place(2, scope, scope)]
    assert places("0::/\n", mounts) == [Place(2, str(top), str(top))]
    bound = mounts.replace(" / ", " /user ", 1)
    assert places("0::/user\n", bound) == [Place(2, str(top), str(top))]
    assert places("0::/elsewhere\n", bound) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("memory.max", "17179869184"), ("memory.high", "1024"), ("cpu.max", "50000 100000"), ("cpuset.cpus", "0")],
)
def test_limits_of_the_own_group_are_not_escaped(unified, name, value):
    mounts, top = unified
    (top / "user" / "scope" / name).write_text(f"{value}\n")
    assert places("0::/user/scope\n", mounts) == []


def test_version_2_counts_what_its_own_limit_ended(tmp_path):
    """A group made of files: of kills, those count that the group's own limit was reached for."""
    place, name = Place(2, str(tmp_path), None), new_name()
    folder = tmp_path / name
    made = threading.Event()

    def kernel() -> None:
        while not made.is_set():
            if folder.is_dir():
                for file in ("cgroup.procs", "memory.events", "memory.max"):
                    (folder / file).touch()
                return

    folder_made = groups._locked

    def locked(path: str) -> int:
        descriptor = folder_made(path)
        kernel()
        return descriptor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "_locked", locked)
        group = Group(place, name)
    group.limit(1 << 20, 8)
    assert (folder / "memory.max").read_text() == str(1 << 20)
    for text, expected in (
        ("oom 0\noom_kill 0\n", False),
        ("oom 0\noom_kill 1\n", False),
        ("oom 2\noom_kill 1\n", True),
    ):
        (folder / "memory.events").write_text(f"low 0\nhigh 0\nmax 4\n{text}")
        assert group.out_of_memory() is expected
    group.close()
