"""Scores that are no shares: written as they are, compared in their own unit, gated the right way up; clusters of items."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from evalsuite import (
    aggregate,
    compare,
    compare_output,
    gate,
    headline,
    runner,
    samples,
    table,
)
from evalsuite.suites import benchmark
from tinyllama import item_log, units
from tinyllama.errors import UserError

PASSAGES = 12


def lines(task: str, metric: str, values: list[Any], docs: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    docs = docs or [{}] * len(values)
    return [
        {
            "task": task,
            "doc_id": i,
            "filter": "none",
            "doc_hash": f"d{i}",
            "prompt_hash": "p",
            "doc": doc,
            metric: value,
        }
        for i, (value, doc) in enumerate(zip(values, docs, strict=True))
    ]


def write(folder: Path, tasks: dict[str, tuple[str, float, list[dict[str, Any]]]]) -> str:
    """An evaluation's folder as `tinyllama eval` leaves it. tasks: name to metric, value and log."""
    found: dict[str, Any] = {
        "format": runner.FORMAT, "model": str(folder), "tokens": None, "backend": "native", "own_suites": {}, "suites": {},
        "settings": {"limit": None, "data_dir": "bundle", "dtype": "float32"}, "versions": {"lm_eval": "0.4.13"},
        "tasks": {},
    }  # fmt: skip
    (folder / "samples").mkdir(parents=True)
    for task, (metric, value, log) in tasks.items():
        entry: dict[str, Any] = {
            "metric": metric, "metric_key": f"{metric},none", "value": value, "stderr": None, "n": len(log),
            "num_fewshot": 0, "protocol": "harness", "leaves": {}, "data_sha256": "a", "mean": "items", "metrics": {},
            "higher_is_better": not units.lower_is_better(metric),
        }  # fmt: skip
        samples.add_intervals(entry, samples.items(log, entry["metric_key"]))
        found["tasks"][task] = entry
        (folder / "samples" / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (folder / "results.json").write_text(json.dumps(found))
    return str(folder)


def bits(worse: float = 0.0, count: int = 30) -> tuple[str, float, list[dict[str, Any]]]:
    """Documents of different sizes at about 3.78 bits per byte."""
    sizes = [100 + 7 * i for i in range(count)]
    totals = [-size * (3.7 + 0.01 * (i % 17) + worse) * math.log(2) for i, size in enumerate(sizes)]
    value = -sum(totals) / sum(sizes) / math.log(2)
    return (
        "bits_per_byte",
        value,
        lines("wikitext", "bits_per_byte", [list(p) for p in zip(totals, sizes, strict=True)]),
    )


def shown(report: compare.Report) -> str:
    stream = io.StringIO()
    compare_output.print_sheets(report, Console(file=stream, width=150))
    return stream.getvalue()


def test_bits_per_byte_are_no_percent(tmp_path):
    first, second = write(tmp_path / "a", {"wikitext": bits()}), write(tmp_path / "b", {"wikitext": bits(0.3)})
    entry = json.loads((tmp_path / "a" / "results.json").read_text())
    assert entry["tasks"]["wikitext"]["unit"] == "bits per byte"
    interval = entry["tasks"]["wikitext"]["ci95"]
    assert interval["low"] < entry["tasks"]["wikitext"]["value"] < interval["high"]
    alone = table.markdown(entry)
    assert "3.776" in alone
    assert "percent" not in alone
    assert "377" not in alone
    report = compare.compare([first, second])
    found = report.comparison(report.models[1], "wikitext")
    assert found is not None
    assert found.test is not None
    assert (found.test.pairs, found.verdict) == (30, "worse")
    assert found.change == pytest.approx(0.3)
    text = shown(report)
    assert "+0.3000" in text
    assert "bits per byte" in text
    assert "lower is better: wikitext" in text
    assert "percentage points" not in text
    row = compare_output.text(report, "csv").splitlines()[2].split(",")
    assert "bits per byte" in row
    assert not any(cell.startswith("30.") for cell in row)


def test_the_gate_is_in_the_scores_own_unit(tmp_path):
    """Of bits per byte more is worse: a rise of 0.3 fails at 0.1, passes at 0.5, and a fall always passes."""
    acc = ("acc", 0.7, lines("piqa", "acc", [1.0] * 70 + [0.0] * 30))
    names = [write(tmp_path / name, {"wikitext": bits(worse), "piqa": acc}) for name, worse in (("a", 0.0), ("b", 0.3))]
    report, back = compare.compare(names), compare.compare(names[::-1])
    assert [c.task for c in gate.drops(report, ["wikitext=0.1"])] == ["wikitext"]
    assert gate.drops(report, ["wikitext=0.5"]) == []
    assert gate.drops(back, ["wikitext=0"]) == []
    assert "b wikitext +0.3000 bits per byte" in gate.line(gate.drops(report, ["wikitext=0.1"]))
    with pytest.raises(
        UserError, match="several units: wikitext in bits per byte, piqa in percent; give limits by name"
    ):
        gate.drops(report, ["1"])
    assert [c.task for c in gate.drops(report, ["1", "wikitext=0.1"])] == ["wikitext"]
    only = [write(tmp_path / f"{n}1", {"wikitext": bits(worse)}) for n, worse in (("a", 0.0), ("b", 0.3))]
    assert [c.task for c in gate.drops(compare.compare(only), ["0.1"])] == ["wikitext"]


def test_perplexities_are_compared_by_their_logarithms(tmp_path):
    values = [-3.0 - 0.01 * (i % 9) for i in range(40)]
    paths = []
    for name, shift in (("a", 0.0), ("b", -0.2)):
        log = [value + shift for value in values]
        paths.append(
            write(
                tmp_path / name,
                {"lambada": ("perplexity", math.exp(-sum(log) / 40), lines("lambada", "perplexity", log))},
            )
        )
    report = compare.compare(paths)
    found = report.comparison(report.models[1], "lambada")
    assert found is not None
    before, after = (model.scores["lambada"] for model in report.models)
    assert found.change == pytest.approx(after.value - before.value)
    assert before.interval is not None
    assert 19 < before.interval.low < before.value < before.interval.high < 23
    assert found.verdict == "worse"
    assert found.test is not None
    assert found.test.interval is not None
    assert found.test.interval.low < found.change < found.test.interval.high


@pytest.mark.parametrize(
    ("metric", "unit"),
    [
        ("acc", "share"), ("acc_norm,none", "share"), ("exact_match", "share"), ("pass@1,create_test", "share"),
        ("f1", "share"), ("em", "share"), ("prompt_level_strict_acc", "share"),
        ("bits_per_byte", "bits per byte"), ("bleu", "points"),
        ("word_perplexity", "perplexity per word"), ("mcc", ""), ("brier_score", ""), ("bert_score", ""), ("score", ""),
    ],
)  # fmt: skip
def test_the_unit_of_a_metric(metric, unit):
    assert units.unit_of(metric) == unit


def test_a_share_of_45_is_in_points():
    """SQuAD's F1 is between 0 and 100 in lm-eval."""
    assert units.unit_of("f1", 45.3) == "points"
    assert units.text(45.3, "points") == "45.300"
    # Of a weak model it is below 1, and yet not 90%.
    assert units.unit_of("f1", 0.9, task="squadv2") == "points"
    assert units.of_entry({"metric": "HasAns_f1", "value": 0.9, "task": "squadv2"}) == "points"
    assert units.unit_of("chrf++") == "points"
    assert [units.text(v, "share") for v in (0.5, 1.0)] == ["50.00", "100.00"]


def test_items_above_1_are_no_shares(tmp_path):
    """Points of items, three of 0 and one of 2: their mean of 0.5 is not 50%."""
    write(tmp_path / "a", {"mine": ("match", 0.5, lines("mine", "match", [0.0, 0.0, 0.0, 2.0]))})
    entry = json.loads((tmp_path / "a" / "results.json").read_text())["tasks"]["mine"]
    assert entry["unit"] == "points"
    assert entry["ci95"]["low"] < 0.5 < entry["ci95"]["high"]
    assert compare.compare([str(tmp_path / "a")]).models[0].scores["mine"].unit == "points"


@pytest.mark.parametrize(
    ("listed", "first"),
    [
        (["perplexity", "acc"], "perplexity"), (["acc", "acc_norm"], "acc_norm"), (["bleu", "acc"], "bleu"),
        (["word_perplexity", "byte_perplexity", "bits_per_byte"], "word_perplexity"), (["em", "f1"], "em"),
    ],
)  # fmt: skip
def test_the_headline_is_the_tasks_own_first_metric(listed, first):
    config = {"metric_list": [{"metric": name} for name in listed]}
    found = headline.in_order(config, [*sorted(listed), "alias_like"])
    assert headline.choose("", found) == first
    assert headline.choose("acc", found) == "acc"


def test_scores_of_several_units_have_no_mean(tmp_path):
    write(tmp_path / "a", {"wikitext": bits(), "piqa": ("acc", 0.5, lines("piqa", "acc", [1.0, 0.0]))})
    tasks = json.loads((tmp_path / "a" / "results.json").read_text())["tasks"]
    assert aggregate.suite_means(tasks, [("mine", ["wikitext", "piqa"])]) == {}
    both = aggregate.suite_means({**tasks, "again": tasks["piqa"]}, [("mine", ["piqa", "again"])])["mine"]
    assert (both["value"], both["unit"]) == (0.5, "share")
    assert 0 <= both["ci95"]["low"] < both["ci95"]["high"] <= 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_enters_no_mean(value):
    with pytest.raises(UserError, match="item 1 has acc"):
        samples.items(lines("t", "acc", [1.0, value]), "acc,none")


def passages(right: float, questions: int = 16) -> tuple[str, float, list[dict[str, Any]]]:
    """Questions about passages, all of a passage's right or wrong."""
    docs = [{"passage": f"text {i // questions}", "question": f"q{i}"} for i in range(PASSAGES * questions)]
    values = [float(i // questions < right * PASSAGES) for i in range(len(docs))]
    return "f1", sum(values) / len(values), lines("drop", "f1", values, docs)


def test_questions_about_a_text_are_one_observation(tmp_path):
    """Of 12 passages three changed: 48 items, and yet no difference."""
    first, second = write(tmp_path / "a", {"drop": passages(0.5)}), write(tmp_path / "b", {"drop": passages(0.75)})
    entry = json.loads((tmp_path / "a" / "results.json").read_text())["tasks"]["drop"]
    assert (entry["n"], entry["clusters"]) == (192, 12)
    assert entry["stderr"] == pytest.approx(0.5 / math.sqrt(11))  # of 12 observations
    assert entry["ci95"]["high"] - entry["ci95"]["low"] > 0.5
    report = compare.compare([first, second])
    found = report.comparison(report.models[1], "drop")
    assert found is not None
    assert found.test is not None
    assert (found.test.clusters, found.test.pairs, found.test.p) == (12, 192, 0.25)
    assert found.verdict == "within noise"
    text = shown(report)
    assert "192 in 12" in text
    assert "some items share a text" in text


def test_the_text_that_items_share():
    assert item_log.cluster_of({"passage": "a"}) == item_log.cluster_of({"context": "a", "question": "?"})
    assert item_log.cluster_of({"passage": "a"}) != item_log.cluster_of({"passage": "b"})
    assert item_log.cluster_of({"question": "a"}) is None
    assert item_log.cluster_of({"passage": "a", "story_id": 7}, "story_id") == item_log.cluster_of(
        {"story_id": 7}, "story_id"
    )
    assert item_log.cluster_of("text") is None
    rows = list(samples.rows({"t": [{"doc": {"passage": "a"}, "doc_id": 0}]}, "harness"))
    assert rows[0]["cluster"] == item_log.cluster_of({"passage": "a"})
    old = [{k: v for k, v in line.items() if k != "doc"} for line in lines("t", "acc", [1.0, 0.0])]
    assert [item.group for item in samples.items(old, "acc,none")] == [None, None]


def test_the_headline_of_drop_is_f1():
    assert benchmark("drop").metric == "f1"
