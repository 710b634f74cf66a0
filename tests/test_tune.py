"""Sweeps: what is listed, what is said of it, and real ones on Ray Tune that fail in part, are killed, and go on."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image
from scipy import stats

from lvm_ray import cli, config, pipeline
from lvm_ray.errors import UserError
from lvm_ray.report import sweep as report
from lvm_ray.report.sweep_charts import axis_of
from lvm_ray.train.meter import read_metrics
from lvm_ray.tune import answers, running, search
from lvm_ray.tune import sweep as sweeps
from lvm_ray.tune.space import Space, read_space
from lvm_ray.tune.trial import Outcome, Trial

ROOT = Path(__file__).resolve().parents[1]
DEMO = str(ROOT / "recipes" / "demo.yaml")
HEAD = "from ray import tune\n"
TEMPERATURES = 'space = {"distill.temperature": tune.grid_search([0.5, 1.0, 4.0])}\n'


SHARES = (
    'space = {f"balance.shares.{task}": tune.uniform(0.1, 1.0) for task in ("segmentation", "pose", "derain")}\n'
    'search = "population"\ntrials = 4\n'
)


def space_file(folder: Path, text: str, name: str = "space") -> str:
    path = folder / f"{name}.py"
    path.write_text(HEAD + text)
    return str(path)


def space_of(folder: Path, text: str) -> Space:
    return read_space(space_file(folder, text))


def listed(space: Space, score: Any = lambda settings: [0.0], seed: int = 0) -> list[dict[str, Any]]:
    """All settings of a search whose trials come to what `score` says."""
    rounds, found = search.rounds(space, config.load(DEMO), seed), []
    proposals = next(rounds)
    while True:
        found += [one.settings for one in proposals]
        try:
            proposals = rounds.send([score(one.settings) for one in proposals])
        except StopIteration:
            return found


# What is listed


def test_a_grid_has_every_combination_and_plain_values_hold_for_all(tmp_path):
    space = space_of(tmp_path, 'space = {"a": tune.grid_search([1, 2]), "c": 7, "b": tune.grid_search(["x", "y"])}')
    assert space.search == "grid" and space.number == 4
    assert listed(space) == [{"c": 7, "a": a, "b": b} for a in (1, 2) for b in ("x", "y")]


def test_random_trials_follow_from_the_seed_and_stay_in_their_ranges(tmp_path):
    text = (
        'space = {"t": tune.loguniform(0.5, 8.0), "n": tune.randint(2, 5), "q": tune.quniform(0.1, 0.9, 0.1), '
        '"k": tune.choice(["a", "b"]), "g": tune.grid_search([0, 1])}\ntrials = 40'
    )
    space = space_of(tmp_path, text)
    found = listed(space)
    assert len(found) == space.number == 80 and found == listed(space) and found != listed(space, seed=1)
    for one in found:
        assert 0.5 <= one["t"] <= 8 and one["n"] in (2, 3, 4) and one["k"] in ("a", "b")
        assert one["q"] == round(one["q"], 1) and float(f"{one['t']:.4g}") == one["t"]
    assert ([one["g"] for one in found[:4]] == [0, 1, 0, 1] and found[0]["t"] == found[1]["t"]) or found[0] != found[1]
    assert json.loads(json.dumps(found)) == found and {one["n"] for one in found} == {2, 3, 4}


def test_tpe_comes_closer_than_chance_and_lists_the_same_again(tmp_path):
    text = (
        'space = {"x": tune.uniform(-1.0, 1.0), "y": tune.loguniform(0.01, 1.0), "k": tune.choice([[0, 1], [2]])}\ntrials = 32\n'
    )
    chosen, drawn = (space_of(tmp_path, f'{text}search = "{name}"') for name in ("tpe", "random"))

    def score(settings: dict[str, Any]) -> list[float]:
        return [(settings["x"] - 0.3) ** 2 + math.log10(settings["y"] / 0.1) ** 2 + (settings["k"] == [2])]

    found = listed(chosen, score)
    assert len(found) == 32 and found == listed(chosen, score) and chosen.at_once == 4
    best, by_chance = (
        np.mean([min(score(one)[0] for one in listed(space, score, seed)) for seed in range(5)]) for space in (chosen, drawn)
    )
    assert best < 0.6 * by_chance


def test_tpe_bears_trials_without_a_result_and_several_objectives(tmp_path):
    text = 'space = {"x": tune.uniform(0.0, 1.0)}\nsearch = "tpe"\ntrials = 10\nround = 3\n'
    text += 'objectives = ["target_perplexity", "parameters"]'
    found = listed(space_of(tmp_path, text), lambda one: None if one["x"] < 0.5 else [one["x"], 1 - one["x"]])
    assert len(found) == 10


def test_the_worst_of_a_population_go_on_from_the_best_with_other_shares(tmp_path):
    space = space_of(tmp_path, SHARES + "generations = 3")
    rounds = search.rounds(space, config.load(DEMO), 0)
    first = next(rounds)
    second = rounds.send([[3.0], [1.0], None, [2.0]])
    assert [one.until for one in first] == [170] * 4 and [one.parent for one in first] == [None] * 4
    assert [one.parent for one in second] == [0, 1, 1, 3] and [one.until for one in second] == [340] * 4
    for place in (0, 1, 3):
        assert second[place].settings == first[place].settings
    schedule = second[2].settings["balance.schedule"]
    assert schedule[0] == first[1].settings["balance.schedule"][0] and schedule[1]["start"] == 170 / 510
    factors = [share / schedule[0]["shares"][task] for task, share in schedule[1]["shares"].items()]
    assert all(min(abs(factor / 0.8 - 1), abs(factor / 1.25 - 1)) < 1e-3 for factor in factors)
    third = rounds.send([[1.0], [2.0], [3.0], [4.0]])
    assert [one.parent for one in third] == [4, 5, 6, 4] and [one.until for one in third] == [None] * 4
    with pytest.raises(StopIteration):
        rounds.send([[1.0]] * 4)


# What is refused, before anything starts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'space = {"distill.temprature": tune.uniform(1.0, 2.0)}',
            "distill.temprature: no such key; did you mean 'temperature'?",
        ),
        ('space = {"distil.temperature": tune.uniform(1.0, 2.0)}', "distil: no such key; did you mean 'distill'?"),
        (
            'space = {"distill.temperature": tune.uniform(0.0, 2.0)}',
            "distill.temperature: found 0.0: input should be greater than 0",
        ),
        ('space = {"distill.temperature": tune.uniform(8.0, 2.0)}', "the range from 8 to 2 is empty"),
        ('space = {"distill.temperature": tune.loguniform(0.0, 2.0)}', "line 2: ValueError: LogUniform requires a lower bound"),
        ('space = {"distill.temperature": tune.randn()}', "a domain without ends cannot be checked"),
        ('space = {"distill.temperature": tune.sample_from(lambda: 1.0)}', "sample_from draws by itself"),
        ('space = {"distill.divergence": tune.choice(["forward_kl", "kl"])}', "distill.divergence: found 'kl'"),
        ('space = {"balance.ratios.rain": tune.uniform(1.0, 2.0)}', "balance.ratios names 'rain'"),
        ('space = {"tasks.pose.copies": tune.choice([10, 20])}', "a trial changes its training alone"),
        ('space = {"distill.cache": tune.choice(["a", "b"])}', "a folder is none of a sweep's settings"),
        ('space = {"train.image_weight": tune.choice([0.0, 0.1])}', "need two caches"),
        ('space = {"train.steps": 3}', "nothing varies"),
        ('space = {"train.steps": tune.choice([])}', "takes a list of at least one value"),
        ('spaces = {"train.steps": tune.choice([1])}', "spaces: a space file has no such value; did you mean 'space'?"),
        (TEMPERATURES + 'search = "annealing"', "search: found 'annealing': there are 'random', 'grid', 'tpe', 'population'"),
        (TEMPERATURES + 'search = "tpe"', "write tune.choice"),
        (TEMPERATURES + "trials = 3", "leave trials out"),
        (TEMPERATURES + "best = 0", "best: found 0: give a whole number from 1"),
        (TEMPERATURES + 'objectives = ["speed"]', "objectives: found 'speed'"),
        (TEMPERATURES + 'objectives = ["parameters"]', "a quality first"),
        (TEMPERATURES + 'objectives = ["target_perplexity", "parameters"]\nstopping = "asha"', "goes by a single objective"),
        (TEMPERATURES + 'reference = {"distill.weight": -1.0}', "distill.weight: found -1.0: a weight is a number from 0 up"),
        (
            TEMPERATURES.replace("grid_search", "choice") + 'search = "population"',
            "a population finds a schedule of shares alone",
        ),
        (SHARES.replace('"pose", ', "") + "generations = 5", "balance.shares.pose: missing"),
        (SHARES + "generations = 4", "510 steps (train.steps) are not 4 equal parts"),
        ("import nowhere_at_all", "line 2: ModuleNotFoundError"),
        ("space = {", "SyntaxError"),
    ],
)
def test_a_space_that_cannot_be_exits_2_in_one_line(tmp_path, capsys, text, message):
    path = space_file(tmp_path, text)
    assert cli.main(["tune", DEMO, "--space", path, "--run", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and path in line
    assert not (tmp_path / "run").exists()


def test_a_space_that_is_not_there_and_a_recipe_that_cannot_be_swept(tmp_path, capsys):
    assert cli.main(["tune", DEMO, "--space", str(tmp_path / "none.py")]) == 2
    assert "no such file" in capsys.readouterr().err
    path = space_file(tmp_path, TEMPERATURES)
    assert cli.main(["tune", DEMO, "--space", path, "--set", "train.validation=0"]) == 2
    assert "train.validation: 0" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "tune_spaces").glob("*.py")), ids=lambda path: path.stem)
def test_every_shipped_space_fits_the_demo(path):
    recipe = config.load(DEMO)
    sweep = sweeps.Sweep(recipe, read_space(str(path)))
    assert all(sweep.recipe_of(trial).train.steps for trial in sweep.first_round())


def test_a_trials_seed_changes_its_weights_and_order_and_not_its_sentences():
    recipe = config.load(DEMO)
    seeded = config.changed(recipe, {"train.seed": 9}, "here")
    assert (recipe.training_seed, seeded.training_seed, seeded.seed) == (4, 9, 4)
    assert config.fingerprint(seeded) != config.fingerprint(recipe)
    assert "seed" not in recipe.train.model_dump(exclude_defaults=True)


# What is said


def outcomes_of(values: dict[str, list[float]], searched: dict[str, float]) -> list[Outcome]:
    """Trials by name: `searched` once, then `values` over new seeds; the name "reference" is the reference."""
    found = []
    for name, value in searched.items():
        found.append(
            Outcome(Trial(len(found), "search", {"distill.temperature": name}), "finished", 8, {"target_perplexity": value})
        )
    for name, over_seeds in values.items():
        kind = "reference" if name == "reference" else "repeat"
        for seed, value in enumerate(over_seeds):
            trial = Trial(len(found), kind, {"distill.temperature": name}, seed)
            found.append(Outcome(trial, "finished", 8, {"target_perplexity": value}))
    return found


@pytest.fixture
def space(tmp_path):
    return space_of(tmp_path, 'space = {"distill.temperature": tune.grid_search(["a", "b", "c"])}')


REFERENCE = {"distill.temperature": "reference"}


def test_the_winner_is_named_by_new_seeds_and_its_interval_is_students_of_pairs(space):
    ours, theirs = [10.0, 11.0, 10.4], [10.6, 11.4, 11.2]
    found = outcomes_of({"a": [12.0, 12.5, 12.1], "b": ours, "reference": theirs}, {"a": 9.0, "b": 9.5, "c": 20.0})
    best = answers.winner(found, space)
    assert best.trial.number == 1  # a was best by luck
    effect = answers.effect(answers.by_seed(found, best.trial.settings, "target_perplexity"), dict(enumerate(theirs)))
    wanted = stats.ttest_rel(np.log(theirs), np.log(ours)).confidence_interval(0.95)
    assert effect["ci95"] == pytest.approx([100 * (1 - math.exp(-wanted.low)), 100 * (1 - math.exp(-wanted.high))])
    assert effect["percent"] == pytest.approx(100 * (1 - np.exp(np.mean(np.log(ours) - np.log(theirs)))))
    text = answers.sentence(found, space, REFERENCE, "T=1, weight 1")
    assert text.startswith("T=b lowers target perplexity by 5.4 % [") and "against T=1, weight 1 (3 seeds)." in text


def test_what_chance_explains_and_what_one_seed_says_is_no_result(space):
    found = outcomes_of({"a": [10.0, 12.0, 9.0], "reference": [10.5, 11.0, 10.0]}, {"a": 9.0})
    assert "chance explains this" in answers.sentence(found, space, REFERENCE, "T=1")
    alone = outcomes_of({"reference": [10.5]}, {"a": 9.0})
    assert "no result yet" in answers.sentence([*alone[:1], *outcomes_of({"a": [9.1]}, {}), *alone[1:]], space, REFERENCE, "T=1")
    assert "There is no winner" in answers.sentence([], space, REFERENCE, "T=1").replace("there", "There")
    itself = outcomes_of({"reference": [8.0, 8.1]}, {"reference": 8.0, "a": 9.0})
    assert "the reference itself" in answers.sentence(itself, space, REFERENCE, "T=1")


def test_a_pareto_front_holds_what_nothing_beats(space):
    points = [(1.0, 5.0), (2.0, 2.0), (3.0, 1.0), (3.0, 3.0), (1.0, 6.0), (2.0, 2.0)]
    trials = [
        {"number": k, "kind": "search", "state": "finished", "objectives": {"a": a, "b": b}} for k, (a, b) in enumerate(points)
    ]
    assert answers.front(trials, ["a", "b"]) == [0, 1, 2, 5]


def test_importance_sees_a_best_temperature_in_the_middle_and_a_choice_that_matters():
    generator = np.random.default_rng(0)
    dots = []
    for number in range(60):
        settings = {"t": float(2.0 ** generator.uniform(-2, 2)), "k": "ab"[number % 2], "n": float(generator.random())}
        value = 10 + math.log2(settings["t"]) ** 2 + (settings["k"] == "b")
        dots.append(report.Dot(number, settings, value, True))
    parts = report.importances(dots, ["t", "k", "n"])
    assert parts["t"] > 0.6 > 0.3 > parts["k"] > 0.02 and parts["n"] < 0.1
    assert report.importances(dots[:4], ["t"]) == {}


def test_axes_place_numbers_orders_of_magnitude_and_names():
    assert [axis_of([1.0, 3.0]).place(value, 0, 100) for value in (1, 2, 3)] == [0, 50, 100]
    assert [round(axis_of([0.1, 10.0]).place(value, 0, 100)) for value in (0.1, 1, 10)] == [0, 50, 100]
    assert [axis_of(["a", "b"]).place(value, 0, 100) for value in ("a", "b")] == [25, 75]
    assert axis_of([2.0]).place(2.0, 0, 100) == 50


@pytest.mark.parametrize(
    ("workers", "threads", "number", "wanted"),
    [(1, None, 12, (0, 1, 4)), (2, None, 12, (0, 1, 4)), (1, None, 2, (0, 2, 2)), (1, 3, 12, (0, 3, 1)), (0, 8, 3, (0, 8, 1))],
)
def test_trials_share_this_machines_cores(monkeypatch, workers, threads, number, wanted):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    recipe = config.load(DEMO, [f"compute.workers={workers}", "compute.device=cpu", "compute.precision=fp32"])
    room = running.room_for(recipe, threads, number, False)
    assert (room.workers, room.threads, room.at_once) == wanted


def test_workers_that_a_space_asks_for_get_groups_that_fit(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    recipe = config.load(DEMO, ["compute.workers=2", "compute.device=cpu", "compute.precision=fp32"])
    room = running.room_for(recipe, None, 12, True)
    assert (room.workers, room.threads, room.at_once, room.cpus, room.resources) == (2, 1, 2, 4, {"CPU": 0.01})


# Real sweeps


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A pipeline's folder with tokens and a teacher, and its recipe."""
    folder = tmp_path_factory.mktemp("sweeps")
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    generator = np.random.default_rng(0)
    for number in range(24):
        squares = generator.integers(0, 4, (2, 2, 3)) * 85
        image = squares.astype(np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        Image.fromarray(image).save(folder / "images" / f"{number:02d}.png")
        Image.fromarray((image.mean(axis=2) > 127).astype(np.uint8)).save(folder / "masks" / f"{number:02d}.png")
    masks, images = {"images": f"{folder}/images", "masks": f"{folder}/masks"}, {"images": f"{folder}/images"}
    splits = ("train", "validation")
    values = {
        "run": str(folder / "first"),
        "size": 16,
        "tasks": {
            "segmentation": {"classes": ["bright"]} | dict.fromkeys(splits, masks),
            "colourise": {"copies": 2} | dict.fromkeys(splits, images),
        },
        "tokenizer": {"codes": 32, "steps": 1, "pictures": 64},
        "model": {"width": 16, "layers": 1, "heads": 2, "mlp": 32},
        "train": {
            "steps": 12,
            "batch": 4,
            "micro_batch": 4,
            "rate": 1e-2,
            "log_every": 4,
            "checkpoint_every": 4,
            "validation": 4,
        },
        "teacher": {"train": {"steps": 40}},
        "distill": {"temperature": 1.0},
        "compute": {"workers": 0, "threads": 1, "precision": "fp32", "device": "cpu"},
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    assert cli.main(["tokenize", str(recipe)]) == 0
    assert cli.main(["train", str(recipe), "--only", "teacher"]) == 0
    return folder


def pipeline_of(prepared: Path, name: str) -> tuple[str, Path]:
    """(recipe, folder) of another pipeline on the same tokens and teacher."""
    folder = prepared / name
    if not folder.exists():
        shutil.copytree(prepared / "first", folder)
    return str(prepared / "recipe.yaml"), folder


def tune(prepared: Path, name: str, space: str, *settings: str) -> dict[str, Any]:
    """Run a sweep in this process: its values."""
    recipe, folder = pipeline_of(prepared, name)
    return pipeline.tune(config.load(recipe, list(settings), str(folder)), space)


def without_times(values: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on the clock."""
    trials = [{key: value for key, value in one.items() if key != "seconds"} for one in values["trials"]]
    best = values["best"] and {key: value for key, value in values["best"].items() if key != "seconds"}
    return values | {"trials": trials, "best": best}


def of_best_recipe(folder: Path, place: Path) -> float:
    """What the winner's recipe comes to when `lvm-ray train` runs it: to the last digit what its trial came to."""
    assert cli.main(["train", str(folder / "best.yaml"), "--run", str(place / "again")]) == 0
    return math.exp(read_metrics(place / "again")[-1]["validation"])


FAILING = """
space = {"train.rate": tune.grid_search([1e-2, 1e30]), "distill.temperature": tune.grid_search([1.0, 2.0])}
best = 1
repeats = 2
"""


@pytest.mark.usefixtures("ray_session")
def test_a_sweep_tokenises_nothing_asks_no_teacher_and_bears_trials_that_fail(prepared, tmp_path, monkeypatch, capsys):
    path = space_file(tmp_path, FAILING, "failing")
    values = tune(prepared, "failing", path)
    states = [one["state"] for one in values["trials"]]
    assert states == ["finished", "finished", "failed", "failed", *["finished"] * 4]
    assert "the gradient is" in values["trials"][2]["reason"] or "the loss is" in values["trials"][2]["reason"]
    assert [one["kind"] for one in values["trials"][4:]] == ["repeat", "repeat", "reference", "reference"] or (
        [one["kind"] for one in values["trials"][4:]] == ["repeat", "repeat"]
    )
    assert [one["seed"] for one in values["trials"][4:]] == [1, 2] * 2
    assert values["counters"] == {"tokenised": 0, "teacher_forwards": 0} and values["complete"]
    folder = prepared / "failing" / "tune" / "failing"
    assert json.loads((folder / "sweep.json").read_text()) == values
    assert not (folder / ".ray").exists()
    page = (folder / "report.html").read_text()
    assert values["sentence"].replace("'", "&#39;") in page and "<script" not in page and "Pareto" not in page
    assert "trials" in capsys.readouterr().out

    assert of_best_recipe(folder, tmp_path) == values["best"]["objectives"]["target_perplexity"]

    # The same command starts nothing.
    monkeypatch.setattr(running, "run_trials", None)
    assert tune(prepared, "failing", path) == values
    with pytest.raises(UserError, match="holds trials of another recipe"):
        tune(prepared, "failing", path, "train.steps=8")
    with pytest.raises(UserError, match="holds trials of another space"):
        tune(prepared, "failing", space_file(tmp_path, TEMPERATURES, "failing"))


@pytest.mark.usefixtures("ray_session")
def test_tpe_goes_by_rounds_and_several_objectives(prepared, tmp_path):
    text = (
        'space = {"model.width": tune.choice([8, 16]), "distill.temperature": tune.loguniform(0.5, 4.0)}\nsearch = "tpe"\n'
        'trials = 4\nround = 2\nrepeats = 0\nobjectives = ["target_perplexity", "parameters", "majority_cost"]\n'
    )
    values = tune(prepared, "tpe", space_file(tmp_path, text, "tpe"))
    assert [one["kind"] for one in values["trials"]] == ["search"] * 4 + ["reference"]
    assert all(one["objectives"].keys() == {"target_perplexity", "parameters", "majority_cost"} for one in values["trials"])
    widths = {one["settings"].get("model.width", 16): one["objectives"]["parameters"] for one in values["trials"]}
    assert widths[16] > widths.get(8, 0) and "no result yet" in values["sentence"]
    folder = prepared / "tpe" / "tune" / "tpe"
    assert "several objectives" in (folder / "report.html").read_text()
    assert of_best_recipe(folder, tmp_path) == values["best"]["objectives"]["target_perplexity"]


@pytest.mark.usefixtures("ray_session")
def test_the_best_of_random_trials_is_found_again_by_its_recipe(prepared, tmp_path):
    text = 'space = {"train.rate": tune.loguniform(1e-4, 1e-2)}\ntrials = 2\nrepeats = 0\nreference = {}\n'
    values = tune(prepared, "random", space_file(tmp_path, text, "random"))
    drawn = [one["settings"]["train.rate"] for one in values["trials"] if one["kind"] == "search"]
    assert len(set(drawn)) == 2 and values["space"]["search"] == "random"
    found = of_best_recipe(prepared / "random" / "tune" / "random", tmp_path)
    assert found == values["best"]["objectives"]["target_perplexity"]


@pytest.mark.usefixtures("ray_session")
def test_asha_stops_trials_that_stay_stopped(prepared, tmp_path, monkeypatch):
    text = (
        'space = {"train.rate": tune.grid_search([1e-2, 1e-9, 2e-9, 3e-9, 4e-9])}\n'
        'stopping = "asha"\nrepeats = 0\nreference = {}\n'
    )
    path = space_file(tmp_path, text, "asha")
    values = tune(prepared, "asha", path, "train.steps=54")
    stopped = [one for one in values["trials"] if one["state"] == "stopped"]
    assert stopped and all(one["step"] < 54 and "not among the best" in one["reason"] for one in stopped)
    assert values["best"]["number"] == 0 and values["trials"][0]["state"] == "finished"
    assert of_best_recipe(prepared / "asha" / "tune" / "asha", tmp_path) == values["best"]["objectives"]["target_perplexity"]
    monkeypatch.setattr(running, "run_trials", None)
    assert tune(prepared, "asha", path, "train.steps=54") == values


@pytest.mark.usefixtures("ray_session")
def test_a_population_finds_a_schedule_that_trained_from_nothing_is_the_same(prepared, tmp_path):
    text = (
        'space = {"balance.shares.segmentation": tune.uniform(0.1, 1.0), "balance.shares.colourise": tune.uniform(0.1, 1.0)}\n'
        'search = "population"\ntrials = 4\ngenerations = 2\nbest = 4\nrepeats = 0\n'
    )
    values = tune(prepared, "population", space_file(tmp_path, text, "population"))
    trials = values["trials"]
    assert [(one["kind"], one["until"]) for one in trials[:8]] == [("search", until) for until in (6, None) for _ in range(4)]
    assert {one["state"] for one in trials} == {"finished"}
    assert sum(one["parent"] != one["number"] - 4 for one in trials[4:8]) == 1
    again = {json.dumps(one["settings"]): one["objectives"] for one in trials if one["kind"] == "again"}
    assert any(len(one["settings"]["balance.schedule"]) > 1 for one in trials[4:8])
    for one in trials[4:8]:
        assert one["objectives"] == again[json.dumps(one["settings"])]
    assert values["again"] == values["best"]["objectives"]["target_perplexity"]
    assert values["counters"] == {"tokenised": 0, "teacher_forwards": 0}


LONG = ("train.steps=200", "train.checkpoint_every=20")


def kill_trials_at(folder: Path, steps: list[int]) -> None:
    """End the processes of trials each time that a run's journal has reached the next of these steps."""
    for step in steps:
        while reached(folder) < step:
            time.sleep(0.05)
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::ImplicitFunc"):
                    process.kill()


@pytest.mark.usefixtures("ray_session")
def test_a_trial_whose_process_dies_twice_has_failed_and_the_sweep_goes_on(prepared, tmp_path):
    path = space_file(tmp_path, KILLED.replace("[0.5, 1.0, 2.0]", "[0.5, 1.0]"), "dying")
    recipe, folder = pipeline_of(prepared, "dying")
    run = folder / "tune" / "dying" / "trials" / "00000"
    killer = threading.Thread(target=kill_trials_at, args=(run, [40, 80]), daemon=True)
    killer.start()
    threads = os.cpu_count() or 1  # one trial at a time
    values = pipeline.tune(config.load(recipe, [f"compute.threads={threads}", *LONG], str(folder)), path)
    killer.join(5)
    assert [one["state"] for one in values["trials"]] == ["failed", "finished"]
    assert "its process was ended" in values["trials"][0]["reason"] and values["trials"][0]["step"] >= 80
    assert values["best"]["number"] == 1
    import ray

    began = time.monotonic()
    while ray.available_resources()["CPU"] < ray.cluster_resources()["CPU"]:
        assert time.monotonic() - began < 30, "the dead process's place is still taken"
        time.sleep(0.2)


KILLED = """
space = {"distill.temperature": tune.grid_search([0.5, 1.0, 2.0])}
repeats = 0
reference = {"distill.temperature": 1.0}
"""


def command(prepared: Path, name: str, space: str, *settings: str) -> list[str]:
    recipe, folder = pipeline_of(prepared, name)
    changes = [part for setting in settings for part in ("--set", setting)]
    return [sys.executable, "-m", "lvm_ray", "tune", recipe, "--space", space, "--run", str(folder), *changes]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **changes}


def reached(folder: Path) -> int:
    """The last step of a run's journal."""
    lines = read_metrics(folder)
    return lines[-1]["step"] if lines else 0


@pytest.mark.usefixtures("ray_session")
def test_a_driver_that_is_killed_twice_goes_on_to_the_same_sweep(prepared, tmp_path):
    path = space_file(tmp_path, KILLED, "killed")
    whole = tune(prepared, "whole", path, *LONG)
    trials = pipeline_of(prepared, "killed")[1] / "tune" / "killed" / "trials"
    kept: dict[str, int] = {}
    for wanted in (0, 2):
        process = subprocess.Popen(command(prepared, "killed", path, *LONG), env=environment(), stdout=subprocess.DEVNULL)
        began = time.monotonic()
        while reached(trials / f"{wanted:05d}") < 60:
            assert process.poll() is None and time.monotonic() - began < 120
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (trials / f"{wanted:05d}" / "model").exists()
        kept |= {str(one): one.stat().st_mtime_ns for one in trials.glob("*/model/model.safetensors")}
    assert kept  # some trial was over by then
    values = tune(prepared, "killed", path, *LONG)
    assert without_times(values) == without_times(whole)
    assert all(Path(name).stat().st_mtime_ns == changed for name, changed in kept.items())


TOGETHER = """
import json, os, subprocess, sys, time
from lvm_ray import ray_session
ray_session.start(2)
import ray
from ray._private.state import actors  # what Ray's state API asks, whose own server is not among our dependencies
from ray.util import placement_group_table
env = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
running = [subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) for command in json.loads(sys.argv[1])]
codes = [process.wait(timeout=200) for process in running]
for _ in range(60):
    all_actors, all_groups = actors().values(), placement_group_table().values()
    left = [one["ActorClassName"] for one in all_actors if one["State"] != "DEAD"]
    groups = [one["placement_group_id"] for one in all_groups if one["state"] != "REMOVED"]
    free = ray.available_resources().get("CPU", 0) == ray.cluster_resources()["CPU"]
    if not left and not groups and free:
        break
    time.sleep(0.5)
found = {"codes": codes, "actors": left, "groups": groups, "free": free}
print(json.dumps(found | {"known": [len(all_actors) > 0, len(all_groups) > 0]}))
ray_session.shutdown()
"""


def test_two_sweeps_on_one_cluster_end_and_leave_nothing(prepared, tmp_path):
    path = space_file(tmp_path, KILLED, "together")
    commands = [command(prepared, name, path) for name in ("one", "other")]
    found = subprocess.run(
        [sys.executable, "-c", TOGETHER, json.dumps(commands)], env=environment(), capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout.splitlines()[-1]) == {
        "codes": [0, 0],
        "actors": [],
        "groups": [],
        "free": True,
        "known": [True, True],  # so that nothing left is not nothing seen
    }
    values = [json.loads((prepared / name / "tune/together/sweep.json").read_text()) for name in ("one", "other")]
    assert without_times(values[0]) == without_times(values[1]) and len(values[0]["trials"]) == 3


def test_a_dry_run_lists_trials_and_cost_and_leaves_nothing(prepared, tmp_path, capsys):
    recipe, folder = pipeline_of(prepared, "dry")
    path = space_file(tmp_path, KILLED, "dry")
    assert cli.main(["tune", recipe, "--space", path, "--run", str(folder), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for words in ("trial 2: T=2", "to compare with", "of this machine a training", "0 of them are over"):
        assert words in out
    assert not (folder / "tune").exists()


def test_more_copies_than_were_tokenised_are_refused_before_any_trial(prepared, tmp_path, capsys):
    recipe, folder = pipeline_of(prepared, "refused")
    path = space_file(tmp_path, 'space = {"balance.ratios.colourise": tune.uniform(1.0, 3.0)}', "ratios")
    assert cli.main(["tune", recipe, "--space", path, "--run", str(folder)]) == 2
    line = capsys.readouterr().err
    assert path in line and "2 copies were tokenised" in line
    assert not (folder / "tune" / "ratios" / "trials").exists()


def test_resources_that_a_machine_lacks_are_refused_before_any_trial(prepared, tmp_path, capsys):
    recipe, folder = pipeline_of(prepared, "refused")
    path = space_file(tmp_path, TEMPERATURES, "resources")
    assert cli.main(["tune", recipe, "--space", path, "--run", str(folder), "--set", "compute.device=cuda"]) == 2
    assert "compute.device: cuda" in capsys.readouterr().err
    assert not (folder / "tune" / "resources" / "trials").exists()
