"""The comparison tables: this model beside the published rows, protocols and confidence marked, footnotes where they count.

For the terminal (rich) and as Markdown. Values are in percent, ± one standard error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalsuite import published
from evalsuite.suites import SUITE_TITLES, SUITES, Benchmark
from tinyllama.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

LOW = "†"
LOW_NOTE = f"{LOW} low confidence: recalled, not read in a primary source"


def load_results(path: str | Path) -> dict[str, Any]:
    """A `results.json`; UserError if it is missing or of another format."""
    try:
        found = json.loads(Path(path).read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error})", fix="give the results.json of tinyllama eval") from None
    if not str(found.get("format", "")).startswith("tinyllama-results"):
        raise UserError(f"{path} is not a results file of tinyllama eval", fix="give one")
    return found


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "n/a"
    error = f" ±{100 * entry['stderr']:.1f}" if entry["stderr"] is not None else ""
    return f"{100 * entry['value']:.2f}{error}"


def _published_cell(row: published.PublishedRow, benchmark: Benchmark) -> str:
    value = row.values.get(benchmark.name)
    return "n/a" if value is None else f"{value:.2f}{LOW if row.is_low(benchmark.name) else ''}"


def suite_rows(results: dict[str, Any], suite: str) -> tuple[list[str], list[list[str]], list[str]]:
    """(headings, rows, footnotes) of one suite's table; the model evaluated here comes last."""
    members = SUITES[suite]
    tasks = results["tasks"]
    notes: list[str] = []
    headings = ["model", "tokens", "protocol"]
    for benchmark in members:
        entry = tasks.get(benchmark.name)
        mark = ""
        if entry and entry.get("note"):
            notes.append(entry["note"])
            mark = f" [{len(notes)}]"
        headings.append(f"{benchmark.title}{mark}")
    headings.append("average")
    rows = []
    for row in published.rows():
        if row.suite == suite:
            average = row.average_printed if row.average_printed is not None else row.average_recomputed
            label = "instruct-eval" if suite == "problem_solving" else "lm-eval, old"
            cells = [_published_cell(row, b) for b in members]
            rows.append([row.model, _tokens(row.tokens), label, *cells, f"{average:.2f}{LOW if row.confidence == 'low' else ''}"])
    ours = [_cell(tasks.get(b.name)) for b in members]
    rows.append([_model_name(results), _trained_tokens(results), results["protocol"], *ours, _cell(results["suites"].get(suite))])
    sizes = ", ".join(f"{b.title} {tasks[b.name]['n']:,}" for b in members if b.name in tasks)
    shots = ", ".join(f"{b.title} {tasks[b.name]['num_fewshot']}" for b in members if b.name in tasks)
    footnotes = [f"[{i}] {note}" for i, note in enumerate(notes, 1)]
    footnotes.append(LOW_NOTE)
    footnotes.append(f"items of this model: {sizes}; shots: {shots}")
    if suite == "problem_solving":
        footnotes.append("harness and instruct-eval differ in prompts and scoring: compare within one protocol only")
    if str(results["settings"].get("data_dir")) == "mini":
        footnotes.append("this model was scored on the small bundle of the project, not on the real data sets")
    truncated = sum(tasks[b.name].get("truncated_prompts") or 0 for b in members if b.name in tasks)
    if truncated:
        footnotes.append(f"{truncated:,} prompts were longer than the context and lost their beginning")
    return headings, rows, footnotes


def _tokens(count: float) -> str:
    return f"{count / 1e12:.3g}T" if count >= 1e12 else f"{count / 1e9:.0f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def _model_name(results: dict[str, Any]) -> str:
    return f"this model ({Path(results['model']).name})"


def _trained_tokens(results: dict[str, Any]) -> str:
    record = Path(results["model"]) / "tinyllama_export.json"
    return _tokens(json.loads(record.read_text())["tokens"]) if record.exists() else ""


def _suites_of(results: dict[str, Any]) -> list[str]:
    return [name for name, members in SUITES.items() if any(b.name in results["tasks"] for b in members)]


def other_tasks(results: dict[str, Any]) -> dict[str, Any]:
    """Tasks that belong to no suite."""
    known = {b.name for members in SUITES.values() for b in members}
    return {name: entry for name, entry in results["tasks"].items() if name not in known}


def print_comparison(results: dict[str, Any], console: Console) -> None:
    """Show a table for every suite that was evaluated, and one for other tasks."""
    from rich.table import Table

    for suite in _suites_of(results):
        headings, rows, footnotes = suite_rows(results, suite)
        table = Table(title=f"{SUITE_TITLES[suite]}, percent", caption="\n".join(footnotes), caption_justify="left")
        for index, heading in enumerate(headings):
            table.add_column(heading.replace("[", "\\["), justify="left" if index in (0, 2) else "right", no_wrap=index == 0)
        for row in rows:
            own = row is rows[-1]
            table.add_row(*row, style="bold green" if own else None, end_section=row is rows[-2])
        table.caption = "\n".join(footnotes).replace("[", "\\[")
        console.print(table)
    others = other_tasks(results)
    if others:
        table = Table(title="Other tasks")
        for heading in ("task", "metric", "value", "shots", "items"):
            table.add_column(heading)
        for name, entry in others.items():
            table.add_row(name, entry["metric"], _cell(entry), str(entry["num_fewshot"]), str(entry["n"]))
        console.print(table)


def markdown(results: dict[str, Any]) -> str:
    """The same tables as Markdown."""
    parts = []
    for suite in _suites_of(results):
        headings, rows, footnotes = suite_rows(results, suite)
        lines = [f"## {SUITE_TITLES[suite]}, percent", "", "| " + " | ".join(headings) + " |"]
        lines.append("|" + "|".join(["---"] * len(headings)) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        parts.append("\n".join([*lines, "", *footnotes]))
    for name, entry in other_tasks(results).items():
        parts.append(f"- {name}: {entry['metric']} {_cell(entry)}, {entry['num_fewshot']}-shot, {entry['n']} items")
    return "\n\n".join(parts) + "\n"
