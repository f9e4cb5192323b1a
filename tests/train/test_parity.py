"""Steps of the engine against a plain torch loop around transformers' Llama: same weights, same batches, AdamW."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_MODEL, tinyllama

from tinyllama.data.loader import Mixture, Source
from tinyllama.model.llama import Llama
from train.recipe import Recipe, load_recipe
from train.schedule import learning_rate


def settings(steps: int) -> list[str]:
    return [
        *TINY_MODEL,
        f"training.tokens={768 * steps}",
        "optimizer.warmup_steps=20",
        "data.max_epochs=40",
        "checkpoint.every_steps=200",
        "validation.every_steps=200",
    ]


def plain_losses(recipe: Recipe, stores: Path) -> list[float]:
    """The reference, in fp32: nothing of ours but the batches, the initial weights and the learning rates."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sources = [Source(s.name, stores / s.name, s.weight) for s in recipe.data.sources]
    mixture = Mixture(sources, recipe.data.sequence_length, recipe.data.seed)
    initial = Llama(recipe.model)
    initial.initialize(recipe.training.seed)
    model = LlamaForCausalLM(LlamaConfig(**recipe.model.to_hf()))
    model.load_state_dict(initial.state_dict())
    decayed = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    plain = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(recipe.num_steps):
        ids, targets = map(torch.from_numpy, mixture.fetch(range(12 * step, 12 * step + 12)))
        logits = model(ids.long()).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(768 * step, recipe)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def engine_losses(stores: Path, run: Path, steps: int, bf16: bool) -> list[float]:
    config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    config["bf16"] = {"enabled": bf16}
    run.mkdir()
    (run / "deepspeed.json").write_text(json.dumps(config))
    arguments = ["train", "--recipe", "demo", "--data", stores, "--output", run, "--num-accelerators", 2]
    arguments += ["--deepspeed", run / "deepspeed.json"]
    tinyllama(*arguments, *(a for setting in settings(steps) for a in ("--set", setting)), timeout=400)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize(("steps", "learned"), [(60, 0.85), pytest.param(200, 0.75, marks=pytest.mark.slow)])
def test_losses_follow_transformers(stores, tmp_path, steps, learned):
    """fp32: the order of sums alone; it grows as weights drift apart. bf16: each loss within 2%, their mean within 0.2%."""
    expected = np.array(plain_losses(load_recipe("demo", settings(steps)), stores))
    assert expected[0] == pytest.approx(np.log(600), rel=0.02)
    assert expected[-10:].mean() < learned * expected[0]  # it learns: the two did not merely stand still together
    exact = np.array(engine_losses(stores, tmp_path / "fp32", steps, bf16=False))
    low = np.array(engine_losses(stores, tmp_path / "bf16", steps, bf16=True))
    assert np.abs(exact / expected - 1)[:20].max() < 2e-6
    assert np.abs(exact / expected - 1).max() < 2e-5
    assert np.abs(low / expected - 1).max() < 2e-2
    assert abs(low.mean() / expected.mean() - 1) < 2e-3
