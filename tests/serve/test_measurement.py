"""One real measurement in vLLM: what bench.json says must follow from its own raw samples."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from conftest import tinyllama
from rich.console import Console
from tiny_llama import build

from serve.table import load_bench, print_throughput
from tinyllama.errors import UserError


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def measured(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """Output directory, what --json printed, and what went to standard error, of one `tinyllama serve`."""
    output = tmp_path_factory.mktemp("bench") / "tiny"
    arguments = ["--batch-sizes", "1,4", "--lengths", "24x16,40x8", "--samples", 2, "--repeats", 3]
    more = ["--latency-requests", 5, "--eager", "--seed", 7, "--json", "--measure", "offline"]
    done = tinyllama("serve", llama, "--output", output, *arguments, *more, timeout=300)
    return output, json.loads(done.stdout), done.stderr


def test_json_on_standard_output_is_the_file(measured):
    output, printed, _ = measured
    assert load_bench(output / "bench.json") == printed
    assert load_bench(output) == printed
    assert printed["format"] == "tinyllama-bench-1"
    assert sorted(path.name for path in output.iterdir()) == ["bench.json", "table.md", "vllm.log"]


def test_only_progress_reaches_the_terminal(measured):
    output, _, errors = measured
    assert "INFO" not in errors
    assert "WARNING" not in errors
    assert "EngineCore" in (output / "vllm.log").read_text()


def test_settings_and_provenance(measured, llama):
    _, bench, _ = measured
    assert bench["model"]["path"] == str(llama)
    assert bench["model"]["config"]["hidden_size"] == 128
    assert bench["model"]["content_sha256"] is None  # no export of ours
    settings = bench["settings"]
    assert settings["batch_sizes"] == [1, 4]
    wanted = {"input_tokens": 24, "output_tokens": 16, "repeats": 3, "seed": 7, "eager": True, "prefix_caching": False}
    assert {key: settings[key] for key in wanted} == wanted
    assert settings["dtype"] == "bfloat16"
    assert settings["max_model_len"] == 256
    assert bench["versions"]["torch"] == version("torch")
    assert bench["versions"]["vllm"].startswith("0.")
    assert bench["device"]["cores"] >= 1
    assert bench["device"]["name"]
    assert bench["load_s"] > 0


def test_kv_cache_is_sized_from_the_model_and_the_workload(measured):
    _, bench, _ = measured
    kv = bench["roofline"]["kv_bytes_per_token"]
    assert kv == 2 * 2 * 64 * 2  # layers, K and V, head_dim, bytes
    if bench["device"]["platform"] == "cpu":
        assert (
            bench["settings"]["kv_cache_bytes"] == (8 + 1) * 128 * kv
        )  # 4 x 2 sequences of one block, and the empty one


def test_rates_follow_from_the_raw_samples(measured):
    _, bench, _ = measured
    points = bench["throughput"]
    assert [(p["batch_size"], p["input_tokens"], p["output_tokens"]) for p in points] == [
        (1, 24, 16), (4, 24, 16), (1, 40, 8), (4, 40, 8)
    ]  # fmt: skip
    for point in points:
        size, times, prompt, output = (point[k] for k in ("batch_size", "samples_s", "input_tokens", "output_tokens"))
        assert point["samples_per_prompt"] == 2
        assert len(times) == 3
        assert len(point["warmup_s"]) == 2
        assert all(time > 0 for time in times)
        mean = sum(2 * size * output / time for time in times) / 3
        assert point["output_tokens_per_s"]["mean"] == pytest.approx(mean)
        assert point["total_tokens_per_s"]["mean"] == pytest.approx(mean * (prompt + 2 * output) / (2 * output))
        assert point["requests_per_s"]["mean"] == pytest.approx(mean / (2 * output))
        assert point["output_tokens_per_s"]["low"] < mean < point["output_tokens_per_s"]["high"]
        kv = bench["roofline"]["kv_bytes_per_token"]
        read = bench["roofline"]["weight_bytes"] + 2 * size * (prompt + output // 2) * kv
        assert point["bytes_per_step"] == read
        assert point["bytes_per_s"] == pytest.approx(read * mean / (2 * size))


def test_shares_of_what_the_device_can_do(measured):
    output, bench, _ = measured
    peak = bench["roofline"]["peak"]
    assert peak["bytes_per_s"] > 1e8
    assert peak["flops_per_s"] > 1e8
    for point in bench["throughput"]:
        assert point["bandwidth_frac"] == pytest.approx(point["bytes_per_s"] / peak["bytes_per_s"])
        assert point["flops_frac"] == pytest.approx(point["flops_per_s"] / peak["flops_per_s"])
        assert 0 < point["flops_frac"] < 1
    if bench["device"]["platform"] == "cpu":
        assert peak["source"].startswith("measured here")
        text = (output / "table.md").read_text()
        assert " GB/s" in text
        assert f"({peak['source']})" in text


def test_latencies_follow_from_the_raw_samples(measured):
    _, bench, _ = measured
    latency = bench["latency"]
    raw = latency["samples"]
    assert {name: len(values) for name, values in raw.items()} == {"e2e_s": 5, "ttft_s": 5, "tpot_s": 5}
    for e2e, ttft, tpot in zip(raw["e2e_s"], raw["ttft_s"], raw["tpot_s"], strict=True):
        assert 0 < ttft < e2e
        assert tpot == pytest.approx((e2e - ttft) / 15)
    assert latency["e2e_ms"]["p50"] == pytest.approx(1e3 * sorted(raw["e2e_s"])[2])
    assert latency["ttft_ms"]["p50"] <= latency["ttft_ms"]["p90"] <= latency["ttft_ms"]["p99"]


def test_tables(measured):
    output, bench, _ = measured
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    print_throughput(bench, console)
    shown, written = console.export_text(), (output / "table.md").read_text()
    for text in ("output tok/s", "40x8", "FLOP/s", "time to first token", "p99", "warm-up", "tiny-llama"):
        assert text in shown
        assert text in written


def test_damaged_results_are_refused(measured, tmp_path):
    _, bench, _ = measured
    file = tmp_path / "bench.json"
    with pytest.raises(UserError, match="does not exist"):
        load_bench(file)
    file.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_bench(file)
    file.write_text(json.dumps({**bench, "format": "other"}))
    with pytest.raises(UserError, match="has format 'other'"):
        load_bench(file)


def test_a_model_that_vllm_cannot_load_is_one_line_with_its_reason(llama, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(llama, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "rope_parameters": {"rope_type": "none"}}))
    done = tinyllama("serve", broken, "--output", tmp_path / "out", "--eager", check=False, timeout=300)
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert "vLLM cannot load" in line
    assert "ValueError: Unknown RoPE scaling type none" in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "bench.json").exists()
