"""What was answered is not asked again: after kills, beside other runs, and only where nothing has changed."""

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet
import pytest

from lvm_ray.evaluate import floors, kept
from lvm_ray.evaluate.score import Scored, Scorer, UnitResult
from lvm_ray.evaluate.subjects import subjects

from .test_evaluate import contents, evaluate, make_pipeline, make_run


@pytest.fixture
def asked(monkeypatch) -> Counter:
    """How often each unit was asked of how many runs."""
    seen, score = Counter(), Scorer.score

    def spy(self, unit):
        seen[unit.task, unit.number, len(unit.runs)] += 1
        return score(self, unit)

    monkeypatch.setattr(Scorer, "score", spy)
    return seen


def killed_after(monkeypatch, units):
    """The evaluation dies while it works on the unit after so many."""
    done, score = [], Scorer.score

    def dies(self, unit):
        if len(done) == units:
            raise KeyboardInterrupt
        done.append(unit)
        return score(self, unit)

    monkeypatch.setattr(Scorer, "score", dies)


def test_an_evaluation_that_is_killed_twice_ends_with_the_same_bytes(tmp_path, monkeypatch, asked):
    undisturbed, runs = make_pipeline(tmp_path / "a")
    evaluate(runs, undisturbed)
    total = sum(asked.values())
    recipe, others = make_pipeline(tmp_path / "b")
    for units in (1, 2):
        with monkeypatch.context() as patch:
            killed_after(patch, units)
            with pytest.raises(KeyboardInterrupt):
                evaluate(others, recipe)
        assert not any(Path(run, "evaluation.json").exists() for run in others)
    asked.clear()
    evaluate(others, recipe)
    assert contents(others) == contents(runs)
    assert sum(asked.values()) == total - 3, "three units were answered before the kills"


def test_a_finished_evaluation_asks_nobody(tmp_path, asked):
    recipe, runs = make_pipeline(tmp_path)
    first = evaluate(runs, recipe)
    before = contents(runs)
    asked.clear()
    assert evaluate(runs, recipe) == first and contents(runs) == before and not asked


def test_references_come_from_what_was_kept_or_are_computed_alone(tmp_path, monkeypatch, asked):
    recipe, runs = make_pipeline(tmp_path)
    first = evaluate(runs[:1], recipe)
    (tmp_path / "data/references.json").unlink()
    asked.clear()
    assert evaluate(runs[:1], recipe) == first and not asked  # killed before they were written
    evaluate(runs[1:], recipe)  # with references known, so it keeps none of its own
    (tmp_path / "data/references.json").unlink()
    asked.clear()
    evaluate(runs[1:], recipe)
    assert asked and all(count == 0 for _, _, count in asked), "of no run anything is asked"
    entries = json.loads((tmp_path / "data/references.json").read_text())
    assert entries.keys() == {subject.asked_as for subject in subjects(recipe).values()}


def test_a_run_that_joins_is_asked_alone(tmp_path, asked):
    recipe, runs = make_pipeline(tmp_path)
    evaluate(runs[:1], recipe)
    asked.clear()
    both = evaluate(runs, recipe)
    assert asked and {count for _, _, count in asked} == {1}
    other, fresh = make_pipeline(tmp_path / "fresh")
    assert evaluate(fresh, other) == both


def test_more_items_keep_the_units_that_were_full(tmp_path, asked):
    recipe, runs = make_pipeline(tmp_path)
    fewer = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"items": 6})})
    evaluate(runs, fewer)
    asked.clear()
    evaluate(runs, recipe)
    assert {(task, number) for task, number, _ in asked} >= {("invert", 2)}
    assert all(count == 0 for task, number, count in asked if number < 2), "asked again for their references at most"


@pytest.mark.parametrize("change", ["draws", "weights", "code"])
def test_what_has_changed_is_asked_again(tmp_path, asked, monkeypatch, change):
    recipe, runs = make_pipeline(tmp_path)
    first = evaluate(runs[:1], recipe)
    asked.clear()
    if change == "draws":
        recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"draws": {"swap": 2}})})
    elif change == "weights":
        make_run(Path(runs[0]), recipe, seed=9)
    else:
        monkeypatch.setattr(floors, "code_hash", lambda: "another")
    again = evaluate(runs[:1], recipe)
    assert {task for task, _, _ in asked} == ({"swap"} if change == "draws" else {"invert", "swap"})
    assert (again == first) == (change == "code")


def test_damaged_and_foreign_files_are_answered_anew(tmp_path, asked):
    recipe, runs = make_pipeline(tmp_path)
    first = evaluate(runs, recipe)
    files = sorted((Path(runs[0]) / kept.FOLDER).glob("*.parquet"))
    files[0].write_bytes(files[0].read_bytes()[:40])
    table = pyarrow.parquet.read_table(files[1])
    pyarrow.parquet.write_table(table.drop_columns(["tokens"]), files[1])
    asked.clear()
    assert evaluate(runs, recipe) == first and sum(asked.values()) == 2


def test_what_could_not_be_used_is_tried_again_and_counts_for_no_run(tmp_path, asked, monkeypatch):
    recipe, runs = make_pipeline(tmp_path, tasks={"invert": {"train": 24, "test": 7, "bad": ["test-0001-0"]}}, max_bad=0.2)
    first = evaluate(runs, recipe)
    assert first[0]["bad"] == {"invert": 1}
    asked.clear()
    assert evaluate(runs, recipe) == first and set(asked) == {("invert", 0, 2)}
    usable, _ = make_pipeline(tmp_path / "usable", tasks={"invert": {"train": 24, "test": 7}})
    mended = recipe.model_copy(update={"tasks": usable.tasks})
    assert evaluate(runs, mended)[0]["bad"] == {"invert": 0}


def test_an_item_that_one_run_could_not_be_asked_about_counts_for_none():
    def part(items, bad):
        scored = [Scored(item, [{"error": 1.0}], [{"nll": 1.0}], {"floor": {}}, {}) for item in items]
        return UnitResult("invert", 0, scored, bad)

    both = kept.joined([part(["a", "b"], {}), part(["a"], {"b": "gone"})])
    assert [one.item for one in both.scored] == ["a"] and len(both.scored[0].measures) == 2 and both.bad == {"b": "gone"}


def test_another_decoder_of_the_same_tokens_is_asked_anew(tmp_path, asked):
    recipe, runs = make_pipeline(tmp_path)
    evaluate(runs, recipe)
    asked.clear()
    (tmp_path / "tokenizer").mkdir(exist_ok=True)
    (tmp_path / "tokenizer" / "model.safetensors").write_bytes(b"other weights")
    evaluate(runs, recipe)
    assert {task for task, _, _ in asked} == {"invert", "swap"}
