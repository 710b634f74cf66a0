"""Tasks one after another: each stage starts where the one before ended, and what is replayed is what the recipe says."""

import numpy as np
import pytest

import lvm_ray.tokenizer
from lvm_ray import config, pipeline, tables
from lvm_ray.continual import stage_folders, stage_recipes
from lvm_ray.data.plan import make_plan
from lvm_ray.data.shards import open_shards
from lvm_ray.errors import UserError
from lvm_ray.evaluate import predict
from lvm_ray.train import checkpoint
from lvm_ray.train.meter import read_metrics

from .toys import load_toy_tokenizer, toy_recipe

STAGES = {"stages": ["invert", "threshold", "swap"]}
REPLAY = STAGES | {"replay": 0.25, "kept": 0.5}


@pytest.fixture(autouse=True)
def toy_tokenizer(monkeypatch):
    monkeypatch.setattr(lvm_ray.tokenizer, "load_tokenizer", load_toy_tokenizer)


def recipe_of(folder, shards, **changes):
    return toy_recipe(folder, **({"shards": shards, "continual": STAGES} | changes))


def test_stages_are_single_runs_each_from_the_one_before(tmp_path, shards):
    recipe = recipe_of(tmp_path, shards, continual=STAGES | {"stages": ["invert", ["threshold", "swap"]], "replay": 0.2})
    first, second = stage_recipes(recipe).values()
    assert [first.run, second.run] == [f"{tmp_path}/1-invert", f"{tmp_path}/2-threshold-swap"]
    assert first.model.init is None and second.model.init == first.run
    assert first.balance.shares == {"invert": 1, "threshold": 0, "swap": 0}
    assert second.balance.shares == pytest.approx({"invert": 0.2, "threshold": 0.4, "swap": 0.4})
    assert first.distill is None and second.distill is None and second.continual is None


def test_replayed_rows_are_of_the_part_that_is_kept(tmp_path, shards):
    recipe = recipe_of(tmp_path, shards, continual=STAGES | {"replay": 0.25, "kept": 1 / 3}, train={"steps": 40})
    manifest = open_shards(shards).manifest
    *_, last = stage_recipes(recipe).values()
    rows = make_plan(manifest, last).columns
    counts = np.bincount(rows.task, minlength=3)
    assert counts.tolist() == [40, 40, 240]
    invert = rows.task == 0
    assert set(rows.index[invert]) == {0, 1} and not rows.grouping[invert].any(), "two of six sentences, always the same pairs"
    assert set(rows.copy[rows.task == 1]) == {0}, "originals alone are kept"
    assert set(rows.copy[rows.task == 2]) == {0, 1}, "its own stage draws on all copies"


def test_later_stages_take_smaller_steps_and_weigh_what_is_replayed(tmp_path, shards):
    section = STAGES | {"replay": 0.05, "weight": 4.0, "rate": 0.5}
    recipe = recipe_of(tmp_path, shards, continual=section, balance={"weights": {"swap": 2.0}})
    first, second, third = stage_recipes(recipe).values()
    assert [stage.train.rate for stage in (first, second, third)] == [1e-3, 5e-4, 5e-4]
    assert [stage.train.muon_rate for stage in (first, second)] == [0.02, 0.01]
    assert first.balance.weights == {"swap": 2.0} and second.balance.weights == {"swap": 2.0, "invert": 4.0}
    assert third.balance.weights == {"swap": 2.0, "invert": 4.0, "threshold": 4.0}


def test_a_strategy_without_copies_trains_stages_without_them(tmp_path, shards):
    recipe = recipe_of(tmp_path, shards, balance={"strategy": "none"})
    second = list(stage_recipes(recipe).values())[1]
    rows = make_plan(open_shards(shards).manifest, second).columns
    assert set(rows.task) == {1} and set(rows.copy) == {0}


def test_the_verbs_train_score_and_show_all_stages(tmp_path, shards, capsys, monkeypatch):
    recipe = recipe_of(tmp_path, shards, continual=REPLAY | {"distill": 1.0})
    pipeline.balance(recipe)
    shown = capsys.readouterr()
    assert all(f"balance: {name}" in shown.out + shown.err for name in ("1-invert", "2-threshold", "3-swap"))
    folders = pipeline.train(recipe)
    assert folders == [f"{tmp_path}/{name}" for name in ("1-invert", "2-threshold", "3-swap")]
    assert config.load(f"{tmp_path}/config.yaml").continual == recipe.continual
    losses = [read_metrics(folder) for folder in folders]
    assert losses[0][-1]["kd"] is None and losses[1][-1]["teachers"]["teacher"]["kd"]["threshold"] == 0
    assert losses[1][-1]["teachers"]["teacher"]["kd"]["invert"] > 0
    assert pipeline.train(recipe) == folders  # finished: nothing is done again
    assert [len(read_metrics(folder)) for folder in folders] == [len(lines) for lines in losses]
    assert predict._run_folder(str(tmp_path)).name == "3-swap"
    asked = []
    monkeypatch.setattr("lvm_ray.evaluate.run.evaluate_runs", lambda runs, *rest: asked.extend(runs) or [{}] * len(runs))
    monkeypatch.setattr(tables, "print_scores", lambda *results: None)
    (tmp_path / "3-swap" / "evaluation.json").write_text("{}")
    pipeline.evaluate(recipe)
    assert asked == folders and (tmp_path / "evaluation.json").read_text() == "{}"


def test_a_stage_starts_with_the_weights_of_the_one_before(tmp_path, shards):
    recipe = recipe_of(tmp_path, shards, train={"rate": 1e-12, "muon_rate": 1e-12, "weight_decay": 0})
    first, second, _ = pipeline.train(recipe)
    (before, _), (after, _) = (checkpoint.load(checkpoint.latest(run)) for run in (first, second))
    for name, values in before.items():
        assert (values - after[name]).abs().max() < 1e-6, name


def test_stage_folders_stand_in_their_order(tmp_path):
    for name in ("10-pose", "2-derain", "1-segmentation", "data", "student", "a-1"):
        (tmp_path / name).mkdir()
    assert [place.name for place in stage_folders(tmp_path)] == ["1-segmentation", "2-derain", "10-pose"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"continual": {"stages": ["invert"]}}, "at least 2"),
        ({"continual": {"stages": ["invert", "depth"]}}, "continual.stages names 'depth'"),
        ({"continual": {"stages": ["invert", ["swap", "invert"]]}}, "names invert twice"),
        ({"continual": {"stages": ["invert", []]}}, "one of them is empty"),
        ({"continual": STAGES | {"distill": 1.0}}, "distill: without replay there are no rows"),
        ({"continual": STAGES | {"weight": 2.0}}, "weight: without replay there are no rows"),
        ({"continual": STAGES | {"kept": 0}}, "kept"),
        ({"distill": {"teacher": "runs/teacher"}}, "continual and distill do not go together"),
        ({"teacher": {}}, "continual and teacher do not go together"),
        ({"balance": {"shares": {"invert": 1, "threshold": 1, "swap": 1}}}, "leave shares out"),
    ],
)
def test_impossible_stages_are_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        recipe_of(tmp_path, "shards", **changes)


def test_a_dry_run_says_which_stage_a_later_one_waits_for(tmp_path, shards, capsys):
    pipeline.dry_run(recipe_of(tmp_path / "run", shards), trains=True)
    shown = "".join(capsys.readouterr())
    assert "2-threshold: rehearsal waits for 1-invert" in shown and "1-invert: rehearsal" in shown
    assert not (tmp_path / "run").exists()


def test_only_names_no_stage(tmp_path, shards):
    with pytest.raises(UserError, match="no teacher section"):
        pipeline.train(recipe_of(tmp_path, shards), "student")
