"""The base of every recipe section: strict types, unknown keys refused, values that cannot change."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


class Section(BaseModel):
    """A part of a recipe. Every field is documented by its `description`; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class NestedProblem(ValueError):
    """A problem of a section inside another, as `key: what was found`: the outer section's key goes before it."""


def first_problem(error: ValidationError, model: type[Any]) -> str:
    """The first problem of a validation as `key: what was found and what is possible`."""
    problem = error.errors()[0]
    place = [str(part) for part in problem["loc"] if part != "[key]"]
    key = ".".join(place)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        known = sorted(_section_at(model, place[:-1]).model_fields)
        close = difflib.get_close_matches(place[-1], known, n=1)
        return f"{key}: no such key; " + (f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}")
    if problem["type"] == "missing":
        return f"{key}: missing, and it has no default"
    if problem["type"] == "value_error":
        nested = isinstance(problem.get("ctx", {}).get("error"), NestedProblem)
        return f"{key}.{message}" if nested and key else f"{key}: {message}".removeprefix(": ")
    found = problem["input"]
    return f"{key}: found {found!r}: {message[0].lower()}{message[1:]}"


def _section_at(model: type[Any], place: list[str]) -> type[Any]:
    for part in place:
        annotation = model.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        found = [option for option in options if isinstance(option, type) and issubclass(option, Section)]
        if not found:
            return model
        model = found[0]
    return model
