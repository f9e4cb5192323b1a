"""Measured numbers in place of assumptions: MFU from a run's metrics.jsonl, tokens per second from a bench.json."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from tinyllama.errors import ConfigError
from tinyllama.planner.allocation import TRAIN_FLOPS
from tinyllama.planner.cost import MeasuredServing
from tinyllama.planner.prices import is_positive, read_object


def run_mfu(run: Path) -> float:
    """The median MFU of the later half of a run's logged steps, by 6 N instead of the run's count with attention."""
    config = read_object(run / "config.json", "--run")
    try:
        lines = (run / "metrics.jsonl").read_text(errors="replace").splitlines()
    except OSError as error:
        raise ConfigError(
            f"--run {run / 'metrics.jsonl'}: {error.strerror}", fix="give a run of tinyllama train"
        ) from None
    logged = []
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the line that a kill cut short
        # Validation has lines of its own, and a device without a known peak has no MFU.
        if isinstance(entry, dict) and is_positive(entry.get("mfu")):
            logged.append(entry["mfu"])
    parameters, flops = config.get("num_parameters"), config.get("flops_per_token")
    if not logged or not is_positive(parameters) or not is_positive(flops):
        raise ConfigError(f"--run {run} has logged no MFU", fix="give a run on a known device, or --mfu")
    return statistics.median(logged[len(logged) // 2 :]) * TRAIN_FLOPS * parameters / flops


def bench_serving(path: Path) -> MeasuredServing:
    """The fastest batch of a bench.json, or of the folder that it is in."""
    file = path / "bench.json" if path.is_dir() else path
    bench = read_object(file, "--bench")
    try:
        point = max(bench["throughput"], key=lambda p: p["total_tokens_per_s"]["mean"])
        generated = point["output_tokens"] * point.get("samples_per_prompt", 1)
        measured = MeasuredServing(
            params=bench["model"]["num_parameters"],
            tokens_per_s=point["total_tokens_per_s"]["mean"],
            output_frac=generated / (point["input_tokens"] + generated),
            device=bench["device"]["name"],
            source=f"{bench['model']['name']} in batches of {point['batch_size']}",
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        raise ConfigError(f"--bench {file} holds no throughput", fix="measure with tinyllama serve") from None
    if not is_positive(measured.params) or not is_positive(measured.tokens_per_s):
        raise ConfigError(
            f"--bench {file} does not know its model's size and speed", fix="measure a Llama with tinyllama serve"
        )
    return measured
