"""`training.deterministic`: the same bits in every run on the same hardware, at the price of speed.

On a GPU the fastest attention backward passes, some of cuBLAS's products and the compiler's measured choices may differ
from run to run; here they are turned off. On a CPU nothing of the kind is used, and the numbers are those without it.
"""

from __future__ import annotations

import os

from tinyllama.errors import ConfigError

CUBLAS_WORKSPACES = (":4096:8", ":16:8")  # those under which cuBLAS is deterministic (its manual, "Reproducibility")


def make_deterministic() -> None:
    """Set all that a deterministic run needs, in this process; to be called before the GPU is touched.

    Raises ConfigError for an environment that contradicts it, RuntimeError after the GPU was touched.
    """
    import torch

    if torch.cuda.is_initialized():
        raise RuntimeError("make_deterministic() after CUDA was initialized: cuBLAS has read its environment already")
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES[0])
    if workspace not in CUBLAS_WORKSPACES:
        raise ConfigError(
            f"training.deterministic with CUBLAS_WORKSPACE_CONFIG={workspace}",
            fix=f"unset it, or set it to {' or '.join(CUBLAS_WORKSPACES)}",
        )
    # Switches sum in whatever order packets arrive in; the other algorithms in that of the ring or tree.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch.use_deterministic_algorithms(True)  # attention and embedding, and the compiler measures nothing
    # Memory that nobody has written is read by nobody here: no need to fill it.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
