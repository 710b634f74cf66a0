"""Tokenizing toys: what is written, what is set aside, what is not done twice, and the same tokens whoever works."""

import json
import os
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from lvm_ray.data import tokenize as module
from lvm_ray.data.listing import read_unit, survey, unit_length, units_of, write_units
from lvm_ray.data.shards import Manifest, open_shards
from lvm_ray.data.tokenize import tokenize
from lvm_ray.data.tokenize_unit import ENCODED_AT_ONCE, UnitTokenizer, encode
from lvm_ray.errors import BadItem, UserError
from lvm_ray.seeds import stable_hash
from tests.toys import Invert, Swap, ToyTokenizer, load_toy_tokenizer, toy_recipe


@dataclass
class Progress:
    """Remembers what a progress bar would have shown."""

    total: float | None = None
    shown: list[tuple[float, str]] = field(default_factory=list)

    def set(self, done: float, note: str = "") -> None:
        self.shown.append((done, note))


def run(recipe) -> tuple[Manifest, Progress]:
    bar = Progress()
    return tokenize(recipe, bar, load_toy_tokenizer), bar


def test_shards_hold_every_copy_of_every_pair(tmp_path):
    recipe = toy_recipe(tmp_path)
    manifest, bar = run(recipe)
    assert manifest.rows["train"] == {"invert": {0: 24}, "threshold": {0: 8, 1: 8, 2: 8}, "swap": {0: 8, 1: 8}}
    assert manifest.rows["test"] == {"invert": {0: 4}, "threshold": {0: 4}, "swap": {0: 4}}
    assert bar.total == 24 + 24 + 16 + 2 * 12 and bar.shown[-1] == (bar.total, "")
    shards = open_shards(recipe.shard_folder)
    shards.verify()
    shards.require_tokenizer(ToyTokenizer.hash)
    ids, tokens = shards.pairs("train", "invert", 0)
    assert ids == sorted(ids) and len(set(ids)) == 24
    # The negative of a colour of four steps a channel is 63 minus its code.
    assert (tokens[:, :4] + tokens[:, 4:] == 63).all()
    copies = [shards.pairs("train", "threshold", copy) for copy in range(3)]
    assert copies[0][0] == copies[1][0] == copies[2][0]
    assert (copies[0][1] != copies[1][1]).any() and (copies[1][1] != copies[2][1]).any()
    assert (tmp_path / "data/shards/bad_items.jsonl").read_text() == ""
    assert not (tmp_path / "data/shards/.units").exists()


def test_tokens_do_not_depend_on_ray_or_its_workers(tmp_path, ray_session):
    here, _ = run(toy_recipe(tmp_path / "here", tasks={"invert": {"train": 520}, "swap": {"copies": 2}}))
    recipe = toy_recipe(tmp_path / "ray", tasks={"invert": {"train": 520}, "swap": {"copies": 2}}, compute={"workers": 2})
    there, bar = run(recipe)
    assert here.files == there.files and here.digest == there.digest
    assert bar.shown[-1][0] == bar.total


class MortalTokenizer(ToyTokenizer):
    """Kills its process on the first picture that anybody gives it, as a machine that runs out of memory does."""

    def __init__(self, mark: str) -> None:
        self._mark = mark

    def encode(self, pictures):
        if not os.path.exists(self._mark):
            os.close(os.open(self._mark, os.O_CREAT))
            os._exit(1)
        return super().encode(pictures)


def load_mortal_tokenizer(folder: str) -> MortalTokenizer:
    return MortalTokenizer(f"{folder}-died")


def test_the_death_of_an_actor_costs_its_unit_only(tmp_path, ray_session):
    recipe = toy_recipe(tmp_path / "run", tasks={"invert": {"train": 520}, "swap": {"copies": 2}}, compute={"workers": 2})
    (tmp_path / "run").mkdir()
    bar = Progress()
    manifest = tokenize(recipe, bar, load_mortal_tokenizer)
    assert (tmp_path / "run/tokenizer-died").exists() and bar.shown[-1][0] == bar.total
    assert manifest.files == run(toy_recipe(tmp_path / "here", tasks={"invert": {"train": 520}, "swap": {"copies": 2}}))[0].files


def test_a_finished_data_set_is_left_alone_and_other_settings_replace_it(tmp_path, monkeypatch):
    recipe = toy_recipe(tmp_path)
    run(recipe)
    stranger = tmp_path / "data/shards/train/notes.txt"
    stranger.write_text("mine")
    monkeypatch.setattr(UnitTokenizer, "work", lambda self, unit: pytest.fail("worked again"))
    manifest, bar = run(recipe)
    assert bar.shown == [(bar.total, "as before")]
    monkeypatch.undo()
    changed, _ = run(toy_recipe(tmp_path, tasks={"invert": {"train": 12}}))
    assert changed.settings != manifest.settings and set(changed.rows["train"]) == {"invert"}
    files = {path.relative_to(tmp_path / "data/shards").as_posix() for path in (tmp_path / "data").rglob("*.parquet")}
    assert files == set(changed.files)
    assert stranger.read_text() == "mine"


def test_after_a_kill_only_unfinished_units_are_done_again(tmp_path, monkeypatch):
    recipe = toy_recipe(tmp_path)
    work, done = UnitTokenizer.work, []

    def killed(self, unit):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(unit.record)
        return work(self, unit)

    monkeypatch.setattr(UnitTokenizer, "work", killed)
    with pytest.raises(KeyboardInterrupt):
        run(recipe)
    with pytest.raises(UserError, match=r"no manifest.json"):
        open_shards(recipe.shard_folder)
    # A part that is damaged makes its unit unfinished.
    damaged = done.pop()
    record = json.loads((tmp_path / "data/shards" / damaged).read_text())
    (tmp_path / "data/shards" / next(iter(record["files"]))).write_bytes(b"half")
    again = []
    monkeypatch.setattr(UnitTokenizer, "work", lambda self, unit: again.append(unit.record) or work(self, unit))
    resumed, bar = run(recipe)
    assert not set(again) & set(done) and damaged in again and bar.shown[-1][0] == bar.total
    monkeypatch.undo()
    assert resumed.files == run(toy_recipe(tmp_path / "whole"))[0].files


def test_bad_items_are_set_aside_in_every_copy(tmp_path):
    tasks = {"invert": {"train": 60}, "swap": {"train": 60, "copies": 3, "bad": ["train-0007-0"]}}
    manifest, bar = run(toy_recipe(tmp_path, tasks=tasks))
    assert manifest.bad == {"invert": 0, "swap": 1} and manifest.rows["train"]["swap"] == {0: 59, 1: 59, 2: 59}
    assert bar.shown[-1] == (bar.total, "1 items set aside")
    (line,) = (tmp_path / "data/shards/bad_items.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "split": "train",
        "task": "swap",
        "item": "train-0007-0",
        "paths": ["train-0007.png"],
        "reason": "train-0007.png: this toy is broken",
    }
    ids, _ = open_shards(str(tmp_path / "data/shards")).pairs("train", "swap", 2)
    assert "train-0007-0" not in ids


def test_too_many_bad_items_stop_and_name_one(tmp_path):
    recipe = toy_recipe(tmp_path, tasks={"swap": {"bad": ["train-0003-0"]}})
    with pytest.raises(
        UserError, match=r"task swap: 1 of 16 items cannot be used, for example train-0003.png: this toy is broken"
    ):
        run(recipe)
    with pytest.raises(UserError, match=r"no manifest.json"):
        open_shards(recipe.shard_folder)
    # Tolerance is no setting of the tokens: nothing is done again.
    manifest, _ = run(recipe.model_copy(update={"max_bad": 0.1}))
    assert manifest.bad == {"swap": 1}


def test_a_task_whose_only_image_is_bad_stops_whatever_the_tolerance(tmp_path):
    tasks = {"swap": {"train": 1, "bad": ["train-0000-0"]}}
    with pytest.raises(UserError, match=r"train-0000.png: this toy is broken"):
        run(toy_recipe(tmp_path, tasks=tasks, max_bad=1.0))


def test_a_task_without_training_items_is_named(tmp_path):
    with pytest.raises(UserError, match=r"tasks.swap.train: names no images"):
        run(toy_recipe(tmp_path, tasks={"swap": {"train": 0}}))


def test_another_tokenizer_than_the_recipes_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer of codes 64, the recipe's tokenizer.codes is 128"):
        run(toy_recipe(tmp_path, tokenizer={"codes": 128}))


def test_units_hold_every_item_once_and_load_each_image_once_for_all_copies(tmp_path):
    recipe = toy_recipe(tmp_path, tasks={"invert": {"train": 600}, "threshold": {"train": 60, "copies": 50}})
    found = survey(recipe, "any")
    units = units_of(recipe, found.counts)
    assert [(unit.items, unit.task) for unit in units[:2]] == [(32, "threshold"), (28, "threshold")]
    assert [unit.items for unit in units if unit.task == "invert" and unit.split == "train"] == [256, 256, 88]
    write_units(recipe, found)
    items = [(unit.task, unit.split, item) for unit in units for item in read_unit(recipe.shard_folder, unit)]
    for name, task in recipe.tasks.items():
        assert [item for kind, split, item in items if (kind, split) == (name, "test")] == list(task.items("test"))
    assert len({(task, split, item.id) for task, split, item in items}) == 660 + 16


def test_units_grow_with_the_data_set_and_not_beyond_what_a_driver_can_hold():
    assert unit_length(1000, 1) == 256 and unit_length(1000, 10) == 51 and unit_length(1000, 500) == 32
    assert unit_length(100_000_000, 1) == 5000


def test_an_id_that_stands_twice_is_set_aside_the_second_time(tmp_path, monkeypatch):
    items = Invert.items

    def doubled(self, split):
        listed = list(items(self, split))
        yield from listed
        if split == "train":
            yield replace(listed[3], original="another image", paths=("elsewhere.png",))

    monkeypatch.setattr(Invert, "items", doubled)
    twice, _ = run(toy_recipe(tmp_path / "twice", tasks={"invert": {"train": 60}}))
    monkeypatch.undo()
    once, _ = run(toy_recipe(tmp_path / "once", tasks={"invert": {"train": 60}}))
    assert twice.bad == {"invert": 1} and twice.files == once.files
    (line,) = (tmp_path / "twice/data/shards/bad_items.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "elsewhere.png: another item is called 'train-0003-0' as well"


def test_an_item_that_fails_in_a_later_copy_leaves_nothing(tmp_path, monkeypatch):
    see = Swap.see

    def failing(self, sample, copy, seed, size):
        if copy == 2 and seed[1] == stable_hash("swap", "train", "train-0007-0"):
            raise BadItem("train-0007.png: fails late")
        return see(self, sample, copy, seed, size)

    monkeypatch.setattr(Swap, "see", failing)
    manifest, _ = run(toy_recipe(tmp_path, tasks={"swap": {"train": 60, "copies": 3}}))
    assert manifest.bad == {"swap": 1} and manifest.rows["train"]["swap"] == {0: 59, 1: 59, 2: 59}
    monkeypatch.undo()
    whole, _ = run(toy_recipe(tmp_path / "whole", tasks={"swap": {"train": 60, "copies": 3}}))
    shards, others = open_shards(str(tmp_path / "data/shards")), open_shards(str(tmp_path / "whole/data/shards"))
    assert whole.bad == {"swap": 0}
    for copy in range(3):
        ids, tokens = shards.pairs("train", "swap", copy)
        all_ids, all_tokens = others.pairs("train", "swap", copy)
        assert (tokens == all_tokens[[all_ids.index(name) for name in ids]]).all()


def test_too_many_bad_items_stop_the_run_before_the_rest_is_done(tmp_path, monkeypatch):
    tasks = {"invert": {"train": 600, "bad": [f"train-{i:04d}-0" for i in range(100)]}}
    work, done = UnitTokenizer.work, []
    monkeypatch.setattr(UnitTokenizer, "work", lambda self, unit: done.append(unit.record) or work(self, unit))
    with pytest.raises(UserError, match=r"task invert: 100 of 608 items cannot be used, for example train-0000.png"):
        run(toy_recipe(tmp_path, tasks=tasks))
    assert len(done) == 1
    assert len((tmp_path / "data/shards/bad_items.jsonl").read_text().splitlines()) == 100


def test_a_training_image_in_the_test_split_is_pointed_out(tmp_path, monkeypatch, capsys):
    items = Invert.items
    monkeypatch.setattr(Invert, "items", lambda self, split: items(self, "train" if split == "test" else split))
    run(toy_recipe(tmp_path, tasks={"invert": {}}))
    assert "tasks.invert.test: train-0000.png is in tasks.invert.train as well (8 such images)" in capsys.readouterr().out


def test_pictures_pass_the_tokenizer_in_batches_of_one_size():
    class Watched(ToyTokenizer):
        sizes: list[int] = []  # noqa: RUF012

        def encode(self, pictures):
            self.sizes.append(len(pictures))
            return super().encode(pictures)

    pictures = np.random.default_rng(0).integers(0, 256, (70, 16, 16, 3), dtype=np.uint8)
    tokens = encode(Watched(), iter(pictures), 4)
    assert Watched.sizes == [ENCODED_AT_ONCE] * 3
    assert (tokens == ToyTokenizer().encode(pictures)).all()


class RefusingTokenizer(ToyTokenizer):
    """Tells of bad input on the first picture."""

    def encode(self, pictures):
        raise UserError("shards/part: cannot write: No space left on device")


def load_refusing_tokenizer(folder: str) -> RefusingTokenizer:
    return RefusingTokenizer()


def test_a_users_error_in_an_actor_is_the_drivers(tmp_path, ray_session, capfd):
    recipe = toy_recipe(tmp_path, tasks={"invert": {"train": 520}}, compute={"workers": 2})
    with pytest.raises(UserError) as refused:
        tokenize(recipe, Progress(), load_refusing_tokenizer)
    assert str(refused.value) == "shards/part: cannot write: No space left on device"
    assert capfd.readouterr() == ("", "")


def test_shards_at_a_uri_with_a_query_are_those_at_its_path(tmp_path):
    recipe = toy_recipe(tmp_path / "uri", shards=f"file://{tmp_path}/a%20b?region=us-east-1")
    manifest, _ = run(recipe)
    open_shards(recipe.shard_folder).verify()
    assert manifest.files == run(toy_recipe(tmp_path / "path"))[0].files
    assert sorted(path.name for path in (tmp_path / "a b").iterdir()) == [
        "bad_items.jsonl",
        "manifest.json",
        "test",
        "train",
        "validation",
    ]
    _, bar = run(recipe)
    assert bar.shown == [(bar.total, "as before")]


def test_shards_that_cannot_be_written_are_said_in_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in ("/proc/nope", f"{tmp_path}/file/shards"):
        with pytest.raises(UserError, match=rf"^{folder}/\.units/[\w-]+\.items: cannot write: N"):
            run(toy_recipe(tmp_path, shards=folder))


@pytest.mark.parametrize("path", ["../victim.txt", "train/../../victim.txt", "train/notes.txt"])
def test_only_parts_are_removed_whatever_a_manifest_or_a_record_names(tmp_path, path):
    folder, recipe = tmp_path / "data/shards", toy_recipe(tmp_path)
    victim = folder / path
    for name, values in (
        ("manifest.json", {"schema": 2, "settings": "other", "rows": {}}),
        (".units/train-invert-00000.json", {"settings": survey(recipe, ToyTokenizer.hash).settings}),
        (".units/train-invert-00001.json", None),
    ):
        (folder / ".units").mkdir(parents=True, exist_ok=True)
        (folder / "train").mkdir(exist_ok=True)
        victim.write_text("mine")
        content = values if values is None else {**values, "files": {path: {"rows": 1, "sha256": "0"}}}
        (folder / name).write_text(json.dumps(content))
        manifest, _ = run(recipe)
        assert victim.read_text() == "mine" and path not in manifest.files
        (folder / "manifest.json").unlink()


def test_what_a_kill_left_is_removed_and_strangers_stay(tmp_path, monkeypatch):
    folder, work, done = tmp_path / "data/shards", UnitTokenizer.work, []

    def killed(self, unit):
        if len(done) == 1:  # a part is there, its record is not
            work(self, unit)
            (folder / unit.record).unlink()
            raise KeyboardInterrupt
        done.append(unit)
        return work(self, unit)

    monkeypatch.setattr(UnitTokenizer, "work", killed)
    with pytest.raises(KeyboardInterrupt):
        run(toy_recipe(tmp_path, tasks={"threshold": {"copies": 3}}))
    monkeypatch.undo()
    copy = folder / "train/threshold/copy-002"
    left = [copy / ".part-00000.parquet.deadbeef", copy / "part-00009.parquet"]
    odd = os.fsencode(copy) + b"/\xff.parquet"
    strangers = [copy / name for name in ("notes.txt", ".part-00000.parquet.mine", "part-1.parquet", "part-00000.parquet.bak")]
    strangers += [folder / "part-00000.parquet", folder / "train/part-00000.parquet"]
    for path in (*left, *strangers):
        path.write_text("some")
    with open(odd, "w"):
        pass
    (folder / "train/loop").symlink_to(folder)
    manifest, _ = run(toy_recipe(tmp_path, tasks={"threshold": {"copies": 1}, "invert": {}}))
    assert not any(path.exists() for path in left) and all(path.read_text() == "some" for path in strangers)
    assert os.path.exists(odd)
    parts = {path.relative_to(folder).as_posix() for path in folder.rglob("copy-*/part-?????.parquet")}
    assert parts == set(manifest.files)


def test_imported_tokens_are_never_replaced_whatever_the_manifests_schema(tmp_path):
    recipe = toy_recipe(tmp_path)
    run(recipe)
    place = tmp_path / "data/shards/manifest.json"
    values = {**json.loads(place.read_text()), "schema": 3, "imported": {"train": {"swap": []}}}
    place.write_text(json.dumps(values))
    with pytest.raises(UserError, match="holds imported tokens, which tokenizing would remove"):
        run(recipe)
    assert json.loads(place.read_text()) == values


def test_items_set_aside_are_judged_once_each(tmp_path):
    class Watched(dict):
        looks = 0

        def __getitem__(self, key):
            Watched.looks += 1
            return super().__getitem__(key)

    recipe = toy_recipe(tmp_path, tasks={"invert": {"train": 5000}}, max_bad=0.1998)  # of 5008 items, 1000
    judge = module._Progress(Progress(), recipe, survey(recipe, "any"), 0, {})
    for i in range(200):
        bad = [Watched(task="invert", split="train", item=f"{i}-{k}", reason=f"reason {i}") for k in range(5)]
        judge.add({"versions": 20, "bad": bad})
    assert Watched.looks < 10 * 1000
    with pytest.raises(UserError, match=r"task invert: 1001 of 5008 items cannot be used, for example reason 0: mend"):
        judge.add({"versions": 20, "bad": [{"task": "invert", "split": "test", "item": "0", "reason": "last"}]})
    written = [json.loads(line) for line in (tmp_path / "data/shards/bad_items.jsonl").read_text().splitlines()]
    keys = [(entry["task"], entry["split"], entry["item"]) for entry in written]
    assert len(keys) == 1001 and keys == sorted(keys)


@pytest.mark.parametrize("uri", [False, True])
def test_a_file_whose_size_changes_is_seen_in_the_same_process(tmp_path, monkeypatch, uri):
    tar = tmp_path / "a b.tar"
    named = f"file://{tmp_path}/a%20b.tar?region=x" if uri else str(tar)
    items = Invert.items
    monkeypatch.setattr(Invert, "items", lambda self, split: [replace(item, paths=(named,)) for item in items(self, split)])
    recipe, found = toy_recipe(tmp_path, tasks={"invert": {}}), []
    for content in (b"one", b"other", b"three"):
        tar.write_bytes(content)
        found.append(survey(recipe, "any").settings)
    assert found[0] != found[1] == found[2]
