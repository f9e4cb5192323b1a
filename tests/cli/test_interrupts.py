"""Ctrl-C, SIGTERM and a closed terminal, in any command: one line, 128 and the signal's number, nothing left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, members, preparing, until
from holding import Hold

COMMANDS = {
    ("export", "nothing", "--output", "out"): "import|tinyllama.export",
    ("eval", "--model", "nothing/at-all", "--output", "out"): "import|evalsuite.backends",
    ("serve", "nothing", "--output", "out"): "import|serve.engine",
    ("plan", "--loss-of", "1e9"): "import|tinyllama.planner",
    ("report", "nothing"): "import|tinyllama.report",
    ("compare", "a", "b"): "import|typer",
    ("data", "prepare", "nothing", "--output", "out", "--tokenizer", "none"): "import|numpy",
    ("train", "--dry-run"): "import|train.dry_run",
}


@pytest.mark.parametrize(
    ("command", "number"),
    [
        (command, number)
        for place, command in enumerate(COMMANDS)
        for number in ((signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if place == 0 else (signal.SIGINT,))
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else value.name,
)
def test_a_signal_is_one_line_and_leaves_nothing(command, number, tmp_path):
    hold = Hold(tmp_path, f"command|{COMMANDS[command]}")
    work = tmp_path / "work"
    work.mkdir()
    environment = {**os.environ, **hold.environment, "COLUMNS": "200", "NO_COLOR": "1", "HERE": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "tinyllama", *command], cwd=work, env=environment, stderr=subprocess.PIPE, text=True
    )
    hold.wait(process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert [line for line in said.splitlines() if line] == [
        "error: interrupted; what was finished is kept, run the same command again to continue"
    ]
    assert list(work.iterdir()) == []
    assert until(lambda: not members(f"HERE={tmp_path}"))


def test_workers_that_still_import_end_with_a_command_that_is_killed(corpus, tokenizer_model, tmp_path):
    hold = Hold(tmp_path, "worker|import|numpy")
    arguments = preparing(corpus / "prose.jsonl", tmp_path / "store", tokenizer_model)
    process = subprocess.Popen(
        [sys.executable, "-m", "tinyllama", *map(str, arguments), "--workers", "2"],
        cwd=ROOT,
        env={**os.environ, **hold.environment, "HERE": str(tmp_path)},
        stderr=subprocess.DEVNULL,
    )
    hold.wait(process)
    process.kill()
    process.wait()
    assert until(lambda: not members(f"HERE={tmp_path}"))


def test_a_command_that_swallows_its_signal_is_ended():
    """As a library can that catches everything, or is interrupted where Python drops what is raised (a callback)."""
    program = """
import contextlib, os, signal, sys, threading, time
from tinyllama.cli import app
app.CLEAN_UP_S = 0.3
end, said = app._end, threading.Event()
app._end = lambda number: said.wait() and end(number)
app._stop_in_order(train=False)
with contextlib.suppress(KeyboardInterrupt):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
print("goes on", flush=True)
said.set()
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (143, "goes on\n")
    assert "not ended 0.3 s later" in done.stderr


def test_nohup_keeps_a_command_from_ending_with_its_terminal():
    code = "import signal; from tinyllama.cli import app; app._stop_in_order(False); signal.raise_signal(1); print(1)"
    done = subprocess.run(["nohup", sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n")
