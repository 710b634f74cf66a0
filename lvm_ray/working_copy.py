"""A run at a URI as a verb works on it: in a folder of this machine, fetched before and sent back after.

    s3://bucket/demo  <->  ~/.cache/lvm-ray/runs/demo-1a2b3c4d      (or below LVM_RAY_HOME)

The recipe that works has the folder as its `run`; what is written into config.yaml, and what fingerprints are taken of, has the
URI, so that a run goes on on another machine by the same command. `mirror` says what is fetched and sent.
"""

from __future__ import annotations

import hashlib
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from lvm_ray import config
from lvm_ray.config import Recipe
from lvm_ray.continual import STAGE
from lvm_ray.errors import UserError
from lvm_ray.mirror import CHECKPOINT, Copy, copy_of, fetch, make_copy, send
from lvm_ray.progress import say
from lvm_ray.storage import file_size, has_credentials, is_uri, join, redacted, split_name, split_query

PAUSES = (1.0, 5.0, 15.0)  # seconds before an upload that failed is tried again
TRAINING_FILES = ("metrics.jsonl", "config.yaml")


@contextmanager
def working_copy(run: str) -> Iterator[str]:
    """The folder of this machine to work in: of a URI its copy, with all that is newer there; of a path the path itself.

    When the block has ended well, the copy is sent back; also where the path is a copy's, so that each stage of a pipeline
    sends what it made, or says that it could not. Checkpoints are not fetched: `train.resume` does where it needs them. Raises
    UserError where a URI cannot be read, and at the end where something could not be sent there.
    """
    folder = run
    if is_uri(run):
        copy, below = _copy_for(run)
        make_copy(copy)
        folder = str(copy.folder / below)
        say(f"{run}: worked on in {folder}, and sent back at each checkpoint and at the end")
        fetch(copy, lambda path: not CHECKPOINT.match(path))
    yield folder
    found = copy_of(folder)
    if found:
        copy, below = found
        try:
            _patiently(lambda: send(copy, lambda path: path.startswith(below)))
        except UserError as error:
            if is_uri(run):
                raise
            say(f"warning: {error}")


def moved(recipe: Recipe, folder: str) -> Recipe:
    """The recipe of a run at a URI with its run, and all that lies in it or its pipeline, in the copy; any other as it is."""
    found = copy_of(folder) if is_uri(recipe.run) else None
    return _replaced(recipe, lambda text: _moved(text, found[0].uri, str(found[0].folder))) if found else recipe


def published(recipe: Recipe) -> Recipe:
    """The recipe of a copy with its URIs again, as it is the same on all machines; any other as it is."""
    found = copy_of(recipe.run)
    return _replaced(recipe, lambda text: _moved(text, str(found[0].folder), found[0].uri)) if found else recipe


@contextmanager
def uploads(run: str | None) -> Iterator[Callable[[], None]]:
    """A function to call after each checkpoint of a run: a thread then sends the run's checkpoints and journal.

    It does nothing where the run is None or no copy. What cannot be sent is said once and tried again at the next checkpoint.
    The end of the block waits for what is under way, unless it is Ctrl-C.
    """
    found = copy_of(run) if run else None
    if not found:
        yield lambda: None
        return
    copy, below = found
    calls: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def wanted(path: str) -> bool:
        inside = path.removeprefix(below)
        ours = path.startswith(below) and (inside in TRAINING_FILES or bool(CHECKPOINT.match(inside)))
        return ours or path == "config.yaml"  # the pipeline's own, so that the place is known for one

    def work() -> None:
        warned, more = False, True
        while more:
            more = calls.get()
            while not calls.empty():  # what was saved meanwhile goes together
                more = calls.get() and more
            try:
                _patiently(lambda: send(copy, wanted))
            except UserError as error:
                if not warned:
                    say(f"warning: {error}")
                warned = True

    thread = threading.Thread(target=work, name="uploads", daemon=True)
    thread.start()
    waits = True
    try:
        yield lambda: calls.put(True)
    except KeyboardInterrupt:
        waits = False
        raise
    finally:
        calls.put(False)
        if waits:
            thread.join()


def _patiently(work: Callable[[], None]) -> None:
    for pause in PAUSES:
        try:
            return work()
        except UserError:
            time.sleep(pause)
    return work()


def _copy_for(uri: str) -> tuple[Copy, str]:
    """The copy for a run at a URI, and where the run is in it: the whole pipeline's where it is one's teacher or student."""
    if has_credentials(uri):
        raise UserError(f"{redacted(uri)}: a URI with credentials: put the keys into the environment (AWS_ACCESS_KEY_ID, ...)")
    parent, name = split_name(uri)
    if (name in ("teacher", "student") or STAGE.fullmatch(name)) and file_size(join(parent, "config.yaml")) is not None:
        return Copy(_place(parent), parent), name
    return Copy(_place(uri), uri), ""


def _place(uri: str) -> Path:
    """The folder of this machine that is a URI's copy."""
    home = Path(os.environ.get("LVM_RAY_HOME") or Path.home() / ".cache" / "lvm-ray")
    name = re.sub(r"[^\w-]", "_", split_name(uri)[1])
    return Path(os.path.abspath(home)) / "runs" / f"{name}-{hashlib.sha256(uri.rstrip('/').encode()).hexdigest()[:8]}"


def _replaced(recipe: Recipe, change: Callable[[str], str]) -> Recipe:
    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(part) for key, part in value.items()}
        if isinstance(value, list):
            return [walk(part) for part in value]
        return change(value) if isinstance(value, str) else value

    return Recipe.model_validate(walk(config.to_dict(recipe)))


def _moved(text: str, old: str, new: str) -> str:
    """A path or URI in folder `old` as that in folder `new`; any other text as it is."""
    place, query = split_query(old)
    if text == old:
        return new
    if text.startswith(f"{old}/"):  # as `{run}/data` in a recipe gives it, of a URI with a query too
        inside = text.removeprefix(f"{old}/")
    elif query and text.startswith(f"{place}/") and text.endswith(query):
        inside = text.removeprefix(f"{place}/").removesuffix(query)
    else:
        return text
    return join(new, unquote(inside) if is_uri(old) else inside)
