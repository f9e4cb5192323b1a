"""Protocol "paper": instruct-eval's prompts string for string, its scoring, and which rows it asks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import random_llama
from conftest import ROOT, SHARED, tinyllama

from evalsuite import compare, definitions, leaves, runner, samples, suites, table
from evalsuite.tasks import paper_prompts as paper
from tinyllama.errors import UserError

REAL = SHARED / "eval_data"
MINI = ROOT / "evalsuite" / "bundles" / "mini"
MMLU_ROW = {
    "question": "How many legs has a spider?",
    "subject": "anatomy",
    "choices": ["4", "6", "8", "10"],
    "answer": 2,
}
MMLU_PROMPT = "How many legs has a spider?\nA. 4\nB. 6\nC. 8\nD. 10\nAnswer:"


def drop_row(passage: str, question: str, *answers: Any) -> dict[str, Any]:
    """answers: a number as str, a date as dict, spans as list; the first is the answer, the others were validated."""

    def parts(answer: Any) -> tuple[str, dict[str, str], list[str]]:
        nothing = {"day": "", "month": "", "year": ""}
        if isinstance(answer, str):
            return answer, nothing, []
        return ("", nothing | answer, []) if isinstance(answer, dict) else ("", nothing, answer)

    number, date, spans = parts(answers[0])
    columns = [list(column) for column in zip(*map(parts, answers[1:]), strict=True)] or [[], [], []]
    validated = dict(zip(("number", "date", "spans"), columns, strict=True))
    answer = {"number": number, "date": date, "spans": spans}
    return {"passage": passage, "question": question, "answer": answer, "validated_answers": validated}


def test_mmlu_prompts_and_scoring():
    assert paper.mmlu_header("high_school_us_history") == (
        "The following are multiple choice questions (with answers) about  high school us history.\n\n"
    )
    assert paper.mmlu_question(MMLU_ROW) == MMLU_PROMPT
    assert paper.mmlu_target(MMLU_ROW) == "C"
    for answer, right in ((" C", 1.0), ("C.", 1.0), ("\nCats", 1.0), (" c", 0.0), ("(C", 0.0), ("A C", 0.0), ("", 0.0)):
        assert paper.mmlu_results(MMLU_ROW, [answer]) == {"acc": right}


def test_bbh_prompts_and_scoring():
    row = {"input": "not True is", "target": "False"}
    assert paper.bbh_question(row) == "not True is\nAnswer:"
    for answer, right in ((" False\n\nnot", 1.0), ("Falsehood", 1.0), ("It is False", 0.0), ("false", 0.0)):
        assert paper.bbh_results(row, [answer]) == {"prefix_match": right}


def test_bbhs_first_three_rows_are_shots_and_not_asked():
    rows = [{"input": str(i), "target": "x"} for i in range(5)]
    assert paper.bbh_split(rows) == ([0, 1, 2], [3, 4])
    with pytest.raises(UserError, match="BBH has 3 rows in a task"):
        paper.bbh_split(rows[:3])


def test_drop_prompts_and_scoring():
    row = drop_row(" The Herons won 3-1. ", "Who won? ", ["the Herons"])
    assert paper.drop_question(row) == "The Herons won 3-1. Who won?\nAnswer:"
    for answer, right in ((" the Herons won", 1.0), ("The Herons", 0.0)):
        assert paper.drop_results(row, [answer]) == {"prefix_match": right}


@pytest.mark.parametrize(
    ("answers", "spans"),
    [
        (("4",), ["4"]),
        (({"day": "5", "month": "May", "year": "1890"},), ["5 May 1890"]),
        (({"month": "May", "year": "1890"},), ["May 1890"]),
        ((["a ", "b"],), ["a", "b"]),
        # What was validated counts, and the answer only where nothing was.
        (("4", "5", "5"), ["5", "5"]),
        (("4", ["a"], "4"), ["a", "4"]),
    ],
)
def test_drops_answers_as_text(answers, spans):
    assert paper.drop_spans(drop_row("p", "q", *answers)) == spans


def test_drop_asks_questions_with_one_answer_about_other_passages_than_the_shots():
    rows = [drop_row(f"passage {i // 2}", f"question {i}", str(i)) for i in range(20)]
    rows[4] = drop_row("passage 2", "question 4", ["a", "b"])
    both = drop_row("passage 3", "question 7", "7")
    both["answer"]["spans"] = ["seven"]
    rows[7] = both
    rows[9] = drop_row("passage 4", "question 9", "9", "9", "9")
    usable = [i for i in range(20) if i not in (4, 7)]
    # random.seed(0); random.sample(usable, 3)
    shots, asked = paper.drop_split(rows)
    assert shots == [usable[12], usable[13], usable[1]] == [14, 15, 1]
    assert asked == [i for i in usable if i // 2 not in (7, 0)]
    assert 9 in asked
    with pytest.raises(UserError, match="DROP has 2 rows with one distinct answer"):
        paper.drop_split(rows[:2])
    with pytest.raises(UserError, match="other passages"):
        paper.drop_split([*rows[14:16], {**rows[15], "question": "again"}])


def test_shots_go_from_the_end_until_the_prompt_fits():
    shots = ["one ", "two ", "three "]

    def prompt(limit: int) -> str:
        return paper.fitted("head ", shots, "ask", lambda text: len(text) <= limit)

    assert prompt(22) == "head one two three ask"
    assert prompt(21) == prompt(16) == "head one two ask"
    assert prompt(15) == "head one ask"
    assert prompt(0) == "head ask"


def test_humaneval_prompt_and_what_is_kept():
    row = {"prompt": "def one():\n", "test": "def check(f):\n    assert f() == 1", "entry_point": "one"}
    assert paper.humaneval_question(row) == (
        "Please complete the following Python code without providing any additional tasks such as testing or "
        "explanations\ndef one():\n"
    )
    for generated, kept in (
        ("   return 1\n\n\ndef two():", "    return 1"),  # the tokenizer lost a space
        ("\n\n    x = 1\n     y = 2\nreturn x", "    x = 1\n      y = 2\nreturn x"),
        ("    return 1", "    return 1"),
        ("\n \nx", "  \nx"),
        ("", ""),
    ):
        assert paper.humaneval_completion(generated) == kept


def test_humaneval_scores_what_is_kept_within_three_seconds():
    from evalsuite.tasks.humaneval_score import process_paper_results, process_results

    row = {"prompt": "def one():\n", "test": "def check(f):\n    assert f() == 1\n", "entry_point": "one"}
    text = "   return 1\n\n\ndef two(:"
    assert process_paper_results(row, [text]) == {"pass@1": 1.0}
    assert process_results(row, [text]) == {"pass@1": 0.0}
    slow = {**row, "prompt": "import time\ndef one():\n    time.sleep(4)\n"}
    assert process_paper_results(slow, ["    return 1"]) == {"pass@1": 0.0}


def lm_evals(scores: dict[str, list[float]], metric: str) -> dict[str, Any]:
    """Results as lm_eval.evaluate returns them."""
    means = {leaf: sum(values) / len(values) for leaf, values in scores.items()}
    return {
        "results": {leaf: {f"{metric},none": mean, f"{metric}_stderr,none": 0.1} for leaf, mean in means.items()},
        "n-samples": {leaf: {"effective": len(values)} for leaf, values in scores.items()},
        "higher_is_better": {leaf: {metric: True} for leaf in scores},
        "n-shot": dict.fromkeys(scores, 3),
        "versions": dict.fromkeys(scores, 1.0),
    }


def test_bbh_is_a_mean_of_tasks_and_mmlu_one_of_items():
    scores = {"a": [1.0, 1.0, 0.0, 0.0], "b": [1.0]}
    bbh = runner.score(suites.BY_PAPER["bbh"], lm_evals(scores, "prefix_match"), list(scores))
    mmlu = runner.score(suites.BY_PAPER["mmlu"], lm_evals(scores, "acc"), list(scores))
    assert (bbh["value"], mmlu["value"]) == (0.75, pytest.approx(0.6))
    assert bbh["stderr"] == pytest.approx((0.1**2 + 0.1**2) ** 0.5 / 2)
    assert (bbh["protocol"], bbh["task"], bbh["mean"]) == ("paper", "tl_bbh_direct", "leaves")
    assert suites.BENCHMARKS["bbh"].mean == "items"


def test_leaves_are_those_of_lm_eval():
    from lm_eval.tasks._yaml_loader import load_yaml

    from evalsuite.definitions import stock_definitions

    for name, names in (("mmlu", leaves.MMLU), ("bbh", leaves.BBH)):
        stock = [
            load_yaml(path, resolve_func=False)["dataset_name"]
            for path, _ in stock_definitions(suites.BENCHMARKS[name])
        ]
        ours = [changes["dataset_name"] for _, changes in stock_definitions(suites.BY_PAPER[name])]
        assert sorted(stock) == sorted(ours) == sorted(names)
        assert len(names) == suites.BY_PAPER[name].leaves == {"mmlu": 57, "bbh": 27}[name]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return random_llama.build(tmp_path_factory.mktemp("random"))


def evaluate(model: Path, output: Path, *more: object, tasks: str = "problem_solving") -> dict[str, Any]:
    tinyllama("eval", "--model", model, "--tasks", tasks, "--protocol", "paper", "--output", output, *more, timeout=300)
    return json.loads((output / "results.json").read_text())


@pytest.fixture(scope="module")
def measured(model, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("paper")
    return output, evaluate(model, output, "--data-dir", "mini", "--limit", 2)


def logged(output: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in samples.path_of(output, name).read_text().splitlines()]


def test_a_whole_run_over_the_small_bundle(measured):
    output, results = measured
    assert results["protocol"] == "paper"
    for name, entry in results["tasks"].items():
        expected = suites.BY_PAPER[name]
        assert (entry["protocol"], entry["task"], entry["metric"]) == ("paper", expected.task, expected.metric)
        assert entry["num_fewshot"] == expected.num_fewshot
        assert all(line["protocol"] == "paper" for line in logged(output, name))
    assert results["suites"]["problem_solving"]["protocol"] == "paper"
    sizes = {name: (len(e["leaves"]), e["n"]) for name, e in results["tasks"].items()}
    assert sizes == {"mmlu": (57, 114), "bbh": (27, 27), "drop": (0, 2), "humaneval": (0, 2)}
    bbh = results["tasks"]["bbh"]
    assert bbh["value"] == pytest.approx(sum(leaf["value"] for leaf in bbh["leaves"].values()) / 27)
    sampled = results["tasks"]["humaneval"]
    assert sampled["sampling_seed"] == 1234
    assert sampled["generation"] == {"do_sample": True, "max_gen_toks": 512, "temperature": 0.1, "until": []}
    (exported,) = (output / "lm_eval").glob("results_*.json")
    assert {"tl_mmlu_gen", "tl_bbh_direct", "tl_drop_prefix", "tl_humaneval"} <= set(
        json.loads(exported.read_text())["results"]
    )


def test_prompts_are_the_bundles_rows_with_as_many_shots_as_2048_tokens_hold(measured, model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def rows(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (MINI / f"{name}.jsonl").read_text().splitlines()]

    counts = set()
    output, results = measured
    for line in logged(output, "bbh"):
        found = rows(f"SaylorTwift__bbh/{line['task'].removeprefix('tl_bbh_direct_')}/test")
        shots = [f"{row['input']}\nAnswer: {row['target']}\n\n" for row in found[:3]]
        prompts = ["".join(shots[:k]) + f"{found[3]['input']}\nAnswer:" for k in range(4)]
        fitting = max(k for k in range(4) if len(tokenizer(prompts[k]).input_ids) <= 2048)
        assert line["arguments"] == [[prompts[fitting], {"until": [], "max_gen_toks": 32, "do_sample": False}]]
        counts.add(fitting)
    for line in logged(measured[0], "mmlu"):
        leaf = line["doc"]["subject"]
        dev = rows(f"cais__mmlu/{leaf}/dev")
        shots = [f"{paper.mmlu_question(row)} {'ABCD'[row['answer']]}\n\n" for row in dev]
        prompts = [paper.mmlu_header(leaf) + "".join(shots[:k]) + paper.mmlu_question(line["doc"]) for k in range(6)]
        fitting = max(k for k in range(6) if len(tokenizer(prompts[k]).input_ids) <= 2048)
        assert line["arguments"] == [[prompts[fitting], {"until": [], "max_gen_toks": 2, "do_sample": False}]]
    assert {2, 3} <= counts
    fewer = results["tasks"]["bbh"]["fewer_shots"]
    assert fewer >= 1
    assert results["tasks"]["mmlu"]["fewer_shots"] == 0
    assert f"- {fewer} prompts have fewer shots" in table.markdown(results)
    first = logged(measured[0], "drop")[0]
    shots_and_question = first["arguments"][0][0].split("\n\n")
    assert len(shots_and_question) == 4
    assert not any(first["doc"]["passage"] in shot for shot in shots_and_question[:3])


def test_items_are_known_by_their_rows(measured):
    """What a contamination report says of a row is found, though shots are left out before the items."""
    output, results = measured
    for name, folder in (("bbh", "SaylorTwift__bbh"), ("drop", "EleutherAI__drop")):
        origins = results["tasks"][name]["origins"]
        for line in logged(output, name):
            rows = (MINI / f"{origins[line['task']]['set']}.jsonl").read_text().splitlines()
            assert json.loads(rows[line["row"]]) == line["doc"]
            assert origins[line["task"]]["rows"] == len(rows)
            assert origins[line["task"]]["set"].startswith(folder)
    assert {line["row"] for line in logged(output, "bbh")} == {3}


def test_its_table_stands_beside_the_published_rows_without_a_caveat(measured):
    text = table.markdown(measured[1])
    assert "| paper (instruct-eval: " in text
    assert "| paper (lm-eval" in text
    assert "compare within one protocol only" not in text
    harness = {**measured[1], "tasks": {n: {**e, "protocol": "harness"} for n, e in measured[1]["tasks"].items()}}
    assert "compare within one protocol only" in table.markdown(harness)
    report = compare.compare(["published:TinyLlama-1.1B 3T", str(measured[0])])
    found = report.comparison(report.models[1], "mmlu")
    assert found is not None
    assert "other protocol" not in found.verdict


def test_drawn_completions_are_the_same_again_and_of_other_batches(measured, model, tmp_path):
    again = evaluate(model, tmp_path, "--data-dir", "mini", "--limit", 1, "--batch-size", 1, tasks="tl_humaneval")
    assert again["tasks"]["tl_humaneval"]["protocol"] == "paper"
    assert logged(tmp_path, "tl_humaneval")[0]["resps"] == logged(measured[0], "humaneval")[0]["resps"]


def test_hf_backend_draws_the_same_twice(model, tmp_path):
    texts = []
    for name in "ab":
        evaluate(model, tmp_path / name, "--data-dir", "mini", "--limit", 2, "--backend", "hf", tasks="drop,humaneval")
        texts.append([line["resps"] for name_ in ("drop", "humaneval") for line in logged(tmp_path / name, name_)])
    assert texts[0] == texts[1]


def test_real_items_are_asked(model, tmp_path):
    if not REAL.exists():
        pytest.skip("real benchmark items are not part of this project (../shared/eval_data is absent)")
    results = evaluate(model, tmp_path, "--data-dir", REAL, "--limit", 1, tasks="bbh,drop")
    assert results["tasks"]["bbh"]["n"] == 27
    rows = [json.loads(line) for line in (REAL / "SaylorTwift__bbh/navigate/test.jsonl").read_text().splitlines()]
    line = next(x for x in logged(tmp_path, "bbh") if x["task"] == "tl_bbh_direct_navigate")
    assert line["arguments"][0][0].endswith(f"\nAnswer: {rows[2]['target']}\n\n{rows[3]['input']}\nAnswer:")


def test_mistakes_are_told(tmp_path):
    with pytest.raises(UserError, match="did you mean paper"):
        suites.checked_protocol("papr")
    assert "did you mean tl_bbh_direct?" in str(suites.unknown_task("tl_bbh_dirct", ["hellaswag"]))
    shutil.copytree(MINI / "SaylorTwift__bbh", tmp_path / "SaylorTwift__bbh")
    path = tmp_path / "SaylorTwift__bbh" / "navigate" / "test.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(UserError, match=r"navigate/test.jsonl: BBH has 3 rows .* or --protocol harness"):
        definitions.prepare(suites.BY_PAPER["bbh"], tmp_path, tmp_path / "scratch")


def test_shots_that_are_not_there_are_told(tmp_path):
    import datasets

    shutil.copytree(MINI / "cais__mmlu", tmp_path / "cais__mmlu")
    path = tmp_path / "cais__mmlu" / "anatomy" / "dev.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    prepared = definitions.prepare(suites.BY_PAPER["mmlu"], tmp_path, tmp_path / "scratch")
    datasets.disable_progress_bars()
    task = prepared.manager.load(["tl_mmlu_gen_anatomy"])["tasks"]["tl_mmlu_gen_anatomy"]
    task.fits = lambda text: True
    assert task.fewshot_context(MMLU_ROW, 0) == paper.mmlu_header("anatomy") + MMLU_PROMPT
    task = prepared.manager.load(["tl_mmlu_gen_anatomy"])["tasks"]["tl_mmlu_gen_anatomy"]
    with pytest.raises(UserError, match="tl_mmlu_gen_anatomy has 4 rows for its 5 shots"):
        task.fewshot_context(MMLU_ROW, 5)


def test_results_of_two_protocols_do_not_share_a_folder(measured, model):
    done = tinyllama(
        "eval", "--model", model, "--tasks", "piqa", "--data-dir", "mini", "--output", measured[0], check=False
    )
    assert done.returncode == 2, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert "protocol 'paper', not 'harness'; give another --output" in error
