"""Checkpoints: whole or absent, the newest and best kept, damaged ones set aside, of this recipe and these data or refused."""

import json
import resource
from dataclasses import replace

import pytest
import torch

import lvm_ray.tokenizer
from lvm_ray.errors import UserError
from lvm_ray.progress import Bar
from lvm_ray.train import checkpoint, launch
from lvm_ray.train.checkpoint import State

from .toys import crash_after, journal, load_toy_tokenizer, make_toy_shards, toy_recipe

PARAMETERS = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.tensor([1e-30, -0.0])}
MOMENTS = {"exp_avg/a.weight": torch.ones(2, 3), "exp_avg_sq/a.weight": torch.zeros(2, 3)}


def state(step=4):
    return State(step, 8 * step, 256 * step, 1.25, "recipe", "plan", "fp32")


def save(run, step, keep=2, score=None, best=0):
    return checkpoint.save(run, replace(state(step), score=score), PARAMETERS, MOMENTS, keep, best)


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_is_saved_is_loaded_to_the_bit(tmp_path):
    folder = save(tmp_path, 4)
    assert folder == tmp_path / "checkpoints" / "step-000004" == checkpoint.latest(tmp_path)
    assert checkpoint.read_state(folder) == state(4)
    parameters, moments = checkpoint.load(folder)
    for found, wanted in ((parameters, PARAMETERS), (moments, MOMENTS)):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_newest_are_kept_by_number_not_by_name(tmp_path):
    for step in (999_999, 1_000_000, 1_000_001):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-1000000", "step-1000001"]
    assert checkpoint.latest(tmp_path).name == "step-1000001"


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert checkpoint.latest(tmp_path) is None


def test_an_interrupted_save_leaves_the_one_before(tmp_path, monkeypatch):
    save(tmp_path, 4)

    def crash(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", crash)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 8)
    assert names(tmp_path) == ["step-000004"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 4)
    save(tmp_path, 4)
    assert names(tmp_path) == ["step-000004"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_a_damaged_checkpoint_is_named(tmp_path, file):
    folder = save(tmp_path, 4)
    (folder / file).write_bytes((folder / file).read_bytes()[:20])
    with pytest.raises(UserError, match=file):
        checkpoint.load(folder)


@pytest.mark.parametrize("text", ["{", '{"step": 1, "unknown": 2}'])
def test_a_damaged_state_is_named(tmp_path, text):
    folder = save(tmp_path, 4)
    (folder / "state.json").write_text(text)
    with pytest.raises(UserError, match=r"state\.json"):
        checkpoint.read_state(folder)


def test_another_recipes_or_data_sets_checkpoint_is_refused_by_name(tmp_path):
    folder = save(tmp_path, 4)
    checkpoint.require_same(folder, state(), "recipe", "plan")
    with pytest.raises(UserError, match=r"step-000004: written by another recipe \(fingerprint recipe, this one is other\)"):
        checkpoint.require_same(folder, state(), "other", "plan")
    with pytest.raises(UserError, match="another data set or balance"):
        checkpoint.require_same(folder, state(), "recipe", "other")


SCORES = {4: None, 8: 0.5, 12: 0.3, 16: 0.3, 20: float("nan"), 24: 0.9}


@pytest.mark.parametrize(
    ("newest", "best", "steps"),
    [(1, 0, {24}), (2, 0, {20, 24}), (1, 1, {12, 24}), (1, 3, {8, 12, 16, 24}), (9, 1, set(SCORES)), (1, 9, {8, 12, 16, 24})],
)
def test_the_newest_and_those_of_lowest_score_are_kept(newest, best, steps):
    assert checkpoint.kept(SCORES, newest, best) == steps


def test_the_best_stays_when_newer_ones_come(tmp_path):
    for step, score in ((4, 0.9), (8, 0.2), (12, 0.4), (16, None)):
        folder = save(tmp_path, step, keep=1, score=score, best=1)
        assert checkpoint.read_state(folder).score == score
    assert names(tmp_path) == ["step-000008", "step-000016"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "model.safetensors: missing": lambda folder: (folder / "model.safetensors").unlink(),
    "optimizer.safetensors: missing": lambda folder: (folder / "optimizer.safetensors").unlink(),
    "state.json: not a checkpoint's state (missing)": lambda folder: (folder / "state.json").unlink(),
    "optimizer.safetensors: ": lambda folder: cut(folder / "optimizer.safetensors"),
    "model.safetensors: its content is not what was saved": lambda folder: flip(folder / "model.safetensors"),
    "state.json: not a checkpoint's state (Expecting": lambda folder: cut(folder / "state.json"),
    "state.json: not a checkpoint's state (JSON of another form)": lambda folder: (folder / "state.json").write_text("[]"),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_one_is_set_aside_and_the_one_before_is_the_newest(tmp_path, reason):
    save(tmp_path, 4)
    folder = save(tmp_path, 8)
    assert checkpoint.set_aside_damaged(tmp_path) == []
    DAMAGES[reason](folder)
    [line] = checkpoint.set_aside_damaged(tmp_path)
    assert line.startswith(f"{folder}: damaged ({reason}") and line.endswith("): set aside as damaged-step-000008")
    assert names(tmp_path) == ["damaged-step-000008", "step-000004"]
    save(tmp_path, 8)
    cut(folder / "model.safetensors")
    assert checkpoint.set_aside_damaged(tmp_path)[0].endswith("set aside as damaged-step-000008-2")


def test_checkpoints_of_older_versions_without_checksums_are_taken(tmp_path):
    folder = save(tmp_path, 4)
    content = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({key: content[key] for key in content if key not in ("files", "score")}))
    assert checkpoint.set_aside_damaged(tmp_path) == [] and checkpoint.read_state(folder) == state(4)


def test_leftovers_of_killed_saves_are_removed(tmp_path):
    save(tmp_path, 4)
    (tmp_path / "checkpoints" / ".step-000008.123").mkdir()
    checkpoint.set_aside_damaged(tmp_path)
    assert names(tmp_path) == ["step-000004"]


@pytest.mark.parametrize("room", [100, 600])
def test_a_full_disk_is_said_in_one_line_and_leaves_the_one_before(tmp_path, room):
    """Files may grow to so many bytes and no further: of the first, or of the second file of tensors."""
    before = save(tmp_path, 4)
    content = {path.name: path.read_bytes() for path in before.iterdir()}
    assert len(content["model.safetensors"]) < 600
    moments = {name: tensor.expand(100, 2, 3).contiguous() for name, tensor in MOMENTS.items()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(
            UserError, match=r"step-000008: cannot save the checkpoint \(.*: free space on that disk and run"
        ) as full:
            checkpoint.save(tmp_path, state(8), PARAMETERS, moments, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in str(full.value) and "\n" not in str(full.value)
    assert names(tmp_path) == ["step-000004"]
    assert {path.name: path.read_bytes() for path in before.iterdir()} == content


# Whole runs


@pytest.fixture
def recipe_in(tmp_path, monkeypatch):
    monkeypatch.setattr(lvm_ray.tokenizer, "load_tokenizer", load_toy_tokenizer)
    make_toy_shards(tmp_path / "shards")
    train = {"steps": 6, "log_every": 1, "checkpoint_every": 2, "keep_checkpoints": 3}
    return lambda name: toy_recipe(tmp_path / name, shards=str(tmp_path / "shards"), train=train)


def test_a_run_goes_on_from_the_newest_whole_checkpoint_as_if_nothing_had_been(recipe_in, monkeypatch, capsys):
    undisturbed = launch.train(recipe_in("whole"), Bar("train", None, "steps"))
    assert "starts from fresh weights (rule 6 of resuming)" in capsys.readouterr().out
    recipe = recipe_in("run")
    with monkeypatch.context() as patch:
        crash_after(patch, 2 * 5 + 1)  # in step 6, after the checkpoints at 2 and 4
        with pytest.raises(ConnectionError):
            launch.train(recipe, Bar("train", None, "steps"))
    run = launch.Path(recipe.run)
    flip(run / "checkpoints/step-000004/model.safetensors")
    capsys.readouterr()
    launch.train(recipe, Bar("train", None, "steps"))
    said = capsys.readouterr().out
    assert "step-000004: damaged (model.safetensors: its content is not what was saved" in said
    assert "goes on from its newest whole checkpoint, of step 2 (rule 2 of resuming)" in said
    assert journal(run) == journal(undisturbed)
    for name in ("model/model.safetensors", "checkpoints/step-000006/optimizer.safetensors"):
        assert (run / name).read_bytes() == (undisturbed / name).read_bytes()
    launch.train(recipe, Bar("train", None, "steps"))
    assert "its finished model: nothing is left to do (rule 1 of resuming)" in capsys.readouterr().out


def test_a_run_whose_checkpoints_are_all_damaged_does_not_silently_start_over(recipe_in):
    recipe = recipe_in("run")
    run = launch.train(recipe, Bar("train", None, "steps"))
    for folder in (run / "checkpoints").iterdir():
        cut(folder / "state.json")
    for _ in range(2):  # the second time, they were set aside before
        with pytest.raises(UserError, match=r"no checkpoint is whole: .*damaged-step-00000[26]"):
            launch.train(recipe, Bar("train", None, "steps"))
    assert names(run) == [f"damaged-step-00000{step}" for step in (2, 4, 6)]
