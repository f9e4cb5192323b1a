"""What a run tells: `metrics.jsonl` (one object a logged step) and the console of rank 0.

On a terminal the console is a live progress bar with ETA above which nothing scrolls away; elsewhere a plain line for
each logged step.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Dense bf16 peaks in FLOP/s, by a part of the device's name (vendors' data sheets, without sparsity).
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12, "A40": 149.7e12,
              "L40S": 362e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12}  # fmt: skip


def measure_matmul_flops(size: int = 2048, seconds: float = 1.0) -> float:
    """FLOP/s of a bf16 matrix product on this process's CPU threads: the yardstick for MFU without a data sheet."""
    import time

    import torch

    a, b = torch.randn(size, size, dtype=torch.bfloat16), torch.randn(size, size, dtype=torch.bfloat16)
    torch.mm(a, b)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        torch.mm(a, b)
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - start)


def peak_flops() -> tuple[float, str]:
    """(FLOP/s of one rank's device, how it is known); collective on the CPU."""
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        for part, peak in PEAK_FLOPS.items():
            if part in name:
                return peak, f"data sheet of {part}"
        return math.nan, f"no data sheet known for {name}"
    # All ranks at once, as in training: they share the memory and often the clock.
    dist.barrier()
    measured = torch.tensor([measure_matmul_flops()], dtype=torch.float64)
    dist.all_reduce(measured)
    return (
        measured.item() / dist.get_world_size(),
        "bf16 matmul of 2048-cubed, measured on all ranks' CPU threads at once",
    )


class MetricsFile:
    """Appends to `metrics.jsonl`. On a resume, lines of steps that will be done again are dropped first."""

    def __init__(self, path: Path, first_step: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the line that a kill cut short
                if entry["step"] <= first_step:
                    kept.append(line)
        partial = path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept))
        os.replace(partial, path)
        self._stream = open(path, "a", buffering=1)

    def write(self, entry: dict[str, Any]) -> None:
        # NaN is not JSON: a number that is not known is null.
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        self._stream.write(json.dumps(clean) + "\n")


class TrainingConsole:
    """Progress of a run on rank 0; silent on the others."""

    def __init__(self, active: bool, total_tokens: int, done_tokens: int) -> None:
        self.active = active
        self.console = Console(quiet=not active, highlight=False)
        self.live = active and self.console.is_terminal
        self._progress = Progress(
            TextColumn("[bold]pretrain"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[line]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            speed_estimate_period=300,
        )
        self._task = self._progress.add_task("", total=total_tokens, completed=done_tokens, line="")
        self._plain_every = 0
        if self.live:
            self._progress.start()

    def print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def step(self, entry: dict[str, Any]) -> None:
        """Show one logged step; without a terminal only about every fiftieth part of the run is printed."""
        loss, rate, norm = entry["loss"], entry["tokens_per_s"], entry["grad_norm"]
        line = f"loss {loss:.3f}  lr {entry['lr']:.2e}  |g| {norm:.2f}  {rate:,.0f} tok/s  MFU {entry['mfu']:.1%}"
        self._progress.update(self._task, completed=entry["tokens"], line=line)
        if self.active and not self.live:
            total = self._progress.tasks[0].total or 1
            part = int(50 * entry["tokens"] / total)
            if part > self._plain_every:
                self._plain_every = part
                self.console.print(f"step {entry['step']}  {entry['tokens'] / total:.0%}  {line}", soft_wrap=True)

    def close(self) -> None:
        if self.live:
            self._progress.stop()
