"""bench.json as tables: on the console and as Markdown. Imports nothing heavy; the demo and the report use it too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve import speculative
from tinyllama import sheets, strict_json
from tinyllama.errors import UserError
from tinyllama.model_source import missing
from tinyllama.sheets import Sheet

if TYPE_CHECKING:
    from rich.console import Console

LATENCIES = (
    ("time to first token", "ttft_ms"),
    ("time per output token after", "tpot_ms"),
    ("whole request", "e2e_ms"),
)
SHARES = (("bandwidth", "bandwidth_frac"), ("FLOP/s", "flops_frac"))  # of the device's peak

# What reading a file raises that has our format and not all of its fields.
INCOMPLETE = (KeyError, TypeError, AttributeError, ValueError, ArithmeticError, IndexError)


def load_bench(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a bench.json, or the one in a directory; UserError if it is none."""
    from serve.bench import FORMAT

    file = Path(path)
    file = file / "bench.json" if file.is_dir() else file
    try:
        bench = strict_json.parse(file.read_bytes())
    except FileNotFoundError:
        raise missing(str(file), path, "make it with: tinyllama serve MODEL --output DIR") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})", fix="give a file that you may read") from None
    except ValueError as error:
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
    """Headings and cells of the throughput table; columns that would be the same in every row are left out."""
    points, rows = bench["throughput"], []
    several = len({(p["input_tokens"], p["output_tokens"]) for p in points}) > 1
    sampled = any(p.get("samples_per_prompt", 1) > 1 for p in points)
    shares = [(title, key) for title, key in SHARES if any(p.get(key) is not None for p in points)]
    for point in points:
        row = [str(point["batch_size"])]
        row += [str(point.get("samples_per_prompt", 1))] if sampled else []
        row += [f"{point['input_tokens']}x{point['output_tokens']}"] if several else []
        row += [with_interval(point["output_tokens_per_s"])]
        row += [number(point[key]["mean"]) for key in ("total_tokens_per_s", "requests_per_s")]
        row += [number(sum(point["samples_s"]) / len(point["samples_s"]))]
        row += [f"{100 * point[key]:.1f}%" if point.get(key) is not None else "" for _, key in shares]
        rows.append(row)
    keys = ["batch size", *(["n"] if sampled else []), *(["lengths"] if several else [])]
    return [*keys, "output tok/s", "total tok/s", "req/s", "s per batch", *(title for title, _ in shares)], rows


def latency_rows(bench: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the latency table, in milliseconds."""
    columns = ["mean", *(key for key in bench["latency"].get("e2e_ms", ()) if key != "mean")]
    found = [(title, bench["latency"][key]) for title, key in LATENCIES if key in bench["latency"]]
    return ["one request, ms", *columns], [[title, *(number(row[c]) for c in columns)] for title, row in found]


def titles(bench: dict[str, Any]) -> tuple[str, str, str]:
    """Title of each table, and the note under them."""
    settings, device, model = bench["settings"], bench["device"], bench["model"]
    size = f", {model['num_parameters']:,} parameters" if model["num_parameters"] else ""
    size += f", {model['quantization']['scheme']}" if model.get("quantization") else ""
    mode = "eager" if settings["eager"] else "compiled"
    cores = f", {device['cores']} cores" if device["platform"] == "cpu" else ""
    throughput = (
        f"Throughput of {model['name']}{size}\n"
        f"vLLM {bench['versions']['vllm']}, {settings['dtype']}, {mode}, on {device['name']}{cores}"
    )
    latency = f"Latency of {model['name']}, requests one after the other"
    note = (
        f"{_lengths(settings)} per request; "
        f"mean ± half the 95% interval of {settings['repeats']} repeats; {settings['latency_requests']} single requests; "
        f"{settings['warmup_runs']} warm-up runs of each batch are not counted; no prefix caching."
    )
    if bench.get("speculative"):
        note += " " + speculative.line(bench["speculative"], settings["draft"])
    if device["omp_threads_bind"] == "auto":
        note += " vLLM computes on all cores but one, which its scheduler gets."
    elif device["omp_threads_bind"]:
        note += f" VLLM_CPU_OMP_THREADS_BIND={device['omp_threads_bind']}."
    return throughput, latency, note


def _lengths(settings: dict[str, Any]) -> str:
    """What was sent, in words."""
    of_text = " of a text" if settings.get("prompts_file") else ""
    if settings.get("lengths"):
        pairs = " or ".join(f"{prompt} and {output}" for prompt, output in settings["lengths"])
        return f"{pairs} {'prompt' if of_text else 'random prompt'} and generated tokens{of_text}"
    kind = "prompt tokens of a text" if of_text else "random prompt tokens"
    return f"{settings['input_tokens']} {kind} and {settings['output_tokens']} generated tokens"


def offline_sheets(bench: dict[str, Any]) -> list[Sheet]:
    """The throughput and the latency table, if they were measured."""
    if not bench["throughput"]:
        return []
    throughput, latency, note = titles(bench)
    notes = [*roofline_notes(bench), *preset_notes(bench)]
    return [
        Sheet(throughput, *throughput_rows(bench), notes, text_columns=0),
        Sheet(latency, *latency_rows(bench), [note]),
    ]


def roofline_notes(bench: dict[str, Any]) -> list[str]:
    """What the shares of the device's peak are shares of."""
    peak = (bench["roofline"] or {}).get("peak")
    if not peak:
        return []
    parts = []
    if peak["bytes_per_s"]:
        parts.append(f"bandwidth: weights and cache read each step, of {peak['bytes_per_s'] / 1e9:,.1f} GB/s")
    if peak["flops_per_s"]:
        parts.append(f"FLOP/s: arithmetic of prompts and tokens, of {peak['flops_per_s'] / 1e12:,.3g} TFLOP/s")
    text = f"{'; '.join(parts)} ({peak['source']})."
    if peak["cache_bytes"] and bench["roofline"]["weight_bytes"] < peak["cache_bytes"]:
        text += " The weights fit into the processor's cache, so that memory does not limit them."
    return [text]


def preset_notes(bench: dict[str, Any]) -> list[str]:
    """The published figure that the preset stands beside."""
    from serve.presets import PRESETS

    preset = PRESETS.get(bench["settings"].get("preset") or "")
    return [preset.note] if preset else []


def print_bench(bench: dict[str, Any], console: Console) -> None:
    """Every table of it."""
    from serve.online_table import online_sheets

    sheets.print_sheets([*offline_sheets(bench), *online_sheets(bench, wide=False)], console)


def print_throughput(bench: dict[str, Any], console: Console) -> None:
    """The offline tables alone."""
    sheets.print_sheets(offline_sheets(bench), console)


def markdown(bench: dict[str, Any]) -> str:
    """Every table as Markdown."""
    from serve.online_table import online_sheets

    return sheets.markdown([*offline_sheets(bench), *online_sheets(bench, wide=True)])
