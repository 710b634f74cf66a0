"""The learning rate: warmup, peak, cosine, end."""

import itertools
import math

import pytest

from lvm_ray.train.schedule import rate_factor


def test_rises_linearly_to_the_peak_and_the_first_step_moves():
    rates = [rate_factor(step, 100, 0.1, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1


def test_falls_along_a_cosine_to_the_final_rate():
    rates = [rate_factor(step, 101, 0.0, 0.2) for step in range(101)]
    assert rates[0] == 1
    assert rates[-1] == pytest.approx(0.2)
    assert rates[50] == pytest.approx(0.6)
    assert rates[25] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates))


@pytest.mark.parametrize("warmup", [0.0, 0.0056, 0.25, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 3, 17])
def test_stays_between_zero_and_the_peak_for_short_runs(steps, warmup):
    for step in range(steps):
        assert 0 < rate_factor(step, steps, warmup, 0.1) <= 1


def test_a_final_rate_of_one_is_constant():
    assert {rate_factor(step, 9, 0.0, 1.0) for step in range(9)} == {1.0}
