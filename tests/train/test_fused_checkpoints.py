"""Checkpoints know Hugging Face's parameters alone: those written before the projections were fused load as any other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path

import torch
from conftest import ROOT
from test_pretrain import free_port

from tinyllama import checkpoint
from tinyllama.data.store import file_sha256
from tinyllama.model.config import ModelConfig
from tinyllama.model.hf import shapes
from train.proof import add_sums, parameter_sums
from train.recipe import Recipe

RANKS = 2
# Widths that two ranks do not cut between the parts, and a fused weight of which one part spans both ranks.
MODEL = ModelConfig(
    vocab_size=65,
    hidden_size=24,
    intermediate_size=17,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=32,
)
STATE = {"step": 1, "tokens": 64, "optimizer_steps": 1, "ranks": RANKS, "mixture_sha256": "0" * 64}
KINDS = (checkpoint.WEIGHT, *checkpoint.MOMENTS)

SCRIPT = """
import os, sys
from pathlib import Path

import deepspeed, torch
import torch.distributed as dist
from tinyllama import checkpoint
from tinyllama.model.hf import fill
from tinyllama.model.llama import Llama
from train import state
from train.distributed import init_distributed
from train.plan import read_deepspeed, resolve_deepspeed
from train.pretrain import parameter_groups
from train.recipe import Recipe

given, other, out = map(Path, sys.argv[1:4])
torch.set_num_threads(1)
recipe = Recipe.from_dict(checkpoint.read_json(given / "state.json")["recipe"])
rank = int(os.environ["RANK"])

def write(engine, folder):
    folder.mkdir(parents=True, exist_ok=True)
    slices = {f"{kind}|{name}|{start}": tensor.detach().flatten()[: stop - start]
              for name, start, stop, local in state.local_slices(engine) for kind, tensor in local.items()}
    checkpoint.write_safetensors(folder / f"shard-{rank:05d}.safetensors", slices, lambda _: None)

for stage in (1, 3):
    config, _ = resolve_deepspeed(read_deepspeed(f"ds_configs/zero{stage}.json"), recipe, 2)
    if stage == 1:
        init_distributed(config)
    model = Llama(recipe.model)
    fill(model, checkpoint.read_weights(given), "given")
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    state.load_optimizer(engine, given, 1)
    write(engine, out / f"zero{stage}-loaded")
    state.load_masters(engine, reversed(list(checkpoint.read_weights(other))))
    write(engine, out / f"zero{stage}-masters")
    state.load_weights(engine, other)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        found = engine.module.state_dict()
        for name, tensor in checkpoint.read_weights(other):
            assert torch.equal(found[name], tensor.bfloat16()), (stage, name)
dist.barrier()
os._exit(0)
"""


def write_separately(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """A checkpoint as ZeRO-3 wrote it before: half of every tensor, by its own name, on each of two ranks."""
    generator = torch.Generator().manual_seed(seed)
    whole = {
        f"{kind}|{name}": torch.rand(shape, generator=generator)
        for name, shape in shapes(MODEL).items()
        for kind in KINDS
    }
    folder.mkdir()
    for rank in range(RANKS):
        shard = {}
        for key, tensor in whole.items():
            flat, share = tensor.flatten(), -(-tensor.numel() // RANKS)
            shard[f"{key}|{rank * share}"] = flat[rank * share : (rank + 1) * share]
        checkpoint.write_safetensors(folder / f"shard-{rank:05d}.safetensors", shard, lambda _: None)
    training = {"batch_tokens": 64, "micro_batch_sequences": 1, "tokens": 640}
    recipe = Recipe.from_dict({"model": MODEL.to_dict(), "data": {"sequence_length": 32}, "training": training})
    (folder / "state.json").write_text(json.dumps({**STATE, "recipe": recipe.to_dict()}))
    seal(folder)
    return whole


def seal(folder: Path) -> None:
    """Add the manifest, without which nothing is a checkpoint."""
    files = {file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in folder.iterdir()}
    (folder / "manifest.json").write_text(checkpoint.manifest_text(files))


def test_checkpoints_with_separate_projections_load_under_every_stage_and_are_written_again(tmp_path):
    given, other = (write_separately(tmp_path / name, seed) for seed, name in enumerate(("given", "other")))
    environment = {**os.environ, "WORLD_SIZE": str(RANKS), "LOCAL_SIZE": str(RANKS), "DS_ACCELERATOR": "cpu"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", SCRIPT, *(str(tmp_path / name) for name in ("given", "other", "out"))]
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(said)
    sums = add_sums([parameter_sums({f"{key}|0": tensor.flatten()}) for key, tensor in given.items()])
    for stage in (1, 3):
        for written_as in ("loaded", "masters"):
            folder = tmp_path / "out" / f"zero{stage}-{written_as}"
            (folder / "state.json").write_text("{}")
            seal(folder)
        loaded = checkpoint.Slices(tmp_path / "out" / f"zero{stage}-loaded")
        written = [name for shard in shards(tmp_path / "out" / f"zero{stage}-loaded") for name in shard]
        assert {name.rpartition("|")[0] for name in written} == set(given)
        for key, tensor in given.items():
            kind, name = key.split("|")
            found = loaded.read(kind, name, 0, prod(tensor.shape))
            assert torch.equal(found, tensor.flatten()), (stage, key)
        parts = [parameter_sums(shard) for shard in shards(tmp_path / "out" / f"zero{stage}-loaded")]
        assert add_sums(parts) == sums
        masters = checkpoint.Slices(tmp_path / "out" / f"zero{stage}-masters")
        for name in shapes(MODEL):
            expected = other[f"weight|{name}"].flatten()
            assert torch.equal(masters.read("weight", name, 0, expected.numel()), expected), (stage, name)


def shards(folder: Path) -> list[dict[str, torch.Tensor]]:
    """The slices that each rank wrote."""
    from safetensors.torch import load_file

    return [load_file(file) for file in sorted(folder.glob("shard-*.safetensors"))]
