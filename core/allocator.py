"""Keep freed memory instead of handing it back to the kernel between steps.

A CPU program asks for its temporaries anew at every call. glibc maps and unmaps large blocks, so
each call pays for a page fault on every page it touches, in one thread: a third of the wall time
of a small model's training step. With these settings the same pages are used again. The price is
that a process keeps the most memory it ever used.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h


def keep_freed_memory() -> None:
    """Set it up for this process; does nothing where the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # Arenas of threads cannot grow to large blocks, so all threads share the main one.
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
