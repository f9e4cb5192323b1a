"""Small integer arrays from the host to a device, all of one step in a single copy that nobody waits for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from evalsuite.forest import Ints


def to_device(arrays: Sequence[Ints], device: torch.device) -> list[Tensor]:
    """The arrays as tensors of their shapes: on a CPU without a copy, on a GPU parts of one pinned, asynchronous copy."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == "cuda":
        flat = flat.pin_memory()
    parts = flat.to(device, non_blocking=True).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
