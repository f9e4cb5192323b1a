"""The throughput and latency tables, for the terminal and as Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

HEADINGS = ("batch", "input", "output", "output tok/s", "total tok/s", "requests/s")


def load_bench(path: str | Path) -> dict[str, Any]:
    """A `bench.json`; UserError if it is missing or of another format."""
    try:
        found = json.loads(Path(path).read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error})", fix="give the bench.json of tinyllama serve") from None
    if not str(found.get("format", "")).startswith("tinyllama-bench"):
        raise UserError(f"{path} is not a measurement of tinyllama serve", fix="give one")
    return found


def throughput_rows(bench: dict[str, Any]) -> list[list[str]]:
    """One row for each batch size; 95% intervals where there are repeats."""
    rows = []
    for point in bench["throughput"]:
        interval = point["output_tokens_per_s_ci95"]
        rate = f"{point['output_tokens_per_s']:,.1f}" + (f" ±{interval:,.1f}" if interval is not None else "")
        sizes = [str(point[key]) for key in ("batch_size", "input_tokens", "output_tokens")]
        rows.append([*sizes, rate, f"{point['total_tokens_per_s']:,.1f}", f"{point['requests_per_s']:.2f}"])
    return rows


def latency_rows(bench: dict[str, Any]) -> list[list[str]]:
    """Milliseconds at p50, p90 and p99 of one request at a time."""
    names = {"ttft_ms": "time to first token", "tpot_ms": "time per further token", "e2el_ms": "end to end"}
    found = bench["latency"] or {}
    return [[title, *(f"{found[key][q]:,.2f}" for q in ("p50", "p90", "p99"))] for key, title in names.items() if found]


def _conditions(bench: dict[str, Any]) -> str:
    device, versions, settings = bench["device"], bench["versions"], bench["settings"]
    mode = "eager" if settings["eager"] else "compiled"
    return (
        f"vLLM {versions['vllm']} on {device['count']} x {device['name']} ({device['kind']}), {settings['dtype']}, {mode}; "
        f"mean ±95% interval of {settings['repeats']} repeats, warm-up not counted"
    )


def print_throughput(bench: dict[str, Any], console: Console) -> None:
    """Show both tables."""
    from rich.table import Table

    table = Table(title="Serving: offline throughput", caption=_conditions(bench), caption_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for row in throughput_rows(bench):
        table.add_row(*row)
    console.print(table)
    table = Table(title="Serving: latency of one request at a time, milliseconds")
    for heading in ("", "p50", "p90", "p99"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in latency_rows(bench):
        table.add_row(*row)
    console.print(table)


def markdown(bench: dict[str, Any]) -> str:
    """Both tables as Markdown."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---:|" * len(HEADINGS)]
    lines += ["| " + " | ".join(row) + " |" for row in throughput_rows(bench)]
    lines += ["", "| milliseconds | p50 | p90 | p99 |", "|---|---:|---:|---:|"]
    lines += ["| " + " | ".join(row) + " |" for row in latency_rows(bench)]
    return "\n".join([*lines, "", _conditions(bench), ""])
