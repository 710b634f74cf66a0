"""Threads: how many torch computes with, and one that looks on while others work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

WATCH_EVERY = 1.0  # seconds


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Torch on so many threads within, whatever the process had before: another number changes the last bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def watching(look: Callable[[], None]) -> Iterator[None]:
    """Call `look` every second while the body works, and once more when it has ended well."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(WATCH_EVERY):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    look()
