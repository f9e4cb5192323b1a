"""Which GPUs of a machine a run may use: how many there are, which of them its ranks get, and no more ranks than GPUs."""

from __future__ import annotations

import os
from pathlib import Path

from tinyllama.errors import ConfigError

# Of the NVIDIA driver, of WSL's and of AMD's: without any of them torch need not be imported to find no GPU.
DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
MOST_RANKS_A_CPU = 4  # each of them is a process with a model
HIDDEN = -1  # an id of CUDA_VISIBLE_DEVICES that is no GPU, and hides all after it


def visible_ids(visible: str | None) -> list[str] | None:
    """The ids in CUDA_VISIBLE_DEVICES (numbers or UUIDs); empty where it hides every GPU, None where it is not set."""
    if visible is None:
        return None
    ids = [part.strip() for part in visible.split(",")]
    return [] if ids[0] in ("", str(HIDDEN)) else [part for part in ids if part]


def count_gpus() -> int:
    """GPUs that this process may use."""
    hidden = visible_ids(os.environ.get("CUDA_VISIBLE_DEVICES")) == [] or os.environ.get("DS_ACCELERATOR") == "cpu"
    if hidden or not any(Path(path).exists() for path in DRIVERS):
        return 0
    import torch

    return torch.cuda.device_count()


def slots(ranks: int, visible: str | None) -> list[int | str]:
    """The GPU of each rank, for DeepSpeed's launcher, which overwrites CUDA_VISIBLE_DEVICES (`visible`) with it.

    The first of those that are visible; where all are hidden, they stay so.
    """
    ids = visible_ids(visible)
    if ids == []:
        return [HIDDEN] * ranks
    return list(ids[:ranks]) if ids and len(ids) >= ranks else list(range(ranks))


def hide_gpus_if_unwanted() -> None:
    """DS_ACCELERATOR=cpu asks DeepSpeed for the processor; torch, if it is not imported yet, then finds no GPU either."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def refuse_too_many(ranks: int, gpus: int) -> None:
    """ConfigError if a machine is to run more ranks than it has GPUs; without a GPU, ranks share the processors."""
    if 0 < gpus < ranks:
        raise ConfigError(
            f"{ranks} ranks on a machine with {gpus} GPU{'s' if gpus > 1 else ''}",
            fix=f"give --num-accelerators {gpus}, or let CUDA_VISIBLE_DEVICES name more of them",
        )
    cpus = os.cpu_count() or 1
    if not gpus and ranks > max(MOST_RANKS_A_CPU * cpus, 8):
        raise ConfigError(
            f"{ranks:,} ranks on a machine without a GPU and with {cpus} processors",
            fix=f"give --num-accelerators {max(1, cpus // 2)}; --dry-run needs no hardware",
        )
