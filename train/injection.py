"""Faults on demand, for the tests and `benchmarks/faults.py`: `--inject nan@7,spike@5,frozen@3,oom@0,hold=forward@6`.

The number is that of the batch (of the step, for a hold). A rank that is held waits in the phase, from its beginning, until
RUN/go-on is there or a signal has asked it to stop, and says so by RUN/held-RANK. stop sends the ranks a SIGTERM. Without
the option nothing here does anything.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import time

from tinyllama.errors import ConfigError
from train.heartbeat import Heartbeat

LOSS_FACTORS = {"nan": math.nan, "inf": math.inf, "spike": 3.0}
HOLD_S = 120.0  # at most


@dataclasses.dataclass(frozen=True)
class Injection:
    """What is done to which batch."""

    factors: dict[int, float]
    frozen_from: int | None
    holds: tuple[tuple[str, int], ...]
    out_of_memory: int | None = None
    stop: int | None = None

    def loss_factor(self, batch: int) -> float:
        """What the losses of a batch are multiplied with: 1."""
        if batch == self.out_of_memory:
            import torch

            raise torch.OutOfMemoryError("injected")
        if batch == self.stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.factors.get(batch, 1.0)

    def lr_factor(self, batch: int) -> float:
        """What the rate that the optimizer gets is multiplied with: 1."""
        return 1.0 if self.frozen_from is None or batch < self.frozen_from else 0.0

    def attach(self, beat: Heartbeat, told: list[int]) -> None:
        """Ranks are held where the phase begins. told: the signals that have come."""

        def wait() -> None:
            (beat.run / f"held-{beat.rank}").touch()
            deadline = time.monotonic() + HOLD_S
            while not told and not (beat.run / "go-on").exists() and time.monotonic() < deadline:
                time.sleep(0.01)

        beat.pauses.update(dict.fromkeys(self.holds, wait))


def parse(text: str) -> Injection:
    """The faults in a comma-separated list; ConfigError on anything else."""
    factors, frozen_from, holds, out_of_memory, stop = {}, None, [], None, None
    for fault in filter(None, text.split(",")):
        name, _, number = fault.partition("@")
        kind, _, phase = name.partition("=")
        if not number.isdecimal() or kind not in (*LOSS_FACTORS, "frozen", "oom", "stop", "hold"):
            raise ConfigError(
                f"--inject {fault}", fix="write nan@7, inf@7, spike@7, frozen@7, oom@7, stop@7 or hold=forward@7"
            )
        if kind in LOSS_FACTORS:
            factors[int(number)] = LOSS_FACTORS[kind]
        elif kind == "frozen":
            frozen_from = int(number)
        elif kind == "oom":
            out_of_memory = int(number)
        elif kind == "stop":
            stop = int(number)
        else:
            holds.append((phase, int(number)))
    return Injection(factors, frozen_from, tuple(holds), out_of_memory, stop)
