"""Suites of the user's own: a YAML file that names lm-eval tasks, and task files of their own, with shots and metrics.

    name: my_suite
    title: What we care about
    tasks:
      - piqa
      - {task: hellaswag, num_fewshot: 10}
      - {task: riddles.yaml, title: Riddles, metric: acc}
      - {task: arithmetic, mean: leaves, leaves: 10}

A suite's score is the unweighted mean of its tasks. `mean` says how a group's leaf tasks make one score.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from evalsuite import names
from evalsuite.names import short
from evalsuite.suites import BENCHMARKS, HARNESS, SUITES, Benchmark, Suite, benchmark
from evalsuite.yaml_files import FIX, mapping
from tinyllama.errors import UserError, nearest

SUFFIXES = (".yaml", ".yml")
SUITE_KEYS: dict[str, type] = {"name": str, "title": str, "description": str, "tasks": list}
TASK_KEYS: dict[str, type] = {
    "task": str, "name": str, "title": str, "num_fewshot": int, "metric": str, "mean": str, "leaves": int,
    "cluster": str,
}  # fmt: skip
LINES, MOST_SHOWN = ("title", "description", "metric", "cluster"), 300  # what tables show
MEANS = ("items", "leaves")
WORDS = {str: "text", int: "a whole number", list: "a list", dict: "a mapping"}


def is_file(name: str) -> bool:
    """Whether --tasks means a suite's file by this name."""
    return name.endswith(SUFFIXES)


def load(path: Path, protocol: str = HARNESS) -> Suite:
    """The suite of a file; UserError names the place and what is wrong there."""
    found = mapping(path, "suite")
    _check(found, SUITE_KEYS, ("name", "tasks"), str(path))
    name = names.checked(found["name"], f"{path}: name")
    if _is_ours(name):
        raise UserError(f"{path}: name {name!r} is one of ours", fix="give the suite another name")
    if not found["tasks"]:
        raise UserError(f"{path}: tasks is empty", fix="name at least one task")
    members = [_member(path, number, item, protocol) for number, item in enumerate(found["tasks"], 1)]
    for number, member in enumerate(members):
        before = next((other.name for other in members[:number] if names.same(other.name, member.name)), None)
        if before is not None:
            how = "" if before == member.name else f", once as {before!r}"
            raise UserError(f"{path}: task {member.name!r} is there twice{how}", fix="give one of them another name")
        if names.same(member.name, name):
            raise UserError(f"{path}: a task and the suite are both named {name!r}", fix="rename one of them")
    return Suite(name, found.get("title") or name, tuple(members), found.get("description"))


def _is_ours(name: str) -> bool:
    """Whether a suite or a benchmark of ours has this name, in capitals or not."""
    return any(names.same(name, other) for other in (*SUITES, *BENCHMARKS, "all"))


def _check(found: dict[str, Any], keys: dict[str, type], needed: tuple[str, ...], where: str) -> None:
    for key, value in found.items():
        if key not in keys:
            raise UserError(f"{where}: unknown key {short(key)}", fix=nearest(str(key), list(keys)))
        if not isinstance(value, keys[key]) or isinstance(value, bool):
            raise UserError(f"{where}: {key} {short(value)} is not {WORDS[keys[key]]}", fix=FIX)
        if (
            key in LINES
            and isinstance(value, str)
            and (not value.isprintable() or not 0 < len(value.strip()) <= MOST_SHOWN)
        ):
            raise UserError(
                f"{where}: {key} {short(value)}", fix=f"give one line of at most {MOST_SHOWN} printable characters"
            )
    for key in needed:
        if key not in found:
            raise UserError(f"{where}: {key} is missing", fix=f"add {key}:")


def _member(path: Path, number: int, item: Any, protocol: str) -> Benchmark:
    """One task of a suite."""
    where = f"{path}: task {number}"
    if isinstance(item, str):
        item = {"task": item}
    if not isinstance(item, dict):
        raise UserError(f"{where}: {short(item)} is neither a task's name nor a mapping", fix=FIX)
    _check(item, TASK_KEYS, ("task",), where)
    shots, mean, leaves = item.get("num_fewshot"), item.get("mean"), item.get("leaves")
    if shots is not None and shots < 0:
        raise UserError(f"{where}: num_fewshot {shots}", fix="give 0 or more")
    if leaves is not None and leaves < 1:
        raise UserError(f"{where}: leaves {leaves}", fix="give the number of the group's tasks")
    if mean is not None and mean not in MEANS:
        raise UserError(f"{where}: mean {short(mean)}", fix=nearest(mean, list(MEANS)))
    task = item["task"]
    found = _own(path.parent / task, where) if is_file(task) else benchmark(task, protocol)
    if shots is not None and found.fixed_shots and shots != found.num_fewshot:
        raise UserError(f"{where}: {task} always has {found.num_fewshot} shots", fix="leave num_fewshot out")
    changes: dict[str, Any] = {"num_fewshot": shots, "metric": item.get("metric"), "mean": mean, "leaves": leaves}
    changes["cluster"] = item.get("cluster")
    changes = {key: value for key, value in changes.items() if value is not None}
    as_it_is = {"num_fewshot": found.num_fewshot, "metric": found.metric, "mean": found.mean or "items"}
    changed = [key for key, value in as_it_is.items() if key in changes and changes[key] != value]
    words = {"num_fewshot": f"{shots}shot", "metric": str(item.get("metric")).replace(",", "_"), "mean": f"by_{mean}"}
    # Under its own name a benchmark of ours is what its suite says; changed, it is another one.
    name = "_".join([found.name, *(str(words[key]) for key in changed)]) if found.name in BENCHMARKS else found.name
    name = names.checked(item.get("name", name), f"{where}: name")
    if _is_ours(name) and (changed or found.name != name):
        raise UserError(f"{where}: name {name!r} is one of ours", fix="give it another name")
    variant = name != found.name
    title = item.get("title") or (name if variant else found.title)
    task = found.lm_eval_name if variant else found.task
    return dataclasses.replace(found, name=name, title=title, task=task, variant=variant, **changes)


def _own(path: Path, where: str) -> Benchmark:
    """A task that a file of the user's own defines."""
    found = mapping(path, "task", f"{where}: ")
    if not isinstance(found.get("task"), str):
        kind = "a group: name its tasks one by one" if "group" in found else "no lm-eval task: it has no task: NAME"
        raise UserError(f"{where}: {path} is {kind}", fix=FIX)
    name = names.checked(found["task"], f"{where}: {path}: task")
    if _is_ours(name):
        raise UserError(f"{where}: {path} defines {name!r}, which is one of ours", fix="give it another name")
    return Benchmark(name, name, "", found.get("num_fewshot"), str(path.resolve()), own=True)
