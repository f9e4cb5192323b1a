"""`completions.jsonl`: what a model wrote for each problem, and the sandbox's verdict; scored again without a model.

A line for each completion: benchmark, problem, hash of the prompt, index, text, verdict. The problems' tests are in the
evaluation's samples.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from evalsuite import passing, samples
from evalsuite.aggregate import suite_means
from evalsuite.files import write_json, write_json_lines
from evalsuite.names import stem
from evalsuite.table import load_results
from tinyllama import __version__
from tinyllama.data.durable import read_json
from tinyllama.errors import UserError
from tinyllama.stats.intervals import standard_error

NAME = "completions.jsonl"
KEYS = ("benchmark", "prompt_hash", "doc_id", "index", "completion")


def _lines(path: Path, keys: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The lines of a JSON Lines file; UserError names one that is none."""
    found = []
    try:
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    entry = json.loads(line.decode("utf-8"))
                    found.append({key: entry[key] for key in keys} | entry)
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise UserError(f"{path}:{number} is no completion ({error!r})", fix="evaluate again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", fix="give an evaluation's folder") from None
    return found


def _line(
    benchmark: str, entry: dict[str, Any], index: int, completion: str, verdict: passing.Verdict
) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "protocol": entry["protocol"],
        "task_id": entry["doc"].get("task_id"),
        "doc_id": entry["doc_id"],
        "prompt_hash": entry["prompt_hash"],
        "index": index,
        "completion": completion,
        "passed": verdict.passed,
        "reason": verdict.reason,
        "seconds": round(verdict.seconds, 3),
    }


def write(folder: Path, benchmark: str, log: list[dict[str, Any]]) -> None:
    """Keep the completions of a benchmark's samples (the lines of its log) in the place of those from before."""
    path = folder / NAME
    others = [line for line in _lines(path, KEYS) if line["benchmark"] != benchmark] if path.exists() else []
    for entry in log:
        texts = entry["resps"][0]
        verdicts = passing.judge(entry["doc"], texts, entry["protocol"])
        pairs = enumerate(zip(texts, verdicts, strict=True))
        others += [_line(benchmark, entry, index, text, verdict) for index, (text, verdict) in pairs]
    write_json_lines(path, others)


def rescore(folder: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """Judge an evaluation's completions again; its results with their scores, which are written. report(benchmark) is
    called for each. UserError where completions or problems are missing.
    """
    results = load_results(folder / "results.json")
    found = _lines(folder / NAME, KEYS)
    for benchmark in dict.fromkeys(line["benchmark"] for line in found):
        entry = results["tasks"].get(benchmark)
        if entry is None:
            raise UserError(f"{folder / 'results.json'} has no {benchmark}", fix="evaluate it again")
        report(benchmark)
        log = _lines(samples.path_of(folder, benchmark), ("doc", "doc_id", "prompt_hash", "protocol"))
        _judge_again(log, [line for line in found if line["benchmark"] == benchmark], folder / NAME)
        _update(entry, log)
        write(folder, benchmark, log)
        write_json_lines(samples.path_of(folder, benchmark), log)
        _update_export(folder / "lm_eval", entry, log)
    if not found:
        raise UserError(f"{folder / NAME} is empty", fix="evaluate humaneval")
    suites = [(name, record["benchmarks"]) for name, record in (results.get("own_suites") or {}).items()]
    results["suites"] = suite_means(results["tasks"], suites)
    results["rescored"] = __version__
    write_json(folder / "results.json", results)
    return results


def _judge_again(log: list[dict[str, Any]], found: list[dict[str, Any]], path: Path) -> None:
    """Put the completions found, and their scores, into a benchmark's log."""
    texts: dict[tuple[str, int], dict[int, str]] = {}
    for line in found:
        texts.setdefault((line["prompt_hash"], line["doc_id"]), {})[line["index"]] = line["completion"]
    counts = {len(own) for own in texts.values()}
    if len(counts) > 1:
        raise UserError(
            f"{path} has {min(counts)} completions of one problem, {max(counts)} of another", fix="evaluate again"
        )
    for item in log:
        own = texts.get((item["prompt_hash"], item["doc_id"]))
        if own is None:
            raise UserError(f"{path} has no completion of {item['task']}'s item {item['doc_id']}", fix="evaluate again")
        made = [own[index] for index in sorted(own)]
        item["resps"] = [made]
        item["filtered_resps"] = [made] if len(made) > 1 else made
        verdicts = passing.judge(item["doc"], made, item["protocol"])
        item.update(passing.scores([verdict.passed for verdict in verdicts]))


def _update(entry: dict[str, Any], log: list[dict[str, Any]]) -> None:
    """Give a benchmark's entry the scores of its log."""
    count = len(log[0]["resps"][0])
    values = {f"pass@{k}": np.array([item[f"pass@{k}"] for item in log]) for k in passing.ks(count)}
    filter_name = entry["metric_key"].partition(",")[2]
    entry["metrics"] = {f"{name},{filter_name}": float(scores.mean()) for name, scores in values.items()}
    headline = values[entry["metric"]]
    entry["value"] = float(headline.mean())
    entry["sandbox"] = passing.sandbox_record()
    entry["stderr"] = standard_error(headline) if len(headline) > 1 else None
    samples.add_intervals(entry, samples.items(log, entry["metric_key"]))


def _update_export(folder: Path, entry: dict[str, Any], log: list[dict[str, Any]]) -> None:
    """The same in lm-eval's own format."""
    path = max(folder.glob("results_*.json"), default=None)
    content = read_json(path) if path else None
    task = entry["task"]
    if path is None or not content or task not in content.get("results", {}):
        return
    metric, _, filter_name = entry["metric_key"].partition(",")
    stderr = "N/A" if entry["stderr"] is None else entry["stderr"]
    content["results"][task] |= {**entry["metrics"], f"{metric}_stderr,{filter_name}": stderr}
    write_json(path, content)
    time = path.stem.removeprefix("results_")
    lines = folder / f"samples_{stem(task)}_{time}.jsonl"
    if lines.exists():
        by_item = {item["doc_id"]: item for item in log}
        kept = _lines(lines)
        for line in kept:
            item = by_item[line["doc_id"]]
            line.update({name: item[name] for name in item if name.startswith("pass@")}, resps=item["resps"])
        write_json_lines(lines, kept)
