"""The memory of a rank's GPU: how much is free, how torch is to divide it, and what to do where there was too little.

What a run needs is `estimate.py`'s; the micro-batch that follows, `plan.py`'s.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

from tinyllama.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from train.plan import BatchPlan

# torch's names for the settings of its allocator: the one since 2.9, and the one before, which it still reads.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def use_expandable_segments(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have torch grow its segments instead of leaving gaps between them, unless the user has set its allocator up.

    Before torch is imported. Nothing changes where there is no GPU.
    """
    if not any(name in environment for name in ALLOCATOR_VARIABLES):
        environment[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def free_bytes(device: torch.device, control: Any) -> int | None:
    """The least that any rank's GPU has free now; None on a CPU. Collective over `control`."""
    import torch
    import torch.distributed as dist

    if device.type != "cuda":
        return None
    least = torch.tensor([torch.cuda.mem_get_info(device)[0]], dtype=torch.int64)
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=control)
    return int(least.item())


@contextlib.contextmanager
def explained(plan: BatchPlan | None, checkpointing: bool = False, first: bool = True) -> Iterator[None]:
    """Around what takes the memory that a run needs: too little of it is a ConfigError that says what to change.

    plan: of the steps; None where weights and optimizer are set up. first: only in the first step. Later ones need no more,
    so that the same command may go on from the last checkpoint.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        if not first:
            raise
        tried = re.search(r"[Tt]ried to allocate [\d.]+ \w+", str(error))
        reason, other = tried[0] if tried else error, "use another ZeRO stage, more ranks, or --deepspeed zero3_offload"
        if plan is None:
            raise ConfigError(f"out of memory for weights and optimizer: {reason}", fix=other) from error
        smaller = [f"training.micro_batch_sequences={plan.micro // 2}"] if plan.micro > 1 else []
        smaller += [] if checkpointing else ["training.activation_checkpointing=true"]
        settings = " or ".join(f"--set {setting}" for setting in smaller)
        raise ConfigError(
            f"out of memory at micro {plan.micro} x {plan.sequence_length} tokens: {reason}",
            fix=f"give {settings}" if settings else other,
        ) from error
