"""Which pairs stand before a query, and what several prompts of one item come to."""

import numpy as np
import pytest

from lvm_ray.data.shards import open_shards
from lvm_ray.errors import UserError
from lvm_ray.evaluate import prompts
from lvm_ray.evaluate.answer import most_central, voted
from lvm_ray.evaluate.prompts import Likeness, choose_examples, choose_prompts
from lvm_ray.evaluate.units import make_units
from lvm_ray.evaluate.units import test_items as items_of

from .test_evaluate import contents, evaluate, make_pipeline
from .toys import ToyTokenizer

ORIGINALS = [f"photo {number // 2}" for number in range(40)]  # two pairs of each


def test_the_first_prompt_is_the_one_that_a_single_prompt_is():
    several = choose_prompts("random", 3, 0, "pose", "item", "photo 1", ORIGINALS, 3)
    assert several[0] == choose_examples(0, "pose", "item", "photo 1", ORIGINALS, 3)
    shown = [ORIGINALS[place] for places in several for place in places]
    assert len(set(shown)) == 9, "each prompt has pairs of its own"


def test_fixed_examples_are_the_same_for_all_but_never_an_items_own():
    chosen = {name: choose_prompts("fixed", 1, 0, "pose", name, name, ORIGINALS, 3)[0] for name in sorted(set(ORIGINALS))}
    usual = max(chosen.values(), key=list(chosen.values()).count)
    for name, places in chosen.items():
        own = [ORIGINALS[place] == name for place in usual]
        assert name not in {ORIGINALS[place] for place in places}
        assert (places == usual) == (not any(own))


def test_the_nearest_examples_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    codebook, images = rng.normal(size=(16, 3)).astype(np.float32), rng.integers(0, 16, (40, 5)).astype(np.uint16)
    likeness = Likeness(images, ORIGINALS, codebook, 0, "pose")
    for query in range(0, 40, 7):
        away = [
            float(sum(((codebook[a] - codebook[b]) ** 2).sum() for a, b in zip(images[query], row, strict=True)))
            for row in images
        ]
        wanted, taken = [], {ORIGINALS[query]}
        for place in sorted(range(40), key=lambda place: away[place]):
            if ORIGINALS[place] not in taken:
                taken.add(ORIGINALS[place])
                wanted.append(place)
        first, second = likeness.choose(images[query], ORIGINALS[query], 3, 2)
        assert first == wanted[:3][::-1], "the nearest stands right before the query"
        assert second == wanted[3:6][::-1]
    with pytest.raises(UserError, match=r"tasks\.pose\.train: 19 originals can stand .* 20 examples are wanted"):
        likeness.choose(images[0], ORIGINALS[0], 4, 5)


def test_of_very_many_pairs_some_are_compared(monkeypatch):
    monkeypatch.setattr(prompts, "CANDIDATES", 8)
    images = np.arange(40, dtype=np.uint16)[:, None]
    likeness = Likeness(images, ORIGINALS, np.arange(40, dtype=np.float32)[:, None], 0, "pose")
    chosen = {place for query in range(40) for place in likeness.choose(images[query], "none", 2, 1)[0]}
    assert len(chosen) <= 8 and max(chosen) > 20


def test_the_most_central_answer_of_several_prompts_counts():
    tokenizer = ToyTokenizer()
    answers = np.random.default_rng(0).integers(0, 64, (4, 5, 4)).astype(np.uint16)
    found = voted(tokenizer, answers)
    for row, chosen in zip(answers, found, strict=True):
        assert np.array_equal(chosen, row[most_central(tokenizer.decode(row))])
    assert np.array_equal(voted(tokenizer, answers[:, :1]), answers[:, 0])


def test_nearest_examples_stand_in_the_prompts(tmp_path):
    recipe, _ = make_pipeline(tmp_path, evaluate={"batch": 3, "resamples": 100, "choose": "nearest", "examples": 2, "votes": 2})
    shards = open_shards(recipe.shard_folder)
    _, training = shards.pairs("train", "invert", 0)
    ids, queries = shards.pairs("test", "invert", 0)
    units = make_units(recipe, items_of(recipe), shards, [], 1, ToyTokenizer().codebook.numpy())
    unit = next(unit for unit in units if unit.task == "invert")
    assert unit.examples_IVE2N.shape == (3, 2, 2, 8)
    likeness = Likeness(
        training[:, :4], shards.originals("train", "invert"), ToyTokenizer().codebook.numpy(), recipe.seed, "invert"
    )
    wanted = likeness.choose(queries[ids.index(unit.items[0].id), :4], unit.items[0].original, 2, 2)
    assert np.array_equal(unit.examples_IVE2N[0], training[np.array(wanted)])


def test_every_way_of_prompting_is_scored_and_said(tmp_path):
    found = {}
    for number, section in enumerate(({}, {"choose": "fixed"}, {"choose": "nearest"}, {"votes": 2}, {"examples": 1})):
        recipe, runs = make_pipeline(tmp_path / str(number), evaluate={"batch": 3, "resamples": 100, **section})
        (evaluation,) = evaluate(runs[:1], recipe)
        assert (evaluation["choose"], evaluation["votes"]) == (section.get("choose", "random"), section.get("votes", 1))
        assert evaluation["examples"] == section.get("examples", 3)
        found[number] = evaluation["tasks"]["invert"]["target_perplexity"]["value"]
        before = contents(runs[:1])
        evaluate(runs[:1], recipe)
        assert contents(runs[:1]) == before
    assert found[3] == found[0], "the first of several prompts gives the losses"
    assert len(set(found.values())) == 4
