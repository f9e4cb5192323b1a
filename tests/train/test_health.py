"""Sick runs: spikes are skipped or rewound, numbers that are not finite and frozen weights end the run, a hang is seen."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import train
from test_pretrain import losses, metrics, start, wait_for_step, weights

from tinyllama import checkpoint
from train import heartbeat
from train.health import LossGuard
from train.recipe import HealthConfig

EVERY_STEP = ("training.tokens=9216", "checkpoint.every_steps=1", "checkpoint.keep_last=20", "health.spike_window=6")


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / checkpoint.step_name(step)


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and moments, as saved."""
    slices = checkpoint.Slices(folder(run, step))
    sizes = {name: tensor.numel() for name, tensor in weights(folder(run, step)).items()}
    kinds = (checkpoint.WEIGHT, *checkpoint.MOMENTS)
    return {f"{kind} {name}": slices.read(kind, name, 0, size) for name, size in sizes.items() for kind in kinds}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def keep_up_to(run: Path, copy: Path, step: int) -> Path:
    """A copy of a run as it was after a step."""
    shutil.copytree(run, copy)
    for later, path in checkpoint.list_checkpoints(copy):
        if later > step:
            shutil.rmtree(path)
    return copy


def test_the_guard_is_the_median_and_the_median_deviation():
    config = HealthConfig(on_spike="skip", spike_sigmas=3.0, spike_window=8)
    guard = LossGuard(config, torch.device("cpu"), [], [])
    values = [5.0, 4.0, 4.5, 4.2, 4.1, 4.4, 4.3, 3.9, 4.0, 4.6, 40.0, 4.0, float("inf"), float("nan")]
    seen: list[float] = []
    spikes: list[float] = []
    for step, value in enumerate(values):
        veto = guard.veto(torch.tensor(value), step, step).item()
        window = np.array(seen[-8:], dtype=np.float32)
        expected = False
        if len(window) >= 4:
            median = np.sort(window)[(len(window) - 1) // 2]
            mad = np.sort(abs(window - median))[(len(window) - 1) // 2]
            expected = not value <= median + 3 * max(0.01, 1.4826 * mad)
        assert np.isnan(veto) == (expected or np.isnan(value)), step
        seen.append(value)
        # A new guard that is given the window and the ledger goes on in the same way.
        guard.read()
        if expected and np.isfinite(value):
            spikes.append(value)
        guard = LossGuard(config, torch.device("cpu"), guard.window(), guard.spikes)
    assert 40.0 in spikes
    assert [spike["loss"] for spike in guard.spikes] == pytest.approx(spikes)


@pytest.mark.parametrize("stage", [3, 2, 1])
def test_a_skipped_spike_leaves_weights_and_moments_and_the_resumed_run_decides_the_same(stores, tmp_path, stage):
    run = tmp_path / "run"
    extra = ("--deepspeed", f"zero{stage}", "--inject", "spike@6,spike@8")
    more = (*EVERY_STEP, "health.on_spike=skip", "training.micro_batch_sequences=3")
    more += () if stage == 1 else ("training.reduce_once=true",)
    done = train(stores, run, *more, extra=extra)
    assert "step 7: loss" in done.stdout
    for step in (7, 9):
        assert same(tensors(run, step), tensors(run, step - 1))
    assert not same(tensors(run, 8), tensors(run, 7))
    entries = [entry for entry in metrics(run) if "loss" in entry]
    assert [entry["skipped_steps"] for entry in entries] == [0] * 6 + [1, 1, 2, 2, 2, 2]
    ledger = [json.loads(line) for line in (run / "spikes.jsonl").read_text().splitlines()]
    assert [(spike["step"], spike["batch"], spike["action"]) for spike in ledger] == [(7, 6, "skip"), (9, 8, "skip")]
    state = checkpoint.verify(folder(run, 12))
    assert (state["spikes"], state["skipped_steps"], state["optimizer_steps"]) == (ledger, 2, 10)
    if stage != 3:
        return
    # From right after a skip: nothing of the vetoed gradient had stayed in the buffers of the run that went on.
    part = keep_up_to(run, tmp_path / "part", 7)
    train(stores, part, *more, extra=extra)
    assert losses(part) == losses(run)
    assert same(tensors(part, 12), tensors(run, 12))
    assert (part / "spikes.jsonl").read_text() == (run / "spikes.jsonl").read_text()


@pytest.mark.parametrize("stage", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rewind_leaves_out_the_batches_since_the_checkpoint_and_a_resume_ends_the_same(stores, tmp_path, stage):
    run = tmp_path / "run"
    more = ("training.tokens=9216", "checkpoint.every_steps=3", "health.spike_window=6", "health.on_spike=rewind")
    extra = ("--deepspeed", f"zero{stage}", "--inject", "spike@7")
    train(stores, run, *more, extra=extra)
    (spike,) = [json.loads(line) for line in (run / "spikes.jsonl").read_text().splitlines()]
    assert (spike["step"], spike["action"], spike["to"], spike["left_out"]) == (8, "rewind", 6, [6, 7])
    state = checkpoint.verify(folder(run, 12))
    assert (state["data_offset"], state["optimizer_steps"], state["tokens"]) == (2, 12, 9216)
    assert [entry["step"] for entry in metrics(run) if "loss" in entry] == list(range(1, 13))
    # A run killed before the spike meets it again; one killed after the rewind has it in its checkpoint.
    for step in (6, 9) if stage == 3 else (9,):
        part = keep_up_to(run, tmp_path / f"from-{step}", step)
        train(stores, part, *more, extra=extra)
        assert same(tensors(part, 12), tensors(run, 12))
        assert losses(part) == losses(run)


def test_a_rewind_after_a_stop_by_signal_goes_where_the_undisturbed_run_goes(stores, tmp_path):
    """The signal's checkpoint, of step 7, is nearer to the spike than 6; and with keep_last=1 it must not push 6 out."""
    more = ("training.tokens=9216", "checkpoint.every_steps=3", "checkpoint.keep_last=1")
    more += ("health.spike_window=6", "health.on_spike=rewind")
    train(stores, tmp_path / "whole", *more, extra=("--inject", "spike@7"))
    done = train(stores, tmp_path / "parts", *more, extra=("--inject", "spike@7,stop@6"), check=False)
    assert done.returncode == 75, done.stderr
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path / "parts")] == [6, 7]
    train(stores, tmp_path / "parts", *more, extra=("--inject", "spike@7"))
    ledgers = [(tmp_path / name / "spikes.jsonl").read_text() for name in ("whole", "parts")]
    assert ledgers[0] == ledgers[1]
    assert json.loads(ledgers[0])["to"] == 6
    assert same(tensors(tmp_path / "parts", 12), tensors(tmp_path / "whole", 12))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    states = [checkpoint.verify(folder(tmp_path / name, 12)) for name in ("whole", "parts")]
    for key in ("step", "tokens", "optimizer_steps", "data_offset", "loss_window", "spikes", "epochs"):
        assert states[0][key] == states[1][key], key


def test_skips_in_a_row_are_counted_across_a_resume():
    spikes = [{"step": step, "action": "skip"} for step in (3, 5, 6)]
    config = HealthConfig(on_spike="skip", spike_window=8)
    for step, expected in ((6, 2), (5, 1), (4, 0), (7, 0)):
        assert LossGuard(config, torch.device("cpu"), [], spikes, step)._in_a_row == expected


@pytest.mark.parametrize(
    ("fault", "words", "steps"),
    [("nan@4", "step 5: the loss is nan", 4), ("frozen@4", "not changed", 8)],
)
def test_a_sick_run_ends_with_one_line_and_saves_nothing(stores, tmp_path, fault, words, steps):
    run = tmp_path / "run"
    more = ("training.tokens=6912", "health.frozen_after_steps=5")
    done = train(stores, run, *more, extra=("--inject", fault), check=False)
    assert done.returncode == 70, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1
    assert words in done.stderr
    assert checkpoint.list_checkpoints(run)[-1][0] == steps // 3 * 3


@pytest.mark.alone
def test_a_rank_that_hangs_ends_the_run_with_the_stacks_of_the_others(stores, tmp_path):
    run = tmp_path / "run"
    process = start(stores, run, "training.tokens=7680000", "data.max_epochs=1000", "health.hang_timeout_s=3")
    wait_for_step(run, 3)
    pid = heartbeat.read(run, 1)["pid"]
    os.kill(pid, signal.SIGSTOP)
    output, _ = process.communicate(timeout=240)  # without the setting it would be 600 s
    assert process.returncode == 76, output
    assert "no rank has moved" in output
    assert "rank 1 in" in output
    assert "pretrain.py" in heartbeat.stack_file(run, 0).read_text()
