"""Where a training's tensors are allocated: they free gigabytes in every step, which its process keeps for the next one.

glibc gives every thread an arena. That of a process's first thread grows in one piece. All others are made of heaps of 64 MiB,
into which two activations of 22 MiB fit and a third does not: a training that Ray runs in another thread takes a tenth longer
for it. So such a training moves to a thread that shares the first one's arena, while the threads that compute for it keep arenas
of their own and do not wait for each other's. With another C library nothing changes.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")

KEPT = 2**30  # bytes that are not given back to the system, and up to which a block is not the system's own
TRIM_THRESHOLD, MAP_THRESHOLD = -1, -3  # as mallopt names them
PROBE = 2**16  # bytes of a block that no thread keeps for itself
ARENAS = 8  # that glibc makes for each core, before threads have to share them in turn


def keep() -> None:
    """Have this process keep what tensors free. By itself glibc gives large blocks back, and new ones come filled with zeros."""
    if _is_glibc():
        ctypes.CDLL(None).mallopt(MAP_THRESHOLD, KEPT)
        ctypes.CDLL(None).mallopt(TRIM_THRESHOLD, KEPT)


def in_main_arena(function: Callable[[], Result]) -> Result:
    """What a function returns or raises, run where it allocates from the arena that grows in one piece: in this thread or, since
    a new thread is given whichever arena comes next, in the first one that is given that. In this thread too where none is."""
    if not _is_glibc() or on_heap():
        return function()
    over = threading.Event()
    try:
        outcome = _started(function, over)
    finally:
        over.set()
    if outcome is None:
        return function()
    try:
        return outcome.result()
    finally:
        del outcome  # an error that it raised would hold on to it, and so to whatever the function has made


def _started(function: Callable[[], Result], over: threading.Event) -> Future[Result] | None:
    """The function's outcome where a thread with the main arena was found. Threads that hold others wait until it is `over`."""
    for _ in range(2 * ARENAS * (os.cpu_count() or 1) + 64):  # once through all arenas that may be made, and once in turn
        found: Future[bool] = Future()
        outcome: Future[Result] = Future()
        # Of daemons, as Ray's thread is that waits here: a process that has to end does not wait for a training.
        thread = threading.Thread(target=_attempt, args=(function, found, outcome, over), daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no more threads for us
            break
        if found.result():
            return outcome
    return None


def _attempt(function: Callable[[], Result], found: Future[bool], outcome: Future[Result], over: threading.Event) -> None:
    """Run the function if this thread is the one; else hold its arena until one is, so that the next thread gets another."""
    try:
        found.set_result(here := on_heap())
    except BaseException as error:
        found.set_exception(error)
        return
    if not here:
        over.wait()
        return
    try:
        outcome.set_result(function())
    except BaseException as error:
        outcome.set_exception(error)
    finally:
        del outcome


def on_heap() -> bool:
    """Whether this thread allocates from the process's heap, the main arena's: Linux maps all others far above it."""
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes, library.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    library.sbrk.restype, library.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    block = library.malloc(PROBE)
    library.free(block)
    return 0 < (block or 0) < (library.sbrk(0) or 0)


def _is_glibc() -> bool:
    return hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
