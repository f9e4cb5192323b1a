"""The judge is Python: its verdicts are those of a plain exec, whoever asks and whatever runs beside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from program_texts import honest

from evalsuite.sandbox import ENVIRONMENT, HASH_SEED, Sandbox

TIMEOUT_S = 5.0
SLOW = {"ends too late", "computes too long", "limit of time"}
UNLIKE = {"random", "limit on digits"}  # differ between releases of Python
NOBODY = 12345


@pytest.fixture(scope="module")
def expected() -> dict[str, bool]:
    """Name -> whether plain Python passes the program."""
    programs = {name: text for name, text in honest().items() if name not in SLOW}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("plain_python.py"))],
        input=json.dumps({"programs": list(programs.values()), "timeout": 20}),
        env={**os.environ, "PYTHONHASHSEED": str(HASH_SEED)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = dict(zip(programs, json.loads(done.stdout), strict=True)) | dict.fromkeys(SLOW, False)
    assert 40 < sum(found.values()) < len(found) - 25
    return found


def differing(sandbox: Sandbox, expected: dict[str, bool], programs: dict[str, str]) -> dict[str, str]:
    """The programs of which the sandbox says something else than Python does, with its reasons."""
    limits = [1.0 if name in SLOW else TIMEOUT_S for name in programs]
    with ThreadPoolExecutor(2) as pool:
        verdicts = dict(zip(programs, pool.map(sandbox.run, programs.values(), limits), strict=True))
    return {name: f"{v.passed}: {v.reason}" for name, v in verdicts.items() if v.passed != expected[name]}


def test_the_verdicts_are_those_of_plain_python(expected):
    sandbox = Sandbox()
    assert ENVIRONMENT["PYTHONHASHSEED"] == str(HASH_SEED)
    assert differing(sandbox, expected, honest()) == {}
    sandbox.close()


@pytest.mark.slow
def test_the_verdicts_are_the_same_again_and_beside_fork_bombs(expected):
    programs = {name: text for name, text in honest().items() if name not in SLOW}
    sandbox, over = Sandbox(), threading.Event()

    def bomb() -> None:
        while not over.is_set():
            sandbox.run("import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass", 3.0)

    with ThreadPoolExecutor(1) as pool:
        bombs = pool.submit(bomb)
        try:
            for _ in range(3):
                assert differing(sandbox, expected, programs) == {}
        finally:
            over.set()
        bombs.result()
    sandbox.close()


def _for_everyone() -> str:
    """A Python that every user may run: this one, or the system's."""
    for name in (sys.executable, shutil.which("python3", path="/usr/bin:/usr/local/bin") or ""):
        path = Path(name).resolve()
        if path.is_file() and all(folder.stat().st_mode & 1 for folder in path.parents):
            done = subprocess.run(
                [path, "-c", "import sys; print(sys.version_info >= (3, 11))"], capture_output=True, check=False
            )
            if done.stdout == b"True\n":
                return str(path)
    pytest.skip("no Python 3.11 here that every user may run")


@pytest.mark.parametrize("who", ["an ordinary user", "root of a user namespace"])
def test_other_users_get_the_same_verdicts(expected, who):
    """Where user namespaces are allowed; where not, nothing runs and that is said."""
    if os.getuid() != 0 or not (shutil.which("setpriv") and shutil.which("unshare")):
        pytest.skip("only root can become another user, with util-linux")
    names = [name for name in honest() if name not in SLOW | UNLIKE | {"numpy"}][::4]
    names += ["many threads", "annotations are evaluated"]
    program = (
        "import json, sys\nfrom evalsuite.sandbox import Sandbox\nfrom tinyllama.errors import UserError\n"
        "try:\n    sandbox = Sandbox.shared()\nexcept UserError as error:\n    print(json.dumps(error.what)); sys.exit()\n"
        "print(json.dumps([sandbox.run(text).passed for text in json.load(sys.stdin)]))"
    )
    become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    become = become if who == "an ordinary user" else ["unshare", "--user", "--map-root-user"]
    done = subprocess.run(
        [*become, _for_everyone(), "-B", "-c", program],
        input=json.dumps([honest()[name] for name in names]),
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if not done.stdout:
        pytest.skip(f"cannot become {who} here: {done.stderr[-200:]}")
    found = json.loads(done.stdout)
    if isinstance(found, str):
        assert "cannot be contained here" in found
        pytest.skip(f"{who}: {found}")
    assert dict(zip(names, found, strict=True)) == {name: expected[name] for name in names}


def test_the_tests_run_in_the_program_s_own_interpreter():
    sandbox = Sandbox()
    tests = "def check(f):\n    assert f(1) == 2\n    assert n == 1\ncheck(f)\n"
    assert sandbox.run("n = 0\ndef f(x):\n    global n\n    n += 1\n    return x + 1\n", tests=tests).passed
    assert not sandbox.run("n = 0\ndef f(x):\n    return x + 1\n", tests=tests).passed
    assert "SyntaxError" in sandbox.run("f = (\n", tests=tests).reason
    assert sandbox.run("x = 1\n", tests="# nothing to test\n").passed
    assert sandbox.run("from __future__ import annotations\nn = 1\nf = lambda x: 2\n", tests=tests).passed
    sandbox.close()


@pytest.mark.parametrize("below", ["/tmp", "/dev/shm"])
def test_an_environment_in_a_scratch_folder_is_seen(below):
    """Python and its packages may lie where programs have their own scratch folders, behind a link too."""
    folder = Path(tempfile.mkdtemp(dir=below))
    try:
        (folder / "packages" / "mine").mkdir(parents=True)
        (folder / "packages" / "mine" / "__init__.py").write_text("x = 1\n")
        (folder / "link").symlink_to(folder / "packages")
        for path in (folder, folder / "packages"):
            path.chmod(0o755)
        sandbox = Sandbox()
        sandbox.roots += [str(folder / "packages"), str(folder / "link")]
        sandbox.site += [str(folder / "link")]
        text = f"import mine, os\nassert mine.x == 1 and {folder.name!r} in os.listdir({below!r})\n"
        text += f"open('{below}/own', 'w').close()\n"
        verdict = sandbox.run(text)
        assert verdict.passed, verdict.reason
        refused = sandbox.run(f"open('{folder}/packages/mine/__init__.py', 'a')")
        assert "Read-only" in refused.reason or "Permission" in refused.reason
        sandbox.close()
    finally:
        shutil.rmtree(folder)
