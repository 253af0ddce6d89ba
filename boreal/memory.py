"""What malloc does with freed memory, in processes that move pages and log."""

from __future__ import annotations

import ctypes
from typing import Final

KEPT_BYTES: Final = 32 * 1024 * 1024
"""So much freed memory a process keeps at most, at the end of its heap."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed() -> None:
    """Have glibc keep freed memory for the next allocation; without glibc nothing happens.

    A window of pages is some hundred KiB, allocated and freed several times on its way. Left alone,
    glibc gives such memory back to the kernel each time, and the kernel clears it page by page when
    it is asked for again: more than half of the CPU time that a message of pages took.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES)
