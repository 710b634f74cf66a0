"""Checkpoints: whole or absent, the newest kept, of this recipe and these data or refused."""

import pytest
import torch

from lvm_ray.errors import UserError
from lvm_ray.train import checkpoint
from lvm_ray.train.checkpoint import State

PARAMETERS = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.tensor([1e-30, -0.0])}
MOMENTS = {"exp_avg/a.weight": torch.ones(2, 3), "exp_avg_sq/a.weight": torch.zeros(2, 3)}


def state(step=4):
    return State(step, 8 * step, 256 * step, 1.25, "recipe", "plan", "fp32")


def save(run, step, keep=2):
    return checkpoint.save(run, state(step), PARAMETERS, MOMENTS, keep)


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
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-1000000", "step-1000001"]
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
    assert checkpoint.latest(tmp_path).name == "step-000004"


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 4)
    save(tmp_path, 4)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000004"]


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
