"""What is in a checkpoint, what is kept, what it proves on loading, and a disk that is full."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, settings, train
from test_pretrain import free_port, metrics

from tinyllama import checkpoint
from tinyllama.data.store import file_sha256
from train import generators
from train.proof import add_sums, parameter_sums


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Change a file of a checkpoint and its checksum: what only the proof can notice."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": file_sha256(folder / name)}
    (folder / "manifest.json").write_text(checkpoint.manifest_text(manifest["files"]))


def test_a_checkpoint_says_everything_of_its_run(finished_run):
    folder = checkpoint.resolve(finished_run)
    state, config = checkpoint.verify(folder), json.loads((finished_run / "config.json").read_text())
    assert state["recipe"] == config["recipe"]
    assert state["deepspeed"] == config["deepspeed"]
    assert state["deepspeed"]["zero_optimization"]["stage"] == 3
    assert state["versions"]["torch"] == torch.__version__
    assert state["epochs"] == [entry for entry in metrics(finished_run) if "loss" in entry][-1]["epochs"]
    assert len(state["loss_window"]) == 9
    assert len(state["proof"]["sums"]) == 3 * len(dict(checkpoint.read_weights(folder)))
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert state["git"].get("commit", "") == head.stdout.strip()
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "rng-00000.json",
        "rng-00001.json",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
        "state.json",
        "tokenizer.model",
    ]
    saves = [entry for entry in metrics(finished_run) if "save_s" in entry]
    assert [entry["step"] for entry in saves] == [3, 6, 9]
    assert all(0 < entry["save_stall_s"] < entry["save_s"] for entry in saves)


def test_generators_continue_where_they_were(tmp_path):
    torch.manual_seed(5), np.random.seed(6), random.seed(7)
    random.gauss(0, 1), np.random.normal()
    (tmp_path / generators.file_name(3)).write_text(json.dumps(generators.read_state()))

    def draw() -> list[float]:
        return [torch.rand(()).item(), np.random.normal(), np.random.normal(), random.gauss(0, 1), random.random()]

    expected = draw()
    assert draw() != expected
    generators.restore(tmp_path, 3)
    assert draw() == expected


def test_sums_are_those_of_the_tensor_however_it_is_cut_and_notice_an_exchange():
    whole = torch.randn(3_000_000)
    expected = add_sums([parameter_sums({"weight|w|0": whole})])
    for cuts in ([0, 1, 3_000_000], [0, 1_048_576, 2_999_999, 3_000_000], [0, 1_500_001, 3_000_000]):
        parts = [parameter_sums({f"weight|w|{start}": whole[start:stop]}) for start, stop in itertools.pairwise(cuts)]
        assert add_sums(parts) == expected
    bits = whole.numpy().view(np.uint32).astype(object)
    exact = sum(int(b) * (2 * i + 1) for i, b in enumerate(bits)) % 2**64
    assert expected == {"weight|w": f"{exact:016x}"}
    whole[7], whole[2_000_000] = whole[2_000_000].clone(), whole[7].clone()
    assert add_sums([parameter_sums({"weight|w|0": whole})]) != expected


@pytest.mark.parametrize("changed", ["next_batch", "probe_loss", "weights"])
def test_a_checkpoint_that_does_not_prove_itself_is_refused_in_one_line(finished_run, stores, tmp_path, changed):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    folder = checkpoint.resolve(run)
    if changed == "weights":
        shard = folder / "shard-00001.safetensors"
        data = bytearray(shard.read_bytes())
        data[-8:-4], data[-4:] = data[-4:], data[-8:-4]  # two neighbours in the wrong order
        rewrite(folder, shard.name, bytes(data))
        words = " is not what was saved"
    else:
        state = json.loads((folder / "state.json").read_text())
        proof = state["proof"]
        if changed == "next_batch":
            proof["next_batch"] = "0" * 64
            words = "the batch after it is not the one it was saved with"
        else:
            proof["probe_loss"] = float(np.nextafter(proof["probe_loss"], 0))  # the last bit
            words = "the probe's loss is"
        rewrite(folder, "state.json", json.dumps(state).encode())
    done = train(stores, run, "training.tokens=7680", extra=("--allow-rate-jump",), check=False)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert words in line
    assert checkpoint.list_checkpoints(run)[-1][0] == 9


SCRIPT = """
import os, resource, sys
from dataclasses import replace
from pathlib import Path

os.environ.update(DS_ACCELERATOR="cpu", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
import deepspeed, torch
from tinyllama import checkpoint
from tinyllama.model.llama import Llama
from train.plan import read_deepspeed, resolve_deepspeed
from train.pretrain import parameter_groups
from train.recipe import load_recipe
from train.distributed import init_distributed
from train.saver import SaveError, Saver

run = Path(sys.argv[1])
recipe = load_recipe("demo", sys.argv[3:])
config, _ = resolve_deepspeed(read_deepspeed("ds_configs/zero3.json"), recipe, 1)
init_distributed(config)
model = Llama(recipe.model)
model.initialize(1)
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(parameter_groups(model, recipe)), config=config)
ids = torch.ones(engine.train_micro_batch_size_per_gpu(), 64, dtype=torch.int64)
def train():
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(ids, ids))
        engine.step()
train()
state = {"tokens": 768, "optimizer_steps": 1, "mixture_sha256": "", "recipe": recipe.to_dict()}
control = torch.distributed.new_group(backend="gloo")
steps = lambda: [step for step, _ in checkpoint.list_checkpoints(run)]
def saver(**more):
    return Saver(run, replace(recipe.checkpoint, every_steps=1, proof=False, **more), None, control, lambda phase: None)

keeping = saver(keep_last=2, keep_every_steps=4)
weights = []
def now():
    return dict(engine.module.named_parameters())["lm_head.weight"].ds_tensor[:1000].float()
for step in range(1, 11):
    keeping.save(engine, {**state, "step": step})
    weights.append(now())
    train()  # while the thread writes: what it writes is the state at the save
keeping.wait()
assert steps() == [4, 8, 9, 10], steps()
saver(background=False).save(engine, {**state, "step": 11})
weights.append(now())
for step in steps():
    written = checkpoint.Slices(run / "checkpoints" / checkpoint.step_name(step))
    assert torch.equal(written.read("weight", "lm_head.weight", 0, 1000).bfloat16().float(), weights[step - 1])
assert not torch.equal(weights[9], weights[10])
for step in steps():
    checkpoint.verify(run / "checkpoints" / checkpoint.step_name(step))

resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))  # as a full disk: the write fails
full = saver(keep_last=1)
full.save(engine, {**state, "step": 12})
try:
    full.wait()
except SaveError as error:
    print(error, flush=True)
left = sorted(path.name for path in (run / "checkpoints").iterdir())
assert left == [f"step-{step:08d}" for step in (4, 8, 9, 10, 11)], left
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
full.save(engine, {**state, "step": 12})
full.wait()
assert steps() == [12], steps()
os._exit(0)
"""


def test_saves_run_behind_the_training_and_a_full_disk_leaves_what_was_there(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), str(free_port()), *settings()[1::2]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "partial-step-00000012: could not be written: [Errno 27] File too large" in done.stdout
