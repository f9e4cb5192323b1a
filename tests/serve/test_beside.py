"""Scores beside speed: the ratio of two rates, whose evaluation it is, which answers changed, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_llama import build

from serve import beside
from serve.bench import Workload
from serve.samples import t_quantile, throughput_summary
from serve.source import resolve
from tinyllama.errors import UserError
from tinyllama.export import content_sha256


def test_speed_up_by_hand():
    found = beside.speed_up([10.0, 12.0], [20.0, 24.0])
    assert found["mean"] == 2
    # each mean has variance 2 / 2 = 1 and 8 / 2 = 4: relative 1/121 and 4/484, equal, so Welch gives 2 degrees of freedom
    half = t_quantile(0.95, 2) * 2 * math.sqrt(2 / 121)
    assert found["high"] - 2 == pytest.approx(half) == 2 - found["low"]
    assert beside.speed_up([10.0], [15.0]) == {"mean": 1.5, "low": None, "high": None}
    assert beside.speed_up([10.0, 10.0], [10.0, 10.0]) == {"mean": 1, "low": 1, "high": 1}


def test_the_interval_holds_the_ratio_as_often_as_it_says():
    rng, held = random.Random(0), 0
    for _ in range(2000):
        before, after = ([rng.gauss(mean, 0.05 * mean) for _ in range(5)] for mean in (100, 130))
        found = beside.speed_up(before, after)
        held += found["low"] <= 1.3 <= found["high"]
    assert 0.93 < held / 2000 < 0.985


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("models") / "tiny")


def evaluation(folder: Path, model: Path, answers: list[int]) -> Path:
    """The part of an evaluation that is read here, of one task with these right (1) and wrong (0) answers."""
    task = {"metric": "acc", "metric_key": "acc,none", "value": sum(answers) / len(answers), "n": len(answers)}
    task |= {"stderr": None, "ci95": None, "data_sha256": "d", "higher_is_better": True}
    suite = {"value": task["value"], "stderr": None, "ci95": None, "benchmarks": ["easy"]}
    found = {"format": beside.RESULTS_FORMAT, "model": str(model), "content_sha256": content_sha256(model)}
    found |= {"backend": "native", "settings": {"dtype": "float32", "limit": None}}
    (folder / "samples").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({**found, "tasks": {"easy": task}, "suites": {"all": suite}}))
    item = {"task": "easy", "filter": "none", "prompt_hash": "p", "doc_id": 0}
    lines = [json.dumps({**item, "doc_hash": str(i), "acc": float(a)}) for i, a in enumerate(answers)]
    (folder / "samples" / "easy.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def bench(name: str, seconds: list[float], scores: dict[str, Any] | None) -> dict[str, Any]:
    """The part of a bench.json that is compared."""
    point = {
        "batch_size": 8,
        "input_tokens": 16,
        "output_tokens": 16,
        "samples_s": seconds,
        **throughput_summary(8, 16, 16, seconds),
    }
    settings = {"input_tokens": 16, "output_tokens": 16, "eager": True, "temperature": 1.0, "prompts_file": None}
    found = {"model": {"name": name}, "settings": {**settings, "max_model_len": 64}, "throughput": [point]}
    found |= {"device": {"name": "cpu", "cores": 2}, "versions": {"vllm": "0.32.0"}, "latency": {}}
    return {**found, "roofline": {"weight_bytes": 4_000_000}, **({"scores": scores} if scores else {})}


def test_scores_are_the_models_own(llama, tmp_path):
    source = resolve(str(llama), print)
    found = beside.scores(str(evaluation(tmp_path / "eval", llama, [1, 0, 1, 1])), source)
    assert found["content_sha256"] == content_sha256(llama)
    assert found["tasks"]["easy"]["value"] == found["suites"]["all"]["value"] == 0.75
    results = tmp_path / "eval" / "results.json"
    other = {**json.loads(results.read_text()), "content_sha256": "0" * 64}
    results.write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"is of another model: .* 000000000000; tiny is"):
        beside.scores(str(results), source)
    results.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        beside.scores(str(results), source)
    results.write_text("{}")
    with pytest.raises(UserError, match="is no evaluation"):
        beside.scores(str(results), source)
    with pytest.raises(UserError, match="does not exist"):
        beside.scores(str(tmp_path / "nothing"), source)


def test_table(llama, tmp_path):
    source = resolve(str(llama), print)
    first = beside.scores(str(evaluation(tmp_path / "a", llama, [1, 1, 0, 0, 1])), source)
    second = beside.scores(str(evaluation(tmp_path / "b", llama, [1, 0, 1, 0, 0])), source)
    found = beside.changed(first, second, "easy")
    assert found is not None
    assert (found.gained, found.lost, found.test.pairs, found.test.p) == (1, 2, 5, 1.0)
    before, after = bench("full", [1.0, 1.02, 0.98], first), bench("small", [0.5, 0.51, 0.49], second)
    after["roofline"]["weight_bytes"] = 1_000_000
    after["model"]["quantization"] = {"scheme": "int8"}
    lines = {row[0]: row[1:] for row in beside.rows(before, after)}
    assert lines["weights, MB"] == ["4.0", "1.0", "0.25x"]
    assert re.fullmatch(r"2\.00x \(1\.\d\d to 2\.\d\d\)", lines["output tok/s, batch 8, 16x16"][2])
    assert lines["all, mean %"] == ["60.0", "40.0", "-20.0"]
    assert lines["easy, acc %"] == ["60.0", "40.0", "-20.0; 1 gained, 2 lost of 5, p 1"]
    console = Console(width=140, record=True, file=open("/dev/null", "w"))
    beside.Beside(second, before, "bench/full").print(after, console)
    shown = console.export_text()
    assert "small, int8 beside full" in shown
    after["model"]["name"] = "small[/b]"  # a name, not a style
    beside.Beside(second, before, "bench/full").print(after, console)
    assert "small[/b], int8 beside full" in console.export_text()
    assert f"tinyllama compare {tmp_path / 'a'} {tmp_path / 'b'}" in shown
    (tmp_path / "b" / "samples" / "easy.jsonl").unlink()
    assert beside.changed(first, second, "easy") is None


def test_other_workloads_and_devices_are_refused(llama, tmp_path):
    before = bench("full", [1.0, 1.1], None)
    (tmp_path / "bench.json").write_text(json.dumps({**before, "format": "tinyllama-bench-1"}))
    source = resolve(str(llama), print)
    work = Workload(input_tokens=16, output_tokens=16)
    assert beside.Beside.load(None, str(tmp_path), source, work).baseline is not None
    with pytest.raises(UserError, match="was measured with input_tokens=16, this with 32"):
        beside.Beside.load(None, str(tmp_path), source, Workload(input_tokens=32, output_tokens=16))
    other = copy.deepcopy(before)
    other["device"]["name"] = "gpu"
    with pytest.raises(UserError, match="device name=cpu, this with gpu"):
        beside.check_same(before, other, "bench/full")


def test_what_lacks_a_part_is_refused_before_anything_is_measured(llama, tmp_path):
    source, work = resolve(str(llama), print), Workload(input_tokens=16, output_tokens=16)
    whole = {**bench("full", [1.0, 1.1], None), "format": "tinyllama-bench-1"}
    for key in ("settings", "device", "versions", "model", "throughput", "latency"):
        for damaged in ({k: v for k, v in whole.items() if k != key}, {**whole, key: 1}):
            (tmp_path / "bench.json").write_text(json.dumps(damaged))
            with pytest.raises(UserError, match=r"--baseline .* is incomplete"):
                beside.Beside.load(None, str(tmp_path), source, work)
    file = evaluation(tmp_path / "scores", llama, [1, 0]) / "results.json"
    found = json.loads(file.read_text())
    for key in ("content_sha256", "backend", "settings", "suites", "tasks"):
        file.write_text(json.dumps({k: v for k, v in found.items() if k != key}))
        with pytest.raises(UserError, match=r"--scores .* is incomplete"):
            beside.scores(str(file), source)
    file.write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        beside.scores(str(file), source)
