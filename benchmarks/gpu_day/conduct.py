"""Runs the stages of the GPU day one after the other, each part in a process of its own under its own time limit.

    python -m gpu_day.conduct --out DIR --work DIR [--stage N] [--seconds S] [--tiny]

Whatever a part does, fails, hangs or is killed, the next one begins. What it printed goes to `log.txt`, what it found to
`rows.jsonl`; a short table comes last. Needs nothing but the standard library (and psutil, where it is there).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from gpu_day import plan, rows
from gpu_day.rows import FAILED, SKIPPED, Rows

ROOT = Path(__file__).resolve().parent.parent.parent
PACK = ROOT / ".gpu"
LOG_BYTES = 1_500_000  # of one part; what is beyond is left out in the middle
KEPT_LOG, ROWS = "log.txt", "rows.jsonl"


class Log:
    """`log.txt`: everything that every part prints, cut in the middle where one prints without end."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = open(path, "ab", buffering=0)

    def title(self, text: str) -> None:
        self._stream.write(f"\n===== {text} =====\n".encode())

    def take(self, source: BinaryIO) -> bytes:
        """Copy until the source ends; lines that begin with `· ` go to our output as well. Returns the last 4,000 bytes."""
        written, tail, last = 0, b"", b""
        for line in source:
            last = (last + line)[-4000:]
            if line.startswith("· ".encode()):
                sys.stdout.write(line.decode(errors="replace"))
                sys.stdout.flush()
            if written < LOG_BYTES:
                self._stream.write(line[:LOG_BYTES])
                written += len(line)
            else:
                tail = (tail + line)[-LOG_BYTES // 10 :]
        if tail:
            self._stream.write(b"\n[... cut ...]\n" + tail)
        return last


def descendants(pid: int) -> list[int]:
    """Process ids below one, also those in sessions of their own; from /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it started."""
    for pid in [process.pid, *descendants(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def run_limited(
    command: Sequence[str], limit_s: float, log: Log, environment: dict[str, str]
) -> tuple[int | None, str]:
    """Exit code, None where the time ran out, and the last lines of its output."""
    others = set(descendants(os.getpid()))
    last: list[bytes] = []
    code: int | None
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT,
            env=environment,
        )  # fmt: skip
        reader = threading.Thread(target=lambda: last.append(log.take(process.stdout)), daemon=True)
        reader.start()
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        code = None
        end(process)
    except BaseException:  # this program is to end, perhaps before Popen could say which process it has started
        for pid in {*descendants(os.getpid())} - others:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        raise
    reader.join(2)  # a process that was left behind may hold the pipe
    return code, (last[0] if last else b"").decode(errors="replace")


class Day:
    """One run of the stages. out: what is kept. work: checkpoints, caches and installed wheels."""

    def __init__(self, out: Path, work: Path, tiny: bool) -> None:
        self.out, self.work, self.tiny = out, work, tiny
        self.rows_path = out / ROWS
        self.log = Log(out / KEPT_LOG)
        self.site = work / "site"

    def environment(self, end_at: float) -> dict[str, str]:
        """Of every part. GPU_DAY_END: when it will be killed, in seconds since 1970."""
        paths = [str(self.site), str(ROOT), str(ROOT / "benchmarks")]
        if before := os.environ.get("PYTHONPATH"):
            paths.append(before)
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
            "TRITON_CACHE_DIR": str(self.work / "triton"),
            "TORCH_EXTENSIONS_DIR": str(self.work / "extensions"),
            "PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True"),  # as a training run
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "GPU_DAY_ROWS": str(self.rows_path),
            "GPU_DAY_WORK": str(self.work),
            "GPU_DAY_DATA": str(PACK / "data"),
            "GPU_DAY_SHAPE": "tiny" if self.tiny else "full",
            "GPU_DAY_END": f"{time.time() + end_at - time.monotonic():.3f}",
        }

    def command(self, stage: plan.Stage, part: plan.Part) -> list[str]:
        if part.name == "install":
            wheels = sorted(str(path) for path in (PACK / "wheels").glob("*.whl"))
            target = ["--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(self.site)]
            return [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *target, *wheels]
        return [sys.executable, "-m", part.module, str(stage.number), part.name]

    def run_part(self, stage: plan.Stage, index: int, end_at: float) -> None:
        part = stage.parts[index]
        mine = Rows(self.rows_path, stage.number, part.name)
        seconds, reason = plan.allowance(stage, index, end_at, time.monotonic())
        if seconds is None:
            mine.add(part.name, SKIPPED, reason=reason)
            return
        if part.name == "install" and not (wheels := sorted((PACK / "wheels").glob("*.whl"))):
            mine.add(part.name, FAILED, error=f"no wheels in {PACK}: benchmarks/gpu_day.sh pack was not run")
            return
        self.log.title(f"stage {stage.number}, {stage.title}: {part.name}, at most {seconds:.0f} s")
        began = time.monotonic()
        environment = self.environment(began + seconds)
        try:
            code, last = run_limited(self.command(stage, part), seconds, self.log, environment)
        except SystemExit:
            for row in rows.unfinished(rows.read(self.rows_path), stage.number, part.name) or [part.name]:
                mine.add(row, FAILED, error="the day was ended by a signal", seconds=time.monotonic() - began)
            raise
        took = time.monotonic() - began
        if code is None:
            error = f"timed out after {seconds:.0f} s; the last that it printed:\n{last}"
        elif code:
            how = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
            error = f"{how}; the last that it printed:\n{last}"
        else:
            if part.name == "install":
                mine.add(part.name, rows.OK, figure=f"{len(wheels)} wheels", seconds=took)
            return
        pending = rows.unfinished(rows.read(self.rows_path), stage.number, part.name)
        for row in pending or [part.name]:
            mine.add(row, FAILED, error=error, seconds=took, timed_out=code is None)

    def run(self, chosen: tuple[plan.Stage, ...], total_s: float) -> None:
        """Every stage within its time, then the table."""
        began = time.monotonic()
        ends = plan.ends(chosen, began, total_s)
        for stage in chosen:
            for index in range(len(stage.parts)):
                try:
                    self.run_part(stage, index, ends[stage.number])
                except Exception as error:  # of this program: the stages after it shall run all the same
                    part = stage.parts[index].name
                    Rows(self.rows_path, stage.number, part).add(part, FAILED, error=f"gpu_day: {error!r}")
        print(table(rows.read(self.rows_path)))
        print(f"{time.monotonic() - began:.0f} s; {self.rows_path}, {self.out / KEPT_LOG}", flush=True)


def table(found: list[dict[str, Any]]) -> str:
    """One line per row that ended: stage, row, seconds, how, figure or reason. Tests that did not fail are counted."""
    lines = [f"{'stage':5} {'row':44} {'s':>6}  {'':7} figure"]
    counted: dict[tuple[int, str], collections.Counter[str]] = {}
    for entry in rows.finished(found):
        if entry["part"].endswith("tests"):
            counted.setdefault((entry["stage"], entry["part"]), collections.Counter())[entry["status"]] += 1
            if entry["status"] != FAILED:
                continue
        seconds = f"{entry['seconds']:.1f}" if entry.get("seconds") is not None else "-"
        said = entry.get("figure") or entry.get("reason") or rows.last_line(entry.get("error") or "")
        lines.append(f"{entry['stage']:<5} {entry['row'][:44]:44} {seconds:>6}  {entry['status']:7} {said[:90]}")
    for (stage, part), counts in counted.items():
        lines.append(f"{stage:<5} {part:44} {'':>6}  {'':7} {', '.join(f'{n} {how}' for how, n in counts.items())}")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu_day.sh run", description="Run the stages of the GPU day.")
    parser.add_argument("--out", type=Path, required=True, help="folder of rows.jsonl and log.txt")
    parser.add_argument("--work", type=Path, required=True, help="folder of wheels, caches and checkpoints, 40 GB")
    parser.add_argument("--stage", type=int, action="append", help="only this stage (may be repeated)")
    parser.add_argument("--seconds", type=float, help=f"of all stages (default {plan.TOTAL_S:.0f})")
    parser.add_argument(
        "--tiny", action="store_true", help=f"shapes for a CPU; limits {plan.TINY_FACTOR} times as long"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)
    numbers = [stage.number for stage in plan.STAGES]
    if unknown := [number for number in given.stage or [] if number not in numbers]:
        print(f"error: --stage {unknown[0]}; valid: {', '.join(map(str, numbers))}", file=sys.stderr)
        return 2
    chosen = tuple(stage for stage in plan.STAGES if given.stage is None or stage.number in given.stage)
    total_s = given.seconds or plan.TOTAL_S * (plan.TINY_FACTOR if given.tiny else 1)
    if given.tiny:
        chosen = tuple(plan.longer(stage) for stage in chosen)
    day = Day(given.out.resolve(), given.work.resolve(), given.tiny)
    day.work.mkdir(parents=True, exist_ok=True)
    if given.stage and 0 not in given.stage and not day.site.exists():
        chosen = (plan.INSTALL, *chosen)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    free = shutil.disk_usage(day.work).free / 1e9
    print(f"GPU day: stages {', '.join(str(s.number) for s in chosen)}; {free:.0f} GB free in {day.work}", flush=True)
    day.run(chosen, total_s)
    return 0


if __name__ == "__main__":
    sys.exit(main())
