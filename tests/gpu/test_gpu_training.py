"""Pretraining under DeepSpeed on one device: against a plain loop, resumed, and without waiting for the GPU."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from chain_store import recipe as chain_recipe
from chain_store import write_store
from gpu_devices import slow_on_cpu

from tinyllama import checkpoint
from tinyllama.data.loader import Mixture, Source
from tinyllama.model.llama import Llama
from train.distributed import init_distributed
from train.recipe import Recipe
from train.schedule import learning_rate

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVE_EVERY, SEQUENCES = 24, 12, 8
COMPILE = {1: "block", 3: None}  # both ways of computing a block, one with each stage


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    write_store(folder / "chain")
    return folder


def environment() -> dict[str, str]:
    """Of the only rank, as a launcher sets it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def train(stage: int, device: str, data: Path, output: Path) -> list[float]:
    """The losses that a run logs. On a GPU it is asked for the same sums in the same order; a CPU has them anyway."""
    path = data / f"recipe-{stage}.json"
    path.write_text(json.dumps(chain_recipe(STEPS, SAVE_EVERY, COMPILE[stage])))
    command = [sys.executable, "train/pretrain.py", "--deepspeed", f"ds_configs/zero{stage}.json", "--recipe", path]
    command += ["--data", data, "--output", output]
    command += ["--set", "training.deterministic=true"] if device == "cuda" else []
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, **environment()})  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def plain_losses(data: Path, device: str) -> list[float]:
    """The reference, in fp32: transformers' model, torch's AdamW; of ours the batches, first weights and rates."""
    from transformers import LlamaConfig, LlamaForCausalLM

    recipe = Recipe.from_dict(chain_recipe(STEPS, SAVE_EVERY, None))
    mixture = Mixture([Source("chain", data / "chain", 1.0)], recipe.data.sequence_length, recipe.data.seed)
    initial = Llama(recipe.model)
    initial.initialize(recipe.training.seed)
    model = LlamaForCausalLM(LlamaConfig(**recipe.model.to_hf()))
    model.load_state_dict(initial.state_dict())
    model.to(device)
    decayed = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    plain = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(STEPS):
        batch = mixture.fetch(range(SEQUENCES * step, SEQUENCES * (step + 1)))
        ids, targets = (torch.from_numpy(values).long().to(device) for values in batch)
        logits = model(ids).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(1024 * step, recipe)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@slow_on_cpu
@pytest.mark.parametrize("stage", [1, 3])
def test_training_follows_a_plain_loop_and_a_resumed_run_the_undisturbed_one(stage, device, data, tmp_path):
    """bf16 against fp32: each loss within 2%, their mean within 0.4%. Resumed: every loss the same to the bit."""
    losses = train(stage, device, data, tmp_path / "whole")
    expected = plain_losses(data, device)
    assert len(losses) == STEPS
    assert expected[-1] < 0.8 * expected[0]  # it learns: the two did not merely stand still together
    assert np.abs(np.array(losses) / expected - 1).max() < 2e-2
    assert abs(np.mean(losses) / np.mean(expected) - 1) < 4e-3
    ((_, saved),) = [found for found in checkpoint.list_checkpoints(tmp_path / "whole") if found[0] == SAVE_EVERY]
    shutil.copytree(saved, tmp_path / "resumed" / saved.relative_to(tmp_path / "whole"))
    assert train(stage, device, data, tmp_path / "resumed") == losses[SAVE_EVERY:]


@pytest.fixture
def one_rank(monkeypatch):
    """A process group of this process alone, and DeepSpeed upon it."""
    deepspeed = pytest.importorskip("deepspeed")
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    init_distributed({"zero_optimization": {"stage": 1}})
    yield deepspeed
    torch.distributed.destroy_process_group()


def on_waiting(device: str, mode: str) -> None:
    """What torch does when the host is about to wait for the GPU: "default" (nothing), "warn", "error"."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode(mode)


@slow_on_cpu
def test_micro_steps_never_wait_for_the_gpu_and_a_step_only_in_deepspeeds_own_checks(device, one_rank):
    """torch raises where a micro-step's forward, backward or bookkeeping would wait (on a CPU nobody waits).

    The optimizer step may wait for what DeepSpeed asks of the gradients: are they finite (twice), and is their norm (once
    for each of the two groups of parameters).
    """
    from tinyllama.model.kernels import Setting, choose
    from train import plan as planning
    from train.pretrain import build_optimizer

    recipe = Recipe.from_dict(chain_recipe(STEPS, SAVE_EVERY, "block"))
    config, batch = planning.resolve_deepspeed(planning.read_deepspeed(ROOT / "ds_configs" / "zero1.json"), recipe, 1)
    model = Llama(recipe.model)
    model.initialize(0)
    model.use(choose({}, Setting(torch.device(device), True))[0])
    optimizer = build_optimizer(model, recipe, False)
    engine, *_ = one_rank.initialize(model=model, optimizer=optimizer, config=config)
    model.compile_blocks()
    tokens = torch.randint(3, 512, (batch.micro, 129), device=device)
    ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step(around: str) -> list[warnings.WarningMessage]:
        for micro_step in range(batch.accumulation):
            boundary = micro_step + 1 == batch.accumulation
            on_waiting(device, around)
            engine.backward(engine(ids=ids, targets=targets) / targets.numel())
            on_waiting(device, "warn" if boundary and around == "error" else around)
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                engine.step()
        return [wait for wait in waits if "synchronizing" in str(wait.message)]

    try:
        for _ in range(3):
            step("default")  # compiles, and allocates the optimizer's moments
        for _ in range(3):
            waits = step("error")
            assert len(waits) <= 4, [f"{w.filename}:{w.lineno}" for w in waits]
            assert all("deepspeed" in wait.filename for wait in waits), [f"{w.filename}:{w.lineno}" for w in waits]
    finally:
        on_waiting(device, "default")
