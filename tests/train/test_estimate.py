"""The arithmetic of a run, against figures that TinyLlama and others have published or that follow by hand."""

from __future__ import annotations

import json

import pytest
from conftest import tinyllama

from tinyllama.model.config import ModelConfig
from train.estimate import activation_bytes, bus_bytes_per_step, bytes_per_step, estimate, memory

TINYLLAMA = ModelConfig()
N = 1_100_048_384


def test_states_of_every_stage():
    assert memory(TINYLLAMA, 0, 1, 0).total == 18 * N
    for ranks in (1, 8, 64):
        assert memory(TINYLLAMA, 1, ranks, 0).total == 6 * N + -(-12 * N // ranks)
        assert memory(TINYLLAMA, 2, ranks, 0).total == 2 * N + -(-4 * N // ranks) + -(-12 * N // ranks)
        assert memory(TINYLLAMA, 3, ranks, 0).total == pytest.approx(18 * N / ranks, abs=3)
    assert memory(TINYLLAMA, 3, 8, 0, offload=True).optimizer == 0
    assert memory(TINYLLAMA, 1, 1, 0).total == memory(TINYLLAMA, 3, 1, 0).total


def test_what_travels():
    """Stage 3 moves accumulation x 6.6 GB, stage 1 4.4 GB once (less the part that stays at home)."""
    assert bytes_per_step(TINYLLAMA, 3, 8, 16) == 16 * 6 * N * 7 // 8
    assert bytes_per_step(TINYLLAMA, 1, 8, 16) == 4 * N * 7 // 8
    assert bytes_per_step(TINYLLAMA, 2, 8, 16) == 17 * 2 * N * 7 // 8
    for stage in (1, 2, 3):
        assert bytes_per_step(TINYLLAMA, stage, 1, 4) == 0


def test_a_second_copy_inside_each_machine_saves_a_third_of_what_travels():
    """ZeRO++'s hpZ: 2 N / G bytes more, and the backward pass gathers inside the machine."""
    assert bytes_per_step(TINYLLAMA, 3, 64, 2, machine_ranks=8) == 2 * 4 * N * 63 // 64
    more = memory(TINYLLAMA, 3, 64, 0, machine_ranks=8).weights - memory(TINYLLAMA, 3, 64, 0).weights
    assert more == -(-2 * N // 8)
    assert bytes_per_step(TINYLLAMA, 1, 64, 2, machine_ranks=8) == bytes_per_step(TINYLLAMA, 1, 64, 2)


def test_an_optimizer_on_the_host_moves_gradients_down_and_weights_up():
    assert bus_bytes_per_step(TINYLLAMA, 8, offload=True) == -(-6 * N // 8)
    assert bus_bytes_per_step(TINYLLAMA, 8, offload=False) == 0


@pytest.mark.parametrize(("config", "machine", "bus"), [("zero3_hierarchical", 4, 0), ("zero3_offload", 1, 1.65)])
def test_the_dry_run_counts_what_the_config_asks_for(config, machine, bus):
    arguments = ["train", "--dry-run", "--json", "--nodes", "1", "--num-accelerators", "4", "--deepspeed", config]
    if machine > 1:
        arguments[arguments.index("--nodes") + 1] = "2"
    found = json.loads(tinyllama(*arguments).stdout)
    three, ranks = found["estimate"]["stages"]["3"], found["batch"]["ranks"]
    accumulation, once = found["batch"]["accumulation"], found["batch"]["reduce_once"]
    assert three["bytes_per_step"] == bytes_per_step(TINYLLAMA, 3, ranks, accumulation, machine, once)
    assert three["bus_bytes_per_step"] / 1e9 == pytest.approx(bus, abs=0.01)


def test_activations():
    block = 2 * (6 * 2048 + 2 * 256 + 3 * 5632) + 4 * 32
    assert activation_bytes(TINYLLAMA, 1, False) == 22 * block + 8 * 2048
    assert activation_bytes(TINYLLAMA, 1, True) == block + 22 * 2 * 2048 + 8 * 2048
    assert activation_bytes(TINYLLAMA, 1, True) < activation_bytes(TINYLLAMA, 1, False) / 7


def test_tinyllamas_ninety_days():
    """24,000 tokens/s on each of 16 A100-40G, 56% MFU, 3T tokens: 90 days (TinyLlama's README)."""
    found = estimate(
        TINYLLAMA,
        tokens=3_000_000_000_000,
        sequence_length=2048,
        micro=8,
        accumulation=8,
        ranks=16,
        stage=1,
        device="A100-40G",
        mfu=0.563,
        gigabytes_per_s=1e9,
    )
    assert found["step_tokens"] == 2_097_152
    assert found["flops_per_token"]["full"] == pytest.approx(7.314e9, rel=1e-3)
    assert found["days"] == pytest.approx(90.4, abs=0.3)
    assert found["device_hours"] == pytest.approx(3456 * 10, rel=0.02)  # 3,456 hours for 300B tokens


def test_a_faster_stage_is_named_only_where_there_is_one():
    def advice(ranks, speed, stage):
        arguments = {"tokens": 10**12, "sequence_length": 2048, "micro": 4, "accumulation": 1024 // (4 * ranks)}
        return estimate(TINYLLAMA, **arguments, ranks=ranks, stage=stage, gigabytes_per_s=speed)["advice"]

    assert advice(8, 1.5, 3) == 1  # a slow network: stage 3 gathers every micro-step
    assert advice(8, 1.5, 1) is None
    assert advice(1, 1.5, 3) == 1  # nothing to share out
    assert advice(1, 1.5, 1) is None
    assert advice(8, 1e6, 3) is None


def test_the_command_prints_it_without_a_gpu(stores, tmp_path):
    arguments = ["train", "--dry-run", "--recipe", "demo", "--data", stores, "--num-accelerators", "8"]
    arguments += ["--set", "model.vocab_size=600", "--set", "training.tokens=40960", "--set", "data.max_epochs=1000"]
    done = tinyllama(*arguments, "--output", tmp_path / "run")
    for words in ("ZeRO-1", "ZeRO-3", "epochs", "FLOPs", "micro 2 x accumulation 1 x ranks 8"):
        assert words in done.stdout, done.stdout
    assert not (tmp_path / "run").exists()
    found = json.loads(tinyllama(*arguments, "--json").stdout)
    assert found["batch"]["ranks"] == 8
    assert found["deepspeed"]["train_batch_size"] == 16
    assert set(found["epochs"]) == {"prose", "code"}
    assert found["estimate"]["stages"]["3"]["memory_bytes"]["total"] > 0


def test_a_plan_needs_no_data(tmp_path):
    done = tinyllama("train", "--dry-run", "--data", tmp_path / "none", "--num-accelerators", "64")
    assert "no token store" in done.stdout
    assert "1,100,048,384" in done.stdout


@pytest.mark.parametrize(("extra", "words"), [(["--device", "H1000"], "did you mean H100"), (["--mfu", "0"], "--mfu")])
def test_mistakes_are_one_line(tmp_path, extra, words):
    done = tinyllama("train", "--dry-run", "--data", tmp_path, *extra, check=False)
    assert done.returncode == 2
    assert words in done.stderr
