"""The job behind `lvm-ray cache`: ask a teacher once about every sentence of a plan, on Ray Data or in this process.

The sentences that the cache lacks are cut into units; a unit becomes one part. What a killed job has finished stays, and the same
command does the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lvm_ray import placement, ray_session, recipe_sections
from lvm_ray.config import Recipe
from lvm_ray.data.plan import Rows, make_plan
from lvm_ray.data.shards import open_shards
from lvm_ray.data.stream import SentenceReader, pack, unpack
from lvm_ray.data.teacher_cache import (
    FACTS,
    PART,
    Facts,
    TeacherCache,
    facts_of,
    part_names,
    read_facts,
    require_same,
    save_head,
    take,
    unique_sentences,
    write_facts,
    write_part,
)
from lvm_ray.errors import UserError
from lvm_ray.estimate import size_text
from lvm_ray.progress import Bar
from lvm_ray.recipe_sections import SparseSection
from lvm_ray.seeds import stable_hash
from lvm_ray.storage import file_size, join
from lvm_ray.train import rehearsal, sparse
from lvm_ray.train.job import Job, make_job, teacher_module
from lvm_ray.train.losses import TrainingModule

PART_BYTES = 32 * 2**20  # of a part, about: what a kill loses at most of each worker


class Source(NamedTuple):
    """What an actor needs beside its units: a plain value that travels to it."""

    job: Job
    name: str
    folder: str


def cache(recipe: Recipe, name: str, bar: Bar) -> Facts:
    """Have the answers of the teacher of this name to every sentence of a resolved single run's plan in its `cache` folder.

    `bar` counts sentences. Raises UserError where the folder holds other answers, and where the teacher does not fit the run or
    predicts no better than a guess.
    """
    job, one = make_job(recipe, cached=False), recipe.teachers[name]
    assert one.cache is not None and one.teacher is not None
    if one.sparse and one.sparse.top >= len(job.codebook_VE):
        place = recipe_sections.place_of_teacher(name).removesuffix("teacher")
        raise UserError(f"{place}sparse.top: {one.sparse.top} of {len(job.codebook_VE)} codes leave no others: keep fewer")
    manifest = open_shards(recipe.shard_folder).manifest
    facts, plan = facts_of(recipe, manifest, one, job.even is not None), make_plan(manifest, recipe)
    rows, done = unique_sentences(plan), 0
    bar.total = len(rows)
    if file_size(join(one.cache, FACTS)) is not None:
        found = TeacherCache(one.cache)
        require_same(one.cache, found.facts, facts)
        facts = found.facts.with_tasks(plan.tasks)
        rows = take(rows, np.flatnonzero(found.lacks(plan.tasks, rows)))
        done = bar.total - len(rows)
    bar.set(done, note="as before" if done else "")
    if not len(rows):
        return facts
    write_facts(one.cache, facts)
    save_head(one.cache, one.teacher)
    number = max((int(PART.fullmatch(part)[1]) for part in part_names(one.cache)), default=-1) + 1  # type: ignore[index]
    each = max(1, PART_BYTES // facts.state_bytes)
    units = [(number + place // each, rows.cut(place, place + each)) for place in range(0, len(rows), each)]
    for count in _run(Source(job, name, one.cache), units):
        done += count
        bar.set(done, note=size_text(done * facts.state_bytes))
    return facts


class Answers:
    """What an actor runs: it loads the teacher once, at its first unit, and turns units into parts."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._module: TrainingModule | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """As Ray Data calls it: a batch of one packed unit becomes its number of sentences, or the complaint of a UserError."""
        try:
            return {"sentences": [self.work(int(batch["number"][0]), unpack(batch["rows"][0]))], "complaint": [""]}
        except UserError as error:
            return {"sentences": [0], "complaint": [str(error)]}

    def work(self, number: int, rows: Rows) -> int:
        """Write one part; the number of its sentences."""
        recipe = self._source.job.recipe
        one = recipe.teachers[self._source.name]
        tasks = tuple(recipe.tasks)
        reader = SentenceReader(open_shards(recipe.shard_folder), tasks, recipe.pairs, recipe.seed)
        module = self._teacher(reader, rows)
        device, size = next(module.parameters()).device, recipe.train.micro_batch
        states = []
        for start in range(0, len(rows), size):
            part = rows.cut(start, start + size)
            tokens_BT = torch.from_numpy(reader.read(part)["tokens"].astype(np.int64))
            with torch.no_grad():
                state_PD = module.states(tokens_BT.to(device))
                bits_PW = self._sparse(state_PD, one.sparse, part) if one.sparse else state_PD.bfloat16().view(torch.uint16)
            states.append(bits_PW.cpu().numpy().reshape(len(tokens_BT), -1))
        write_part(self._source.folder, number, self._named(rows), np.concatenate(states))
        return len(rows)

    def _sparse(self, state_PD: torch.Tensor, section: SparseSection, rows: Rows) -> torch.Tensor:
        """Sparse answers uint16 [P, W], sentence by sentence: all logits of one are in memory."""
        assert self._module is not None
        tasks, seed = self._source.job.recipe.tasks, self._source.job.recipe.seed
        names = zip(rows.task.tolist(), rows.copy.tolist(), rows.grouping.tolist(), rows.index.tolist(), strict=True)
        seeds = [stable_hash("sparse", seed, list(tasks)[task], *rest) for task, *rest in names]
        head = self._module.student.lm_head
        parts = [sparse.pack(head(one_SD), section, [own]) for one_SD, own in zip(state_PD.chunk(len(seeds)), seeds, strict=True)]
        return torch.cat(parts)

    def _teacher(self, reader: SentenceReader, rows: Rows) -> TrainingModule:
        """The teacher. Raises UserError where it predicts no better than a guess."""
        if self._module is None:
            job, name = self._source.job, self._source.name
            recipe = job.recipe
            assert recipe.compute.threads is not None
            torch.set_num_threads(recipe.compute.threads)
            self._module = teacher_module(job, name).eval()
            first = reader.read(rows.cut(0, recipe.train.micro_batch))
            sentences = {} if job.even is None else {"even_B": torch.tensor(job.even)[first["task"]]}
            tokens_BT = torch.from_numpy(first["tokens"].astype(np.int64))
            place, run = recipe_sections.place_of_teacher(name), recipe.teachers[name].teacher
            device = next(self._module.parameters()).device
            on_device = {key: values.to(device) for key, values in sentences.items()}
            rehearsal.check_teacher_loss(self._module, tokens_BT.to(device), on_device, place, run)
        return self._module

    def _named(self, rows: Rows) -> Rows:
        """The rows with the cache's own numbers of the tasks."""
        known = read_facts(self._source.folder).tasks
        numbers: NDArray[np.int32] = np.array([known.index(task) for task in self._source.job.recipe.tasks], np.int32)
        return Rows(rows.row, numbers[rows.task], rows.copy, rows.grouping, rows.index)


def _run(source: Source, units: list[tuple[int, Rows]]) -> Iterator[int]:
    """Do the units: the number of sentences of each as it is finished."""
    compute = source.job.recipe.compute
    place = placement.place_of(source.job.recipe, "cache")
    if not compute.most_workers or (len(units) == 1 and not place.chooses):
        here = Answers(source)
        for number, rows in units:
            yield here.work(number, rows)
        return
    ray_session.start(source.job.recipe)
    import ray.data

    gpu, actors = compute.device == "cuda", min(compute.most_workers, len(units))
    nodes = placement.require(source.job.recipe, "cache", actors, gpu, least=1)
    actors = max(1, min(actors, placement.room(nodes, placement.share(place, gpu))))
    packed = ray.data.from_items(
        [{"number": number, "rows": pack(rows)} for number, rows in units], override_num_blocks=len(units)
    )
    answered = packed.map_batches(
        Answers,
        batch_size=1,
        num_cpus=1,
        num_gpus=1 if gpu else None,
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
        fn_constructor_args=(source,),
        **placement.options(place),
    )
    for row in answered.iter_rows():
        if row["complaint"]:
            raise UserError(row["complaint"])
        yield row["sentences"]
