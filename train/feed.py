"""The micro-batches of a rank, read ahead by a thread into host buffers, pinned for a GPU, and copied to its device.

While the device computes on one micro-batch, the thread reads the next into another buffer. A buffer is written again
only when its copy has ended and its micro-batch is done. The order is the caller's: what is taken is what was asked for,
and asking for another than the next (after a rewind) begins anew from there.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

BUFFERS = 2
Key = tuple[int, int]  # batch, micro-step


class Buffer:
    """Host memory of one micro-batch, reused for the next of the same shape."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._flat: dict[str, torch.Tensor] = {}
        self.copied: torch.cuda.Event | None = None  # recorded after the copies to the device

    def fill(self, arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """The arrays as tensors in this buffer. Waits until what was in it has been copied."""
        import torch

        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None
        filled = {}
        for name, values in arrays.items():
            source = torch.from_numpy(values)
            flat = self._flat.get(name)
            if flat is None or flat.dtype != source.dtype or flat.numel() < source.numel():
                flat = self._flat[name] = torch.empty(source.numel(), dtype=source.dtype, pin_memory=self._pinned)
            filled[name] = flat[: source.numel()].view(source.shape).copy_(source)
        return filled


class Feed:
    """Micro-batches by (batch, micro-step); the thread reads `read(batch, micro_step)` in the order of `accumulation`."""

    def __init__(
        self, read: Callable[[int, int], dict[str, np.ndarray]], accumulation: int, device: torch.device
    ) -> None:
        """read: called by the thread alone. What it raises is raised by `take`."""
        self._read, self._accumulation, self._device = read, accumulation, device
        self._buffers = [Buffer(pinned=device.type == "cuda") for _ in range(BUFFERS)]
        self._held: Buffer | None = None  # whose micro-batch is being computed on
        self._free: queue.SimpleQueue[Buffer | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._next: Key | None = None

    def take(self, batch: int, micro_step: int) -> dict[str, torch.Tensor]:
        """This micro-batch on the device. What was taken before is done with: its buffer is filled anew."""
        import torch

        if self._next != (batch, micro_step):
            self._begin((batch, micro_step))
        elif self._held is not None:
            self._free.put(self._held)
        self._held = None
        buffer, tensors, error = self._ready.get()
        if error is not None:
            self._next = None
            raise error
        inputs = {name: tensor.to(self._device, non_blocking=True) for name, tensor in tensors.items()}
        if self._device.type == "cuda":
            buffer.copied = torch.cuda.Event(blocking=True)
            buffer.copied.record()
        self._held, self._next = buffer, self._after((batch, micro_step))
        return inputs

    def close(self) -> None:
        """End the thread; `take` would begin a new one."""
        if self._thread is not None:
            self._free.put(None)
            self._thread.join()
        self._thread = self._next = self._held = None

    def _begin(self, first: Key) -> None:
        self.close()
        self._free, self._ready = queue.SimpleQueue(), queue.SimpleQueue()
        for buffer in self._buffers:
            self._free.put(buffer)
        self._thread = threading.Thread(target=self._work, args=(first,), name="feed", daemon=True)
        self._thread.start()

    def _after(self, key: Key) -> Key:
        batch, micro_step = key
        return (batch, micro_step + 1) if micro_step + 1 < self._accumulation else (batch + 1, 0)

    def _work(self, key: Key) -> None:
        import torch

        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # of this thread
            while (buffer := self._free.get()) is not None:
                self._ready.put((buffer, buffer.fill(self._read(*key)), None))
                key = self._after(key)
        except BaseException as error:  # raised where the batch is needed, and only if it is
            self._ready.put((None, {}, error))
