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

from evalsuite.containment import groups, judged, kernel, namespaces, privileges, supervisor

HEADER = struct.Struct(">Q")
TASKS, ANSWERS = 0, 1
FIRST_FREE = 3
OWN_PROCESSES = 2  # in a program's control group, beside what the program starts
# In thousandths of the group's limit: enough for the kernel to end a program before what watches it, too little to make it
# the first of the whole machine.
FIRST_VICTIM = "20"


class _Next:
    """The first process of the next program, which enters its control group before there is a task: Linux takes some 10 ms
    for that (a grace period of RCU), while the program before it runs.
    """

    def __init__(self, place: groups.Place | None, gone: int) -> None:
        self.place, self.name = place, groups.new_name()
        own = os.getpid()
        reader, self._go = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            os.close(self._go)
            os.close(gone)
            _outside(own, place, self.name, reader)
        os.close(reader)

    def begin(self) -> bool:
        """Let it take the task that waits; False where it has been ended from outside."""
        alive = os.waitpid(self.process, os.WNOHANG)[0] == 0
        if alive:
            os.write(self._go, b"+")
        os.close(self._go)
        return alive

    def end(self) -> None:
        """End one that has not begun."""
        os.close(self._go)
        os.waitpid(self.process, 0)
        self.clear()

    def clear(self) -> None:
        """Remove its group, when it has ended."""
        if self.place is not None:
            groups.remove(self.place, self.name)


def serve(parent: int) -> None:
    """Take tasks until there are no more or the parent is gone."""
    gone = os.pidfd_open(parent)
    if os.getppid() != parent:
        return
    place = groups.find()
    following = _Next(place, gone)
    while True:
        poll = select.poll()
        poll.register(TASKS, select.POLLIN)
        poll.register(gone, select.POLLIN)
        ready = dict(poll.poll())
        if gone in ready or not ready.get(TASKS, 0) & select.POLLIN:
            following.end()
            return
        current = following
        while not current.begin():
            current.clear()
            current = _Next(place, gone)
        following = _Next(place, gone)
        _wait(current.process, gone)
        current.clear()


def _wait(child: int, gone: int) -> None:
    """Wait for a child; end it if the parent goes first, or wants no answer any longer."""
    ended = os.pidfd_open(child)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(gone, select.POLLIN)
    poll.register(TASKS, 0)  # closed
    if ended not in dict(poll.poll()):
        os.kill(child, signal.SIGKILL)
    os.close(ended)
    _, status = os.waitpid(child, 0)
    if status != 0:
        try:
            _answer({"passed": False, "reason": "the containment was ended from outside"})
        except BrokenPipeError:
            return  # nobody waits for it


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


def _outside(server: int, place: groups.Place | None, name: str, go: int) -> NoReturn:
    """A program's first process, outside of its process space: enters the control group, waits for its turn, makes the
    namespaces and waits for process 1 of them.
    """
    try:
        kernel.die_with_parent(server)
        group = groups.enter(place, name)
        if not os.read(go, 1):
            os._exit(0)
        os.close(go)
        task = json.loads(_exactly(HEADER.unpack(_exactly(HEADER.size))[0]))
        if group is not None:
            group.limit(task["group_bytes"], task["limits"]["NPROC"] + OWN_PROCESSES)
        uid = namespaces.enter()
        kernel.die_with_parent(server)  # new namespaces may have cleared it
        inside = os.fork()
        if inside == 0:
            _first(task, uid, group)
    except OSError as error:
        _answer({"setup": str(error)})
        os._exit(0)
    _, status = os.waitpid(inside, 0)
    if status != 0 and group is not None and group.out_of_memory():
        _answer({"passed": False, "reason": supervisor.out_of_memory(task)})
        status = 0
    os._exit(0 if status == 0 else 1)


def _first(task: dict[str, Any], uid: int | None, group: groups.Group | None) -> NoReturn:
    """Process 1: builds the world, starts the program in it, watches it and answers. When it ends, all in there end."""
    try:
        kernel.die_with_parent(0)  # the parent is in another process space
        os.setsid()
        processes = supervisor.Processes(namespaces.build_root(task, uid), namespaces.SCRATCH)
        reader, writer = os.pipe()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # process 1 gets no signal from its own space but what it handles
        program = os.fork()
        if program == 0:
            if group is not None:
                processes.end_first(FIRST_VICTIM)
            _program(task, uid, writer)
        os.close(writer)
        found = supervisor.watch(reader, program, processes, group, task) | {"grouped": group is not None}
        _end_others()
    except OSError as error:
        found = {"setup": str(error)}
    _answer(found)
    os._exit(0)


def _end_others() -> None:
    """In process 1, which nothing that still runs shall disturb while it answers."""
    if os.getpid() == 1:
        try:
            os.kill(-1, signal.SIGKILL)
        except ProcessLookupError:
            return  # there are none


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
        os.write(pipe, judged.READY)
    except OSError as error:
        os.write(pipe, str(error).encode())
        os._exit(1)
    judged.main(task, pipe)
