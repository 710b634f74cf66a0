"""One unit of evaluation: some items of one task, asked of every run, measured, and compared with the references.

A unit is a fixed list of items. Its questions are asked in batches of one size, the last one filled up, on one thread:
an answer never depends on who computed it or on how many others did. (On a GPU that holds for one kind of GPU.)
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lvm_ray.config import Recipe
from lvm_ray.errors import BadItem
from lvm_ray.evaluate import floors
from lvm_ray.evaluate.answer import draw_seed, respond, voted
from lvm_ray.evaluate.prompts import prompt_tokens
from lvm_ray.evaluate.statistics import Measure, token_measure
from lvm_ray.evaluate.subjects import Subject, subjects
from lvm_ray.seeds import stable_hash
from lvm_ray.tasks.base import Item, PairTask, Picture, Sample, TrivialAnswer, View
from lvm_ray.threads import torch_threads
from lvm_ray.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lvm_ray.model.generate import Decoder


@dataclass(frozen=True)
class Job:
    """All that an actor needs beside its units: a plain value that travels to it.

    recipe     resolved
    runs       run folders
    tokenizer  its folder
    load       how it is loaded
    """

    recipe: Recipe
    runs: tuple[str, ...]
    tokenizer: str
    load: Callable[[str], Tokenizer]


@dataclass(frozen=True)
class Unit:
    """Some items of a task or benchmark.

    task            its name, as of `Subject`
    examples_IVE2N  the tokens of the examples in each of an item's prompts, uint16 [items, votes, examples, 2N]; None: of `shown`
    shown           the examples of each item, where they are items that have no tokens yet
    counts_V        how often each code stands in the training pairs' answers; None: there are none, or no references are wanted
    refer           whether references are computed
    runs            places of the job's runs that are asked
    """

    task: str
    number: int
    items: tuple[Item, ...]
    examples_IVE2N: NDArray[np.uint16] | None
    shown: tuple[tuple[Item, ...], ...]
    counts_V: NDArray[np.int64] | None
    refer: bool
    runs: tuple[int, ...]


@dataclass(frozen=True)
class Scored:
    """What is kept of one item. Lists hold one entry a run that was asked; an answer is the tokens of its picture, of several
    tiles of the middle one's, uint16 in little-endian bytes."""

    item: str
    measures: list[Measure]
    tokens: list[Measure]
    references: dict[str, Measure] | None
    unigram: Measure | None
    answers: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class UnitResult:
    """A unit's scored items in order, and {item id: reason} of those that cannot be used."""

    task: str
    number: int
    scored: list[Scored]
    bad: dict[str, str]


@dataclass(frozen=True)
class _Asked:
    """A loaded item with its questions: what is seen, what should be answered, and where its rows start in the unit. `examples`
    are the pictures of those without tokens: an image, its label, and so on."""

    place: int
    sample: Sample
    views: list[View]
    queries: list[Picture]
    truths: list[Picture]
    examples: list[Picture]
    start: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + len(self.views))


class Scorer:
    """What an actor runs: it loads tokenizer and models once and turns units into results."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._trivial: dict[str, list[TrivialAnswer]] = {}
        self._decoders: dict[int, Decoder] = {}

    # Loaded by the first unit: an error while an actor is made would reach nobody as itself.
    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return self._job.load(self._job.tokenizer)

    @cached_property
    def _subjects(self) -> dict[str, Subject]:
        return subjects(self._job.recipe)

    def _decoder(self, run: int) -> Decoder:
        if run not in self._decoders:
            self._decoders[run] = decoder(self._job.runs[run], self._job.recipe.compute.precision, self._tokenizer)
        return self._decoders[run]

    def score(self, unit: Unit) -> UnitResult:
        """Load, ask, answer, read back, measure."""
        with torch_threads(1):
            asked, bad = self._load(unit)
            scored = self._score(unit, asked) if asked else []
        return UnitResult(unit.task, unit.number, scored, bad)

    def _load(self, unit: Unit) -> tuple[list[_Asked], dict[str, str]]:
        recipe, task, split = self._job.recipe, self._task(unit.task), self._subjects[unit.task].split
        asked: list[_Asked] = []
        bad: dict[str, str] = {}
        start = 0
        for place, item in enumerate(unit.items):
            try:
                sample = task.load(item, split)
                views = task.questions(sample, recipe.size)
                parts = [seen(recipe, self._subjects[unit.task], item, sample, view) for view in views]
                examples = [picture for one in unit.shown[place] for picture in self._pair(unit, one)] if unit.shown else []
            except BadItem as error:
                bad[item.id] = str(error)
                continue
            truths = [task.draw(part.label, recipe.size) for part in parts]
            asked.append(_Asked(place, sample, views, [part.image for part in parts], truths, examples, start))
            start += len(views)
        return asked, bad

    def _pair(self, unit: Unit, item: Item) -> tuple[Picture, ...]:
        """An example's image and label picture, as training pairs have them."""
        task, recipe = self._task(unit.task), self._job.recipe
        seed = [recipe.seed, stable_hash(unit.task, "example", item.id)]
        return task.see(task.load(item, self._subjects[unit.task].split), 0, seed, recipe.size).pictures

    def _examples(self, unit: Unit, asked: list[_Asked]) -> NDArray[np.uint16]:
        """The tokens of the examples of those that are asked: [items, votes, examples, 2N]."""
        if unit.examples_IVE2N is not None:
            return unit.examples_IVE2N[[item.place for item in asked]]
        tokens_EN = self._encode([picture for item in asked for picture in item.examples])
        return tokens_EN.reshape(len(asked), 1, -1, 2 * tokens_EN.shape[1])

    def _score(self, unit: Unit, asked: list[_Asked]) -> list[Scored]:
        queries_QN = self._encode([picture for item in asked for picture in item.queries])
        truths_QN = self._encode([picture for item in asked for picture in item.truths])
        examples_IVE2N = self._examples(unit, asked)
        examples = [sets for sets, item in zip(examples_IVE2N, asked, strict=True) for _ in item.views]
        prompts = [[prompt_tokens(shown, query) for shown in sets] for sets, query in zip(examples, queries_QN, strict=True)]
        prompts_QVT = np.array(prompts, np.uint16)
        recipe, draws = self._job.recipe, self._subjects[unit.task].draws
        places = [(unit.items[item.place].id, view) for item in asked for view in range(len(item.views))]
        seeds = [draw_seed(recipe.seed, unit.task, item, view) for item, view in places]
        seeds_Q = np.array(seeds, np.uint64)
        answered = [self._answer(self._decoder(run), prompts_QVT, truths_QN, draws, seeds_Q) for run in unit.runs]
        labels_IN = examples_IVE2N[:, 0, -1, queries_QN.shape[1] :]
        references = self._references(unit, asked, queries_QN, truths_QN, labels_IN) if unit.refer else None
        task = self._task(unit.task)
        scored = []
        for k, item in enumerate(asked):
            answers = [task.read(list(run.pictures[item.rows]), item.views, item.sample) for run in answered]
            scored.append(
                Scored(
                    unit.items[item.place].id,
                    [{**task.measure(answer, item.sample), "nothing": task.shows_nothing(answer)} for answer in answers],
                    [token_measure(run.nll_QN[item.rows], run.correct_QN[item.rows]) for run in answered],
                    references[k] if references else None,
                    None if unit.counts_V is None else floors.unigram_measure(unit.counts_V, truths_QN[item.rows]),
                    [run.tokens_QN[item.start + middle(len(item.views))].astype("<u2").tobytes() for run in answered],
                )
            )
        return scored

    def _answer(
        self,
        decoder: Decoder,
        prompts_QVT: NDArray[np.uint16],
        truths_QN: NDArray[np.uint16],
        draws: int,
        seeds_Q: NDArray[np.uint64],
    ) -> _Answered:
        """A run's answers to every question, and its losses on the true ones, from one reading of each prompt. Of several prompts
        the first gives the losses, and the most central of their answers is the answer."""
        tokens = truths_QN.shape[1]
        answers, losses, hits = [], [], []
        for prompts_BVT, truths_BN, seeds_B in self._batches(prompts_QVT, truths_QN, seeds_Q):
            votes = []
            for vote in range(prompts_BVT.shape[1]):
                prompt = decoder.read(prompts_BVT[:, vote])
                if not vote:
                    nll_BN, correct_BN = decoder.losses(prompt, truths_BN)
                    losses.append(nll_BN)
                    hits.append(correct_BN)
                votes.append(respond(decoder, self._tokenizer, prompt, tokens, draws, seeds_B.tolist()))
            answers.append(voted(self._tokenizer, np.stack(votes, axis=1)))
        questions = len(prompts_QVT)
        tokens_QN = np.concatenate(answers)[:questions]
        return _Answered(tokens_QN, self.decode(tokens_QN), np.concatenate(losses)[:questions], np.concatenate(hits)[:questions])

    def _references(
        self,
        unit: Unit,
        asked: list[_Asked],
        queries_QN: NDArray[np.uint16],
        truths_QN: NDArray[np.uint16],
        labels_IN: NDArray[np.uint16],
    ) -> list[dict[str, Measure]]:
        task, size = self._task(unit.task), self._job.recipe.size
        if unit.task not in self._trivial:
            self._trivial[unit.task] = floors.trivial_answers(self._subjects[unit.task].training, size)
        query_trips, truth_trips = self.decode(queries_QN), self.decode(truths_QN)
        labels = self.decode(labels_IN)
        return [
            floors.reference_measures(
                task,
                item.sample,
                item.views,
                item.queries,
                {floors.ROUND_TRIP: list(query_trips[item.rows]), floors.CEILING: list(truth_trips[item.rows])},
                labels[k],
                self._trivial[unit.task],
            )
            for k, item in enumerate(asked)
        ]

    def _encode(self, pictures: Sequence[Picture]) -> NDArray[np.uint16]:
        parts = [self._tokenizer.encode(batch) for (batch,) in self._batches(np.stack(pictures))]
        return np.concatenate(parts)[: len(pictures)]

    def decode(self, tokens_QN: NDArray[np.uint16]) -> NDArray[np.uint8]:
        """The pictures of tokens, [Q, N] -> uint8 [Q, S, S, 3]."""
        parts = [self._tokenizer.decode(batch) for (batch,) in self._batches(tokens_QN)]
        return np.concatenate(parts)[: len(tokens_QN)]

    def _batches(self, *rows: NDArray[Any]) -> Iterator[list[NDArray[Any]]]:
        """Pieces of `evaluate.batch` rows of each array, the last one filled up with its last row."""
        batch = self._job.recipe.evaluate.batch
        for start in range(0, len(rows[0]), batch):
            places = np.minimum(np.arange(start, start + batch), len(rows[0]) - 1)
            yield [array[places] for array in rows]

    def _task(self, name: str) -> PairTask:
        return self._subjects[name].task


@dataclass(frozen=True)
class _Answered:
    """One run's answers to a unit's questions: tokens [Q, N] and pictures [Q, S, S, 3], and of the true answers' tokens [Q, N]
    loss and hit."""

    tokens_QN: NDArray[np.uint16]
    pictures: NDArray[np.uint8]
    nll_QN: NDArray[np.float64]
    correct_QN: NDArray[np.bool_]


def seen(recipe: Recipe, subject: Subject, item: Item, sample: Sample, view: View) -> Sample:
    """What an item shows through a view: as its pair in the shards, so that an image that a task makes itself is the same."""
    seed = [recipe.seed, stable_hash(subject.name, subject.split, item.id), 0]
    return subject.task.transform(sample, view, recipe.size, np.random.default_rng(seed))


def middle(tiles: int) -> int:
    """Which of several tiles of an item stands for all where one picture is shown."""
    return tiles // 2


def png(picture: Picture) -> bytes:
    """A picture as a PNG file."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


def decoder(run: str, precision: str, tokenizer: Tokenizer) -> Decoder:
    """A run's model, on the GPU where there is one."""
    import torch

    from lvm_ray.model.folder import read_model
    from lvm_ray.model.generate import Decoder

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    shape, weights, _ = read_model(f"{run}/model", dtype, tokenizer.hash)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Decoder(shape, {name: tensor.to(device) for name, tensor in weights.items()}, tokenizer.codebook)
