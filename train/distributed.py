"""Brings up DeepSpeed's ranks so that a run killed at any moment leaves nothing behind that hurts the next one.

DeepSpeed compiles its operators at first use behind a lock file that nobody removes when the compiler is killed: every
later run would wait for it for ever. And its buffers in shared memory, for ranks that are CPUs of one machine, are never
unlinked: every run would leave 66 MiB of memory per rank taken until the machine restarts.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tinyllama.errors import UserError

T = TypeVar("T")
SHARED_MEMORY = Path("/dev/shm")


def extensions_folder() -> Path:
    """Where this environment, on this host, keeps compiled operators; two of them in one place would rebuild in turn."""
    import torch

    base = os.environ.get("TORCH_EXTENSIONS_DIR") or str(Path.home() / ".cache" / "torch_extensions")
    key = hashlib.sha256(f"{platform.node()} {sys.prefix} {torch.__version__}".encode()).hexdigest()[:12]
    return Path(base) / f"tinyllama-{key}"


def _own_buffer() -> Path:
    """Where DeepSpeed's csrc/cpu/comm/shm.cpp puts the buffer of this rank."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    return SHARED_MEMORY / f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{os.environ.get('RANK', 0)}"


def build_operators(deepspeed_config: dict[str, Any]) -> None:
    """Compile or load the operators that this configuration needs. One process a host at a time; not collective."""
    # The compiler is driven by the ninja of this environment, which need not be activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    folder = extensions_folder()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops import __compatible_ops__

    names = ["ShareMemCommBuilder"] if get_accelerator().device_name() == "cpu" else []
    if deepspeed_config["zero_optimization"].get("offload_optimizer", {}).get("device") == "cpu":
        names.append("CPUAdamBuilder")
    with open(folder / "in-use", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # falls with its process, unlike torch's lock files
        for stale in folder.glob("*/lock"):
            stale.unlink()
        for name in names:
            builder = get_accelerator().create_op_builder(name)
            if builder is not None and __compatible_ops__.get(builder.NAME, False):
                builder.load(verbose=False)


def init_distributed(deepspeed_config: dict[str, Any]) -> None:
    """`deepspeed.init_distributed`, leaving no lock and no shared memory behind. Collective."""
    import deepspeed
    import torch.distributed as dist

    build_operators(deepspeed_config)
    _own_buffer().unlink(missing_ok=True)  # of a run that was killed right here, on the same port
    deepspeed.init_distributed(verbose=False)
    dist.barrier()  # every rank has opened the buffers of all others
    _own_buffer().unlink(missing_ok=True)


def from_rank_0(make: Callable[[], T], control: Any) -> T:
    """What `make` gives on rank 0, on every rank of the group `control`; a UserError that it raises is raised by all."""
    import torch.distributed as dist

    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [make()]
        except UserError as error:
            found = [error]
    dist.broadcast_object_list(found, group=control)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]
