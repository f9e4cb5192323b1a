"""lm-eval's code tasks in the sandbox: which ones, their metrics, and their scores of programs that pass and that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import random_llama
from conftest import tinyllama

from evalsuite import code_tasks
from evalsuite.sandbox import Sandbox

# Of lm-eval 0.4.13, by file: every task with unsafe_code whose programs are Python, and none of the others.
SERVED = {
    "humaneval/humaneval_64.yaml", "humaneval/humaneval_64_instruct.yaml", "humaneval/humaneval_instruct.yaml",
    "humaneval/humaneval_plus.yaml", "humaneval/humaneval.yaml", "mbpp/mbpp.yaml", "mbpp/mbpp_instruct.yaml",
    "mbpp/mbpp_plus.yaml", "mbpp/mbpp_plus_instruct.yaml", "humaneval_infilling/multi_line_infilling.yaml",
    "humaneval_infilling/single_line_infilling.yaml", "humaneval_infilling/random_span_infilling.yaml",
    "humaneval_infilling/random_span_infilling_light.yaml", "cruxeval/cruxeval_input.yaml",
    "cruxeval/cruxeval_input_08.yaml", "cruxeval/cruxeval_input_cot.yaml", "cruxeval/cruxeval_output.yaml",
    "cruxeval/cruxeval_output_08.yaml", "cruxeval/cruxeval_output_cot.yaml",
}  # fmt: skip
MBPP = [
    {
        "task_id": number, "text": f"Write a function that adds {number}.",
        "code": f"def add(x):\n    return x + {number}",
        "test_list": [f"assert add({x}) == {x + number}" for x in range(3)], "test_setup_code": "",
    }
    for number in (1, 2)
]  # fmt: skip
CRUX = [{"code": "def f(x):\n    return x * 2", "input": "4", "output": "8", "id": "sample_0"}]
HUMANEVAL = [
    {
        "task_id": "T/0", "prompt": "def one():\n", "canonical_solution": "    return 1\n", "entry_point": "one",
        "test": "import numpy as np\n\ndef check(candidate):\n    assert np.allclose(candidate(), 1)\n",
    }
]  # fmt: skip
INFILLING = [{**HUMANEVAL[0], "prompt": "def one():\n    x = ", "suffix": "\n    return x\n"}]


def definitions() -> dict[str, dict[str, Any]]:
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    root = Path(lm_eval.tasks.__file__).parent
    folders = ("humaneval", "mbpp", "humaneval_infilling", "cruxeval", "longproc")
    files = [path for folder in folders for path in sorted((root / folder).glob("*.yaml"))]
    loaded = {str(path.relative_to(root)): load_yaml(path, resolve_func=False) for path in files}
    return {name: config for name, config in loaded.items() if config.get("unsafe_code")}


def test_which_tasks_run_in_the_sandbox():
    found = definitions()
    assert {name for name, config in found.items() if code_tasks.runs_in_sandbox(config)} == SERVED
    assert any(name.startswith("longproc/") for name in found)
    assert not code_tasks.runs_in_sandbox({"unsafe_code": True, "metric_list": [{"metric": "exact_match"}]})
    assert not code_tasks.runs_in_sandbox({"unsafe_code": True})


def test_every_task_of_lm_eval_that_runs_programs_was_looked_at():
    """A later lm-eval may bring more: then this list is too short."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    marked = [path for path in root.rglob("*") if path.suffix in (".yaml", "") and path.is_file() and _is_marked(path)]
    assert {path.parent.name for path in marked} == {"humaneval", "mbpp", "humaneval_infilling", "cruxeval", "longproc"}


def _is_marked(path: Path) -> bool:
    return b"unsafe_code: true" in path.read_bytes()


@pytest.fixture
def loaded(tmp_path):
    """A task of lm-eval's own, its rows from a file."""

    def load(file: str, rows: list[dict[str, Any]]) -> Any:
        import lm_eval.tasks
        import yaml
        from lm_eval.tasks import TaskManager

        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        stock = Path(lm_eval.tasks.__file__).parent / file
        overlay = {
            "include": str(stock), "task": "tried", "tag": None, "dataset_path": "json", "dataset_name": None,
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        }  # fmt: skip
        (tmp_path / "tried.yaml").write_text(yaml.safe_dump(overlay))
        code_tasks.install()
        (task,) = TaskManager(include_path=str(tmp_path), include_defaults=False).load(["tried"])["tasks"].values()
        code_tasks.serve(task)
        return task

    return load


def scored(task: Any, responses: list[str]) -> list[dict[str, float]]:
    """lm-eval's own filters and metrics on one response to each document."""
    task.build_all_requests(rank=0, world_size=1)
    for instance in task.instances:
        instance.resps = [responses[instance.doc_id]] * max(1, task.config.repeats)
    task.apply_filters()
    name = next(iter(task.instances[0].filtered_resps))
    docs = {instance.doc_id: instance for instance in task.instances}
    return [task.process_results(docs[n].doc, [docs[n].filtered_resps[name]]) for n in sorted(docs)]


@pytest.mark.parametrize(
    ("file", "rows", "right", "wrong", "metric"),
    [
        ("mbpp/mbpp.yaml", MBPP, [row["code"] for row in MBPP], ["def add(x):\n    return x"] * 2, "pass_at_1"),
        (
            "mbpp/mbpp_instruct.yaml",
            MBPP,
            ["\n" + row["code"] + "\n```" for row in MBPP],
            ["exit()\n```", "```"],
            "pass_at_1",
        ),
        ("mbpp/mbpp_plus.yaml", MBPP, [row["code"] for row in MBPP], ["import os; os._exit(0)"] * 2, "pass_at_1"),
        ("humaneval/humaneval_plus.yaml", HUMANEVAL, ["    return 1.0"], ["    return 2"], "pass@1"),
        (
            "humaneval/humaneval_instruct.yaml",
            HUMANEVAL,
            ["    return 1\n```"],
            ["    while True: pass\n```"],
            "pass@1",
        ),
        ("humaneval/humaneval_64.yaml", HUMANEVAL, ["    return 1"], ["    return 2"], "pass@64"),
        ("humaneval_infilling/multi_line_infilling.yaml", INFILLING, ["1"], ["2"], "pass@1"),
        ("cruxeval/cruxeval_output.yaml", CRUX, ["assert f(4) == 8"], ["assert f(4) == 9"], "pass@1"),
        ("cruxeval/cruxeval_input.yaml", CRUX, ["assert f(4) == 8"], ["assert f(5) == 8"], "pass@1"),
    ],
)
def test_right_programs_pass_and_wrong_ones_fail(loaded, file, rows, right, wrong, metric):
    for responses, expected in ((right, 1.0), (wrong, 0.0)):
        task = loaded(file, rows)
        for entry in scored(task, responses):
            value = entry[metric]
            assert (value[metric] if isinstance(value, dict) else value) == expected


def test_the_metric_is_that_of_code_eval():
    """pass@k where all problems have k predictions for it, and a verdict for each; as evaluate's code_eval documents."""
    tests = ["assert add(2, 3) == 5", "assert add(1, 1) == 2"]
    right, wrong = "def add(a, b): return a + b", "def add(a, b): return a * b"
    scores, found = code_tasks.CodeEval().compute(
        references=tests, predictions=[[wrong, right], [wrong, wrong]], k=[1, 2, 3]
    )
    assert scores == {"pass@1": 0.25, "pass@2": 0.5}
    assert [[entry["passed"] for _, entry in found[task]] for task in (0, 1)] == [[False, True], [False, False]]
    assert found[0][1] == (1, {"task_id": 0, "passed": True, "result": "passed", "completion_id": 1})
    assert "AssertionError" in found[0][0][1]["result"]
    slow = code_tasks.CodeEval().compute(
        references=["f()"], predictions=[["def f():\n    while True: pass"]], k=[1], timeout=0.5
    )
    assert slow[0] == {"pass@1": 0.0}
    assert "timed out" in slow[1][0][0][1]["result"]
    assert Sandbox.shared().limits.wall_s == 10.0


@pytest.mark.slow
def test_mbpp_is_evaluated_from_a_bundle(tmp_path):
    """The command, a bundle with MBPP's rows, no hub: scores of nonsense, and what they depend on."""
    folder = tmp_path / "bundle" / "google-research-datasets__mbpp" / "full"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MBPP))
    model = random_llama.build(tmp_path / "model")
    asked = ["--model", model, "--data-dir", tmp_path / "bundle", "--output", tmp_path / "out"]
    tinyllama("eval", *asked, "--tasks", "mbpp", timeout=300)
    entry = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["mbpp"]
    assert (entry["value"], entry["n"], entry["metric"]) == (0.0, 2, "pass_at_1")
    assert entry["sandbox"]["limits"]["memory_bytes"] == 1 << 30
    assert entry["sandbox"]["hash_seed"] == 0
