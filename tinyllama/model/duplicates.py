"""Whether two sets of weights in one directory are the same: many models are published in two formats.

The names and shapes of all tensors are compared, and of the numbers of each a sample through a memory map, so that large
models take no longer to read. torch, which alone reads its own format, is imported only where there are two sets.
"""

from __future__ import annotations

import functools
import pickle
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama.model import stored

if TYPE_CHECKING:
    from torch import Tensor

BLOCK, BLOCKS = 1024, 8  # numbers in a block, and blocks of a tensor that are compared; its ends belong to them
Read = Callable[[], "Tensor"]


class _Unreadable(Exception):
    """What is wrong with a file in torch's format, which need not be read for anything else."""


def difference(first: Sequence[Path], second: Sequence[Path], *, part: bool) -> str | None:
    """What makes two sets of weights different, or None if they are the same.

    part: the second set may lack tensors. Buffers that follow from the configuration may be in one set alone, and so may
    a tied tensor under its second name. CheckpointError for a safetensors file that is damaged.
    """
    return _difference(_states(first), _states(second), part)


def _states(files: Sequence[Path]) -> tuple[tuple[Path, int, int], ...]:
    """Files with their size and time of change, by which a comparison need not be made again."""
    return tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files)


@functools.lru_cache(maxsize=64)
def _difference(first: Any, second: Any, part: bool) -> str | None:
    try:
        ours, theirs = _readers([file for file, *_ in first]), _readers([file for file, *_ in second])
        for name, read in theirs.items():
            tensor = read()
            if name in ours:
                other = ours[name]()
                if other.shape != tensor.shape:
                    return f"{name} has shape {tuple(other.shape)} and {tuple(tensor.shape)}"
                if not _alike(other, tensor):
                    return f"{name} differs"
            elif not (_is_buffer(name, tensor) or _is_tied(tensor, ours)):
                return f"the first has no {name}"
        for name, read in ours.items():
            if not part and name not in theirs and not (_is_buffer(name, read()) or _is_tied(read(), theirs)):
                return f"the second has no {name}"
    except _Unreadable as error:
        return str(error)
    return None


def _readers(files: Sequence[Path]) -> dict[str, Read]:
    """For every tensor of the files what reads it."""
    found: dict[str, Read] = {}
    for file in files:
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            stored.headers(file)
            handle = safe_open(file, framework="pt")
            found |= {name: functools.partial(handle.get_tensor, name) for name in handle.keys()}  # noqa: SIM118
        else:
            found |= {name: functools.partial(_itself, tensor) for name, tensor in _unpickled(file).items()}
    return found


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _unpickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a file in torch's format: mapped, but for the older format, which cannot be."""
    import torch

    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError):
        raise _Unreadable(f"{file.name} cannot be read") from None
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise _Unreadable(f"{file.name} does not hold tensors by name")
    return found


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether the sampled numbers of two tensors of one shape are the same; of two types, in the narrower one."""
    if one.dtype.itemsize < other.dtype.itemsize:
        one, other = other, one
    if one.dtype != other.dtype and not (one.is_floating_point() and other.is_floating_point()):
        return False
    one, other = one.detach().flatten(), other.detach().flatten()
    last = max(one.numel() - BLOCK, 0)
    for start in sorted({last * i // (BLOCKS - 1) for i in range(BLOCKS)}):
        ours, theirs = one[start : start + BLOCK].to(other.dtype), other[start : start + BLOCK]
        if not _bytes(ours).equal(_bytes(theirs)):
            return False
    return True


def _bytes(tensor: Tensor) -> Tensor:
    """As bytes, so that NaN is NaN and every type has an equality."""
    import torch

    return tensor.contiguous().view(torch.uint8)


def _is_buffer(name: str, tensor: Tensor) -> bool:
    """Whether it is a causal mask (1, 1, T, T) or its fill value, positions, or RoPE's frequencies."""
    if name.endswith(("attn.bias", "attention.bias")):
        return tensor.dim() == 4
    return name.endswith((stored.IGNORED_SUFFIX, "position_ids")) or (
        name.endswith("masked_bias") and tensor.numel() == 1
    )


def _is_tied(tensor: Tensor, others: dict[str, Read]) -> bool:
    """Whether it is a matrix that is there under another name."""
    if tensor.dim() < 2:
        return False
    return any(other.shape == tensor.shape and _alike(tensor, other) for other in (read() for read in others.values()))
