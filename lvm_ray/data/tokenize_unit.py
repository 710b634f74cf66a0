"""One unit of tokenising: its items read, their copies drawn and encoded, its parts written, and its record last.

A unit's pictures pass the tokenizer in batches of one fixed size on one thread, so tokens never depend on who computed them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from lvm_ray.config import Recipe
from lvm_ray.data.listing import Unit, copies_of, read_unit, tasks_of
from lvm_ray.data.shards import Tokens, write_part
from lvm_ray.errors import BadItem, UserError
from lvm_ray.seeds import stable_hash
from lvm_ray.storage import write_file
from lvm_ray.tally import count
from lvm_ray.tasks.base import Item, Picture
from lvm_ray.threads import torch_threads
from lvm_ray.tokenizer import Tokenizer, on_gpu

ENCODED_AT_ONCE = 32  # pictures


@dataclass(frozen=True)
class Job:
    """All that an actor needs beside its units: a plain value that travels to it."""

    recipe: Recipe
    load: Callable[[str], Tokenizer]
    settings: str
    gpu: bool = False

    def tokenizer(self) -> Tokenizer:
        """The recipe's tokenizer, where this job computes."""
        loaded = self.load(self.recipe.tokenizer_folder)
        return on_gpu(loaded) if self.gpu else loaded


class UnitTokenizer:
    """What an actor runs: it loads the tokenizer once, at its first unit, and turns units into parts and records."""

    def __init__(self, job: Job, tokenizer: Tokenizer | None = None) -> None:
        self._job = job
        self._tokenizer = tokenizer

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """As Ray Data calls it: a batch of one packed unit becomes its record's name and content, or the complaint of a
        UserError, which Ray would turn into another exception and pages of traceback."""
        unit = Unit(**json.loads(batch["unit"][0]))
        try:
            return {"name": [unit.record], "record": [json.dumps(self.work(unit))], "complaint": [""]}
        except UserError as error:
            return {"name": [unit.record], "record": [""], "complaint": [str(error)]}

    def work(self, unit: Unit) -> dict[str, Any]:
        """Write a unit's parts, then its record; the record."""
        recipe = self._job.recipe
        self._tokenizer = self._tokenizer or self._job.tokenizer()
        copies, pictures = copies_of(recipe, unit.task, unit.split), tasks_of(recipe)[unit.task].pictures
        items, outcome = read_unit(recipe.shard_folder, unit), _Outcome()
        with torch_threads(1):
            tokens = encode(self._tokenizer, self._pictures(unit, items, copies, outcome), recipe.image_tokens)
        good = [items[place] for place in outcome.covered]
        tokens = tokens[np.isin(outcome.owners, list(outcome.covered))]
        files = {}
        if good:
            tokens_PCT = tokens.reshape(len(good), copies, pictures * recipe.image_tokens)
            ids, originals = [item.id for item in good], [item.original for item in good]
            for copy in range(copies):
                part = np.ascontiguousarray(tokens_PCT[:, copy])
                path, entry = write_part(recipe.shard_folder, unit.split, unit.task, copy, unit.part, ids, originals, part)
                files[path] = entry
        record = {
            "settings": self._job.settings,
            "split": unit.split,
            "task": unit.task,
            "versions": unit.items * copies,
            "covered": np.sum([[0.0] * copies, *outcome.covered.values()], axis=0).tolist(),
            "files": files,
            "bad": outcome.bad,
        }
        write_file(recipe.shard_folder, unit.record, json.dumps(record).encode())
        return record

    def _pictures(self, unit: Unit, items: list[Item], copies: int, outcome: _Outcome) -> Iterator[Picture]:
        """The pictures of each copy of each usable item, one after another; `outcome` fills up on the way."""
        recipe = self._job.recipe
        task = tasks_of(recipe)[unit.task]
        for place, item in enumerate(items):
            seed = (recipe.seed, stable_hash(unit.task, unit.split, item.id))
            covered = []
            try:
                sample = task.load(item, unit.split)
                for copy in range(copies):
                    seen = task.see(sample, copy, seed, recipe.size)
                    covered.append(seen.covered)
                    for picture in seen.pictures:
                        outcome.owners.append(place)
                        yield picture
            except BadItem as error:
                name = {"split": unit.split, "task": unit.task, "item": item.id, "paths": list(item.paths)}
                outcome.bad.append({**name, "reason": str(error)})
                continue
            outcome.covered[place] = covered


class _Outcome:
    """What happens to a unit's items, by their places, while their pictures stream: whose each picture is, what part of a usable
    item each copy shows, and which items are set aside."""

    def __init__(self) -> None:
        self.owners: list[int] = []
        self.covered: dict[int, list[float]] = {}
        self.bad: list[dict[str, Any]] = []


def encode(tokenizer: Tokenizer, pictures: Iterable[Picture], image_tokens: int) -> Tokens:
    """Pictures to tokens uint16 [P, N], in batches of one fixed size: the last one is filled up and cut again."""
    stream = iter(pictures)
    parts = [np.zeros((0, image_tokens), np.uint16)]
    while chunk := list(islice(stream, ENCODED_AT_ONCE)):
        count("tokenised", len(chunk))
        padded = chunk + [chunk[-1]] * (ENCODED_AT_ONCE - len(chunk))
        parts.append(tokenizer.encode(np.stack(padded))[: len(chunk)])
    return np.concatenate(parts)
