"""Evaluation on toys: the numbers of an independent computation, known floors and ceilings, the same bytes whoever works."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import lvm_ray.tasks as registry
from lvm_ray import config, tables
from lvm_ray.config import Recipe
from lvm_ray.data.shards import open_shards
from lvm_ray.data.tokenize import tokenize
from lvm_ray.errors import BadItem, UserError
from lvm_ray.evaluate import floors
from lvm_ray.evaluate.gallery import choose
from lvm_ray.evaluate.prompts import choose_examples, prompt_tokens
from lvm_ray.evaluate.run import evaluate_runs
from lvm_ray.evaluate.score import Scorer
from lvm_ray.model.export import export
from lvm_ray.model.folder import load_model
from lvm_ray.model.llama import build
from lvm_ray.progress import Bar
from lvm_ray.sources.coco import Person
from lvm_ray.tasks.base import Picture, Sample, View
from lvm_ray.tasks.geometry import see_image
from lvm_ray.tasks.objects import Objects
from lvm_ray.tasks.pose import Pose
from lvm_ray.tasks.segmentation import Segmentation
from tests.toys import SIZE, Invert, ToyTokenizer, load_toy_tokenizer, toy_recipe

FILES = ("evaluation.json", "items.parquet", "gallery.json")
N = 4  # tokens of a picture


def make_run(folder: Path, recipe: Recipe, seed: int = 0, codebook: str = ToyTokenizer.hash) -> str:
    """A run folder with a random model, as training would leave it."""
    model = build(recipe.model, ToyTokenizer().codebook, recipe.sentence_tokens, recipe.image_tokens, seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(50)  # decided answers
    folder.mkdir(parents=True, exist_ok=True)
    info = {
        "kind": "toy",
        "hash": codebook,
        "codes": 64,
        "patch": 8,
        "size": SIZE,
        "image_tokens": N,
        "folder": "../../tokenizer",
    }
    export(model, folder / "model", info)
    (folder / "config.yaml").write_text(config.dump(recipe))
    return str(folder)


def make_pipeline(folder: Path, **changes: Any) -> tuple[Recipe, list[str]]:
    """Toy shards and two runs, seven test items of `invert` among them: more than two units, the last one not full."""
    changes = {
        "tasks": {"invert": {"train": 24, "test": 7}, "swap": {"copies": 2}},
        "evaluate": {"batch": 3, "resamples": 100},
    } | changes
    recipe = toy_recipe(folder, **changes)
    tokenize(recipe, Bar("tokenize", None, ""), load_toy_tokenizer)
    return recipe, [make_run(folder / name, recipe, seed) for seed, name in enumerate(("teacher", "student"))]


def evaluate(runs: Sequence[str], recipe: Recipe) -> list[dict[str, Any]]:
    return evaluate_runs(runs, recipe, Bar("evaluate", None, ""), load_toy_tokenizer)


def contents(runs: Sequence[str]) -> list[bytes]:
    """Everything that an evaluation leaves for people, the pictures too."""
    places = [
        path for run in runs for path in (*(Path(run, name) for name in FILES), *sorted(Path(run, "gallery").rglob("*.png")))
    ]
    return [path.read_bytes() for path in places]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> tuple[Recipe, list[str], list[dict[str, Any]]]:
    recipe, runs = make_pipeline(tmp_path_factory.mktemp("evaluated"))
    return recipe, runs, evaluate(runs, recipe)


def test_examples_are_chosen_by_seed_task_and_item_and_never_the_items_own():
    originals = ["a", "a", "b", "c", "d"]
    chosen = {item: choose_examples(0, "pose", item, "b", originals, 3) for item in map(str, range(50))}
    assert chosen == {item: choose_examples(0, "pose", item, "b", originals, 3) for item in chosen}
    for places in chosen.values():
        names = [originals[place] for place in places]
        assert len(set(names)) == 3 and "b" not in names
    assert {tuple(places) for places in chosen.values()} > {(0, 3, 4), (4, 3, 1)}  # both of a's pairs, every order
    assert any(choose_examples(1, "pose", item, "b", originals, 3) != places for item, places in chosen.items())
    assert any(choose_examples(0, "derain", item, "b", originals, 3) != places for item, places in chosen.items())
    with pytest.raises(UserError, match=r"tasks\.pose\.train: 3 originals can stand before x, and 4"):
        choose_examples(0, "pose", "x", "b", originals, 4)


def test_a_prompt_is_image_label_image_label_query():
    examples = np.arange(12, dtype=np.uint16).reshape(3, 4)
    assert prompt_tokens(examples, np.array([90, 91], np.uint16)).tolist() == [*range(12), 90, 91]


def answered_by_hand(model, prompts, codebook):
    """Greedy answers by whole forwards: each time the code with the largest expected similarity to what comes."""
    away = torch.cdist(codebook, codebook) ** 2
    width = torch.stack([row[row > 1e-9].min() for row in away]).mean()
    tokens = prompts
    with torch.inference_mode():
        for _ in range(N):
            likely = model(tokens).logits[:, -1].softmax(-1) @ torch.exp(-away / (2 * width))
            tokens = torch.cat([tokens, likely.argmax(-1)[:, None]], dim=1)
    return tokens[:, -N:].numpy()


def test_scores_are_those_of_an_independent_computation(evaluated):
    """The test pairs out of the shards, a plain loop over transformers' forward, one forward for the losses."""
    recipe, runs, evaluations = evaluated
    shards = open_shards(recipe.shard_folder)
    for run, evaluation in zip(runs, evaluations, strict=True):
        model, _ = load_model(f"{run}/model")
        for name, task in recipe.tasks.items():
            ids, pairs_P2N = shards.pairs("test", name, 0)
            _, training = shards.pairs("train", name, 0)
            originals = shards.originals("train", name)
            chosen = [choose_examples(0, name, item, item.rpartition("-")[0], originals, 3) for item in ids]
            sentences = np.concatenate([training[chosen].reshape(len(ids), -1), pairs_P2N], axis=1).astype(np.int64)
            prompts, truth = torch.from_numpy(sentences[:, :-N]), torch.from_numpy(sentences[:, -N:])
            answers = answered_by_hand(model, prompts, ToyTokenizer().codebook)
            pictures = ToyTokenizer().decode(answers).repeat(2, axis=1).repeat(2, axis=2)
            labels = [task.load(item, "test").label for item in task.items("test")]
            errors = [np.abs(a.astype(float) - b).mean() for a, b in zip(pictures, labels, strict=True)]
            with torch.inference_mode():
                logits = model(torch.from_numpy(sentences)).logits[:, -N - 1 : -1]
            nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2).double(), truth).item()
            entries = evaluation["tasks"][name]
            assert entries["error"]["value"] == pytest.approx(np.mean(errors), abs=1e-5) and entries["error"]["n"] == len(ids)
            assert entries["target_perplexity"]["value"] == pytest.approx(math.exp(nll), rel=1e-4)
            assert entries["token_accuracy"]["value"] == pytest.approx(
                (logits.argmax(-1) == truth).double().mean().item(), abs=1e-6
            )
    assert evaluations[0]["tasks"] != evaluations[1]["tasks"]


def test_floors_and_ceilings_of_toys_are_known(evaluated):
    recipe, _, evaluations = evaluated
    shards = open_shards(recipe.shard_folder)
    for name, task in recipe.tasks.items():
        samples = [task.load(item, "test") for item in task.items("test")]
        entry = evaluations[0]["tasks"][name]["error"]
        copied = np.mean([np.abs(sample.image.astype(float) - sample.label).mean() for sample in samples])
        grey = np.mean([np.abs(128.0 - sample.label).mean() for sample in samples])
        assert entry["ceiling"] == 0.0  # the toy tokenizer keeps these pictures exactly
        assert entry["floor"] <= min(copied, grey) + 1e-6
        if entry["floor"] == pytest.approx(grey, abs=1e-6):
            assert entry["floor_name"] == "grey"
        _, training = shards.pairs("train", name, 0)
        _, test = shards.pairs("test", name, 0)
        smoothed = np.bincount(training[:, N:].reshape(-1), minlength=64) + 1.0
        nll = -np.log((smoothed / smoothed.sum())[test[:, N:]]).mean()
        perplexity = evaluations[0]["tasks"][name]["target_perplexity"]
        assert perplexity["floor"] == pytest.approx(math.exp(nll), rel=1e-5) and perplexity["ceiling"] is None
    # Both runs are compared with the same references.
    for first, second in zip(*(evaluation["tasks"]["invert"].values() for evaluation in evaluations), strict=True):
        assert all(first[key] == second[key] for key in ("floor", "floor_name", "ceiling", "n"))


def test_the_last_examples_label_is_a_floor():
    task = Invert()
    sample = task.load(next(iter(task.items("test"))), "test")
    views = task.questions(sample, SIZE)
    query, label = task.see(sample, 0, (0,), SIZE).pictures
    trips = {floors.ROUND_TRIP: [np.zeros_like(query)], floors.CEILING: [np.zeros_like(label)]}
    measures = floors.reference_measures(task, sample, views, [query], trips, label, [])
    assert measures[floors.LAST_EXAMPLE]["error"] == 0 and measures[floors.COPIED]["error"] > 0
    tokens = [{"tokens": 4, "nll": 4.0, "correct": 1}]
    assert floors.references(task, [measures], tokens)["error"].floor_name == floors.LAST_EXAMPLE


def test_the_folder_holds_every_item_and_a_gallery(evaluated):
    recipe, runs, evaluations = evaluated
    run = Path(runs[1])
    rows = pyarrow.parquet.read_table(run / "items.parquet").to_pylist()
    assert [(row["task"], row["item"]) for row in rows] == [
        (name, i.id) for name, t in recipe.tasks.items() for i in t.items("test")
    ]
    errors = [json.loads(row["measures"])["error"] for row in rows if row["task"] == "invert"]
    assert evaluations[1]["tasks"]["invert"]["error"]["value"] == pytest.approx(np.mean(errors), abs=1e-6)
    gallery = json.loads((run / "gallery.json").read_text())
    assert [entry["item"] for entry in gallery if entry["task"] == "invert"] == [
        item.id for item in recipe.tasks["invert"].items("test")
    ]
    for entry in gallery:
        query, truth = (np.asarray(Image.open(run / entry[name])) for name in ("query", "truth"))
        assert query.shape == (SIZE, SIZE, 3) and np.asarray(Image.open(run / entry["answer"])).shape == query.shape
        assert (truth == (255 - query if entry["task"] == "invert" else query[:, :, ::-1])).all()
    assert json.loads((run / "evaluation.json").read_text()) == evaluations[1]
    assert evaluations[1]["nothing"] == {"invert": 0, "swap": 0}


def test_shown_are_the_first_and_then_the_best_the_middle_and_the_worst():
    scores = [0.5, 0.1, float("nan"), *[0.4] * 6, 0.9, 0.3, 0.2, 0.8, 0.0]
    shown = choose(scores, True)
    assert [*shown] == [*range(8), 9, 12, 13], "the first eight stand first, the others from the best to the worst"
    assert {place: why for place, why in shown.items() if why != "first"} == {
        9: "best",
        12: "best",
        1: "worst",
        13: "worst",
        5: "median",
        6: "median",
    }
    lower = choose(scores, False)
    assert lower[13] == lower[1] == "best" and lower[9] == lower[12] == "worst" and lower[2] == "first"
    assert choose([], True) == {} and choose([1.0], True) == {0: "best"} and choose([float("nan")], True) == {0: "first"}


def test_pictures_of_the_gallery_are_those_that_were_measured(tmp_path):
    recipe, runs = make_pipeline(tmp_path, tasks={"invert": {"train": 24, "test": 30}})
    evaluate(runs, recipe)
    galleries = [json.loads(Path(run, "gallery.json").read_text()) for run in runs]
    rows = pyarrow.parquet.read_table(Path(runs[1]) / "items.parquet").to_pylist()
    errors = {row["item"]: json.loads(row["measures"])["error"] for row in rows}
    ranked = sorted(errors, key=lambda item: errors[item])
    words = {word: {entry["item"] for entry in galleries[1] if entry["why"] == word} for word in ("best", "median", "worst")}
    assert words == {"best": {*ranked[:2]}, "median": {*ranked[14:16]}, "worst": {*ranked[-2:]}}, "by the last run's scores"
    for run, entries in zip(runs, galleries, strict=True):
        assert [(one["item"], one["why"]) for one in entries] == [(one["item"], one["why"]) for one in galleries[1]]
        assert len(entries) > 8
        for entry in entries:
            answer, truth = (np.asarray(Image.open(Path(run, entry[part])), float) for part in ("answer", "truth"))
            assert np.abs(answer - truth).mean() == pytest.approx(entry["measures"]["error"], abs=1e-5)
            assert entry["metric"] == "error" and entry["score"] == entry["measures"]["error"]


def test_an_item_that_is_gone_since_it_was_answered_is_not_shown(tmp_path, monkeypatch):
    recipe, runs = make_pipeline(tmp_path)
    first = evaluate(runs, recipe)
    load = Invert.load
    gone = BadItem("test-0001.png: it is gone")

    def without(self, item, split):
        if item.id == "test-0001-0":
            raise gone
        return load(self, item, split)

    monkeypatch.setattr(Invert, "load", without)
    assert evaluate(runs, recipe) == first
    shown = [entry["item"] for entry in json.loads(Path(runs[0], "gallery.json").read_text()) if entry["task"] == "invert"]
    assert len(shown) == 6 and "test-0001-0" not in shown


def test_answers_that_show_nothing_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Invert, "shows_nothing", lambda self, answer: bool(answer.mean() > 100))
    recipe, runs = make_pipeline(tmp_path)
    (evaluation,) = evaluate(runs[:1], recipe)
    rows = pyarrow.parquet.read_table(Path(runs[0]) / "items.parquet").to_pylist()
    counted = sum(json.loads(row["measures"])["nothing"] for row in rows if row["task"] == "invert")
    assert evaluation["nothing"] == {"invert": counted, "swap": 0} and counted > 0
    tables.print_scores({"teacher": evaluation})
    assert f"teacher: {counted} of 7 answers of invert show nothing at all" in "".join(capsys.readouterr())


def test_what_shows_nothing_is_the_tasks_to_say():
    masks = Segmentation(classes=["thing"])
    assert masks.shows_nothing(np.zeros((4, 4), np.uint8)) and not masks.shows_nothing(np.eye(4, dtype=np.uint8))
    everything = Segmentation(classes=["thing", "rest"], background=False)
    assert not everything.shows_nothing(np.zeros((4, 4), np.uint8)), "0 is a class there"
    nobody = Person(joints=[[0, 0, 0]] * 17, box=[0, 0, 0, 0], area=0)
    assert Pose().shows_nothing(nobody) and Objects().shows_nothing(np.zeros((4, 4), np.uint8))


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_same_bytes_from_any_number_of_workers(evaluated, tmp_path, ray_session, workers):
    _, runs, _ = evaluated
    there, others = make_pipeline(tmp_path, compute={"workers": workers, "threads": 1})
    evaluate(others, there)
    assert contents(runs) == contents(others)
    # Neither places nor workers are in what they say.
    assert all(str(tmp_path).encode() not in content for content in contents(others))


def test_drawn_answers_belong_to_the_item_whatever_the_batch(evaluated, tmp_path):
    _, _, greedy = evaluated
    found = []
    for batch in (3, 5):
        settings = {"batch": batch, "resamples": 100, "draws": {"swap": 4}}
        recipe, runs = make_pipeline(tmp_path / str(batch), evaluate=settings)
        found.append([evaluation["tasks"] for evaluation in evaluate(runs, recipe)])
    for drawn, same, likeliest in zip(*found, greedy, strict=True):
        assert drawn["swap"]["error"] == same["swap"]["error"]
        assert drawn["invert"] == likeliest["tasks"]["invert"]
        assert drawn["swap"]["target_perplexity"] == likeliest["tasks"]["swap"]["target_perplexity"]
    assert found[0][0]["swap"]["error"] != greedy[0]["tasks"]["swap"]["error"]


def test_one_run_alone_and_one_beside_another_are_the_same(evaluated, tmp_path):
    _, _, evaluations = evaluated
    recipe, others = make_pipeline(tmp_path)
    assert evaluate(others[1:], recipe)[0] == evaluations[1]


def test_references_are_computed_once_for_a_test_set(tmp_path, monkeypatch):
    recipe, runs = make_pipeline(tmp_path)
    first = evaluate(runs, recipe)
    monkeypatch.setattr(floors, "trivial_answers", lambda *_: pytest.fail("computed again"))
    assert evaluate(runs, recipe) == first
    monkeypatch.undo()
    fewer = evaluate(runs, recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"items": 2})}))
    assert fewer[0]["tasks"]["invert"]["error"]["n"] == 2
    assert fewer[0]["tasks"]["invert"]["error"]["floor"] != first[0]["tasks"]["invert"]["error"]["floor"]


def test_a_damaged_cache_is_computed_again(tmp_path):
    recipe, runs = make_pipeline(tmp_path)
    first = evaluate(runs, recipe)
    (tmp_path / "data/references.json").write_text("[")
    assert evaluate(runs, recipe) == first


def test_items_that_cannot_be_used_are_set_aside_and_counted(tmp_path):
    tasks = {"invert": {"train": 24, "test": 7, "bad": ["test-0001-0"]}}
    recipe, runs = make_pipeline(tmp_path, tasks=tasks, max_bad=0.2)
    evaluation = evaluate(runs[:1], recipe)[0]
    assert evaluation["bad"] == {"invert": 1} and evaluation["tasks"]["invert"]["error"]["n"] == 6
    with pytest.raises(
        UserError, match=r"task invert: 1 of 7 test items cannot be used, for example test-0001\.png: this toy is"
    ):
        evaluate(runs[:1], recipe.model_copy(update={"max_bad": 0.1}))


def test_a_run_that_also_learns_from_unlabelled_images_is_scored_on_its_labelled_tasks(tmp_path):
    recipe, runs = make_pipeline(tmp_path, tasks={"plain": {"train": 16}, "invert": {"test": 5}})
    manifest = open_shards(recipe.shard_folder).manifest
    assert manifest.images_per_row == {"plain": 1, "invert": 2}
    (evaluation,) = evaluate(runs[:1], recipe)
    assert list(evaluation["tasks"]) == ["invert"]
    with pytest.raises(UserError, match="tasks: plain: none of them has labels"):
        evaluate(runs[:1], recipe.model_copy(update={"tasks": {"plain": recipe.tasks["plain"]}}))


def test_a_model_of_another_codebook_is_refused(tmp_path):
    recipe, _ = make_pipeline(tmp_path)
    stranger = make_run(tmp_path / "stranger", recipe, codebook="another")
    with pytest.raises(UserError, match="another is wanted"):
        evaluate([stranger], recipe)


def test_a_recipe_without_test_items_is_refused(tmp_path):
    recipe, runs = make_pipeline(tmp_path, tasks={"invert": {"train": 24, "test": 0}})
    with pytest.raises(UserError, match=r"tasks\.invert\.test: missing"):
        evaluate(runs, recipe)


class Quarters(Invert):
    """The negative, asked in four tiles at native size."""

    name: ClassVar[str] = "quarters"

    def questions(self, sample: Sample, size: int) -> list[View]:
        return [View((x, y, x + size, y + size)) for y in (0.0, size) for x in (0.0, size)]

    def transform(self, sample: Sample, view: View, size: int, rng: np.random.Generator) -> Sample:
        return Sample(see_image(sample.image, view, size), see_image(sample.label, view, size))

    def read(self, pictures: Sequence[Picture], views: Sequence[View], sample: Sample) -> Picture:
        answer = np.zeros_like(sample.image)
        for picture, view in zip(pictures, views, strict=True):
            left, top = int(view.box[0]), int(view.box[1])
            answer[top : top + len(picture), left : left + len(picture)] = picture
        return answer


def test_tiles_of_an_item_stay_together(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.TASKS, "quarters", Quarters)
    recipe, runs = make_pipeline(tmp_path, tasks={"quarters": {"train": 24, "test": 5}})
    entries = evaluate(runs[:1], recipe)[0]["tasks"]["quarters"]
    assert entries["error"]["ceiling"] == 0.0 and entries["error"]["n"] == 5
    rows = pyarrow.parquet.read_table(Path(runs[0]) / "items.parquet").to_pylist()
    assert all(json.loads(row["measures"])["answer_tokens"]["tokens"] == 4 * N for row in rows)


def test_a_unit_computes_on_one_thread_and_leaves_the_process_its_own(tmp_path, monkeypatch):
    recipe, runs = make_pipeline(tmp_path)
    load, seen, before = Scorer._load, set(), torch.get_num_threads()
    monkeypatch.setattr(Scorer, "_load", lambda self, unit: (seen.add(torch.get_num_threads()), load(self, unit))[1])
    torch.set_num_threads(2)
    try:
        evaluate(runs[:1], recipe)
        assert torch.get_num_threads() == 2 and seen == {1}
    finally:
        torch.set_num_threads(before)
