"""The process that `sandbox` starts: forks for each program that comes, so that none pays for Python's start.

A task comes through standard input as a length of 8 bytes and JSON; the answer is a line of JSON on standard output. This
process reads no task itself: what is forked for one program knows nothing of another. It ends when the process that started
it does, and with it all that it has started.
"""

from __future__ import annotations

import json
import os
import select
import signal
import struct
import sys
from typing import Any, NoReturn

from evalsuite.containment import judged, kernel, namespaces, privileges, supervisor

HEADER = struct.Struct(">Q")
TASKS, ANSWERS = 0, 1
FIRST_FREE = 3


def serve(parent: int) -> None:
    """Take tasks until there are no more or the parent is gone."""
    gone = os.pidfd_open(parent)
    if os.getppid() != parent:
        return
    while True:
        poll = select.poll()
        poll.register(TASKS, select.POLLIN)
        poll.register(gone, select.POLLIN)
        ready = dict(poll.poll())
        if gone in ready or not ready.get(TASKS, 0) & select.POLLIN:
            return
        own = os.getpid()
        child = os.fork()
        if child == 0:
            os.close(gone)
            _outside(own)
        _wait(child, gone)


def _wait(child: int, gone: int) -> None:
    """Wait for a child; end it, and this process, if the parent goes first."""
    ended = os.pidfd_open(child)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(gone, select.POLLIN)
    if ended not in dict(poll.poll()):
        os.kill(child, signal.SIGKILL)
    os.close(ended)
    _, status = os.waitpid(child, 0)
    if status != 0:
        _answer({"passed": False, "reason": "the containment was ended from outside"})


def _answer(found: dict[str, Any]) -> None:
    os.write(ANSWERS, json.dumps(found).encode() + b"\n")


def _exactly(count: int) -> bytes:
    parts, left = [], count
    while left:
        part = os.read(TASKS, min(left, 1 << 20))
        if not part:
            os._exit(0)
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _outside(server: int) -> NoReturn:
    """A program's first process, outside of its process space: makes the namespaces and waits for process 1 of them."""
    try:
        kernel.die_with_parent(server)
        task = json.loads(_exactly(HEADER.unpack(_exactly(HEADER.size))[0]))
        uid = namespaces.enter()
        kernel.die_with_parent(server)  # new namespaces may have cleared it
        inside = os.fork()
        if inside == 0:
            _first(task, uid)
    except OSError as error:
        _answer({"setup": str(error)})
        os._exit(0)
    _, status = os.waitpid(inside, 0)
    os._exit(0 if status == 0 else 1)


def _first(task: dict[str, Any], uid: int | None) -> NoReturn:
    """Process 1: builds the world, starts the program in it, watches it and answers. When it ends, all in there end."""
    try:
        kernel.die_with_parent(0)  # the parent is in another process space
        os.setsid()
        processes = supervisor.Processes(namespaces.build_root(task, uid), namespaces.SCRATCH)
        reader, writer = os.pipe()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # process 1 gets no signal from its own space but what it handles
        program = os.fork()
        if program == 0:
            _program(task, uid, writer)
        os.close(writer)
        found = supervisor.watch(reader, program, processes, task)
    except OSError as error:
        found = {"setup": str(error)}
    _answer(found)
    os._exit(0)


def _program(task: dict[str, Any], uid: int | None, writer: int) -> NoReturn:
    """The program's process: nothing is open in it but the pipe for its verdict."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pipe = task["limits"]["NOFILE"] - 1
    try:
        null = os.open("/dev/null", os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.dup2(writer, pipe, inheritable=False)
        os.closerange(FIRST_FREE, pipe)
        privileges.drop(task["limits"], uid)
        sys.path += task["site"]
        secret = bytes.fromhex(task.pop("secret"))
        text, first_test, must_fail = task.pop("program"), task["first_test"], task["must_fail"]
        os.write(pipe, judged.READY)
    except OSError as error:
        os.write(pipe, str(error).encode())
        os._exit(1)
    judged.main(text, first_test, must_fail, pipe, secret)
