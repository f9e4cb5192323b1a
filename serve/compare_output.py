"""A comparison of benches as text: tables for the terminal, Markdown and LaTeX, and every number for CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from typing import TYPE_CHECKING, Any

from serve.compare import Bench, Comparison, Report
from serve.table import number
from tinyllama import sheets
from tinyllama.sheets import Sheet
from tinyllama.stats.means import ALPHA

if TYPE_CHECKING:
    from rich.console import Console

FORMAT = "tinyllama-bench-comparison-1"
METHOD = "Welch's t"


def tables(report: Report) -> list[Sheet]:
    """A table for each bench but the first; of a single bench, its own values."""
    if len(report.benches) == 1:
        return [_alone(report.benches[0])]
    return [_beside(report, bench) for bench in report.benches[1:]]


def _alone(bench: Bench) -> Sheet:
    rows = [[*key, number(math.fsum(v) / len(v)), str(len(v))] for key, v in bench.values.items()]
    notes = _failures([bench])
    return Sheet(bench.name, ["configuration", "metric", "mean", "samples"], rows, notes, text_columns=2)


def _failures(benches: list[Bench]) -> list[str]:
    notes = []
    for bench in benches:
        for what, found, more in (
            ("Requests failed in", bench.failures, " Such loads are not compared."),
            ("Not finished in", bench.unfinished, ""),
        ):
            if found:
                loads = "; ".join(f"{load}: {text}" for load, text in found.items())
                notes.append(f"{what} {bench.name}: {loads}.{more}")
    return notes


def _beside(report: Report, bench: Bench) -> Sheet:
    first, found, rows = report.benches[0], report.of(bench), []
    for c in found:
        interval = c.interval
        rows.append(
            [
                c.configuration,
                c.metric,
                number(c.first),
                number(c.value),
                f"{100 * c.change:+.1f}%",
                f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}" if interval else "",
                "" if c.p_holm is None else "<0.001" if c.p_holm < 0.001 else f"{c.p_holm:.3f}",
                c.verdict,
            ]
        )
    notes = []
    if found:
        tests = sum(c.test is not None for c in report.comparisons)
        notes.append(
            f"Differences of means, 95% intervals and p by {METHOD} test over repeats (one request: over requests); "
            f"p after Holm's correction for the {tests} tests here; within noise: p of {ALPHA} or more."
        )
    else:
        notes.append("Nothing was measured alike in both.")
    differing, failures = report.differing(bench), _failures([first, bench])
    notes += failures
    if differing:
        notes.append(f"What else differs: {'; '.join(differing)}.")
    elif not failures:
        notes.append("Nothing else that is recorded differs.")
    for one, other in ((first, bench), (bench, first)):
        alone = report.only_in(one, other)
        if alone:
            notes.append(f"Only in {one.name}: {'; '.join(alone)}.")
    headings = ["configuration", "metric", first.name, bench.name, "change", "95% interval", "p", "verdict"]
    return Sheet(f"{bench.name} beside {first.name}", headings, rows, notes, text_columns=2)


def print_tables(report: Report, console: Console) -> None:
    """All tables on the console."""
    sheets.print_sheets(tables(report), console)


def record(report: Report) -> dict[str, Any]:
    """Every number; changes as shares of the first bench's value."""
    first, benches = report.benches[0], []
    for bench in report.benches:
        entry: dict[str, Any] = {"bench": bench.name, "source": bench.source, "circumstances": bench.circumstances}
        entry |= {"failures": bench.failures, "unfinished": bench.unfinished}
        if bench is not first:
            entry["differs"] = report.differing(bench)
            entry["only_here"], entry["only_in_first"] = report.only_in(bench, first), report.only_in(first, bench)
            entry["comparisons"] = [_entry(c) for c in report.of(bench)]
        benches.append(entry)
    return {"format": FORMAT, "first": first.name, "alpha": ALPHA, "method": METHOD, "benches": benches}


def _entry(c: Comparison) -> dict[str, Any]:
    interval = c.interval
    return {
        "configuration": c.configuration,
        "metric": c.metric,
        "first": c.first,
        "value": c.value,
        "change": None if math.isnan(c.change) else c.change,
        "low": interval[0] if interval else None,
        "high": interval[1] if interval else None,
        "samples": list(c.samples),
        "test": {k: v for k, v in dataclasses.asdict(c.test).items() if math.isfinite(v)} if c.test else None,
        "p_holm": c.p_holm,
        "significant": c.significant,
        "verdict": c.verdict,
    }


def as_csv(report: Report) -> str:
    """A line for each comparison; changes in percent."""
    columns = (
        "bench", "configuration", "metric", "first", "value", "change", "low", "high", "samples_first", "samples",
        "p", "p_holm", "verdict",
    )  # fmt: skip
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    for c in report.comparisons:
        interval = c.interval or (math.nan, math.nan)
        shares = ["" if math.isnan(v) else f"{100 * v:.6g}" for v in (c.change, *interval)]
        p = c.test.p if c.test else None
        writer.writerow(
            [c.bench, c.configuration, c.metric, c.first, c.value, *shares, *c.samples, p, c.p_holm, c.verdict]
        )
    for bench in report.benches:
        for load, failed in (*bench.failures.items(), *bench.unfinished.items()):
            writer.writerow([bench.name, load, *[""] * (len(columns) - 3), failed])
    return stream.getvalue()


def text(report: Report, form: str) -> str:
    """The comparison in one of `tinyllama.sheets.FORMATS` but "table"."""
    if form == "json":
        return json.dumps(record(report), indent=2, ensure_ascii=False) + "\n"
    if form == "csv":
        return as_csv(report)
    return sheets.latex(tables(report)) if form == "latex" else sheets.markdown(tables(report))
