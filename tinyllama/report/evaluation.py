"""Scores beside the published rows: over checkpoints, by task, and as a table. Protocols are named wherever they count.

Reads results and published rows through `evalsuite.scores`, by name: the core does not depend on it.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
from typing import Any

from tinyllama import units
from tinyllama.errors import UserError, nearest
from tinyllama.report.curves import MARKERS
from tinyllama.report.inputs import Run
from tinyllama.report.numbers import compact, listed
from tinyllama.report.picture import MUTED, Axis, Picture, Section, Series, Table

FAMILIES = ("TinyLlama", "Pythia", "OPT")
HOLLOW = ("D", "s", "^", "v", "o")  # markers of what is there to compare with
COMPARED = ("TinyLlama-1.1B 3T", "Pythia-1.0B", "OPT-1.3B")  # beside the scores by task
Evaluated = list[tuple[str, list[Any]]]  # a run's name, and its models of evalsuite.scores in order of tokens
DATA_NOTE = "The published rows are of the real data sets; these are of the small bundle mini: not to be compared."


def read(runs: list[Run]) -> Evaluated:
    """The evaluations of each run that has any, those of fewer tokens first. UserError for a file that is not whole."""
    scores = importlib.import_module("evalsuite.scores")
    found = []
    for run in runs:
        models = [scores.load(str(path)) for path in run.evaluations]
        models = [model for model in models if model.scores]
        if models:
            found.append((run.name, sorted(models, key=lambda m: m.tokens or math.inf)))
    return found


def published() -> list[Any]:
    """Every published model, as a model of evalsuite.scores."""
    scores, rows = importlib.import_module("evalsuite.scores"), importlib.import_module("evalsuite.published").rows()
    return [scores.load(f"{scores.PUBLISHED}{name}") for name in dict.fromkeys(row.model for row in rows)]


def choose_quality(evaluated: Evaluated, asked: str | None) -> str | None:
    """The suite or task that quality means: the one asked for, else the first suite that every run has, else any score."""
    names = list(dict.fromkeys(name for _, models in evaluated for model in models for name in model.scores))
    suites = list(importlib.import_module("evalsuite.suites").SUITES)
    if asked is not None:
        known = names or [*suites, *importlib.import_module("evalsuite.suites").BENCHMARKS]
        if asked not in known:
            raise UserError(f"--quality {asked} is in no evaluation", fix=nearest(asked, known))
        return asked
    everywhere = [name for name in names if all(any(name in m.scores for m in models) for _, models in evaluated)]
    ordered = [name for name in suites if name in everywhere] + [name for name in everywhere if name not in suites]
    return ordered[0] if ordered else (names[0] if names else None)


def title(name: str) -> str:
    """A suite's or a task's name for readers."""
    suites = importlib.import_module("evalsuite.suites")
    if name in suites.SUITE_TITLES:
        return f"{suites.SUITE_TITLES[name]}, mean"
    return suites.BENCHMARKS[name].title if name in suites.BENCHMARKS else name


def short(name: str) -> str:
    benchmarks = importlib.import_module("evalsuite.suites").BENCHMARKS
    return benchmarks[name].short if name in benchmarks else name


def conditions(evaluated: Evaluated, name: str, others: list[Any]) -> list[str]:
    """Under which protocol a score was measured, ours and the published ones; what forbids to compare them."""
    scores = importlib.import_module("evalsuite.scores")
    own = [model.scores[name] for _, models in evaluated for model in models if name in model.scores]
    rows = [model.scores[name] for model in others if name in model.scores]
    notes = [f"Measured: {text}." for text in dict.fromkeys(scores.setting(score) for score in own)]
    notes += [f"Published: {text}." for text in dict.fromkeys(row.protocol for row in rows)]
    if own and rows:
        apart = {scores.family(s.protocol) for s in own if any(scores.other_sense(row, s) for row in rows)}
        if apart:
            which = " and ".join(sorted(apart))
            notes.append(
                f"Another protocol is another scale: the published values are no yardstick for those of {which}."
            )
        if any(score.bundle == scores.MINI for score in own):
            notes.append(DATA_NOTE)
    if any(row.low_confidence for row in rows):
        notes.append("† recalled, not read in a primary source.")
    return notes


def _slug(name: str) -> str:
    """A name as part of an id and of a file's name."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-") or "score"


def values(models: list[Any], *names: str) -> dict[str, Any]:
    """y, low and high of a series, shares in percent: one score of each model, or each model's own of `names`."""
    scores = [
        model.scores[name] for model, name in zip(models, names * (len(models) if len(names) == 1 else 1), strict=True)
    ]
    bounds = {
        end: [None if s.interval is None else units.scale(s.unit) * getattr(s.interval, end) for s in scores]
        for end in ("low", "high")
    }
    return {"y": [units.scale(s.unit) * s.value for s in scores], **bounds}


def axis(unit: str) -> Axis:
    """Of scores in this unit."""
    return Axis("score", "percent") if unit == units.SHARE else Axis(units.words(unit) or "score")


def written(score: Any) -> str:
    """`34.5%`, or `1.234 bits per byte`."""
    value = units.text(score.value, score.unit, 1)
    return f"{value}%" if score.unit == units.SHARE else f"{value} {units.words(score.unit)}".strip()


def _told(score: Any) -> str:
    """`34.5% (31.0 to 38.1)`."""
    interval = score.interval
    if interval is None:
        return written(score)
    low, high = (units.text(end, score.unit, 1) for end in (interval.low, interval.high))
    return f"{written(score)} ({low} to {high})"


def _unit(models: list[Any], name: str) -> str:
    return str(next((m.scores[name].unit for m in models if name in m.scores), units.SHARE))


def _families(models: list[Any], tasks: list[str]) -> list[str]:
    """The protocols that these scores were measured under, in the order of the models."""
    family = importlib.import_module("evalsuite.scores").family
    return list(dict.fromkeys(family(m.scores[t].protocol) for m in models for t in tasks if t in m.scores))


def latest(evaluated: Evaluated, tasks: list[str]) -> list[tuple[str, Any, int]]:
    """For each run and protocol the last score of each task, as one model: (label, model, number of the run).

    A checkpoint may have been evaluated in parts, and under both protocols.
    """
    family = importlib.import_module("evalsuite.scores").family
    found = []
    for number, (run, models) in enumerate(evaluated):
        families = _families(models, tasks)
        for name in families:
            last: dict[str, Any] = {}
            for model in models:
                last |= {t: model for t in tasks if t in model.scores and family(model.scores[t].protocol) == name}
            newest = max(last.values(), key=models.index)
            merged = dataclasses.replace(newest, scores={task: model.scores[task] for task, model in last.items()})
            found.append((run if len(families) == 1 else f"{run} ({name})", merged, number))
    return found


def over_tokens(evaluated: Evaluated, name: str, others: list[Any]) -> Picture | None:
    """A score over the tokens that its checkpoints have seen, the published families behind; None if no tokens are known."""
    series, findings = [], []
    family_of = importlib.import_module("evalsuite.scores").family
    unit = _unit([model for _, models in evaluated for model in models], name)
    for number, (run, models) in enumerate(evaluated):
        known = [m for m in models if m.tokens and name in m.scores]
        families = _families(known, [name])
        for place, family in enumerate(families):
            own = [m for m in known if family_of(m.scores[name].protocol) == family]
            x, label = [float(m.tokens) for m in own], run if len(families) == 1 else f"{run} ({family})"
            marker = MARKERS[number % len(MARKERS)]
            series.append(Series(label, x, **values(own, name), color=number, dash=place, marker=marker))
            findings.append(f"{label} has {_told(own[-1].scores[name])} after {compact(x[-1])} tokens")
    if not series:
        return None
    for place, family in enumerate(FAMILIES):
        rows = [m for m in others if m.name.startswith(family) and name in m.scores and "v1" not in m.name]
        rows.sort(key=lambda m: (m.tokens, m.scores[name].value))
        if not rows:
            continue
        line = len({m.tokens for m in rows}) > 1
        found, x, marker = values(rows, name), [float(m.tokens) for m in rows], HOLLOW[place]
        names = [_marked(m, name) for m in rows]
        label = f"{family}, published"
        series.append(
            Series(label, x, **found, color=MUTED, dash=2, marker=marker, line=line, hollow=True, names=names)
        )
        findings.append(f"{rows[-1].name} {_told(rows[-1].scores[name])} after {compact(x[-1])}")
    return Picture(
        f"over-tokens-{_slug(name)}",
        f"{title(name)}, over tokens",
        f"{listed(findings, '; ')}.",
        Axis("tokens trained on", "tokens", "log"),
        axis(unit),
        series,
        ["Bars: 95% intervals.", *conditions(evaluated, name, others)],
    )


def _marked(model: Any, name: str) -> str:
    return f"{model.name}†" if model.scores[name].low_confidence else model.name


def by_task(evaluated: Evaluated, suite: str, members: list[str], others: list[Any]) -> Picture | None:
    """The last evaluation of each run, task by task, between published models."""
    chosen = latest(evaluated, members)
    tasks = [t for t in members if any(t in model.scores for _, model, _ in chosen)]
    if not tasks:
        return None
    unit = _unit([model for _, model, _ in chosen], tasks[0])
    tasks = [t for t in tasks if _unit([model for _, model, _ in chosen], t) == unit]
    rows = [(f"{m.name}†" if m.low_confidence else m.name, m, MUTED) for m in others if m.name in COMPARED]
    shown = [(label, m, color) for label, m, color in (*chosen, *rows) if any(t in m.scores for t in tasks)]
    series, findings = [], []
    for place, (label, model, color) in enumerate(shown):
        own = [(i, t) for i, t in enumerate(tasks) if t in model.scores]
        offset = 0.7 * ((place + 0.5) / len(shown) - 0.5)
        marker = MARKERS[place % len(MARKERS)] if color != MUTED else HOLLOW[place % len(HOLLOW)]
        series.append(
            Series(
                label,
                [i + offset for i, _ in own],
                **values([model] * len(own), *(t for _, t in own)),
                color=color,
                marker=marker,
                line=False,
                hollow=color == MUTED,
            )
        )
        if color != MUTED:
            findings.append(
                f"{label}: {', '.join(f'{short(t)} {units.text(model.scores[t].value, unit, 1)}' for _, t in own)}"
            )
    return Picture(
        f"by-task-{_slug(suite)}",
        f"{title(suite).removesuffix(', mean')}, by task",
        f"{units.words(unit).capitalize() or 'Scores'}. {listed(findings, '; ')}.",
        Axis("task"),
        axis(unit),
        series,
        ["Bars: 95% intervals.", *conditions(evaluated, tasks[0], [m for m in others if m.name in COMPARED])],
        categories=[short(t) for t in tasks],
    )


def table(evaluated: Evaluated, suite: str, columns: list[str], others: list[Any]) -> Table | None:
    """A row for each run's last evaluation and each published model; values with their intervals."""
    own = latest(evaluated, columns)
    columns = [c for c in columns if any(c in model.scores for _, model, _ in own)]
    if not columns:
        return None
    rows = []
    named = [(f"{name}, last" if len(evaluated[run][1]) > 1 else name, model) for name, model, run in own]
    for label, model in (*named, *((m.name, m) for m in others)):
        if any(c in model.scores for c in columns):
            cells = [_cell(model.scores.get(c)) for c in columns]
            rows.append([label, compact(model.tokens) if model.tokens else "not known", *cells])
    models = [model for _, model, _ in own]
    of = {c: _unit(models, c) for c in columns}
    words = units.words(next(iter(of.values()))) if len(set(of.values())) == 1 else ""
    named_columns = ["mean" if c == suite else short(c) for c in columns]
    if not words:
        named_columns = [f"{n}, {units.words(of[c])}".rstrip(", ") for c, n in zip(columns, named_columns, strict=True)]
    heading = ", ".join(part for part in (title(suite).removesuffix(", mean"), words, "with 95% intervals") if part)
    return Table(heading, ["model", "tokens", *named_columns], rows, conditions(evaluated, columns[0], others))


def _cell(score: Any) -> str:
    if score is None:
        return "–"
    value = f"{units.text(score.value, score.unit, 1)}{'†' if score.low_confidence else ''}"
    if score.interval is None:
        return value
    low, high = (units.text(end, score.unit, 1) for end in (score.interval.low, score.interval.high))
    return f"{value}\n{low}–{high}"


def section(evaluated: Evaluated, quality: str | None) -> Section:
    """Tables and pictures of every suite, of the quality asked for, and of other tasks."""
    suites = importlib.import_module("evalsuite.suites").SUITES
    others, pictures, tables, left_out = published(), [], [], []
    given = {s: members for _, models in evaluated for m in models for s, members in m.suites.items()}
    parts = {s: [b.name for b in members] for s, members in suites.items()} | given
    for suite, members in parts.items():
        if not any(t in m.scores for _, models in evaluated for m in models for t in (*members, suite)):
            continue
        pictures += [over_tokens(evaluated, suite, others), by_task(evaluated, suite, members, others)]
        tables.append(table(evaluated, suite, [*members, suite], others))
    known = {*parts, *(t for members in parts.values() for t in members)}
    rest = list(dict.fromkeys(t for _, models in evaluated for m in models for t in m.scores if t not in known))
    if rest:
        tables.append(table(evaluated, "other tasks", rest, []))
    if quality and quality not in parts:
        pictures.append(over_tokens(evaluated, quality, others))
    for name, models in evaluated:
        if not any(model.tokens for model in models):
            left_out.append(f"{name}: nothing says how many tokens it has seen; it is in no picture over tokens.")
    return Section("evaluation", "Evaluation", [t for t in tables if t], [p for p in pictures if p], left_out)
