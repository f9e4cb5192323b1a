"""`training.deterministic`: what it sets, what it refuses, and that on a CPU it changes no number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import train

from train.proof import bit_for_bit

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = """
import json, os, torch
from train.determinism import make_deterministic
make_deterministic()
import torch._inductor.config
print(json.dumps([
    torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
    torch._inductor.config.deterministic, torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark,
    os.environ["CUBLAS_WORKSPACE_CONFIG"], torch.utils.deterministic.fill_uninitialized_memory,
]))
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if key != "CUBLAS_WORKSPACE_CONFIG"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_everything_that_a_deterministic_run_needs_is_set():
    assert json.loads(run(SETTINGS).stdout) == [True, False, True, True, False, ":4096:8", False]
    refused = run(SETTINGS, CUBLAS_WORKSPACE_CONFIG=":0:0")
    assert "ConfigError: training.deterministic with CUBLAS_WORKSPACE_CONFIG=:0:0" in refused.stderr


@pytest.mark.parametrize(
    ("device", "deterministic", "exact"),
    [("cpu, 1 threads", False, True), ("NVIDIA H100", True, True), ("NVIDIA H100", False, False)],
)
def test_a_probe_is_bit_for_bit_on_a_cpu_or_where_the_run_is_deterministic(device, deterministic, exact):
    conditions = {"ranks": 1, "device": device, "deterministic": deterministic}
    assert bit_for_bit(dict(conditions), conditions) == exact
    assert not bit_for_bit({**conditions, "ranks": 2}, conditions)
    assert not bit_for_bit({"ranks": 1, "device": device}, conditions)  # written before the setting existed


@pytest.mark.slow
def test_on_a_cpu_a_deterministic_run_has_the_numbers_of_another(finished_run, stores, tmp_path):
    train(stores, tmp_path / "run", "training.tokens=6912", "training.deterministic=true")
    runs = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (finished_run, tmp_path / "run")
    ]
    for key in ("loss", "grad_norm", "validation"):
        one, other = ([entry[key] for entry in run if key in entry] for run in runs)
        assert one == other
        assert one
