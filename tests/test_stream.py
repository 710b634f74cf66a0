"""The stream: every global batch holds the same rows, for any number of workers and from any position."""

import numpy as np
import pytest

from lvm_ray.data import stream
from lvm_ray.data.plan import make_plan
from lvm_ray.data.sentences import sentences
from lvm_ray.data.shards import open_shards
from lvm_ray.data.stream import accumulation, data_config, local_batches, read_rows, training_dataset, worker_batches
from lvm_ray.data.tokenize import tokenize
from lvm_ray.errors import UserError
from lvm_ray.progress import Bar
from tests.toys import load_toy_tokenizer, make_toy_shards, toy_recipe


@pytest.fixture
def run(tmp_path):
    recipe = toy_recipe(tmp_path, train={"steps": 24, "batch": 8, "micro_batch": 2})
    return recipe, make_plan(make_toy_shards(recipe.shard_folder), recipe)


@pytest.fixture
def many_pictures(tmp_path):
    """Tasks of one picture a row, of pairs, and of clips of eight pictures."""
    recipe = toy_recipe(tmp_path, train={"steps": 8, "batch": 8, "micro_batch": 2})
    manifest = make_toy_shards(recipe.shard_folder, pictures={"invert": 1, "swap": 8})
    return recipe, make_plan(manifest, recipe)


def test_a_row_is_its_pairs_in_a_row(run):
    recipe, plan = run
    batch = read_rows(recipe, plan, 10, 30)
    assert batch["tokens"].shape == (20, 32) and batch["tokens"].dtype == np.uint16
    assert (batch["row"] == np.arange(10, 30)).all()
    rows, shards = plan.rows(10, 30), open_shards(recipe.shard_folder)
    for tokens, task, copy, grouping, index in zip(batch["tokens"], rows.task, rows.copy, rows.grouping, rows.index, strict=True):
        ids, pairs = shards.pairs("train", plan.tasks[task], int(copy))
        members = sentences(len(ids), 4, recipe.seed, plan.tasks[task], int(copy), int(grouping))[index]
        assert (tokens == pairs[members].ravel()).all()


def test_rows_of_one_and_of_eight_pictures_fill_sentences_too(many_pictures):
    recipe, plan = many_pictures
    batch, rows, shards = read_rows(recipe, plan, 0, 64), plan.rows(0, 64), open_shards(recipe.shard_folder)
    assert batch["tokens"].shape == (64, 32)
    for tokens, task, copy, grouping, index in zip(batch["tokens"], rows.task, rows.copy, rows.grouping, rows.index, strict=True):
        ids, parts = shards.rows("train", plan.tasks[task], int(copy))
        length = (8, 4, 1)[task]
        members = sentences(len(ids), length, recipe.seed, plan.tasks[task], int(copy), int(grouping))[index]
        assert len(set(members)) == length and (tokens == parts[members].ravel()).all()


def test_workers_get_those_rows_too(many_pictures, ray_session):
    recipe, plan = many_pictures
    dataset = training_dataset(recipe, lambda: 0)()
    shards = [worker["train"] for worker in data_config().configure({"train": dataset}, 2, None, None)]
    found = [batch for batches in _consume(shards, recipe.train.micro_batch) for batch in batches]
    assert _by_row(found) == _by_row(local_batches(recipe, plan))


def test_no_sentence_shows_an_original_twice(tmp_path):
    recipe = toy_recipe(tmp_path, tasks={"swap": {"people": 2}})
    tokens_R4P = _tokens_of_plan(recipe).reshape(-1, 4, 8)
    # Both people of a toy photo have the same picture, so the same tokens.
    assert all(len({pair.tobytes() for pair in sentence}) == 4 for sentence in tokens_R4P)


def test_a_position_continues_the_stream(run):
    recipe, plan = run
    whole = list(local_batches(recipe, plan))
    assert [len(batch["row"]) for batch in whole] == [2] * (24 * 4)
    late = list(local_batches(recipe, plan, position=13 * 8))
    assert all((a["tokens"] == b["tokens"]).all() for a, b in zip(late, whole[13 * 4 :], strict=True))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("position", [0, 13 * 8])
def test_workers_get_the_rows_that_local_mode_gets(run, ray_session, monkeypatch, workers, position):
    recipe, plan = run
    # Units of six rows: blocks end inside batches, as they do in a long run.
    monkeypatch.setattr(stream, "UNIT_TOKENS", 5 * recipe.sentence_tokens)
    dataset = training_dataset(recipe, lambda: position)()
    # What Ray Train does with the data set and this configuration, without its minute of start-up.
    shards = [worker["train"] for worker in data_config().configure({"train": dataset}, workers, None, None)]
    found = _consume(shards, recipe.train.micro_batch)
    expected = list(local_batches(recipe, plan, position))
    each = accumulation(recipe, workers)
    assert [len(batches) for batches in found] == [each * (24 - position // 8)] * workers
    for step in range(24 - position // 8):
        here = _by_row(expected[step * 4 : (step + 1) * 4])
        there = _by_row([batch for batches in found for batch in batches[step * each : (step + 1) * each]])
        assert here == there, f"global batch {step}"


def test_a_plan_that_is_used_up_streams_nothing(run, ray_session):
    recipe, plan = run
    dataset = training_dataset(recipe, lambda: len(plan))()
    (worker,) = data_config().configure({"train": dataset}, 1, None, None)
    assert list(worker_batches(worker["train"], recipe.train.micro_batch)) == []


@pytest.mark.parametrize("workers", [3, 8])
def test_a_batch_that_cannot_be_shared_out_is_refused(run, workers):
    with pytest.raises(UserError, match=f"train.batch: 8 sentences cannot be shared out evenly to {workers} workers"):
        accumulation(run[0], workers)


def _tokens_of_plan(recipe):
    """Tokenize for real; the tokens of the plan's rows."""
    manifest = tokenize(recipe, Bar("tokenize", None, "pairs"), load_toy_tokenizer)
    plan = make_plan(manifest, recipe)
    return read_rows(recipe, plan, 0, len(plan))["tokens"]


def _consume(shards, micro_batch):
    """Read all shards at once, as training workers do: each waits for the slowest."""
    import ray

    @ray.remote(num_cpus=1)
    def worker(shard):
        return list(worker_batches(shard, micro_batch))

    return ray.get([worker.remote(shard) for shard in shards], timeout=120)


def _by_row(batches):
    return {
        int(row): (int(task), tokens.tobytes())
        for batch in batches
        for row, task, tokens in zip(batch["row"], batch["task"], batch["tokens"], strict=True)
    }
