"""Where a run starts from, asked once by the driver before anything is started."""

from __future__ import annotations

import json
from pathlib import Path

from lvm_ray import mirror
from lvm_ray.config import Recipe
from lvm_ray.errors import UserError
from lvm_ray.mirror import Copy
from lvm_ray.progress import say
from lvm_ray.storage import join, read_file
from lvm_ray.train import checkpoint
from lvm_ray.train.checkpoint import State


def resume(recipe: Recipe, fresh: State) -> State:
    """The state that the run starts from, which is also said: that of a checkpoint, which is whole, or the fresh one.

    The first of these that there is:

    1. its finished model: nothing is left to do
    2. this run's newest whole checkpoint
    3. the copy at the run's URI, where that is newer
    4. `model.init`: another model's weights
    5. `distill.layers`: layers of the teacher
    6. fresh weights

    Every byte of a checkpoint is compared with its checksums here, so that no worker has to. What is damaged is set aside, said,
    and the one before taken. Raises UserError where damaged checkpoints are all there is, and where the newest one is of another
    recipe or of other data.
    """
    run, has_model = Path(recipe.run), (Path(recipe.run) / "model" / "model.safetensors").is_file()
    problems = checkpoint.set_aside_damaged(run)
    for line in problems:
        say(line)
    here = _state(checkpoint.latest(run), fresh)
    state = here or fresh
    found = mirror.copy_of(run)
    folders = mirror.checkpoints_there(*found) if found else {}
    there = _state_there(found[0], folders, fresh) if found else None
    if there and there.step > state.step:
        state = there
    if state.step == recipe.train.steps and has_model:
        return _by(1, run, "its finished model: nothing is left to do", state)
    if found and max(folders, default=-1) > (here.step if here else -1):
        came = _fetch(found[0], folders, problems)
        here = _state(checkpoint.latest(run), fresh)
        if here and here.step in came:
            return _by(3, run, f"goes on from step {here.step}, of the copy at {found[0].uri}", here)
    if here:
        return _by(2, run, f"goes on from its newest whole checkpoint, of step {here.step}", here)
    damaged = checkpoint.damaged(run)
    if damaged or problems:
        raise UserError(
            f"{run / checkpoint.FOLDER}: no checkpoint is whole: {(problems or [f'{damaged[-1].name} was set aside'])[0]}: "
            "train into another --run, or remove the damaged ones to start from nothing"
        )
    if recipe.model.init:
        return _by(4, run, f"starts from model.init, the weights of {recipe.model.init}", fresh)
    if recipe.distill and recipe.distill.layers is not None:
        return _by(5, run, f"starts from distill.layers, layers {recipe.distill.layers} of its teacher", fresh)
    return _by(6, run, "starts from fresh weights", fresh)


def _by(rule: int, run: Path, text: str, state: State) -> State:
    say(f"{run}: {text} (rule {rule} of resuming)")
    return state


def _state(found: Path | None, fresh: State) -> State | None:
    if found is None:
        return None
    state = checkpoint.read_state(found)
    checkpoint.require_same(found, state, fresh.fingerprint, fresh.plan)
    return state


def _state_there(copy: Copy, folders: dict[int, str], fresh: State) -> State | None:
    """The position of the newest checkpoint at the URI that says one, and is of this recipe and these data."""
    for step in sorted(folders, reverse=True):
        place = join(copy.uri, folders[step])
        try:
            state = checkpoint.parse_state(json.loads(read_file(place, checkpoint.STATE_FILE) or b""), place)
        except ValueError:  # damaged: what is said of it is said when it is fetched
            continue
        checkpoint.require_same(place, state, fresh.fingerprint, fresh.plan)
        return state
    return None


def _fetch(copy: Copy, folders: dict[int, str], problems: list[str]) -> set[int]:
    """Bring the checkpoints at the URI that are not here, the best ones too. The steps of those that came whole."""
    came = set()
    for step, folder in sorted(folders.items(), reverse=True):
        if not (copy.folder / folder).exists():
            problem = mirror.fetch_folder(copy, folder, checkpoint.damage)
            if problem:
                problems.append(f"{join(copy.uri, folder)}: damaged ({problem}): left there")
                say(problems[-1])
            else:
                came.add(step)
    return came
