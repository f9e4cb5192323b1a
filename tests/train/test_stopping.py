"""A run that is asked to stop while it starts: 75 at every moment, and nothing left. Held where the signal is to come."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, members, settings, until
from holding import Hold

from train import heartbeat
from train.launch import exit_code, free_port

MOMENTS = [
    ("command|import|typer", signal.SIGTERM),
    ("command|open|manifest.json", signal.SIGHUP),
    ("command|subprocess.Popen|deepspeed.launcher.launch", signal.SIGUSR1),
    ("launcher|import|deepspeed", signal.SIGTERM),
    ("rank 1|import|torch", signal.SIGINT),
]
MORE = [
    ("command|import|train.recipe", signal.SIGINT),
    ("command|subprocess.Popen|sys.stdin", signal.SIGUSR1),  # the guardian
    ("rank 0|import|numpy", signal.SIGTERM),
    ("rank 0|import|deepspeed", signal.SIGTERM),
    ("rank 1|open|in-use", signal.SIGINT),  # operators are compiled or loaded
    ("rank 0|import|train.validation", signal.SIGHUP),
    ("rank 0|open|heartbeats/rank-00000", signal.SIGTERM),
    ("rank 1|open|heartbeats/rank-00001", signal.SIGTERM),
    ("rank 0|open|config.partial", signal.SIGTERM),
    ("rank 0|open|spikes.jsonl", signal.SIGINT),
]


def held(run: Path, stores: Path, where: str, plain: bool = False) -> tuple[subprocess.Popen[str], Hold]:
    """A run that has come to this moment."""
    hold = Hold(run.parent, where)
    ranks = ["--num_gpus", "2"] if plain else ["--num-accelerators", "2"]
    arguments = ["--recipe", "demo", "--data", str(stores), "--output", str(run), *settings("training.tokens=3840")]
    command = [sys.executable, "-m", "tinyllama", "train", *arguments, *ranks]
    if plain:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error", *ranks]
        command += ["--master_port", str(free_port()), str(ROOT / "train" / "pretrain.py")]
        command += ["--deepspeed", str(ROOT / "ds_configs" / "zero3.json"), *arguments]
    environment = {**os.environ, **hold.environment, "HERE": str(run), "COLUMNS": "200"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    hold.wait(process)
    return process, hold


def expect_stopped(process: subprocess.Popen[str], run: Path) -> str:
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 75, output
    assert "Traceback" not in output
    assert until(lambda: not members(f"HERE={run}"))
    assert not (run / ".lock").exists()
    return output


@pytest.mark.parametrize(
    ("where", "number"), [*MOMENTS, *(pytest.param(*moment, marks=pytest.mark.slow) for moment in MORE)]
)
def test_a_signal_while_a_run_starts_ends_it_with_75(where, number, stores, tmp_path):
    run = tmp_path / "run"
    process, hold = held(run, stores, where)
    process.send_signal(number)
    if where.startswith("command"):  # the others end where they are held, once it has reached them
        hold.go_on()
    output = expect_stopped(process, run)
    assert output.count("stopped by a signal") == 1
    if (where, number) in MOMENTS:
        assert not run.exists()


@pytest.mark.slow
def test_a_run_in_the_background_of_a_script_heeds_an_interrupt_at_once(stores, tmp_path):
    """There SIGINT is ignored, and heeded all the same: once the ranks are launched it is, too."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process, hold = held(tmp_path / "run", stores, "command|import|train.recipe")
    finally:
        signal.signal(signal.SIGINT, before)
    process.send_signal(signal.SIGINT)
    hold.go_on()
    expect_stopped(process, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["rank 0|import|torch", "rank 1|import|deepspeed", "rank 0|open|config.partial"])
def test_a_signal_to_one_rank_of_plain_deepspeed_ends_it_with_75(where, stores, tmp_path):
    run = tmp_path / "run"
    process, _ = held(run, stores, where, plain=True)
    rank = f"RANK={where[5]}"
    (pid,) = set(members(f"\0{rank}\0")) & set(members(f"HERE={run}"))
    os.kill(pid, signal.SIGTERM)
    expect_stopped(process, run)


@pytest.mark.slow
def test_ranks_end_with_the_runner_of_plain_deepspeed(stores, tmp_path):
    run = tmp_path / "run"
    process, _ = held(run, stores, "rank 0|open|spikes.jsonl", plain=True)
    process.kill()
    process.communicate()
    assert until(lambda: not members(f"HERE={run}"))


def test_the_launchers_code_becomes_the_runs():
    # DeepSpeed's launcher ends with 1 if it is stopped itself, with 256 - N for a rank that signal N has killed.
    for code in (0, 2, 70, 74, 75, 76):
        assert exit_code(code, False, []) == exit_code(code, True, []) == code
    for code in (1, -15, 241, 247, 143):
        assert exit_code(code, True, []) == 75
        assert exit_code(code, True, [75, 0]) == 75
        assert exit_code(code, True, [0, 0]) == 0  # it was complete when the signal came
        assert exit_code(code, True, [75, 74]) == 74
    assert exit_code(1, False, [1]) == 1
    assert exit_code(247, False, []) == exit_code(-9, False, []) == 76


def test_beats_of_another_run_are_not_looked_at(tmp_path):
    for rank, token in enumerate(("ours", "theirs")):
        beat = heartbeat.Heartbeat(tmp_path, rank)
        beat.start(token)
        beat.end(2)
    assert heartbeat.read(tmp_path, 0, "ours")["code"] == 2
    assert heartbeat.read(tmp_path, 1, "ours") == {}
    assert heartbeat.exit_codes(tmp_path, "ours") == heartbeat.exit_codes(tmp_path, "theirs") == [2]
    assert heartbeat.code_of_a_peer(tmp_path, 1, 2, "ours") == 2
    for content in (b"", b"[" * 100_000, b"[]", b"{}", b"\xff\xfe", b'{"phase": "ended", "code": 2, "run": "ours"}'):
        heartbeat.heartbeat_file(tmp_path, 0).write_bytes(content)
        assert heartbeat.read(tmp_path, 0, "ours") == heartbeat.read(tmp_path, 0) == {}
