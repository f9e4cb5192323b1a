"""What a rank's device has to hold, the micro-batch that follows, and what is said where there is too little."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import train

from tinyllama.errors import ConfigError
from tinyllama.model.config import ModelConfig
from train.estimate import (
    advice,
    block_activation_bytes,
    block_parameters,
    bytes_per_step,
    estimate,
    memory,
    reduce_bucket,
)
from train.host_buffers import HostBuffers, layout
from train.memory import explained, use_expandable_segments
from train.plan import BatchPlan, bucket_sizes, describe_memory, read_deepspeed, resolve_deepspeed, start_lines
from train.recipe import load_recipe
from train.saver import checkpoints_to_come

CONFIGS = Path(__file__).parents[2] / "ds_configs"
TINYLLAMA = ModelConfig()
N = 1_100_048_384
GB = 10**9


def test_activations_are_those_measured_at_the_shape_of_the_recipe():
    """On a CPU, by what autograd saved: 59.5 KB a token and layer compiled, 87.2 where nothing is."""
    assert block_activation_bytes(TINYLLAMA) == pytest.approx(59.5e3, rel=1e-3)
    assert block_activation_bytes(TINYLLAMA, compiled=False) == pytest.approx(87.2e3, rel=1e-3)


@pytest.mark.parametrize(("micro", "gigabytes"), [(4, 33), (8, 43.5), (16, 65), (32, 109)])
def test_one_gpu_holds_the_state_and_a_micro_batch(micro, gigabytes):
    need = memory(TINYLLAMA, 1, 1, micro * 2048)
    assert need.weights + need.gradients + need.optimizer == 18 * N
    assert need.total / GB == pytest.approx(gigabytes, rel=0.01)


@pytest.mark.parametrize(
    ("stage", "ranks", "capacity", "micro", "once"),
    [
        ("zero1", 1, 40, 4, False),
        ("zero1", 1, 80, 16, False),
        ("zero1", 1, 141, 32, False),
        ("zero1", 64, 141, 16, False),  # all that a rank has to do
        ("zero3", 1, 40, 4, False),  # 36.4 GB with the gradients of all parameters: above 0.9 of 40
        ("zero3", 1, 80, 16, True),
        ("zero3", 8, 24, 4, True),
        ("zero2", 8, 80, 16, True),
        ("zero3_offload", 8, 80, 16, False),
    ],
)
def test_the_micro_batch_is_the_largest_that_fits(stage, ranks, capacity, micro, once):
    recipe, raw = load_recipe(), read_deepspeed(CONFIGS / f"{stage}.json")
    config, plan = resolve_deepspeed(raw, recipe, ranks, free_bytes=capacity * GB)
    assert (plan.micro, plan.reduce_once, plan.tokens) == (micro, once, recipe.training.batch_tokens)
    assert config["train_micro_batch_size_per_gpu"] == micro
    given, same = resolve_deepspeed(
        raw, load_recipe(settings=["training.micro_batch_sequences=2"]), ranks, None, 80 * GB
    )
    assert given["train_micro_batch_size_per_gpu"] == same.micro == 2


def test_a_resumed_run_keeps_its_division_where_it_fits():
    recipe, raw = load_recipe(), read_deepspeed(CONFIGS / "zero3.json")
    _, first = resolve_deepspeed(raw, recipe, 1, free_bytes=80 * GB)
    assert (first.micro, first.reduce_once) == (16, True)
    for free, ranks, expected in ((141, 1, first.division), (40, 1, None), (80, 2, None)):
        _, fresh = resolve_deepspeed(raw, recipe, ranks, free_bytes=free * GB)
        _, resumed = resolve_deepspeed(raw, recipe, ranks, free_bytes=free * GB, began=first.division)
        assert resumed.division == (expected or fresh.division)
    asked = load_recipe(settings=["training.micro_batch_sequences=2"])
    assert resolve_deepspeed(raw, asked, 1, free_bytes=80 * GB, began=first.division)[1].micro == 2
    assert fresh.division != first.division


def test_a_small_model_is_not_given_more_than_makes_it_faster():
    recipe = load_recipe("tinyllama_120m")
    _, plan = resolve_deepspeed(read_deepspeed(CONFIGS / "zero1.json"), recipe, 1, free_bytes=141 * GB)
    assert plan.micro * plan.sequence_length <= 131_072


def test_without_a_gpu_the_rule_is_as_it_was():
    recipe = load_recipe()
    config, plan = resolve_deepspeed(read_deepspeed(CONFIGS / "zero3.json"), recipe, 8)
    assert (plan.micro, plan.reduce_once) == (8, False)
    zero = config["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"]) == (2048**2, int(0.9 * 2048**2))


def test_a_block_is_fetched_at_a_time():
    assert block_parameters(TINYLLAMA) == 44_044_288
    on_gpu = bucket_sizes(TINYLLAMA, 3, on_gpu=True)
    assert on_gpu == {
        "reduce_bucket_size": 50_000_000,
        "stage3_prefetch_bucket_size": 44_044_288,
        "stage3_param_persistence_threshold": 20_480,
    }
    assert bucket_sizes(TINYLLAMA, 2, on_gpu=True) == {"reduce_bucket_size": 50_000_000}
    tiny = replace(TINYLLAMA, vocab_size=600, hidden_size=128, intermediate_size=352, num_hidden_layers=2)
    assert reduce_bucket(tiny) == tiny.num_parameters  # no more than the model
    wide = replace(TINYLLAMA, hidden_size=4096, intermediate_size=11008)
    assert reduce_bucket(wide) == block_parameters(wide) > 50_000_000


def test_what_is_sent_when_gradients_are_reduced_once():
    """Stage 3: 4 N A + 2 N instead of 6 N A; stage 2: 4 N instead of 2 N (A + 1). 7/8 of it leave a rank of 8."""
    assert bytes_per_step(TINYLLAMA, 3, 8, 16, reduce_once=True) == (4 * 16 + 2) * N * 7 // 8
    assert bytes_per_step(TINYLLAMA, 2, 8, 16, reduce_once=True) == 4 * N * 7 // 8
    assert memory(TINYLLAMA, 3, 8, 2048, reduce_once=True).total - memory(TINYLLAMA, 3, 8, 2048).total == 4 * N


def test_the_start_says_what_it_needs_and_which_stage_would_be_faster():
    recipe, raw = load_recipe(), read_deepspeed(CONFIGS / "zero3.json")
    config, plan = resolve_deepspeed(raw, recipe, 1, 1, 79 * GB)
    memory_line, stage_line = start_lines(config, recipe, plan, 79 * GB, "NVIDIA H100 80GB HBM3")
    assert memory_line.startswith("micro 16: 69.0 of 79 GB")
    assert "59.5 KB a token and layer" in memory_line
    assert "once a step" in memory_line
    assert stage_line.startswith("ZeRO-1 fits (65.4 of 79 GB)")
    assert stage_line.endswith("--deepspeed zero1")
    assert len(start_lines(config, recipe, plan, 79 * GB, "a card nobody knows")) == 1
    assert start_lines(config, recipe, plan, None, "a processor") == ["gradients are reduced once a step"]
    one, plan = resolve_deepspeed(read_deepspeed(CONFIGS / "zero1.json"), recipe, 1, 1, 79 * GB)
    assert len(start_lines(one, recipe, plan, 79 * GB, "NVIDIA H100 80GB HBM3")) == 1
    tight, plan = resolve_deepspeed(raw, recipe, 1, 1, 20 * GB)
    assert "may not fit" in describe_memory(tight, recipe, plan, 20 * GB)


def test_advice_has_the_numbers_of_both_stages():
    arguments = {"tokens": 10**12, "sequence_length": 2048, "micro": 4, "accumulation": 32, "ranks": 8, "stage": 3}
    text = advice(estimate(TINYLLAMA, **arguments, gigabytes_per_s=5))
    assert text is not None
    assert "sends 3.9 instead of 184.8 GB a step" in text
    assert advice(estimate(TINYLLAMA, **{**arguments, "stage": 1}, gigabytes_per_s=5)) is None


def test_advice_to_a_run_that_offloads_keeps_the_offload():
    """On 24 GB stage 1 fits with it alone: the shipped zero1 would need more."""
    arguments = {"tokens": 10**9, "sequence_length": 2048, "micro": 1, "accumulation": 64, "ranks": 1, "stage": 3}
    numbers = estimate(TINYLLAMA, **arguments, offload=True, device="RTX-3090")
    assert not estimate(TINYLLAMA, **arguments, device="RTX-3090")["stages"][1]["fits"]
    assert advice(numbers).endswith('"stage": 1 in your DeepSpeed JSON, offload kept')


def test_too_little_memory_in_the_first_step_is_a_mistake_with_a_remedy():
    plan = BatchPlan(8, 4, 2, 2048)
    with (
        pytest.raises(
            ConfigError, match=r"micro 8 x 2048 tokens: Tried to allocate 2.00 GiB.*sequences=4 or .*checkpointing"
        ),
        explained(plan, checkpointing=False),
    ):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"
        )
    least = explained(replace(plan, micro=1), checkpointing=True)
    with pytest.raises(ConfigError, match="use another ZeRO stage"), least:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(ConfigError, match=r"for weights and optimizer.*zero3_offload"), explained(None):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(torch.OutOfMemoryError), explained(plan, checkpointing=False, first=False):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_run_without_memory_ends_with_one_line(stores, tmp_path):
    more = (
        "training.tokens=1536",
        "optimizer.warmup_steps=1",
        "training.micro_batch_sequences=2",
        "training.reduce_once=true",
        "training.compile=null",
    )
    done = train(stores, tmp_path / "run", *more, ranks=1, extra=("--inject", "oom@0"), check=False)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "out of memory at micro 2 x 64 tokens: injected" in line
    assert "training.micro_batch_sequences=1" in line
    assert "Traceback" not in done.stderr


def test_the_users_allocator_settings_stay():
    for given in ({}, {"PYTORCH_ALLOC_CONF": "x"}, {"PYTORCH_CUDA_ALLOC_CONF": "y"}):
        environment = dict(given)
        use_expandable_segments(environment)
        assert environment == (given or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


def test_one_buffer_a_kind_holds_every_slice_and_stays():
    sizes = {
        f"{kind}|{name}|0": size for kind in ("weight", "exp_avg", "exp_avg_sq") for name, size in (("a", 5), ("b", 7))
    }
    offsets, totals = layout(sizes)
    assert totals == {"weight": 12, "exp_avg": 12, "exp_avg_sq": 12}
    assert offsets["weight|a|0"] == offsets["exp_avg|a|0"] == 0
    assert offsets["exp_avg_sq|b|0"] == 5
    buffers = HostBuffers()
    tensors = {key: torch.randn(size) for key, size in sizes.items()}
    first = buffers.copy(tensors)
    where = {key: copy.data_ptr() for key, copy in first.items()}
    assert all(torch.equal(first[key], tensors[key]) for key in tensors)
    again = buffers.copy({key: tensor + 1 for key, tensor in tensors.items()})
    assert {key: copy.data_ptr() for key, copy in again.items()} == where
    assert all(torch.equal(again[key], tensors[key] + 1) for key in tensors)
    buffers.close()


def test_how_many_checkpoints_are_to_come():
    config = replace(load_recipe().checkpoint, every_steps=10, keep_last=3)
    assert checkpoints_to_come(config, 0, 1000, existing=0) == 4  # three, and the one that is being written
    assert checkpoints_to_come(config, 0, 15, existing=0) == 2  # at 10, and the last
    assert checkpoints_to_come(config, 500, 1000, existing=3) == 1
    assert checkpoints_to_come(replace(config, keep_every_steps=100), 0, 1000, existing=0) == 4 + 9
    assert checkpoints_to_come(config, 990, 1000, existing=3) == 1
