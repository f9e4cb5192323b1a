"""Offline measurements on vLLM: throughput over batch sizes, and the latency of one request at a time.

Prompts are random tokens of exact lengths, every request generates exactly the asked number of tokens, nothing is cached
between them. Each point is run once to warm up, which does not count, then `repeats` times. Raw times are kept.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve import engine as door
from serve.intervals import mean_interval, percentile
from serve.roofline import decode_flops_per_token, kv_bytes_per_token, weight_bytes
from tinyllama.errors import UserError
from tinyllama.model.config import ModelConfig

FORMAT = "tinyllama-bench-1"
KV_CACHE_GIB = 2


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """What is measured."""

    batch_sizes: tuple[int, ...] = (1, 8, 32)
    input_tokens: int = 64
    output_tokens: int = 64
    repeats: int = 3
    latency_requests: int = 10
    dtype: str = "bfloat16"
    max_model_len: int | None = None
    kv_cache_gib: int = KV_CACHE_GIB
    eager: bool = True
    seed: int = 0

    def check(self, model_length: int | None) -> None:
        """UserError for settings that cannot be measured."""
        for name in ("input_tokens", "repeats", "latency_requests", "kv_cache_gib"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}", fix="give 1 or more")
        if self.output_tokens < 2:
            raise UserError(f"--output-tokens {self.output_tokens}", fix="give 2 or more: time per token needs two")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise UserError(f"--batch-sizes {self.batch_sizes}", fix="give numbers from 1, with commas")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"--dtype {self.dtype}", fix="give float32, bfloat16 or float16")
        longest = self.max_model_len or model_length
        if longest and self.input_tokens + self.output_tokens > longest:
            raise UserError(
                f"{self.input_tokens} input and {self.output_tokens} output tokens exceed the context of {longest}",
                fix="shorten them",
            )


def _prompts(count: int, settings: BenchSettings, vocab_size: int, seed: int) -> list[dict[str, list[int]]]:
    """Prompts of random tokens, different for every call so that nothing could be reused."""
    import random

    generator = random.Random(f"{settings.seed}/{seed}")
    # Ids below 300 are control and byte pieces in Llama's vocabulary.
    low = min(300, vocab_size // 2)
    return [
        {"prompt_token_ids": [generator.randrange(low, vocab_size) for _ in range(settings.input_tokens)]}
        for _ in range(count)
    ]


def _timed(llm: Any, prompts: list[dict[str, list[int]]], output_tokens: int) -> float:
    """Seconds to generate exactly `output_tokens` for every prompt; RuntimeError if vLLM gave another number."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - started
    made = [len(output.outputs[0].token_ids) for output in outputs]
    if made != [output_tokens] * len(prompts):
        raise RuntimeError(f"asked for {output_tokens} tokens of each of {len(prompts)} prompts, got {made[:8]}")
    return seconds


def throughput_point(llm: Any, batch: int, settings: BenchSettings, vocab_size: int) -> dict[str, Any]:
    """One batch size: raw seconds of each repeat, and tokens/s with 95% intervals."""
    _timed(llm, _prompts(batch, settings, vocab_size, -1), settings.output_tokens)
    seconds = [
        _timed(llm, _prompts(batch, settings, vocab_size, repeat), settings.output_tokens)
        for repeat in range(settings.repeats)
    ]
    output_rate, output_ci = mean_interval([batch * settings.output_tokens / s for s in seconds])
    total_rate, _ = mean_interval([batch * (settings.input_tokens + settings.output_tokens) / s for s in seconds])
    return {
        "batch_size": batch,
        "input_tokens": settings.input_tokens,
        "output_tokens": settings.output_tokens,
        "seconds": seconds,
        "output_tokens_per_s": output_rate,
        "output_tokens_per_s_ci95": output_ci,
        "total_tokens_per_s": total_rate,
        "requests_per_s": mean_interval([batch / s for s in seconds])[0],
    }


def latency(llm: Any, settings: BenchSettings, vocab_size: int) -> dict[str, Any]:
    """One request at a time: time to first token, time per further token, end to end; milliseconds and raw seconds.

    The time to first token is that of the same prompt generating one token; TPOT = (end to end - TTFT) / (tokens - 1).
    """
    first, whole = [], []
    for request in range(-1, settings.latency_requests):  # the first warms up
        prompt = _prompts(1, settings, vocab_size, 10_000 + request)
        ttft = _timed(llm, prompt, 1)
        end_to_end = _timed(llm, prompt, settings.output_tokens)
        if request >= 0:
            first.append(ttft)
            whole.append(end_to_end)
    tpot = [(e - t) / (settings.output_tokens - 1) for e, t in zip(whole, first, strict=True)]
    series = {"ttft": first, "tpot": tpot, "e2el": whole}
    summary = {
        f"{name}_ms": {f"p{q}": 1000 * percentile(values, q) for q in (50, 90, 99)} for name, values in series.items()
    }
    return {"requests": len(whole), "ttft_s": first, "e2el_s": whole, **summary}


def _model_record(model: str, dtype: str, settings: BenchSettings) -> dict[str, Any]:
    record: dict[str, Any] = {"path": model}
    export = Path(model) / "tinyllama_export.json"
    if export.exists():
        found = json.loads(export.read_text())
        record.update({key: found[key] for key in ("step", "tokens", "content_sha256", "num_parameters")})
    if (Path(model) / "config.json").exists():
        config = ModelConfig.from_hf(model)
        context = settings.input_tokens + settings.output_tokens
        record["roofline"] = {
            "weight_bytes": weight_bytes(config, dtype),
            "kv_bytes_per_token": kv_bytes_per_token(config, dtype),
            "flops_per_token": decode_flops_per_token(config, context),
        }
    return record


def run(
    model: str, output: Path, settings: BenchSettings, report: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Measure `model` and write `output/bench.json` after each point. report(what, done, of) follows the progress."""
    length = door.model_length(model)
    settings.check(length)
    needed = settings.input_tokens + settings.output_tokens
    engine_settings = door.EngineSettings(
        model=model,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len or (min(length, max(needed, 512)) if length else needed),
        kv_cache_gib=settings.kv_cache_gib,
        max_num_seqs=max(settings.batch_sizes),
        eager=settings.eager,
        seed=settings.seed,
    )
    points = len(settings.batch_sizes) + 2
    report("loading vLLM", 0, points)
    log = output / "vllm.log"
    log.unlink(missing_ok=True)
    started = time.perf_counter()
    with door.engine(engine_settings, log) as llm:
        vocab_size = llm.model_config.get_vocab_size() if hasattr(llm, "model_config") else 32000
        found: dict[str, Any] = {
            "format": FORMAT,
            "measured_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "model": _model_record(model, settings.dtype, settings),
            "settings": dataclasses.asdict(settings),
            "engine": dataclasses.asdict(engine_settings),
            "device": door.device(),
            "versions": door.versions(),
            "load_s": time.perf_counter() - started,
            "warm_up": "each batch size is run once before it counts, and one request before the latencies",
            "throughput": [],
            "latency": None,
        }
        for done, batch in enumerate(settings.batch_sizes, 1):
            report(f"throughput, batch {batch}", done, points)
            found["throughput"].append(throughput_point(llm, batch, settings, vocab_size))
            write(found, output / "bench.json")
        report("latency", points - 1, points)
        found["latency"] = latency(llm, settings, vocab_size)
        write(found, output / "bench.json")
        report("shutting down", points, points)
    return found


def write(found: dict[str, Any], path: Path) -> None:
    """`bench.json`, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=2) + "\n")
    os.replace(partial, path)
