"""Runs at URIs: sent at each checkpoint, whole after a kill at any time, gone on with on another machine to the bit."""

import json
import shutil
from pathlib import Path

import pytest

import lvm_ray.tokenizer
from lvm_ray import config, mirror, pipeline, working_copy
from lvm_ray.errors import UserError
from lvm_ray.train import checkpoint, rehearsal, work

from .test_checkpoint import flip
from .toys import crash_after, journal, load_toy_tokenizer, make_toy_shards, toy_recipe


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    monkeypatch.setattr(lvm_ray.tokenizer, "load_tokenizer", load_toy_tokenizer)
    monkeypatch.setattr(working_copy, "PAUSES", (0.01, 0.01))
    monkeypatch.setenv("LVM_RAY_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(rehearsal, "check_teacher_loss", lambda *arguments: None)  # a few steps teach a teacher nothing
    make_toy_shards(tmp_path / "shards")


def another_machine(tmp_path, monkeypatch, name="home-2"):
    monkeypatch.setenv("LVM_RAY_HOME", str(tmp_path / name))


def recipe_at(tmp_path, run, **changes):
    train = {"steps": 6, "log_every": 1, "checkpoint_every": 2, "keep_checkpoints": 2, "keep_best": 0}
    return toy_recipe(run, shards=str(tmp_path / "shards"), **({"train": train} | changes))


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def steps(folder):
    return sorted(path.parent.name for path in Path(folder).glob("checkpoints/step-*/state.json"))


def home(run):
    with working_copy.working_copy(run) as folder:
        return Path(folder)


def crashed(monkeypatch, recipe, micro_batches):
    with monkeypatch.context() as patch:
        crash_after(patch, micro_batches)
        with pytest.raises(ConnectionError):
            pipeline.train(recipe)


def test_a_run_at_a_uri_ends_as_the_same_files_there(tmp_path, capsys):
    plain = recipe_at(tmp_path, tmp_path / "plain")
    pipeline.train(plain)
    recipe = recipe_at(tmp_path, f"file://{tmp_path}/there")
    [folder] = pipeline.train(recipe)
    assert folder.startswith(f"{tmp_path}/home/runs/there-")
    assert capsys.readouterr().out.count("worked on in") == 1
    there = files(tmp_path / "there")
    assert there == {name: content for name, content in files(folder).items() if name != mirror.MARK}
    assert there.keys() == files(plain.run).keys()
    assert there["model/model.safetensors"] == files(plain.run)["model/model.safetensors"]
    written = config.load(str(tmp_path / "there" / "config.yaml"))
    assert written.run == recipe.run and str(tmp_path / "home") not in there["config.yaml"].decode()


def test_checkpoints_are_sent_while_the_run_trains_and_those_removed_here_are_removed_there(tmp_path, monkeypatch):
    recipe = recipe_at(
        tmp_path, f"file://{tmp_path}/there", train={"steps": 8, "checkpoint_every": 2, "log_every": 1, "keep_best": 0}
    )
    crashed(monkeypatch, recipe, 2 * 7)
    assert steps(tmp_path / "there") == ["step-000004", "step-000006"]
    assert not (tmp_path / "there/checkpoints/step-000002").exists()
    assert not (tmp_path / "there/model").exists()


@pytest.mark.parametrize("pipelined", [False, True])
def test_another_machine_goes_on_to_the_bit(tmp_path, monkeypatch, capsys, pipelined):
    teacher = {"teacher": {"model": {"width": 48}}, "distill": {"temperature": 2.0}} if pipelined else {}
    plain = recipe_at(tmp_path, tmp_path / "plain", **teacher)
    pipeline.train(plain)
    recipe = recipe_at(tmp_path, f"file://{tmp_path}/there?x=1", **teacher)
    crashed(monkeypatch, recipe, 2 * 5 + 1)
    another_machine(tmp_path, monkeypatch)
    capsys.readouterr()
    pipeline.train(recipe)
    assert "goes on from step 4, of the copy at file:///" in capsys.readouterr().out
    for run in ("teacher", "student") if pipelined else (".",):
        assert journal(tmp_path / "there" / run) == journal(tmp_path / "plain" / run)
        for name in ("model/model.safetensors", "checkpoints/step-000006/optimizer.safetensors"):
            assert (tmp_path / "there" / run / name).read_bytes() == (tmp_path / "plain" / run / name).read_bytes()


def test_the_first_machine_takes_up_what_the_second_has_done_and_a_third_finds_it_finished(tmp_path, monkeypatch, capsys):
    recipe = recipe_at(tmp_path, f"file://{tmp_path}/there")
    crashed(monkeypatch, recipe, 2 * 3)  # checkpoint 2
    another_machine(tmp_path, monkeypatch)
    crashed(monkeypatch, recipe, 2 * 3)  # from 2 on: checkpoint 4
    another_machine(tmp_path, monkeypatch, "home")
    capsys.readouterr()
    pipeline.train(recipe)
    assert "goes on from step 4, of the copy at" in capsys.readouterr().out
    another_machine(tmp_path, monkeypatch, "home-3")
    monkeypatch.setattr(work, "work", lambda *arguments: pytest.fail("trained again"))
    [folder] = pipeline.train(recipe)
    assert "(rule 1 of resuming)" in capsys.readouterr().out
    assert not (Path(folder) / "checkpoints").exists(), "a finished run's checkpoints are not fetched"
    assert steps(tmp_path / "there") == ["step-000004", "step-000006"]


def test_what_is_damaged_here_comes_whole_from_there(tmp_path, monkeypatch, capsys):
    recipe = recipe_at(tmp_path, f"file://{tmp_path}/there")
    crashed(monkeypatch, recipe, 2 * 5)
    flip(home(recipe.run) / "checkpoints/step-000004/model.safetensors")
    pipeline.train(recipe)
    said = capsys.readouterr().out
    assert "step-000004: damaged (model.safetensors" in said and "goes on from step 4, of the copy at" in said


def test_what_is_damaged_there_is_left_there_and_the_one_before_is_taken(tmp_path, monkeypatch, capsys):
    recipe = recipe_at(tmp_path, f"file://{tmp_path}/there")
    crashed(monkeypatch, recipe, 2 * 5)
    flip(tmp_path / "there/checkpoints/step-000004/optimizer.safetensors")
    another_machine(tmp_path, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(work, "work", lambda *arguments: pytest.fail("trained from nothing"))
        shutil.move(tmp_path / "there/checkpoints/step-000002", tmp_path / "kept")
        with pytest.raises(UserError, match=r"no checkpoint is whole: .*step-000004: damaged .*: left there"):
            pipeline.train(recipe)
    shutil.move(tmp_path / "kept", tmp_path / "there/checkpoints/step-000002")
    pipeline.train(recipe)
    said = capsys.readouterr().out
    assert "step-000004: damaged (optimizer.safetensors" in said and "goes on from step 2, of the copy at" in said
    assert steps(tmp_path / "there") == ["step-000004", "step-000006"]


def test_another_recipes_checkpoint_there_is_refused_before_it_is_fetched(tmp_path, monkeypatch):
    recipe = recipe_at(tmp_path, f"file://{tmp_path}/there")
    pipeline.train(recipe)
    another_machine(tmp_path, monkeypatch)
    other = recipe_at(tmp_path, recipe.run, train={"steps": 7})
    with pytest.raises(UserError, match="there/checkpoints/step-000006: written by another recipe"):
        pipeline.train(other)
    assert not list((tmp_path / "home-2").rglob("step-*"))


def copy_with_checkpoints(tmp_path, *wanted):
    """A copy with checkpoints of these steps here, and its URI."""
    copy = mirror.Copy(tmp_path / "here", f"file://{tmp_path}/there")
    mirror.make_copy(copy)
    add_checkpoints(copy, *wanted)
    return copy


def add_checkpoints(copy, *wanted):
    from .test_checkpoint import save

    for step in wanted:
        save(copy.folder, step, keep=1)


def everything(path):
    return True


class Watched:
    """A file system that looks before and after each removal."""

    def __init__(self, filesystem, look):
        self._filesystem, self._look = filesystem, look

    def __getattr__(self, name):
        return getattr(self._filesystem, name)

    def delete_file(self, path):
        self._look()
        self._filesystem.delete_file(path)
        self._look()


def watched(copy, monkeypatch):
    """Send, and look: the files here and there before and after each removal, in the middle and at the end of each file."""
    moments = []

    def look():
        moments.append((files(copy.folder), files(copy.uri.removeprefix("file://"))))

    def slowly(source, stream, size):
        content = source.read()
        stream.write(content[: len(content) // 2])
        look()
        stream.write(content[len(content) // 2 :])
        look()

    opened = mirror.open_folder
    with monkeypatch.context() as patch:
        patch.setattr(mirror, "AT_ONCE", 1)
        patch.setattr(mirror.shutil, "copyfileobj", slowly)
        patch.setattr(mirror, "open_folder", lambda uri: (Watched(opened(uri)[0], look), opened(uri)[1]))
        mirror.send(copy, everything)
    look()
    return moments


def test_a_kill_at_any_time_of_an_upload_leaves_the_old_or_the_whole_new_checkpoint(tmp_path, monkeypatch):
    copy = copy_with_checkpoints(tmp_path, 4)
    mirror.send(copy, everything)
    add_checkpoints(copy, 8)
    (copy.folder / "metrics.jsonl").write_text("a line")
    moments = watched(copy, monkeypatch)
    seen = []
    for moment in moments:  # each is what a kill would leave
        for name, content in zip(("here", "there"), moment, strict=True):
            restore(tmp_path / name, content)
        seen.append(tuple(steps(tmp_path / "there")))
        for name in seen[-1]:
            assert checkpoint.damage(tmp_path / "there/checkpoints" / name) is None
        mirror.send(copy, everything)
        here = files(tmp_path / "here")
        assert files(tmp_path / "there") == {name: content for name, content in here.items() if name != mirror.MARK}
    assert list(dict.fromkeys(seen)) == [("step-000004",), ("step-000004", "step-000008"), ("step-000008",)]
    assert len(moments) == 2 * 4 + 2 * 3 + 1


def test_a_checkpoint_that_was_sent_and_not_recorded_stays_there(tmp_path, monkeypatch):
    copy = copy_with_checkpoints(tmp_path, 4)
    record = (copy.folder / mirror.MARK).read_bytes()
    mirror.send(copy, everything)
    (copy.folder / mirror.MARK).write_bytes(record)
    assert len(watched(copy, monkeypatch)) == 1, "nothing is removed or sent"
    add_checkpoints(copy, 8)
    mirror.send(copy, everything)
    assert steps(tmp_path / "there") == ["step-000008"]


def restore(folder, content):
    shutil.rmtree(folder)
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)


def test_what_cannot_be_sent_stops_no_training_and_is_said_at_the_end(tmp_path, capsys):
    (tmp_path / "there").write_text("a file in the place of the folder")
    recipe = recipe_at(tmp_path, f"file://{tmp_path}/there/run", teacher={}, distill={})
    with pytest.raises(UserError, match=r"run: not there yet: .* and \d+ more .*Not a directory.*all is safe in ") as refused:
        pipeline.train(recipe)
    assert "\n" not in str(refused.value)
    assert "warning: file:///" in capsys.readouterr().out
    folder = working_copy._place(recipe.run)
    assert steps(folder / "student") == ["step-000004", "step-000006"], "the student was trained all the same"
    (tmp_path / "there").unlink()
    pipeline.train(recipe)
    assert steps(tmp_path / "there/run/student") == ["step-000004", "step-000006"]
    assert (tmp_path / "there/run/student/model").is_dir()


def test_an_old_checkpoint_stays_there_where_the_next_one_vanishes_on_its_way(tmp_path, monkeypatch):
    copy = copy_with_checkpoints(tmp_path, 4)
    mirror.send(copy, everything)
    add_checkpoints(copy, 8)
    upload = mirror._upload

    def late(copy, path):
        add_checkpoints(copy, 12)  # and 8 is removed
        upload(copy, path)

    with monkeypatch.context() as patch:
        patch.setattr(mirror, "AT_ONCE", 1)
        patch.setattr(mirror, "_upload", late)
        mirror.send(copy, everything)
    assert steps(tmp_path / "there") == ["step-000004"]
    mirror.send(copy, everything)
    assert steps(tmp_path / "there") == ["step-000012"]


def test_an_upload_that_fails_is_tried_again(tmp_path, monkeypatch):
    upload, calls = mirror._upload, []

    def failing(copy, path):
        calls.append(path)
        if len(calls) <= 2:
            raise OSError("the network is away")
        upload(copy, path)

    monkeypatch.setattr(mirror, "_upload", failing)
    pipeline.train(recipe_at(tmp_path, f"file://{tmp_path}/there"))
    assert (tmp_path / "there/model/model.safetensors").is_file()


def test_what_changed_there_is_fetched_and_what_changed_here_is_sent(tmp_path, monkeypatch):
    uri = f"file://{tmp_path}/there"
    first = home(uri)
    for name in ("a b.txt", "data/kept.txt", "data/removed.txt", ".hidden"):
        (first / name).parent.mkdir(exist_ok=True)
        (first / name).write_text("first")
    home(uri)
    assert files(tmp_path / "there").keys() == {"a b.txt", "data/kept.txt", "data/removed.txt"}
    another_machine(tmp_path, monkeypatch)
    with working_copy.working_copy(uri) as second:
        assert Path(second, "data/kept.txt").read_text() == "first"
        Path(second, "a b.txt").write_text("second")
        Path(second, "data/removed.txt").unlink()
    another_machine(tmp_path, monkeypatch, "home")
    (first / "data/kept.txt").write_text("first again")
    home(uri)
    assert (first / "a b.txt").read_text() == "second"
    assert (tmp_path / "there/data/kept.txt").read_text() == "first again"
    shutil.rmtree(tmp_path / "there")
    home(uri)
    assert (tmp_path / "there/data/kept.txt").is_file(), "what was removed there is sent again, never removed here"


def test_a_recipe_moves_with_all_that_lies_in_its_run(tmp_path):
    uri = f"file://{tmp_path}/there?x=1"
    source = {"train": {"images": "{run}/data/source/images"}}
    path = tmp_path / "recipe.yaml"
    values = {"run": uri, "tasks": {"images": source}, "evaluate": {"examples": 3}, "distill": {"teacher": "runs/other"}}
    path.write_text(json.dumps(values))
    recipe = config.load(str(path))
    with working_copy.working_copy(recipe.run) as folder:
        local = working_copy.moved(recipe, folder)
        assert local.run == folder
        assert local.tasks["images"].train.images == f"{folder}/data/source/images"
        assert local.distill.teacher == "runs/other"
        published = working_copy.published(local)
        assert published.run == uri
        assert published.tasks["images"].train.images == f"file://{tmp_path}/there/data/source/images?x=1"
        assert working_copy.moved(published, folder) == local


def test_a_pipelines_student_goes_on_from_its_own_recipe_there(tmp_path, monkeypatch, capsys):
    recipe = recipe_at(tmp_path, f"file://{tmp_path}/there", teacher={"train": {"steps": 2}}, distill={})
    crashed(monkeypatch, recipe, 2 * 3)  # the teacher ends, the student breaks off in step 4
    assert steps(tmp_path / "there/teacher") == steps(tmp_path / "there/student") == ["step-000002"]
    another_machine(tmp_path, monkeypatch)
    capsys.readouterr()
    [folder] = pipeline.train(config.load(f"{recipe.run}/student/config.yaml"))
    assert "goes on from step 2, of the copy at" in capsys.readouterr().out
    assert folder.endswith("/student") and (tmp_path / "there/student/model/model.safetensors").is_file()


def test_names_there_that_lead_out_of_the_folder_are_left_alone(tmp_path, monkeypatch):
    class Hostile:
        def get_file_info(self, selector):
            def info(path):
                return type("Info", (), {"path": f"bucket/run/{path}", "size": 1, "mtime_ns": 1, "is_file": True})

            return [info("../../escaped"), info("a/../../b"), info("fine")]

    monkeypatch.setattr(mirror, "open_folder", lambda uri: (Hostile(), "bucket/run"))
    assert mirror._there(mirror.Copy(tmp_path, "s3://bucket/run")).keys() == {"fine"}


def test_the_report_of_a_run_at_a_uri_is_written_there(tmp_path):
    recipe = recipe_at(tmp_path, f"file://{tmp_path}/there")
    pipeline.train(recipe)
    pipeline.report(recipe.run)
    assert "<html" in (tmp_path / "there/report.html").read_text()
