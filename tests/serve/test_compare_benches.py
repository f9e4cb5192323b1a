"""`tinyllama compare` on benches: what is tested, what is only listed, and the gate."""

from __future__ import annotations

import copy
import csv
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import tinyllama

from serve import compare, compare_output
from serve.bench import FORMAT
from serve.online import LATENCIES, OnlineWorkload, unmeasured
from tinyllama.cli.compare import kind
from tinyllama.errors import UserError
from tinyllama.stats.means import holm, welch


def bench(factor: float = 1.0, seed: int = 1, repeats: int = 6, online: bool = True) -> dict[str, Any]:
    """A bench.json whose times are `factor` times as long, with 2% noise of its own."""
    noise = random.Random(seed)

    def times(mean: float, count: int) -> list[float]:
        return [mean * factor * noise.gauss(1, 0.02) for _ in range(count)]

    found: dict[str, Any] = {
        "format": FORMAT,
        "model": {"name": "m", "num_parameters": 1000, "content_sha256": None},
        "versions": {"vllm": "0.32.0", "torch": "2.13"},
        "device": {"platform": "cpu", "name": "AMD EPYC", "cores": 2, "omp_threads_bind": "auto"},
        "settings": {"dtype": "bfloat16", "eager": True, "max_model_len": 256, "input_tokens": 24, "output_tokens": 16},
        "throughput": [
            {"batch_size": b, "input_tokens": 24, "output_tokens": 16, "samples_s": times(0.1, repeats)} for b in (1, 8)
        ],
        "latency": {"samples": {"e2e_s": times(0.05, 30), "ttft_s": times(0.01, 30)}},
    }
    if online:
        work = OnlineWorkload((2.0, float("inf")), (4,), 10, repeats, 24, 16)
        points = []
        for repeat in range(repeats):
            for load in work.loads:
                point = {**unmeasured(*load, repeat), "status": "done", "goodput_rps": None}
                point |= {name: {"mean": times(40, 1)[0]} for name in LATENCIES[:-1]}
                points.append({**point, "output_tokens_per_s": 1 / times(0.01, 1)[0]})
        found["online"] = {"settings": work.describe(), "points": points}
    return found


def write(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "bench.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """The first bench, one that is the same but for noise, and one that takes a tenth longer."""
    return [
        write(tmp_path / "first", bench(seed=1)),
        write(tmp_path / "again", bench(seed=2)),
        write(tmp_path / "slower", bench(1.1, seed=3)),
    ]


def test_welch_of_known_samples():
    # means 3 and 6, variances 2.5 and 10, five of each: standard error sqrt(2.5), 5.88 degrees of freedom
    found = welch([1, 2, 3, 4, 5], [2, 4, 6, 8, 10])
    assert found.difference == 3
    assert found.freedom == pytest.approx(2.5**2 / (0.5**2 / 4 + 2**2 / 4))
    t = (found.high - found.low) / 2 / 2.5**0.5
    assert 2.447 < t < 2.571  # NIST/SEMATECH e-Handbook 1.3.6.7.2: 6 and 5 degrees of freedom
    assert found.low < 0 < found.high
    assert 0.05 < found.p < 0.2
    assert welch([1, 1], [1, 1]).p == 1
    assert welch([1, 1], [2, 2]).p == 0
    with pytest.raises(ValueError, match="two of each"):
        welch([1], [1, 2])


def test_holm_of_published_values():
    # Holm (1979): sorted p times 4, 3, 2, 1, never falling
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_noise_is_called_noise_and_a_tenth_is_not(three):
    report = compare.compare([str(path) for path in three])
    again, slower = report.of(report.benches[1]), report.of(report.benches[2])
    # 2 batches, 2 latencies, and of 3 loads 4 latencies each and 2 throughputs
    assert len(again) == len(slower) == 2 + 2 + 12 + 2
    assert {c.verdict for c in again} == {"within noise"}
    assert {c.verdict for c in slower} == {"worse"}
    true = {c: -1 / 11 if c.metric == compare.OUTPUT_RATE else 0.1 for c in slower}
    assert sum(c.interval[0] < change < c.interval[1] for c, change in true.items()) >= 16  # of 18; 95% each
    assert not any("2 req/s" in c.configuration and c.metric == compare.OUTPUT_RATE for c in slower)
    assert report.differing(report.benches[1]) == []


def test_only_the_same_configuration_is_compared_and_differences_are_listed(three, tmp_path):
    other = bench(online=False)
    other["device"]["name"] = "NVIDIA H200"
    other["versions"]["vllm"] = "0.33.0"
    other["settings"]["speculative"] = "n-grams of 4"
    other["throughput"][1]["batch_size"] = 16
    other["throughput"][0]["samples_s"] = other["throughput"][0]["samples_s"][:1]
    report = compare.compare([str(three[0]), str(write(tmp_path / "other", other))])
    sheet = compare_output.tables(report)[0]
    text = " ".join(sheet.notes)
    assert "device name: AMD EPYC → NVIDIA H200" in text
    assert "version of vllm: 0.32.0 → 0.33.0" in text
    assert "speculative: none → n-grams of 4" in text
    assert "Only in other: batch 16, 24x16" in text
    assert "batch 8, 24x16" in text
    assert "4 at a time, 24x16, 10 requests" in text
    assert [row[-1] for row in sheet.rows if row[0].startswith("batch")] == ["not tested: one repeat"]


def test_goodput_is_compared_only_under_the_same_objective(tmp_path):
    first, second = bench(), bench(seed=5)
    for content, bound in ((first, 100.0), (second, 200.0)):
        content["online"]["settings"]["slo"] = {"ttft_ms": bound, "tpot_ms": None, "e2e_ms": None}
        for point in content["online"]["points"]:
            point["goodput_rps"] = 1.0 + point["repeat"]
    same = copy.deepcopy(first)
    folders = [write(tmp_path / name, content) for name, content in (("a", first), ("b", second), ("c", same))]
    report = compare.compare([str(folder) for folder in folders])
    assert not [c for c in report.of(report.benches[1]) if c.metric == compare.GOODPUT]
    assert len([c for c in report.of(report.benches[2]) if c.metric == compare.GOODPUT]) == 3


def test_every_form_says_the_same(three, tmp_path):
    names = [str(path) for path in three]
    report = compare.compare(names)
    found = json.loads(tinyllama("compare", *names, "--format", "json").stdout)
    rows = list(csv.DictReader(io.StringIO(tinyllama("compare", *names, "--format", "csv").stdout)))
    entries = [c for entry in found["benches"][1:] for c in entry["comparisons"]]
    assert len(entries) == len(rows) == len(report.comparisons)
    for entry, row, c in zip(entries, rows, report.comparisons, strict=True):
        assert entry["verdict"] == row["verdict"] == c.verdict
        assert float(row["change"]) == pytest.approx(100 * entry["change"], rel=1e-4)
    for form, text in (
        ("table", "beside first"),
        ("markdown", "| batch 8, 24x16 |"),
        ("latex", r"\begin{tabular}{llrrrrrr}"),
    ):
        assert text in tinyllama("compare", *names, "--format", form).stdout
    file = tmp_path / "out" / "table.md"
    tinyllama("compare", *names, "--format", "markdown", "--output", file)
    assert file.read_text() == compare_output.text(report, "markdown")
    assert "batch 1, 24x16" in tinyllama("compare", names[0]).stdout


def test_the_gate(three):
    first, again, slower = map(str, three)
    assert tinyllama("compare", first, again, "--fail-if-drop", 5).returncode == 0
    done = tinyllama("compare", first, slower, "--fail-if-drop", "5%", check=False)
    assert done.returncode == 1
    assert "throughput dropped: slower, batch 1, 24x16: -" in done.stderr.splitlines()[-1]
    assert "beside first" in done.stdout
    assert tinyllama("compare", first, slower, "--fail-if-drop", 15).returncode == 0


def test_repeats_that_were_taken_out_are_missed(three, tmp_path):
    edited = bench(seed=2)
    edited["settings"]["repeats"] = 6
    edited["throughput"][1]["samples_s"] = edited["throughput"][1]["samples_s"][:2]
    edited["online"]["points"] = [p for p in edited["online"]["points"] if p["kind"] == "rate" or p["repeat"] < 3]
    report = compare.compare([str(three[0]), str(write(tmp_path / "edited", edited))])
    assert report.benches[1].unfinished == {
        "4 at a time, 24x16, 10 requests": "3 of 6 repeats were not run", "batch 8, 24x16": "4 of 6 repeats were not run"
    }  # fmt: skip


def test_mistakes_are_one_line(three, tmp_path):
    first, again = str(three[0]), str(three[1])
    scores = tmp_path / "scores"
    scores.mkdir()
    (scores / "results.json").write_text("{}")
    few = write(tmp_path / "few", bench(repeats=1))
    other = write(tmp_path / "later", {"format": "tinyllama-bench-9"})
    for arguments, message in (
        ([first, scores], f"{scores} holds scores and {first} a bench: they cannot be compared"),
        ([first, "published:TinyLlama-1.1B 3T"], "they cannot be compared"),
        ([first, again, "--curve"], "--curve is about scores"),
        ([first, first], "is given twice"),
        ([first, again, "--fail-if-drop", "boolq=1"], "--fail-if-drop boolq=1; give one number of percent"),
        ([first, again, "--format", "yaml"], "--format yaml"),
        ([first, few, "--fail-if-drop", "5"], "--fail-if-drop cannot judge few"),
        ([first, "--fail-if-drop", "5"], "--fail-if-drop needs two results"),
        ([first, other], "has format 'tinyllama-bench-9'"),
        ([tmp_path / "nothing" / "bench.json", first], "does not exist"),
    ):
        done = tinyllama("compare", *arguments, check=False)
        assert done.returncode == 2, (arguments, done.stdout, done.stderr)
        assert len(done.stderr.strip().splitlines()) == 1
        assert message in done.stderr


def test_a_folder_with_both_is_what_the_others_are(three, tmp_path):
    (three[1] / "results.json").write_text("{}")
    first, both = str(three[0]), str(three[1])
    assert kind([first, both]) == "bench"
    assert kind([both, "published:TinyLlama-1.1B 3T"]) == "scores"
    assert kind([str(three[1] / "bench.json")]) == "bench"
    with pytest.raises(UserError, match=r"holds results.json and bench.json; name the file"):
        kind([both])


def test_damaged_benches(tmp_path):
    content = bench(online=False)
    del content["settings"]["input_tokens"]
    with pytest.raises(UserError, match="is incomplete"):
        compare.compare([str(write(tmp_path / "a", content))])
    edited = bench(online=False)
    edited["throughput"][0]["output_tokens_per_s"] = {"mean": 99_000.0, "low": None, "high": None}
    with pytest.raises(UserError, match=r"mean output tok/s of batch 1, 24x16 is 99000, of its samples 1\d\d"):
        compare.compare([str(write(tmp_path / "c", edited))])
    other_unit = bench()
    first = other_unit["online"]["points"][0]
    first["samples"] = {"ttft_s": [first["ttft_ms"]["mean"]]}  # in milliseconds
    with pytest.raises(UserError, match="the mean ttft at 2 req/s"):
        compare.compare([str(write(tmp_path / "d", other_unit))])
    empty = {**bench(online=False), "throughput": [], "latency": {"samples": {}}}
    with pytest.raises(UserError, match="holds no finished measurement"):
        compare.compare([str(write(tmp_path / "b", empty))])
