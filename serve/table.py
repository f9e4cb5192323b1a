"""bench.json as tables: on the console and as Markdown. Imports nothing heavy; the demo and the report use it too."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

LATENCIES = (
    ("time to first token", "ttft_ms"),
    ("time per output token after", "tpot_ms"),
    ("whole request", "e2e_ms"),
)


def load_bench(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a bench.json, or the one in a directory; UserError if it is none."""
    from serve.bench import FORMAT

    file = Path(path)
    file = file / "bench.json" if file.is_dir() else file
    try:
        bench = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file} does not exist", fix="make it with: tinyllama serve MODEL --output DIR") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not JSON ({error})", fix="measure again with tinyllama serve") from None
    if not isinstance(bench, dict) or bench.get("format") != FORMAT:
        found = bench.get("format") if isinstance(bench, dict) else None
        raise UserError(f"{file} has format {found!r}, not {FORMAT!r}", fix="measure again with tinyllama serve")
    return bench


def number(value: float) -> str:
    """Three significant digits or more, thousands separated: 0.0123, 4.57, 12.3, 1,285."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def with_interval(rate: dict[str, float | None]) -> str:
    """Mean and half the width of its interval."""
    mean, high = rate["mean"] or 0.0, rate["high"]
    return number(mean) if high is None else f"{number(mean)} ± {number(high - mean)}"


def throughput_rows(bench: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the throughput table."""
    rows = []
    for point in bench["throughput"]:
        rates = [with_interval(point["output_tokens_per_s"])]
        rates += [number(point[key]["mean"]) for key in ("total_tokens_per_s", "requests_per_s")]
        seconds = sum(point["samples_s"]) / len(point["samples_s"])
        rows.append([str(point["batch_size"]), *rates, number(seconds)])
    return ["batch size", "output tok/s", "total tok/s", "requests/s", "s per batch"], rows


def latency_rows(bench: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the latency table, in milliseconds."""
    columns = ["mean", *(key for key in bench["latency"]["e2e_ms"] if key != "mean")]
    found = [(title, bench["latency"][key]) for title, key in LATENCIES if key in bench["latency"]]
    return ["one request, ms", *columns], [[title, *(number(row[c]) for c in columns)] for title, row in found]


def titles(bench: dict[str, Any]) -> tuple[str, str, str]:
    """Title of each table, and the note under them."""
    settings, device, model = bench["settings"], bench["device"], bench["model"]
    size = f", {model['num_parameters']:,} parameters" if model["num_parameters"] else ""
    mode = "eager" if settings["eager"] else "compiled"
    cores = f", {device['cores']} cores" if device["platform"] == "cpu" else ""
    throughput = (
        f"Throughput of {model['name']}{size}\n"
        f"vLLM {bench['versions']['vllm']}, {settings['dtype']}, {mode}, on {device['name']}{cores}"
    )
    latency = f"Latency of {model['name']}, requests one after the other"
    note = (
        f"{settings['input_tokens']} random prompt tokens and {settings['output_tokens']} generated tokens per request; "
        f"mean ± half the 95% interval of {settings['repeats']} repeats; {settings['latency_requests']} single requests; "
        f"{settings['warmup_runs']} warm-up runs of each batch size are not counted; no prefix caching."
    )
    if device["omp_threads_bind"] == "auto":
        note += " vLLM computes on all cores but one, which its scheduler gets."
    elif device["omp_threads_bind"]:
        note += f" VLLM_CPU_OMP_THREADS_BIND={device['omp_threads_bind']}."
    return throughput, latency, note


def print_throughput(bench: dict[str, Any], console: Console) -> None:
    """The throughput and the latency table."""
    from rich.table import Table

    throughput, latency, note = titles(bench)
    for title, (headings, rows) in ((throughput, throughput_rows(bench)), (latency, latency_rows(bench))):
        table = Table(title=title)
        for index, heading in enumerate(headings):
            table.add_column(heading, justify="left" if index == 0 and not heading.startswith("batch") else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(note, style="dim", highlight=False)


def markdown(bench: dict[str, Any]) -> str:
    """The same tables as Markdown."""
    throughput, latency, note = titles(bench)
    parts = []
    for title, (headings, rows) in ((throughput, throughput_rows(bench)), (latency, latency_rows(bench))):
        lines = [
            f"## {title.replace(chr(10), ', ')}",
            "",
            f"| {' | '.join(headings)} |",
            f"|{' --: |' * len(headings)}",
        ]
        parts.append("\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]))
    return "\n\n".join([*parts, note]) + "\n"
