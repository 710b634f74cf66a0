"""The recipe: one typed value that describes a run from images to report.

A recipe is YAML. It is read strictly: an unknown key, a wrong type or an impossible value is a `UserError` that names
the file, the key and what to write instead. `--set key.path=value` changes single values. The resolved recipe is
written into every run folder as `config.yaml`; running that file again is the same run.

The recipe describes the student. Its `teacher` section holds only what differs for the teacher, and `teacher_recipe`
derives the teacher's whole recipe from it: runs are small changes of one another.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator

from lvm_ray import benchmarks
from lvm_ray.errors import UserError
from lvm_ray.placement import PlacementSection
from lvm_ray.recipe_sections import (
    BalanceSection,
    ComputeSection,
    ContinualSection,
    DistillSection,
    EvaluateSection,
    ModelSection,
    OneTeacherSection,
    TeacherSection,
    TokenizerSection,
    TrainSection,
    place_of_teacher,
)
from lvm_ray.section import NestedProblem, Section, first_problem
from lvm_ray.storage import has_credentials, is_uri, read_bytes


class Recipe(Section):
    """A whole run, from images to report."""

    run: str = Field("runs/default", description="folder of the pipeline, or of the single run")
    seed: int = Field(0, ge=0)
    size: int = Field(64, ge=16, description="side of every picture in pixels")
    pairs: int = Field(4, ge=2, description="pairs of a sentence; paper: 4")
    synth: dict[str, dict[str, int]] = Field({}, description="embedded data set: {split: {task: pairs}}, written by `synth`")
    tasks: dict[str, SerializeAsAny[Section]] = Field(description="one section a task: its sources and settings")
    shards: str | None = Field(None, description="folder of token shards; default: data/shards of the pipeline folder")
    max_bad: float = Field(0.02, ge=0, le=1, description="part of a task's items that may be unusable before tokenizing stops")
    tokenizer: TokenizerSection = TokenizerSection()
    balance: BalanceSection = BalanceSection()
    model: ModelSection = ModelSection()
    train: TrainSection = TrainSection()
    distill: DistillSection | None = None
    teacher: TeacherSection | None = None
    continual: ContinualSection | None = None
    evaluate: EvaluateSection = EvaluateSection()
    benchmarks: dict[str, str] = Field({}, description="{benchmark: folder of its data}: scored beside the tasks, each whole")
    compute: ComputeSection = ComputeSection()
    placement: PlacementSection | None = Field(None, description="on a cluster: the nodes for each stage's workers")
    trackers: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(
        [], description="who also gets the lines of a training's metrics.jsonl"
    )

    @model_validator(mode="before")
    @classmethod
    def _without_credentials(cls, values: Any) -> Any:
        for key, text in texts(values):
            if has_credentials(text):
                raise ValueError(
                    f"{key}: a URI with credentials, which would stand in every config and log: "
                    "put the keys into the environment (AWS_ACCESS_KEY_ID, ...) and leave them out of the recipe"
                )
        return values

    @field_validator("tasks", mode="before")
    @classmethod
    def _tasks_by_name(cls, value: Any) -> Any:
        """Each section becomes the task that its name stands for in the registry."""
        from lvm_ray.tasks import TASKS

        if not isinstance(value, dict) or not value:
            raise ValueError(f"needs at least one of {', '.join(TASKS)}")
        unknown = [name for name in value if name not in TASKS]
        if unknown:
            raise ValueError(f"no task is called {unknown[0]!r}: there are {', '.join(TASKS)}")
        return {name: _nested(TASKS[name], section, name) for name, section in value.items()}

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.size % self.tokenizer.patch:
            raise ValueError(f"size {self.size} is not a multiple of tokenizer.patch {self.tokenizer.patch}")
        if self.model.width % self.model.heads or (self.model.width // self.model.heads) % 2:
            raise ValueError(f"model.width {self.model.width} must be an even multiple of model.heads {self.model.heads}")
        if self.evaluate.examples >= self.pairs:
            raise ValueError(
                f"evaluate.examples is {self.evaluate.examples}: sentences of {self.pairs} pairs take at most {self.pairs - 1}"
            )
        of_schedule = {name: share for part in self.balance.schedule for name, share in part.shares.items()}
        for field, named in (("ratios", self.balance.ratios), ("shares", self.balance.shares), ("schedule", of_schedule)):
            for name in named:
                if name not in self.tasks:
                    raise ValueError(f"balance.{field} names {name!r}, which is not among the tasks {', '.join(self.tasks)}")
        for name, task in self.tasks.items():
            pictures = getattr(task, "pictures", 2)
            if 2 * self.pairs % pictures:
                raise ValueError(
                    f"tasks.{name}: rows of {pictures} pictures do not divide a sentence of {2 * self.pairs} (2 x pairs)"
                )
        for place, weights in (("balance", self.balance.weights), *self._weights_of_teachers()):
            for name, weight in weights.items():
                if name not in self.tasks:
                    raise ValueError(f"{place}.weights names {name!r}, which is not among the tasks {', '.join(self.tasks)}")
                if not 0 <= weight < float("inf"):
                    raise ValueError(f"{place}.weights.{name} is {weight}: a weight is 0 or more")
        for place, weights in self._weights_of_teachers():
            if not any(weights.get(task, 1.0) for task in self.tasks):
                raise ValueError(f"{place}.weights: every task weighs 0: leave this teacher out")
        for name, draws in self.evaluate.draws.items():
            if name not in self.tasks:
                raise ValueError(f"evaluate.draws names {name!r}, which is not among the tasks {', '.join(self.tasks)}")
            if draws < 0:
                raise ValueError(f"evaluate.draws.{name} is {draws}: 0 answers greedily, more are drawn")
        if self.distill and self.distill.layers is not None and len(self.distill.layers) != self.model.layers:
            raise ValueError(f"distill.layers names {len(self.distill.layers)} layers, model.layers is {self.model.layers}")
        features = self.distill.features if self.distill else None
        if features and features.layer is not None and features.layer >= self.model.layers:
            raise ValueError(f"distill.features.layer: no layer {features.layer}: the student has 0 to {self.model.layers - 1}")
        if self.model.init and self.distill and self.distill.layers is not None:
            raise ValueError("model.init and distill.layers both say what the model starts from: leave one of them out")
        if self.continual:
            self._check_continual(self.continual)
        for name, data in self.benchmarks.items():
            self._check_benchmark(name, data)
        if self.teacher:
            teacher_recipe(self)
        return self

    def _check_benchmark(self, name: str, data: str) -> None:
        try:
            benchmarks.task_of(name, data, self.tasks, self.pairs)
        except ValueError as error:
            raise ValueError(f"benchmarks{'.' if isinstance(error, NestedProblem) else ': '}{error}") from None

    def _check_continual(self, section: ContinualSection) -> None:
        stages = {task for stage in section.tasks_of_stages for task in stage}
        other = next((task for task in stages if task not in self.tasks), None)
        if other is not None:
            raise ValueError(f"continual.stages names {other!r}, which is not among the tasks {', '.join(self.tasks)}")
        for field in ("teacher", "distill"):
            if getattr(self, field):
                raise ValueError(f"continual and {field} do not go together: stages have no teacher but the stage before")
        for field in ("shares", "schedule"):
            if getattr(self.balance, field):
                raise ValueError(f"balance.{field}: the stages of continual decide the shares: leave {field} out")

    @property
    def teachers(self) -> dict[str, OneTeacherSection]:
        """What a single run learns from, by name; none without `distill`."""
        return self.distill.teachers if self.distill else {}

    def _weights_of_teachers(self) -> list[tuple[str, dict[str, float]]]:
        return [(place_of_teacher(name).removesuffix(".teacher"), one.weights) for name, one in self.teachers.items()]

    @property
    def training_seed(self) -> int:
        """Of the fresh weights and of the rows' order; which pairs make a sentence follows from `seed` alone."""
        return self.seed if self.train.seed is None else self.train.seed

    @property
    def image_tokens(self) -> int:
        """Tokens of one picture."""
        return (self.size // self.tokenizer.patch) ** 2

    @property
    def sentence_tokens(self) -> int:
        """Tokens of one sentence: `pairs` pairs of two pictures."""
        return self.pairs * 2 * self.image_tokens

    @property
    def shard_folder(self) -> str:
        return self.shards or f"{self.run}/data/shards"

    @property
    def tokenizer_folder(self) -> str:
        return f"{self.run}/tokenizer"


def teacher_recipe(recipe: Recipe) -> Recipe:
    """The teacher's own recipe: the student's with the `teacher` section applied, and nothing to start or to distil from.

    A size that the section names takes the place of all the student's numbers.
    """
    assert recipe.teacher is not None
    values = to_dict(recipe)
    values["shards"] = recipe.shard_folder
    values["run"] = f"{recipe.run}/teacher"
    if recipe.teacher.model.get("size") is not None:
        values["model"] = {key: value for key, value in values["model"].items() if key not in OF_SIZE}
    values["model"] |= {"init": None} | recipe.teacher.model
    values["train"] |= recipe.teacher.train
    values["teacher"] = values["distill"] = None
    derived: Recipe = _nested(Recipe, values, "teacher")
    return derived


def student_recipe(recipe: Recipe) -> Recipe:
    """The student's own recipe: a single run in the pipeline folder, with the path of its teacher filled in."""
    values = to_dict(recipe)
    values["shards"] = recipe.shard_folder
    values["run"] = f"{recipe.run}/student"
    if recipe.teacher and values["distill"] is not None:
        values["distill"]["teacher"] = values["distill"]["teacher"] or f"{recipe.run}/teacher"
    values["teacher"] = None
    return Recipe.model_validate(values)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain YAML values."""
    values: dict[str, Any] = json.loads(recipe.model_dump_json())
    return values


def value_at(recipe: Recipe, path: str) -> Any:
    """The recipe's plain value at a key path, as `train.steps`; None where it has none."""
    value: Any = to_dict(recipe)
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


# What a model's size fills in.
OF_SIZE = ("width", "layers", "heads", "mlp")

# What decides where and how a recipe is computed or kept, and not what.
NOT_COMPUTED: dict[str, tuple[str, ...]] = {
    "balance": ("most_repeats",),
    "model": ("size",),
    "train": (
        *("micro_batch", "zero", "offload", "checkpoint_activations", "log_every"),
        *("checkpoint_every", "keep_checkpoints", "keep_best", "validation"),
    ),
}


def fingerprint(recipe: Recipe) -> str:
    """Sixteen hex digits that change with anything that the recipe computes, and not with where it runs or is kept.

    Defaults are left out, so that a new field leaves the fingerprints of old recipes as they are.
    """
    left_out = {"run", "shards", "compute", "placement", "trackers", "evaluate", "benchmarks"}
    values = json.loads(recipe.model_dump_json(exclude=left_out, exclude_defaults=True))
    for section, keys in NOT_COMPUTED.items():
        values[section] = {key: value for key, value in values.get(section, {}).items() if key not in keys}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def load(path: str, settings: list[str] | None = None, run: str | None = None) -> Recipe:
    """Read a recipe, apply `--set key.path=value` settings and `--run`.

    Raises UserError with one line: the file, the key, what was found and what is possible.
    """
    try:
        text = read_bytes(path).decode() if is_uri(path) else Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read the recipe: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8, so not a recipe") from None
    try:
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values, found {type(values).__name__}")
    for setting in settings or []:
        _apply(values, setting)
    if run:
        values["run"] = run.rstrip("/")
    return _validate(_with_run(values, str(values.get("run", "runs/default"))), path)


def changed(recipe: Recipe, settings: Mapping[str, Any], place: str) -> Recipe:
    """The recipe with values at key paths replaced: {"distill.temperature": 2.0}. A size takes the place of all of a model's
    numbers.

    Raises UserError with one line: the place that the settings come from, the key, what was found and what is possible.
    """
    values = to_dict(recipe)
    if "model.size" in settings:
        values["model"] = {key: value for key, value in values["model"].items() if key not in OF_SIZE}
    for key, value in settings.items():
        _put(values, key, value, f"{place}: {key}")
    return _validate(values, place)


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, readable by `load`."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)


def texts(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) of every text in the values."""
    if isinstance(values, str):
        yield key, values
    elif isinstance(values, dict | list):
        for part, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from texts(value, f"{key}.{part}".removeprefix("."))


def _with_run(values: Any, run: str) -> Any:
    """The values with `{run}` in any text replaced by the pipeline's folder."""
    if isinstance(values, dict):
        return {key: _with_run(value, run) for key, value in values.items()}
    if isinstance(values, list):
        return [_with_run(value, run) for value in values]
    return values.replace("{run}", run) if isinstance(values, str) else values


def _apply(values: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise UserError(f"--set {setting}: write it as key.path=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise UserError(f"--set {setting}: {text!r} is not a YAML value") from None
    _put(values, key, value, f"--set {setting}")


def _put(values: dict[str, Any], key: str, value: Any, place: str) -> None:
    """Set the value at a key path, in sections that are made where there are none."""
    *parents, last = key.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise UserError(f"{place}: {parent} holds a single value, not a section")
    values[last] = value


def _validate(values: dict[str, Any], path: str) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error, Recipe)}") from None


def _nested(model: type[Any], values: Any, name: str) -> Any:
    """Validate a section by itself; its error becomes one readable ValueError of the section around it."""
    if isinstance(values, model):
        return values
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise NestedProblem(f"{name}.{first_problem(error, model)}") from None


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers: `3e-4` is a number, as everybody expects."""


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)
