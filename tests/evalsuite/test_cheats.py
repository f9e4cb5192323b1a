"""What has failed its tests, or never ran them, has not passed, whatever it does about the verdict."""

from __future__ import annotations

import pytest
from program_texts import load

from evalsuite.sandbox import Limits, Sandbox

TESTS = """
TRICKS = '''nothing'''

def check(candidate):
    assert candidate(1) == 2
    assert candidate(5) == 6
    for number in range(100, 200):
        assert candidate(number) == number + 1

check(f)
"""
# The same as MBPP has them: one line after the other.
LINES = "assert f(1) == 2\nassert f(5) == 6\nassert f(100) == 101"


@pytest.fixture(scope="module")
def sandbox():
    found = Sandbox(Limits(wall_s=1.0))
    yield found
    found.close()


@pytest.mark.parametrize("name", load("cheats"))
def test_cheats_do_not_pass(sandbox, name):
    program = load("cheats")[name] + "\n"
    verdict = sandbox.run(program, tests=TESTS)
    assert not verdict.passed
    assert verdict.reason
    assert not sandbox.run(program, tests=LINES).passed
    assert not sandbox.run(program + TESTS).passed or name in ONE_TEXT


# Given as one text, nobody knows where the tests begin: what exec passes, passes.
ONE_TEXT = (
    "replaces the tests from a thread",
    "decorates the tests",
    "replaces the code of the tests, and is nested too deeply to be taken apart",
)


def test_what_is_right_passes_with_such_tests(sandbox):
    for tests in (TESTS, LINES):
        assert sandbox.run("def f(x):\n    return x + 1\n", tests=tests).passed
        assert "AssertionError" in sandbox.run("def f(x):\n    return x\n", tests=tests).reason
        deep = f"y = {'-' * 1500}1\n"
        assert sandbox.run(f"{deep}def f(x):\n    return x + 1\n", tests=tests).passed
