"""Where the time of a step goes: `--profile FIRST:COUNT` runs torch's profiler over COUNT steps of rank 0, after FIRST.

RUN/profile/ then has `trace.json.gz` (for chrome://tracing or ui.perfetto.dev), `kernels.json` and `kernels.txt`: what ran
on the device, by share of its time, each kernel in a category. On a CPU the operators' own time takes the kernels' place;
what the compiler fused is there one region. The profiler itself costs time: steps under it are slower than the others.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama.errors import ConfigError

if TYPE_CHECKING:
    from torch.profiler import profile

DEFAULT = "3:2"
HELP = f"Profile COUNT steps on rank 0 after FIRST others, into RUN/profile; {DEFAULT} without a value."
# The first that matches decides. Lower case; names of NCCL, cuDNN, cuBLAS (nvjet), CUTLASS, Triton, flash-attn and torch.
CATEGORIES = (
    ("communication", r"nccl|all_?reduce|reduce_?scatter|all_?gather|c10d::|gloo"),
    ("attention", r"flash|fmha|attention|sdpa|flex_|blockedattention"),
    ("optimizer", r"adam|multi_tensor_apply|_foreach_"),
    ("loss", r"cross_?entropy|softmax|nll_loss|chunkedloss"),
    ("elementwise/norm", r"^triton_|^cpp_fused|compiled"),
    ("GEMM", r"gemm|gemv|nvjet|cutlass|cublas|xmma|wgmma|splitk|aten::(add|b|ba)?mm\b|mkldnn|matmul|linear|scaled_mm"),
    ("copy/memset", r"memcpy|memset|aten::(copy_|fill_|zero_|_to_copy|cat|clone)|copy_kernel|fillfunctor|catarray"),
    ("elementwise/norm", r"elementwise|norm|silu|reduce_kernel|vectorized|embedding|aten::"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """A kernel (on a CPU, an operator without what it calls): total_us over `calls` calls, and its share of all rows."""

    name: str
    category: str
    total_us: float
    share: float
    calls: int


def category(name: str) -> str:
    """Which part of the work a kernel of this name does; "other" where the name does not say."""
    lower = name.lower()
    return next((found for found, pattern in CATEGORIES if re.search(pattern, lower)), "other")


def table(times: dict[str, tuple[float, int]]) -> list[Row]:
    """Kernel name to (microseconds, calls), as rows, the longest first; their shares add up to 1."""
    total = sum(us for us, _ in times.values())
    rows = [Row(name, category(name), us, us / total if total else 0.0, calls) for name, (us, calls) in times.items()]
    return sorted(rows, key=lambda row: (-row.total_us, row.name))


def shares(profiled: profile) -> list[Row]:
    """What ran on the device under a profiler that has stopped; on a CPU without one, the operators' own time."""
    from torch.autograd import DeviceType

    averages = [event for event in profiled.key_averages() if not event.is_user_annotation]
    kernels = {e.key: (e.self_device_time_total, e.count) for e in averages if e.device_type == DeviceType.CUDA}
    own = {e.key: (e.self_cpu_time_total, e.count) for e in averages if e.device_type == DeviceType.CPU}
    # Names of the profiler's own steps are ranges, not work.
    return table({name: time for name, time in (kernels or own).items() if not name.startswith("ProfilerStep")})


def by_category(rows: list[Row]) -> dict[str, float]:
    """Category to share, the largest first."""
    found: dict[str, float] = defaultdict(float)
    for row in rows:
        found[row.category] += row.share
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))


def summary(rows: list[Row]) -> str:
    """The categories in one line."""
    return ", ".join(f"{name} {share:.1%}" for name, share in by_category(rows).items())


def write(profiled: profile, folder: Path, steps: int) -> list[Row]:
    """The trace and the two tables of a profiler that has stopped, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = shares(profiled)
    trace = folder / "trace.json"
    profiled.export_chrome_trace(str(trace))
    with open(trace, "rb") as plain, gzip.open(folder / "trace.json.gz", "wb", compresslevel=3) as packed:
        shutil.copyfileobj(plain, packed)
    trace.unlink()
    content: dict[str, Any] = {"steps": steps, "total_us": sum(row.total_us for row in rows)}
    content |= {"categories": by_category(rows), "kernels": [dataclasses.asdict(row) for row in rows]}
    (folder / "kernels.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = [f"{'share':>7} {'ms':>10} {'calls':>8}  {'category':<17} name", *(_line(row) for row in rows)]
    (folder / "kernels.txt").write_text("\n".join([summary(rows), "", *lines]) + "\n")
    return rows


def _line(row: Row) -> str:
    return f"{row.share:7.2%} {row.total_us / 1e3:10.3f} {row.calls:8d}  {row.category:<17} {row.name[:200]}"


def parse(text: str) -> tuple[int, int]:
    """FIRST:COUNT; ConfigError on anything else."""
    first, _, count = text.partition(":")
    if not (first.isdecimal() and count.isdecimal() and int(first) > 0 and int(count) > 0):
        raise ConfigError(
            f"--profile {text}",
            fix=f"give FIRST:COUNT, both above 0: --profile {DEFAULT} profiles two steps after three",
        )
    return int(first), int(count)


class Profiler:
    """The profile of one run. The step before the first that counts warms the profiler up."""

    def __init__(self, span: tuple[int, int] | None, folder: Path, active: bool) -> None:
        self._first, self._count = span or (0, 0)
        self._folder, self._wanted = folder, active and span is not None
        self._profile: profile | None = None
        self._result: str | None = None
        self._done = 0  # steps of this process: a rewind repeats some, and the run's number of them falls

    def begin(self) -> None:
        """Before each step."""
        done, self._done = self._done, self._done + 1
        if not self._wanted or done < self._first - 1:
            return
        if self._profile is not None:
            self._stop() if done >= self._first + self._count else self._profile.step()
            return
        import torch
        from torch.profiler import ProfilerActivity, profile, schedule

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profile = profile(activities=activities, schedule=schedule(wait=0, warmup=1, active=self._count))
        self._profile.start()

    def _stop(self) -> None:
        assert self._profile is not None
        self._profile.stop()
        rows = write(self._profile, self._folder, self._count)
        self._result = f"profile of {self._count} steps in {self._folder}: {summary(rows)}"
        self._profile, self._wanted = None, False

    def close(self) -> str | None:
        """One line on what was found, at the run's end or where it stops; None where no profile was asked for."""
        if self._profile is not None and self._profile.step_num == self._count:  # of the run's last steps
            self._stop()
        if self._wanted:
            return f"no profile: the run ended before --profile's {self._first} + {self._count} steps were done"
        return self._result
