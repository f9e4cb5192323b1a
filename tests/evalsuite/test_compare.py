"""Comparing: items are paired by what was asked, numbers that do not mean the same are marked and not tested."""

from __future__ import annotations

import csv
import io
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import tinyllama

from evalsuite import compare, compare_output, gate, runner, samples, scores, suites
from tinyllama.errors import UserError

THREE_T = "published:TinyLlama-1.1B 3T"
LEARNED = [1.0] * 70 + [0.0] * 30


def log_of(values: list[float], metric: str, leaf: str, asked: str) -> list[dict[str, Any]]:
    """Samples as lm-eval logs them; `asked` is in the hashes of items and prompts."""
    return [
        {"task": leaf, "doc_id": i, "filter": "none", "doc_hash": f"{asked}{i}", "prompt_hash": f"p{i}", metric: value}
        for i, value in enumerate(values)
    ]


def write(folder: Path, tasks: dict[str, list[float]], **changes: Any) -> Path:
    """An evaluation's folder as `tinyllama eval` would leave it. changes: of the results, or of every task's entry."""
    asked, limit = changes.pop("asked", "d"), changes.pop("limit", None)
    data_dir, dtype = changes.pop("data_dir", "bundle"), changes.pop("dtype", "float32")
    found: dict[str, Any] = {
        "format": runner.FORMAT,
        "model": changes.pop("model", str(folder)),
        "tokens": changes.pop("tokens", None),
        "settings": {"limit": limit, "data_dir": data_dir, "dtype": dtype},
        "versions": {"lm_eval": "0.4.13"},
        "tasks": {},
        "suites": {},
    }
    for task, values in tasks.items():
        metric = suites.BENCHMARKS[task].metric if task in suites.BENCHMARKS else "acc"
        entry: dict[str, Any] = {
            "metric": metric, "metric_key": f"{metric},none", "value": sum(values) / len(values), "n": len(values),
            "num_fewshot": 0, "protocol": "harness", "leaves": {}, "data_sha256": "a", **changes,
        }  # fmt: skip
        log = log_of(values, metric, task, asked)
        mean = samples.mean(samples.items(log, f"{metric},none"), "items")
        entry["stderr"] = mean.stderr if mean else None
        samples.add_intervals(entry, samples.items(log, f"{metric},none"))
        samples_path = samples.path_of(folder, task)
        samples_path.parent.mkdir(parents=True, exist_ok=True)
        samples_path.write_text("".join(json.dumps(line) + "\n" for line in log))
        found["tasks"][task] = entry
    found["suites"] = runner.suite_means(found["tasks"])
    (folder / "results.json").write_text(json.dumps(found))
    return folder


def only(report: compare.Report, task: str = "piqa") -> compare.Comparison:
    found = report.comparison(report.models[1], task)
    assert found is not None
    return found


def shown(*folders: Path | str, width: int = 80) -> str:
    from rich.console import Console

    stream = io.StringIO()
    compare_output.print_sheets(compare.compare([str(f) for f in folders]), Console(file=stream, width=width))
    return stream.getvalue()


def test_items_are_paired_by_what_was_asked(tmp_path):
    """Other positions, another order, fewer items: the test is McNemar's over the common ones."""
    before = write(tmp_path / "a", {"piqa": LEARNED})
    after = write(tmp_path / "b", {"piqa": [0.0] * 40 + [1.0] * 40}, limit=80)
    path = samples.path_of(after, "piqa")
    lines = path.read_text().splitlines()
    random.Random(0).shuffle(lines)
    path.write_text("".join(json.dumps({**json.loads(line), "doc_id": i}) + "\n" for i, line in enumerate(lines)))
    found = only(compare.compare([str(before), str(after)]))
    assert found.test is not None
    assert (found.test.pairs, found.test.method) == (80, "McNemar, exact")
    # Of 80 common items 40 were lost (the first 40) and 10 gained (70 to 79).
    assert found.change == pytest.approx(-30 / 80)
    assert found.test.p == pytest.approx(2 * sum(math.comb(50, k) for k in range(11)) / 2**50)
    assert found.difference == pytest.approx(0.5 - 0.7)
    assert found.verdict == "worse"
    assert "at most 80 items of each task" in shown(before, after)
    assert "80 of 100" in shown(before, after)
    assert "80 of 100" in shown(after, before)


def test_doc_id_alone_pairs_nothing(tmp_path):
    before, after = write(tmp_path / "a", {"piqa": LEARNED}), write(tmp_path / "b", {"piqa": LEARNED}, asked="other")
    found = only(compare.compare([str(before), str(after)]))
    assert (found.test, found.verdict) == (None, "not tested: no item in common")


def test_equal_items_within_a_data_set_stay_apart():
    line = {"task": "t", "doc_id": 0, "filter": "none", "doc_hash": "d", "prompt_hash": "p", "acc": 1.0}
    found = samples.items([line, {**line, "doc_id": 1, "acc": 0.0}, {**line, "filter": "strict"}], "acc,none")
    assert [(item.key.repeat, item.value) for item in found] == [(0, 1.0), (1, 0.0)]


def test_shares_are_compared_by_signs_and_small_changes_are_noise(tmp_path):
    generator = random.Random(0)
    first = [generator.random() for _ in range(60)]
    before = write(tmp_path / "a", {"drop": first, "piqa": LEARNED})
    after = write(tmp_path / "b", {"drop": [min(1.0, v + 0.1) for v in first], "piqa": [*LEARNED[:-1], 1.0]})
    report = compare.compare([str(before), str(after)])
    drop, piqa = only(report, "drop"), only(report)
    assert drop.test is not None
    assert drop.test.method == "sign flip, 20,000 draws"
    assert drop.verdict == "better"
    assert piqa.test is not None
    assert (piqa.test.method, piqa.verdict) == ("McNemar, exact", "within noise")
    assert "+1.00~" in shown(before, after)
    # Two tests: the smaller p is doubled.
    assert drop.p_holm == pytest.approx(2 * drop.test.p)
    assert piqa.p_holm == piqa.test.p == 1.0


def test_without_logs_two_means_are_compared_and_marked(tmp_path):
    before, after = write(tmp_path / "a", {"piqa": LEARNED}), write(tmp_path / "b", {"piqa": LEARNED[20:]})
    samples.path_of(after, "piqa").unlink()
    found = only(compare.compare([str(before), str(after)]))
    assert found.test is not None
    assert (found.test.method, found.test.pairs) == ("unpaired t", None)
    assert "no pairs: two separate means" in shown(before, after)
    other = write(tmp_path / "c", {"piqa": LEARNED}, data_sha256="b")
    samples.path_of(other, "piqa").unlink()
    assert only(compare.compare([str(before), str(other)])).verdict == "not tested: other data"


def test_a_log_of_another_evaluation_is_not_used(tmp_path):
    """A score that is no mean of its log's items cannot be tested by them."""
    before, after = write(tmp_path / "a", {"piqa": LEARNED}), write(tmp_path / "b", {"piqa": LEARNED})
    samples.path_of(after, "piqa").write_text(samples.path_of(after, "piqa").read_text().replace(": 1.0", ": 0.0"))
    test = only(compare.compare([str(before), str(after)])).test
    assert test is not None
    assert test.method == "unpaired t"


def test_a_mean_of_leaf_tasks_is_tested_leaf_by_leaf(tmp_path):
    folders = []
    for name, values in (("a", [1.0, 0.0, 1.0, 0.0]), ("b", [1.0, 1.0, 1.0, 1.0])):
        folder = write(tmp_path / name, {"piqa": values * 10})
        log = log_of(values * 10, "acc_norm", "one", "d") + log_of(values[:3], "acc_norm", "two", "d")
        samples.path_of(folder, "piqa").write_text("".join(json.dumps(line) + "\n" for line in log))
        results = json.loads((folder / "results.json").read_text())
        results["tasks"]["piqa"]["value"] = (sum(values) / 4 + sum(values[:3]) / 3) / 2
        (folder / "results.json").write_text(json.dumps(results))
        folders.append(str(folder))
    found = only(compare.compare(folders))
    assert found.test is not None
    assert (found.test.method, found.test.pairs) == ("sign flip, 20,000 draws", 43)
    assert found.change == pytest.approx((1 / 2 + 1 / 3) / 2)


@pytest.mark.parametrize(
    ("changes", "verdict", "mark"),
    [
        ({"num_fewshot": 5}, "not tested: other shots", "5 shots"),
        ({"metric": "acc"}, "not tested: other metric", "metric acc"),
        ({"protocol": "paper"}, "not tested: other protocol", "protocol paper"),
        ({"data_sha256": "b"}, "within noise", "other data"),
        ({"data_dir": "mini"}, "within noise", "data mini"),
        ({"limit": 7}, "within noise", "at most 7 items"),
        ({"dtype": "bfloat16"}, "within noise", "computed in bfloat16"),
    ],
)
def test_what_is_not_the_same_is_marked_at_the_number(tmp_path, changes, verdict, mark):
    before, after = write(tmp_path / "a", {"piqa": LEARNED}), write(tmp_path / "b", {"piqa": LEARNED}, **changes)
    assert only(compare.compare([str(before), str(after)])).verdict == verdict
    text = shown(before, after)
    assert mark in next(line for line in text.splitlines() if line.strip().startswith("¹"))
    assert "70.00¹" in text
    assert "¹" not in shown(before, write(tmp_path / "same", {"piqa": LEARNED}))


def test_published_rows(tmp_path):
    """Compared with one another without pairs, with a real evaluation too, but not across protocols or with mini."""
    report = compare.compare([THREE_T, "published:Pythia-1.0B"])
    hellaswag = only(report, "hellaswag")
    assert hellaswag.test is not None
    assert hellaswag.test.method == "unpaired t"
    # sqrt of .592 .408 / 10042 + .4716 .5284 / 10042
    assert hellaswag.test.stderr == pytest.approx(0.0069905, abs=1e-6)
    assert hellaswag.verdict == "worse"
    assert only(report, "mmlu").verdict == "within noise"
    assert only(report, "commonsense").change == pytest.approx(
        -0.0468, abs=1e-4
    )  # of the cells, not of the printed averages
    ours = write(tmp_path / "real", {"piqa": LEARNED, "drop": LEARNED})
    report = compare.compare([str(ours), THREE_T])
    assert only(report).test is not None
    assert only(report, "drop").verdict == "not tested: other protocol"
    mini = write(tmp_path / "mini", {"piqa": LEARNED}, data_dir="mini")
    assert only(compare.compare([THREE_T, str(mini)])).verdict == "not tested: other data"
    text = shown(ours, THREE_T)
    assert "15.34†" in text
    assert "73.29¹" in text
    assert "¹ protocol lm-eval (old main, hf-causal, fp32), 0-shot" in text
    assert "protocol harness (lm-eval 0.4.13), data bundle" in text


def test_a_suites_mean_is_tested_over_its_tasks(tmp_path):
    tasks = [b.name for b in suites.COMMONSENSE]
    before = write(tmp_path / "a", dict.fromkeys(tasks, LEARNED))
    after = write(tmp_path / "b", dict.fromkeys(tasks, [1.0] * 75 + [0.0] * 25))
    report = compare.compare([str(before), str(after)])
    suite = only(report, "commonsense")
    assert suite.test is not None
    assert (suite.test.method, suite.test.pairs) == ("sign flip, 20,000 draws", 700)
    assert suite.change == pytest.approx(0.05)
    assert suite.verdict == "better"
    assert {only(report, task).verdict for task in tasks} == {"within noise"}


def test_checkpoints_in_order_of_tokens(tmp_path):
    folders = [
        write(tmp_path / f"step-{tokens}", {"piqa": [1.0] * right + [0.0] * (100 - right)}, tokens=tokens * 10**9)
        for tokens, right in ((20, 60), (5, 50), (10, 58))
    ]
    done = tinyllama("compare", *folders, "--curve", "--format", "markdown")
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith(("| step", "| over"))]
    assert [row[1].strip() for row in rows[:4]] == ["5B", "10B", "20B", ""]
    assert rows[3][2].strip(" |") == "▁▇█"
    # "step-20 +10" is against the first by tokens
    assert "+10.00*" in rows[2][2]
    with pytest.raises(UserError, match="how many tokens"):
        compare.compare([str(folders[0]), str(write(tmp_path / "x", {"piqa": LEARNED}))], by_tokens=True)


def test_every_format_says_the_same(tmp_path):
    names = [str(write(tmp_path / n, {"piqa": v})) for n, v in (("a_1", LEARNED), ("b", [1.0] * 90 + [0.0] * 10))]
    names.append(THREE_T)
    report = compare.compare(names)
    rows = list(csv.DictReader(io.StringIO(compare_output.text(report, "csv"))))
    row = next(r for r in rows if r["model"] == "b" and r["score"] == "piqa")
    assert (row["value"], row["difference"], row["pairs"], row["verdict"]) == ("90.0", "20.0", "100", "better")
    found = json.loads(compare_output.text(report, "json"))
    entry = found["models"][1]["scores"]["piqa"]
    assert entry["value"] == 0.9
    assert entry["difference"]["test"]["method"] == "McNemar, exact"
    assert float(row["p_holm"]) == entry["difference"]["p_holm"]
    assert entry["interval"]["low"] == pytest.approx(float(row["low"]) / 100)
    markdown, latex = (compare_output.text(report, form) for form in ("markdown", "latex"))
    assert "| 90.00 82.6–94.5 +20.00* |" in markdown
    assert "within noise: p of 0.05 or more" in markdown
    for table in markdown.split("## ")[1:]:
        assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1
    assert r"a\_1" in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 3
    assert "†" not in latex
    assert "¹" not in latex


def test_tables_fit_eighty_columns(tmp_path):
    tasks = {b.name: LEARNED for b in suites.COMMONSENSE}
    folders = [write(tmp_path / name, tasks) for name in ("baseline", "candidate")]
    text = shown(*folders, THREE_T, "published:OPT-1.3B")
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "73.29¹" in text
    assert "within noise" in text
    assert "60.4–78.1" in shown(*folders, width=140)


def test_the_gate(tmp_path):
    """Worse by more than the limit and significantly: exit 1 and one line. Else 0."""
    before = write(tmp_path / "a", {"piqa": LEARNED, "boolq": LEARNED})
    fell = write(tmp_path / "fell", {"piqa": [1.0] * 40 + [0.0] * 60, "boolq": [1.0] * 68 + [0.0] * 32})
    done = tinyllama("compare", before, fell, "--fail-if-drop", 1, check=False)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1
    assert "fell piqa -30.00 points" in lines[0]
    assert "boolq" not in lines[0]
    report = compare.compare([str(before), str(fell)])
    assert [c.task for c in gate.drops(report, ["29.9"])] == ["piqa"]
    assert gate.drops(report, ["30.1"]) == []
    assert gate.drops(report, ["1", "piqa=31"]) == []
    assert [c.task for c in gate.drops(report, ["piqa=0"])] == ["piqa"]
    rose = compare.compare([str(fell), str(before)])
    assert gate.drops(rose, ["0"]) == []
    for folder in (before, fell):
        results = json.loads((folder / "results.json").read_text())
        for entry in results["tasks"].values():
            entry["higher_is_better"] = False
        (folder / "results.json").write_text(json.dumps(results))
    assert [c.task for c in gate.drops(compare.compare([str(fell), str(before)]), ["1"])] == ["piqa"]


def test_a_gate_that_looked_at_nothing_does_not_pass(tmp_path):
    before = write(tmp_path / "a", {"piqa": LEARNED, "boolq": LEARNED})
    less = compare.compare([str(before), str(write(tmp_path / "b", {"piqa": LEARNED}))])
    with pytest.raises(UserError, match="cannot judge boolq of b: it has no such score"):
        gate.drops(less, ["1"])
    assert gate.drops(less, ["piqa=1"]) == []
    other = compare.compare([str(before), str(write(tmp_path / "c", {"piqa": LEARNED}, asked="x"))])
    with pytest.raises(UserError, match="cannot judge piqa of c: no item in common"):
        gate.drops(other, ["piqa=1"])
    with pytest.raises(UserError, match="needs two results"):
        gate.drops(compare.compare([str(before)]), ["1"])


@pytest.mark.parametrize("limit", ["a lot", "-1", "piqa=", "nan", "inf", "=1"])
def test_a_bad_limit_is_named(tmp_path, limit):
    report = compare.compare([str(write(tmp_path / n, {"piqa": LEARNED})) for n in "ab"])
    with pytest.raises(UserError, match=f"--fail-if-drop {limit}"):
        gate.drops(report, [limit])
    with pytest.raises(UserError, match="did you mean piqa"):
        gate.drops(report, ["pica=1"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("{", "cannot be read"),
        ("[]", "not a results file"),
        ('{"format": "tinyllama-results-1", "tasks": {}}', "not a whole results file"),
    ],
)
def test_a_bad_results_file_is_one_line(tmp_path, content, words):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=words.replace("(", r"\(").replace(")", r"\)")):
        compare.compare([str(tmp_path)])


@pytest.mark.parametrize(
    "changes",
    [{"effective_n": None}, {"effective_n": "x", "dof": 3, "units": 4}, {"effective_n": 4, "dof": "x", "units": 4},
     {"n": "x"}, {"leaves": {"a": {"value": 0.5, "stderr": None, "n": 0}}}],
)  # fmt: skip
def test_a_damaged_score_is_one_line(tmp_path, changes):
    results = json.loads((write(tmp_path / "a", {"piqa": [1, 0, 1]}) / "results.json").read_text())
    results["tasks"]["piqa"] |= changes
    (tmp_path / "a" / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="is not a whole results file"):
        compare.compare([str(tmp_path / "a")])


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"[1]\n", b"5\n", b'{"doc_id": "x"}\n', b"[" * 99999],
                         ids=["bytes", "list", "number", "fields", "depth"])  # fmt: skip
def test_a_damaged_log_is_one_line(tmp_path, damage):
    for name in ("a", "b"):
        write(tmp_path / name, {"piqa": [1, 0, 1]})
    path = samples.path_of(tmp_path / "b", "piqa")
    path.write_bytes(damage + path.read_bytes())
    with pytest.raises(UserError, match=r"piqa\.jsonl:1 is no sample of an evaluation"):
        compare.compare([str(tmp_path / "a"), str(tmp_path / "b")])


def test_mistakes_exit_with_two(tmp_path):
    folder = write(tmp_path / "a", {"piqa": LEARNED})
    with pytest.raises(UserError, match="given twice"):
        compare.compare([str(folder), str(folder)])
    path = samples.path_of(folder, "piqa")
    path.write_text(path.read_text() + "{}\n")
    other = write(tmp_path / "b", {"piqa": LEARNED})
    with pytest.raises(UserError, match=r"piqa.jsonl:101 is no sample"):
        compare.compare([str(folder), str(other)])
    for arguments, words in (
        (["published:TinyLlama 3T"], "did you mean TinyLlama-1.1B 3T?"),
        ([folder, "--format", "markdwon"], "did you mean markdown?"),
        ([folder, "--output", "/proc/no/table.md"], "writing /proc/no"),
    ):
        done = tinyllama("compare", *arguments, check=False)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_one_result_alone_and_a_file(tmp_path):
    folder = write(tmp_path / "only", {"piqa": LEARNED, "my_task": LEARNED})
    tinyllama("compare", folder, "--output", tmp_path / "out.txt")
    text = (tmp_path / "out.txt").read_text()
    assert "Other tasks" in text
    assert "60.4–78.1" in text
    assert "Differences" not in text


def test_models_of_one_name_are_told_apart(tmp_path):
    folders = [write(tmp_path / n, {"piqa": LEARNED}, model="exports/1b") for n in ("first", "second")]
    assert [m.name for m in compare.compare([str(f) for f in folders]).models] == ["1b (first)", "1b (second)"]
    assert scores.family("harness (lm-eval 0.4.13)") == scores.family("lm-eval (old main)") == "harness"
    assert scores.family("instruct-eval: MMLU") == scores.family("paper (x)") == "paper"
