"""Memory of a process that computes on a CPU: kept from one pass to the next, not given to the kernel and asked for again.

glibc gives a freed buffer of 32 MiB or more back to the kernel, and the free end of its heap once that is large; the kernel
fills it with zeros, page by page, when it is asked for again. A pass over a model frees and takes back gigabytes
(docs/training.md has what that costs). Elsewhere than on glibc nothing here does anything, nor where torch allocates by
another library, as its builds for aarch64 do.
"""

from __future__ import annotations

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)
_glibc: ctypes.CDLL | None = None  # once it keeps


def keep() -> None:
    """From now on, memory that the main thread frees stays with this process, unless the environment sets malloc up."""
    global _glibc
    told = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    if told or platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    library.malloc_trim.argtypes = [ctypes.c_size_t]
    # All from the heap, which never shrinks by itself. Each gives 0 where it is refused; then all stays as it was.
    if library.mallopt(_TRIM_THRESHOLD, -1) and library.mallopt(_MMAP_MAX, 0):
        _glibc = library


def trim() -> None:
    """Give back what is kept and free now: for after a phase whose buffers do not suit the next one."""
    if _glibc is not None:
        _glibc.malloc_trim(0)
