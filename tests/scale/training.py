"""Steps, networks, checkpoints, failures, and a teacher's answers: hours of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lvm_ray import estimate
from lvm_ray.config import Recipe
from lvm_ray.recipe_sections import ModelSection
from lvm_ray.train.caching import PART_BYTES
from tests.scale.inputs import measured, value
from tests.scale.workload import (
    BATCH,
    HOUR,
    PAIRS,
    PICTURES,
    SENTENCES,
    gpu_rate,
    image_tokens,
    model_of,
    nodes,
    operations,
    runs,
    tokens,
)

MONTH = 30 * 86400.0  # seconds

# The network.


def bandwidth(gpus: int) -> float:
    """Bus bandwidth of NCCL: all links of a node work for all of its GPUs."""
    return (
        value("nvlink")
        if gpus <= value("gpus_of_a_node")
        else min(value("nvlink"), value("node_network") * value("network_share"))
    )


def all_reduce(size: float, gpus: int) -> float:
    """Seconds until every GPU has the sum of all GPUs' `size` bytes: a ring passes them on twice."""
    return 2 * gather(size, gpus)


def gather(size: float, gpus: int) -> float:
    """Seconds until every GPU has all of `size` bytes that are shared out; of reduce-scatter, the reverse, as many."""
    return (gpus - 1) / gpus * size / bandwidth(gpus) + (1 + math.log2(nodes(gpus))) * value("nccl_hop")


def vote(gpus: int, changed: bool) -> float:
    """Seconds of an all-reduce of a few numbers: around gloo's ring twice, or by NCCL."""
    return all_reduce(64, gpus) if changed else 2 * (gpus - 1) * value("gloo_hop")


SUMS = 5  # all-reduces of a line of the journal (`meter.Meter.line`); one would do


@dataclass(frozen=True)
class Step:
    """Seconds of one step of a training.

    compute    forward and backward of all micro batches, the teacher's forward among them
    gradients  what the GPUs wait for their sum
    weights    what they wait for each other's updated part of the weights (ZeRO 1)
    votes      whether to leave, and the journal's sums
    feed       what the stream of rows takes to hand out the step's micro batches, beside all that
    """

    compute: float
    gradients: float
    weights: float
    votes: float
    feed: float

    @property
    def work(self) -> float:
        return self.compute + self.gradients + self.weights + self.votes

    @property
    def total(self) -> float:
        """The stream works ahead: what is slower decides."""
        return max(self.work, self.feed)


def step(run: Recipe, gpus: int, teacher: Recipe | None = None, changed: bool = False) -> Step:
    """A step of a training; `teacher`: the one that is asked about every sentence."""
    section = run.train
    compute = section.batch * run.sentence_tokens * operations(run, teacher) / (gpus * gpu_rate())
    size = moved_bytes(run.model)
    gradients = all_reduce(size, gpus)
    if changed:
        # Beside the backward pass of the last micro batch, layer by layer.
        last = 2 / 3 * section.micro_batch * run.sentence_tokens * operations(run) / gpu_rate()
        layers = run.model.layers
        gradients = overlapped(layers, last, all_reduce(size / layers, gpus)) - last
    votes = (1 + (1 if changed else SUMS) / section.log_every) * vote(gpus, changed)
    feed = 0.0 if changed else section.batch / section.micro_batch / measured("block_rate")
    return Step(compute, gradients, gather(size, gpus), votes, feed)


def moved_bytes(model: ModelSection) -> float:
    """Of a model's gradients, and of its weights: both travel in bf16."""
    return 2.0 * estimate.trained_parameters(model, runs(8)[0].tokenizer.codes)


def overlapped(layers: int, backward: float, sends: float) -> float:
    """Seconds of a backward pass of `backward` seconds whose layers' gradients are sent as soon as they are known, each in
    `sends` seconds."""
    computes = backward / layers
    return computes + (layers - 1) * max(computes, sends) + sends


def zero_step(size: str, gpus: int, stage: int, overlaps: bool, micro: int) -> float:
    """Seconds of a step of a model of a named size at a ZeRO stage, without votes and stream, as DeepSpeed 0.19 sends it.

    Stage 1 sums the gradients once a step, after the last backward pass (`engine.allreduce_gradients`). Stage 2 sums them in
    every micro batch, also where it keeps a part alone (`allreduce_and_scatter`). Stage 3 gathers weights before each layer's
    forward and backward pass, and scatters gradients, in every micro batch.
    """
    model, length = model_of(size), PAIRS * PICTURES * image_tokens()
    micro = min(micro, BATCH // gpus)
    passes = BATCH // (gpus * micro)
    compute = micro * length * estimate.operations_per_token(model, runs(8)[0].tokenizer.codes, length) / gpu_rate()
    moved, layers = moved_bytes(model), model.layers
    if stage == 3:
        return passes * zero_3_pass(layers, compute / 3, 2 * compute / 3, gather(moved / layers, gpus), overlaps)
    summed = overlapped(layers, 2 * compute / 3, all_reduce(moved / layers, gpus))
    backward = summed if overlaps else 2 * compute / 3 + all_reduce(moved, gpus)
    sent = compute / 3 + backward  # a pass whose gradients are sent
    return (sent + (passes - 1) * compute if stage == 1 else passes * sent) + gather(moved, gpus)


def zero_3_pass(layers: int, forward: float, backward: float, each: float, overlaps: bool) -> float:
    """Seconds of a micro batch whose weights are gathered layer by layer, one layer ahead, and whose gradients are scattered: of
    `each` layer that takes so long.

    With overlap: the first layer's weights and the last layer's gradients are waited for; between, the slower of GPU and wire
    counts. The wire has two things to carry backward.
    """
    if not overlaps:
        return forward + backward + 3 * layers * each
    ahead = each + (layers - 1) * max(forward / layers, each) + forward / layers
    back = each + (layers - 1) * max(backward / layers, 2 * each) + backward / layers + each
    return ahead + back


# Checkpoints and what goes wrong.


def checkpoint_seconds(run: Recipe, gpus: int, changed: bool = False) -> float:
    """What all GPUs wait for a checkpoint.

    Now: every GPU gets all of it, each process copies all of it into its host's memory, one writes it and one reads it for its
    checksum. Changed: each copies its own part, and writes it while the training goes on.
    """
    size = estimate.checkpoint_bytes(run)
    if changed:
        return size / gpus / value("host_copy") + 0.1  # a tenth of a second to agree
    return all_reduce(size, gpus) + size / value("host_copy") + size / value("shared_write") + size / measured("sha256_rate")


def restart_seconds(run: Recipe, gpus: int, changed: bool = False) -> float:
    """From a failure to the next step: processes, and the checkpoint. Now every node reads all of it, and the driver once before
    for its checksum; changed, each reads its own part."""
    size = estimate.checkpoint_bytes(run)
    read = size / value("shared_read") if changed else nodes(gpus) * size / value("shared_read") + size / measured("sha256_rate")
    return value("start") + read


def mtbf(gpus: int, kind: str = "on demand") -> float:
    """Seconds between two failures of a cluster: of GPUs, and of spot nodes that are taken away."""
    rate = gpus / value("gpu_mtbf")
    if kind != "on demand":
        rate += nodes(gpus) * value({"spot, calm": "spot_calm", "spot, rough": "spot_rough"}[kind]) / MONTH
    return 1 / rate


def young(save: float, between: float) -> float:
    """Young's interval: the work between two checkpoints that loses least, where saving and failures are rare."""
    return math.sqrt(2 * save * between)


def expected_seconds(work: float, interval: float, save: float, restart: float, between: float) -> float:
    """Daly's: of a training that fails at random, while it works, saves and restarts, and goes back to its last checkpoint."""
    return work / interval * between * math.exp(restart / between) * math.expm1((interval + save) / between)


@dataclass(frozen=True)
class Training:
    """Hours of a training: computing alone, waiting for the network, for votes and for rows, saving, failures, starting."""

    compute: float
    network: float
    votes: float
    feed: float
    saving: float
    failures: float
    start: float

    @property
    def total(self) -> float:
        return self.compute + self.network + self.votes + self.feed + self.saving + self.failures + self.start


def interval_steps(run: Recipe, gpus: int, one: Step, changed: bool) -> int:
    """Steps between checkpoints: the recipe's, or what Young's formula says, at most half of the run."""
    if not changed:
        return run.train.checkpoint_every
    wanted = young(checkpoint_seconds(run, gpus, changed), mtbf(gpus)) / one.total
    return max(1, min(round(wanted), run.train.steps // 2))


def training(run: Recipe, gpus: int, teacher: Recipe | None = None, changed: bool = False) -> Training:
    one, steps = step(run, gpus, teacher, changed), run.train.steps
    every = interval_steps(run, gpus, one, changed)
    save, restart = checkpoint_seconds(run, gpus, changed), restart_seconds(run, gpus, changed)
    saves = math.ceil(steps / every)
    whole = expected_seconds(steps * one.total, every * one.total, save, restart, mtbf(gpus))
    return Training(
        compute=steps * one.compute / HOUR,
        network=steps * (one.gradients + one.weights) / HOUR,
        votes=steps * one.votes / HOUR,
        feed=steps * (one.total - one.work) / HOUR,
        saving=saves * save / HOUR,
        failures=(whole - steps * one.total - steps / every * save) / HOUR,
        start=value("start") / HOUR,
    )


# Teachers' answers.


@dataclass(frozen=True)
class Answers:
    """A teacher's answers to every sentence, kept in an object store.

    size          bytes of all of them
    of_sentence   bytes of one sentence's
    files         parts, each of about PART_BYTES
    month         dollars a month
    make          GPU-hours: the teacher's forward over every sentence
    """

    size: float
    of_sentence: float
    files: float
    month: float
    make: float


def answers(sparse: bool, labels_only: bool = False) -> Answers:
    teacher, student = runs(8)
    places = student.sentence_tokens // 2 if labels_only else student.sentence_tokens - 1
    numbers = 2 * (64 + 16) + 2 if sparse else teacher.model.width  # `teacher_cache.numbers_of_a_place`
    of_sentence = 2.0 * places * numbers
    size = SENTENCES * of_sentence
    return Answers(
        size=size,
        of_sentence=of_sentence,
        files=SENTENCES / max(1, PART_BYTES // of_sentence),
        month=size / 1e9 * value("month"),
        make=teacher_hours(),
    )


def teacher_hours() -> float:
    """GPU-hours of the teacher's forward over every sentence: of a cache, or of a student that asks it in every step."""
    teacher, _ = runs(8)
    return tokens() * operations(teacher) / 3 / gpu_rate() / HOUR


def answers_rate(gpus: int, sparse: bool) -> float:
    """Bytes a second that a student's step without a teacher would read."""
    _, student = runs(gpus)
    return BATCH * answers(sparse).of_sentence / step(student, gpus, changed=True).work


def students_to_pay(sparse: bool) -> float:
    """Students within a month whose answers pay for keeping them rather than asking the teacher again."""
    kept, asked = answers(sparse), teacher_hours() * value("gpu_hour")
    return (kept.make * value("gpu_hour") + kept.month) / asked
