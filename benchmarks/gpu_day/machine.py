"""Stage 0: what machine this is, and its two ceilings: copying memory and multiplying matrices."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch
from device_under_test import Processor, find_device

from gpu_day.conduct import PACK
from gpu_day.rows import NeedsGpuError
from gpu_day.sizes import Around, around

PACKAGES = ("torch", "triton", "transformers", "deepspeed", "liger-kernel", "torchao", "numpy", "pyarrow", "flash-attn")


def versions(device: Processor, here: Around) -> tuple[str, dict[str, Any]]:
    """Of everything that decides a figure; the card and the commit come first."""
    found: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    pack = PACK / "pack.json"
    torch.backends.cudnn.version()  # loads the library, whose file is told
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    about = device.describe()
    values = {
        **about,
        "versions": found,
        "pack": pack.read_text().strip() if pack.exists() else None,
        "shape": here.sizes.name,
        "cores": os.cpu_count(),
        "host_memory_bytes": memory,
        "disk_free_bytes": shutil.disk_usage(here.work).free,
        "ld_library_path": os.environ.get("LD_LIBRARY_PATH"),
    }
    return f"{about['card'] or 'CPU'}, torch {found['torch']}, driver {about.get('driver')}", values


def nvidia_smi(device: Processor) -> tuple[str, dict[str, Any]]:
    """Its whole output."""
    if device.needs_gpu:
        raise NeedsGpuError(device.needs_gpu)
    done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20, check=True)
    fields = "name,memory.total,clocks.sm,clocks.max.sm,power.limit,temperature.gpu,utilization.gpu"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    line = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    return line, {"output": done.stdout, "fields": fields, "query": line}


def copy_bandwidth(device: Processor, here: Around) -> tuple[str, dict[str, Any]]:
    """Bytes read and written a second, of a copy inside the device's memory."""
    source = torch.empty(here.sizes.copy_bytes, dtype=torch.uint8, device=device.torch_device).random_()
    target = torch.empty_like(source)
    times = device.times_ms(lambda: target.copy_(source), here.sizes.repeats)
    bandwidth = 2 * here.sizes.copy_bytes / (statistics.median(times) / 1000)
    return f"{bandwidth / 1e12:.3f} TB/s", {"bytes_per_s": bandwidth, "times_ms": times}


def host_copy(device: Processor, here: Around) -> tuple[str, dict[str, Any]]:
    """Bytes a second from the device to host memory (pinned on a GPU): what the copy of a checkpoint waits for."""
    size = here.sizes.copy_bytes // 4
    source = torch.empty(size, dtype=torch.uint8, device=device.torch_device).random_()
    target = device.pin(torch.empty(size, dtype=torch.uint8))
    bandwidth = size / (device.median_ms(lambda: target.copy_(source, non_blocking=True), 5) / 1000)
    return f"{bandwidth / 1e9:.1f} GB/s", {"bytes_per_s": bandwidth}


def matmul(device: Processor, here: Around) -> tuple[str, dict[str, Any]]:
    """FLOP/s of a bf16 product of random matrices: the median, and the best."""
    size = here.sizes.matmul
    a, b = (torch.randn(size, size, device=device.torch_device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    times = device.times_ms(lambda: torch.mm(a, b, out=out), here.sizes.repeats, 3)
    median, best = (2 * size**3 / (t / 1000) for t in (statistics.median(times), min(times)))
    return f"{median / 1e12:.1f} TFLOP/s", {"flops": median, "best_flops": best, "size": size, "times_ms": times}


def disk(here: Around) -> tuple[str, dict[str, Any]]:
    """Bytes a second that reach the disk: what a checkpoint waits for."""
    import time

    size = min(here.sizes.copy_bytes, 2**30)
    data = os.urandom(2**22)
    path = Path(here.work) / "speed.partial"
    began = time.perf_counter()
    with open(path, "wb") as stream:
        for _ in range(size // len(data)):
            stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return f"{size / seconds / 1e9:.2f} GB/s", {"bytes_per_s": size / seconds, "bytes": size}


def main() -> None:
    here, device = around(), find_device()
    here.rows.measure("versions", lambda: versions(device, here))
    here.rows.measure("nvidia-smi", lambda: nvidia_smi(device))
    here.rows.measure(f"matmul {here.sizes.matmul} cubed, bf16", lambda: matmul(device, here))
    here.rows.measure("copy in device memory", lambda: copy_bandwidth(device, here))
    here.rows.measure("copy to host memory", lambda: host_copy(device, here))
    here.rows.measure("disk, written and flushed", lambda: disk(here))


if __name__ == "__main__":
    main()
