"""A verb's arguments, as its own parser has read them, become what is sent: words, files, and no place that cannot be reached."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from lvm_ray.cluster import submission
from lvm_ray.cluster.package import wheel
from lvm_ray.cluster.submission import Submission
from lvm_ray.config import Recipe
from lvm_ray.errors import UserError
from lvm_ray.storage import has_credentials, is_folder, is_uri


def submission_of(sent: Namespace, recipe: Recipe | None, name: str | None, here: bool) -> Submission:
    """What is sent of a verb's options; `recipe` where they name one, `name` where the user chose one. `here`: to this machine,
    where code, files and folders are as they are.

    Raises UserError where the arguments name a place that the job could not reach, or hold credentials.
    """
    if any(has_credentials(word) for word in words(sent)):
        raise UserError("the arguments hold a URI with credentials: leave them out, the job's machine has to have its own")
    travelling: dict[str, Path] = {}
    if not here:
        places = {} if recipe is None else submission.places(recipe, sent.verb)
        submission.require_reachable({f"{sent.recipe}: {key}": place for key, place in places.items()} | _folders(sent))
        travelling = _files(sent)
    arguments = words(Namespace(**vars(sent) | {key: path.name for key, path in travelling.items()}))
    run = recipe.run if recipe else sent.run_folder if "run_folder" in sent else sent.recipe
    return Submission(
        submission.checked_name(name) if name else submission.job_name(run, sent.verb),
        (sent.verb, *arguments),
        {path.name: path.read_bytes() for path in travelling.values()},
        None if here else wheel(),
        () if recipe is None else submission.resources(recipe, sent.verb),
    )


def words(options: Namespace) -> list[str]:
    """The arguments behind the verb that its parser reads as these options, without those that are the default anyway."""
    found: list[str] = []
    for action in options.parser._actions:
        value = getattr(options, action.dest, None)
        if value is None or value == action.default:
            continue
        values = [str(one) for one in value] if isinstance(value, list) else [str(value)]
        flag = next(iter(action.option_strings), None)
        if flag is None:
            found += values
        elif action.nargs == 0:
            found.append(flag)
        else:
            assert action.nargs is None, flag
            for one in values:
                found += [f"{flag}={one}"] if one.startswith("-") else [flag, one]
    return found


def _files(sent: Namespace) -> dict[str, Path]:
    """The files of this machine that the arguments name, and that travel: a recipe, a space."""
    named = {key: getattr(sent, key) for key in ("recipe", "space") if key in sent}
    return {key: Path(path) for key, path in named.items() if not is_uri(path) and Path(path).is_file()}


def _folders(sent: Namespace) -> dict[str, str]:
    """The folders that the arguments name beside those in the recipe."""
    found = {"RECIPE": sent.recipe} if "recipe" in sent and is_folder(sent.recipe) else {}
    found |= {"RUN": sent.run_folder} if "run_folder" in sent else {}
    return found | {f"OTHER {number}": other for number, other in enumerate(getattr(sent, "others", []), 1)}
