"""pass@k: the estimator, several completions of a problem, and scoring them again without a model."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import random_llama
from conftest import tinyllama

from evalsuite import compare, completions, passing, suites
from tinyllama.errors import UserError

ROW = {"prompt": "def one():\n", "test": "def check(f):\n    assert f() == 1\n", "entry_point": "one"}


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_the_estimator_is_the_mean_over_all_draws(count):
    for passed, k in itertools.product(range(count + 1), range(1, count + 1)):
        draws = list(itertools.combinations([True] * passed + [False] * (count - passed), k))
        assert passing.pass_at_k(count, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)


def test_the_estimator_at_its_ends():
    assert passing.pass_at_k(200, 1, 100) == 0.5
    assert passing.pass_at_k(200, 0, 100) == 0.0
    assert passing.pass_at_k(200, 101, 100) == 1.0
    # Chen et al.'s own product form.
    product = 1.0
    for i in range(200 - 13 + 1, 201):
        product *= 1 - 100 / i
    assert passing.pass_at_k(200, 13, 100) == pytest.approx(1 - product, abs=1e-12)
    assert passing.scores([True] + [False] * 19) == {"pass@1": 0.05, "pass@10": 0.5}
    assert [passing.ks(n) for n in (1, 9, 10, 99, 100)] == [[1], [1], [1, 10], [1, 10], [1, 10, 100]]


def test_completions_are_judged_in_order_and_equal_ones_once():
    texts = ["    return 1", "    return 2", "    return 1", "    while True: pass"]
    verdicts = passing.judge(ROW, texts, suites.PAPER)
    assert [verdict.passed for verdict in verdicts] == [True, False, True, False]
    assert verdicts[0] is verdicts[2]
    assert "stopped after 3 s" in verdicts[3].reason


def test_what_is_asked_for():
    chosen = suites.select("piqa,humaneval", suites.PAPER)
    assert suites.sampled(chosen, 1, None) == chosen
    for count, given, expected in ((10, None, 0.6), (11, None, 0.8), (5, 0.2, 0.2), (1, 0.0, 0.0)):
        piqa, humaneval = suites.sampled(chosen, count, given)
        assert piqa == chosen[0]
        assert (humaneval.samples, humaneval.temperature) == (count, expected)
    for count, given, words in (
        (0, None, "--samples-per-problem 0"),
        (2, 0.0, "all be the same"),
        (1, -1.0, "--temperature -1"),
    ):
        with pytest.raises(UserError, match=words):
            suites.sampled(chosen, count, given)
    with pytest.raises(UserError, match="--samples-per-problem is for humaneval"):
        suites.sampled(chosen[:1], 2, None)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    model = random_llama.build(tmp_path_factory.mktemp("random"))
    output = tmp_path_factory.mktemp("passing")
    arguments = ["--model", model, "--tasks", "humaneval", "--data-dir", "mini", "--limit", 2, "--output", output]
    tinyllama("eval", *arguments, "--protocol", "paper", "--samples-per-problem", 12, timeout=300)
    return output, json.loads((output / "results.json").read_text())


def test_how_a_program_was_drawn_is_part_of_its_setting():
    from evalsuite.scores import _drawn

    def entry(protocol: str, count: int, **generation: Any) -> dict[str, Any]:
        return {"metric": "pass@1", "protocol": protocol, "samples_per_problem": count, "generation": generation}

    assert _drawn(entry("harness", 1, do_sample=False)) == ""
    assert _drawn(entry("paper", 1, do_sample=True, temperature=suites.PAPER_TEMPERATURE)) == ""
    assert _drawn(entry("paper", 1, do_sample=False)) == ", 1 completion at temperature 0"
    assert _drawn(entry("harness", 1, do_sample=True, temperature=0.8)) == ", 1 completion at temperature 0.8"
    assert _drawn(entry("harness", 5, do_sample=True, temperature=0.8)) == ", 5 completions at temperature 0.8"
    assert _drawn({"metric": "acc", "protocol": "harness"}) == ""


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_completion_is_kept_with_its_verdict(measured):
    output, results = measured
    entry = results["tasks"]["humaneval"]
    assert (entry["samples_per_problem"], entry["sampling_seed"]) == (12, 1234)
    assert entry["generation"]["temperature"] == 0.8
    assert entry["metrics"] == {"pass@1,none": 0.0, "pass@10,none": 0.0}
    found = lines(output / completions.NAME)
    assert [(line["doc_id"], line["index"]) for line in found] == [(i, j) for i in range(2) for j in range(12)]
    assert len({line["completion"] for line in found}) == 24
    assert not any(line["passed"] for line in found)
    assert all(line["reason"] for line in found)
    log = lines(output / "samples" / "humaneval.jsonl")
    assert {line["prompt_hash"] for line in found} == {entry["prompt_hash"] for entry in log}
    assert [entry["resps"] for entry in log] == [
        [[x["completion"] for x in found if x["doc_id"] == i]] for i in range(2)
    ]
    assert "12 completions a problem at temperature 0.8: pass@1 0.00, pass@10 0.00" in (output / "table.md").read_text()


def test_completions_are_scored_again_without_a_model(measured, tmp_path):
    """Three of the first problem's twelve, and all of the second's, are replaced by the solutions."""
    output = tmp_path / "again"
    shutil.copytree(measured[0], output)
    log = {entry["doc_id"]: entry["doc"] for entry in lines(output / "samples" / "humaneval.jsonl")}
    changed = lines(output / completions.NAME)
    for line in changed:
        if line["doc_id"] == 1 or line["index"] < 3:
            line["completion"] = log[line["doc_id"]]["canonical_solution"].replace("\n\n", "\n")
    (output / completions.NAME).write_text("".join(json.dumps(line) + "\n" for line in changed))
    done = tinyllama("eval", "--rescore", output)
    results = json.loads((output / "results.json").read_text())
    entry = results["tasks"]["humaneval"]
    ten = (1 + passing.pass_at_k(12, 3, 10)) / 2
    assert entry["value"] == pytest.approx((3 / 12 + 1) / 2)
    assert entry["metrics"] == pytest.approx({"pass@1,none": 0.625, "pass@10,none": ten})
    assert entry["stderr"] == pytest.approx(0.375)
    assert "62.50" in done.stdout
    assert [line["passed"] for line in lines(output / completions.NAME)] == [True] * 3 + [False] * 9 + [True] * 12
    assert [item["pass@1"] for item in lines(output / "samples" / "humaneval.jsonl")] == [0.25, 1.0]
    (exported,) = (output / "lm_eval").glob("results_*.json")
    assert json.loads(exported.read_text())["results"]["tl_humaneval"]["pass@1,none"] == 0.625
    (exported,) = (output / "lm_eval").glob("samples_*.jsonl")
    assert [item["pass@1"] for item in lines(exported)] == [0.25, 1.0]
    report = compare.compare([str(measured[0]), str(output)])
    found = report.comparison(report.models[1], "humaneval")
    assert found is not None
    assert found.test is not None
    assert (found.test.pairs, found.test.method) == (2, "sign flip, exact")
    assert "12 completions at temperature 0.8" in report.models[0].scores["humaneval"].protocol
    # The same again: nothing changes.
    before = {path: path.read_bytes() for path in output.rglob("samples*/*.jsonl")}
    completions.rescore(output, lambda _: None)
    assert {path: path.read_bytes() for path in before} == before


def test_mistakes_are_told(measured, tmp_path):
    output = tmp_path / "broken"
    shutil.copytree(measured[0], output)
    path = output / completions.NAME
    whole = path.read_text().splitlines(keepends=True)
    for text, words in (
        ("".join(whole[:-1]), "has 11 completions of one problem, 12 of another"),
        ("".join(whole[:12]), "has no completion of tl_humaneval's item 1"),
        ("{}\n", r"completions.jsonl:1 is no completion"),
        ("", "is empty"),
        (whole[0].replace('"humaneval"', '"other"'), "has no other"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            completions.rescore(output, lambda _: None)
    path.unlink()
    for arguments, words in (
        (["--rescore", output], "completions.jsonl cannot be read"),
        (["--rescore", tmp_path / "nowhere"], "cannot be read"),
        (["--rescore", output, "--model", "m"], "one of them"),
        ([], "one of them"),
    ):
        done = tinyllama("eval", *arguments, check=False)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert words in done.stderr
