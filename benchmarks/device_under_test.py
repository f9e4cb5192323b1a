"""The device that is measured, a GPU or this machine's processor, behind the same methods.

All that a benchmark asks of torch.cuda is asked here, so that what runs on a GPU can be run from start to end without one.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Processor:
    """The CPU form: every method does what it says, on host memory and the host's clock."""

    kind = "cpu"
    needs_gpu: str | None = "needs a GPU"  # why a row that only a GPU can give is skipped

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    def describe(self) -> dict[str, Any]:
        """Name of the device and all that decides its figures."""
        return {"device": "cpu", "card": None}

    def synchronize(self) -> None:
        """Wait until all work given to the device is done."""

    def times_ms(self, work: Callable[[], Any], repeats: int, warmup: int = 2) -> list[float]:
        """Milliseconds of each of `repeats` calls, after `warmup` that do not count."""
        for _ in range(warmup):
            work()
        found = []
        for _ in range(repeats):
            began = time.perf_counter()
            work()
            found.append((time.perf_counter() - began) * 1000)
        return found

    def median_ms(self, work: Callable[[], Any], repeats: int, warmup: int = 2) -> float:
        """Median of `times_ms`."""
        return statistics.median(self.times_ms(work, repeats, warmup))

    def peak_bytes(self) -> int:
        """The most memory that this process has had."""
        kib = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        return int(kib[1]) * 1024 if kib else 0

    def reset_peak(self) -> None:
        """Count the peak anew from now on, where the device can."""

    def empty_cache(self) -> None:
        """Give freed memory back."""

    def memory_bytes(self) -> tuple[int, int]:
        """(free, total)."""
        import psutil

        memory = psutil.virtual_memory()
        return int(memory.available), int(memory.total)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in memory from which a copy to the device is fastest."""
        return tensor

    def profiled(self, work: Callable[[], Any]) -> Any:
        """torch's profile of one call of `work`."""
        with torch.profiler.profile(activities=self._activities()) as profile:
            work()
            self.synchronize()
        return profile

    def _activities(self) -> list[Any]:
        return [torch.profiler.ProfilerActivity.CPU]


class Gpu(Processor):
    """The first GPU of this machine."""

    kind = "cuda"
    needs_gpu = None

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", 0)
        torch.cuda.set_device(0)

    def describe(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(0)
        return {
            "device": "cuda",
            "card": torch.cuda.get_device_name(0),
            "capability": list(torch.cuda.get_device_capability(0)),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "cudnn_file": loaded_library("libcudnn.so"),
            "driver": _driver(),
        }

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def times_ms(self, work: Callable[[], Any], repeats: int, warmup: int = 2) -> list[float]:
        """By events on the device: no wait of the host between the calls."""
        for _ in range(warmup):
            work()
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        torch.cuda.synchronize()
        for before, after in pairs:
            before.record()
            work()
            after.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in pairs]

    def peak_bytes(self) -> int:
        """The most memory that tensors have held."""
        return torch.cuda.max_memory_allocated()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def memory_bytes(self) -> tuple[int, int]:
        return torch.cuda.mem_get_info()

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory()

    def _activities(self) -> list[Any]:
        return [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]


def find_device() -> Processor:
    """The GPU where there is one, otherwise the processor."""
    return Gpu() if torch.cuda.is_available() else Processor()


def loaded_library(name: str) -> str | None:
    """The file of a shared library in this process: a system's copy on LD_LIBRARY_PATH can hide the wheel's."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if name in line:
            return line.split(maxsplit=5)[-1]
    return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None
