"""Ray Tune's domains as a sweep needs them: checked, with ends, drawn from, in words."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

DIGITS = 4  # of a number that is drawn: more decide nothing, and nobody can read them


@dataclass(frozen=True)
class Grid:
    """Values that are tried one by one: Ray Tune's grid_search."""

    values: list[Any]


def checked(key: str, value: Any) -> Any:
    """A value of the space. Raises ValueError where a domain has no ends, or nothing between them."""
    if isinstance(value, dict) and set(value) == {"grid_search"}:
        if not isinstance(value["grid_search"], list) or not value["grid_search"]:
            raise ValueError(f"{key}: grid_search takes a list of at least one value")
        return Grid(value["grid_search"])
    if not is_varied(value):
        return value
    if hasattr(value, "categories"):
        if not value.categories:
            raise ValueError(f"{key}: choice takes a list of at least one value")
        return value
    if value.is_function():
        raise ValueError(f"{key}: sample_from draws by itself, so the same command would not list the same trials: use a domain")
    low, high = getattr(value, "lower", -math.inf), getattr(value, "upper", math.inf)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{key}: a domain without ends cannot be checked: use tune.uniform or tune.loguniform")
    if not low < high:
        raise ValueError(f"{key}: the range from {low:g} to {high:g} is empty: give the smaller number first")
    return value


def is_varied(value: Any) -> bool:
    """Whether a value of a space is a domain or a grid."""
    return isinstance(value, Grid) or (hasattr(value, "sample") and hasattr(value, "get_sampler"))


def is_list(value: Any) -> bool:
    """Whether it is a list of single values."""
    return isinstance(value, Grid) or hasattr(value, "categories")


def step_of(domain: Any) -> float | None:
    """The step of a quantised domain."""
    return getattr(domain.get_sampler(), "q", None)


def is_log(domain: Any) -> bool:
    """Whether a domain's orders of magnitude are equally likely."""
    sampler = domain.get_sampler()
    return type(getattr(sampler, "sampler", sampler)).__name__.lstrip("_") == "LogUniform"


def is_whole(domain: Any) -> bool:
    """Whether a domain holds whole numbers alone."""
    return isinstance(domain.cast(1), int)


def ends(value: Any) -> list[Any]:
    """Every value of a choice or a grid, the two ends of a range."""
    if isinstance(value, Grid):
        return value.values
    if hasattr(value, "categories"):
        return list(value.categories)
    low, high, step = value.lower, value.upper, step_of(value)
    if is_whole(value) and step in (None, 1):
        return [low, high - 1]  # as Ray Tune counts
    return [tidied(value, low), tidied(value, high)]


def tidied(domain: Any, value: float) -> Any:
    """A drawn number as a recipe shows it: whole, on its step, or in few digits, and not beyond the domain's ends."""
    step = step_of(domain)
    if step:
        inside = min(max(round(value / step), math.ceil(domain.lower / step - 1e-9)), math.floor(domain.upper / step + 1e-9))
        value = float(f"{inside * step:.12g}")
    elif not is_whole(domain):
        value = min(max(float(f"{value:.{DIGITS}g}"), domain.lower), domain.upper)
    return domain.cast(value)


def draw(domain: Any, generator: np.random.Generator) -> Any:
    """A value of a domain of Ray Tune."""
    value = domain.sample(random_state=generator)
    return value if hasattr(domain, "categories") else tidied(domain, value)


def text_of(value: Any) -> Any:
    """A value of a space in words; a plain value as it is."""
    if is_list(value):
        return f"one of {json.dumps(ends(value))}"
    if not is_varied(value):
        return value
    low, high = ends(value)
    step = step_of(value)
    return (
        f"{low:g} to {high:g}" + (" by orders of magnitude" if is_log(value) else "") + (f" in steps of {step:g}" if step else "")
    )
