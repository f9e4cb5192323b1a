"""What a checkpoint proves of itself: that what was loaded is what was saved, and that the run goes on where it was.

    sums         of every tensor's bits, by position: equal whatever the number of ranks that saved and that loaded
    next_batch   sha256 of the first samples after the checkpoint
    probe_loss   of a few held-out windows: equal bit for bit under equal conditions (on a GPU: and where
                 `training.deterministic`), else close

File checksums cannot tell that a slice went to the wrong place, that the low-precision weights are others than the fp32
ones, or that the data's order has changed; these can. What differs ends the run in one line.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyllama.data.loader import HeldOut, Mixture
from tinyllama.errors import CheckpointError
from train.validation import held_out_loss

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import Tensor

PROBE_WINDOWS = 4
NEXT_SAMPLES = 8
TOLERANCE = 5e-3  # of the probe's loss, where kernels or the division into batches differ
CHUNK = 1 << 20


def parameter_sums(tensors: dict[str, Tensor], report: Callable[[int], None] = lambda _: None) -> dict[str, int]:
    """For each `kind|name|start` slice, keyed `kind|name`: the sum of bits x (2 position + 1), modulo 2^64.

    The sums of a tensor's slices add up to the tensor's. report: called with the bytes of each part.
    """
    odd = 2 * np.arange(CHUNK, dtype=np.uint64) + np.uint64(1)
    sums: dict[str, int] = {}
    for key, tensor in tensors.items():
        name, _, start = key.rpartition("|")
        bits = tensor.detach().cpu().numpy().view(np.uint32)
        total = sums.get(name, 0)
        for first in range(0, bits.size, CHUNK):
            part = bits[first : first + CHUNK].astype(np.uint64)
            at_zero = int((part * odd[: part.size]).sum(dtype=np.uint64))
            total += at_zero + 2 * (int(start) + first) * int(part.sum(dtype=np.uint64))
            report(part.nbytes // 2)
        sums[name] = total % 2**64
    return sums


def add_sums(parts: list[dict[str, int]]) -> dict[str, str]:
    """The sums of whole tensors from those of each rank's slices, in hexadecimal (JSON readers round large numbers)."""
    total: dict[str, int] = {}
    for part in parts:
        for key, value in part.items():
            total[key] = (total.get(key, 0) + value) % 2**64
    return {key: f"{value:016x}" for key, value in total.items()}


def bit_for_bit(stored: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a pass under the conditions `stored` must be repeated to the bit under `now`."""
    return stored == now and (now["device"].startswith("cpu") or now["deterministic"])


class Proof:
    """Takes and checks the proofs of one run; every method is collective."""

    def __init__(
        self, engine: DeepSpeedEngine, mixture: Mixture, held_out: list[HeldOut], micro: int, forward: dict[str, Any]
    ) -> None:
        """forward: `held_out_loss`'s further arguments, the run's own."""
        import torch
        import torch.distributed as dist

        self.engine, self.mixture, self.forward = engine, mixture, {"micro": micro, **forward}
        self.probe = next((source for source in held_out if source.num_windows), None)
        cuda = torch.cuda.is_available()
        self.conditions = {
            "ranks": dist.get_world_size(),
            "micro": micro,
            "stage": engine.zero_optimization_stage(),
            "dtype": str(next(engine.module.parameters()).dtype),
            "device": torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads",
            "processor": "" if cuda else str(os.cpu_count()),
            "torch": torch.__version__,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }

    def take(self, position: int) -> dict[str, Any]:
        """The proof of the engine as it is, `position` samples into the data; the sums are added as slices are written."""
        return {
            "conditions": self.conditions,
            "next_batch": self._next_batch(position),
            "probe_loss": self._probe_loss(),
        }

    def check(self, stored: dict[str, Any], position: int, where: Path) -> None:
        """CheckpointError names what differs between a stored proof and the engine that was loaded."""
        found = self._gather(position)
        for key, value in add_sums([sums for sums, _ in found]).items():
            if stored["sums"].get(key) != value:
                kind, _, name = key.partition("|")
                raise CheckpointError(f"{where}: {kind} of {name} is not what was saved", fix="use another checkpoint")
        if any(batch != stored["next_batch"] for _, batch in found):
            raise CheckpointError(
                f"{where}: the batch after it is not the one it was saved with", fix="give the data it was trained on"
            )
        before, now = stored["probe_loss"], self._probe_loss()
        same = bit_for_bit(stored["conditions"], self.conditions)
        if before is None or now is None:
            return
        if (same and before != now) or abs(before - now) > TOLERANCE * max(1.0, abs(before)):
            raise CheckpointError(
                f"{where}: the probe's loss is {now!r}, it was saved with {before!r}",
                fix="use another checkpoint, or checkpoint.proof=false after a change of the model's code",
            )

    def _gather(self, position: int) -> list[Any]:
        """Of each rank, the sums of its slices and the next batch as it reads it: all ranks see what differs on one."""
        import torch.distributed as dist

        from train.state import local_slices

        mine = {
            f"{kind}|{name}|{start}": tensor.flatten()[: stop - start]
            for name, start, stop, local in local_slices(self.engine)
            for kind, tensor in local.items()
        }
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (parameter_sums(mine), self._next_batch(position)))
        return parts

    def _next_batch(self, position: int) -> str:
        ids, targets = self.mixture.fetch(range(position, position + NEXT_SAMPLES))
        return hashlib.sha256(ids.tobytes() + targets.tobytes()).hexdigest()

    def _probe_loss(self) -> float | None:
        if self.probe is None:
            return None
        loss, count = held_out_loss(self.engine, self.probe, PROBE_WINDOWS, **self.forward)
        return loss / count if count else None
