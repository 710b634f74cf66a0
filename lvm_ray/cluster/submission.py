"""What is sent: a verb with its own arguments, the package, and the files that the arguments name. Plain values, no effects.

    name         demo-train-3fa2c1: of the run and the verb, so that the same command has the same name and resumes
    arguments    train demo.yaml --run s3://bucket/demo: what stands behind `python -m lvm_ray`
    files        demo.yaml, and the space file of `tune`: nothing else travels, and no data

Places of data and runs do not travel, so a recipe that is sent to other machines names them by URI or by absolute path.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol

from lvm_ray import config
from lvm_ray.cluster.arrival import IMAGE, JOB
from lvm_ray.cluster.package import Package, digest, pack
from lvm_ray.config import Recipe
from lvm_ray.errors import UserError
from lvm_ray.placement import STAGES, PlaceSection, Stage, share
from lvm_ray.storage import is_uri, redacted, split_name
from lvm_ray.tasks.base import SPLITS

SENT = ("demo", "synth", "tokenize", "balance", "cache", "train", "tune", "evaluate", "study", "report")
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
LONGEST = 47  # letters of a name that we choose: KubeRay takes no more
STAGES_OF: dict[str, tuple[Stage, ...]] = {
    "demo": STAGES,
    "tokenize": ("tokenize",),
    "cache": ("cache",),
    "train": ("train",),
    "tune": ("tokenize", "train"),
    "evaluate": ("evaluate",),
}
FROM_TOKENS = ("synth", "balance", "cache", "train", "report")  # verbs that look at no source and no benchmark
PATHS = (str, str | None)  # what a source's fields are that name folders or files
# Keys of a recipe outside its tasks whose values are folders or files.
PLACES = (
    *("run", "shards", "model.init", "benchmarks.*", "distill.teacher", "distill.cache", "distill.features.weights"),
    *("distill.also.*.teacher", "distill.also.*.cache"),
)

State = Literal["waiting", "running", "succeeded", "failed", "stopped"]


@dataclass(frozen=True)
class Where:
    """Where to send to. What a target does not use is None.

    to         local, ray, k8s or slurm
    address    ray: of the cluster's dashboard
    namespace  k8s: default: the template's, else kubectl's own
    image      k8s: of the cluster's containers; default: the template's
    template   k8s: a RayJob, slurm: a batch script; default: those that come with the package
    """

    to: str
    address: str | None = None
    namespace: str | None = None
    image: str | None = None
    template: str | None = None


@dataclass(frozen=True)
class Submission:
    """What is sent. `package`: None where the job runs with this machine's code. `resources`: what it will ask for, in words."""

    name: str
    arguments: tuple[str, ...]
    files: Mapping[str, bytes] = field(default_factory=dict)
    package: Package | None = None
    resources: tuple[str, ...] = ()

    @property
    def command(self) -> tuple[str, ...]:
        return ("python", "-m", "lvm_ray", *self.arguments)

    @property
    def entrypoint(self) -> str:
        """The command as a shell reads it."""
        return shlex.join(self.command)

    @property
    def environment(self) -> dict[str, str]:
        """What the job and its workers find in their environment. No secret is sent: the cluster's machines have their own."""
        return {JOB: self.name}

    @property
    def archive(self) -> Package:
        """The files as a zip."""
        return Package(f"lvm_ray_files-{digest(self.files)[:16]}.zip", pack(self.files))

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits of all that is sent: a running job with others is another job."""
        parts = [self.entrypoint, digest(self.files), self.package.name if self.package else ""]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Job:
    """A job as its target knows it. Times are seconds since 1970; None and empty: the target does not tell."""

    name: str
    state: State
    detail: str = ""
    started: float | None = None
    ended: float | None = None
    exit_code: int | None = None
    fingerprint: str | None = None

    @property
    def is_over(self) -> bool:
        return self.state not in ("waiting", "running")


class Target(Protocol):
    """Where verbs are sent: each of ray_jobs, kubernetes, slurm and local is one. All raise UserError with what to do."""

    def described(self, where: Where, submission: Submission) -> dict[str, Any]:
        """All that `submit` would send, as plain values. Asks nobody."""

    def submit(self, where: Where, submission: Submission) -> int:
        """Send it, in place of an ended job of the same name. How many letters of its log are of earlier attempts."""

    def status(self, where: Where, name: str | None = None) -> list[Job]:
        """The job of a name, or none; all jobs where no name is given."""

    def logs(self, where: Where, name: str) -> str:
        """What a job has printed so far; empty where it has not begun."""

    def stop(self, where: Where, name: str) -> None:
        """Ask a job to save and to leave."""


def job_name(run: str, verb: str) -> str:
    """A job's name, of its run's and its verb. Runs of one name in two places have two."""
    place = run.rstrip("/") if is_uri(run) else os.path.abspath(run)
    mark = hashlib.sha256(f"{place}\n{verb}".encode()).hexdigest()[:6]
    words = re.sub(r"[^a-z0-9]+", "-", f"{split_name(place)[1]}-{verb}".lower()).strip("-")
    words = words if words[:1].isalpha() else f"run-{words}"  # Kubernetes' names begin with a letter
    return f"{words[: LONGEST - len(mark) - 1].rstrip('-')}-{mark}"


def checked_name(name: str) -> str:
    """A name that a user chose. Raises UserError where no target could take it."""
    if not NAME.fullmatch(name):
        raise UserError(f"--name {name}: write at most 63 small letters, digits and hyphens, as demo-train")
    return name


def places(recipe: Recipe, verb: str) -> dict[str, str]:
    """The folders and files that a recipe names and a verb looks at, by their keys. A published tokenizer's hub name is none."""
    found = {key: text for key, text in config.texts(config.to_dict(recipe)) if any(fnmatchcase(key, one) for one in PLACES)}
    reads_data = verb not in FROM_TOKENS
    found = {key: text for key, text in found.items() if reads_data or not key.startswith("benchmarks.")}
    for task, section in recipe.tasks.items() if reads_data else ():
        for split in SPLITS:
            fields = getattr(getattr(section, split), "model_fields", {})  # none where a split has no source
            texts = {name: getattr(getattr(section, split), name) for name, one in fields.items() if one.annotation in PATHS}
            found |= {f"tasks.{task}.{split}.{name}": text for name, text in texts.items() if text}
    source = recipe.tokenizer.source
    if source and (source.startswith(".") or os.path.exists(source)):
        found["tokenizer.source"] = source
    return found


def require_reachable(named: Mapping[str, str]) -> None:
    """Raises UserError where one of the places, by what names it, is known to this machine's working folder alone."""
    for key, place in named.items():
        if not is_uri(place) and not os.path.isabs(place):
            raise UserError(
                f"{key}: {redacted(place)} is relative to this folder, which does not travel: give a URI (s3://bucket/demo) "
                "or an absolute path of storage that all machines of the cluster share"
            )


def resources(recipe: Recipe, verb: str) -> tuple[str, ...]:
    """What a verb's own workers will ask of the cluster, in words."""
    workers, device = recipe.compute.workers, recipe.compute.device
    number = " to ".join(map(str, workers)) if isinstance(workers, tuple) else str(workers)
    lines = ["driver: reserves nothing"]
    for stage in STAGES_OF.get(verb, ()):
        place = getattr(recipe.placement, stage, None) or PlaceSection()
        each = ", ".join(f"{amount:g} {name}" for name, amount in share(place, stage != "tokenize" and device == "cuda").items())
        if stage == "tokenize":
            line = f"as many workers as there is room for, of {each} each"
        elif not workers:
            line = "in the driver (compute.workers is 0)"
        else:
            line = f"{number} workers of {each} each" + (", and a GPU where there are any" if device == "auto" else "")
        chosen = ", ".join(f"{label}: {value}" for label, value in place.selector.items())
        lines.append(f"{stage}: {line}" + (f"; on nodes with {chosen}" if chosen else ""))
    return tuple(lines)


def reason_of(log: str) -> str:
    """Why a job failed, of the last lines of its log: what lvm-ray says itself, else the last line, with what to do where the
    machine lacks a program or a module. Empty where the log is."""
    lines = [line.strip() for line in log.splitlines() if line.strip()][-40:]
    own = [found[1] for line in lines if (found := re.match(r"lvm-ray [a-z]+: (.+)", line))]
    reason = redacted((own or lines or [""])[-1])[:600]
    lacks = re.search(r"No module named|python3?: (command )?not found", reason)
    return f"{reason}: {IMAGE}" if lacks and IMAGE not in reason else reason
