"""The pure part of evaluation: scores, intervals, floors and progress as arithmetic."""

import math

import numpy as np
import pytest

from lvm_ray.evaluate.floors import unigram_measure
from lvm_ray.evaluate.statistics import (
    Reference,
    best,
    bootstrap,
    interval,
    progress,
    resampled_token_scores,
    rounded,
    task_entries,
    token_measure,
    token_scores,
)
from tests.toys import Invert


def test_progress_is_the_part_of_the_way_from_floor_to_ceiling():
    assert progress(20.0, 15.0, 25.0) == 0.5
    assert progress(0.3, 0.4, 0.1) == pytest.approx(1 / 3)  # a metric that falls
    assert progress(10.0, 15.0, 25.0) == -0.5
    assert progress(1.0, 2.0, 2.0) is None
    assert progress(1.0, None, 2.0) is None and progress(1.0, 2.0, None) is None and progress(None, 1.0, 2.0) is None


def test_the_best_floor_is_the_highest_or_the_lowest_and_has_a_name():
    scores = {"copied": 1.0, "grey": 3.0, "broken": math.nan, "also three": 3.0}
    assert best(scores, higher_is_better=True) == (3.0, "also three")
    assert best(scores, higher_is_better=False) == (1.0, "copied")
    assert best({"broken": math.nan}, higher_is_better=True) == (None, None)


def test_bootstrap_draws_are_seeded_uniform_and_with_replacement():
    draws = bootstrap(50, 2000, seed=1)
    assert draws.shape == (2000, 50) and draws.dtype == np.int64 and draws.min() == 0 and draws.max() == 49
    assert (draws == bootstrap(50, 2000, seed=1)).all() and (draws != bootstrap(50, 2000, seed=2)).any()
    distinct = np.mean([len(np.unique(row)) for row in draws])
    assert distinct == pytest.approx(50 * (1 - (1 - 1 / 50) ** 50), rel=0.01)


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation():
    values = np.random.default_rng(0).normal(10, 2, 400)
    low, high = interval(values[bootstrap(400, 4000, seed=0)].mean(1))
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.02) and high == pytest.approx(values.mean() + half, abs=0.02)


def test_resamples_without_a_score_are_left_out_of_the_interval():
    assert interval(np.array([np.nan, 1.0, 1.0])) == [1.0, 1.0]
    assert interval(np.array([np.nan, np.nan])) == [None, None]


def test_perplexity_is_pooled_over_tokens_not_averaged_over_items():
    short = token_measure(np.array([math.log(4)]), np.array([True]))
    long = token_measure(np.full(3, math.log(2)), np.array([True, False, False]))
    assert token_scores([short, long])["target_perplexity"] == pytest.approx(math.exp((math.log(4) + 3 * math.log(2)) / 4))
    assert token_scores([short, long])["token_accuracy"] == 0.5
    resampled = resampled_token_scores([short, long], np.array([[0, 0], [1, 1], [0, 1]]))
    np.testing.assert_allclose(resampled["target_perplexity"], [4, 2, token_scores([short, long])["target_perplexity"]])


def test_the_unigram_is_the_smoothed_frequency_of_training_codes():
    counts = np.array([6, 0, 2])
    measure = unigram_measure(counts, np.array([[0, 1], [2, 0]], np.uint16))
    expected = [7 / 11, 1 / 11, 3 / 11, 7 / 11]
    assert measure == {"tokens": 4, "nll": pytest.approx(-sum(math.log(p) for p in expected)), "correct": 2}


def test_numbers_are_rounded_and_what_is_no_number_is_null():
    assert rounded({"a": [1 / 3, math.nan, math.inf], "b": -1e-9, "c": 3, "d": None, "e": "x"}) == {
        "a": [0.333333, None, None],
        "b": 0.0,
        "c": 3,
        "d": None,
        "e": "x",
    }
    assert math.copysign(1, rounded(-1e-9)) == 1


def test_an_entry_has_the_fields_of_the_contract():
    errors = np.random.default_rng(0).uniform(0, 10, 30)
    tokens = [token_measure(np.ones(4), np.array([True, True, False, False]))] * 30
    references = {
        "error": Reference(20.0, "grey", 0.0),
        "target_perplexity": Reference(5.0, "unigram", None),
        "token_accuracy": Reference(0.1, "unigram", None),
    }
    entries = task_entries(Invert(), [{"error": float(error)} for error in errors], tokens, references, resamples=500, seed=0)
    assert set(entries) == set(references)
    entry = entries["error"]
    assert set(entry) == {"value", "ci95", "n", "floor", "floor_name", "ceiling", "progress", "higher_is_better"}
    assert entry["value"] == pytest.approx(errors.mean()) and entry["ci95"][0] < errors.mean() < entry["ci95"][1]
    assert entry["n"] == 30 and entry["progress"] == pytest.approx((errors.mean() - 20) / -20) and not entry["higher_is_better"]
    perplexity = entries["target_perplexity"]
    assert perplexity["value"] == pytest.approx(math.e) and perplexity["progress"] is None and perplexity["ceiling"] is None
    assert entries["token_accuracy"]["value"] == 0.5 and entries["token_accuracy"]["higher_is_better"]
