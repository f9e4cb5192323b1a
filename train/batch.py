"""From the loader's arrays to the model's arguments, the same for training and validation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinyllama.data.loader import document_layout

if TYPE_CHECKING:
    import numpy as np
    import torch


def host_arrays(ids: np.ndarray, targets: np.ndarray, separator_id: int | None) -> dict[str, np.ndarray]:
    """Keyword arguments of `Llama.forward` for one micro-batch (B, T), in host memory.

    separator_id: what stands before each document, if attention is to stay inside documents; None if not.
    """
    arrays = {"ids": ids, "targets": targets}
    if separator_id is not None:
        arrays["documents"], arrays["positions"] = document_layout(ids, separator_id)
    return arrays


def model_inputs(
    ids: np.ndarray, targets: np.ndarray, separator_id: int | None, device: torch.device
) -> dict[str, torch.Tensor]:
    """The same on `device`."""
    import torch

    arrays = host_arrays(ids, targets, separator_id)
    return {name: torch.from_numpy(values).to(device, non_blocking=True) for name, values in arrays.items()}
