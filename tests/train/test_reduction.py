"""Gradients reduced once a step: summed in fp32, for every ZeRO stage and more than one rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, train

from train.launch import free_port
from train.plan import reduces_once

MICRO_STEPS = 64
SMALL = 2.0**-9  # a quarter of bf16's step at 1: added one at a time to 1 in bf16, any number of them is nothing
# Two parameters whose gradients are the input itself; SGD at rate 1, so that an update is the gradient.
SCRIPT = """
import json, os, sys

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed, torch
from deepspeed.utils import safe_get_full_fp32_param
from train.accumulation import Accumulation
from train.distributed import init_distributed

stage, ours, micro_steps, small = int(sys.argv[1]), sys.argv[2] == "ours", int(sys.argv[3]), float(sys.argv[4])
config = {
    "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": micro_steps, "gradient_clipping": 0.0,
    "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 400},
}

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.kept = torch.nn.Parameter(torch.zeros(300))  # stage 3: below the threshold, whole on every rank
        self.large = torch.nn.Parameter(torch.zeros(40, 50))  # larger than a bucket

    def forward(self, x):
        return (self.kept * x).sum() + (self.large * x).sum()

init_distributed(config)
model = Model()
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=config)
if ours:
    accumulation = Accumulation(engine, reduce_once=stage > 1)
    around, added = accumulation.step, accumulation.added
else:
    engine.set_gradient_accumulation_boundary(True)
    around, added = engine.coalesce_grad_reduction, lambda: None
found = []
for step in range(2):
    with around():
        for micro_step in range(micro_steps):
            x = torch.tensor(small if micro_step else 1.0, dtype=torch.bfloat16)
            engine.backward(engine(x) * micro_steps)
            added()
    if not ours:
        engine.step()
    assert engine.was_step_applied()
    found.append([sorted(set(safe_get_full_fp32_param(p).flatten().tolist())) for p in engine.module.parameters()])
if os.environ["RANK"] == "0":
    print("FOUND", json.dumps(found), flush=True)
torch.distributed.barrier()
os._exit(0)
"""


def updates(stage: int, way: str, ranks: int = 2) -> list[list[list[float]]]:
    """Of each step, the values that each parameter has after it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment |= {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(stage), way, str(MICRO_STEPS), str(SMALL)]
    processes = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, outputs
    line = next(line for line in outputs[0].splitlines() if line.startswith("FOUND"))
    return json.loads(line.removeprefix("FOUND"))


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [(3, 2), *(pytest.param(*other, marks=pytest.mark.slow) for other in ((2, 2), (1, 2), (3, 1)))],
)
def test_many_small_gradients_are_summed_in_fp32(stage, ranks):
    expected = 1 + (MICRO_STEPS - 1) * SMALL  # exact in fp32
    for step, parameters in enumerate(updates(stage, "ours", ranks), start=1):
        for values in parameters:
            # The sum of a rank is rounded once, to bf16, in which it travels: half of its step at 1, 2^-8.
            assert values == pytest.approx([-step * expected], abs=step * 2.0**-8)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_own_way_alone_would_lose_them(stage):
    """Why train/accumulation.py is there. Should this fail, DeepSpeed has been mended, and it can go."""
    (first, _) = updates(stage, "theirs")
    assert first == [[-1.0], [-1.0]]


def test_when_gradients_are_reduced_once():
    def chosen(wanted=None, stage=3, accumulation=16, offload=False, room=True):
        return reduces_once(wanted, stage, accumulation, offload, room)

    assert chosen()
    assert chosen(stage=2)
    assert not chosen(room=False)
    assert not chosen(offload=True)
    assert not chosen(accumulation=1)
    assert not chosen(stage=1)  # sums on the rank, and reduces once, by itself
    assert not chosen(wanted=False)
    assert chosen(wanted=True, room=False)
    assert not chosen(wanted=True, stage=1)


def test_a_run_that_reduces_once_follows_one_that_does_not(finished_run, stores, tmp_path):
    """bf16, compiled blocks, three micro-batches on each of two ranks instead of one; and its profile."""
    more = ["training.tokens=6912", "training.micro_batch_sequences=2", "training.reduce_once=true"]
    done = train(stores, tmp_path / "once", *more, extra=("--profile", "1:2"))
    assert "gradients are reduced once a step" in done.stdout
    assert json.loads((tmp_path / "once" / "config.json").read_text())["reduce_once"]
    runs = (tmp_path / "once", finished_run)
    once, each = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs)
    for key, tolerance in (("loss", 2e-3), ("grad_norm", 2e-2)):
        values = [[entry[key] for entry in entries if key in entry] for entries in (once, each)]
        assert len(values[0]) == 9
        assert values[0] == pytest.approx(values[1], rel=tolerance)
    profile = tmp_path / "once" / "profile"
    assert (profile / "trace.json.gz").stat().st_size > 1000
    found = json.loads((profile / "kernels.json").read_text())
    assert found["steps"] == 2
    assert sum(row["share"] for row in found["kernels"]) == pytest.approx(1)
    assert {"GEMM", "communication", "optimizer", "elementwise/norm"} <= set(found["categories"])
    assert "profile of 2 steps" in done.stdout
    assert (profile / "kernels.txt").read_text().startswith(next(iter(found["categories"])))
