"""What training asks of the C library's allocator."""

from __future__ import annotations

import contextlib
import ctypes

# malloc.h of glibc; it takes no larger threshold for mmap than 32 MiB.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_THRESHOLD, _TRIM_THRESHOLD = 32 << 20, 1 << 30


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next step; for the whole process, as threads are.

    By default it gives much of it back and asks for it again, a page fault every 4 KiB. Without
    glibc nothing is done.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
