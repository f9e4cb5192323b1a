"""Runs written as the commands write them, of any length, with everything that a report shows."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from evalsuite.suites import SUITES
from tinyllama.stats.intervals import wilson

BATCH = 2_097_152  # tokens of a step


def write_training(run: Path, steps: int = 400, seed: int = 0, name: str = "slimpajama") -> Path:
    """config.json, metrics.jsonl with validation, saves, two restarts and a last line cut short, spikes.jsonl."""
    rng = random.Random(seed)
    run.mkdir(parents=True)
    with open(run / "metrics.jsonl", "w") as stream:

        def write(entry: dict) -> None:
            stream.write(json.dumps(entry) + "\n")

        for step in range(1, steps + 1):
            tokens = step * BATCH
            if step in (1, steps // 4, steps // 2):
                started = {"at": "2026-01-02T03:04:05+00:00", "ranks": 16, "device": "NVIDIA A100-SXM4-40GB"}
                write({"step": step - 1, "tokens": tokens - BATCH, "started": started})
            loss = 1.9 + 8 * math.exp(-60 * step / steps) + 1.2 * math.exp(-4 * step / steps) + rng.gauss(0, 0.03)
            loss += 0.05 * seed + (2.0 if step == steps // 3 else 0.0)
            write(
                {
                    "step": step,
                    "tokens": tokens,
                    "loss": loss,
                    "lr": 4e-4 * min(1, 50 * step / steps) * (0.55 + 0.45 * math.cos(math.pi * step / steps)),
                    "grad_norm": 0.4 + abs(rng.gauss(0, 0.1)),
                    "tokens_per_s": 382_000 + rng.gauss(0, 3000),
                    "mfu": 0.54 + rng.gauss(0, 0.004),
                    "step_time_s": 5.4,
                    "skipped_steps": 0,
                    "peak_memory_bytes": 31_000_000_000,
                    "epochs": {name: tokens * 0.7 / 627e9, "starcoder": tokens * 0.3 / 250e9},
                }
            )
            if step % (steps // 20) == 0:
                results = {
                    name: {"loss": loss + 0.02, "bits_per_byte": loss / 3, "targets": 1000},
                    "starcoder": {"loss": loss - 0.8, "bits_per_byte": loss / 4, "targets": 500},
                }
                write({"step": step, "tokens": tokens, "validation": results})
            if step % (steps // 10) == 0:
                write({"step": step, "save_s": 41.2, "save_stall_s": 1.1})
        stream.write('{"step": 99, "tok')
    spike = {"step": steps // 3, "batch": steps // 3, "loss": 4.2, "limit": 3.1, "action": "skip"}
    (run / "spikes.jsonl").write_text(json.dumps(spike) + "\n")
    config = {
        "recipe": {
            "model": {"num_hidden_layers": 22, "hidden_size": 2048},
            "training": {"tokens": 2 * steps * BATCH},
        },
        "batch": {"ranks": 16},
        "num_parameters": 1_100_048_384,
        "device": "NVIDIA A100-SXM4-40GB",
        "peak_flops_source": "data sheet of A100",
        "versions": {"tinyllama": "0.1.0", "torch": "2.9.1", "deepspeed": "not installed"},
        "git": {"commit": "0123456789abcdef", "dirty": True},
    }
    (run / "config.json").write_text(json.dumps(config))
    return run


def write_evaluation(
    folder: Path, tokens: float, gain: float = 0.0, suites: tuple[str, ...] = ("commonsense",)
) -> Path:
    """A results.json of 200 items a benchmark, every score moved by `gain`."""
    tasks, means = {}, {}
    for suite in suites:
        for place, benchmark in enumerate(SUITES[suite]):
            value = round(200 * (0.3 + 0.05 * place + gain)) / 200
            bounds = wilson(200 * value, 200)
            tasks[benchmark.name] = {
                "metric": benchmark.metric,
                "metric_key": f"{benchmark.metric},none",
                "value": value,
                "stderr": math.sqrt(value * (1 - value) / 199),
                "ci95": {"low": bounds.low, "high": bounds.high, "method": bounds.method},
                "n": 200,
                "num_fewshot": benchmark.num_fewshot,
                "higher_is_better": True,
                "protocol": "harness",
            }
        own = [tasks[b.name] for b in SUITES[suite]]
        value = sum(t["value"] for t in own) / len(own)
        stderr = math.sqrt(sum(t["stderr"] ** 2 for t in own)) / len(own)
        means[suite] = {
            "value": value,
            "stderr": stderr,
            "ci95": {"low": value - 1.96 * stderr, "high": value + 1.96 * stderr, "method": "normal"},
            "unit": "share",
            "benchmarks": [b.name for b in SUITES[suite]],
            "protocol": "harness",
        }
    results = {
        "format": "tinyllama-results-1",
        "model": f"exports/step-{tokens:.0f}",
        "tokens": tokens,
        "settings": {"limit": 200, "data_dir": "bundle"},
        "versions": {"lm_eval": "0.4.13", "torch": "2.9.1"},
        "tasks": tasks,
        "suites": means,
    }
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def rate(mean: float, part: float = 0.05) -> dict[str, float]:
    return {"mean": mean, "low": mean * (1 - part), "high": mean * (1 + part)}


def write_bench(folder: Path, device: str = "NVIDIA A100-SXM4-40GB", online: bool = False, speed: float = 1.0) -> Path:
    """A bench.json of three batch sizes; online: with curves of latency over load."""
    throughput = [
        {
            "batch_size": size,
            "input_tokens": 64,
            "output_tokens": 64,
            "samples_s": [1.0, 1.1],
            "output_tokens_per_s": rate(speed * 150 * size**0.8),
            "total_tokens_per_s": rate(speed * 300 * size**0.8),
            "requests_per_s": rate(speed * 2.4 * size**0.8),
        }
        for size in (1, 16, 64)
    ]
    quantiles = {"mean": 9.0, "p50": 8.5, "p90": 10.0, "p99": 12.0}
    bench = {
        "format": "tinyllama-bench-1",
        "model": {"name": "export", "num_parameters": 1_100_048_384, "trained_tokens": 8e8},
        "versions": {"vllm": "0.32.0", "torch": "2.9.1"},
        "device": {"platform": "cuda", "name": device, "cores": 8},
        "settings": {"dtype": "bfloat16", "eager": False, "input_tokens": 64, "output_tokens": 64},
        "throughput": throughput,
        "latency": {"e2e_ms": quantiles, "ttft_ms": quantiles, "tpot_ms": quantiles},
    }
    if online:
        bench["online"] = {
            "settings": {"max_in_flight": 16, "slo": {"ttft_ms": 200.0, "tpot_ms": 20.0, "e2e_ms": None}},
            "points": [],
            "curve": [_load(value, speed) for value in (1.0, 4.0, 16.0, "inf")],
            "max_rate_under_slo": {"slo": {}, "rate_rps": 8.0, "low": 7.0, "high": 9.0, "probes": []},
        }
    folder.mkdir(parents=True)
    (folder / "bench.json").write_text(json.dumps(bench))
    return folder


def _load(value: float | str, speed: float) -> dict:
    served = speed * min(20.0 if value == "inf" else float(value), 14.0)
    wait = 1 + served**2 / 20

    def latencies(base: float) -> dict:
        return {q: rate(base * wait * factor) for q, factor in (("p50", 1), ("p90", 1.5), ("p95", 2), ("p99", 3))}

    return {
        "kind": "rate",
        "value": value,
        "repeats": 3,
        "requests_per_s": rate(served),
        "output_tokens_per_s": rate(64 * served),
        "goodput_rps": rate(min(served, 9.0)),
        "ttft_ms": latencies(15),
        "tpot_ms": latencies(6),
        "itl_ms": latencies(6),
        "e2e_ms": latencies(400),
        "e2e_with_queue_ms": latencies(410),
    }


def write_whole(folder: Path, seed: int = 0, online: bool = True) -> Path:
    """A folder such as the demo's: run/, eval/ of three checkpoints, serve/."""
    write_training(folder / "run", seed=seed)
    for number, tokens in enumerate((2e8, 4e8, 8e8), 1):
        write_evaluation(
            folder / "eval" / str(number), tokens, 0.03 * number - 0.01 * seed, ("commonsense", "problem_solving")
        )
    write_bench(folder / "serve", online=online, speed=1 + seed)
    return folder
