"""Several people's skeletons out of one picture: where their joints are, and which belong together.

Discs of a joint's colour give places (`find_joints`), and the bones between them say who is whose (`gather`): for each kind of
bone the joints of its two ends are assigned to each other so that the bones are drawn best and are shortest; the best supported
ones join people together, never giving anybody a joint twice. (The order of Cao et al. 2017, whose part affinities a network
gives; here a bone is seen in the picture.)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, maximum_filter
from scipy.optimize import linear_sum_assignment

REACH = 1.25  # radii from the densest place within which a colour belongs to the disc
LEAST_SUPPORT = 0.5  # part of a bone's length that must be drawn
SHARED_SUPPORT = 0.9  # the same, for a joint that another person has already
SAMPLES = 24  # places at which a bone is looked for
NO_BONE = 1e3  # the cost of what is no bone


class Joint(NamedTuple):
    """A joint in a picture: its kind 0..16, its centre in pixels, and how much of a whole disc is there, 0..1."""

    kind: int
    x: float
    y: float
    confidence: float


def find_joints(
    weight_HW: NDArray[np.floating], kind: int, radius: float, faintest: float, most: int | None = None
) -> list[Joint]:
    """The discs of one colour, at most so many, the densest first. `weight_HW` says how much of the colour each pixel is, 0..1.

    The densest place gives a disc its centre of mass within a disc's reach; what belongs to it is taken away before the next
    is looked for. `faintest` is the part of a whole disc below which there is none.
    """
    full = math.pi * radius**2
    found: list[Joint] = []
    there = np.argwhere(weight_HW > 0)
    if not len(there):
        return found
    (top, left), (bottom, right) = there.min(axis=0), there.max(axis=0) + 1
    left_HW = np.array(weight_HW[top:bottom, left:right], dtype=np.float64)
    rows, columns = np.mgrid[top:bottom, left:right]
    while left_HW.sum() >= faintest * full and len(found) != most:
        smooth_HW = gaussian_filter(left_HW, radius / 2, mode="constant")
        place = np.unravel_index(int(smooth_HW.argmax()), smooth_HW.shape)
        near_HW = np.where(np.hypot(rows - rows[place], columns - columns[place]) <= REACH * radius, left_HW, 0)
        mass = float(near_HW.sum())
        if mass < faintest * full:
            break
        x, y = float((near_HW * (columns + 0.5)).sum() / mass), float((near_HW * (rows + 0.5)).sum() / mass)
        found.append(Joint(kind, x, y, min(1.0, mass / full)))
        left_HW = np.where(np.hypot(rows + 0.5 - y, columns + 0.5 - x) <= REACH * radius, 0, left_HW)
    return found


def support(drawn_HW: NDArray[np.bool_], one: Joint, other: Joint, radius: float) -> float:
    """The part of the way between two joints, beyond their discs, on which something is drawn; 1 where the discs meet."""
    length = math.hypot(other.x - one.x, other.y - one.y)
    if length <= 2 * radius:
        return 1.0
    way = np.linspace(radius / length, 1 - radius / length, SAMPLES)
    x, y = one.x + (other.x - one.x) * way, one.y + (other.y - one.y) * way
    height, width = drawn_HW.shape
    return float(drawn_HW[np.clip(y, 0, height - 1).astype(int), np.clip(x, 0, width - 1).astype(int)].mean())


def gather(joints: list[Joint], bones: list[tuple[int, int]], drawn_HW: NDArray[np.bool_], radius: float) -> list[list[Joint]]:
    """Joints by person, people with the most joints first. `drawn_HW` says where anything is drawn.

    A disc that two people need, since their joints lie upon each other, is given to both.
    """
    drawn_HW = maximum_filter(drawn_HW, size=3)  # a line of a pixel's width is missed by half a pixel
    of_kind: dict[int, list[int]] = {}
    for number, joint in enumerate(joints):
        of_kind.setdefault(joint.kind, []).append(number)
    size = max(drawn_HW.shape)
    edges: list[tuple[float, int, int]] = []
    for first, second in bones:
        ones, others = of_kind.get(first, []), of_kind.get(second, [])
        if not ones or not others:
            continue
        cost = np.full((len(ones), len(others)), NO_BONE)
        for row, a in enumerate(ones):
            for column, b in enumerate(others):
                seen = support(drawn_HW, joints[a], joints[b], radius)
                if seen >= LEAST_SUPPORT:
                    length = math.hypot(joints[a].x - joints[b].x, joints[a].y - joints[b].y)
                    cost[row, column] = 2 * (1 - seen) + length / size
        for row, column in zip(*linear_sum_assignment(cost), strict=True):
            if cost[row, column] < NO_BONE:
                edges.append((float(cost[row, column]), ones[row], others[column]))
    people = [{joint.kind: number} for number, joint in enumerate(joints)]
    member = list(range(len(joints)))
    for _, a, b in sorted(edges):
        one, other = member[a], member[b]
        if one == other or people[one].keys() & people[other].keys():
            continue
        people[one] |= people[other]
        for number in people[other].values():
            member[number] = one
        people[other] = {}
    for person in [person for person in people if len(person) > 1]:
        for first, second in [*bones, *((second, first) for first, second in bones)]:
            if first in person and second not in person:
                near = [(support(drawn_HW, joints[person[first]], joints[b], radius), b) for b in of_kind.get(second, [])]
                seen, shared = max(near, default=(0.0, 0))
                if seen >= SHARED_SUPPORT:
                    person[second] = shared
    groups = [[joints[number] for _, number in sorted(person.items())] for person in people if person]
    return sorted(groups, key=lambda group: -len(group))
