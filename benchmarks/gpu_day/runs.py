"""Real training runs for the stages: `tinyllama train` in a process of its own, watched through what it logs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_day.conduct import ROOT, end
from gpu_day.sizes import Around


class RunError(Exception):
    """A command that did not do what it should; the text has all that it printed."""


def train_command(here: Around, recipe: str, output: Path, settings: Sequence[str]) -> list[str]:
    """`tinyllama train` of a recipe under ZeRO-3 on one rank, on the packed data."""
    command = [sys.executable, "-m", "tinyllama", "train", "--recipe", recipe, "--deepspeed", "zero3"]
    command += ["--data", str(here.data), "--output", str(output), "--num-accelerators", "1"]
    return command + [argument for setting in settings for argument in ("--set", setting)]


def lines_of(run: Path) -> list[dict[str, Any]]:
    """What a run has logged so far."""
    path = run / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:  # being written
            continue
    return found


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The logged steps."""
    return [line for line in lines_of(run) if "loss" in line]


class Run:
    """A training run that has been started. Its output goes to ours when it has ended."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self.command, self.folder = list(command), folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._printed = open(folder.parent / f"{folder.name}.printed", "w+", errors="replace")
        self.began, self.first_logged_s = time.monotonic(), float("nan")
        environment = {**os.environ, "COLUMNS": "160", "NO_COLOR": "1"}
        self.process = subprocess.Popen(
            command, stdout=self._printed, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT, env=environment
        )

    def printed(self) -> str:
        """All that it printed so far."""
        self._printed.flush()
        return Path(self._printed.name).read_text(errors="replace")

    def wait(self, seconds: float, expected: int) -> float:
        """Wait for its end; seconds since its start. RunError where it takes longer or ends with another exit code."""
        try:
            code = self.process.wait(max(0.1, seconds))
        except subprocess.TimeoutExpired:
            self.kill()
            raise RunError(f"{' '.join(self.command)}\nhad not ended in time\n{self.printed()}") from None
        print(self.printed(), flush=True)
        if code != expected:
            raise RunError(f"{' '.join(self.command)}\nexit code {code}, expected {expected}\n{self.printed()}")
        return time.monotonic() - self.began

    def until_step(self, step: int, seconds: float) -> int:
        """Wait until a step is logged or the time is over; the last logged one. RunError where the run ends before."""
        give_up = time.monotonic() + seconds
        while True:
            logged = max((line["step"] for line in steps_of(self.folder)), default=0)
            if logged >= step or time.monotonic() > give_up:
                return logged
            if self.process.poll() is not None:
                text = self.printed()
                raise RunError(f"{' '.join(self.command)}\nended with {self.process.returncode}\n{text}")
            time.sleep(0.05)

    def terminate(self) -> None:
        """SIGTERM, as a scheduler sends it."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """The run and its ranks, at once."""
        end(self.process)
