"""What glibc's allocator does with memory that is freed."""

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT = 2**31 - 1  # bytes, the most an int can say
MAPPED = 2**30  # bytes
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


def keep_freed_memory() -> bool:
    """Let the process keep the memory of tensors up to 1 GiB for the next ones instead of giving it back.

    By default every tensor above 32 MiB is a mapping of its own, whose pages the kernel zeroes each time one is touched
    first: a third of the time of a mobile network at 224 pixels (docs/experiments.md). A process then holds about a
    third more.

    Returns:
        Whether it is so now: only with glibc, and only where the environment sets nothing of the kind.
    """
    tuned = "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "") or any(name in os.environ for name in SETTINGS)
    if platform.libc_ver()[0] != "glibc" or tuned:
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(M_MMAP_THRESHOLD, MAPPED)) and bool(library.mallopt(M_TRIM_THRESHOLD, KEPT))
