"""Comparing two runs: against brute force, under the hypothesis that they are equal, and by the verb."""

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from lvm_ray import cli, config
from lvm_ray.errors import UserError
from lvm_ray.evaluate.compare import compare, paired
from lvm_ray.storage import short_names
from lvm_ray.tasks.base import Sample
from lvm_ray.tasks.derain import Derain
from lvm_ray.tasks.segmentation import Segmentation

from .test_skeletons import everybody, noisy, scene

RAIN = Derain()
MASKS = Segmentation(classes=["thing"])


def photos(values):
    return [{"psnr_y": float(value), "ssim_y": float(value) / 50} for value in values]


def masks(pairs):
    return [{"intersection": [a], "union": [b]} for a, b in pairs]


def test_equal_runs_differ_by_nothing():
    answers = photos([20, 25, 30])
    entry = paired(RAIN, answers, answers, tokens=False, seed=0)["psnr_y"]
    assert entry["difference"] == 0 and entry["ci95"] == [0, 0] and entry["p"] == 1 and entry["n"] == 3


def test_a_difference_of_means_is_what_all_exchanges_say():
    """Of 6 items there are 64 exchanges: the share of those that part the means as far."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(25, 2, 6), rng.normal(26, 2, 6)
    entry = paired(RAIN, photos(first), photos(second), tokens=False, seed=0, resamples=20_000)["psnr_y"]
    gaps = second - first
    after = [abs(np.mean(gaps * signs)) for signs in itertools.product((1, -1), repeat=6)]
    assert entry["p"] == pytest.approx(np.mean(np.array(after) >= abs(gaps.mean()) - 1e-9), abs=0.015)
    assert entry["difference"] == pytest.approx(gaps.mean())
    low, high = entry["ci95"]
    assert low < gaps.mean() < high and high - low == pytest.approx(2 * 1.96 * gaps.std() / 6**0.5, rel=0.15)


def test_a_pooled_score_is_exchanged_item_by_item():
    first, second = masks([(8, 10), (2, 10), (90, 100)]), masks([(9, 10), (6, 10), (91, 100)])

    def miou(measures):
        return sum(m["intersection"][0] for m in measures) / sum(m["union"][0] for m in measures)

    observed = miou(second) - miou(first)
    after = []
    for swaps in itertools.product((False, True), repeat=3):
        pairs = [(b, a) if swap else (a, b) for swap, a, b in zip(swaps, first, second, strict=True)]
        after.append(miou([b for _, b in pairs]) - miou([a for a, _ in pairs]))
    entry = paired(MASKS, first, second, tokens=False, seed=0, resamples=20_000)["miou"]
    assert entry["difference"] == pytest.approx(observed)
    assert entry["p"] == pytest.approx(np.mean(np.abs(after) >= abs(observed) - 1e-9), abs=0.015)


def test_p_values_of_equally_good_runs_are_spread_evenly():
    rng = np.random.default_rng(1)
    found = []
    for seed in range(200):
        hard = rng.normal(25, 5, 20)  # items differ more than runs: what pairing takes out
        runs = [photos(hard + rng.normal(0, 1, 20)) for _ in range(2)]
        found.append(paired(RAIN, *runs, tokens=False, seed=seed, resamples=199)["psnr_y"]["p"])
    assert np.mean(np.array(found) <= 0.05) == pytest.approx(0.05, abs=0.045)
    assert np.mean(found) == pytest.approx(0.5, abs=0.08)


def test_pairing_sees_what_two_intervals_do_not():
    hard = np.linspace(10, 40, 30)
    entry = paired(RAIN, photos(hard), photos(hard + 0.5), tokens=False, seed=0)["psnr_y"]
    assert entry["p"] < 0.001 and entry["ci95"] == pytest.approx([0.5, 0.5])


def make_run(folder, measures, tokenizer="t", examples=3, items="{:03d}"):
    folder.mkdir()
    recipe = {"run": str(folder), "seed": 3, "tasks": {"derain": {}}}
    (folder / "config.yaml").write_text(config.dump(config.Recipe.model_validate(recipe)))
    (folder / "evaluation.json").write_text(json.dumps({"tokenizer": tokenizer, "examples": examples, "tasks": {}}))
    rows = [
        {
            "task": "derain",
            "item": items.format(number),
            "measures": json.dumps(one | {"answer_tokens": {"tokens": 4, "nll": 4.0 + number, "correct": 2}}),
        }
        for number, one in enumerate(measures)
    ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "items.parquet")
    return str(folder)


def test_the_verb_prints_and_keeps_the_comparison(tmp_path, capsys):
    first = make_run(tmp_path / "a", photos([20, 21, 22, 23, 24, 25, 26, 30]))
    second = make_run(tmp_path / "b", photos([21, 22, 23, 24, 25, 26, 27]), examples=5)
    assert cli.main(["compare", first, second, "--out", str(tmp_path / "found.json")]) == 0
    shown = capsys.readouterr()
    assert "psnr_y" in shown.out + shown.err and "better" in shown.out + shown.err
    found = json.loads((tmp_path / "found.json").read_text())
    entry = found["tasks"]["derain"]["psnr_y"]
    assert entry["n"] == 7 and entry["difference"] == pytest.approx(1) and entry["p"] < 0.05
    assert found["tasks"]["derain"]["target_perplexity"]["difference"] == 0
    assert found["remarks"] == [
        "the two differ in evaluate.examples, the examples shown: 3 and 5",
        "derain: 1 items left out, which only one has answered",
    ]


def test_names_are_what_the_paths_differ_in():
    assert short_names("runs/a/student", "runs/b/student") == ("a", "b")
    assert short_names("/x/demo/teacher", "/x/demo/student") == ("teacher", "student")
    assert short_names("runs/a", "runs/a/b") == ("runs/a", "runs/a/b")
    assert short_names("x/a/student", "x/b/student", "x/b/teacher") == ("a/student", "b/student", "b/teacher")


def test_tokens_of_other_tokenizers_are_not_compared(tmp_path):
    found = compare(make_run(tmp_path / "a", photos([20, 21])), make_run(tmp_path / "b", photos([21, 22]), tokenizer="u"))
    assert set(found["tasks"]["derain"]) == {"psnr_y", "ssim_y"} and "different tokenizers" in found["remarks"][0]


def test_runs_that_cannot_be_compared_are_refused_by_name(tmp_path, capsys):
    run = make_run(tmp_path / "a", photos([20, 21]))
    (tmp_path / "b").mkdir()
    assert cli.main(["compare", run, str(tmp_path / "b")]) == 2
    assert "b/evaluation.json: no such file: name a run's folder" in capsys.readouterr().err
    other = make_run(tmp_path / "c", photos([20, 21]), items="other {}")
    with pytest.raises(UserError, match="no item that both have answered"):
        compare(run, other)
    (tmp_path / "a" / "items.parquet").write_bytes(b"PAR1 no longer")
    with pytest.raises(UserError, match=r"a/items\.parquet: cannot be read"):
        compare(run, run)


def test_runs_of_several_people_are_compared():
    """COCO's evaluation is asked about two runs' people at once."""
    rng = np.random.default_rng(0)
    blank = np.zeros((256, 256, 3), np.uint8)
    labels = [scene(seed, count=2) for seed in range(8)]
    task = everybody()
    runs = [[task.measure(noisy(label, rng, noise), Sample(blank, label)) for label in labels] for noise in (10.0, 3.0)]
    found = paired(task, *runs, tokens=False, seed=0, resamples=50)
    for metric in ("ap", "ar", "pck"):
        assert found[metric]["first"] == pytest.approx(task.score(runs[0])[metric])
        assert found[metric]["second"] == pytest.approx(task.score(runs[1])[metric])
    assert found["pck_0.05"]["difference"] > 0


def test_tasks_whose_scores_mean_different_things_are_left_out(tmp_path):
    first, second = (make_run(tmp_path / name, photos([20, 21])) for name in "ab")
    for run, classes in ((first, ["one"]), (second, ["one", "two"])):
        values = config.to_dict(config.load(f"{run}/config.yaml"))
        values["tasks"]["segmentation"] = {"classes": classes}
        Path(run, "config.yaml").write_text(config.dump(config.Recipe.model_validate(values)))
    found = compare(first, second)
    assert list(found["tasks"]) == ["derain"] and "segmentation left out" in found["remarks"][0]
