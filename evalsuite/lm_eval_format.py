"""The same results in lm-eval's own files, so that what reads those reads ours: `results_<time>.json`, and beside it
`samples_<task>_<time>.jsonl` for each leaf task, as lm-eval's EvaluationTracker lays them out.

The file is written anew after each benchmark. A resumed evaluation goes on in the file of the one before it.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evalsuite.files import write_json, write_json_lines
from evalsuite.names import stem
from tinyllama.data.durable import read_json

# What lm-eval's command line uses, and the draws for the few metrics whose error it bootstraps.
SEED, FEWSHOT_SEED, BOOTSTRAP_ITERS = 0, 1234, 1000
# Of lm-eval's results: one entry for each task.
BY_TASK = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
KEYS = "tinyllama_keys"  # ours: what each benchmark was evaluated with, as in results.json


def _header(record: dict[str, Any]) -> dict[str, Any]:
    """What lm-eval says of the whole evaluation. record: results.json as it is at the start."""
    from lm_eval.utils import sanitize_model_name

    settings, model = record["settings"], record["model"]
    arguments = {"pretrained": model, "dtype": settings["dtype"], "max_length": settings["max_length"]}
    return {
        "config": {
            "model": record["backend"],
            "model_args": {k: v for k, v in arguments.items() if v is not None},
            "batch_size": settings["batch_size"],
            "batch_sizes": [],
            "device": None,
            "use_cache": None,
            "limit": settings["limit"],
            "bootstrap_iters": BOOTSTRAP_ITERS,
            "gen_kwargs": {},
            "random_seed": SEED,
            "numpy_seed": FEWSHOT_SEED,
            "torch_seed": FEWSHOT_SEED,
            "fewshot_seed": FEWSHOT_SEED,
        },
        "tinyllama_protocol": record.get("protocol"),  # ours: lm-eval's prompts, or those of its tl_ tasks
        "git_hash": None,
        "date": datetime.datetime.now().timestamp(),
        "transformers_version": record["versions"]["transformers"],
        "lm_eval_version": record["versions"]["lm_eval"],
        "model_source": record["backend"],
        "model_name": model,
        "model_name_sanitized": sanitize_model_name(model),
        "system_instruction": None,
        "system_instruction_sha": None,
        "fewshot_as_multiturn": None,
        "chat_template": None,
        "chat_template_sha": None,
    }


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample with all texts where viewers expect texts, and the arguments by name."""
    from lm_eval.utils import sanitize_list

    arguments = {
        f"gen_args_{i}": {f"arg_{j}": part for j, part in enumerate(argument)}
        for i, argument in enumerate(sample["arguments"])
    }
    responses = {key: sanitize_list(sample[key]) for key in ("resps", "filtered_resps")}
    return {**sample, **responses, "arguments": arguments, "target": str(sample["target"])}


class ResultsFile:
    """One evaluation's file in lm-eval's format: what was kept from before, and what is added."""

    def __init__(self, folder: Path, record: dict[str, Any], keys: dict[str, str]) -> None:
        """record: results.json as it is at the start. keys: of each benchmark asked for, as results.json has them."""
        before = max(folder.glob("results_*.json"), default=None)
        old = (read_json(before) if before else None) or {}
        kept = [name for name, key in keys.items() if old.get(KEYS, {}).get(name) == key]
        now = datetime.datetime.now().isoformat().replace(":", "-")
        self._time = before.stem.removeprefix("results_") if before and kept else now
        self._folder, self._keys = folder, keys
        empty: dict[str, Any] = {key: {} for key in (*BY_TASK, "task_hashes", KEYS)}
        self._content = {**empty, **_header(record), "total_evaluation_time_seconds": "0.0"}
        for name in kept:
            self._take(name, old, list(old["group_subtasks"].get(name) or [name]))
        if kept:
            self._content["total_evaluation_time_seconds"] = old["total_evaluation_time_seconds"]

    def _take(self, name: str, results: dict[str, Any], leaves: list[str]) -> None:
        """Copy what a file or lm-eval's results say of one benchmark and its leaf tasks."""
        for part in (*BY_TASK, "task_hashes"):
            for task in dict.fromkeys((name, *leaves)):
                if task in results.get(part, {}):
                    self._content[part][task] = results[part][task]
        self._content[KEYS][name] = self._keys[name]

    def add(self, name: str, entry: dict[str, Any], results: dict[str, Any]) -> None:
        """Write a benchmark's samples, then the file with it. entry: as in results.json; results: lm-eval's."""
        from lm_eval.utils import hash_string

        hashes = {}
        for leaf, samples in results["samples"].items():
            write_json_lines(self._folder / f"samples_{stem(leaf)}_{self._time}.jsonl", _samples(samples))
            hashes[leaf] = hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples))
        self._take(name, {**results, "task_hashes": hashes}, list(results["samples"]))
        if entry["leaves"]:
            self._add_group(name, entry)
        seconds = float(self._content["total_evaluation_time_seconds"]) + entry["seconds"]
        self._content["total_evaluation_time_seconds"] = str(round(seconds, 2))
        write_json(self._folder / f"results_{self._time}.json", self._content)

    def _add_group(self, name: str, entry: dict[str, Any]) -> None:
        """The benchmark as a group of its leaf tasks, with the score that results.json has."""
        metric, _, filter_name = entry["metric_key"].partition(",")
        group = {
            "alias": name,
            entry["metric_key"]: entry["value"],
            f"{metric}_stderr,{filter_name}": "N/A" if entry["stderr"] is None else entry["stderr"],
        }
        parts = {
            "results": group,
            "groups": group,
            "group_subtasks": list(entry["leaves"]),
            "versions": entry["task_version"],
            "n-shot": entry["num_fewshot"],
            "higher_is_better": {metric: entry["higher_is_better"]},
        }
        for part, value in parts.items():
            self._content[part][name] = value


def _samples(samples: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (_sample(sample) for sample in samples)
