"""One command at a time where something is written: at the same instant, after a kill, and from other machines."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT

from tinyllama import locks
from tinyllama.errors import UserError
from tinyllama.processes import Owner


def compete(folder: Path, barrier, ended, results) -> None:
    barrier.wait()
    try:
        with locks.held(locks.inside(folder), folder, "one of many"):
            results.put("won")
            ended.wait()
    except locks.InUseError as error:
        results.put(str(error))


def test_of_several_at_the_same_instant_one_wins(tmp_path):
    context = multiprocessing.get_context("fork")
    for attempt in range(3):
        folder = tmp_path / str(attempt) / "run"
        barrier, ended, results = context.Barrier(5), context.Event(), context.Queue()
        some = [context.Process(target=compete, args=(folder, barrier, ended, results)) for _ in range(5)]
        for process in some:
            process.start()
        found = [results.get(timeout=60) for _ in some]
        ended.set()
        for process in some:
            process.join()
        assert found.count("won") == 1
        assert all(word == "won" or word.startswith(f"{folder} is in use by one of many (pid ") for word in found)
        # One of them made the folder, another may have won it: an empty one may stay, and no file.
        assert not folder.exists() or list(folder.iterdir()) == []


def test_folders_made_for_the_lock_alone_go_with_it(tmp_path):
    folder = tmp_path / "some" / "run"
    with locks.held(locks.inside(folder), folder, "ours"):
        assert folder.is_dir()
    assert list(tmp_path.iterdir()) == []
    folder.parent.mkdir()
    with locks.held(locks.inside(folder), folder, "ours"):
        assert folder.is_dir()
    assert list(tmp_path.iterdir()) == [folder.parent]
    assert list(folder.parent.iterdir()) == []


HOLDER = """
import subprocess, sys, time
from pathlib import Path
from tinyllama import locks
from tinyllama.errors import UserError
lock = locks.take(locks.inside(Path(sys.argv[1])), Path(sys.argv[1]), "the holder")
if len(sys.argv) > 2:
    subprocess.Popen(["sleep", sys.argv[2]], pass_fds=[lock.descriptor], stdout=subprocess.DEVNULL)
print(1, flush=True)
time.sleep(600)
"""


def holder(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(folder), *more]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "1\n"
    return process


def test_a_lock_falls_with_its_process_and_with_those_that_it_was_given_to(tmp_path, monkeypatch):
    process = holder(tmp_path)
    with pytest.raises(locks.InUseError, match=rf"in use by the holder \(pid {process.pid} on .*kill {process.pid}"):
        locks.take(locks.inside(tmp_path), tmp_path, "another")
    process.kill()
    process.wait()
    lock = locks.take(locks.inside(tmp_path), tmp_path, "another")  # over the dead one's record
    assert lock.is_ours()
    lock.close()
    lock.close()
    assert list(tmp_path.iterdir()) == []
    # A process of the holder lives for some time yet: it is waited for, but not for ever.
    process = holder(tmp_path, "2")
    process.kill()
    process.wait()
    locks.take(locks.inside(tmp_path), tmp_path, "another").close()
    monkeypatch.setattr(locks, "ENDING_S", 0.2)
    process = holder(tmp_path, "30")
    process.kill()
    process.wait()
    with pytest.raises(locks.InUseError, match="the holder"):
        locks.take(locks.inside(tmp_path), tmp_path, "another")


def write(path: Path, **changes: object) -> dict:
    record = {**vars(Owner.this()), "token": "theirs", "command": "theirs", "beat": 0, **changes}
    path.write_text(json.dumps(record))
    return record


@pytest.mark.parametrize("record", [b"", b"[]", b'{"pid": "x"}', b"\xff", b"[" * 100_000])
def test_a_file_that_says_nothing_is_nobodys(tmp_path, record):
    locks.inside(tmp_path).write_bytes(record)
    locks.take(locks.inside(tmp_path), tmp_path, "ours").close()


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"boot": "of another with this name"}, {"pids": "pid:[1]"}])
def test_another_machine_is_believed_as_long_as_its_record_is_renewed(tmp_path, monkeypatch, other):
    """On a file system where flock says nothing of other machines."""
    path = locks.inside(tmp_path)
    monkeypatch.setattr(locks, "is_local", lambda path: False)
    monkeypatch.setattr(locks, "STALE_S", 0.4)
    monkeypatch.setattr(locks, "SETTLE_S", 0.1)
    write(path, pid=1, boot="before")  # this machine has started anew since, or another has its name
    locks.take(path, tmp_path, "ours").close()
    write(path, ticks=1)  # dead: flock and the record of this machine say so at once
    monkeypatch.setattr(locks, "STALE_S", 600)
    locks.take(path, tmp_path, "ours").close()
    monkeypatch.setattr(locks, "STALE_S", 0.4)
    write(path, **other)
    locks.take(path, tmp_path, "ours").close()
    write(path, **other)
    looked = threading.Event()
    read = locks.read

    def renewed(at: Path) -> dict:
        found = read(at)
        if looked.is_set():
            write(at, **other, beat=found["beat"] + 1)
        looked.set()
        return found

    monkeypatch.setattr(locks, "read", renewed)
    with pytest.raises(locks.InUseError, match="in use by theirs"):
        locks.take(path, tmp_path, "ours")


def test_a_copy_of_a_folder_in_use_is_free(tmp_path):
    folder, copy = tmp_path / "run", tmp_path / "copy"
    with locks.held(locks.inside(folder), folder, "the holder") as lock:
        shutil.copytree(folder, copy)
        with locks.held(locks.inside(copy), copy, "another"):
            assert lock.is_ours()
            with pytest.raises(locks.InUseError, match="the holder"):
                locks.take(locks.inside(folder), folder, "another")


def test_where_there_is_no_flock_the_record_of_a_living_process_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_flock", lambda descriptor: None)
    monkeypatch.setattr(locks, "SETTLE_S", 0.1)
    path = locks.inside(tmp_path)
    write(path)
    with pytest.raises(locks.InUseError, match="theirs"):
        locks.take(path, tmp_path, "ours")
    write(path, ticks=1)
    locks.take(path, tmp_path, "ours").close()


def test_the_record_can_be_read_while_it_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT_S", 0.0005)
    locks.inside(tmp_path).write_bytes(b"x" * 2000)  # of something longer
    with locks.held(locks.inside(tmp_path), tmp_path, "ours") as lock:
        found = [locks.read(lock.path)]
        while found[-1].get("token") == lock.token and found[-1]["beat"] < 30:
            found.append(locks.read(lock.path))
        assert found[-1] == {**found[0], "beat": found[-1].get("beat")}


def test_of_two_machines_at_the_same_moment_the_last_writer_has_it(tmp_path, monkeypatch):
    path = locks.inside(tmp_path)
    monkeypatch.setattr(locks, "is_local", lambda path: False)
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: write(path, host="elsewhere"))
    with pytest.raises(locks.InUseError, match="theirs"):
        locks.take(path, tmp_path, "ours")
    monkeypatch.undo()
    assert json.loads(path.read_text())["host"] == "elsewhere"


def test_what_cannot_be_locked_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(locks.UserError, match=r"writing .*file.* failed"):
        locks.take(locks.inside(tmp_path / "file"), tmp_path / "file", "ours")


def test_the_file_system_is_told_by_its_mount():
    assert locks.is_local(Path("/dev/shm/x")) or not os.path.ismount("/dev/shm")
    assert not locks.is_local(Path("/proc/x"))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, where nobody can make a file")
def test_a_folder_where_nothing_can_be_made_is_an_error():
    with pytest.raises(UserError, match=r"/proc/\.x\.lock"):
        locks.take(Path("/proc/.x.lock"), Path("/proc/x"), "export")


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_lies_in_a_locks_place_is_left_alone(tmp_path, kind):
    """A link is not written through, and the other end of a pipe not waited for."""
    place = locks.inside(tmp_path / "run")
    place.parent.mkdir()
    (tmp_path / "other").write_text("precious")
    {"link": lambda: place.symlink_to(tmp_path / "other"), "pipe": lambda: os.mkfifo(place), "folder": place.mkdir}[
        kind
    ]()
    with pytest.raises(UserError, match=r"\.lock"):
        locks.take(place, place.parent, "ours")
    assert (tmp_path / "other").read_text() == "precious"
    assert place.is_symlink() == (kind == "link")


def test_a_lock_that_cannot_be_written_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, hard))  # what is longer fails as it does on a full disk
    try:
        with pytest.raises(UserError, match="failed"):
            locks.take(tmp_path / "new" / "deep" / "lock", tmp_path, "test")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
