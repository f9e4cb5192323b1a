"""`tinyllama compare` for scores; `tinyllama.cli.compare` finds out which kind it was given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinyllama.sheets import Comparison


def compare_scores(results: list[str], curve: bool, plot: Path | None, fail_if_drop: list[str] | None) -> Comparison:
    """Compare evaluations, and draw them if asked to. UserError."""
    from evalsuite import compare, compare_output, compare_plot, gate
    from tinyllama.sheets import Comparison

    if plot:
        compare_plot.check_name(plot)
    report = compare.compare(results, by_tokens=curve)
    if plot:
        compare_plot.write(report, plot, curve)
    failed = gate.drops(report, fail_if_drop) if fail_if_drop else []
    return Comparison(
        lambda console: compare_output.print_sheets(report, console, curve),
        lambda form: compare_output.text(report, form, curve),
        gate.line(failed) if failed else None,
    )
