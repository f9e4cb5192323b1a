"""Processes that end with the one that started them: killed, hung up, or in any other way."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT, members, until

from tinyllama import processes
from tinyllama.processes import Owner

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")

# A child, which starts a grandchild in a session of its own, which starts another and ends: adopted by nobody we know.
FAMILY = """
import subprocess, sys, time
leave = "import subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', 'print(1, flush=True); input()'], stdin=0)"
subprocess.Popen([sys.executable, "-S", "-c", leave], start_new_session=True)
print(1, flush=True)
time.sleep(600)
"""
HEAD = f"""
import subprocess, sys, time
from tinyllama.processes import guarded
with guarded() as environment:
    subprocess.Popen([sys.executable, "-S", "-c", {FAMILY!r}], env=environment)
    time.sleep(600)
"""


def guardians(mark: str) -> list[int]:
    """Those that have begun their work, and leave SIGTERM alone."""
    found = []
    for pid in members(mark):
        with contextlib.suppress(OSError):
            ignored = Path(f"/proc/{pid}/status").read_text().partition("SigIgn:")[2].split()[0]
            if b"exec(sys.stdin" in Path(f"/proc/{pid}/cmdline").read_bytes() and int(ignored, 16) >> 14 & 1:
                found.append(pid)
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM])
def test_a_family_ends_with_its_head(number):
    mark = f"TINYLLAMA_TEST_{os.getpid()}_{number}"
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD], env={**os.environ, mark: "1", "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        stdin=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert head.stdout.readline() == head.stdout.readline() == "1\n"  # all have begun
        assert len(members(mark)) == 4  # head, guardian, child, orphan
        if number == signal.SIGKILL:  # the guardian can be killed too: there is another at once
            assert until(lambda: guardians(mark))
            (guardian,) = guardians(mark)
            os.kill(guardian, number)
            assert until(lambda: guardians(mark) not in ([], [guardian]))
            assert len(members(mark)) == 4
        head.send_signal(number)
        head.wait(60)
        assert until(lambda: not members(mark))
    finally:
        head.kill()
        for pid in members(mark):
            os.kill(pid, signal.SIGKILL)


def test_a_family_ends_with_its_block_and_descriptors_are_kept_until_then():
    reader, writer = os.pipe()
    with processes.guarded(keep=[writer]) as environment:
        os.close(writer)
        child = subprocess.Popen(["sleep", "600"], env=environment)
        os.set_blocking(reader, False)
        with pytest.raises(BlockingIOError):  # the guardian holds the other end
            os.read(reader, 1)
    assert child.wait(30) == -signal.SIGKILL
    assert os.read(reader, 1) == b""
    os.close(reader)


SHARING = """
import sys, time
from multiprocessing.shared_memory import SharedMemory
print(SharedMemory(create=True, size=4096).name, flush=True)
time.sleep(600)
"""


def test_shared_memory_of_a_killed_family_is_given_back():
    mark = f"TINYLLAMA_TEST_{os.getpid()}_memory"
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD.replace(repr(FAMILY), repr(SHARING))], stdout=subprocess.PIPE, text=True,
        env={**os.environ, mark: "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    name = head.stdout.readline().strip()
    assert Path("/dev/shm", name).exists()
    head.kill()
    head.wait()
    assert until(lambda: not members(mark))
    assert not Path("/dev/shm", name).exists()


CHILD = """
import time
from tinyllama.processes import die_with_parent
die_with_parent(%d)
print(1, flush=True)
time.sleep(600)
"""
PARENT = f"""
import os, subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", {CHILD!r} % os.getpid()]).pid, flush=True)
time.sleep(600)
"""


def test_a_child_dies_with_its_parent_even_if_that_has_gone_before():
    orphan = subprocess.run([sys.executable, "-c", CHILD % 1], cwd=ROOT, check=False, timeout=60)
    assert orphan.returncode == -signal.SIGKILL
    process = subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child, begun = int(process.stdout.readline()), process.stdout.readline()
    assert begun == "1\n"
    process.kill()
    process.wait()
    assert until(lambda: processes.start_ticks(child) is None)


def test_a_watched_process_is_told_once_it_is_gone():
    process = subprocess.Popen(["sleep", "600"])
    told = threading.Event()
    processes.watch(process.pid, told.set)
    assert not told.wait(0.05)
    process.kill()
    assert told.wait(60)  # before anybody has asked for its exit code
    process.wait()
    told.clear()
    processes.watch(process.pid, told.set)
    assert told.wait(60)


STOPPED = """
import pathlib, sys
from serve.server import launched
with launched([sys.executable, "-c", sys.argv[2]], pathlib.Path(sys.argv[1]), {}) as process:
    sys.stdin.readline()
"""


def test_shared_memory_of_a_server_is_given_back_when_it_is_stopped(tmp_path):
    log = tmp_path / "server.log"
    worker = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]]).wait()"
    worker = worker.replace("sys.argv[1]", repr(SHARING))
    arguments = [sys.executable, "-c", STOPPED, str(log), worker]
    process = subprocess.Popen(arguments, cwd=ROOT, stdin=subprocess.PIPE, text=True)
    assert until(lambda: log.exists() and log.read_text().endswith("\n"))
    name = log.read_text().strip()
    assert Path("/dev/shm", name).exists()
    process.communicate("\n", timeout=60)
    assert process.returncode == 0
    assert not Path("/dev/shm", name).exists()


SERVER = """
import pathlib, sys
from serve.server import launched
child = "import time; print(1, flush=True); time.sleep(600)"
family = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True).wait()"
with launched([sys.executable, "-c", family], pathlib.Path(sys.argv[1]), {"HERE": sys.argv[1]}) as process:
    process.wait()
"""


def test_a_server_and_its_workers_end_with_a_command_that_is_killed(tmp_path):
    log = tmp_path / "server.log"
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(log)], cwd=ROOT)
    assert until(lambda: log.exists() and log.read_text() == "1\n")
    assert len(members(f"HERE={log}")) == 2
    process.kill()
    process.wait()
    assert until(lambda: not members(f"HERE={log}"))


def test_an_owner_is_alive_dead_or_not_to_be_known_from_here():
    this = Owner.this()
    assert this.is_alive() is True
    assert Owner.of(vars(this)) == this
    assert Owner.of({**vars(this), "ticks": this.ticks - 1}).is_alive() is False  # the pid was given to another
    assert Owner.of({**vars(this), "boot": "before"}).is_alive() is False
    assert Owner.of({**vars(this), "host": "another"}).is_alive() is None
    assert Owner.of({**vars(this), "pids": "pid:[1]"}).is_alive() is None
    for record in (None, [], {}, {**vars(this), "pid": "1"}, {**vars(this), "pid": -1}, {**vars(this), "host": 3}):
        assert Owner.of(record) is None
