"""The comparison tables: this model beside the published rows, protocols and confidence marked, footnotes where they count.

For the terminal (rich) and as Markdown. Shares are in percent, other scores in their own unit, with their standard error
and 95% interval below.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evalsuite import aggregate, published
from evalsuite.suites import PAPER, SUITE_TITLES, SUITES, Benchmark
from tinyllama import units
from tinyllama.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

LOW = "†"
LOW_NOTE = f"{LOW} low confidence: recalled, not read in a primary source"


def load_results(path: str | Path) -> dict[str, Any]:
    """A `results.json`; UserError if it is missing or of another format."""
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason})", fix="give the results.json of tinyllama eval") from None
    if not isinstance(found, dict) or not str(found.get("format", "")).startswith("tinyllama-results"):
        raise UserError(f"{path} is not a results file of tinyllama eval", fix="give one")
    return found


def _value(entry: dict[str, Any] | None) -> str:
    return "n/a" if entry is None else units.text(entry["value"], aggregate.unit(entry))


def _error(entry: dict[str, Any] | None) -> str:
    return "" if entry is None or entry["stderr"] is None else units.text(entry["stderr"], aggregate.unit(entry))


def _bound(entry: dict[str, Any] | None, end: Literal["low", "high"]) -> str:
    interval = entry.get("ci95") if entry else None
    return units.text(interval[end], aggregate.unit(entry)) if entry and interval else ""


def _clean_rows(results: dict[str, Any], entries: list[dict[str, Any] | None]) -> list[list[str]]:
    """The scores of the items that are not in the training data, if a contamination report was given."""
    if "contamination" not in results:
        return []
    parts = [entry.get("clean") if entry else None for entry in entries]
    values = [
        "" if part is None else "n/a" if part["value"] is None else _value({"unit": units.SHARE} | part)
        for part in parts
    ]
    return [
        ["clean items only", "", *values],
        ["items left", "", *("" if part is None else f"{part['n']:,}" for part in parts)],
    ]


def _published_cell(row: published.PublishedRow, benchmark: Benchmark) -> str:
    value = row.values.get(benchmark.name)
    # A row that is low as a whole is marked at its name.
    mark = LOW if row.confidence != "low" and row.is_low(benchmark.name) else ""
    return "n/a" if value is None else f"{value:.2f}{mark}"


@dataclasses.dataclass(frozen=True)
class SuiteTable:
    """One suite's table as text: groups of rows, each group under the protocol that its numbers come from."""

    title: str
    headings: list[str]
    groups: list[tuple[str, list[list[str]]]]
    footnotes: list[str]


def _own(results: dict[str, Any]) -> dict[str, Any]:
    """The suites of the user's own."""
    return dict(results.get("own_suites") or {})


def suite_table(results: dict[str, Any], suite: str) -> SuiteTable:
    """The published rows of a suite, then the model evaluated here with its standard errors."""
    members, tasks = SUITES[suite], results["tasks"]
    notes: list[str] = []
    headings = ["model", "tokens"]
    for benchmark in members:
        entry = tasks.get(benchmark.name)
        mark = ""
        if entry and entry.get("note"):
            notes.append(entry["note"])
            mark = f"[{len(notes)}]"
        headings.append(f"{benchmark.short}{mark}")
    headings.append("avg")
    known = [row for row in published.rows() if row.suite == suite]
    published_rows = []
    for row in known:
        average = row.average_printed if row.average_printed is not None else row.average_recomputed
        cells = [_published_cell(row, b) for b in members]
        low = LOW if row.confidence == "low" else ""
        name = row.model.replace("-1.1B", "")
        published_rows.append([f"{name}{low}", abbreviated(row.tokens), *cells, f"{average:.2f}"])
    entries = [tasks.get(b.name) for b in members] + [results["suites"].get(suite)]
    own = [
        [_model_name(results), _trained_tokens(results), *map(_value, entries)],
        ["standard error", "", *map(_error, entries)],
        ["95% from", "", *(_bound(entry, "low") for entry in entries)],
        ["95% to", "", *(_bound(entry, "high") for entry in entries)],
        *_clean_rows(results, entries),
    ]
    return SuiteTable(
        f"{SUITE_TITLES[suite]}, percent",
        headings,
        [
            (f"published, protocol: {_published_protocol(known[0].protocol)}", published_rows),
            (f"measured, protocol: {_protocol(results, suite)}", own),
        ],
        [f"[{i}] {note}" for i, note in enumerate(notes, 1)] + _footnotes(results, suite),
    )


def _published_protocol(protocol: str) -> str:
    """instruct-eval's prompts and scoring are what we call paper."""
    return f"{PAPER} ({protocol})" if protocol.startswith("instruct-eval") else protocol


def _protocols(results: dict[str, Any], suite: str) -> list[str]:
    """What a suite was measured with: one protocol, if nobody has put results together by hand."""
    return sorted({results["tasks"][b.name]["protocol"] for b in SUITES[suite] if b.name in results["tasks"]})


def _protocol(results: dict[str, Any], suite: str) -> str:
    name = "+".join(_protocols(results, suite))
    return f"{name} (lm-eval {results['versions']['lm_eval']}, {_computed(results)})"


def _computed(results: dict[str, Any]) -> str:
    """What the scores were computed by, and in which precision."""
    return f"{results['backend']} backend, {results['settings']['dtype']}"


def _footnotes(results: dict[str, Any], suite: str) -> list[str]:
    tasks, members = results["tasks"], SUITES[suite]
    found = [LOW_NOTE, "OPT-1.3B has no published problem-solving row"] if suite == "problem_solving" else [LOW_NOTE]
    present = [b for b in members if b.name in tasks]
    found.append("items: " + ", ".join(f"{b.short} {tasks[b.name]['n']:,}" for b in present))
    found.append("shots: " + ", ".join(f"{b.short} {tasks[b.name]['num_fewshot']}" for b in present))
    found += [_passing_note(b.short, tasks[b.name]) for b in present if tasks[b.name].get("samples_per_problem", 1) > 1]
    if suite == "problem_solving" and _protocols(results, suite) != [PAPER]:
        found.append("harness and instruct-eval differ in prompts and scoring: compare within one protocol only")
    if str(results["settings"].get("data_dir")) == "mini":
        found.append("measured on the project's small bundle, not on the real data sets")
    truncated = sum(tasks[b.name].get("truncated_prompts") or 0 for b in present)
    if truncated:
        found.append(f"{truncated:,} prompts were longer than the context and lost their beginning")
    fewer = sum(tasks[b.name].get("fewer_shots") or 0 for b in present)
    if fewer:
        found.append(f"{fewer:,} prompts have fewer shots, to hold them in 2,048 tokens")
    if "contamination" in results:
        found.append(_clean_note(results, [tasks[b.name]["clean"] for b in present]))
    return found


def _passing_note(title: str, entry: dict[str, Any]) -> str:
    """How many completions a score is of, and its other pass@k."""
    others = [f"{(name := key.split(',')[0])} {units.text(value, units.unit_of(name, value))}" for key, value in
        entry["metrics"].items()]  # fmt: skip
    count, temperature = entry["samples_per_problem"], entry["generation"]["temperature"]
    return f"{title}: {count} completions a problem at temperature {temperature:g}: {', '.join(others)}"


def _clean_note(results: dict[str, Any], parts: list[dict[str, Any]]) -> str:
    """Why the clean items are fewer than all."""
    overlap, short, unknown = (sum(part[status] for part in parts) for status in ("overlap", "short", "unknown"))
    origin = results["contamination"]
    left_out = f"{overlap:,} share {origin['ngram']} tokens with the training data, {short:,} are too short to tell"
    missing = f", {unknown:,} are not in the report" if unknown else ""
    return f"clean by {origin['report']}: {left_out}{missing}"


def abbreviated(count: float) -> str:
    """A number of tokens."""
    return f"{count / 1e12:.3g}T" if count >= 1e12 else f"{count / 1e9:.0f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def _model_name(results: dict[str, Any]) -> str:
    return Path(results["model"]).name


def _trained_tokens(results: dict[str, Any]) -> str:
    return abbreviated(results["tokens"]) if results.get("tokens") else ""


def _suites_of(results: dict[str, Any]) -> list[str]:
    """Our suites of which something was evaluated for itself, not as a part of the user's own."""
    tasks = results["tasks"]
    taken = {name for record in _own(results).values() for name in record["benchmarks"]}

    def shown(suite: str) -> bool:
        names = {member.name for member in SUITES[suite]} & set(tasks)
        return bool(names - taken) or (bool(names) and suite in results["suites"])

    return list(filter(shown, SUITES))


def other_tasks(results: dict[str, Any]) -> dict[str, Any]:
    """Tasks that belong to no suite."""
    known = {b.name for members in SUITES.values() for b in members}
    known |= {name for record in _own(results).values() for name in record["benchmarks"]}
    return {name: entry for name, entry in results["tasks"].items() if name not in known}


def _by_task(entries: dict[str, tuple[str, dict[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    """A table with a row for each task: its title, and what it was measured with."""
    headings = ["task", "protocol", "metric", "value", "95% interval", "clean", "shots", "items"]
    rows = []
    for title, entry in entries.values():
        value = f"{_value(entry)} ± {_error(entry)}" if _error(entry) else _value(entry)
        unit = units.words(aggregate.unit(entry))
        metric = entry.get("metric", "")
        if unit not in ("percent", "", metric.replace("_", " ")):
            value += f" {unit}"
        elif unit == "percent":
            value += "%"
        words = [title, entry["protocol"], metric, value, _interval(entry), _clean(entry)]
        rows.append([*words, str(entry.get("num_fewshot", "")), str(entry.get("n", ""))])
    if not any(row[5] for row in rows):
        return headings[:5] + headings[6:], [row[:5] + row[6:] for row in rows]
    return headings, rows


def _own_table(results: dict[str, Any], suite: str) -> tuple[str, list[str], list[list[str]]]:
    """Title, headings and rows of a suite of the user's own; the last row is its mean, if all of it was evaluated."""
    record = _own(results)[suite]
    titles = dict(zip(record["benchmarks"], record["titles"], strict=True))
    entries = {n: (title, results["tasks"][n]) for n, title in titles.items() if n in results["tasks"]}
    headings, rows = _by_task(entries)
    mean = results["suites"].get(suite)
    if mean:
        clean = {key: value for key, value in mean.items() if key != "clean"}
        rows.append((_by_task({suite: (record["weighting"], clean)})[1][0] + [""] * len(headings))[: len(headings)])
    return f"{record['title']} ({_computed(results)})", headings, rows


def _other_tables(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The tables with a row for each task: of the user's own suites, and of tasks of no suite."""
    own = [
        _own_table(results, suite) for suite, r in _own(results).items() if set(r["benchmarks"]) & set(results["tasks"])
    ]
    others = other_tasks(results)
    if not others:
        return own
    return [*own, (f"Other tasks ({_computed(results)})", *_by_task({n: (n, e) for n, e in others.items()}))]


def _interval(entry: dict[str, Any]) -> str:
    return f"{_bound(entry, 'low')} to {_bound(entry, 'high')}" if entry.get("ci95") else "n/a"


def _clean(entry: dict[str, Any]) -> str:
    """The score of the clean items, and how many they are."""
    clean = entry.get("clean")
    if clean is None:
        return ""
    shown = {**clean, "unit": aggregate.unit(entry)}
    return f"n/a (0 of {entry['n']})" if clean["value"] is None else f"{_value(shown)} ({clean['n']} of {entry['n']})"


def print_comparison(results: dict[str, Any], console: Console) -> None:
    """Show a table for every suite that was evaluated, and one for other tasks. Fits 80 columns."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    for suite in _suites_of(results):
        found = suite_table(results, suite)
        # In a narrow terminal the tokens go: the models' names say them where it matters.
        shown = [i for i in range(len(found.headings)) if i != 1 or console.width >= 96]
        table = Table(title=escape(found.title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for index in shown:
            justify: Literal["left", "right"] = "left" if index == 0 else "right"
            table.add_column(Text(found.headings[index]), justify=justify, no_wrap=True)
        for position, (label, rows) in enumerate(found.groups):
            for number, row in enumerate(rows):
                style = None if label.startswith("published") else "bold green" if number == 0 else "green"
                table.add_row(*(Text(row[i]) for i in shown), style=style, end_section=number == len(rows) - 1)
            found.footnotes.insert(position, label)
        console.print(table)
        for line in found.footnotes:
            console.print(Text(f"  {line}"), style="dim")
        console.print()
    for title, headings, rows in _other_tables(results):
        table = Table(title=escape(title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for heading in headings:
            words = heading in ("task", "protocol", "metric")
            table.add_column(Text(heading), justify="left" if words else "right", overflow="fold", no_wrap=not words)
        for cells in rows:
            table.add_row(*map(Text, cells))
        console.print(table)


def markdown_table(headings: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (headings, *rows)]
    return [lines[0], "|" + "---|" * len(headings), *lines[1:]]


def markdown(results: dict[str, Any]) -> str:
    """The same tables as Markdown."""
    parts = []
    for suite in _suites_of(results):
        found = suite_table(results, suite)
        headings = ["protocol", *found.headings]
        rows = [[label.split("protocol: ")[1], *row] for label, group in found.groups for row in group]
        lines = [f"## {found.title}", "", *markdown_table(headings, rows), ""]
        parts.append("\n".join([*lines, *(f"- {note}" for note in found.footnotes)]))
    for title, headings, rows in _other_tables(results):
        parts.append("\n".join([f"## {title}", "", *markdown_table(headings, rows)]))
    return "\n\n".join(parts) + "\n"
