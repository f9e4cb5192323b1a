"""The fault campaign in short: ranks and commands that are killed or stopped, a second command, a damaged checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.alone


def test_a_disturbed_run_ends_as_the_undisturbed_one(stores, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "faults.py"), "--short"]
    command += ["--data", str(stores), "--output", str(tmp_path / "faults.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "faults.json").read_text())
    codes = {fault["kind"]: fault["exit_code"] for fault in found["faults"]}
    assert codes == {
        "SIGKILL": 76,
        "corrupt": 75,
        "SIGTERM while starting": 75,
        "second command": 75,
        "SIGKILL to the command": -9,
        "nan": 70,
    }
    assert [fault["refused"] for fault in found["faults"] if fault["kind"] == "second command"] == [[2, 2, 2, 2]]
    assert not any(fault["left"] for fault in found["faults"])
    assert found["kills_in_the_phase_aimed_at"] == found["kills"] == 1
    assert found["broken_checkpoints_skipped"] == 1
    assert found["comparison"]["checkpoints_compared"] >= 10
    assert found["comparison"]["checkpoints_differing"] == []
    assert found["comparison"]["losses_equal"]


def test_the_exit_code_says_what_happened_where_the_log_cannot_be_written(tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, ROOT / "train" / "pretrain.py", "--deepspeed", tmp_path / "none.json"]
        done = subprocess.run(command, stdout=full, stderr=full, check=False)
    assert done.returncode == 2
