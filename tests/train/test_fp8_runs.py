"""Whole runs in float8, emulated on a CPU: they train, save, resume and export as others do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import tinyllama, train
from test_pretrain import losses

from tinyllama import checkpoint
from tinyllama.model.hf import load_model, shapes

pytestmark = pytest.mark.usefixtures("torchao")
FP8 = ("training.precision=fp8", "training.micro_batch_sequences=3")


def check(run: Path, stores: Path, bf16_losses: list[float], more: tuple[str, ...], stages: tuple[int, int]) -> None:
    """Two steps under a stage, and two more under another; the losses are bf16's within float8's precision."""
    for tokens, stage in ((1536, stages[0]), (3072, stages[1])):
        settings = (*FP8, *more, f"training.tokens={tokens}", "checkpoint.every_steps=2")
        done = train(stores, run, *settings, ranks=1, extra=("--deepspeed", f"zero{stage}"))
        assert "fp8 tensorwise (torchao)" in done.stdout
        assert "emulated on a CPU" in done.stdout
    assert "resumed" in done.stdout
    found = losses(run)
    assert found == pytest.approx(bf16_losses[:4], rel=2e-3)
    assert found[1] != bf16_losses[1]
    tinyllama("export", run, "--output", run / "export", "--dtype", "float32")
    model = load_model(run / "export")
    assert model.state_dict().keys() == shapes(checkpoint.model_config(checkpoint.resolve(run))).keys()
    assert json.loads((run / "config.json").read_text())["kernels"]["matrix products"] == "fp8 tensorwise (torchao)"


@pytest.mark.slow  # two runs
@pytest.mark.parametrize(
    ("more", "stages"), [(("training.compile=null",), (1, 3)), ((), (3, 1))], ids=["eager", "compiled"]
)
def test_a_run_trains_resumes_under_another_stage_and_exports(stores, finished_run, tmp_path, more, stages):
    check(tmp_path / "run", stores, losses(finished_run), more, stages)


def test_sequences_that_do_not_fit_are_one_line(stores, tmp_path):
    settings = (
        "training.precision=fp8",
        "data.sequence_length=60",
        "training.batch_tokens=720",
        "training.tokens=2880",
    )
    done = train(stores, tmp_path / "run", *settings, "training.micro_batch_sequences=2", ranks=1, check=False)
    assert done.returncode == 2
    assert (
        "training.precision='fp8' needs multiples of 16, micro_batch_sequences x sequence_length is 120" in done.stderr
    )
    done = train(stores, tmp_path / "run", "training.precision=fp16", check=False)
    assert done.returncode == 2
    assert "training.precision='fp16'" in done.stderr
