"""Prediction on toys: the answer to the prompt that it says it asks, one's own examples, and errors that name the file."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lvm_ray import config
from lvm_ray.data.shards import open_shards
from lvm_ray.errors import UserError
from lvm_ray.evaluate import predict as module
from lvm_ray.evaluate.prompts import Likeness, choose_examples
from lvm_ray.model.folder import load_model
from lvm_ray.model.generate import generate
from lvm_ray.tasks.pose import Pose
from tests.test_evaluate import N, make_pipeline
from tests.toys import SIZE, Swap, ToyTokenizer, load_toy_tokenizer

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def picture(path, *colours, side=SIZE):
    """Four squares of these colours in raster order, as a PNG file."""
    Path(path).parent.mkdir(exist_ok=True)
    Image.fromarray(picture_of(*colours, side=side)).save(path)
    return str(path)


def picture_of(*colours, side=SIZE):
    return np.array(colours, np.uint8).reshape(2, 2, 3).repeat(side // 2, axis=0).repeat(side // 2, axis=1)


def codes(*colours):
    return [(r // 85) * 16 + (g // 85) * 4 + b // 85 for r, g, b in colours]


def predict(run, images, out, **options):
    return module.predict(str(run), images, str(out), load=load_toy_tokenizer, **options)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    recipe, runs = make_pipeline(folder)
    return folder, recipe, runs


def expected(run, prompt):
    """The answer picture that the model of a run gives to a prompt's tokens."""
    model, _ = load_model(f"{run}/model")
    return ToyTokenizer().decode(generate(model, np.array([prompt]), N))[0]


def test_training_pairs_stand_before_the_picture(pipeline, tmp_path):
    _, recipe, runs = pipeline
    query = picture(tmp_path / "mine.png", RED, GREEN, BLUE, WHITE)
    paths = predict(runs[1], [query], tmp_path / "out", task="invert")
    # The label read back is saved by the toy under the same name, at the picture's own size.
    assert set(paths) == {str(tmp_path / "out/mine-invert.png")}
    shards = open_shards(recipe.shard_folder)
    chosen = choose_examples(0, "invert", "mine", "", shards.originals("train", "invert"), 3)
    examples = shards.pairs("train", "invert", 0)[1][chosen].reshape(-1)
    answer = expected(runs[1], [*examples.tolist(), *codes(RED, GREEN, BLUE, WHITE)])
    assert (np.asarray(Image.open(paths[0])) == answer).all()


def test_the_nearest_pairs_are_shown_where_the_run_is_asked_so(pipeline, tmp_path):
    folder, recipe, runs = pipeline
    run = tmp_path / "student"
    shutil.copytree(runs[1], run)
    nearest = recipe.evaluate.model_copy(update={"choose": "nearest", "examples": 2})
    asked = recipe.model_copy(update={"evaluate": nearest, "shards": f"{folder}/data/shards"})
    (run / "config.yaml").write_text(config.dump(asked))
    paths = predict(str(run), [picture(tmp_path / "mine.png", RED, GREEN, BLUE, WHITE)], tmp_path / "out", task="invert")
    shards, query = open_shards(recipe.shard_folder), codes(RED, GREEN, BLUE, WHITE)
    _, tokens = shards.pairs("train", "invert", 0)
    likeness = Likeness(tokens[:, :N], shards.originals("train", "invert"), ToyTokenizer().codebook.numpy(), 0, "invert")
    [chosen] = likeness.choose(np.array(query, np.uint16), "", 2, 1)
    answer = expected(run, [*tokens[chosen].reshape(-1).tolist(), *query])
    assert (np.asarray(Image.open(paths[0])) == answer).all()


def test_a_picture_is_asked_about_as_the_task_asks(pipeline, tmp_path, monkeypatch):
    _, _, runs = pipeline
    query = picture(tmp_path / "mine.png", RED, GREEN, BLUE, WHITE)
    plain = predict(runs[1], [picture(tmp_path / "same/mine.png", WHITE, RED, GREEN, BLUE)], tmp_path / "plain", task="swap")
    monkeypatch.setattr(Swap, "query", lambda task, seen: picture_of(WHITE, RED, GREEN, BLUE))
    asked = predict(runs[1], [query], tmp_path / "asked", task="swap")
    assert Path(asked[0]).read_bytes() == Path(plain[0]).read_bytes()


def test_without_a_task_every_task_answers_and_a_pipeline_stands_for_its_student(pipeline, tmp_path):
    folder, _, runs = pipeline
    query = picture(tmp_path / "mine.png", RED, GREEN, BLUE, WHITE)
    paths = predict(folder, [query], tmp_path / "out")
    assert {path.rpartition("/")[2] for path in paths} == {"mine-invert.png", "mine-swap.png"}
    student = predict(runs[1], [query], tmp_path / "student")
    assert [Path(path).read_bytes() for path in paths] == [Path(path).read_bytes() for path in student]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_ones_own_pairs_are_shown_as_they_are(pipeline, tmp_path, count):
    _, _, runs = pipeline
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    shown = []
    for k in range(count):
        image, label = (RED, BLUE, WHITE, GREEN)[k:] + (RED, BLUE, WHITE, GREEN)[:k], (GREEN,) * (k + 1) + (RED,) * (3 - k)
        picture(pairs / f"{k}.png", *image)
        picture(pairs / f"{k}_label.png", *label)
        shown += codes(*image) + codes(*label)
    query = picture(tmp_path / "mine.png", WHITE, WHITE, RED, BLUE)
    paths = predict(runs[0], [query], tmp_path / "out", examples=str(pairs))
    assert paths == [str(tmp_path / "out/mine-answer.png")]
    answer = expected(runs[0], [*shown[: 3 * 2 * N], *codes(WHITE, WHITE, RED, BLUE)])  # three pairs at most
    assert (np.asarray(Image.open(paths[0])) == answer).all()


def test_a_moved_pipeline_still_finds_its_shards(pipeline, tmp_path):
    folder, _, _ = pipeline
    query = picture(tmp_path / "mine.png", RED, GREEN, BLUE, WHITE)
    before = predict(folder, [query], tmp_path / "before", task="swap")
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    config = moved / "student/config.yaml"
    config.write_text(config.read_text().replace(str(folder), "/nowhere"))
    after = predict(moved, [query], tmp_path / "after", task="swap")
    assert Path(before[0]).read_bytes() == Path(after[0]).read_bytes()


def test_a_person_is_sought_in_the_whole_picture():
    """A pose crop needs a labelled person; somebody's photo has none."""
    sample = module.Sample(np.zeros((60, 100, 3), np.uint8), None)
    (view,) = Pose(crop=1.25).questions(sample, 64)
    assert view.box == (0.0, -20.0, 100.0, 80.0)


def test_tiles_become_one_picture():
    tiles = [np.full((4, 4, 3), value, np.uint8) for value in (10, 20)]
    views = [module.View((0.0, 0.0, 4.0, 4.0)), module.View((2.0, -1.0, 6.0, 3.0))]
    mosaic = module._mosaic(tiles, views, np.zeros((4, 6, 3), np.uint8))
    assert mosaic.shape == (4, 6, 3)
    assert mosaic[:, :, 0].tolist() == [[10, 10, 20, 20, 20, 20]] * 3 + [[10, 10, 10, 10, 0, 0]]


def test_unlabelled_tasks_have_no_answers(tmp_path):
    _, runs = make_pipeline(tmp_path / "run", tasks={"plain": {"train": 16}, "invert": {}})
    query = picture(tmp_path / "mine.png", RED, GREEN, BLUE, WHITE)
    assert set(predict(runs[0], [query], tmp_path / "out")) == {str(tmp_path / "out/mine-invert.png")}
    with pytest.raises(UserError, match="--task plain: this run has the tasks invert"):
        predict(runs[0], [query], tmp_path / "out", task="plain")


def test_errors_name_the_file(pipeline, tmp_path):
    folder, _, _ = pipeline
    query = picture(tmp_path / "mine.png", RED, GREEN, BLUE, WHITE)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    (tmp_path / "other").mkdir()
    twin = picture(tmp_path / "other/mine.png", RED, RED, RED, RED)
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    picture(pairs / "a_label.png", RED, RED, RED, RED)
    (tmp_path / "empty").mkdir()
    for message, images, options in (
        (r"broken\.png: cannot be read", [str(broken)], {}),
        (r"missing\.png: cannot be read", [str(tmp_path / "missing.png")], {}),
        (r"other/mine\.png: another picture is called mine", [query, twin], {}),
        ("--task sharpen: this run has the tasks invert, swap", [query], {"task": "sharpen"}),
        ("--examples .*nowhere: no such folder", [query], {"examples": str(tmp_path / "nowhere")}),
        (r"--examples .*pairs: a_label\.png has no a\.png beside it", [query], {"examples": str(pairs)}),
        ("--examples .*empty: no pairs here", [query], {"examples": str(tmp_path / "empty")}),
    ):
        with pytest.raises(UserError, match=message):
            predict(folder, images, tmp_path / "out", **options)
    with pytest.raises(UserError, match="no trained run here"):
        predict(tmp_path, [query], tmp_path / "out")
    assert not (tmp_path / "out").exists()
