"""Validation: fixed held-out sentences, the same for every recipe, scored without moving the training by a bit."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lvm_ray.tokenizer
from lvm_ray.data.shards import open_shards
from lvm_ray.model.folder import load_model
from lvm_ray.train import checkpoint, launch
from lvm_ray.train.meter import read_metrics
from lvm_ray.train.validation import read_validation, shared_out

from .test_train import Silent, journal
from .toys import IMAGE_TOKENS, load_toy_tokenizer, make_toy_shards, toy_recipe

TASKS = {"invert": (24, 1), "threshold": (8, 3), "swap": (8, 2)}
KEYS = ("validation_loss", "validation")


@pytest.fixture(autouse=True)
def toy_tokenizer(monkeypatch):
    monkeypatch.setattr(lvm_ray.tokenizer, "load_tokenizer", load_toy_tokenizer)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shards"
    make_toy_shards(folder, held_out=10)
    return str(folder)


def train(folder, shards, **changes):
    return launch.train(toy_recipe(folder, shards=shards, **changes), Silent())


# Which sentences


def test_sentences_are_held_out_pairs_and_no_more_than_wanted_or_there(tmp_path, shards):
    held_out = open_shards(shards)
    for wanted, count in ((1, 1), (2, 2), (32, 3)):  # ten pairs fill three sentences of four
        found = read_validation(toy_recipe(tmp_path, shards=shards, train={"validation": wanted}))
        assert found["task"].tolist() == [0] * count + [1] * count + [2] * count
        for number, task in enumerate(TASKS):
            rows = {row.tobytes() for row in held_out.tokens("validation", task, 0)}
            for tokens_T in found["tokens"][found["task"] == number]:
                pairs = {pair.tobytes() for pair in tokens_T.reshape(4, -1)}
                assert len(pairs) == 4 and pairs <= rows


def test_sentences_are_the_same_for_every_recipe_of_the_data(tmp_path, shards):
    changes = {"seed": 9, "train": {"batch": 4, "validation": 3}, "balance": {"strategy": "repeat"}}
    first, second = (read_validation(toy_recipe(tmp_path, shards=shards, **more)) for more in ({}, changes))
    assert np.array_equal(first["tokens"], second["tokens"])


def test_a_task_without_enough_pairs_has_none(tmp_path):
    make_toy_shards(tmp_path / "shards", held_out=3)
    found = read_validation(toy_recipe(tmp_path, shards=str(tmp_path / "shards")))
    assert found["tokens"].shape == (0, 32)
    run = train(tmp_path / "run", str(tmp_path / "shards"))
    assert not any(key in line for line in read_metrics(run) for key in KEYS)
    assert checkpoint.read_state(checkpoint.latest(run)).score is None


def test_pictures_without_labels_are_scored_whole(tmp_path):
    make_toy_shards(tmp_path / "shards", {"invert": (24, 1), "plain": (40, 1)}, pictures={"plain": 1}, held_out=8)
    tasks = {"invert": {"train": 24, "copies": 1}, "plain": {"train": 40, "copies": 1}}
    run = train(tmp_path / "run", str(tmp_path / "shards"), tasks=tasks)
    assert read_metrics(run)[-1]["validation_loss"] == pytest.approx(plain_losses(run, tmp_path / "shards", tasks), rel=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 7, 16, 17])
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("most", [1, 4])
def test_every_sentence_is_counted_once_and_every_worker_makes_as_many_calls(rows, workers, most):
    places_KWB = shared_out(rows, workers, most)
    assert places_KWB.shape[1] == workers and 1 <= places_KWB.shape[2] <= most
    assert sorted(place for place in places_KWB.ravel() if place < rows) == list(range(rows))
    assert len(places_KWB) == math.ceil(rows / (workers * places_KWB.shape[2]))


# What they score


def plain_losses(run, shards, tasks=TASKS):
    """The same by transformers alone, in float64, over the exported model."""
    model, _ = load_model(run / "model", torch.float64)
    found = read_validation(toy_recipe(run, shards=str(shards), tasks={task: {} for task in tasks}))
    losses = {}
    for number, task in enumerate(tasks):
        tokens_RT = torch.from_numpy(found["tokens"][found["task"] == number].astype(np.int64))
        if not len(tokens_RT):
            continue
        with torch.no_grad():
            logits_RTV = model(tokens_RT).logits
        loss_RT = F.cross_entropy(logits_RTV[:, :-1].transpose(1, 2), tokens_RT[:, 1:], reduction="none")
        label_T = torch.arange(1, tokens_RT.shape[1]) // IMAGE_TOKENS % 2 == 1
        losses[task] = (loss_RT if task == "plain" else loss_RT[:, label_T]).mean().item()
    return losses


def test_it_is_the_loss_of_label_tokens_and_stands_beside_the_checkpoint(tmp_path, shards):
    run = train(tmp_path / "run", shards, train={"log_every": 3})
    metrics = read_metrics(run)
    assert [line["step"] for line in metrics] == [3, 4, 6, 8]
    assert ["validation" in line for line in metrics] == [False, True, False, True]
    last = metrics[-1]
    assert last["validation_loss"] == pytest.approx(plain_losses(run, shards), rel=1e-5)
    assert last["validation"] == pytest.approx(sum(last["validation_loss"].values()) / 3, abs=1e-6)
    assert checkpoint.read_state(checkpoint.latest(run)).score == last["validation"]


@pytest.mark.parametrize(
    ("zero", "optimizer", "precision"), [(0, "adamw", "fp32"), (1, "muon", "bf16"), (2, "adamw", "fp32"), (3, "muon", "fp32")]
)
def test_training_is_the_same_to_the_bit_with_and_without_it(tmp_path, shards, zero, optimizer, precision):
    changes = {"train": {"zero": zero, "optimizer": optimizer, "log_every": 1, "checkpoint_every": 2, "steps": 5}}
    compute = {"precision": precision}
    without = changes | {"train": changes["train"] | {"validation": 0}}
    runs = [train(tmp_path / "with", shards, compute=compute, **changes)]
    runs.append(train(tmp_path / "without", shards, compute=compute, **without))
    first, second = (journal(run) for run in runs)
    assert all("validation" in line for line in first[1::2])
    assert [{key: value for key, value in line.items() if key not in KEYS} for line in first] == second
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert len({(run / "checkpoints/step-000005" / name).read_bytes() for run in runs}) == 1


def test_a_teacher_is_not_asked_for_it(tmp_path, shards):
    teacher = train(tmp_path / "teacher", shards)
    distill = {"distill": {"teacher": str(teacher)}, "train": {"log_every": 1}}
    run = train(tmp_path / "with", shards, **distill)
    other = train(tmp_path / "without", shards, distill=distill["distill"], train={"log_every": 1, "validation": 0})
    assert [line["kd"] for line in read_metrics(run)] == [line["kd"] for line in read_metrics(other)]
    assert read_metrics(run)[-1]["validation_loss"] == pytest.approx(plain_losses(run, shards), rel=1e-5)
