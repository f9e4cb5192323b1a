"""A comparison as text: tables for the terminal, Markdown and LaTeX, and every number for CSV and JSON.

Shares and their differences are in percent, other scores in their own unit. A cell says what its number is worth: † low
confidence, ¹ another setting than the first row's, * a significant difference, ~ one within noise, ? one that could not
be tested.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from typing import TYPE_CHECKING, Any, Literal

from evalsuite import scores
from evalsuite.compare import Comparison, Report
from evalsuite.files import plain
from evalsuite.scores import Model, Score
from evalsuite.suites import BENCHMARKS, SUITE_TITLES
from evalsuite.table import LOW, LOW_NOTE, abbreviated, markdown_table
from tinyllama import units
from tinyllama.stats.intervals import Interval
from tinyllama.stats.means import ALPHA
from tinyllama.units import SHARE

if TYPE_CHECKING:
    from rich.console import Console

FORMAT = "tinyllama-comparison-1"
WIDE = 116  # columns of a terminal that has room for intervals in the cells
LEGEND = "* significant, ~ within noise, ? not tested"
RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹"  # a footnote's number takes little of a narrow column
NAME_WIDTH = 14  # of models, where the rest of a row leaves little
BARS = "▁▂▃▄▅▆▇█"
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", LOW: r"\dag{}"}
LATEX |= dict.fromkeys(BARS, "") | {character: f"\\{character}" for character in "&%$#_{}"}
LATEX |= {digit: f"$^{{{value}}}$" for value, digit in enumerate(RAISED)}


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A table: each cell is made of lines, which stand under or beside one another."""

    title: str
    headings: list[str]
    rows: list[list[tuple[str, ...]]]
    notes: list[str]


def _range(interval: Interval | None, unit: str, between: str = "–") -> str:
    if interval is None:
        return ""
    return f"{units.text(interval.low, unit, 1)}{between}{units.text(interval.high, unit, 1)}"


def _p(value: float | None) -> str:
    return "" if value is None else "<0.001" if value < 0.001 else f"{value:.3g}"


def _mark(comparison: Comparison) -> str:
    return "?" if comparison.test is None else "*" if comparison.significant else "~"


def _title(task: str) -> str:
    return BENCHMARKS[task].short if task in BENCHMARKS else f"{task} avg" if task in SUITE_TITLES else task


class _Notes:
    """Numbered footnotes, each text once. usual: the setting of scores without a mark."""

    def __init__(self, usual: str) -> None:
        self.usual = usual
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return _raised(self.texts.index(text) + 1)

    def lines(self) -> list[str]:
        return [f"{_raised(number)} {text}" for number, text in enumerate(self.texts, 1)]


def _raised(number: int) -> str:
    return "".join(RAISED[int(digit)] for digit in str(number))


def _reference(report: Report, task: str) -> Score:
    """The score that a column's others are marked against: the first one there is."""
    return next(model.scores[task] for model in report.models if task in model.scores)


def _cell(report: Report, model: Model, task: str, notes: _Notes, intervals: bool) -> tuple[str, ...]:
    score = model.scores.get(task)
    if score is None:
        return ("n/a",)
    value, reference = units.text(score.value, score.unit), _reference(report, task)
    if score.low_confidence and not model.low_confidence:
        value += LOW
    own = scores.setting(score)
    found = [*([own] if own != notes.usual else []), *scores.departures(score, reference)]
    if found:
        value += notes.mark("; ".join(found))
    lines = [value, *([_range(score.interval, score.unit)] if intervals and score.interval else [])]
    comparison = report.comparison(model, task)
    if comparison:
        lines.append(f"{units.text(comparison.change, comparison.unit, signed=True)}{_mark(comparison)}")
    return tuple(lines)


def _curve(report: Report, task: str) -> tuple[str, ...]:
    """A score over the models as bars, from its lowest to its highest; empty where the scores do not mean the same."""
    found = [model.scores.get(task) for model in report.models]
    known = [score for score in found if score]
    if len(known) < len(found) or any(scores.other_sense(s, known[0]) or scores.other_data(s, known[0]) for s in known):
        return ("",)
    low, high = min(s.value for s in known), max(s.value for s in known)
    heights = [(s.value - low) / (high - low) if high > low else 0.5 for s in known]
    return ("".join(BARS[min(len(BARS) - 1, int(height * len(BARS)))] for height in heights),)


def _values(report: Report, title: str, tasks: list[str], suite: str | None, curve: bool, intervals: bool) -> Sheet:
    usual = next(model.scores[task] for model in report.models for task in tasks if task in model.scores)
    notes, rows = _Notes(scores.setting(usual)), []
    for model in report.models:
        if not any(task in model.scores for task in tasks):
            continue
        name = f"{model.name}{LOW}" if model.low_confidence else model.name
        tokens = abbreviated(model.tokens) if model.tokens else ""
        rows.append([(name,), (tokens,), *(_cell(report, model, task, notes, intervals) for task in tasks)])
    if curve:
        rows.append([("over tokens",), ("",), *(_curve(report, task) for task in tasks)])
    texts = [notes.usual]
    if any(model.scores[task].low_confidence for model in report.models for task in tasks if task in model.scores):
        texts.append(LOW_NOTE)
    if any(report.comparison(model, task) for model in report.models for task in tasks):
        texts.append(f"below the first row, the difference from it: {LEGEND}")
    own = {task: _reference(report, task).unit for task in tasks}
    one = len(set(own.values())) == 1
    names = ["avg" if task == suite else _title(task) for task in tasks]
    if not one:
        names = [
            f"{name}, {words}" if (words := units.words(own[t])) else name for t, name in zip(tasks, names, strict=True)
        ]
    words = units.words(next(iter(own.values()))) if one else ""
    return Sheet(f"{title}, {words}" if words else title, ["model", "tokens", *names], rows, texts + notes.lines())


def _differences(report: Report) -> Sheet:
    """Every comparison, in words."""
    rows: list[list[tuple[str, ...]]] = []
    for task in report.tasks():
        for model in report.models[1:]:
            found = report.comparison(model, task)
            if found:
                change = units.text(found.change, found.unit, signed=True)
                texts = [_title(task), model.name, change, "", "", "", "", found.verdict]
                if found.test:
                    texts[3:7] = [
                        _range(found.test.interval, found.unit, " to "),
                        found.test.method,
                        _pairs(found, report.models[0], model),
                        _p(found.p_holm),
                    ]
                rows.append([(text,) for text in texts])
    notes = [f"differences from {report.models[0].name}; paired tests are over the items that both answered"]
    tests = sum(c.test is not None for c in report.comparisons)
    if tests:
        notes.append(f"p: after Holm's correction for the {tests} tests here; within noise: p of {ALPHA} or more")
    if any(c.test and c.test.pairs is None for c in report.comparisons):
        notes.append("no pairs: two separate means; a smaller difference would show on the same items")
    clustered = [c.task for c in report.comparisons if c.test and c.test.clusters and c.test.clusters != c.test.pairs]
    if clustered:
        names = ", ".join(dict.fromkeys(map(_title, clustered)))
        notes.append(f"{names}: some items share a text; these are one observation (in clusters)")
    lower = dict.fromkeys(_title(c.task) for c in report.comparisons if not c.higher_is_better)
    if lower:
        notes.append(f"lower is better: {', '.join(lower)}")
    kinds = {c.unit for c in report.comparisons}
    title = "Differences, percentage points" if kinds == {SHARE} else "Differences"
    if kinds != {SHARE}:
        own = {_title(c.task): units.difference_words(c.unit) or "its own unit" for c in report.comparisons}
        notes.append(f"units: {', '.join(f'{name} {words}' for name, words in own.items())}")
    headings = ["score", "model", "diff", "95% interval", "test", "pairs", "p", "verdict"]
    return Sheet(title, headings, rows, notes)


def _pairs(comparison: Comparison, first: Model, model: Model) -> str:
    """How many items were compared, of how many where that is not all of both, and in how many clusters."""
    test = comparison.test
    if test is None or test.pairs is None:
        return "none"
    known = [n for n in (first.scores[comparison.task].n, model.scores[comparison.task].n) if n is not None]
    text = f"{test.pairs:,} of {max(known):,}" if known and max(known) != test.pairs else f"{test.pairs:,}"
    return f"{text} in {test.clusters:,}" if test.clusters and test.clusters != test.pairs else text


def sheets(report: Report, curve: bool = False, intervals: bool = True) -> list[Sheet]:
    """A table for each suite and one for other tasks, then the tests. curve: the models are one run's, by tokens."""
    present = report.tasks()
    found = []
    for suite, members in report.suites.items():
        tasks = [task for task in (*members, suite) if task in present]
        if tasks:
            found.append(_values(report, SUITE_TITLES.get(suite, suite), tasks, suite, curve, intervals))
    others = [task for task in report.others if task in present]
    if others:
        found.append(_values(report, "Other tasks", others, None, curve, intervals))
    return [*found, _differences(report)] if report.comparisons else found


def print_sheets(report: Report, console: Console, curve: bool = False) -> None:
    """Show the tables on a terminal; without the intervals of the values where it is narrow."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    found = sheets(report, curve, console.width >= WIDE)
    for sheet in found:
        # A narrow terminal shows less: names say the tokens where it matters, and whether a test is paired is in "pairs".
        shown = [i for i, h in enumerate(sheet.headings) if console.width >= WIDE or h not in ("tokens", "test")]
        table = Table(title=escape(sheet.title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for heading in (sheet.headings[i] for i in shown):
            words = heading in ("model", "score", "test", "verdict")
            justify: Literal["left", "right"] = "left" if words else "right"
            width = NAME_WIDTH if heading == "model" else None
            table.add_column(Text(heading), justify=justify, overflow="fold", no_wrap=not words, min_width=width)
        for row in sheet.rows:
            table.add_row(*(Text("\n".join(row[i])) for i in shown))
        console.print(table)
        for note in sheet.notes:
            console.print(Text(f"  {note}"), style="dim")
        console.print()


def markdown(report: Report, curve: bool = False) -> str:
    """The tables as Markdown."""
    parts = []
    for sheet in sheets(report, curve):
        table = markdown_table(sheet.headings, [[" ".join(cell) for cell in row] for row in sheet.rows])
        parts.append("\n".join([f"## {sheet.title}", "", *table, "", *(f"- {note}" for note in sheet.notes)]))
    return "\n\n".join(parts) + "\n"


def latex(report: Report, curve: bool = False) -> str:
    """The tables as LaTeX, without any package."""

    def escaped(text: str) -> str:
        return "".join(LATEX.get(character, character) for character in text).replace("–", "--")

    parts = []
    for sheet in sheets(report, curve):
        columns = "l" + "r" * (len(sheet.headings) - 1)
        rows = [sheet.headings, *([" ".join(cell) for cell in row] for row in sheet.rows)]
        lines = [" & ".join(escaped(text) for text in row) + r" \\" for row in rows]
        notes = [f"\\par {escaped(note)}" for note in sheet.notes]
        parts += [
            rf"% {sheet.title}", rf"\begin{{tabular}}{{{columns}}}", r"\hline", lines[0], r"\hline", *lines[1:],
            r"\hline", r"\end{tabular}", *notes, "",
        ]  # fmt: skip
    return "\n".join(parts)


def record(report: Report) -> dict[str, Any]:
    """Every number, shares as parts of 1."""
    first = report.models[0]
    models = []
    for model in report.models:
        entries = {}
        for task in (task for task in report.tasks() if task in model.scores):
            score, found = model.scores[task], report.comparison(model, task)
            entries[task] = {
                **dataclasses.asdict(score),
                "setting": scores.setting(score),
                "departures": scores.departures(score, _reference(report, task)),
                "difference": _difference_record(found) if found else None,
            }
        models.append({"model": model.name, "source": model.source, "tokens": model.tokens, "scores": entries})
    return {"format": FORMAT, "first": first.name, "alpha": ALPHA, "models": plain(models)}


def _difference_record(comparison: Comparison) -> dict[str, Any]:
    test = dataclasses.asdict(comparison.test) if comparison.test else None
    found = {"of_values": comparison.difference, "test": test, "p_holm": comparison.p_holm}
    return {**found, "significant": comparison.significant, "verdict": comparison.verdict}


def as_csv(report: Report) -> str:
    """A line for each model and score, shares in percent, other scores in their `unit`."""
    rows = []
    for model in report.models:
        for task in (task for task in report.tasks() if task in model.scores):
            score, found = model.scores[task], report.comparison(model, task)
            test = found.test if found else None
            bounds = test.interval if test else None
            own = score.unit
            rows.append(
                {
                    "model": model.name,
                    "tokens": model.tokens,
                    "score": task,
                    "metric": score.metric,
                    "shots": score.num_fewshot,
                    "protocol": score.protocol,
                    "limit": score.limit,
                    "data": score.bundle,
                    "dtype": score.dtype,
                    "items": score.n,
                    "unit": units.words(own),
                    "value": _rounded(score.value, own),
                    "low": _rounded(score.interval.low if score.interval else None, own),
                    "high": _rounded(score.interval.high if score.interval else None, own),
                    "low_confidence": score.low_confidence,
                    "difference": _rounded(found.change if found else None, own),
                    "difference_low": _rounded(bounds.low if bounds else None, own),
                    "difference_high": _rounded(bounds.high if bounds else None, own),
                    "test": test.method if test else None,
                    "pairs": test.pairs if test else None,
                    "p": test.p if test else None,
                    "p_holm": found.p_holm if found else None,
                    "verdict": found.verdict if found else None,
                }
            )
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _rounded(value: float | None, unit: str) -> float | None:
    """Shares in percent, to what is meant."""
    return None if value is None else round(units.scale(unit) * value, 6)


def text(report: Report, form: str, curve: bool = False) -> str:
    """The comparison in one of `tinyllama.sheets.FORMATS` but "table"."""
    if form == "json":
        return json.dumps(record(report), indent=2, ensure_ascii=False) + "\n"
    if form == "csv":
        return as_csv(report)
    return latex(report, curve) if form == "latex" else markdown(report, curve)
