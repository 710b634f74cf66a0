"""A teacher's kept answers: the same training without the teacher, and nothing of another teacher, plan or data set."""

from pathlib import Path

import numpy as np
import pytest

import lvm_ray.tokenizer
from lvm_ray import estimate
from lvm_ray.data import teacher_cache
from lvm_ray.data.plan import make_plan
from lvm_ray.data.shards import open_shards
from lvm_ray.data.teacher_cache import TeacherCache, unique_sentences
from lvm_ray.errors import UserError
from lvm_ray.progress import Bar
from lvm_ray.recipe_sections import place_of_teacher
from lvm_ray.train import caching, launch, work
from lvm_ray.train.job import resolve
from lvm_ray.train.meter import read_metrics

from .toys import journal, load_toy_tokenizer, make_toy_shards, toy_recipe


@pytest.fixture(autouse=True)
def toy_tokenizer(monkeypatch):
    monkeypatch.setattr(lvm_ray.tokenizer, "load_tokenizer", load_toy_tokenizer)


@pytest.fixture(autouse=True)
def nothing_opened():
    """As in a process of its own."""
    teacher_cache._opened.cache_clear()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, shards):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lvm_ray.tokenizer, "load_tokenizer", load_toy_tokenizer)
        recipe = toy_recipe(
            tmp_path_factory.mktemp("runs") / "teacher", shards=shards, model={"width": 48}, train={"steps": 30, "rate": 1e-2}
        )
        return str(launch.train(recipe, silent()))


def silent():
    return Bar("train", None, "steps")


def student(tmp_path, shards, teacher, name="student", **changes):
    distill = {"teacher": teacher, "temperature": 2.0, "cache": str(tmp_path / "answers")} | changes.pop("distill", {})
    changes["train"] = {"log_every": 1, "rate": 1e-2} | changes.get("train", {})
    return toy_recipe(tmp_path / name, shards=shards, distill=distill, **changes)


def fill(recipe, name="teacher"):
    return caching.cache(resolve(recipe), name, silent())


def refusal(recipe):
    with pytest.raises(UserError) as error:
        launch.train(recipe, silent())
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("image_weight", [0.0, 0.1])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_training_from_answers_is_that_with_the_teacher_which_is_not_asked(
    tmp_path, shards, teacher, monkeypatch, image_weight, divergence
):
    changes = {"train": {"image_weight": image_weight}, "distill": {"divergence": divergence}}
    recipe = student(tmp_path, shards, teacher, **changes)
    asked = changes | {"distill": {"divergence": divergence, "cache": None}}
    online = launch.train(student(tmp_path, shards, teacher, "online", **asked), silent())
    facts = fill(recipe)
    assert (facts.places, facts.width) == (32 // 2 if image_weight == 0 else 31, 48)
    monkeypatch.setattr("lvm_ray.train.job.teacher_module", None)
    cached = launch.train(recipe, silent())
    for one, other in zip(read_metrics(cached), read_metrics(online), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)
        assert one["kd"] == pytest.approx(other["kd"], rel=2e-2)
        assert one["teachers"]["teacher"]["agreement"] == pytest.approx(other["teachers"]["teacher"]["agreement"], abs=0.1)


def test_sparse_answers_teach_nearly_the_same_and_serve_forward_kl_alone(tmp_path, shards, teacher, monkeypatch):
    distill = {"sparse": {"top": 16, "tail": 8}, "temperature": 1.0}
    recipe = student(tmp_path, shards, teacher, distill=distill)
    online = student(tmp_path, shards, teacher, "online", distill={"temperature": 1.0, "cache": None})
    facts = fill(recipe)
    assert facts.state_bytes == 31 * 2 * 50 and facts.width == 50
    lines = [read_metrics(launch.train(one, silent())) for one in (recipe, online)]
    for one, other in zip(*lines, strict=True):
        assert one["ce"] == pytest.approx(other["ce"], rel=0.02)
    again = student(tmp_path / "again", shards, teacher, distill=distill)
    monkeypatch.setattr(caching, "PART_BYTES", 3 * facts.state_bytes)
    fill(again)
    plan = make_plan(open_shards(shards).manifest, recipe)
    states = [TeacherCache(found.distill.cache).read(plan.tasks, plan.columns) for found in (recipe, again)]
    assert np.array_equal(*states), "draws depend on the sentence alone"
    assert "of another form" in refusal(student(tmp_path, shards, teacher, "hidden"))
    with pytest.raises(ValueError, match="serve forward_kl alone"):
        student(tmp_path, shards, teacher, distill=distill | {"divergence": "jsd"})


def test_an_interrupted_student_goes_on_to_the_same_digits(tmp_path, shards, teacher, monkeypatch):
    recipe, cut = (student(tmp_path, shards, teacher, name) for name in ("whole", "cut"))
    fill(recipe)
    launch.train(recipe, silent())
    with monkeypatch.context() as patch:
        patch.setattr(work.loop, "train", stopping_after(patch, 5))
        with pytest.raises(ConnectionError):
            launch.train(cut, silent())
    launch.train(cut, silent())
    assert journal(cut.run) == journal(recipe.run)


def stopping_after(patch, steps):
    """The loop, which loses its stream after so many steps."""
    from lvm_ray.train import loop

    whole = loop.train

    def train(engine, batches, *arguments):
        def ending():
            for _ in range(2 * steps):  # two micro batches each
                yield next(batches)
            raise ConnectionError

        return whole(engine, ending(), *arguments)

    return train


def test_every_sentence_is_asked_once_and_what_is_there_is_not_asked_again(tmp_path, shards, teacher, monkeypatch):
    recipe = student(tmp_path, shards, teacher, balance={"groupings": 1})
    plan = make_plan(open_shards(shards).manifest, recipe)
    asked = counted(monkeypatch)
    fill(recipe)
    sentences = len(unique_sentences(plan))
    assert sum(asked) == len(TeacherCache(recipe.distill.cache)) == sentences < len(plan)
    fill(recipe)
    assert sum(asked) == sentences
    longer = student(tmp_path, shards, teacher, train={"steps": 40}, balance={"groupings": 2})
    assert "has no answer to" in (message := refusal(longer)) and "lvm-ray cache" in message
    fill(longer)
    assert len(TeacherCache(recipe.distill.cache)) == sum(asked) > sentences
    launch.train(longer, silent())


def counted(monkeypatch):
    """How many sentences each part holds that is written from here on."""
    asked, write = [], teacher_cache.write_part

    def write_part(folder, number, rows, states):
        asked.append(len(rows))
        write(folder, number, rows, states)

    monkeypatch.setattr(caching, "write_part", write_part)
    return asked


def test_a_killed_job_goes_on_and_ends_with_the_same_answers(tmp_path, shards, teacher, monkeypatch):
    recipe, whole = student(tmp_path, shards, teacher), student(tmp_path / "whole", shards, teacher)
    facts = fill(whole)
    monkeypatch.setattr(caching, "PART_BYTES", 2 * facts.state_bytes)  # two sentences a part
    asked, write = [], teacher_cache.write_part

    def dying(folder, number, rows, states):
        if len(asked) == 3:
            raise ConnectionError
        asked.append(len(rows))
        write(folder, number, rows, states)

    with monkeypatch.context() as patch:
        patch.setattr(caching, "write_part", dying)
        with pytest.raises(ConnectionError):
            fill(recipe)
    assert len(TeacherCache(recipe.distill.cache)) == 6
    fill(recipe)
    plan = make_plan(open_shards(shards).manifest, recipe)
    one, other = (TeacherCache(found.distill.cache).read(plan.tasks, plan.columns) for found in (recipe, whole))
    assert np.array_equal(one, other)


def test_tasks_that_come_later_are_added_under_their_own_names(tmp_path, shards, teacher):
    few = {"swap": {"copies": 2}, "invert": {"train": 24, "copies": 1}}
    recipe = student(tmp_path, shards, teacher, tasks=few)
    fill(recipe)
    every = student(tmp_path, shards, teacher)  # in another order, with another task
    assert fill(every).tasks == ("swap", "invert", "threshold")
    launch.train(every, silent())
    launch.train(student(tmp_path, shards, teacher, "few", tasks=few), silent())


def test_answers_of_another_teacher_data_set_or_form_are_refused(tmp_path, shards, teacher, tmp_path_factory):
    recipe = student(tmp_path, shards, teacher)
    fill(recipe)
    again = launch.train(
        toy_recipe(tmp_path / "other", shards=shards, model={"width": 48}, train={"steps": 20, "rate": 1e-2}), silent()
    )
    assert "of another teacher" in refusal(student(tmp_path, shards, str(again)))
    others = tmp_path / "shards"
    make_toy_shards(others, seed=1)
    assert "sentences of other shards" in refusal(student(tmp_path, str(others), teacher))
    assert "image_weight is 0 in one" in refusal(student(tmp_path, shards, teacher, train={"image_weight": 0.0}))
    assert "another seed" in refusal(student(tmp_path, shards, teacher, seed=5))
    with pytest.raises(UserError, match="of another teacher"):
        fill(student(tmp_path, shards, str(again)))


def test_a_folder_without_answers_and_a_damaged_part_are_one_line(tmp_path, shards, teacher):
    recipe = student(tmp_path, shards, teacher)
    assert "so no answers of a teacher: run `lvm-ray cache`" in refusal(recipe)
    fill(recipe)
    part = Path(recipe.distill.cache) / "part-00000.arrow"
    part.write_bytes(part.read_bytes()[:100])
    assert str(part) in (message := refusal(recipe)) and "remove it" in message
    Path(recipe.distill.cache, "cache.json").write_text("{}")
    teacher_cache._opened.cache_clear()
    assert "cache.json: not readable" in refusal(recipe)


def test_more_likely_tokens_than_there_are_codes_are_refused(tmp_path, shards, teacher):
    with pytest.raises(UserError, match=r"distill.sparse.top: 64 of 64 codes leave no others"):
        fill(student(tmp_path, shards, teacher, distill={"sparse": {}}))


def test_a_teacher_that_knows_nothing_is_not_kept(tmp_path, shards, teacher, monkeypatch):
    monkeypatch.setattr("lvm_ray.train.rehearsal.A_HAIR", 100.0)
    with pytest.raises(UserError, match="no better than a guess"):
        fill(student(tmp_path, shards, teacher))


def test_a_dry_run_says_what_the_answers_take_at_most(tmp_path, shards, teacher):
    for distill, size in (({}, 31 * 48 * 2), ({"sparse": {"top": 16, "tail": 8}}, 31 * 50 * 2)):
        recipe = student(tmp_path, shards, teacher, distill=distill)
        text = estimate.describe(recipe, {"student": recipe})
        rows = recipe.train.steps * recipe.train.batch
        wanted = f"{estimate.size_text(size)} a sentence, up to {estimate.size_text(size * rows)} for {rows}"
        assert f"answers of teacher: {wanted} in {tmp_path / 'answers'}" in text
        assert fill(student(tmp_path / str(size), shards, teacher, distill=distill)).state_bytes == size


def test_a_second_teacher_has_its_own_answers(tmp_path, shards, teacher):
    also = {"second": {"teacher": teacher, "weight": 0.5, "cache": str(tmp_path / "second")}}
    recipe = student(tmp_path, shards, teacher, distill={"also": also, "cache": None})
    fill(recipe, "second")
    teachers = read_metrics(launch.train(recipe, silent()))[-1]["teachers"]
    assert teachers.keys() == {"teacher", "second"} and place_of_teacher("second") == "distill.also.second.teacher"
    assert teachers["second"]["agreement"] == pytest.approx(teachers["teacher"]["agreement"], abs=0.1)


@pytest.mark.usefixtures("ray_session")
def test_on_ray_the_answers_and_the_training_are_the_same(tmp_path, shards, teacher, monkeypatch):
    here = student(tmp_path / "here", shards, teacher)
    there = student(tmp_path / "there", shards, teacher, compute={"workers": 2})
    facts = fill(here)
    monkeypatch.setattr(caching, "PART_BYTES", 8 * facts.state_bytes)
    fill(there)
    plan = make_plan(open_shards(shards).manifest, here)
    one, other = (TeacherCache(found.distill.cache).read(plan.tasks, plan.columns) for found in (here, there))
    assert np.abs(one.view(np.int16).astype(int) - other.view(np.int16)).max() <= 1  # of bf16's last digit
    journals = [read_metrics(launch.train(recipe, silent())) for recipe in (here, there)]
    for one, other in zip(*journals, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
