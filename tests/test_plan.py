"""Sentences and the plan as mathematics: what every row must be, whatever the sizes."""

from dataclasses import asdict

import numpy as np
import pytest

from lvm_ray.data.balance import Share, strategy
from lvm_ray.data.plan import batch_counts, make_plan
from lvm_ray.data.sentences import sentence_length, sentences
from lvm_ray.data.stream import read_rows
from lvm_ray.errors import UserError
from lvm_ray.seeds import stable_hash
from tests.toys import make_toy_shards, toy_recipe


def test_stable_hash_never_changes():
    assert stable_hash("sentence", "pose", 3) == 17973689706481067006


@pytest.mark.parametrize("pairs", [4, 5, 7, 8, 61])
def test_sentences_hold_every_pair_and_none_twice_in_one(pairs):
    rows = sentences(pairs, 4, seed=0, task="pose", copy=2, grouping=1)
    assert rows.shape == (-(-pairs // 4), 4)
    assert set(rows.ravel()) == set(range(pairs))
    assert all(len(set(row)) == 4 for row in rows)


def test_sentences_change_with_copy_grouping_task_and_seed_only():
    base = {"seed": 0, "task": "pose", "copy": 0, "grouping": 0}
    same = sentences(40, 4, **base)
    assert (same == sentences(40, 4, **base)).all()
    for change in ({"seed": 1}, {"task": "derain"}, {"copy": 1}, {"grouping": 1}):
        assert (same != sentences(40, 4, **{**base, **change})).any()


@pytest.mark.parametrize("people", [2, 3])
def test_sentences_keep_pairs_of_one_original_apart(people):
    originals = [f"photo-{i // people}" for i in range(41)]
    for seed in range(20):
        rows = sentences(41, 4, seed=seed, task="pose", copy=0, grouping=0, originals=originals)
        assert set(rows.ravel()) == set(range(41))
        assert all(len({originals[pair] for pair in row}) == 4 for row in rows)


def test_too_few_pairs_name_task_and_count():
    with pytest.raises(UserError, match="task pose: 3 training pairs, but one sentence takes 4"):
        sentences(3, 4, seed=0, task="pose", copy=0, grouping=0)
    with pytest.raises(UserError, match="task pose: 2 training original images"):
        sentences(6, 4, seed=0, task="pose", copy=0, grouping=0, originals=list("aaabbb"))


def test_a_sentence_takes_as_many_rows_as_fill_it():
    assert [sentence_length(4, pictures, "video") for pictures in (1, 2, 4, 8)] == [8, 4, 2, 1]
    for pictures in (3, 16):
        with pytest.raises(UserError, match=f"task video: a row of its tokens holds {pictures} pictures"):
            sentence_length(4, pictures, "video")


@pytest.mark.parametrize("shares", [[1 / 3, 1 / 3, 1 / 3], [0.5, 0.5], [0.02, 0.9, 0.08], [1.0], [0.1] * 10, [0.0, 0.25, 0.75]])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_every_batch_and_the_whole_run_hold_the_shares(shares, batch):
    counts = batch_counts(shares, 200, batch)
    wanted = np.asarray(shares) * batch
    assert (counts.sum(axis=1) == batch).all()
    assert (counts >= np.floor(wanted + 1e-9)).all() and (counts <= np.ceil(wanted - 1e-9)).all()
    behind = np.abs(counts.cumsum(axis=0) - wanted * np.arange(1, 201)[:, None])
    assert behind.max() <= 1 + 1e-6


@pytest.fixture
def shards(tmp_path):
    recipe = toy_recipe(tmp_path, train={"steps": 60, "batch": 8, "micro_batch": 4})
    return recipe, make_toy_shards(recipe.shard_folder)


def test_an_epoch_holds_each_admitted_sentence_once(shards):
    recipe, manifest = shards
    plan = make_plan(manifest, recipe)
    rows = plan.rows(0, len(plan))
    assert len(plan) == 60 * 8 and (rows.row == np.arange(480)).all()
    # threshold: 2 sentences of each of 3 copies; 160 rows are 26 epochs and 4 rows.
    chosen = rows.task == 1
    names = list(zip(rows.copy[chosen], rows.index[chosen], strict=True))
    assert rows.grouping[chosen].max() == recipe.balance.groupings - 1
    assert chosen.sum() == 160
    # Rows of one batch are shuffled, so an epoch's end may be anywhere in it: count over the run.
    counts = {name: names.count(name) for name in set(names)}
    assert len(counts) == 6 and set(counts.values()) <= {26, 27}


def test_a_fraction_admits_a_fixed_prefix_of_the_next_copy(shards):
    recipe, manifest = shards
    shares = {"invert": Share(0.5, 1.0), "threshold": Share(0.25, 2.5), "swap": Share(0.25, 1.0)}
    rows = make_plan(manifest, recipe, shares).columns
    chosen = rows.task == 1
    assert set(zip(rows.copy[chosen].tolist(), rows.index[chosen].tolist(), strict=True)) == {
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (2, 0),
    }
    assert (rows.copy[~chosen] == 0).all()


@pytest.mark.parametrize("name", ["none", "repeat", "downsample", "temperature", "augment", "augment+temperature"])
def test_batches_hold_every_strategys_shares_within_one_sentence(tmp_path, name):
    recipe = toy_recipe(tmp_path, train={"steps": 40, "batch": 8}, balance={"strategy": name, "alpha": 0.3})
    manifest = make_toy_shards(recipe.shard_folder)
    plan = make_plan(manifest, recipe)
    shares = strategy(recipe.balance, manifest.rows["train"], manifest.images_per_row)
    wanted = np.array([shares[task].share for task in plan.tasks]) * 8
    counts = np.array([np.bincount(batch, minlength=3) for batch in plan.columns.task.reshape(40, 8)])
    assert (np.abs(counts - wanted) < 1).all()
    assert (np.abs(counts.sum(axis=0) - 40 * wanted) <= 1).all()


def pairs_by_epoch(columns, task, number, recipe, pairs, distinct):
    """The set of pairs that each whole epoch of a task shows."""
    chosen = np.flatnonzero(columns.task == number)
    shown = [
        sentences(pairs, 4, recipe.seed, task, columns.copy[row], columns.grouping[row])[columns.index[row]] for row in chosen
    ]
    epochs = len(shown) // distinct
    return [{int(pair) for row in shown[e * distinct : (e + 1) * distinct] for pair in row} for e in range(epochs)]


@pytest.mark.parametrize(("pairs", "sentences_left"), [(800, 2), (80, 2), (9, 2), (3000, 2)])
def test_downsampling_shows_the_same_part_of_a_task_in_every_epoch(tmp_path, pairs, sentences_left):
    recipe = toy_recipe(
        tmp_path,
        train={"steps": 24, "batch": 1, "micro_batch": 1},
        balance={"strategy": "downsample"},
        tasks={"invert": {}, "swap": {}},
    )
    plan = make_plan(make_toy_shards(recipe.shard_folder, {"invert": (pairs, 1), "swap": (8, 1)}), recipe)
    shown = pairs_by_epoch(plan.columns, "invert", 0, recipe, pairs, sentences_left)
    assert len(shown) == 6 and all(epoch == shown[0] for epoch in shown)
    assert len(shown[0]) == 4 * sentences_left
    # The smallest task is whole, so its groupings go on changing.
    assert len(set(plan.columns.grouping[plan.columns.task == 1].tolist())) == recipe.balance.groupings


def test_a_task_of_a_fraction_of_a_sentence_still_has_one(tmp_path):
    recipe = toy_recipe(tmp_path, train={"steps": 10, "batch": 2, "micro_batch": 2}, tasks={"invert": {}, "swap": {}})
    manifest = make_toy_shards(recipe.shard_folder, {"invert": (3000, 1), "swap": (4, 1)})
    columns = make_plan(manifest, recipe, {"invert": Share(0.5, 0.0001), "swap": Share(0.5, 1.0)}).columns
    chosen = columns.task == 0
    assert chosen.sum() == 10 and set(columns.index[chosen].tolist()) == {0} and set(columns.grouping[chosen].tolist()) == {0}


def test_the_part_of_a_copy_keeps_its_pairs_while_whole_copies_change_their_groups(shards):
    recipe, manifest = shards
    shares = {"invert": Share(0.5, 1.0), "threshold": Share(0.25, 1.5), "swap": Share(0.25, 1.0)}
    columns = make_plan(manifest, recipe, shares).columns
    chosen = columns.task == 1
    groupings = {copy: set(columns.grouping[chosen & (columns.copy == copy)].tolist()) for copy in (0, 1)}
    assert groupings == {0: set(range(recipe.balance.groupings)), 1: {0}}


def test_a_task_without_a_share_has_no_rows(tmp_path):
    recipe = toy_recipe(tmp_path, balance={"shares": {"invert": 1, "threshold": 0, "swap": 3}})
    columns = make_plan(make_toy_shards(recipe.shard_folder), recipe).columns
    assert np.bincount(columns.task, minlength=3).tolist() == [16, 0, 48]


def test_a_longer_plan_begins_with_the_shorter_one(shards):
    recipe, manifest = shards
    longer = make_plan(manifest, recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 90})}))
    plan = make_plan(manifest, recipe)
    assert longer.fingerprint == plan.fingerprint and len(longer) == 90 * 8
    short, head = asdict(plan.columns), asdict(longer.rows(0, len(plan)))
    assert all((short[name] == head[name]).all() for name in ("row", "task", "copy", "grouping", "index"))


def test_the_fingerprint_changes_with_the_rows(shards, tmp_path):
    recipe, manifest = shards
    plans = [
        make_plan(manifest, recipe),
        make_plan(manifest, recipe.model_copy(update={"seed": 1})),
        make_plan(manifest, recipe, dict.fromkeys(recipe.tasks, Share(1 / 3, 1.0))),
        make_plan(make_toy_shards(tmp_path / "other", seed=1), recipe),
    ]
    assert len({plan.fingerprint for plan in plans}) == 4


def test_a_task_that_was_not_tokenised_is_named(tmp_path):
    recipe = toy_recipe(tmp_path)
    with pytest.raises(UserError, match="no training pairs of task swap"):
        make_plan(make_toy_shards(tmp_path, {"invert": (8, 1), "threshold": (8, 1)}), recipe)


def test_rows_of_one_and_of_eight_pictures_make_sentences_of_their_own_number(tmp_path):
    recipe = toy_recipe(tmp_path, train={"steps": 60, "batch": 8, "micro_batch": 4})
    pairs_alone = make_plan(make_toy_shards(tmp_path / "pairs"), recipe).columns
    manifest = make_toy_shards(recipe.shard_folder, pictures={"invert": 1, "swap": 8})
    rows = make_plan(manifest, recipe).columns
    assert (rows.task == pairs_alone.task).all()
    # 24 pictures are 3 sentences, 8 pairs are 2, 8 clips are 8.
    assert [set(rows.index[rows.task == task].tolist()) for task in range(3)] == [set(range(count)) for count in (3, 2, 8)]
    for column in ("copy", "grouping", "index"):
        ours, theirs = (getattr(columns, column)[columns.task == 1] for columns in (rows, pairs_alone))
        assert (ours == theirs).all()


def test_shards_of_other_pictures_are_refused(tmp_path):
    manifest = make_toy_shards(tmp_path / "shards")
    with pytest.raises(UserError, match=r"^size: found 32, but the tokens in .* are of size 16: set it to 16"):
        make_plan(manifest, toy_recipe(tmp_path, size=32))
    with pytest.raises(UserError, match=r"^tokenizer.patch: found 4, but the tokens in .* are of tokenizer.patch 8"):
        make_plan(manifest, toy_recipe(tmp_path, tokenizer={"patch": 4}))


def test_schedules_share_their_plan_up_to_where_they_part(shards, tmp_path):
    manifest, folder = shards[1], shards[0].shard_folder
    shares = [{"invert": a, "threshold": b, "swap": 1 - a - b} for a, b in ((0.5, 0.3), (0.1, 0.1), (0.8, 0.1))]

    def plan(*parts):
        schedule = [{"start": start, "shares": shares[place]} for start, place in parts]
        return make_plan(manifest, toy_recipe(tmp_path, shards=folder, train={"steps": 20}, balance={"schedule": schedule}))

    whole, early, late = plan((0.0, 0)), plan((0.0, 0), (0.5, 1)), plan((0.0, 0), (0.5, 1), (0.75, 2))
    even = make_plan(manifest, toy_recipe(tmp_path, shards=folder, train={"steps": 20}, balance={"shares": shares[0]}))
    assert len({one.fingerprint for one in (whole, early, late, even)}) == 4

    def rows(one, start, stop):
        return np.stack([getattr(one.rows(8 * start, 8 * stop), name) for name in ("task", "copy", "grouping", "index")])

    assert (rows(even, 0, 20) == rows(whole, 0, 20)).all()
    assert (rows(whole, 0, 10) == rows(early, 0, 10)).all() and (rows(whole, 10, 20) != rows(early, 10, 20)).any()
    assert (rows(early, 0, 15) == rows(late, 0, 15)).all() and (rows(early, 15, 20) != rows(late, 15, 20)).any()
    for start, stop, place in ((0, 10, 0), (10, 15, 1), (15, 20, 2)):
        counts = np.bincount(late.rows(8 * start, 8 * stop).task, minlength=3)
        assert np.abs(counts - 8 * (stop - start) * np.array(list(shares[place].values()))).max() <= 1


def test_a_trainings_own_seed_changes_the_order_and_not_the_sentences(shards, tmp_path):
    manifest, folder = shards[1], shards[0].shard_folder
    plain, seeded = (make_plan(manifest, toy_recipe(tmp_path, shards=folder, train={"seed": seed})) for seed in (None, 3))
    assert plain.fingerprint != seeded.fingerprint and (plain.columns.index != seeded.columns.index).any()
    batches = [read_rows(toy_recipe(tmp_path, shards=folder, train={"seed": seed}), plain, 0, 8)["tokens"] for seed in (None, 3)]
    assert (batches[0] == batches[1]).all()
