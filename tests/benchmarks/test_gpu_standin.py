"""Every stage of the GPU day from start to end, in an environment like the GPU machine's: 15 minutes, 7 GB. make test-slow.

STANDIN_ENV names a prepared environment; without it one is made, for which a python3.12 (or PYTHON312) is needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_stage_of_the_gpu_day_runs_without_a_gpu(tmp_path):
    prepared = os.environ.get("STANDIN_ENV")
    python = os.environ.get("PYTHON312") or shutil.which("python3.12")
    if not prepared:
        works = python and subprocess.run([python, "--version"], capture_output=True, check=False).returncode == 0
        if not works:
            pytest.skip("needs a python3.12 to make an environment of")
    command = [str(ROOT / "benchmarks" / "gpu_standin.sh"), str(tmp_path), *(["--env", prepared] if prepared else [])]
    done = subprocess.run(
        command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, check=False
    )
    print(done.stdout[-20_000:])
    assert done.returncode == 0, f"{done.stdout[-20_000:]}\n{done.stderr[-20_000:]}"
    assert "all stages ran" in done.stdout
