"""`--fail-if-drop`: which scores fell by more than they may, and not by chance. For continuous integration."""

from __future__ import annotations

import math
from collections.abc import Sequence

from evalsuite.compare import Comparison, Report
from tinyllama import units
from tinyllama.errors import UserError, nearest


def drops(report: Report, limits: Sequence[str]) -> list[Comparison]:
    """The comparisons that are worse by more than their limit, and significantly so.

    limits: "LIMIT" for every score of the first model, "TASK=LIMIT" for one; in percentage points of shares, in the score's
    own unit elsewhere, so that one limit for scores of several units is refused. UserError for a bad limit, and for a score
    that could not be tested: a gate that looked at nothing must not pass.
    """
    if len(report.models) < 2:
        raise UserError("--fail-if-drop needs two results", fix="give the one to compare with first")
    default, named = _limits(limits, list(report.models[0].scores))
    _refuse_one_limit_for_several_units(report, default, named)
    failed = []
    for model in report.models[1:]:
        for task in report.models[0].scores:
            limit = named.get(task, default)
            if limit is None:
                continue
            found = report.comparison(model, task)
            if found is None or found.test is None:
                reason = found.reason if found else "it has no such score"
                raise UserError(
                    f"--fail-if-drop cannot judge {task} of {model.name}: {reason}",
                    fix="evaluate both alike, or name the scores to judge as TASK=POINTS",
                )
            if found.significant and -units.scale(found.unit) * found.gain > limit:
                failed.append(found)
    return failed


def _refuse_one_limit_for_several_units(report: Report, default: float | None, named: dict[str, float]) -> None:
    own = {task: score.unit for task, score in report.models[0].scores.items() if task not in named}
    if default is not None and len(set(own.values())) > 1:
        told = ", ".join(f"{task} in {units.words(unit) or 'its own unit'}" for task, unit in own.items())
        other = next(task for task, unit in own.items() if unit != units.SHARE)
        raise UserError(
            f"--fail-if-drop {default:g} for scores of several units: {told}", fix=f"give limits by name: {other}=LIMIT"
        )


def _limits(limits: Sequence[str], tasks: list[str]) -> tuple[float | None, dict[str, float]]:
    """The limit for every score, and those for named ones."""
    default, named = None, {}
    for text in limits:
        task, separator, points = text.rpartition("=")
        try:
            value = float(points)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise UserError(f"--fail-if-drop {text}", fix="give percentage points, 0 or more: 1.5 or hellaswag=1.5")
        if separator and task not in tasks:
            raise UserError(f"--fail-if-drop {text}: the first result has no {task!r}", fix=nearest(task, tasks))
        if separator:
            named[task] = value
        else:
            default = value
    return default, named


def line(failed: Sequence[Comparison]) -> str:
    """What fell, in one line."""
    parts = [f"{c.model} {c.task} {_change(c)} (p = {c.p_holm:.2g})" for c in failed]
    # Of a score that is better when it is lower, what got worse did not drop.
    return f"scores {'dropped' if all(c.higher_is_better for c in failed) else 'got worse'}: {', '.join(parts)}"


def _change(comparison: Comparison) -> str:
    change = units.text(comparison.change, comparison.unit, signed=True)
    return f"{change} {units.difference_words(comparison.unit)}".strip()
