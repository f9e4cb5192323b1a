"""The per-item logs of an evaluation: `samples/<benchmark>.jsonl`, a line for each item and filter, as lm-eval logs it.

What two evaluations asked alike is found by task, filter, and the hashes of the item and of its whole prompt, never by
`doc_id`: that is a position, and other data, shots or limits put another item there.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from evalsuite import names, statistics
from tinyllama.errors import UserError

Averaging = Literal["items", "leaves"]


class Key(NamedTuple):
    """What makes an item the same in two evaluations. `repeat` counts the equal ones before it: a data set may have some."""

    leaf: str
    filter: str
    doc_hash: str
    prompt_hash: str
    repeat: int


@dataclasses.dataclass(frozen=True)
class Item:
    """One item's score by the headline metric, and its position in the task's rows."""

    key: Key
    doc_id: int
    value: float


def path_of(folder: Path, benchmark: str) -> Path:
    """The log of a benchmark in an evaluation's folder."""
    return names.under(folder / "samples", benchmark, ".jsonl")


def items(entries: Iterable[dict[str, Any]], metric_key: str) -> list[Item]:
    """The items of a log by one metric ("acc_norm,none": name and filter). Without what has no number for it."""
    metric, _, filter_name = metric_key.partition(",")
    seen: Counter[tuple[str, str, str, str]] = Counter()
    found = []
    for entry in entries:
        value = entry.get(metric)
        if entry["filter"] != filter_name or not isinstance(value, int | float) or not math.isfinite(value):
            continue
        same = (entry["task"], filter_name, entry["doc_hash"], entry["prompt_hash"])
        found.append(Item(Key(*same, seen[same]), int(entry.get("row", entry["doc_id"])), float(value)))
        seen[same] += 1
    return found


def read(path: Path, metric_key: str) -> list[Item]:
    """The items of a log file; UserError names a line that is none."""

    def entries() -> Iterator[dict[str, Any]]:
        with open(path, encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    entry = json.loads(line)
                    yield {k: entry[k] for k in ("task", "filter", "doc_hash", "prompt_hash", "doc_id")} | entry
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(
                        f"{path}:{number} is no sample of an evaluation ({error})", fix="evaluate again"
                    ) from None

    return items(entries(), metric_key)


def rows(
    samples: dict[str, Any], protocol: str, asked: dict[str, tuple[list[int], int]] | None = None
) -> Iterator[dict[str, Any]]:
    """lm-eval's samples of each leaf task as the lines of a log. asked: of tasks that leave rows out, which they ask."""
    for leaf, entries in samples.items():
        of_leaf = (asked or {}).get(leaf)
        for entry in entries:
            row = {"row": of_leaf[0][entry["doc_id"]]} if of_leaf else {}
            yield {"task": leaf, "protocol": protocol, **row, **entry}


@dataclasses.dataclass(frozen=True)
class Mean:
    """A score of some items; without an error or an interval where too few are left for one."""

    value: float
    stderr: float | None
    interval: statistics.Interval | None


def by_leaf(found: Sequence[Item]) -> dict[str, list[Item]]:
    """The items of each leaf task."""
    leaves: dict[str, list[Item]] = {}
    for item in found:
        leaves.setdefault(item.key.leaf, []).append(item)
    return leaves


def mean(found: Sequence[Item], by: Averaging) -> Mean | None:
    """The score of these items: their mean, or the mean of their leaf tasks' means. None for no items."""
    if not found:
        return None
    if by == "items":
        values = np.array([item.value for item in found])
        stderr = statistics.standard_error(values) if len(values) > 1 else None
        return Mean(math.fsum(values) / len(values), stderr, statistics.mean_interval(values))
    parts = [mean(items, "items") for items in by_leaf(found).values()]
    value = math.fsum(part.value for part in parts if part) / len(parts)
    stderrs = [part.stderr for part in parts if part and part.stderr is not None]
    if len(stderrs) < len(parts):
        return Mean(value, None, None)
    stderr = math.hypot(*stderrs) / len(parts)
    return Mean(value, stderr, statistics.normal(value, stderr))


def averagings(value: float, found: Sequence[Item]) -> tuple[Averaging, ...]:
    """Which means of these items a score is: both where they are equal, none for a perplexity, say, or a log of another
    evaluation.
    """
    choices: tuple[Averaging, ...] = ("items", "leaves")
    means = {choice: mean(found, choice) for choice in choices}
    return tuple(c for c, m in means.items() if m and math.isclose(m.value, value, rel_tol=1e-6, abs_tol=1e-9))


def add_intervals(entry: dict[str, Any], found: Sequence[Item]) -> None:
    """Give a benchmark's entry in results.json, and each of its leaf tasks, a `ci95`: from the items if the score is a mean
    of them, else from its standard error.
    """
    leaves = by_leaf(found)
    for part, own in [(entry, found), *((leaf, leaves.get(name, [])) for name, leaf in entry["leaves"].items())]:
        how = averagings(part["value"], own)
        kinds = sorted(how, key=lambda kind: kind != part.get("mean"))  # the benchmark's own first
        scores = [mean(own, kind) for kind in kinds]
        interval = next((score.interval for score in scores if score and score.interval), None)
        if not how and part["stderr"] is not None:
            interval = statistics.normal(part["value"], part["stderr"])
        part["ci95"] = dataclasses.asdict(interval) if interval else None
