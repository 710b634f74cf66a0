"""The most central of several answers."""

import numpy as np

from lvm_ray.evaluate.answer import most_central

SIDE = 32


def spot(x: int, y: int) -> np.ndarray:
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    picture[y - 2 : y + 3, x - 2 : x + 3] = (255, 40, 0)
    return picture


def test_the_answer_most_agree_with_is_the_central_one():
    pictures = np.stack([spot(26, 6), spot(8, 20), spot(9, 20), spot(8, 21), spot(20, 26)])
    assert most_central(pictures) in (1, 2, 3)


def test_answers_that_lie_side_by_side_agree():
    # Sharply seen, the two equal ones on the right would win: a spot shares 2 of its 5 rows with its neighbour.
    pictures = np.stack([spot(8, 13), spot(8, 16), spot(8, 19), spot(24, 16), spot(24, 16)])
    assert most_central(pictures) == 1


def test_of_equal_answers_the_first_is_given():
    assert most_central(np.stack([spot(9, 9)] * 3)) == 0
    assert most_central(spot(9, 9)[None]) == 0
