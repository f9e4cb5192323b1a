"""Offline throughput and latency of one model in vLLM, and the `bench.json` that records them.

Throughput: batches of equal random prompts, submitted together, each generating exactly the asked number of tokens.
The repeats go round-robin over the batches, so that a slow minute of the machine hits all of them. Latency: single
requests, one after the other. Every batch runs first as warm-up, and that is not counted. Runs in the order
warm-up, throughput, latency; `settings` in the result says all of it again.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from serve import hardware, prompts, roofline, samples, speculative
from serve.engine import Batch, Engine, EngineConfig
from serve.hardware import NO_LIMITS, Limits, Peak
from serve.prompts import read_text
from serve.source import Source
from tinyllama.data.durable import has_format, refuse_foreign, write_text
from tinyllama.errors import ConfigError, UserError
from tinyllama.model.config import ModelConfig

FORMAT = "tinyllama-bench-1"
WARMUP_RUNS = 2
GIB = 2**30


class Point(NamedTuple):
    """One kind of batch: so many equal prompts, each continued `num_samples` times."""

    batch_size: int
    input_tokens: int
    output_tokens: int
    num_samples: int

    @property
    def cost(self) -> float:
        """Rough relative duration, for the progress bar: a step costs little more for more sequences."""
        return (1 + self.batch_size * self.num_samples / 16) * self.output_tokens

    def __str__(self) -> str:
        many = f" x {self.num_samples}" if self.num_samples > 1 else ""
        return f"batch {self.batch_size}{many} of {self.input_tokens}x{self.output_tokens}"


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is sent: batch sizes, exact prompt and output lengths in tokens, and how often.

    lengths: several pairs of prompt and output length in place of one; the first is also that of the single requests.
    samples_per_prompt: sequences generated for each prompt of a batch, n of vLLM.
    """

    batch_sizes: tuple[int, ...] = (1, 8, 32)
    input_tokens: int = 64
    output_tokens: int = 64
    repeats: int = 5
    latency_requests: int = 30
    seed: int = 0
    lengths: tuple[tuple[int, int], ...] = ()
    samples_per_prompt: int = 1
    preset: str | None = None
    prompts_file: str | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise ConfigError(f"--temperature {self.temperature}", fix="give 0 (the most likely token) to 2")
        if self.prompts_file is not None:
            read_text(self.prompts_file)
        if any(min(pair) < 1 for pair in self.lengths) or len(set(self.lengths)) < len(self.lengths):
            given = ",".join(f"{prompt}x{output}" for prompt, output in self.lengths)
            raise ConfigError(
                f"--lengths {given}", fix="give different pairs of positive numbers, such as 64x64,512x128"
            )
        for name in ("input_tokens", "output_tokens", "repeats", "latency_requests"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}", fix="give at least 1")
        if self.samples_per_prompt < 1:
            raise ConfigError(f"--samples {self.samples_per_prompt}", fix="give at least 1")
        if not self.batch_sizes or min(self.batch_sizes) < 1 or len(set(self.batch_sizes)) < len(self.batch_sizes):
            given = ",".join(map(str, self.batch_sizes))
            raise ConfigError(f"--batch-sizes {given}", fix="give different positive numbers, such as 1,8,32")

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Every pair of prompt and output length."""
        return self.lengths or ((self.input_tokens, self.output_tokens),)

    @property
    def points(self) -> list[Point]:
        """Every batch of every pair of lengths, in the order of a round."""
        return [Point(size, *shape, self.samples_per_prompt) for shape in self.shapes for size in self.batch_sizes]

    @property
    def single(self) -> Point:
        """The request whose latency is measured."""
        return Point(1, *self.shapes[0], 1)

    @property
    def num_sequences(self) -> int:
        """The most sequences that are generated at once."""
        return max(self.batch_sizes) * self.samples_per_prompt

    @property
    def tokens_per_request(self) -> int:
        """Length of the longest finished sequence."""
        return max(sum(shape) for shape in self.shapes)

    def fits(self, source: Source, max_model_len: int | None) -> None:
        """ConfigError if a request is longer than the context it would be given."""
        limit, name = (
            (max_model_len, "--max-model-len") if max_model_len else (source.max_positions, "the model's context")
        )
        for prompt, output in self.shapes:
            if limit and prompt + output > limit:
                given = (
                    f"--lengths {prompt}x{output}: {prompt} + {output}"
                    if self.lengths
                    else f"--input-tokens {prompt} + --output-tokens {output}"
                )
                raise ConfigError(
                    f"{given} = {prompt + output} exceeds {name} of {limit}",
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


def check_kv_cache(source: Source, dtype: str | None, max_model_len: int | None, given: int) -> None:
    """UserError if a KV cache of `given` bytes cannot hold one sequence of full length, which vLLM insists on."""
    values, longest = source.kv_values_per_token, max_model_len or source.max_positions
    if values is None or longest is None:
        return
    needed = values * roofline.DTYPE_BYTES.get(dtype or source.dtype or "float32", 4) * longest
    if needed > given:
        raise UserError(
            f"--kv-cache-gib {given / GIB:.3g} is too small: one sequence of the context of {longest} tokens needs "
            f"{needed / GIB:.3g} GiB, {(needed - given) / GIB:.3g} GiB are missing",
            fix="raise --kv-cache-gib, or lower --max-model-len",
        )


class Measurement:
    """Runs a workload on an engine and collects raw samples."""

    def __init__(self, engine: Engine, workload: Workload, progress: Callable[[str, float], None]) -> None:
        self.engine, self.workload, self._progress = engine, workload, progress
        self._rng = random.Random(workload.seed)
        self.warmup_s: dict[Point, list[float]] = {point: [] for point in workload.points}
        self.samples_s: dict[Point, list[float]] = {point: [] for point in workload.points}
        self.speculative: dict[str, Any] | None = None  # what a draft got right, in all that was timed
        self._ids: list[int] = []
        if workload.prompts_file is not None:
            longest = max(point.input_tokens for point in workload.points)
            self._ids = prompts.encode(workload.prompts_file, engine.encode, longest)
        self.latency: dict[str, list[float]] = {"e2e_s": [], "ttft_s": []}
        if workload.single.output_tokens > 1:
            self.latency["tpot_s"] = []

    @staticmethod
    def total_cost(workload: Workload) -> float:
        """Sum of the costs of all that `run` will do."""
        runs = WARMUP_RUNS + workload.repeats
        return sum(runs * p.cost for p in workload.points) + (workload.latency_requests + 1) * workload.single.cost

    def _batch(self, point: Point, what: str) -> Batch:
        size, tokens = point.batch_size, point.input_tokens
        if self._ids:
            ids = prompts.windows(self._rng, size, tokens, self._ids)
        else:
            ids = prompts.random_ids(self._rng, size, tokens, self.engine.vocab_size)
        batch = self.engine.run(ids, point.output_tokens, point.num_samples, self.workload.temperature)
        if batch.num_output_tokens != [point.output_tokens * point.num_samples] * point.batch_size:
            raise RuntimeError(f"asked for {point.output_tokens} tokens each, vLLM returned {batch.num_output_tokens}")
        self._progress(what, point.cost)
        return batch

    def run(self) -> None:
        """Warm-up, throughput, latency."""
        work = self.workload
        self.engine.keep_statistics(False)
        for point in work.points:
            for _ in range(WARMUP_RUNS):
                self.warmup_s[point].append(self._batch(point, f"warm-up, {point}").elapsed_s)
        drafted = self.engine.speculation()
        for repeat in range(work.repeats):
            for point in work.points:
                what = f"throughput, {point}, repeat {repeat + 1}/{work.repeats}"
                self.samples_s[point].append(self._batch(point, what).elapsed_s)
        self.engine.keep_statistics(True)
        self._batch(work.single, "warm-up, latency")
        for number in range(work.latency_requests):
            batch = self._batch(work.single, f"latency, request {number + 1}/{work.latency_requests}")
            self.latency["e2e_s"].append(batch.elapsed_s)
            self.latency["ttft_s"].append(batch.ttft_s[0])
            if "tpot_s" in self.latency:
                tpot = samples.tpot_s(batch.elapsed_s, batch.ttft_s[0], work.single.output_tokens)
                self.latency["tpot_s"].append(tpot)
        if self.engine.drafts:
            self.speculative = speculative.acceptance(drafted, self.engine.speculation())

    def throughput(
        self, shape: ModelConfig | None, dtype: str, peak: Peak | None, stored_bytes: int | None = None
    ) -> list[dict[str, Any]]:
        """One entry for each point: raw wall times, rates with intervals, and how close to the device they come.

        shape: the model's, for the arithmetic; None: none. peak: what the device can do at most. stored_bytes: of the
        weights where they are quantized.
        """
        return [
            {
                "batch_size": point.batch_size,
                "num_requests": point.batch_size,
                "input_tokens": point.input_tokens,
                "output_tokens": point.output_tokens,
                "samples_per_prompt": point.num_samples,
                "warmup_s": self.warmup_s[point],
                "samples_s": self.samples_s[point],
                **samples.throughput_summary(*point[:3], self.samples_s[point], point.num_samples),
                **(_arithmetic(point, self.samples_s[point], shape, dtype, peak, stored_bytes) if shape else {}),
            }
            for point in self.workload.points
        ]


def _arithmetic(
    point: Point,
    samples_s: Sequence[float],
    shape: ModelConfig,
    dtype: str,
    peak: Peak | None,
    stored_bytes: int | None,
) -> dict[str, float | None]:
    """Memory read and arithmetic done by a batch, per second, and as shares of the device's peak."""
    size, sequences = roofline.DTYPE_BYTES[dtype], point.batch_size * point.num_samples
    context = point.input_tokens + point.output_tokens // 2
    weights, kv = stored_bytes or roofline.weight_bytes(shape, size), roofline.kv_bytes_per_token(shape, size)
    read = roofline.bytes_per_step(weights, kv, sequences, context)
    flops = point.batch_size * roofline.request_flops(shape, *point[1:])
    batches_per_s = sum(1 / s for s in samples_s) / len(samples_s)
    bytes_per_s, flops_per_s = read * point.output_tokens * batches_per_s, flops * batches_per_s
    return {
        "bytes_per_step": read,
        "bytes_per_s": bytes_per_s,
        "flops_per_s": flops_per_s,
        "bandwidth_frac": bytes_per_s / peak.bytes_per_s if peak and peak.bytes_per_s else None,
        "flops_frac": flops_per_s / peak.flops_per_s if peak and peak.flops_per_s else None,
    }


def measure(
    source: Source,
    config: EngineConfig,
    workload: Workload,
    log: Path,
    progress: Callable[[str, float], None],
    limits: Limits = NO_LIMITS,
) -> dict[str, Any]:
    """Load, run, close; returns what bench.json holds. Needs `engine.importable_vllm` around it.

    limits: what the device can do, where the user said so.
    """
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
    bench = header(source, resolved, workload)
    shape, dtype = source.shape, resolved["dtype"]
    # With a draft a pass gives several tokens, and the draft reads its weights too: no such arithmetic.
    known = shape if dtype in roofline.DTYPE_BYTES and config.draft is None else None
    peak = hardware.peak(bench["device"], dtype, limits) if known else None
    if peak and source.rounds_inputs and limits.peak_tflops is None:
        peak = dataclasses.replace(peak, flops_per_s=None)  # the peak known here is that of dtype
    if bench["roofline"]:
        bench["roofline"]["peak"] = peak.describe() if peak else None
    bench |= {
        "load_s": load_s,
        "speculative": measurement.speculative,
        "throughput": measurement.throughput(known, dtype, peak, source.stored_bytes),
        "latency": {"samples": measurement.latency, **samples.latency_summary(measurement.latency)},
    }
    return bench


def header(source: Source, resolved: dict[str, Any], workload: Workload) -> dict[str, Any]:
    """A bench.json in which nothing has been measured: model, versions, device, settings. resolved: of the engine."""
    from serve import engine as door

    shape, dtype = source.shape, resolved["dtype"]
    context = workload.single.input_tokens + workload.single.output_tokens // 2
    return {
        "format": FORMAT,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": source.describe(),
        "versions": door.versions(),
        "device": door.device(),
        "settings": {
            **dataclasses.asdict(workload),
            **resolved,
            "quantization": source.quantization["scheme"] if source.quantization else None,
            "prompts_sha256": prompts.sha256(workload.prompts_file) if workload.prompts_file else None,
            "warmup_runs": WARMUP_RUNS,
            "ignore_eos": True,
            "detokenize": True,
            "prompts": f"{'windows of a text' if workload.prompts_file else 'random token ids'}, new for every run",
            "confidence": 0.95,
        },
        "load_s": None,
        "roofline": roofline.describe(shape, dtype, context, source.stored_bytes)
        if shape and dtype in roofline.DTYPE_BYTES
        else None,
        "throughput": [],
        "latency": {"samples": {}},
    }


def refuse_to_replace(output: Path) -> None:
    """DataError where DIR/bench.json or DIR/table.md is none of ours."""
    refuse_foreign(output / "bench.json", lambda text: has_format(text, FORMAT.rpartition("-")[0]), "tinyllama serve's")
    refuse_foreign(output / "table.md", lambda text: text.startswith("## "), "tinyllama serve's")


def write_bench(bench: dict[str, Any], output: Path) -> Path:
    """Write DIR/bench.json and DIR/table.md, each by a rename."""
    from serve.table import markdown

    for name, text in (("table.md", markdown(bench)), ("bench.json", json.dumps(bench, indent=2) + "\n")):
        write_text(output / name, [text])
    return output / "bench.json"
