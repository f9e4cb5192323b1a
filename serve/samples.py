"""What to say about repeated measurements: percentiles, and a mean with its 95% interval. Pure, no torch, no numpy.

The interval is Student's t over the repeats of one point: it covers the noise between repeats on this machine in this
process, not the difference between machines or between loads of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tinyllama.stats.student import t_quantile

PERCENTILES = (50, 90, 99)


def percentile(samples: Sequence[float], q: float) -> float:
    """The q-th percentile, 0 <= q <= 100, by linear interpolation between order statistics (numpy's default)."""
    if not samples or not 0 <= q <= 100:
        raise ValueError(f"percentile {q} of {len(samples)} samples")
    ordered = sorted(samples)
    position = (len(ordered) - 1) * q / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def mean_interval(samples: Sequence[float], confidence: float = 0.95) -> dict[str, float | None]:
    """Mean and two-sided t interval: {"mean", "low", "high"}; low and high are None for a single sample."""
    if not samples:
        raise ValueError("no samples")
    n = len(samples)
    mean = math.fsum(samples) / n
    if n == 1:
        return {"mean": mean, "low": None, "high": None}
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in samples) / (n - 1))
    half = t_quantile(confidence, n - 1) * deviation / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def throughput_summary(
    batch_size: int, input_tokens: int, output_tokens: int, samples_s: Sequence[float], num_samples: int = 1
) -> dict[str, dict[str, float | None]]:
    """Rates of one point from the wall times of its repeats, each of `batch_size` requests of `num_samples` sequences.

    Each rate is computed per repeat and then averaged. Tokens per second: output counts generated tokens only, total
    counts prompt tokens too (vLLM's `tokens_per_second`).
    """
    output = batch_size * num_samples * output_tokens
    total = output + batch_size * input_tokens
    return {
        "output_tokens_per_s": mean_interval([output / s for s in samples_s]),
        "total_tokens_per_s": mean_interval([total / s for s in samples_s]),
        "requests_per_s": mean_interval([batch_size / s for s in samples_s]),
    }


def tpot_s(e2e_s: float, ttft_s: float, output_tokens: int) -> float:
    """Time per output token after the first, in seconds: vLLM's definition, per request."""
    if output_tokens < 2:
        raise ValueError("TPOT needs at least two output tokens")
    return (e2e_s - ttft_s) / (output_tokens - 1)


def latency_summary(
    samples: Mapping[str, Sequence[float]], percentiles: Sequence[int] = PERCENTILES
) -> dict[str, dict[str, float]]:
    """For each list of seconds, named `..._s`: mean and percentiles in milliseconds, named `..._ms`."""
    summary = {}
    for name, values in samples.items():
        row = {"mean": 1e3 * math.fsum(values) / len(values)}
        row.update({f"p{q}": 1e3 * percentile(values, q) for q in percentiles})
        summary[f"{name.removesuffix('_s')}_ms"] = row
    return summary
