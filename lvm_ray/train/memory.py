"""Where a training's tensors are allocated: they free gigabytes in every step, which its process keeps for the next one.

glibc gives every thread an arena. That of a process's first thread grows in one piece. All others are made of heaps of 64 MiB,
into which two activations of 22 MiB fit and a third does not: a training that Ray runs in another thread takes a tenth longer
for it. So such a training moves to a thread that shares the first one's arena, while the threads that compute for it keep arenas
of their own and do not wait for each other's. With other libraries nothing changes.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

KEPT = 2**30  # bytes that are not given back to the system, and up to which a block is not the system's own
TRIM_THRESHOLD, MAP_THRESHOLD = -1, -3  # as mallopt names them
PROBE = 2**16  # bytes of a block that no thread keeps for itself
ARENAS = 8  # that glibc makes for each core, before threads have to share one


def keep() -> None:
    """Have this process keep what tensors free. By itself glibc gives large blocks back, and new ones come filled with zeros."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MAP_THRESHOLD, KEPT)
        mallopt(TRIM_THRESHOLD, KEPT)


def in_main_arena(function: Callable[[], Result]) -> Result:
    """What a function returns or raises, run where it allocates from the arena that grows in one piece: in this thread or, since
    a new thread is given whichever arena comes next, in the first one that is given that."""
    if on_heap():
        return function()
    attempts, over = ARENAS * (os.cpu_count() or 1) + threading.active_count() + 64, threading.Event()
    for _ in range(attempts):
        found: Future[bool] = Future()
        outcome: Future[Result] = Future()
        # Of daemons, as Ray's thread is that waits here: a process that has to end does not wait for a training.
        threading.Thread(target=_attempt, args=(function, found, outcome, over), daemon=True).start()
        if found.result():
            over.set()
            return outcome.result()
    over.set()
    return function()


def _attempt(function: Callable[[], Result], found: Future[bool], outcome: Future[Result], over: threading.Event) -> None:
    """Run the function if this thread is the one; else hold its arena until one is, so that the next thread gets another."""
    here = on_heap()
    found.set_result(here)
    if not here:
        over.wait()
        return
    try:
        outcome.set_result(function())
    except BaseException as error:
        outcome.set_exception(error)


def on_heap() -> bool:
    """Whether this thread allocates from the process's heap, the main arena's. False where that cannot be told."""
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes, library.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    block = library.malloc(PROBE)
    library.free(block)
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return False
    heaps = [line.split()[0].split("-") for line in maps.splitlines() if line.endswith("[heap]")]
    return any(int(start, 16) <= (block or 0) < int(end, 16) for start, end in heaps)
