"""A report of a long run: quick, and small enough to send."""

from __future__ import annotations

import json
import resource

import pytest
from conftest import tinyllama
from report_runs import write_training


@pytest.mark.alone
def test_a_run_of_100_000_steps_takes_seconds_and_few_megabytes(tmp_path):
    write_training(tmp_path / "run", steps=100_000)
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size > 25e6
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    tinyllama("report", tmp_path / "run", "--output", tmp_path / "page.html", env={"OPENBLAS_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # neighbours do not change it
    assert seconds < 6
    assert (tmp_path / "page.html").stat().st_size < 5e6
    assert (tmp_path / "page.json").stat().st_size < 5e6
    record = json.loads((tmp_path / "page.json").read_text())
    loss = next(p for section in record["sections"] for p in section["pictures"] if p["key"] == "loss")
    assert all(len(series["x"]) <= 1502 for series in loss["series"])
    raw = next(series for series in loss["series"] if series["label"] == "training, raw")
    spike = max(value for tokens, value in zip(raw["x"], raw["y"], strict=True) if tokens > 1e11 / 5)
    assert spike > 3.5  # the one of 100,000 steps, a third of the way
