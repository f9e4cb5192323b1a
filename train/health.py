"""Tells a sick run from a healthy one: losses that are not finite or that spike, and weights that do not move.

The loss of a step, over all ranks, is known before its last backward pass. `LossGuard.veto` answers on the device, without
waiting for it, with 0 or NaN, to be added to that pass's factor: NaN makes the gradient non-finite on every rank, and
DeepSpeed then leaves weights and moments as they are. Whether it did is known on the host at no further cost.
What was seen of spikes is kept in the checkpoint, so that a resumed run decides as the undisturbed one.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine
    from torch import Tensor

    from train.recipe import HealthConfig

SIGMAS_PER_MAD = 1.4826  # of a normal distribution
MIN_SIGMA = 0.01  # nats; a loss that hardly moves has no spikes of a hundredth
FINGERPRINT_ELEMENTS = 1 << 20


class UnhealthyRunError(Exception):
    """The run must not go on as it is; the last checkpoint stands."""


class LossGuard:
    """The losses of the last steps, and what they say of the next one."""

    def __init__(
        self, config: HealthConfig, device: torch.device, window: list[float], spikes: list[dict], step: int = 0
    ) -> None:
        """window, spikes: of the checkpoint that the run goes on from, of `step`."""
        import torch

        self.config, self.spikes = config, list(spikes)
        self._ring = torch.zeros(config.spike_window, dtype=torch.float32, device=device)
        self._ring[: len(window)] = torch.tensor(window, dtype=torch.float32)
        self._count = len(window)
        self._unread: list[tuple[dict[str, int], Tensor]] = []
        self._losses: list[float] = []
        self._news: list[dict[str, Any]] = []
        self._in_a_row = 0  # skipped steps up to this one
        skipped = {spike["step"] for spike in spikes if spike["action"] == "skip"}
        while step - self._in_a_row in skipped:
            self._in_a_row += 1

    def veto(self, loss: Tensor, step: int, batch: int) -> Tensor:
        """0 if the optimizer may move, NaN if not; a device scalar, as is `loss`. Waits for nothing."""
        import torch

        limit = self._limit()
        self._unread.append(({"step": step + 1, "batch": batch}, torch.stack((loss, limit))))
        self._ring[self._count % len(self._ring)] = loss
        self._count += 1
        allowed = torch.isfinite(loss) if self.config.on_spike == "warn" else loss <= limit
        return torch.where(allowed, 0.0, math.nan)

    def _limit(self) -> Tensor:
        """What is a spike: a loss above this. Infinite until half the window is known."""
        filled = min(self._count, len(self._ring))
        if 2 * filled < len(self._ring):
            return self._ring.new_full((), 3e38)  # not infinity: an infinite loss is above it
        known = self._ring[:filled]
        median = known.median()
        sigma = SIGMAS_PER_MAD * (known - median).abs().median()
        return median + self.config.spike_sigmas * sigma.clamp(min=MIN_SIGMA)

    def judge(self, applied: bool) -> str:
        """What is to be done after a step: "go on", "skip" or "rewind". Reads the loss only if nothing was applied."""
        if applied:
            self._in_a_row = 0
            return "go on"
        where = self._unread[-1][0]
        self.read()
        loss = self._losses[-1]
        spike = self.spikes[-1] if self.spikes and self.spikes[-1]["step"] == where["step"] else None
        if spike is None or not math.isfinite(loss):
            sick = "gradient is not finite" if math.isfinite(loss) else f"loss is {loss}"
            raise UnhealthyRunError(
                f"step {where['step']}: the {sick}; the weights are those of step {where['step'] - 1}, nothing was saved"
            )
        self._in_a_row += 1
        if self._in_a_row > self.config.max_interventions:
            raise UnhealthyRunError(
                f"step {where['step']}: {self._in_a_row} loss spikes in a row, health.max_interventions="
                f"{self.config.max_interventions}"
            )
        return self.config.on_spike

    def read(self) -> None:
        """Wait for the device, and enter the spikes since the last call into the ledger."""
        import torch

        if not self._unread:
            return
        values = torch.stack([pair for _, pair in self._unread]).tolist()
        for (where, _), (loss, limit) in zip(self._unread, values, strict=True):
            self._losses.append(loss)
            if limit < loss < math.inf:
                self._news.append({**where, "loss": loss, "limit": limit, "action": self.config.on_spike})
                self.spikes.append(self._news[-1])
        self._unread.clear()

    def take_news(self) -> list[dict[str, Any]]:
        """The spikes that were read since the last call."""
        news, self._news = self._news, []
        return news

    def take_mean(self) -> float:
        """The mean loss of the steps since the last call; all of them must have been read."""
        mean = sum(self._losses) / len(self._losses)
        self._losses.clear()
        return mean

    def window(self) -> list[float]:
        """The losses that the next decision rests on, oldest first."""
        values = self._ring.tolist()
        start = self._count % len(values)
        return values[start:] + values[:start] if self._count >= len(values) else values[: self._count]


class SpikeLedger:
    """`RUN/spikes.jsonl`: what the checkpoint's ledger says and what has come since."""

    def __init__(self, path: Path, spikes: list[dict[str, Any]]) -> None:
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(spike) + "\n" for spike in spikes))
        os.replace(partial, path)
        self._stream = open(path, "a", buffering=1)

    def write(self, spikes: list[dict[str, Any]]) -> None:
        self._stream.write("".join(json.dumps(spike) + "\n" for spike in spikes))


class FrozenWeights:
    """Notices weights that stay the same while steps are reported as applied; without communication."""

    def __init__(self, after_steps: int) -> None:
        self.after_steps = after_steps
        self._steps = 0
        self._last: int | None = None

    def applied(self, lr: float) -> None:
        """A step was applied."""
        self._steps += lr > 0

    def seen(self, value: int) -> bool:
        """Whether the weights are frozen, given their `fingerprint` now."""
        if value != self._last:
            self._last, self._steps = value, 0
        return self._steps >= self.after_steps


def fingerprint(engine: DeepSpeedEngine) -> int:
    """A number that changes when this rank's part of the head's low-precision weights does in any bit."""
    import torch

    *_, parameter = engine.module.parameters()
    local = getattr(parameter, "ds_tensor", parameter).detach().flatten()[:FINGERPRINT_ELEMENTS]
    return int(local.view(torch.int16).sum(dtype=torch.int64).item())
