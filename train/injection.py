"""Faults on demand, for the tests and `benchmarks/faults.py`: `--inject nan@7,spike@5,frozen@3,oom@0,pause=forward@6`.

The number is that of the batch (of the step, for a pause). Without the option nothing here does anything.
"""

from __future__ import annotations

import dataclasses
import math

from tinyllama.errors import ConfigError
from train.heartbeat import Heartbeat

LOSS_FACTORS = {"nan": math.nan, "inf": math.inf, "spike": 3.0}
PAUSE_S = 1.0


@dataclasses.dataclass(frozen=True)
class Injection:
    """What is done to which batch."""

    factors: dict[int, float]
    frozen_from: int | None
    pauses: dict[tuple[str, int], float]
    out_of_memory: int | None = None

    def loss_factor(self, batch: int) -> float:
        """What the losses of a batch are multiplied with: 1."""
        if batch == self.out_of_memory:
            import torch

            raise torch.OutOfMemoryError("injected")
        return self.factors.get(batch, 1.0)

    def lr_factor(self, batch: int) -> float:
        """What the rate that the optimizer gets is multiplied with: 1."""
        return 1.0 if self.frozen_from is None or batch < self.frozen_from else 0.0

    def attach(self, beat: Heartbeat) -> None:
        """Pauses are taken where the phase begins."""
        beat.pauses.update(self.pauses)


def parse(text: str) -> Injection:
    """The faults in a comma-separated list; ConfigError on anything else."""
    factors, frozen_from, pauses, out_of_memory = {}, None, {}, None
    for fault in filter(None, text.split(",")):
        name, _, number = fault.partition("@")
        kind, _, phase = name.partition("=")
        if not number.isdecimal() or kind not in (*LOSS_FACTORS, "frozen", "oom", "pause"):
            raise ConfigError(
                f"--inject {fault}", fix="write nan@7, inf@7, spike@7, frozen@7, oom@7 or pause=forward@7"
            )
        if kind in LOSS_FACTORS:
            factors[int(number)] = LOSS_FACTORS[kind]
        elif kind == "frozen":
            frozen_from = int(number)
        elif kind == "oom":
            out_of_memory = int(number)
        else:
            pauses[phase, int(number)] = PAUSE_S
    return Injection(factors, frozen_from, pauses, out_of_memory)
