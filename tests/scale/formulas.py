"""The arithmetic of docs/scale.md: 100 million images tokenised, a 1B teacher and an 80M student, on 8, 64 and 512 GPUs.

Every figure of the page is a function here, of the inputs (`inputs.py`), of the shipped recipe and of the project's own estimates
(`lvm_ray/estimate.py`, constants of `lvm_ray`), so that the page cannot say what the code does not do. `changed` is False for the
code as it is and True for the changes that the page names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from lvm_ray import config, estimate
from lvm_ray.config import Recipe
from lvm_ray.data import listing
from lvm_ray.model.sizes import SIZES
from lvm_ray.recipe_sections import ModelSection
from lvm_ray.train.caching import PART_BYTES
from tests.scale.inputs import ROOT, measured, value

GPUS = (8, 64, 512)
HOUR, MONTH = 3600.0, 30 * 86400.0

IMAGES = 100_000_000
PICTURES = 2  # of an image: itself and its label
PAIRS = 4  # of a sentence
SENTENCES = IMAGES // PAIRS
BATCH = 1024  # sentences of a step: the reading of the paper's table 9
STEPS = SENTENCES // BATCH  # each image is seen once
SIZE = 256

# diffusers' names for the published tokenizer's network (MUSE's VQGAN, f = 16).
PUBLISHED = {
    "block_out_channels": (128, 128, 256, 512, 768),
    "down_block_types": ("DownEncoderBlock2D",) * 5,
    "up_block_types": ("UpDecoderBlock2D",) * 5,
    "layers_per_block": 2,
    "latent_channels": 64,
    "vq_embed_dim": 64,
    "num_vq_embeddings": 8192,
    "norm_num_groups": 32,
    "mid_block_add_attention": False,
    "lookup_from_codebook": True,
}


def nodes(gpus: int) -> float:
    return gpus / value("gpus_of_a_node")


def cores(gpus: int) -> float:
    return nodes(gpus) * value("cores_of_a_node")


# The recipe.


@lru_cache(maxsize=8)
def runs(gpus: int) -> tuple[Recipe, Recipe]:
    """Teacher and student of recipes/80m.yaml on so many GPUs, each image seen once."""
    each = BATCH // gpus  # sentences of a GPU in a step
    settings = [
        f"train.batch={BATCH}",
        f"train.steps={STEPS}",
        f"train.micro_batch={min(16, each)}",
        f"teacher.train.micro_batch={min(4, each)}",
        f"compute.workers={gpus}",
        "compute.device=cuda",
        "compute.precision=bf16",
    ]
    recipe = config.load(str(ROOT / "recipes" / "80m.yaml"), settings)
    return config.teacher_recipe(recipe), config.student_recipe(recipe)


def model_of(size: str) -> ModelSection:
    return ModelSection(**SIZES[size])


def tokens() -> int:
    """Of all pictures; a training sees each once."""
    return IMAGES * PICTURES * image_tokens()


def image_tokens() -> int:
    return runs(8)[0].image_tokens


def operations(run: Recipe, teacher: Recipe | None = None) -> float:
    """Of a token of a training: forward and backward, and the teacher's forward."""
    return estimate.operations_per_token(run.model, run.tokenizer.codes, run.sentence_tokens, [teacher.model] if teacher else [])


def gpu_rate() -> float:
    """Operations a second that a training gets out of a GPU."""
    return value("gpu_bf16") * estimate.GPU_SHARE


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
    return (gpus - 1) / gpus * size / bandwidth(gpus) + (nodes(gpus) - 1) * value("nccl_hop")


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
    size = 2 * estimate.trained_parameters(run.model, run.tokenizer.codes)  # gradients travel in bf16, as weights do
    gradients = all_reduce(size, gpus)
    if changed:
        # Beside the backward pass of the last micro batch, layer by layer.
        last = 2 / 3 * step_operations(run, gpus)
        gradients = overlapped(run.model.layers, last, gradients) - last
    votes = (1 + (1 if changed else SUMS) / section.log_every) * vote(gpus, changed)
    feed = 0.0 if changed else section.batch / section.micro_batch / measured("block_rate")
    return Step(compute, gradients, gather(size, gpus), votes, feed)


def step_operations(run: Recipe, gpus: int) -> float:
    """Seconds of a micro batch of the model that is trained, forward and backward."""
    return run.train.micro_batch * run.sentence_tokens * operations(run) / gpu_rate()


def overlapped(layers: int, backward: float, sending: float) -> float:
    """Seconds of a backward pass whose layers' gradients are sent as soon as they are known."""
    computes, sends = backward / layers, sending / layers
    return computes + (layers - 1) * max(computes, sends) + sends


def zero_step(size: str, gpus: int, stage: int, overlaps: bool, micro: int, batch: int = BATCH) -> float:
    """Seconds of a step of a model of a named size at a ZeRO stage, without votes and stream, as DeepSpeed 0.19 sends it.

    Stage 1 sums the gradients once a step, after the last backward pass (`engine.allreduce_gradients`). Stage 2 sums them in
    every micro batch, also where it keeps a part alone (`allreduce_and_scatter`). Stage 3 gathers weights before each layer's
    forward and backward pass, and scatters gradients, in every micro batch.
    """
    model, codes, length = model_of(size), 8192, PAIRS * PICTURES * image_tokens()
    micro = min(micro, batch // gpus)
    passes = batch // (gpus * micro)
    compute = micro * length * estimate.operations_per_token(model, codes, length) / gpu_rate()
    moved = 2 * estimate.trained_parameters(model, codes)
    summed, gathered, layers = all_reduce(moved, gpus), gather(moved, gpus), model.layers
    if stage == 3:
        return passes * zero_3_pass(layers, compute / 3, 2 * compute / 3, gathered, overlaps)
    backward = overlapped(layers, 2 * compute / 3, summed) if overlaps else 2 * compute / 3 + summed
    sent = compute / 3 + backward  # a pass whose gradients are sent
    return (sent + (passes - 1) * compute if stage == 1 else passes * sent) + gathered


def zero_3_pass(layers: int, forward: float, backward: float, gathered: float, overlaps: bool) -> float:
    """Seconds of a micro batch whose weights are gathered layer by layer, one layer ahead, and whose gradients are scattered.

    With overlap: the first layer's weights and the last layer's gradients are waited for; between, the slower of GPU and wire
    counts. The wire has two things to carry backward.
    """
    if not overlaps:
        return forward + backward + 3 * gathered
    each = gathered / layers
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
        rate += nodes(gpus) * value({"spot, calm": "spot_calm", "spot, rough": "spot_rough"}[kind])
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


# Tokenizing.


def encoder_operations() -> float:
    """Floating-point operations of the published tokenizer's encoder for a picture, its convolutions and the nearest codes."""
    widths, layers, side = PUBLISHED["block_out_channels"], PUBLISHED["layers_per_block"], SIZE
    total = _convolution(3, widths[0], side)
    before = widths[0]
    for level, width in enumerate(widths):
        for layer in range(layers):
            total += _block(before if layer == 0 else width, width, side)
        before = width
        if level + 1 < len(widths):
            side //= 2
            total += _convolution(width, width, side)
    total += 2 * _block(before, before, side)  # the middle
    latent = PUBLISHED["latent_channels"]
    total += _convolution(before, latent, side) + _convolution(latent, latent, side, kernel=1)
    return total + 2 * side**2 * latent * PUBLISHED["num_vq_embeddings"]


def _block(before: int, width: int, side: int) -> float:
    shortcut = _convolution(before, width, side, kernel=1) if before != width else 0.0
    return _convolution(before, width, side) + _convolution(width, width, side) + shortcut


def _convolution(before: int, width: int, side: int, kernel: int = 3) -> float:
    return 2.0 * kernel**2 * before * width * side**2


def pictures_a_gpu(precision: str) -> float:
    """Pictures a second that a GPU encodes."""
    return value(f"gpu_{precision}") * value("convolution_share") / encoder_operations()


def unit_items() -> int:
    """Images of a unit of work, one copy each."""
    return listing.unit_length(IMAGES, 1)


def units() -> int:
    return -(-IMAGES // unit_items())


@dataclass(frozen=True)
class Tokenizing:
    """Hours that each part of the work would take if it were the only one.

    listing  the driver, before anybody works
    encode   the tokenizer's network
    read     decoding and drawing on the cores
    wait     for the object store; 0 where files lie on disks
    storage  the photos' bytes into the nodes
    """

    listing: float
    encode: float
    read: float
    wait: float
    storage: float
    changed: bool

    @property
    def total(self) -> float:
        """Now one thread reads, draws and encodes; changed, all three go on beside each other."""
        together = max(self.encode, self.read, self.storage) if self.changed else self.encode + self.read + self.wait
        return self.listing + together


def tokenizing(gpus: int, changed: bool = False, remote: bool = False) -> Tokenizing:
    """`remote`: photos in tars of an object store; otherwise on disks that every node reads."""
    storage = IMAGES * value("image_bytes") / (nodes(gpus) * value("node_storage")) / HOUR
    read = IMAGES * measured("decode_core") / cores(gpus) / HOUR
    if changed:
        encode = IMAGES * PICTURES / (gpus * pictures_a_gpu("bf16")) / HOUR
        return Tokenizing(0.0, encode, read, 0.0, storage, changed)
    encode = IMAGES * PICTURES * measured("encode_core") / cores(gpus) / HOUR
    listed = IMAGES * measured("list_item") / HOUR
    wait = 0.0
    if remote:
        # A photo and what its label is drawn from: two members of a tar, each listed twice and read once.
        listed += 2 * 2 * IMAGES * measured("header_requests") * value("request") / HOUR
        wait = 2 * IMAGES * measured("read_requests") * value("request") / cores(gpus) / HOUR
    return Tokenizing(listed, encode, read, wait, storage, changed)


def readers_needed() -> float:
    """Photos that must be under way at once to keep a GPU busy out of an object store (Little's law)."""
    return pictures_a_gpu("bf16") / PICTURES * measured("read_requests") * value("request")


def cores_needed() -> float:
    """Cores that decode for one GPU that encodes in bf16."""
    return pictures_a_gpu("bf16") / PICTURES * measured("decode_core")


def files() -> int:
    """Of the data set, for one copy."""
    return units()


def shard_bytes() -> float:
    return tokens() * value("bytes_per_token")


# What the driver, and every reader, holds.


@dataclass(frozen=True)
class Driver:
    """Bytes and seconds of what does not shrink with the number of GPUs. `reader_*` are those of each process that reads rows."""

    plan_bytes: float
    plan_seconds: float
    packed_bytes: float
    manifest_bytes: float
    manifest_seconds: float
    reader_bytes: float
    reader_tokens: float
    reader_names: float
    reader_seconds: float


def driver() -> Driver:
    return Driver(
        plan_bytes=SENTENCES * measured("plan_bytes"),
        plan_seconds=SENTENCES * measured("plan_seconds"),
        packed_bytes=SENTENCES * measured("packed_bytes"),
        manifest_bytes=files() * measured("manifest_bytes"),
        manifest_seconds=files() * measured("manifest_seconds"),
        reader_bytes=IMAGES * measured("reader_held"),
        reader_tokens=IMAGES * 2.0 * PICTURES * image_tokens(),
        reader_names=IMAGES * (49 + value("id_bytes") + 8),  # a Python string of one-byte characters, and its place in a list
        reader_seconds=IMAGES * measured("sentences_seconds"),
    )


def most_images(readers: int) -> float:
    """Images at which so many reader processes fill a node's memory."""
    return value("node_memory") / readers / measured("reader_held")


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


# Evaluation.

TEST_ITEMS = 30_000  # three tasks


def evaluation_hours(gpus: int) -> float:
    """Answers of 256 tokens to prompts of 1,792, `evaluate.batch` at once: products while it reads, memory while it writes."""
    teacher, student = runs(8)
    seconds = 0.0
    for run in (teacher, student):
        prompt = run.sentence_tokens - run.image_tokens
        read = prompt * operations(run) / 3 / gpu_rate()
        weights = 2 * estimate.trained_parameters(run.model, run.tokenizer.codes)
        cache = 2 * 2 * run.model.layers * run.model.width * run.sentence_tokens * run.evaluate.batch
        write = run.image_tokens * (weights + cache) / (value("gpu_memory_rate") * 0.5) / run.evaluate.batch
        seconds += TEST_ITEMS * (read + write)
    return seconds / gpus / HOUR


# Money.


def dollars(hours: float, gpus: int) -> float:
    return hours * gpus * value("gpu_hour")


@dataclass(frozen=True)
class Plan:
    """Hours of each stage on so many GPUs."""

    tokenize: float
    teacher: float
    student: float
    evaluate: float

    @property
    def total(self) -> float:
        return self.tokenize + self.teacher + self.student + self.evaluate


def whole(gpus: int, changed: bool) -> Plan:
    teacher, student = runs(gpus)
    return Plan(
        tokenize=tokenizing(gpus, changed).total,
        teacher=training(teacher, gpus, changed=changed).total,
        student=training(student, gpus, teacher, changed=changed).total,
        evaluate=evaluation_hours(gpus),
    )
