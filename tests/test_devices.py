"""The table of devices: found by what drivers call them, never by a part of it; and everybody takes it from there."""

from __future__ import annotations

import contextlib
import math

import pytest
from conftest import tinyllama

from serve.hardware import peak as serving_peak
from tinyllama import hardware
from tinyllama.errors import ConfigError
from tinyllama.model.config import ModelConfig
from tinyllama.planner.prices import load_prices
from tinyllama.report.pareto import find_price
from train import accelerators, launch
from train.estimate import USABLE, estimate
from train.nodes import Nodes

# What the driver says, and of the data sheet: dense 16-bit TFLOP/s, GB, GB/s.
SHEETS = [
    ("NVIDIA H100 80GB HBM3", "H100", 989, 80, 3350),
    ("NVIDIA H100 PCIe", "H100-PCIe", 756, 80, 2000),
    ("NVIDIA H100 NVL", "H100-NVL", 835, 94, 3900),
    ("NVIDIA GH200 480GB", "GH200", 989, 96, 4000),
    ("NVIDIA H200", "H200", 989, 141, 4800),
    ("NVIDIA H200 NVL", "H200-NVL", 835, 141, 4800),
    ("NVIDIA B200", "B200", 2250, 180, 8000),
    ("NVIDIA A100-SXM4-40GB", "A100-40G", 312, 40, 1555),
    ("A100-SXM4-40GB", "A100-40G", 312, 40, 1555),
    ("NVIDIA A100-SXM4-80GB", "A100-80G", 312, 80, 2039),
    ("NVIDIA A100-PCIE-40GB", "A100-40G", 312, 40, 1555),
    ("NVIDIA A100 80GB PCIe", "A100-80G-PCIe", 312, 80, 1935),
    ("NVIDIA A40", "A40", 149.7, 48, 696),
    ("NVIDIA A10", "A10", 125, 24, 600),
    ("NVIDIA A10G", "A10G", 70, 24, 600),
    ("NVIDIA A30", "A30", 165, 24, 933),
    ("NVIDIA L4", "L4", 121, 24, 300),
    ("NVIDIA L40", "L40", 181, 48, 864),
    ("NVIDIA L40S", "L40S", 362, 48, 864),
    ("NVIDIA GeForce RTX 3090", "RTX-3090", 71, 24, 936),
    ("NVIDIA GeForce RTX 3090 Ti", "RTX-3090-Ti", 80, 24, 1008),
    ("NVIDIA GeForce RTX 4090", "RTX-4090", 165.2, 24, 1008),
    ("NVIDIA GeForce RTX 4090 D", "RTX-4090-D", 147.1, 24, 1008),
    ("NVIDIA GeForce RTX 5090", "RTX-5090", 209.5, 32, 1792),
    ("NVIDIA RTX A4000", "RTX-A4000", 76.7, 16, 448),
    ("NVIDIA RTX A6000", "RTX-A6000", 154.8, 48, 768),
    ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-Ada", 364.2, 48, 960),
    ("Tesla V100-SXM2-16GB", "V100-16G", 125, 16, 900),
    ("Tesla V100-SXM2-32GB", "V100-32G", 125, 32, 900),
    ("Tesla T4", "T4", 65, 16, 320),
]
UNKNOWN = [
    "NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A10-24Q", "NVIDIA H100",
    "NVIDIA RTX 4000 Ada Generation", "NVIDIA T400", "AMD Instinct MI300X", "", "NVIDIA",
]  # fmt: skip


@pytest.mark.parametrize(("driver_name", "name", "tflops", "gigabytes", "gigabytes_per_s"), SHEETS)
def test_training_dry_run_serving_planner_and_report_agree(driver_name, name, tflops, gigabytes, gigabytes_per_s):
    device = hardware.find(driver_name)
    assert device is not None
    assert (device.name, device.memory_bytes, device.bytes_per_s) == (name, gigabytes * 1e9, gigabytes_per_s * 1e9)
    assert device.flops_per_s == pytest.approx(tflops * 1e12)
    assert hardware.training_peak(driver_name) == (device.flops_per_s, f"data sheet of {name}")
    served = serving_peak({"platform": "cuda", "name": driver_name}, "bfloat16")
    assert (served.flops_per_s, served.bytes_per_s) == (device.flops_per_s, device.bytes_per_s)
    prices = load_prices()
    assert prices[name].peak_flops == device.flops_per_s
    assert find_price(driver_name, prices) == prices[name]
    model, a_token = ModelConfig(), ModelConfig().flops_per_token(2048, "full")
    asked = {"tokens": 2048, "sequence_length": 2048, "micro": 1, "accumulation": 1, "ranks": 1, "stage": 1}
    found = estimate(model, **asked, device=name.lower(), mfu=1.0)
    assert found["device"] == name
    assert found["days"] * 86400 == pytest.approx(2048 * a_token / device.flops_per_s)
    assert found["stages"][1]["fits"] == (found["stages"][1]["memory_bytes"]["total"] <= USABLE * device.memory_bytes)


def test_every_driver_name_of_the_table_is_tested():
    assert {hardware.find(row[0]) for row in SHEETS} == set(hardware.DEVICES)
    assert len({name.lower() for name in hardware.NAMES}) == len(hardware.NAMES)


@pytest.mark.parametrize("driver_name", UNKNOWN)
def test_an_unknown_device_is_said_to_be_unknown(driver_name):
    assert hardware.find(driver_name) is None
    peak, source = hardware.training_peak(driver_name)
    assert math.isnan(peak)
    assert source == f"no data sheet known for {driver_name}"
    assert serving_peak({"platform": "cuda", "name": driver_name}, "bfloat16") is None
    assert find_price(driver_name, load_prices()) is None


def test_fp8_units_double_the_peak_from_ada_and_hopper_on():
    for device in hardware.DEVICES:
        assert (device.fp8_flops_per_s is not None) == (device.capability >= (8, 9))
        if device.fp8_flops_per_s:
            assert device.fp8_flops_per_s == pytest.approx(2 * device.flops_per_s, rel=0.02)


def test_a_device_is_named_in_any_case_and_a_slip_is_told():
    assert hardware.named(" a100-80g-pcie").name == "A100-80G-PCIe"
    assert hardware.named("NVIDIA H100 80GB HBM3").name == "H100"
    with pytest.raises(ConfigError, match=r"--device H1000 is not a device of the table; did you mean H100\?"):
        hardware.named("H1000")
    with pytest.raises(ConfigError, match=r"; give one of A100-40G, A100-80G, A100-80G-PCIe$"):
        hardware.named("A100")


@pytest.mark.parametrize(
    ("ranks", "gpus", "refused"), [(4, 1, True), (9, 8, True), (1, 1, False), (8, 8, False), (4, 0, False)]
)
def test_more_ranks_than_gpus_are_refused(ranks, gpus, refused):
    line = rf"{ranks} ranks on a machine with {gpus} GPUs?; give --num-accelerators {gpus}, or let"
    with pytest.raises(ConfigError, match=line) if refused else contextlib.nullcontext():
        accelerators.refuse_too_many(ranks, gpus)


@pytest.mark.parametrize("ranks", ["0", "-2"])
def test_no_ranks_at_all_are_one_line(ranks, tmp_path):
    done = tinyllama("train", "--data", tmp_path, "--num-accelerators", ranks, check=False)
    assert (done.returncode, done.stderr.strip()) == (
        2,
        f"error: --num-accelerators {ranks}; give a number from 1 to 1,000,000",
    )


@pytest.mark.parametrize(
    ("visible", "given"),
    [
        (None, [0, 1]), ("2,3", ["2", "3"]), ("5,6,7", ["5", "6"]), ("GPU-a, GPU-b", ["GPU-a", "GPU-b"]), ("0", [0, 1]),
        ("", [-1, -1]), ("-1", [-1, -1]),
    ],
)  # fmt: skip
def test_the_launcher_gives_ranks_the_visible_gpus_or_none(visible, given, monkeypatch):
    """DeepSpeed's launcher overwrites CUDA_VISIBLE_DEVICES with what the command says."""
    import base64
    import json

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    command = launch.node_command(Nodes(2, 1, "127.0.0.1", 1, 2))
    world = next(a.partition("=")[2] for a in command if a.startswith("--world_info="))
    assert json.loads(base64.urlsafe_b64decode(world)) == {"node-0": given, "node-1": given}


def test_hidden_gpus_are_not_counted(monkeypatch):
    for visible in ("", "-1", "-1,0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert accelerators.count_gpus() == 0
