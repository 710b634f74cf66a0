"""The recipe's sections: every field that one can set, with its default, and what must fit together within a section.

What must fit together between sections, and how a recipe is read, is in `config.py`; a task's own section is in its file of
`tasks/`.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from lvm_ray.model.sizes import SIZES
from lvm_ray.section import NestedProblem, Section

# What differs from the fields' defaults, by kind of tokenizer.
TOKENIZER_DEFAULTS: dict[str, dict[str, Any]] = {
    "vq": {"width": 32, "steps": 600, "rate": 5e-3, "batch": 16},
    "fsq": {"width": 32, "steps": 600, "rate": 5e-3, "batch": 16, "levels": [8, 5, 5, 5]},
    "published": {"patch": 16, "codes": 8192},
}


def _weight(value: Any) -> Any:
    value = tuple(value) if isinstance(value, list) else value
    numbers = value if isinstance(value, tuple) else (value,)
    if not all(
        isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number < math.inf for number in numbers
    ) or (isinstance(value, tuple) and len(value) != 2):
        raise ValueError(f"found {value!r}: a weight is a number from 0 up, or [first, last]")
    return value


# A weight that may change over the steps of a training, on a straight line from the first to the last.
Weight = Annotated[float | tuple[float, float], BeforeValidator(_weight)]


def weight_at(weight: float | tuple[float, float], step: int, steps: int) -> float:
    """A weight in step 0..steps-1."""
    if not isinstance(weight, tuple):
        return weight
    first, last = weight
    return first + (last - first) * step / max(1, steps - 1)


def most_of(weight: float | tuple[float, float]) -> float:
    """The most that a weight ever is."""
    return max(weight) if isinstance(weight, tuple) else weight


class TokenizerSection(Section):
    """How a picture becomes tokens. A folder that exists is used as it is; otherwise one is made there.

    Some defaults depend on the kind (TOKENIZER_DEFAULTS). Of `fsq` the codes are the product of the levels.
    """

    kind: Literal["patch", "vq", "fsq", "published"] = Field(
        "patch",
        description="patch: k-means codes of patches with a small learned decoder; vq, fsq: a convolutional network of our own "
        "with a learnt codebook, or with a fixed grid of codes; published: a network that others trained",
    )
    source: str | None = Field(
        None, description="published: a folder, also that of a tokenizer of another run, or a hub's name as owner/name"
    )
    range: tuple[float, float] | None = Field(
        None, description="published: the network's values for black and white; default: those that its format comes with"
    )
    patch: int = Field(8, ge=2, description="side of the square that one token stands for, in pixels")
    codes: int = Field(1024, ge=16, le=65536, description="size of the vocabulary")
    levels: list[int] | None = Field(None, description="fsq: how many values each channel of a code has")
    width: int = Field(64, ge=8, description="channels of the network: patch: of its decoder; vq, fsq: at the finest grid")
    steps: int = Field(400, ge=0, description="training steps: of patch, its decoder's")
    rate: float = Field(3e-3, gt=0, description="peak learning rate")
    batch: int = Field(64, ge=1, description="pictures of a step, on all workers together")
    pictures: int = Field(3000, ge=64, description="training pictures that it is learnt from")
    adversarial: float = Field(0.0, ge=0, description="vq, fsq: weight of a discriminator's loss in the last half; 0: none")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_kind(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kind = values.get("kind", "patch")
        values = {**TOKENIZER_DEFAULTS.get(kind if isinstance(kind, str) else "", {}), **values}
        levels = values.get("levels")
        if kind == "fsq" and isinstance(levels, list) and all(isinstance(level, int) for level in levels):
            values.setdefault("codes", math.prod(levels))
        return values

    @field_validator("range", mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        return (
            tuple(float(number) if isinstance(number, int) else number for number in value) if isinstance(value, list) else value
        )

    @model_validator(mode="after")
    def _of_one_kind(self) -> TokenizerSection:
        owners = {"source": ("published",), "range": ("published",), "levels": ("fsq",), "adversarial": ("vq", "fsq")}
        for field, kinds in owners.items():
            if getattr(self, field) and self.kind not in kinds:
                raise NestedProblem(f"{field} is for the kind {' or '.join(kinds)}, this is {self.kind}: leave it out")
        if self.kind == "published" and not self.source:
            raise NestedProblem("source: missing: name the published tokenizer's folder")
        if self.range and self.range[0] >= self.range[1]:
            raise NestedProblem(f"range {list(self.range)}: the value of white must be above that of black")
        if self.kind in ("vq", "fsq") and self.patch & (self.patch - 1):
            raise NestedProblem(f"patch {self.patch} is not a power of two, as the kind {self.kind} needs")
        if self.kind == "fsq":
            if not self.levels or min(self.levels) < 2:
                raise NestedProblem(f"levels {self.levels}: name at least one channel, each of at least 2 values")
            if self.codes != math.prod(self.levels):
                raise NestedProblem(f"codes is {self.codes}, levels {self.levels} make {math.prod(self.levels)}: leave codes out")
        return self


class SharesFrom(Section):
    """Shares that hold from a part of the steps on."""

    start: float = Field(ge=0, lt=1, description="part of the steps after which they hold")
    shares: dict[str, float] = Field(description="part of the rows by task, of every task")


class BalanceSection(Section):
    """What each task's part of the plan is. A strategy is two numbers a task: its share and its distinct copies."""

    strategy: Literal["none", "repeat", "downsample", "temperature", "augment", "augment+temperature"] = Field(
        "augment",
        description="none: shares as the pairs fall; repeat: equal shares of the originals alone (the paper's "
        "re-sampling); downsample: equal shares of equally many originals; temperature: shares ~ pairs^alpha of the "
        "originals alone; augment: equal shares over augmented copies (the paper's); augment+temperature: shares ~ "
        "pairs^alpha over augmented copies",
    )
    alpha: float = Field(0.5, ge=0, le=1, description="temperature: 0 shares equally, 1 as the pairs fall")
    ratios: dict[str, float] = Field(
        {}, description="augment: distinct copies per original, by task; below 1 a part of the originals; default: all tokenised"
    )
    shares: dict[str, float] = Field({}, description="part of the plan's rows by task, instead of the strategy's own")
    schedule: list[SharesFrom] = Field(
        [], description="shares that change over the training, the first from 0 on; instead of shares"
    )
    weights: dict[str, float] = Field(
        {}, description="weight of the loss by task, default 1; the mean weight of a row stays 1, 0 only watches a task"
    )
    most_repeats: float = Field(
        16.0,
        gt=0,
        description="repeats of one same version beyond which a warning says so: 4 teach nearly as much as new data, from "
        "about 16 on little (Muennighoff et al. 2023)",
    )
    groupings: int = Field(5, ge=1, description="ways in which the same pairs are grouped into sentences, one an epoch")

    @model_validator(mode="after")
    def _scheduled(self) -> BalanceSection:
        starts = [part.start for part in self.schedule]
        if starts and (starts[0] or any(later <= earlier for earlier, later in pairwise(starts))):
            raise NestedProblem(f"schedule: starts at {starts}: begin at 0 and go up")
        if starts and self.shares:
            raise NestedProblem("schedule: it says the shares of all steps: leave shares out")
        return self

    @property
    def augments(self) -> bool:
        """Whether the strategy draws on augmented copies."""
        return self.strategy.startswith("augment")


class ModelSection(Section):
    """The decoder: a stock LlamaForCausalLM with attention bias and no special tokens. A size fills in what is not given."""

    size: str | None = Field(None, description="a named size (`lvm_ray/model/sizes.py`): width, layers, heads and mlp")
    init: str | None = Field(None, description="a model's folder whose weights the training starts from")
    width: int = Field(128, ge=8, description="hidden size")
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    mlp: int = Field(352, ge=8, description="inner width of the SwiGLU")
    rope_base: float = Field(10000.0, gt=1, description="base of the rotary position frequencies")
    norm_epsilon: float = Field(1e-5, gt=0)
    embedding: Literal["codebook", "table"] = Field(
        "codebook", description="codebook: the frozen codebook and a linear layer (the paper); table: free vectors"
    )
    aligned_heads: bool = Field(
        False,
        description="start half of the heads looking at the query's tokens beneath and around the next answer token, "
        "by their query and key biases",
    )

    @model_validator(mode="before")
    @classmethod
    def _of_size(cls, values: Any) -> Any:
        size = values.get("size") if isinstance(values, dict) else None
        if size is None:
            return values
        if not isinstance(size, str) or size not in SIZES:
            raise NestedProblem(f"size: no size is called {size!r}: there are {', '.join(SIZES)}")
        return {**SIZES[size], **values}


class TrainSection(Section):
    """One training: how long, how fast, on what weights of the loss."""

    steps: int = Field(400, ge=1)
    seed: int | None = Field(
        None,
        ge=0,
        description="of the fresh weights and of the rows' order; default: the recipe's. Which pairs make a sentence stays",
    )
    batch: int = Field(16, ge=1, description="sentences of a global batch")
    micro_batch: int = Field(16, ge=1, description="sentences that one worker passes at once")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: on the hidden matrices, AdamW on the rest")
    rate: float = Field(1.5e-4, gt=0, description="peak learning rate of AdamW's parameters")
    muon_rate: float = Field(0.02, gt=0, description="peak learning rate of Muon's parameters")
    final_rate: float = Field(0.1, ge=0, le=1, description="last rate as a part of the peak")
    warmup: float = Field(0.0056, ge=0, lt=1, description="part of the steps over which the rate rises")
    schedule: Literal["cosine", "wsd"] = Field(
        "cosine", description="cosine: down to the last rate from the warmup on (the paper); wsd: the peak rate until it decays"
    )
    decay: float = Field(0.2, gt=0, le=1, description="wsd: part of the steps, at the end, over which the rate falls linearly")
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's memories of gradients and of their squares")
    muon_momentum: float = Field(
        0.95, ge=0, lt=1, description="Muon's memory of gradients; trainings of about a hundred steps learn more with 0.8"
    )
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    image_weight: Weight = Field(
        1.0, description="weight of an image token's loss; a label token's is 1. [first, last]: on a straight line over the steps"
    )
    zero: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage")
    offload: bool = Field(False, description="ZeRO 1 to 3 on a GPU: keep weights' masters and moments in the host's memory")
    checkpoint_activations: bool = Field(False, description="compute each layer again for its gradient instead of keeping it")
    log_every: int = Field(10, ge=1, description="steps between two lines of metrics.jsonl")
    checkpoint_every: int = Field(200, ge=1, description="steps between two checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints that are kept")
    keep_best: int = Field(1, ge=0, description="checkpoints of the lowest validation loss that are kept beside them")
    validation: int = Field(32, ge=0, description="validation sentences of each task, scored at every checkpoint; 0: none")

    @field_validator("betas", mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


FIRST_TEACHER = "teacher"


def place_of_teacher(name: str) -> str:
    """Where a recipe names a teacher: `distill.teacher` or `distill.also.NAME.teacher`."""
    return "distill.teacher" if name == FIRST_TEACHER else f"distill.also.{name}.teacher"


class SparseSection(Section):
    """What a cache keeps of a teacher's distribution: its likeliest tokens, and some of the others at random."""

    top: int = Field(64, ge=1)
    tail: int = Field(16, ge=1)


class OneTeacherSection(Section):
    """What is learnt from a teacher: weight x T^2 x divergence of the distributions at temperature T (paper section 4)."""

    teacher: str | None = Field(None, description="run folder of the teacher")
    temperature: float = Field(1.0, gt=0)
    weight: Weight = Field(1.0, description="[first, last]: on a straight line over the steps")
    weights: dict[str, float] = Field(
        {}, description="{task: factor}: of what it says of a task; default 1, 0: it is not asked about the task"
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "forward_kl", description="forward_kl: KL(teacher || student), the paper's; reverse_kl; jsd: between the two"
    )
    beta: float = Field(0.5, gt=0, lt=1, description="of jsd: the teacher's part of the mixture")
    cache: str | None = Field(
        None, description="folder of its answers, made by lvm-ray cache; default: it is asked in every step"
    )
    sparse: SparseSection | None = Field(
        None, description="keep likely tokens in the cache, for forward_kl alone; default: hidden states, for every divergence"
    )

    def of_task(self, task: str) -> float:
        """The factor of what it says of a task."""
        return self.weights.get(task, 1.0)

    @model_validator(mode="after")
    def _consistent(self) -> OneTeacherSection:
        if self.sparse and self.divergence != "forward_kl":
            raise NestedProblem(f"sparse: likely tokens serve forward_kl alone, not {self.divergence}: leave sparse out")
        nothing = next((task for task, weight in self.weights.items() if not weight), None)
        if self.cache and nothing is not None:
            raise NestedProblem(f"cache: it holds answers about all tasks, and weights.{nothing} is 0: leave one of them out")
        return self


class FeaturesSection(Section):
    """What is learnt from a frozen vision network: weight x (1 - alignment) of what both find alike in the sentence's images."""

    network: Literal["convnext", "dinov2", "resnet", "vit"] = Field(description="its kind")
    weights: str = Field(description="its folder as Hugging Face keeps it: config.json, model.safetensors")
    weight: float = Field(0.5, gt=0, lt=math.inf)
    layer: int | None = Field(
        None, ge=0, description="the student's layer whose states are compared, first 0; default: the one in the middle"
    )


class DistillSection(OneTeacherSection):
    """Knowledge distillation: loss = CE + what is learnt from each teacher."""

    teacher: str | None = Field(None, description="run folder of the teacher; default: the pipeline's own")
    layers: list[int] | None = Field(
        None, description="the teacher's layers that the student starts from, first 0; default: it starts from nothing"
    )
    on_policy: float = Field(
        0.0, ge=0, le=1, description="part of the steps that learn from the teachers alone, about the student's own answers"
    )
    features: FeaturesSection | None = Field(None, description="a vision network beside the teachers; default: none")
    also: dict[str, OneTeacherSection] = Field({}, description="{name: teacher}: further teachers, each with its own settings")

    @field_validator("also")
    @classmethod
    def _named(cls, value: dict[str, OneTeacherSection]) -> dict[str, OneTeacherSection]:
        if FIRST_TEACHER in value:
            raise ValueError(f"the name {FIRST_TEACHER!r} is the first teacher's: take another one")
        return value

    @model_validator(mode="after")
    def _asked(self) -> DistillSection:
        kept = next((place_of_teacher(name) for name, one in self.teachers.items() if one.cache), None)
        if self.on_policy and kept:
            raise NestedProblem(
                f"on_policy: the student's own answers are in no cache: leave {kept.removesuffix('teacher')}cache out"
            )
        return self

    @property
    def teachers(self) -> dict[str, OneTeacherSection]:
        """All teachers by name; the first is called `teacher`."""
        return {FIRST_TEACHER: self, **self.also}


class TeacherSection(Section):
    """What differs for the teacher: whole `model` and `train` sections' keys; everything else is the student's."""

    model: dict[str, Any] = Field({})
    train: dict[str, Any] = Field({})


class ContinualSection(Section):
    """Tasks one after another in place of all at once, and what keeps the earlier ones."""

    stages: list[str | list[str]] = Field(min_length=2, description="in their order: a task each, or a list of tasks")
    replay: float = Field(0.0, ge=0, lt=1, description="part of a later stage's rows that are of the tasks before it")
    kept: float = Field(1.0, gt=0, le=1, description="part of an earlier task's pairs that those rows draw on")
    weight: float = Field(1.0, gt=0, lt=math.inf, description="weight of those rows' losses against the other rows'")
    distill: float = Field(
        0.0, ge=0, lt=math.inf, description="weight of what the model of the stage before says about the tasks before"
    )
    rate: float = Field(1.0, gt=0, description="peak learning rates of later stages, as a part of the first one's")

    @property
    def tasks_of_stages(self) -> list[list[str]]:
        """Each stage's tasks."""
        return [[stage] if isinstance(stage, str) else stage for stage in self.stages]

    @model_validator(mode="after")
    def _consistent(self) -> ContinualSection:
        named = [task for stage in self.tasks_of_stages for task in stage]
        twice = next((task for task in named if named.count(task) > 1), None)
        if twice is not None:
            raise NestedProblem(f"stages: names {twice} twice: a task has one stage")
        if [] in self.stages:
            raise NestedProblem("stages: one of them is empty: name its tasks, or leave it out")
        for field, asked in (("distill", self.distill != 0), ("weight", self.weight != 1)):
            if asked and not self.replay:
                raise NestedProblem(f"{field}: without replay there are no rows of earlier tasks: set replay")
        return self


class EvaluateSection(Section):
    """How many held-out items are scored, and how."""

    split: Literal["validation", "test"] = Field(
        "test", description="whose items are scored: choose settings on validation, so that test has not been looked at"
    )
    items: int | None = Field(None, ge=1, description="items per task, the first by id; default: all")
    batch: int = Field(32, ge=1, description="answers generated at once: the unit of work, whatever the workers")
    examples: int = Field(3, ge=1, description="example pairs before the query, at most one less than a sentence has pairs")
    choose: Literal["random", "fixed", "nearest"] = Field(
        "random", description="which pairs: drawn for each item; the same for all; those whose images are most like the query"
    )
    votes: int = Field(1, ge=1, description="prompts of each item, with pairs of their own, whose most central answer counts")
    draws: dict[str, int] = Field(
        {}, description="{task: answers drawn to each query, of which the most central is given}; others answer greedily"
    )
    resamples: int = Field(1000, ge=100, description="bootstrap resamples behind an interval")
    reference_minutes: float | None = Field(
        None,
        gt=0,
        lt=math.inf,
        description="core-minutes in which a small network devoted to each task learns from the same pairs, to stand beside the "
        "scores: all tasks together; default: none",
    )


class ComputeSection(Section):
    """Where a run runs. Written resolved into config.yaml, since thread counts change the last bits of a loss."""

    workers: int | tuple[int, int] = Field(
        1, description="training workers; 0: this process, without Ray; [min, max]: as many as the cluster has, at any time"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of each worker; default: cores / workers")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU for each worker where there are any")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field("auto", description="auto: bf16 where the processor computes it")
    attention: Literal["auto", "sdpa"] = Field("auto", description="auto: our own in bf16 on a CPU; sdpa: torch's kernel")
    compile: bool = Field(False, description="torch.compile the decoder's stock layers; on a CPU it needs a C++ compiler")
    profile: bool = Field(False, description="write a trace of three steps into RUN/profile")

    @field_validator("workers", mode="before")
    @classmethod
    def _range(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("workers")
    @classmethod
    def _possible(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        least, most = value if isinstance(value, tuple) else (value, value)
        if least < 0 or most < least or (least != most and least == 0):
            raise ValueError(f"found {value}: give a number from 0, or [min, max] with 1 <= min <= max")
        return value

    @property
    def most_workers(self) -> int:
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers

    @property
    def least_workers(self) -> int:
        return self.workers[0] if isinstance(self.workers, tuple) else self.workers
