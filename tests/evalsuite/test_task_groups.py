"""Groups of tasks against lm-eval's own aggregation, and how often a prompt was answered."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import random_llama

from evalsuite import backends, runner, suites, task_loading
from evalsuite.samples import path_of

LEAF = """
dataset_path: json
test_split: test
doc_to_text: "{{q}}"
"""
CHOOSES = f"""{LEAF}
output_type: multiple_choice
doc_to_choice: ["yes", "no"]
doc_to_target: a
metric_list: [{{metric: acc}}]
"""
WRITES = f"""{LEAF}
output_type: generate_until
doc_to_target: t
repeats: 4
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: true, temperature: 1.0}}
metric_list: [{{metric: exact_match}}]
"""
SIZES = {"small": 2, "middle": 5, "large": 30}


@pytest.mark.parametrize("by_size", [True, False])
def test_a_groups_mean_is_lm_evals(tmp_path, by_size):
    import lm_eval
    from lm_eval.models.dummy import DummyLM
    from lm_eval.tasks import TaskManager

    for leaf, size in SIZES.items():
        rows = [{"q": f"{leaf} {number}", "a": int(number % 3 == 0)} for number in range(size)]
        (tmp_path / f"{leaf}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = f"dataset_kwargs: {{data_files: {{test: {tmp_path / leaf}.jsonl}}, cache_dir: {tmp_path}}}\n"
        (tmp_path / f"{leaf}.yaml").write_text(f"task: {leaf}\n{files}{CHOOSES}")
    listed = f"aggregate_metric_list: [{{metric: acc, weight_by_size: {json.dumps(by_size)}}}]"
    (tmp_path / "group.yaml").write_text(f"group: all_of_them\ntask: [{', '.join(SIZES)}]\n{listed}\n")
    loaded = TaskManager(include_path=str(tmp_path), include_defaults=False).load(["all_of_them"])
    for leaf in loaded["tasks"].values():
        leaf.set_config(key="num_fewshot", value=0)
        leaf.set_fewshot_seed(seed=0)
    random.seed(0)
    results = lm_eval.evaluate(lm=DummyLM(), task_dict=loaded, bootstrap_iters=100)
    benchmark = suites.Benchmark("all_of_them", "", "acc", None, mean="items" if by_size else "leaves")
    entry = runner.score(benchmark, results, list(SIZES))
    group = results["groups"]["all_of_them"]
    assert entry["value"] == pytest.approx(group["acc,none"], abs=1e-12)
    assert entry["stderr"] == pytest.approx(group["acc_stderr,none"], abs=1e-12)
    assert len({leaf["value"] for leaf in entry["leaves"].values()}) > 1  # else any mean would do


def evaluate(folder: Path, suite: str) -> dict[str, Any]:
    (folder / "suite.yaml").write_text(suite)
    chosen, own = suites.choose(str(folder / "suite.yaml"))
    choice = backends.choose(str(random_llama.build(folder / "model")), "native", None, None, None)
    request = runner.Request(
        choice, chosen, None, None, folder / "eval", own_suites=tuple(own), resume=False, parity_check=False
    )
    return runner.evaluate(request, lambda *_: None)


def test_repeats_are_made_and_recorded(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"q": "a", "t": "b"}\n{"q": "c", "t": "d"}\n')
    files = "dataset_kwargs: {data_files: {test: rows.jsonl}}\n"
    (tmp_path / "own.yaml").write_text(f"task: own\n{files}{WRITES}")
    (tmp_path / "once.yaml").write_text(f"task: once\n{files}{WRITES}".replace("repeats: 4", "repeats: 1"))
    found = evaluate(tmp_path, "name: s\ntasks: [own.yaml, once.yaml]")["tasks"]
    for name, count in (("own", 4), ("once", 1)):
        assert (found[name]["repeats"], found[name]["samples_per_problem"]) == (count, count)
        entries = [json.loads(line) for line in path_of(tmp_path / "eval", name).open()]
        assert [len(entry["resps"][0]) for entry in entries] == [count, count]
    config = json.loads(next((tmp_path / "eval" / "lm_eval").glob("results_*.json")).read_text())["configs"]["own"]
    assert config["dataset_path"] == "json"  # as the user's file says it, not where the checked rows were
    assert config["dataset_kwargs"]["data_files"] == {"test": str(tmp_path / "rows.jsonl")}


def test_the_random_generators_go_on_as_if_nothing_was_checked(tmp_path):
    """Building tasks draws numbers where their process_docs does; what is drawn after it must not move."""
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    loaded = task_loading.Loaded({}, {}, states)
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    loaded.restore()
    assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())
