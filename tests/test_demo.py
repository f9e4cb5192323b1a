"""The demo from the first step to the last, interrupted in pretraining as by Ctrl-C and run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

pytestmark = pytest.mark.alone

STEPS = 60
SETTINGS = [
    "training.tokens=245760",
    "checkpoint.every_steps=10",
    "optimizer.warmup_steps=10",
    "validation.every_steps=30",
]


def test_demo_is_interrupted_resumed_and_completed(tmp_path):
    output = tmp_path / "demo"
    command = [sys.executable, "-m", "tinyllama", "demo", "--output", str(output), "--limit", "1"]
    command += [argument for setting in SETTINGS for argument in ("--set", setting)]
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}

    first = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    metrics = output / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not metrics.exists() or metrics.read_text().count('"lr"') < 15:
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGINT)
    text, _ = first.communicate(timeout=120)
    assert first.returncode == 75, text
    assert "Run the same command again to continue" in text
    done = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert 15 <= done[-1] < STEPS

    second = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-3000:]
    text = second.stdout
    assert text.count("finished before") == 4
    assert f"checkpoints/step-{done[-1]:08d}" in text
    assert "resumed from" in text
    steps = [entry["step"] for entry in map(json.loads, metrics.read_text().splitlines()) if "loss" in entry]
    assert steps == list(range(1, STEPS + 1))

    for words in (
        "entropy",
        "Commonsense reasoning",
        "Problem solving",
        "tok/s",
        "TinyLlama 3T",
        "in all",
    ):
        assert words in text, words
    summary = json.loads((output / "summary.json").read_text())
    for source in summary["sources"].values():
        assert source["loss"] < source["unigram_entropy"] + 1
    for path in (
        "export/tinyllama_export.json",
        "eval/results.json",
        "eval/table.md",
        "serve/bench.json",
        "run/config.json",
        "report.html",
    ):
        assert (output / path).exists(), path
    report = json.loads((output / "report.json").read_text())
    facts = dict(report["sections"][0]["tables"][0]["rows"])
    assert (facts["steps"], facts["restarts"], facts["parameters"]) == (str(STEPS), "1", "4,917,504")
    pictures = {picture["key"]: picture for section in report["sections"] for picture in section["pictures"]}
    logged = next(series for series in pictures["loss"]["series"] if series["label"].startswith("training"))
    assert len(logged["x"]) == STEPS
    assert {"by-task-commonsense", "by-task-problem_solving", "serving-throughput", "pareto"} <= set(pictures)
    assert len(json.loads((output / "eval" / "results.json").read_text())["tasks"]) == 11
