"""`tinyllama compare` for bench.json; `tinyllama.cli.compare` finds out which kind it was given."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinyllama.sheets import Comparison


def compare_benches(results: list[str], fail_if_drop: list[str] | None) -> Comparison:
    """Compare benches. UserError."""
    from serve import compare, compare_output
    from tinyllama.sheets import Comparison

    limit = parse_percent(fail_if_drop) if fail_if_drop else None
    report = compare.compare(results)
    failures = []
    if limit is not None:
        if report.failures:
            failures.append(f"requests failed: {'; '.join(report.failures)}")
        if report.unfinished:
            failures.append(f"not finished: {'; '.join(report.unfinished)}")
        dropped = compare.drops(report, limit)
        if dropped:
            parts = [f"{c.bench}, {c.configuration}: {100 * c.change:+.1f}% (p = {c.p_holm:.2g})" for c in dropped]
            failures.append(f"throughput dropped: {'; '.join(parts)}")
    return Comparison(
        lambda console: compare_output.print_tables(report, console),
        lambda form: compare_output.text(report, form),
        "; ".join(failures) or None,
    )


def parse_percent(limits: list[str]) -> float:
    """The one limit of `--fail-if-drop`, in percent."""
    from tinyllama.errors import UserError

    fix = "give one number of percent for benches, 0 or more, such as 5"
    try:
        value = float(limits[0].removesuffix("%"))
    except ValueError:
        raise UserError(f"--fail-if-drop {limits[0]}", fix=fix) from None
    if len(limits) > 1 or not 0 <= value < float("inf"):
        raise UserError(f"--fail-if-drop {' '.join(limits)}", fix=fix)
    return value
