"""Gives memory back early: pages of mapped files that were read, and what the heap keeps of freed tensors."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch import Tensor

_PAGES = Path("/proc/self/pagemap")  # eight bytes for each page of this process
_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))
_IS_LINUX = sys.platform.startswith("linux")


def release_pages(tensors: Iterable[Tensor]) -> None:
    """Lets go of the pages of tensors that are mapped from files, which reading brings back.

    Tensors in other memory are left alone, as are those that were written to, and everything where the system does not
    tell, as others than Linux.
    """
    with contextlib.suppress(OSError), _PAGES.open("rb", buffering=0) as pages:
        for tensor in tensors:
            if tensor.device.type == "cpu" and tensor.is_contiguous():
                first = -(-tensor.data_ptr() // mmap.PAGESIZE)
                count = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE - first
                if count > 0 and _are_of_files(pages.fileno(), first, count):
                    address, size = ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t(count * mmap.PAGESIZE)
                    ctypes.CDLL(None).madvise(address, size, mmap.MADV_DONTNEED)


def trim_heap() -> None:
    """Collects what lies in cycles, and gives freed memory back to the system where the C library can."""
    gc.collect()
    if _IS_LINUX and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def _are_of_files(pages: int, first: int, count: int) -> bool:
    """Whether pages are in memory, and each of them still a file's: one that was written to is this process's own."""
    entries = np.frombuffer(os.pread(pages, 8 * count, 8 * first), np.uint64)
    held = entries[entries & (_PRESENT | _SWAPPED) != 0]
    return len(entries) == count and len(held) > 0 and bool((held & (_PRESENT | _OF_FILE) == _PRESENT | _OF_FILE).all())
