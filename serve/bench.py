"""Offline throughput and latency of one model in vLLM, and the `bench.json` that records them.

Throughput: batches of equal random prompts, submitted together, each generating exactly the asked number of tokens.
The repeats go round-robin over the batch sizes, so that a slow minute of the machine hits all of them. Latency: single
requests, one after the other. Every batch size runs first as warm-up, and that is not counted. Runs in the order
warm-up, throughput, latency; `settings` in the result says all of it again.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve import roofline, samples
from serve.engine import Batch, Engine, EngineConfig
from serve.source import Source
from tinyllama.errors import ConfigError, UserError

FORMAT = "tinyllama-bench-1"
WARMUP_RUNS = 2
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is sent: batch sizes, exact prompt and output lengths in tokens, and how often."""

    batch_sizes: tuple[int, ...] = (1, 8, 32)
    input_tokens: int = 64
    output_tokens: int = 64
    repeats: int = 5
    latency_requests: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("input_tokens", "output_tokens", "repeats", "latency_requests"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}", fix="give at least 1")
        if not self.batch_sizes or min(self.batch_sizes) < 1 or len(set(self.batch_sizes)) < len(self.batch_sizes):
            given = ",".join(map(str, self.batch_sizes))
            raise ConfigError(f"--batch-sizes {given}", fix="give different positive numbers, such as 1,8,32")

    @property
    def tokens_per_request(self) -> int:
        """Length of a finished sequence."""
        return self.input_tokens + self.output_tokens

    def fits(self, source: Source, max_model_len: int | None) -> None:
        """ConfigError if a request is longer than the context it would be given."""
        limit, name = (
            (max_model_len, "--max-model-len") if max_model_len else (source.max_positions, "the model's context")
        )
        if limit and self.tokens_per_request > limit:
            raise ConfigError(
                f"--input-tokens {self.input_tokens} + --output-tokens {self.output_tokens} = "
                f"{self.tokens_per_request} exceeds {name} of {limit}",
                fix=f"shorten them to at most {limit} together",
            )
        if max_model_len and source.max_positions and max_model_len > source.max_positions:
            raise ConfigError(
                f"--max-model-len {max_model_len} exceeds the model's context of {source.max_positions}",
                fix=f"give at most {source.max_positions}",
            )


def cpu_kv_cache_bytes(
    source: Source, dtype: str | None, max_model_len: int | None, sequences: int, tokens: int
) -> int:
    """KV cache to reserve on a CPU, where vLLM's own default is most of the machine's memory.

    Room for `sequences` of `tokens` at once. UserError if that is more than the memory that is free.
    """
    import psutil

    free = psutil.virtual_memory().available
    values = source.kv_values_per_token
    if values is None:
        return free // 4
    size = roofline.DTYPE_BYTES.get(dtype or source.dtype or "float32", 4)
    longest = max_model_len or source.max_positions or tokens
    needed = roofline.kv_cache_bytes(values * size, sequences, tokens, longest)
    if needed > free:
        raise UserError(
            f"the KV cache for {sequences} sequences of {tokens} tokens (context {longest}) needs {needed / GIB:.2f} GiB, "
            f"{free / GIB:.2f} GiB of memory are free, {(needed - free) / GIB:.2f} GiB are missing",
            fix="lower --max-model-len, --batch-sizes or the token counts, or set --kv-cache-gib",
        )
    return needed


def prompts(rng: random.Random, batch_size: int, tokens: int, vocab_size: int) -> list[list[int]]:
    """Random prompts of exactly `tokens` ids; the first three ids (unknown, begin, end) are left out if there are more."""
    first = 3 if vocab_size > 3 else 0
    return [[rng.randrange(first, vocab_size) for _ in range(tokens)] for _ in range(batch_size)]


class Measurement:
    """Runs a workload on an engine and collects raw samples."""

    def __init__(self, engine: Engine, workload: Workload, progress: Callable[[str, float], None]) -> None:
        self.engine, self.workload, self._progress = engine, workload, progress
        self._rng = random.Random(workload.seed)
        self.warmup_s: dict[int, list[float]] = {size: [] for size in workload.batch_sizes}
        self.samples_s: dict[int, list[float]] = {size: [] for size in workload.batch_sizes}
        self.latency: dict[str, list[float]] = {"e2e_s": [], "ttft_s": []}
        if workload.output_tokens > 1:
            self.latency["tpot_s"] = []

    @staticmethod
    def cost(batch_size: int) -> float:
        """Rough relative duration of a batch, for the progress bar: a step costs little more for more sequences."""
        return 1 + batch_size / 16

    @staticmethod
    def total_cost(workload: Workload) -> float:
        """Sum of `cost` over all that `run` will do."""
        runs = WARMUP_RUNS + workload.repeats
        return sum(runs * Measurement.cost(b) for b in workload.batch_sizes) + (
            (workload.latency_requests + 1) * Measurement.cost(1)
        )

    def _batch(self, batch_size: int, what: str) -> Batch:
        work = self.workload
        ids = prompts(self._rng, batch_size, work.input_tokens, self.engine.vocab_size)
        batch = self.engine.run(ids, work.output_tokens)
        if batch.num_output_tokens != [work.output_tokens] * batch_size:
            raise RuntimeError(f"asked for {work.output_tokens} tokens each, vLLM returned {batch.num_output_tokens}")
        self._progress(what, self.cost(batch_size))
        return batch

    def run(self) -> None:
        """Warm-up, throughput, latency."""
        work = self.workload
        for size in work.batch_sizes:
            for _ in range(WARMUP_RUNS):
                self.warmup_s[size].append(self._batch(size, f"warm-up, batch {size}").elapsed_s)
        for repeat in range(work.repeats):
            for size in work.batch_sizes:
                what = f"throughput, batch {size}, repeat {repeat + 1}/{work.repeats}"
                self.samples_s[size].append(self._batch(size, what).elapsed_s)
        self._batch(1, "warm-up, latency")
        for number in range(work.latency_requests):
            batch = self._batch(1, f"latency, request {number + 1}/{work.latency_requests}")
            self.latency["e2e_s"].append(batch.elapsed_s)
            self.latency["ttft_s"].append(batch.ttft_s[0])
            if "tpot_s" in self.latency:
                tpot = samples.tpot_s(batch.elapsed_s, batch.ttft_s[0], work.output_tokens)
                self.latency["tpot_s"].append(tpot)

    def throughput(self, arithmetic: dict[str, Any] | None) -> list[dict[str, Any]]:
        """One entry for each batch size: raw wall times, rates with intervals, and the memory traffic they imply."""
        work, points = self.workload, []
        for size in work.batch_sizes:
            point: dict[str, Any] = {
                "batch_size": size,
                "num_requests": size,
                "input_tokens": work.input_tokens,
                "output_tokens": work.output_tokens,
                "warmup_s": self.warmup_s[size],
                "samples_s": self.samples_s[size],
                **samples.throughput_summary(size, work.input_tokens, work.output_tokens, self.samples_s[size]),
            }
            if arithmetic:
                read = roofline.bytes_per_step(
                    arithmetic["weight_bytes"], arithmetic["kv_bytes_per_token"], size, arithmetic["context_tokens"]
                )
                steps_per_s = (point["output_tokens_per_s"]["mean"] or 0) / size
                point["bytes_per_step"] = read
                point["bytes_per_s"] = read * steps_per_s
            points.append(point)
        return points


def measure(
    source: Source, config: EngineConfig, workload: Workload, log: Path, progress: Callable[[str, float], None]
) -> dict[str, Any]:
    """Load, run, close; returns what bench.json holds. Needs `engine.importable_vllm` around it."""
    from serve import engine as door

    started = time.perf_counter()
    with door.open_engine(config, log) as engine:
        load_s = time.perf_counter() - started
        progress("loaded", 0)
        resolved = engine.settings
        measurement = Measurement(engine, workload, progress)
        try:
            measurement.run()
        except Exception as error:
            if type(error).__name__ != "EngineDeadError":
                raise
            reason = door.logged_reason(log) or "it logged no error"
            raise UserError(f"vLLM's engine died: {reason}", fix=f"its whole log is in {log}") from error
    shape, dtype = source.shape, resolved["dtype"]
    context = workload.input_tokens + workload.output_tokens // 2
    arithmetic = roofline.describe(shape, dtype, context) if shape and dtype in roofline.DTYPE_BYTES else None
    return {
        "format": FORMAT,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": source.describe(),
        "versions": door.versions(),
        "device": door.device(),
        "settings": {
            **dataclasses.asdict(workload),
            **resolved,
            "warmup_runs": WARMUP_RUNS,
            "ignore_eos": True,
            "temperature": 1.0,
            "detokenize": True,
            "prompts": "random token ids, new for every run",
            "confidence": 0.95,
        },
        "load_s": load_s,
        "roofline": arithmetic,
        "throughput": measurement.throughput(arithmetic),
        "latency": {"samples": measurement.latency, **samples.latency_summary(measurement.latency)},
    }


def write_bench(bench: dict[str, Any], output: Path) -> Path:
    """Write DIR/bench.json and DIR/table.md, each by a rename."""
    from serve.table import markdown

    output.mkdir(parents=True, exist_ok=True)
    for name, text in (("table.md", markdown(bench)), ("bench.json", json.dumps(bench, indent=2) + "\n")):
        partial = output / f".{name}.partial"
        partial.write_text(text)
        os.replace(partial, output / name)
    return output / "bench.json"
