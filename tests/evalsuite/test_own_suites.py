"""Suites and tasks of the user's own, from YAML: what they may say, what they mean, and every mistake in one line."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import random_llama
from conftest import ROOT, tinyllama
from rich.console import Console

from evalsuite import compare, compare_output, definitions, own_suites, suites, table
from tinyllama.errors import UserError

# The example of docs/evaluation.md is what is tested here.
EXAMPLE = dict(
    re.findall(r"`(\S+\.\w+)`[^\n`]*:?\n+```\w+\n(.*?)```", (ROOT / "docs/evaluation.md").read_text(), re.DOTALL)
)
SUITE, TASK = EXAMPLE["mine.yaml"], EXAMPLE["riddles.yaml"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    assert set(EXAMPLE) == {"mine.yaml", "riddles.yaml", "riddles.jsonl"}
    for name, text in EXAMPLE.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def measured(folder, tmp_path_factory) -> tuple[Path, dict[str, Any], str]:
    model = random_llama.build(tmp_path_factory.mktemp("random"))
    output = tmp_path_factory.mktemp("results")
    arguments = ["--model", model, "--data-dir", "mini", "--limit", 2, "--output", output]
    done = tinyllama("eval", *arguments, "--tasks", folder / "mine.yaml", timeout=300)
    return output, json.loads((output / "results.json").read_text()), done.stdout


def test_a_suite_is_evaluated_as_it_says(measured, folder):
    output, results, shown = measured
    tasks = results["tasks"]
    assert {n: (e["metric"], e["num_fewshot"], e["protocol"], e["n"]) for n, e in tasks.items()} == {
        "piqa": ("acc_norm", 0, "harness", 2),
        "arc_easy_2shot_acc": ("acc", 2, "harness", 2),
        "mmlu_0shot_by_leaves": ("acc", 0, "harness", 114),
        "riddles": ("acc_norm", 1, "harness", 2),
        "tl_drop_prefix": ("prefix_match", 3, "paper", 2),
    }
    leaves = [leaf["value"] for leaf in tasks["mmlu_0shot_by_leaves"]["leaves"].values()]
    assert len(leaves) == 57
    assert tasks["mmlu_0shot_by_leaves"]["value"] == pytest.approx(sum(leaves) / 57)
    mean = results["suites"]["mine"]
    assert mean["value"] == pytest.approx(sum(entry["value"] for entry in tasks.values()) / 5)
    assert (mean["protocol"], mean["benchmarks"]) == ("harness+paper", list(tasks))
    assert results["own_suites"]["mine"]["description"] == "small, and changes with the data"
    (line,) = [row for row in shown.splitlines() if "unweighted mean of the tasks" in row]
    assert f"{100 * mean['value']:.2f}" in line
    prompts = [json.loads(row)["arguments"][0][0] for row in (output / "samples" / "riddles.jsonl").open()]
    assert all(prompt.count("Riddle: ") == 2 for prompt in prompts)
    table = (output / "table.md").read_text()
    assert "| Riddles | harness | acc_norm |" in table
    assert "(native backend, float32)" in table


def test_suites_are_compared(measured, tmp_path):
    output, results, _ = measured
    other = {**results, "model": "other"}
    (tmp_path / "results.json").write_text(json.dumps(other))
    report = compare.compare([str(output), str(tmp_path)])
    assert report.suites["mine"] == list(results["tasks"])
    found = report.comparison(report.models[1], "mine")
    assert found is not None
    assert found.difference == 0


def test_brackets_in_names_are_shown_as_they_are(measured, tmp_path):
    """Rich takes them for markup: [/] is an error, [bold] is swallowed."""
    results = json.loads(json.dumps(measured[1]))
    results["model"] = "models/m[bold]"
    results["own_suites"]["mine"]["title"] = "[/] [bold]mine"
    results["own_suites"]["mine"] |= {"benchmarks": ["riddles"], "titles": ["[/]"]}
    results["suites"] = {}  # piqa is now in a table of ours, with the model's name
    console = Console(file=io.StringIO(), width=120)
    table.print_comparison(results, console)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({**results, "model": f"{name}[bold]"}))
    compare_output.print_sheets(compare.compare([str(tmp_path / "a"), str(tmp_path / "b")]), console)
    shown = console.file.getvalue()
    assert "[/] [bold]mine" in shown
    assert "m[bold]" in shown
    assert "b[bold]" in shown


def test_what_a_suite_asks_is_what_decides_a_result(folder, tmp_path):
    """A task's file and data are part of it; the benchmarks that a suite takes as they are, are ours."""
    suite = own_suites.load(folder / "mine.yaml")
    assert suite.members[0] == suites.BENCHMARKS["piqa"]

    def hashes() -> tuple[str, str | None]:
        found = definitions.prepare(suite.members[3], None, tmp_path)
        return found.definition_sha256, found.data_sha256

    before = hashes()
    (folder / "riddles.yaml").write_text(TASK.replace("Riddle:", "A riddle:"))
    assert hashes()[0] != before[0]
    assert hashes()[1] == before[1]
    (folder / "riddles.yaml").write_text(TASK)
    rows = (folder / "riddles.jsonl").read_text()
    (folder / "riddles.jsonl").write_text(rows + rows)
    assert hashes()[0] == before[0]
    assert hashes()[1] != before[1]
    (folder / "riddles.jsonl").write_text(rows)
    chosen, own = suites.choose(f"commonsense,{folder / 'mine.yaml'}")
    assert len(chosen) == 7 + 4
    assert [found.name for found in own] == ["mine"]


def test_groups_have_the_leaves_that_they_must(tmp_path, folder):
    """By lm-eval's index: a group, its nested groups and a tag, with the rows of a bundle or without."""
    group = suites.benchmark("blimp")
    prepared = definitions.prepare(group, None, tmp_path)
    assert len(prepared.leaves) == 67
    assert (prepared.benchmark.mean, prepared.benchmark.metric) == ("leaves", "acc")  # its weight_by_size is false
    by_items = dataclasses.replace(group, mean="items")
    assert definitions.prepare(by_items, None, tmp_path).benchmark.mean == "items"
    with pytest.raises(
        UserError, match=r"the tasks of glue have no metric in common \(cola mcc; mnli acc; mrpc acc, f1\)"
    ):
        definitions.prepare(suites.benchmark("glue"), None, tmp_path)
    with pytest.raises(UserError, match="runs programs that the model wrote"):
        definitions.prepare(suites.benchmark("longproc_pseudo_to_code_0.5k"), None, tmp_path)
    tag = suites.Benchmark("ai2_arc", "ai2_arc", "", None, leaves=None)
    assert definitions.prepare(tag, None, tmp_path).leaves == ["arc_challenge", "arc_easy"]
    nested = suites.Benchmark("mmlu_again", "mmlu", "acc", 1, leaves=57, task="mmlu", variant=True)
    assert len(definitions.prepare(nested, None, tmp_path).leaves) == 57
    for protocol in suites.PROTOCOLS:
        for name, count in (("mmlu", 57), ("bbh", 27)):
            wrong = dataclasses.replace(suites.benchmark(name, protocol), leaves=count - 1)
            with pytest.raises(UserError, match=f"{count} tasks in this lm-eval, {count - 1} expected"):
                definitions.prepare(wrong, None, tmp_path)
            assert len(definitions.prepare(suites.benchmark(name, protocol), None, tmp_path).leaves) == count
    with pytest.raises(UserError, match="unknown task 'blimpp'; did you mean blimp"):
        definitions.prepare(suites.Benchmark("blimpp", "blimpp", "", None), None, tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\ntsks: [piqa]", "unknown key 'tsks'; did you mean tasks?"),
        ("tasks: [piqa]", "name is missing"),
        ("name: a", "tasks is missing"),
        ("name: a\ntasks: []", "tasks is empty"),
        ("name: a\ntasks: piqa", "tasks 'piqa' is not a list"),
        ("name: 3\ntasks: [piqa]", "name 3 is not text"),
        ("name: a b\ntasks: [piqa]", "name 'a b'"),
        ("name: mmlu\ntasks: [piqa]", "name 'mmlu' is one of ours"),
        ("name: a\ntasks: [3]", "task 1: 3 is neither a task's name nor a mapping"),
        ("name: a\ntasks: [{num_fewshot: 3}]", "task 1: task is missing"),
        ("name: a\ntasks: [{task: piqa, num_fewshots: 3}]", "unknown key 'num_fewshots'; did you mean num_fewshot?"),
        ("name: a\ntasks: [{task: piqa, num_fewshot: five}]", "num_fewshot 'five' is not a whole number"),
        ("name: a\ntasks: [{task: piqa, num_fewshot: true}]", "num_fewshot True is not a whole number"),
        ("name: a\ntasks: [{task: piqa, num_fewshot: -1}]", "num_fewshot -1"),
        ("name: a\ntasks: [{task: bbh, num_fewshot: 5}]", "bbh always has 3 shots"),
        ("name: a\ntasks: [{task: mmlu, mean: leavs}]", "mean 'leavs'; did you mean leaves?"),
        ("name: a\ntasks: [piqa, piqa]", "task 'piqa' is there twice"),
        ("name: a\ntasks: [{task: boolq, name: piqa}]", "name 'piqa' is one of ours"),
        ("name: a\ntasks: [{task: boolq, name: a}]", "a task and the suite are both named 'a'"),
        ("name: a\ntasks: [gone.yaml]", "gone.yaml cannot be read (No such file or directory)"),
        ("name: a\ntasks: [group.yaml]", "is a group: name its tasks one by one"),
        ("name: [a", "is not YAML"),
        ("- a", "holds no mapping"),
    ],
)
def test_mistakes_in_a_suite_are_told(tmp_path, text, words):
    (tmp_path / "suite.yaml").write_text(text)
    (tmp_path / "group.yaml").write_text("group: g\ntask: [a, b]")
    with pytest.raises(UserError) as raised:
        own_suites.load(tmp_path / "suite.yaml")
    assert words in str(raised.value)
    assert str(tmp_path / "suite.yaml") in str(raised.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("metric: acc_norm", "metric: acc_nrm"), "task 'riddles' has no metric 'acc_nrm'; did you mean acc_norm?"),
        (("riddles.yaml, title", "other.yaml, title"), "test file"),
        (
            ("task: mmlu, mean: leaves, leaves: 57", "task: mmlu, mean: leaves, leaves: 56"),
            "57 tasks in this lm-eval, 56",
        ),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(folder, tmp_path, change, words):
    (folder / "other.yaml").write_text(TASK.replace("riddles.jsonl", "gone.jsonl"))
    (folder / "changed.yaml").write_text(SUITE.replace(*change))
    suite = own_suites.load(folder / "changed.yaml")
    mini = ROOT / "evalsuite" / "bundles" / "mini"
    with pytest.raises(UserError, match=words):
        _ = [definitions.prepare(member, mini, tmp_path) for member in suite.members]


def test_the_command_line_tells_them_in_one_line(folder, tmp_path):
    (tmp_path / "bad.yaml").write_text("name: a\ntasks: [{task: piqa, num_fewshots: 3}]")
    model = random_llama.build(tmp_path / "model")
    done = tinyllama("eval", "--model", model, "--tasks", tmp_path / "bad.yaml", check=False)
    assert done.returncode == 2
    assert len([line for line in done.stderr.splitlines() if "error:" in line]) == 1
    assert "did you mean num_fewshot?" in done.stderr
