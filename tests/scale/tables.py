"""Tables as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.scale.workload import GPUS

COLUMNS = [f"{gpus} GPUs" for gpus in GPUS]

Row = list[str]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join([*row, *[""] * (len(head) - len(row))]) + " |" for row in rows)])


def by_gpus(what: str, of: Callable[[int], str], how: str | None = None) -> Row:
    """A row with a cell for each size of cluster, and the arithmetic behind it."""
    return [what, *([] if how is None else [how]), *map(of, GPUS)]


def same(what: str, cell: str, how: str | None = None) -> Row:
    """A row whose cell no size of cluster changes."""
    return by_gpus(what, lambda gpus: cell, how)
