"""Contains model-written programs: each runs in namespaces of its own (`containment`), and ends with all it has started.

Before the first program the containment is tried with programs that must fail (network, writing, reading secrets). Where
one gets through, or the system refuses namespaces, nothing is run and the error says what is missing.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import os
import secrets
import select
import struct
import subprocess
import sys
import sysconfig
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from tinyllama.errors import UserError

ROOT = str(Path(__file__).resolve().parents[1])
HASH_SEED = 0
PACKAGES = ("numpy", "numpy.libs")  # beside the standard library: HumanEval+ compares with it
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/tmp", "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": str(HASH_SEED),
}  # fmt: skip
TRIES = 3
START_S = 30.0  # to make a program's world, on a machine that is busy
END_S = 5.0  # for a server to end what it runs
RESERVE = 16  # processes above the limit, so that one that passes it is seen to, and ended
ADDRESSES = 4  # times the limit on memory: threads reserve far more than they use
# Above the limit on memory, for what the kernel keeps: control groups count it, measuring does not.
GROUP_BYTES = 64 << 20
WAITING = 3  # times the limit on time, when others keep the processors from a program
MEASURED = "measured, all processes"
GROUPED = f"control group and {MEASURED}"
PROBES = {
    "reach the network": "import socket\nsocket.create_connection(('127.0.0.1', 22), timeout=1)",
    "open a route out": "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.connect(('192.0.2.1', 9))",
    "write to the system": "open('/usr/written', 'w')",
    "write to the root": "open('/written', 'w')",
    "read system files": "open('/etc/shadow')",
    "see other processes": "import os\nassert os.getppid() == 1 and len(os.listdir('/proc')) > 5",
    "mount": ("import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None) == 0"),
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one program may use. wall_s: seconds from its first line, without those in which other programs had the
    processors. cpu_s: processor time of each of its processes. memory_bytes: of all its processes together. processes:
    threads included. file_bytes, open_files: in each process. scratch_bytes: in each of /tmp and /dev/shm.
    """

    wall_s: float = 10.0
    cpu_s: int = 10
    memory_bytes: int = 1 << 30
    processes: int = max(128, 32 + 2 * (os.cpu_count() or 1))  # pools have one for each processor
    file_bytes: int = 16 << 20
    open_files: int = 256
    scratch_bytes: int = 32 << 20

    def kernel(self) -> dict[str, int]:
        """By the kernel's names, for each process; NPROC is for all of a program's, threads included."""
        return {
            "CPU": self.cpu_s,
            "AS": ADDRESSES * self.memory_bytes,
            "NPROC": self.processes + RESERVE,
            "FSIZE": self.file_bytes,
            "NOFILE": self.open_files,
            "CORE": 1,  # bytes: with 0 a machine that hands its dumps to a program would still do so
            "SIGPENDING": 1024,
            "MSGQUEUE": 0,
        }


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a program reached its end, why not, and how long it took."""

    passed: bool
    reason: str
    seconds: float


def python_roots() -> list[str]:
    """The folders that this Python and its shared libraries need, and the links on the way to them."""
    wanted = ["/usr", "/lib", "/lib64", "/bin", sys.base_prefix, str(Path(sys.executable).resolve().parent)]
    wanted += [str(path) for path in _packages()]
    roots: list[str] = []
    for path in sorted({p for p in wanted if p and os.path.exists(p)}, key=len):
        if not any(path == r or path.startswith(r + "/") for r in roots if not os.path.islink(r)):
            roots.append(path)
    return roots


def _packages() -> list[Path]:
    """Where the packages lie that programs may import."""
    spec = importlib.util.find_spec("numpy")
    if spec is None or spec.origin is None:
        return []
    folder = Path(spec.origin).resolve().parents[1]  # the environment may be a link
    return [folder / name for name in PACKAGES if (folder / name).is_dir()]


def _hidden(roots: list[str]) -> list[str]:
    """Installed packages below the roots: benchmarks' solutions may be among them."""
    base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
    found = {sysconfig.get_path(name, vars=base) for name in ("purelib", "platlib")}
    for pattern in ("lib/python3*/*-packages", "local/lib/python3*/*-packages"):
        found |= {str(path) for path in Path("/usr").glob(pattern)}
    found = {name for name in found if os.path.isdir(name) and any(name.startswith(f"{root}/") for root in roots)}
    shown = [str(path) for path in _packages()]
    return sorted(name for name in found if not any(path.startswith(name + "/") for path in shown))


class _Server:
    """A running `containment.server`: takes one program at a time."""

    def __init__(self) -> None:
        code = (
            f"import sys; sys.path.insert(0, {ROOT!r}); from evalsuite.containment.server import serve; "
            f"sys.path.remove({ROOT!r}); serve({os.getpid()})"
        )
        self.process = subprocess.Popen(
            [str(Path(sys.executable).resolve()), "-P", "-s", "-S", "-B", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
            cwd="/",
            bufsize=0,
            start_new_session=True,
        )

    def ask(self, task: dict[str, Any], most_s: float) -> dict[str, Any] | None:
        """The answer about a task; None where there is none after most_s. OSError where the server is gone."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        text = memoryview(json.dumps(task).encode())
        text = memoryview(struct.pack(">Q", len(text)) + text)
        while text:
            text = text[self.process.stdin.write(text) :]
        heard, deadline = b"", time.monotonic() + most_s
        while not heard.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                return None
            part = self.process.stdout.read(1 << 16)
            if not part:
                raise OSError("the process that contains programs has ended")
            heard += part
        return json.loads(heard)

    def close(self) -> None:
        """End it, and with it what it runs. It takes its control groups away if it is left the time."""
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _has_code(tests: str) -> bool:
    """Whether there is more in a text than comments."""
    return any(line.strip() and not line.lstrip().startswith("#") for line in tests.splitlines())


def _close(servers: list[_Server], owner: int) -> None:
    while servers and os.getpid() == owner:
        servers.pop().close()


class Sandbox:
    """Runs programs, one at a time in each thread; `shared()` is the one whose containment has been tried."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.roots = python_roots()
        self.hidden = _hidden(self.roots)
        self.site = sorted({str(path.parent) for path in _packages()})
        self._grouped: set[bool] = set()  # whether programs had control groups
        self._servers: list[_Server] = []  # those without a task
        self._owner = os.getpid()
        self._end = weakref.finalize(self, _close, self._servers, self._owner)

    @classmethod
    @functools.cache
    def shared(cls) -> Sandbox:
        """A sandbox that has proven itself on this machine; UserError if there is none."""
        sandbox = cls()
        sandbox.probe()
        return sandbox

    def close(self) -> None:
        """End its processes."""
        _close(self._servers, self._owner)

    def record(self) -> dict[str, Any]:
        """What a verdict depends on, for the results. memory: which limits held for all programs that have run."""
        limits = dataclasses.asdict(self.limits)
        return {
            "namespaces": self.kind(),
            "hash_seed": HASH_SEED,
            "limits": limits,
            "memory": GROUPED if self._grouped == {True} else MEASURED,
        }

    def kind(self) -> str:
        """ "namespaces" as root, "user namespaces" as an ordinary user."""
        return "namespaces" if os.getuid() == 0 else "user namespaces"

    def probe(self) -> str:
        """Try the containment; returns its name. UserError if it does not hold, or a harmless program fails."""
        try:
            packages = "".join(f"import {path.name}\n" for path in _packages() if path.name.isidentifier())
            verdict = self.run(f"{packages}x = sum(range(10))\nassert x == 45\nopen('/tmp/mine', 'w').write('x')")
        except OSError as error:
            raise UserError(
                f"model-written programs cannot be contained here ({error})",
                fix="run as root or allow unprivileged user namespaces, or leave humaneval out",
            ) from None
        if not verdict.passed:
            raise UserError(
                f"the sandbox does not run programs ({verdict.reason})", fix="report this, or leave humaneval out"
            )
        for what, program in PROBES.items():
            if self.run(program).passed:
                raise UserError(
                    f"the sandbox does not hold: a program could {what}", fix="leave humaneval out on this machine"
                )
        return self.kind()

    def run(self, program: str, wall_s: float | None = None, *, tests: str = "") -> Verdict:
        """Run one program, then its tests in the same interpreter, for at most wall_s in place of the limits'. OSError if
        it cannot be contained.

        The verdict is that of Python's exec of both as one text. What has passed runs again with tests that cannot pass:
        what passes then too has not been tested, whatever its way around the tests is.
        """
        verdict = self._once(program, tests, wall_s, False)
        if verdict.passed and (again := self._once(program, tests, wall_s, True)).passed:
            return Verdict(False, "passes tests that cannot be passed", verdict.seconds + again.seconds)
        return verdict

    def _once(self, program: str, tests: str, wall_s: float | None, must_fail: bool) -> Verdict:
        wall_s = self.limits.wall_s if wall_s is None else wall_s
        text = program + tests
        lines = program.replace("\r\n", "\n").replace("\r", "\n").count("\n")
        task = {
            "program": text,
            "first_test": lines + 1 if _has_code(tests) else None,
            "must_fail": must_fail,
            "secret": secrets.token_hex(32),
            "wall_s": wall_s,
            "memory_bytes": self.limits.memory_bytes,
            "group_bytes": self.limits.memory_bytes + GROUP_BYTES,
            "processes": self.limits.processes,
            "limits": self.limits.kernel() | {"CPU": min(self.limits.cpu_s, math.ceil(wall_s) + 1)},
            "scratch_bytes": self.limits.scratch_bytes,
            "roots": self.roots,
            "hidden": self.hidden,
            "site": self.site,
        }
        started = time.monotonic()
        for left in reversed(range(TRIES)):
            server = self._take()
            try:
                found = server.ask(task, START_S + WAITING * wall_s)
                break
            except OSError:  # ended from outside: by a machine out of memory, say
                server.close()
                if not left:
                    raise
            except BaseException:
                server.close()
                raise
        seconds = time.monotonic() - started
        if found is None:
            server.close()
            return Verdict(False, f"timed out: stopped after {wall_s:g} s", seconds)
        self._servers.append(server)
        if "setup" in found:
            raise OSError(found["setup"])
        if "grouped" in found:
            self._grouped.add(found["grouped"])
        return Verdict(found["passed"] is True, str(found["reason"]), seconds)

    def _take(self) -> _Server:
        """A server without a task, a new one if there is none."""
        with _TAKING:
            if os.getpid() != self._owner:  # a forked process has none of its parent's
                self._servers, self._owner = [], os.getpid()
                self._end = weakref.finalize(self, _close, self._servers, self._owner)
            return self._servers.pop() if self._servers else _Server()


_TAKING = threading.Lock()
