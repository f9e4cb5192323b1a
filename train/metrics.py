"""What a run tells: `metrics.jsonl` (one object a logged step), the console of rank 0, and DeepSpeed's monitors.

The monitors are TensorBoard, Weights & Biases, Comet and CSV files, whichever the DeepSpeed JSON enables. On a terminal
the console is a live progress bar with ETA above which nothing scrolls away; elsewhere a plain line for each of about
fifty steps.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tinyllama.errors import ConfigError
from tinyllama.hardware import training_peak

if TYPE_CHECKING:
    from tinyllama.model.kernels import Choice


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
    """(FLOP/s of one rank's device, how it is known); collective on the CPU.

    A GPU's bf16 peak, also under FP8: that MFU is bf16-equivalent.
    """
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        return training_peak(torch.cuda.get_device_name())
    # All ranks at once, as in training: they share the memory and often the clock.
    dist.barrier()
    measured = torch.tensor([measure_matmul_flops()], dtype=torch.float64)
    dist.all_reduce(measured)
    return (
        measured.item() / dist.get_world_size(),
        "bf16 matmul of 2048-cubed, measured on all ranks' CPU threads at once",
    )


def device_name() -> str:
    """What this rank computes on: the GPU, or the processor as the kernel gives its name."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory_bytes() -> int:
    """The most memory that this rank has had: of the GPU, or on CPUs of the process."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class MetricsFile:
    """Appends to `metrics.jsonl`. On a resume, lines of steps that will be done again are dropped first.

    So are lines that a disk has damaged, which is said; the last one may have been cut short by a kill.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        kept, damaged = [], []
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode()
                step = json.loads(text)["step"] if text.strip() else math.inf
            except (ValueError, TypeError, KeyError, RecursionError):
                step = None
            if not isinstance(step, int | float) or isinstance(step, bool):
                damaged += [number] if number < len(lines) else []
            elif step <= first_step:
                kept.append(text)
        if damaged:
            print(f"warning: {path}: line {damaged[0]} is damaged, {len(damaged)} in all: left out", file=sys.stderr)
        partial = path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept))
        os.replace(partial, path)
        self._stream = open(path, "a", buffering=1)

    def write(self, entry: dict[str, Any]) -> None:
        # NaN is not JSON: a number that is not known is null.
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        self._stream.write(json.dumps(clean) + "\n")

    def close(self) -> None:
        """The file may be opened anew."""
        self._stream.close()


MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml", "csv_monitor": None}  # name to package


def take_monitors(deepspeed_config: dict[str, Any], run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON without its monitor sections, and these. What is written to files goes into the run directory.

    DeepSpeed's engine would write events of its own to them, and wait for the device in every micro-step to do so.
    """
    rest = dict(deepspeed_config)
    sections = {name: dict(rest.pop(name)) for name in MONITORS if name in rest}
    for name, section in sections.items():
        if "api_key" in section:
            raise ConfigError(
                f"DeepSpeed JSON: {name}.api_key would be copied into the run directory",
                fix="set it in the environment",
            )
        package = MONITORS[name]
        if section.get("enabled") and package and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"DeepSpeed JSON: {name} is enabled, {package} is not installed", fix=f"install {package}"
            )
        if name in ("tensorboard", "csv_monitor"):
            section.setdefault("output_path", str(run))
            section.setdefault("job_name", name.removesuffix("_monitor"))
    return rest, sections


class Monitors:
    """DeepSpeed's monitors under our own names: `train/loss` by step."""

    def __init__(self, sections: dict[str, Any]) -> None:
        from deepspeed.monitor.config import get_monitor_config
        from deepspeed.monitor.monitor import MonitorMaster

        self._master = MonitorMaster(get_monitor_config(sections))

    def write(self, group: str, step: int, values: dict[str, Any]) -> None:
        """Every number in `values`, nested ones with their path."""
        events = []
        for name, value in values.items():
            if isinstance(value, dict):
                self.write(f"{group}/{name}", step, value)
            elif isinstance(value, int | float) and name not in ("step", "tokens"):
                events.append((f"{group}/{name}", value, step))
        if self._master.enabled and events:
            self._master.write_events(events)


def kernel_table(choices: Sequence[Choice]) -> Table:
    """What computes what in this run, and why."""
    table = Table("", "kernel", "because", title="Kernels", title_justify="left")
    for choice in choices:
        ran = f" (ran: {choice.ran})" if choice.ran else ""
        table.add_row(choice.operation, choice.kernel, choice.why + ran)
    return table


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

    def print(self, text: str | Table) -> None:
        self.console.print(text, soft_wrap=True)

    def step(self, entry: dict[str, Any]) -> None:
        """Show one logged step; without a terminal only about every fiftieth part of the run is printed."""
        loss, rate, norm = entry["loss"], entry["tokens_per_s"], entry["grad_norm"]
        mfu = f"{entry['mfu']:.1%}" if math.isfinite(entry["mfu"]) else "unknown"
        line = f"loss {loss:.3f}  lr {entry['lr']:.2e}  |g| {norm:.2f}  {rate:,.0f} tok/s  MFU {mfu}"
        epochs = ", ".join(f"{name} {count:.2f}" for name, count in entry["epochs"].items())
        line += f"  {entry['peak_memory_bytes'] / 1e9:.1f} GB  epochs {epochs}"
        if entry["skipped_steps"]:
            line += f"  skipped {entry['skipped_steps']}"
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
