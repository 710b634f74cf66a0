"""docs/scale.md: its tables, each between marks of its name.

<!-- scale NAME -->
...
<!-- end of scale NAME -->
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tests.scale import data_tables, training_tables
from tests.scale.data import driver
from tests.scale.inputs import INPUTS, ROOT, measurements, value
from tests.scale.tables import COLUMNS, Row, by_gpus, same, table
from tests.scale.whole import dollars, evaluation_hours, whole
from tests.scale.words import hours, money, number, scaled, seconds

PAGE = ROOT / "docs" / "scale.md"


def summary() -> str:
    rows: list[Row] = []
    for changed, title in ((False, "the code as it is"), (True, "with the changes below")):
        rows.append([f"**{title}**"])
        for stage in ("tokenize", "teacher", "student", "evaluate"):
            rows.append(by_gpus(stage, lambda gpus, k=(changed, stage): hours(getattr(whole(gpus, k[0]), k[1]))))
        rows.append(by_gpus("together", lambda gpus, changed=changed: f"**{hours(whole(gpus, changed).total)}**"))
        rows.append(by_gpus("on demand", lambda gpus, changed=changed: f"**{money(dollars(whole(gpus, changed).total, gpus))}**"))
        rows.append(
            by_gpus(
                "at spot prices",
                lambda gpus, changed=changed: money(dollars(whole(gpus, changed).total, gpus) * value("spot_share")),
            )
        )
    return table(["", *COLUMNS], rows)


def evaluate() -> str:
    rows = [
        by_gpus("answers of both models to 30,000 items", lambda gpus: hours(evaluation_hours(gpus))),
        same("the driver's training pairs", scaled(driver().reader_bytes, "B")),
    ]
    return table(["", *COLUMNS], rows)


def given() -> str:
    return table(["input", "value", "source"], [[one.what, said(one.value, one.unit), one.source] for one in INPUTS.values()])


def found() -> str:
    rows = []
    for one in measurements().values():
        rows.append([str(one["how"]), said(float(str(one["value"])), str(one["unit"])), f"{one['machine']}, {one['date']}"])
    return table(["measured", "value", "where and when"], rows)


def said(amount: float, unit: str) -> str:
    """A number with its unit, as people say it."""
    known = {"bytes": "B", "bytes/s": "B/s", "operations/s": "FLOP/s"}
    if unit in known:
        return scaled(amount, known[unit])
    if unit.startswith("$"):
        return f"${amount:g}{unit[1:]}"
    return seconds(amount) if unit == "s" else f"{number(amount)} {unit}".strip()


TABLES: dict[str, Callable[[], str]] = {
    "summary": summary,
    "work": data_tables.work,
    "tokenize": data_tables.tokenize,
    "needs": data_tables.needs,
    "unit_size": data_tables.unit_size,
    "tail": data_tables.tail,
    "requests": data_tables.requests,
    "counts": data_tables.counts,
    "drivers": data_tables.drivers,
    "steps": training_tables.steps,
    "zero": training_tables.zero,
    "network": training_tables.network,
    "stragglers": training_tables.stragglers,
    "training": training_tables.hours_of_training,
    "answers": training_tables.teacher_answers,
    "checkpoints": training_tables.checkpoints,
    "failures": training_tables.failures,
    "intervals": training_tables.intervals,
    "evaluate": evaluate,
    "given": given,
    "measured": found,
}


def filled(text: str) -> str:
    """The page with every table computed anew. Raises AssertionError where a table has no place."""
    for name, make in TABLES.items():
        marks = f"<!-- scale {name} -->", f"<!-- end of scale {name} -->"
        assert all(mark in text for mark in marks), f"{PAGE.name} has no place for {name}: write {' and '.join(marks)}"
        text = _place(name).sub(lambda _, marks=marks, make=make: f"{marks[0]}\n{make()}\n{marks[1]}", text)
    return text


def written(text: str, name: str) -> str:
    """A table as it stands in the page."""
    match = _place(name).search(text)
    assert match, f"{PAGE.name} has no place for {name}"
    return match[1].strip("\n")


def _place(name: str) -> re.Pattern[str]:
    return re.compile(f"<!-- scale {name} -->(.*?)<!-- end of scale {name} -->", re.S)


def write(page: Path = PAGE) -> None:
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
