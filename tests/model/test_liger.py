"""Liger's kernels in Triton's interpreter, on a CPU: how they are called, and what they give, in fp32 and fp16."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PACKAGES = ("triton==3.6.0", "liger-kernel==0.8.5")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Python with liger-kernel and triton, over the packages of this one: torch's CPU wheel needs no triton."""
    folder = tmp_path_factory.mktemp("liger")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *PACKAGES], check=True)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    (Path(site) / "over.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.slow
def test_ligers_kernels_give_the_values_and_gradients_of_plain_torch(environment):
    path = os.pathsep.join((str(HERE), str(HERE.parents[1])))
    done = subprocess.run(
        [environment, HERE / "liger_in_interpreter.py"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {(row["operation"], row["dtype"], row["fused"]) for row in found} == {
        (operation, dtype, fused)
        for operation in ("norm", "rotary", "swiglu", "loss")
        for dtype in ("float32", "float16")
        for fused in ((False, True) if operation == "rotary" else (False,))
    }
    for row in found:
        assert row["error"] < (1e-6 if row["dtype"] == "float32" else 1.5e-3), row
