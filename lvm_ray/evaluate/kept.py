"""What a run has answered already, kept in its folder: what was interrupted goes on, and what is finished costs nothing.

    RUN/answered/{task}-{number:05d}.parquet   one unit's items: measures, references where they were computed, and
                                               answers as tokens; the file's metadata has its key

A unit with an item that could not be used is not kept: it may be mended where its size does not tell.

A key changes with all that an answer depends on: the model's weights, the tokens, the task's section, the benchmark with its
version, the items, the examples, the draws, the precision, and the code that asks, answers and measures. Measures and
tokens are kept, nothing that would be executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from lvm_ray.config import Recipe
from lvm_ray.data.shards import Shards
from lvm_ray.evaluate import floors
from lvm_ray.evaluate.score import Scored, Unit, UnitResult
from lvm_ray.evaluate.subjects import Subject
from lvm_ray.storage import write_file

FOLDER = "answered"
KEY = b"key"
SCHEMA = pa.schema(
    [
        ("item", pa.string()),
        ("measures", pa.string()),  # JSON, as are the next three
        ("tokens", pa.string()),
        ("references", pa.string()),
        ("unigram", pa.string()),
        ("answer", pa.binary()),
    ]
)


def files_hash(folder: str) -> str:
    """Sixteen hex digits of the files that lie in the folder of a model or of a tokenizer, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(folder).glob("*") if path.is_file()):
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()[:16]


def unit_key(recipe: Recipe, subject: Subject, unit: Unit, shards: Shards, decoder: str, model: str) -> str:
    """Sixteen hex digits that change with anything that a model's answers to a unit, and their measures, depend on. `decoder` and
    `model` are the hashes of the tokenizer's files and of the model's."""
    values = [
        floors.cache_key(recipe, subject, [*unit.items, *(one for shown in unit.shown for one in shown)], shards, decoder),
        unit.number,
        model,
        subject.draws,
        [recipe.compute.precision, recipe.compute.device],
    ]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def read(run: str, unit: Unit, key: str) -> UnitResult | None:
    """A run's own result of a unit, or None where it has none of this key, or none that can be read."""
    path = Path(run) / FOLDER / _name(unit.task, unit.number)
    try:
        table = pyarrow.parquet.read_table(path)
        if (table.schema.metadata or {}).get(KEY) != key.encode() or table.schema.remove_metadata() != SCHEMA:
            return None
        return UnitResult(unit.task, unit.number, [_scored(row) for row in table.to_pylist()], {})
    except (OSError, ValueError, TypeError, pa.ArrowException):
        return None


def write(run: str, result: UnitResult, place: int, key: str) -> None:
    """Keep what the run at this place of a result has answered, if every item could be used."""
    if result.bad:
        return
    rows = [
        {
            "item": one.item,
            "measures": json.dumps(one.measures[place]),
            "tokens": json.dumps(one.tokens[place]),
            "references": json.dumps(one.references),
            "unigram": json.dumps(one.unigram),
            "answer": one.answers[place],
        }
        for one in result.scored
    ]
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata({KEY: key.encode()})), sink)
    write_file(run, f"{FOLDER}/{_name(result.task, result.number)}", sink.getvalue().to_pybytes())


def joined(parts: Sequence[UnitResult]) -> UnitResult:
    """Results of the same unit for one run after another as one; the first that has references lends them, and what one could
    not use counts for none."""
    bad: dict[str, str] = {}
    for part in parts:
        bad |= part.bad
    usable = [[one for one in part.scored if one.item not in bad] for part in parts]
    scored = []
    for same in zip(*usable, strict=True):
        known = next((one for one in same if one.references is not None), same[0])
        scored.append(
            Scored(
                known.item,
                [measure for one in same for measure in one.measures],
                [measure for one in same for measure in one.tokens],
                known.references,
                known.unigram,
                [answer for one in same for answer in one.answers],
            )
        )
    return UnitResult(parts[0].task, parts[0].number, scored, bad)


def _scored(row: dict[str, Any]) -> Scored:
    values = {name: json.loads(row[name]) for name in ("measures", "tokens", "references", "unigram")}
    return Scored(
        row["item"],
        [values["measures"]],
        [values["tokens"]],
        values["references"],
        values["unigram"],
        [row["answer"]],
    )


def _name(task: str, number: int) -> str:
    return f"{task}-{number:05d}.parquet"
