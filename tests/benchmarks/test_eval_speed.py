"""The benchmark of evaluation speed works: both backends are timed on the same items. What it measures is not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_both_backends_are_timed_on_the_same_items(export, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "eval_speed.py"), "--model", str(export)]
    command += ["--data-dir", "mini", "--suites", "commonsense", "--limit", "2", "--output", str(tmp_path / "out.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["suites"]["commonsense"]
    assert found["items"] == 14  # two of seven tasks
    assert found["differing"] == 0
