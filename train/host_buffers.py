"""Host memory that a checkpoint is copied into: one flat fp32 buffer for each kind of tensor, kept from save to save.

For a GPU it is pinned, so that all copies run at once. It is registered with CUDA in place: torch's own pinned memory is
rounded up to a power of two for every tensor, 17.4 GB instead of 13.2 for the 603 tensors of a 1.1B model.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def layout(sizes: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Where each `kind|name|start` lies in the buffer of its kind, in elements, and how long each buffer is."""
    offsets: dict[str, int] = {}
    totals: dict[str, int] = {}
    for key, size in sizes.items():
        kind = key.partition("|")[0]
        offsets[key] = totals.get(kind, 0)
        totals[kind] = offsets[key] + size
    return offsets, totals


class HostBuffers:
    """Copies of tensors that are always the same ones, keyed `kind|name|start`."""

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}
        self._registered: list[int] = []

    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors (flat fp32) in host memory, until the next call."""
        import torch

        offsets, totals = layout({key: tensor.numel() for key, tensor in tensors.items()})
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        if {kind: flat.numel() for kind, flat in self._flat.items()} != totals:
            self.close()
            self._flat = {kind: self._allocate(total, on_gpu) for kind, total in totals.items()}
        copies = {}
        for key, tensor in tensors.items():
            flat = self._flat[key.partition("|")[0]]
            copies[key] = flat[offsets[key] : offsets[key] + tensor.numel()].copy_(tensor, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()
        return copies

    def close(self) -> None:
        """Give the memory back."""
        import torch

        for address in self._registered:
            torch.cuda.cudart().cudaHostUnregister(address)
        self._registered.clear()
        self._flat.clear()

    def _allocate(self, numel: int, pinned: bool) -> Tensor:
        import torch

        flat = torch.empty(numel, dtype=torch.float32)
        if pinned and numel:
            if int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.nbytes, 0)) == 0:
                self._registered.append(flat.data_ptr())
            else:  # copies are slower, and right. CUDA would report the failure at the next launch: here it harms nobody.
                with contextlib.suppress(RuntimeError):
                    torch.zeros(1, device="cuda")
        return flat
