"""`pytest tests/gpu -m gpu`, a row a test the moment it has ended: of kernels in stage 1, all others in stage 6.

This module is also the plugin that writes the rows.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from gpu_day.conduct import ROOT
from gpu_day.rows import BEGAN, FAILED, OK, SKIPPED, Rows

TESTS = ROOT / "tests" / "gpu"


def files_of(part: str) -> list[Path]:
    """The test files of a part: those of kernels, or all others."""
    return sorted(path for path in TESTS.glob("test_*.py") if ("kernels" in path.name) == (part == "kernel tests"))


def _rows() -> Rows:
    return Rows(Path(os.environ["GPU_DAY_ROWS"]), int(sys.argv[1]), sys.argv[2])


def _name(nodeid: str) -> str:
    return nodeid.rpartition("/")[2]


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    _rows().add(_name(nodeid), BEGAN)


def pytest_runtest_logreport(report: Any) -> None:
    """The call, or whatever kept it from being made."""
    if (
        report.when == "call"
        or (report.when == "setup" and not report.passed)
        or (report.failed and report.when == "teardown")
    ):
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            _rows().add(_name(report.nodeid), SKIPPED, reason=reason.removeprefix("Skipped: "), seconds=report.duration)
        elif report.failed:
            _rows().add(_name(report.nodeid), FAILED, error=report.longreprtext, seconds=report.duration)
        else:
            _rows().add(_name(report.nodeid), OK, seconds=report.duration)


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _rows().add(_name(report.nodeid) or "collection", FAILED, error=report.longreprtext)


def main() -> None:
    import pytest

    files = files_of(sys.argv[2])
    if not files:
        _rows().add("tests/gpu", FAILED, error=f"{TESTS} has no such tests")
        return
    # Without the suite's own options: the plugins that they need may not be installed here.
    options = ["-m", "gpu", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:terminal", "-p", "gpu_day.gpu_tests"]
    given = [*map(str, files), *options]
    code = pytest.main(given)
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        _rows().add("tests/gpu", FAILED, error="pytest found no test that is marked gpu")
    elif code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        sys.exit(int(code))


if __name__ == "__main__":
    main()
