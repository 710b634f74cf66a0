"""Counts of what is costly, so that one can prove that it did not happen: pictures turned into tokens, forwards of teachers.

    with counted() as counts:
        ...
    counts["teacher_forwards"]

Of this process alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

KINDS = ("tokenised", "teacher_forwards")

_counts: Counter[str] = Counter()


def count(kind: str, number: int = 1) -> None:
    """So many more of a kind."""
    assert kind in KINDS
    _counts[kind] += number


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """What is counted while the block runs, by kind; filled in when it has ended."""
    before, counts = Counter(_counts), dict.fromkeys(KINDS, 0)
    try:
        yield counts
    finally:
        counts.update({kind: _counts[kind] - before[kind] for kind in KINDS})
