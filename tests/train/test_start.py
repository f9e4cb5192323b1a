"""How runs begin: new weights under every stage, and weights that exist. Real DeepSpeed on two ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_MODEL, train
from test_pretrain import losses, mixture_of, recipe_of, weights
from transformers import LlamaConfig, LlamaForCausalLM

from tinyllama import checkpoint
from tinyllama.model.fused import hf_parameters
from tinyllama.model.hf import load_model
from tinyllama.model.llama import Llama
from train.launch import free_port
from train.recipe import load_recipe

MODEL = load_recipe("demo", TINY_MODEL).model


def hugging_face(directory: Path, **changes) -> Path:
    """Weights as somebody else's model has them: bf16, in several files, drawn otherwise than ours."""
    values = {k: v for k, v in MODEL.to_hf().items() if k not in ("architectures", "model_type", "torch_dtype")}
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**{**values, "initializer_range": 0.1, **changes}))
    model.to(torch.bfloat16).save_pretrained(directory, max_shard_size="400KB")
    assert len(list(directory.glob("*.safetensors"))) > 1 or changes
    return directory


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hugging_face(tmp_path_factory.mktemp("origin") / "model")


def from_origin(stores: Path, run: Path, path: object, *more: str, **options):
    return train(stores, run, *more, extra=("--init-from", str(path)), **options)


def test_a_compiled_run_starts_from_given_weights_and_resumes_bit_for_bit(stores, origin, tmp_path):
    run, more = tmp_path / "run", ("training.tokens=4608", "training.compile=block")
    said = from_origin(stores, run, origin, *more).stdout
    assert f"starting from the weights of {origin}" in said
    assert "blocked" in said  # the table of kernels
    config = json.loads((run / "config.json").read_text())
    assert config["init_from"]["path"] == str(origin)
    assert config["kernels"]["attention"] == "blocked"

    mixture, model = mixture_of(run, stores), load_model(origin, "float32")
    ids, targets = map(torch.from_numpy, mixture.fetch(range(12)))
    with torch.no_grad():
        expected = model(ids, targets).item() / int((targets >= 0).sum())
    first = losses(run)
    assert first[0] == pytest.approx(expected, rel=5e-3)  # the run computes in bf16

    final = weights(run / "checkpoints" / checkpoint.step_name(6))
    shutil.rmtree(run / "checkpoints" / checkpoint.step_name(6))
    shutil.move(origin, tmp_path / "gone")  # a resumed run needs it no more
    try:
        from_origin(stores, run, origin, *more)
    finally:
        shutil.move(tmp_path / "gone", origin)
    assert losses(run) == first
    again = weights(run / "checkpoints" / checkpoint.step_name(6))
    assert all(torch.equal(final[name], again[name]) for name in final)

    refused = from_origin(stores, run, run, *more, check=False)
    assert refused.returncode == 2
    assert f"was started from {origin}, not from {run}" in refused.stderr


@pytest.mark.parametrize("stage", [3, 1])
def test_a_run_starts_from_a_checkpoint_of_another_without_rounding(stores, finished_run, tmp_path, stage):
    run = tmp_path / "run"
    more = (
        "training.tokens=768",
        "optimizer.warmup_steps=0",
        "optimizer.lr=1e-9",
        "optimizer.min_lr=0",
        "optimizer.weight_decay=0",
    )
    extra = ("--init-from", str(finished_run), "--deepspeed", f"zero{stage}")
    train(stores, run, *more, extra=extra)
    before, after = weights(checkpoint.resolve(finished_run)), weights(checkpoint.resolve(run))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-8)
    state = json.loads((checkpoint.resolve(run) / "state.json").read_text())
    assert (state["step"], state["init_from"]["path"]) == (1, str(finished_run))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, "has num_hidden_layers=3, the recipe says model.num_hidden_layers=2"),
        ({"rope_theta": 5e5}, "has rope_theta=500000.0, the recipe says model.rope_theta=10000.0"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True; only tie_word_embeddings=False is supported"),
    ],
)
def test_other_models_are_refused_by_their_first_difference(stores, tmp_path, changes, words):
    model = hugging_face(tmp_path / "model", **changes)
    refused = from_origin(
        stores, tmp_path / "run", model, "training.tokens=768", "optimizer.warmup_steps=0", check=False
    )
    assert refused.returncode == 2
    assert words in refused.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_model_is_refused(stores, origin, tmp_path):
    refused = from_origin(
        stores, tmp_path / "run", tmp_path / "nowhere", "training.tokens=768", "optimizer.warmup_steps=0", check=False
    )
    assert refused.returncode == 2
    assert "nowhere does not exist" in refused.stderr
    (tmp_path / "part").mkdir()
    for file in origin.iterdir():
        if not file.name.startswith("model-00002"):
            shutil.copy(file, tmp_path / "part")
    refused = from_origin(
        stores, tmp_path / "run", tmp_path / "part", "training.tokens=768", "optimizer.warmup_steps=0", check=False
    )
    assert refused.returncode == 2
    assert "model-00002-of" in refused.stderr
    assert "does not exist; give a complete Hugging Face directory" in refused.stderr


def test_a_quantized_start_is_refused_before_anything_is_launched(origin, tmp_path):
    from tinyllama.errors import ConfigError
    from tinyllama.quantize import quantize_directory
    from train import start

    assert start.check(origin, MODEL) == origin
    quantize_directory(origin, tmp_path / "int8", "int8", check=False, report=print)
    with pytest.raises(ConfigError, match=r"--init-from .*int8 is quantized"):
        start.check(tmp_path / "int8", MODEL)


@pytest.mark.parametrize("stage", [3, 1])
def test_new_weights_are_those_of_the_seed_under_every_stage(stores, tmp_path, stage):
    """After one step at a rate too small to matter. DeepSpeed's fp32 copy is made of the bf16 weights."""
    more = (
        "training.tokens=768",
        "optimizer.warmup_steps=0",
        "optimizer.lr=1e-12",
        "optimizer.min_lr=0",
        "optimizer.weight_decay=0",
    )
    train(stores, tmp_path / "run", *more, extra=("--deepspeed", f"zero{stage}"))
    found = weights(checkpoint.resolve(tmp_path / "run"))
    model = Llama(MODEL)
    model.initialize(recipe_of(tmp_path / "run").training.seed)
    for name, parameter in hf_parameters(model):
        torch.testing.assert_close(found[name], parameter.bfloat16().float(), rtol=0, atol=1e-10, msg=name)
        assert found[name].isfinite().all()


def test_weights_that_zero_init_took_away_are_not_initialized_in_silence(tmp_path):
    """DeepSpeed leaves empty tensors, which any initialization would fill without an error (DeepSpeed issue 2650)."""
    script = """
import sys, deepspeed, torch
from tinyllama.model.config import ModelConfig
from tinyllama.model.llama import Llama
from train.distributed import init_distributed
config = {"train_batch_size": 1, "zero_optimization": {"stage": 3}}
init_distributed(config)
shape = ModelConfig(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2)
plain = Llama(shape)
plain.initialize(3)
with deepspeed.zero.Init(config_dict_or_path=config):
    model = Llama(shape)
try:
    model.initialize(3)
except RuntimeError as error:
    assert "is partitioned" in str(error)
else:
    sys.exit("nothing was said")
with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
    model.initialize(3)
with deepspeed.zero.GatheredParameters(list(model.parameters())):
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters()))
print("as it should be")
"""
    environment = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert "as it should be" in done.stdout, done.stderr
