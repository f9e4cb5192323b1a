"""What a device can do at most: bytes per second from its memory, FLOP/s of a matrix product. For the roofline.

For a GPU: the vendor's data sheet (tinyllama/hardware.py). For a CPU there is no such number, so it is measured, in a
process of its own with as many threads as vLLM computes on. Either can be given by the user.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tinyllama.errors import ConfigError
from tinyllama.hardware import find

READ_BYTES = 2**29  # more than any cache
MATMUL_SIZE = 2048


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the user says of the device; None: to be found out."""

    bandwidth_gb_per_s: float | None = None
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        for name in ("bandwidth_gb_per_s", "peak_tflops"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"--{name.replace('_', '-')} {value:g}", fix="give a positive number")


NO_LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class Peak:
    """The device's limits and where they are from. cache_bytes: of a CPU's largest cache."""

    bytes_per_s: float | None
    flops_per_s: float | None
    source: str
    cache_bytes: int | None = None

    def describe(self) -> dict[str, Any]:
        """For bench.json."""
        return dataclasses.asdict(self)


def peak(device: dict[str, Any], dtype: str, limits: Limits = NO_LIMITS) -> Peak | None:
    """The limits of the device of a bench.json; None if nothing is known. A data sheet's peak is for 16-bit values."""
    given = (
        limits.bandwidth_gb_per_s and limits.bandwidth_gb_per_s * 1e9,
        limits.peak_tflops and limits.peak_tflops * 1e12,
    )
    if all(given):
        return Peak(*given, "as given")
    if device["platform"] == "cpu":
        threads = max(1, device["cores"] - (device["omp_threads_bind"] == "auto"))
        found = measured_cpu(dtype, threads)
        source = f"measured here on {threads} thread{'s' if threads > 1 else ''}"
        known: tuple[float | None, float | None] = (found["bytes_per_s"], found["flops_per_s"])
    else:
        gpu = find(device["name"])
        if gpu is None:
            known, source = (None, None), "as given"
        else:
            flops = gpu.flops_per_s if dtype != "float32" else None
            known, source = (gpu.bytes_per_s, flops), f"data sheet of the {gpu.name}"
    if any(given):
        source += ", or as given"
    found_peak = Peak(given[0] or known[0], given[1] or known[1], source, cache_bytes())
    return found_peak if found_peak.bytes_per_s or found_peak.flops_per_s else None


def measured_cpu(dtype: str, threads: int) -> dict[str, float]:
    """Bytes/s that `threads` threads read from memory, and FLOP/s of their matrix product in `dtype`. Takes some seconds.

    In a process of its own: the number of torch's threads cannot be changed back in this one.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    line = [sys.executable, "-m", "serve.hardware", dtype, str(threads)]
    root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def _measure(dtype: str, threads: int) -> dict[str, float]:
    import torch

    torch.set_num_threads(threads)
    memory = torch.zeros(READ_BYTES // 4)
    read = READ_BYTES / _fastest(lambda: memory.sum())
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=getattr(torch, dtype)) for _ in range(2))
    return {"bytes_per_s": read, "flops_per_s": 2 * MATMUL_SIZE**3 / _fastest(lambda: torch.mm(a, b))}


def _fastest(work: Any, seconds: float = 1.0) -> float:
    """Seconds of the fastest run: what the machine can do when nothing else disturbs it."""
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def cache_bytes() -> int | None:
    """The size of this machine's largest processor cache, as Linux tells it."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * 1024)
    return max(sizes, default=None)


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], int(sys.argv[2]))))
