"""Memory of a process that computes on a CPU: kept from one pass to the next, not given to the kernel and asked for again.

The C library returns every large buffer that torch frees to the kernel, which fills the next one with zeros, page by page.
A training step frees and takes back gigabytes: without that it takes three quarters of the time (docs/training.md).
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of mallopt(3)
_LIBC = ctypes.CDLL(None)
_kept = False


def keep() -> None:
    """From now on, freed memory stays with this process. Does nothing where the C library is not glibc."""
    global _kept
    if hasattr(_LIBC, "mallopt"):
        _kept = True
        _LIBC.mallopt(_MMAP_MAX, 0)
        _LIBC.mallopt(_TRIM_THRESHOLD, -1)
        _LIBC.mallopt(_TOP_PAD, 64 << 20)


def trim() -> None:
    """Give back what is free, after a phase whose buffers do not suit the next one. Only where memory is kept."""
    if _kept:
        _LIBC.malloc_trim(0)
