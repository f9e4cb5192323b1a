"""A comparison as a picture: every score with its 95% interval, or the course of one run's scores over tokens.

Drawn by `tinyllama.report`, which needs matplotlib. Protocols and what forbids to compare stand below the picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from evalsuite.scores import PUBLISHED, Model
from evalsuite.suites import BENCHMARKS, SUITE_TITLES
from tinyllama.data.durable import refuse_foreign, write_text
from tinyllama.errors import MissingExtraError, UserError
from tinyllama.units import SHARE

if TYPE_CHECKING:
    from evalsuite.compare import Report
    from tinyllama.report.picture import Picture


def _title(task: str) -> str:
    """A suite's mean stands at the end of its benchmarks."""
    return BENCHMARKS[task].short if task in BENCHMARKS else "mean" if task in SUITE_TITLES else task


def _is_published(model: Model) -> bool:
    return model.source.startswith(PUBLISHED)


def picture(report: Report, curve: bool = False) -> Picture:
    """A column for each score and a mark for each model; with `curve` a line for each suite's mean over tokens."""
    from tinyllama.report import evaluation
    from tinyllama.report.picture import MUTED, Axis, Picture, Series

    evaluated = [(model.name, [model]) for model in report.models if not _is_published(model)]
    others = [model for model in report.models if _is_published(model)]
    tasks = report.tasks()
    shown = [task for task in tasks if task in report.suites] or tasks if curve else tasks
    unit_of = {task: next(m.scores[task].unit for m in report.models if task in m.scores) for task in shown}
    unit = SHARE if SHARE in unit_of.values() else unit_of[shown[0]]
    left_out = [task for task in shown if unit_of[task] != unit]
    shown = [task for task in shown if unit_of[task] == unit]
    series, findings, markers = [], [], "os^DvP"
    if curve:
        for place, task in enumerate(shown):
            models = [model for model in report.models if task in model.scores]
            values, x = evaluation.values(models, task), [float(model.tokens or 0) for model in models]
            marker = markers[place % len(markers)]
            label = f"{task}, mean" if task in report.suites else _title(task)
            series.append(Series(label, x, **values, color=place, dash=place, marker=marker))
            ends = [evaluation.written(models[end].scores[task]) for end in (0, -1)]
            findings.append(f"{label} {ends[0]} to {ends[1]}")
    else:
        for place, model in enumerate(report.models):
            own = [(i, task) for i, task in enumerate(shown) if task in model.scores]
            offset = 0.7 * ((place + 0.5) / len(report.models) - 0.5)
            x = [i + offset for i, _ in own]
            hollow, marker = _is_published(model), markers[place % len(markers)]
            label = f"{model.name}†" if model.low_confidence else model.name
            values = evaluation.values([model] * len(own), *(task for _, task in own))
            color = MUTED if hollow else place
            series.append(Series(label, x, **values, color=color, marker=marker, line=False, hollow=hollow))
            findings.append(
                f"{label}: {', '.join(f'{_title(task)} {evaluation.written(model.scores[task])}' for _, task in own)}"
            )
    notes = ["Bars: 95% intervals."]
    if left_out:
        notes.append(f"Left out, in other units: {', '.join(map(_title, left_out))}.")
    for task in shown:
        notes += [n for n in evaluation.conditions(evaluated, task, others) if n not in notes]
    return Picture(
        "comparison",
        "Scores over tokens" if curve else "Scores",
        f"{'; '.join(findings)}.",
        Axis("tokens trained on", "tokens", "log") if curve else Axis("score"),
        evaluation.axis(unit),
        series,
        notes,
        categories=None if curve else [_title(task) for task in shown],
    )


def write(report: Report, path: Path, curve: bool = False) -> None:
    """Write the picture as SVG. MissingExtraError without matplotlib, UserError for another kind of file."""
    import importlib.util

    check_name(path)
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "report")
    from tinyllama.report import drawing

    refuse_foreign(path, drawing.is_file, "a picture of ours")
    write_text(path, [drawing.svg(picture(report, curve), "light", notes=True)])


def check_name(path: Path) -> None:
    """UserError unless it is the name of an SVG file."""
    if path.suffix.lower() != ".svg":
        raise UserError(f"--plot {path}", fix="give a name that ends in .svg")
