"""The items of an evaluation's scores: `samples/<benchmark>.jsonl`, and what the scores and their errors are made of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from evalsuite import names
from tinyllama.item_log import EXPONENTIALS as EXPONENTIALS
from tinyllama.item_log import Item as Item
from tinyllama.item_log import cluster_of
from tinyllama.item_log import items as items
from tinyllama.item_log import read as read
from tinyllama.stats.intervals import Estimate, Interval, combined, describe
from tinyllama.units import SHARE, unit_of

Averaging = Literal["items", "leaves"]


def path_of(folder: Path, benchmark: str) -> Path:
    """The log of a benchmark in an evaluation's folder."""
    return names.under(folder / "samples", benchmark, ".jsonl")


def rows(
    samples: dict[str, Any],
    protocol: str,
    asked: dict[str, tuple[list[int], int]] | None = None,
    cluster: str | None = None,
) -> Iterator[dict[str, Any]]:
    """lm-eval's samples of each leaf task as the lines of a log. asked: of tasks that leave rows out, which they ask.
    cluster: the items' field whose content they share; None for the usual fields.
    """
    for leaf, entries in samples.items():
        of_leaf = (asked or {}).get(leaf)
        for entry in entries:
            row = {"row": of_leaf[0][entry["doc_id"]]} if of_leaf else {}
            yield {"task": leaf, "protocol": protocol, "cluster": cluster_of(entry["doc"], cluster), **row, **entry}


@dataclasses.dataclass(frozen=True)
class Mean:
    """A score of some items; without an error or an interval where too few are left for one."""

    value: float
    stderr: float | None
    interval: Interval | None


def by_leaf(found: Sequence[Item]) -> dict[str, list[Item]]:
    """The items of each leaf task."""
    leaves: dict[str, list[Item]] = {}
    for item in found:
        leaves.setdefault(item.key.leaf, []).append(item)
    return leaves


def estimate(found: Sequence[Item], share: bool = True) -> Estimate:
    """The mean of items, by their sizes, with the error of their clusters."""
    sizes = [item.size for item in found]
    return describe(
        [item.value for item in found],
        [item.group for item in found],
        None if all(size == 1 for size in sizes) else sizes,
        share,
    )


def mean(found: Sequence[Item], by: Averaging, share: bool = True) -> Mean | None:
    """The score of these items: their mean, or the mean of their leaf tasks' means. None for no items."""
    if not found:
        return None
    leaves = by_leaf(found)
    parts = [estimate(own, share) for own in leaves.values()]
    if by == "items":
        sizes = [math.fsum(item.size for item in own) for own in leaves.values()]
        _, stderr, interval = combined([size / math.fsum(sizes) for size in sizes], parts)
        # Where leaves have no error of their own, all items together have.
        whole = estimate(found, share)
        return Mean(whole.value, whole.stderr if len(parts) == 1 or stderr is None else stderr, interval)
    return Mean(*combined([1 / len(parts)] * len(parts), parts))


def averagings(value: float, found: Sequence[Item], metric: str = "") -> tuple[Averaging, ...]:
    """Which means of these items a score is: both where they are equal, none for a BLEU, say, or a log of another
    evaluation. metric: a perplexity is e to the mean of its items.
    """
    choices: tuple[Averaging, ...] = ("items", "leaves")
    if not found:
        return ()
    goal = value
    if metric in EXPONENTIALS:
        if not 0 < value < math.inf:
            return ()
        goal = math.log(value)
    leaves = [
        (math.fsum(i.value * i.size for i in own), math.fsum(i.size for i in own)) for own in by_leaf(found).values()
    ]
    means = {
        "items": math.fsum(total for total, _ in leaves) / math.fsum(size for _, size in leaves),
        "leaves": math.fsum(total / size for total, size in leaves) / len(leaves),
    }
    return tuple(choice for choice in choices if math.isclose(means[choice], goal, rel_tol=1e-6, abs_tol=1e-9))


def add_intervals(entry: dict[str, Any], found: Sequence[Item]) -> None:
    """Give a benchmark's entry in results.json, and each of its leaf tasks, a `ci95`: from the items if the score is a mean
    of them, else from its standard error. Scores of items in clusters get the clusters' standard error.

    `effective_n`, `dof`, `units`: see `tinyllama.stats.intervals.Estimate`, from which suites' intervals are made.
    `clusters`: how many there are, where some hold several items.
    """
    leaves = by_leaf(found)
    values = (entry["value"], *(item.value for item in found))
    unit = entry["unit"] = unit_of(entry["metric"], *values, task=entry.get("task"))
    for part, own in [(entry, found), *((leaf, leaves.get(name, [])) for name, leaf in entry["leaves"].items())]:
        how = averagings(part["value"], own, entry["metric"])
        kinds = sorted(how, key=lambda kind: kind != part.get("mean"))  # the benchmark's own first
        exponential = entry["metric"] in EXPONENTIALS
        interval = None
        if kinds:
            score = mean(own, kinds[0], unit == SHARE)
            interval = score.interval if score else None
            if len(by_leaf(own)) == 1:
                _describe_part(part, estimate(own, unit == SHARE))
            groups = {item.group or item.key for item in own}
            if score and len(groups) < len(own):
                part["clusters"] = len(groups)
                part["stderr"] = score.stderr if not exponential else None
            elif score and part["stderr"] is None and not exponential:
                part["stderr"] = score.stderr
            if exponential and score and score.stderr is not None:
                part["stderr"] = part["value"] * score.stderr  # to first order
            if exponential and interval:
                interval = Interval(math.exp(interval.low), math.exp(interval.high), "t, of the logarithm")
        elif part["stderr"]:
            half = 1.959963984540054 * part["stderr"]
            interval = Interval(part["value"] - half, part["value"] + half, "normal")
        part["ci95"] = dataclasses.asdict(interval) if interval else None


def _describe_part(part: dict[str, Any], found: Estimate) -> None:
    dof = found.dof if math.isfinite(found.dof) else None
    part.update(effective_n=found.effective_n, dof=dof, units=found.units)
