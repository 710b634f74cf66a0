"""The learning rate: warmup, peak, cosine or plateau, end."""

import itertools
import math

import pytest

from lvm_ray.recipe_sections import TrainSection
from lvm_ray.train.schedule import rate_factor


def rates(steps, warmup, final_rate, **changes):
    section = TrainSection(steps=steps, warmup=warmup, final_rate=final_rate, **changes)
    return [rate_factor(step, section) for step in range(steps)]


def test_rises_linearly_to_the_peak_and_the_first_step_moves():
    for schedule in ("cosine", "wsd"):
        found = rates(100, 0.1, 0.1, schedule=schedule)
        assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
        assert found[10] == 1


def test_falls_along_a_cosine_to_the_final_rate():
    found = rates(101, 0.0, 0.2)
    assert found[0] == 1
    assert found[-1] == pytest.approx(0.2)
    assert found[50] == pytest.approx(0.6)
    assert found[25] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert all(later <= earlier for earlier, later in itertools.pairwise(found))


def test_wsd_stays_at_the_peak_and_falls_straight_to_the_final_rate():
    found = rates(100, 0.05, 0.1, schedule="wsd", decay=0.2)
    assert found[4:80] == [1.0] * 76
    assert found[80:] == pytest.approx([0.1 + 0.9 * left / 20 for left in range(19, -1, -1)])
    assert found[-1] == pytest.approx(0.1)


def test_wsd_without_warmup_starts_at_the_peak():
    assert rates(10, 0.0, 0.0, schedule="wsd", decay=0.5) == pytest.approx([1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0])


def test_wsd_that_decays_from_the_first_step_on():
    assert rates(4, 0.0, 0.0, schedule="wsd", decay=1.0) == pytest.approx([0.75, 0.5, 0.25, 0])


def test_where_warmup_and_decay_meet_the_lower_of_both_holds():
    assert rates(8, 0.5, 0.0, schedule="wsd", decay=1.0) == pytest.approx([0.25, 0.5, 0.625, 0.5, 0.375, 0.25, 0.125, 0])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0.0, 0.0056, 0.25, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 3, 17])
def test_stays_between_zero_and_the_peak_for_short_runs(steps, warmup, schedule):
    assert all(0 < factor <= 1 for factor in rates(steps, warmup, 0.1, schedule=schedule))


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_final_rate_of_one_is_constant(schedule):
    assert set(rates(9, 0.0, 1.0, schedule=schedule)) == {1.0}
