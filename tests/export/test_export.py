"""Checkpoint to Hugging Face directory: the same logits, the same ids, one content hash."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import tinyllama, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyllama import checkpoint
from tinyllama.export import RECORD, content_sha256
from tinyllama.model.hf import load_model
from tinyllama.tokenizer.sentencepiece_model import Tokenizer

TEXT = "def f(x):\n        return x  # Grüße 123\n\n\ttab"


def test_logits_equal_training_and_ids_equal_sentencepiece(export, finished_run, tokenizer_model):
    ours, tokenizer_path = checkpoint.load_model(finished_run)
    theirs = AutoModelForCausalLM.from_pretrained(export)
    ids = AutoTokenizer.from_pretrained(export)(TEXT, add_special_tokens=False)["input_ids"]
    assert ids == Tokenizer.load(tokenizer_model).encode(TEXT)
    assert tokenizer_path.read_bytes() == tokenizer_model.read_bytes()
    batch = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(ours(batch), theirs(batch).logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(load_model(export)(batch), theirs(batch).logits, rtol=1e-4, atol=1e-5)


def test_record_says_where_it_came_from(export, finished_run):
    record = json.loads((export / RECORD).read_text())
    assert (record["step"], record["tokens"]) == (9, 6912)
    assert record["content_sha256"] == content_sha256(export)
    assert record["logits_difference"] < 2e-4
    assert {p.name for p in export.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_ranks_that_wrote_the_checkpoint_do_not_matter(finished_run, stores, tmp_path):
    """The same weights, written by two ranks and by one, give the same export."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    train(stores, run, "training.tokens=7680", ranks=1, extra=("--allow-rate-jump",))  # one step more, on one rank
    for step in (9, 10):
        tinyllama("export", run / "checkpoints" / checkpoint.step_name(step), "--output", tmp_path / str(step))
    state = json.loads((checkpoint.resolve(run) / "state.json").read_text())
    assert (state["step"], state["ranks"]) == (10, 1)
    hashes = {json.loads((tmp_path / str(s) / RECORD).read_text())["content_sha256"] for s in (9, 10)}
    assert len(hashes) == 2
    again = tinyllama("export", finished_run, "--output", tmp_path / "again", "--json")
    assert (
        json.loads(again.stdout)["content_sha256"]
        == json.loads((tmp_path / "9" / RECORD).read_text())["content_sha256"]
    )


def test_sharded_weights_load_too(finished_run, tmp_path, monkeypatch):
    from tinyllama import export as module

    monkeypatch.setattr(module, "MAX_SHARD_BYTES", 100_000)
    module.export_checkpoint(finished_run, tmp_path / "sharded", dtype="float32")
    assert len(list((tmp_path / "sharded").glob("model-*-of-*.safetensors"))) > 1
    whole, _ = checkpoint.load_model(finished_run)
    parts = load_model(tmp_path / "sharded")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


@pytest.mark.parametrize("damage", ["missing", "corrupt", "no-checkpoint"])
def test_bad_checkpoints_are_one_line_and_leave_nothing(finished_run, tmp_path, damage):
    source = tmp_path / "run"
    shutil.copytree(checkpoint.resolve(finished_run), source)
    shard = source / "shard-00000.safetensors"
    if damage == "missing":
        shard.unlink()
    elif damage == "corrupt":
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    else:
        shutil.rmtree(source)
    done = tinyllama("export", source, "--output", tmp_path / "out", check=False)
    assert done.returncode == 2
    assert len([line for line in done.stderr.splitlines() if "error:" in line]) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_export_is_never_replaced(finished_run, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    done = tinyllama("export", finished_run, "--output", tmp_path / "precious", check=False)
    assert done.returncode == 2
    assert (tmp_path / "precious" / "file").read_text() == "mine"
