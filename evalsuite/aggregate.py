"""Scores of suites from those of their benchmarks, and what is known of the error of a score in results.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from evalsuite import suites
from evalsuite.headline import kind
from tinyllama.stats.intervals import Estimate, combined
from tinyllama.units import SHARE
from tinyllama.units import of_entry as unit

Parts = list[tuple[float, Estimate]]  # independent parts of a score, each with its weight


def estimate(entry: dict[str, Any], share: bool, count: int | None = None) -> Estimate:
    """Of an entry or one of its leaves. In files that say no effective count it follows from the standard error."""
    value, stderr, n = entry["value"], entry["stderr"], float(entry.get("n") or count or 1)
    value = min(1.0, max(0.0, value)) if share else value  # but for rounding it is there
    if "effective_n" in entry:
        dof = math.inf if entry["dof"] is None else float(entry["dof"])
        return Estimate(value, stderr, float(entry["effective_n"]), dof, float(entry["units"]), share)
    effective = value * (1 - value) / stderr**2 if share and stderr and 0 < value < 1 else n
    return Estimate(value, stderr, effective, math.inf if share else max(1.0, n - 1), n, share)


def parts(entry: dict[str, Any]) -> Parts:
    """The leaf tasks of an entry, as they are weighed in it; itself where it has none."""
    share = unit(entry) == SHARE
    leaves = list((entry.get("leaves") or {}).values())
    if not leaves:
        return [(1.0, estimate(entry, share))]
    by_leaves = entry.get("mean") == "leaves"
    total = sum(leaf["n"] for leaf in leaves)
    return [(1 / len(leaves) if by_leaves else leaf["n"] / total, estimate(leaf, share)) for leaf in leaves]


def whole(entry: dict[str, Any]) -> Estimate | None:
    """The score of an entry as one number of independent items; None where nothing is known of its error."""
    share, found = unit(entry) == SHARE, parts(entry)
    if len(found) == 1:
        known = found[0][1]
        return known if share or known.stderr is not None else None
    value, stderr, interval = combined([weight for weight, _ in found], [part for _, part in found])
    if stderr is None or interval is None:
        return None
    units = math.fsum(part.units for _, part in found)
    effective = value * (1 - value) / stderr**2 if share and stderr and 0 < value < 1 else units
    return Estimate(entry["value"], stderr, effective, math.inf, units, share)


def _kind(entry: dict[str, Any]) -> tuple[str, str, bool]:
    return kind(entry.get("metric"), unit(entry), entry.get("higher_is_better", True))


def suite_mean(tasks: dict[str, Any], members: Sequence[str]) -> dict[str, Any] | None:
    """The unweighted mean of benchmarks, with its error; None where their units differ."""
    kinds = {_kind(tasks[member]) for member in members}
    if len(kinds) > 1:
        return None
    found = [(weight / len(members), part) for member in members for weight, part in parts(tasks[member])]
    weights, estimates = zip(*found, strict=True)
    _, stderr, interval = combined(weights, estimates)
    return {
        "value": math.fsum(tasks[member]["value"] for member in members) / len(members),
        "stderr": stderr,
        "ci95": None if interval is None else dataclasses.asdict(interval),
        "unit": unit(tasks[members[0]]),
        "higher_is_better": tasks[members[0]].get("higher_is_better", True),
        "benchmarks": list(members),
        "protocol": "+".join(sorted({tasks[member]["protocol"] for member in members})),
    }


def suite_means(tasks: dict[str, Any], own: Sequence[tuple[str, list[str]]] = ()) -> dict[str, Any]:
    """The mean of each suite whose every benchmark is there."""
    ours = [(name, [member.name for member in members]) for name, members in suites.SUITES.items()]
    whole = [(name, members) for name, members in (*ours, *own) if all(member in tasks for member in members)]
    means = {name: suite_mean(tasks, members) for name, members in whole}
    return {name: found for name, found in means.items() if found}
