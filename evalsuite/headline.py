"""Which of a task's metrics is its score: the one that is asked for, else the task's own first one, acc_norm before acc."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tinyllama.errors import UserError
from tinyllama.units import OTHER, lower_is_better, unit_of, words


def choose(asked: str, listed: Sequence[str]) -> str:
    """The headline metric of a task that lists these, in its own order."""
    if asked:
        return asked
    return "acc_norm" if listed[0] == "acc" and "acc_norm" in listed else listed[0]


def in_order(config: dict[str, Any], found: Iterable[str]) -> list[str]:
    """The metrics found in results, in the order of the task's definition; others after them, as they were found."""
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY

    given = [metric.get("metric") for metric in config.get("metric_list") or []]
    given = given or list(DEFAULT_METRIC_REGISTRY.get(config.get("output_type") or "generate_until", []))
    found = list(dict.fromkeys(found))
    return [str(name) for name in given if name in found] + [name for name in found if name not in given]


def _expected(task: Any) -> tuple[str, bool] | None:
    """The headline metric of a prepared benchmark, and whether higher is better; None where only running it can say."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = task.manager.task_index.get(task.leaves[0])
    if entry is None or entry.yaml_path is None:
        return None
    config = load_yaml(entry.yaml_path, resolve_func=False)
    listed = [str(metric.get("metric")) for metric in config.get("metric_list") or []]
    higher = {str(m.get("metric")): m.get("higher_is_better") for m in config.get("metric_list") or []}
    if "class" in config and not listed:
        return None
    listed = listed or in_order(config, ()) or _defaults(config)
    if not listed:
        return None
    metric = choose(task.benchmark.metric, listed).partition(",")[0]
    known = higher.get(metric)
    return metric, not lower_is_better(metric) if known is None else bool(known)


def _defaults(config: dict[str, Any]) -> list[str]:
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY

    return list(DEFAULT_METRIC_REGISTRY.get(config.get("output_type") or "generate_until", []))


def refuse_mixed_units(suites: Iterable[Any], prepared: Iterable[Any]) -> None:
    """UserError, before a model is loaded, for a suite whose tasks' scores have no common unit, and so no mean."""
    expected = {task.benchmark.name: _expected(task) for task in prepared}
    for suite in suites:
        known = {m.name: found for m in suite.members if (found := expected.get(m.name))}
        kinds = {kind(metric, unit_of(metric), higher) for metric, higher in known.values()}
        if len(kinds) > 1:
            told = ", ".join(f"{name} in {words(unit_of(metric)) or metric}" for name, (metric, _) in known.items())
            fix = "give each kind of score a suite of its own, or name a metric"
            if any(unit_of(metric) == OTHER for metric, _ in known.values()):
                fix += "; a share's name has a word like acc, match or correct in it (my_match)"
            raise UserError(f"suite {suite.name} has no mean: {told}", fix=fix)


def kind(metric: str | None, unit: str, higher: bool) -> tuple[str, str, bool]:
    """Scores of one kind have a mean: the same unit, and the same way up; of an unknown unit the same metric."""
    return unit, (metric or "") if unit == OTHER else "", higher
