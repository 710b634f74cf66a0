"""From a recipe to a trained run folder: checks, then the loop here or on Ray Train's workers, then the export.

    RUN/config.yaml   the resolved recipe: running it again is the same run
    RUN/metrics.jsonl RUN/checkpoints/  written while it trains
    RUN/model/        written when it is done

`compute.workers: 0` trains in this process without Ray; 1 and more are Ray Train's. Both read the same rows and write the same
folder. A run that was interrupted goes on from, in this order: 1. its finished model: nothing is left to do; 2. its last
checkpoint; 3. the start.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

import lvm_ray.tokenizer
from lvm_ray import config, ray_session
from lvm_ray.config import ComputeSection, Recipe
from lvm_ray.data.balance import loss_weights, strategy, training_rows
from lvm_ray.data.plan import make_plan
from lvm_ray.data.shards import PAIR, open_shards
from lvm_ray.data.stream import Batch, accumulation, data_config, local_batches, training_dataset, worker_batches
from lvm_ray.errors import Stopped, UserError
from lvm_ray.progress import Bar
from lvm_ray.storage import is_uri, redacted
from lvm_ray.train import workers
from lvm_ray.train.preflight import check_teacher
from lvm_ray.train.start import check_start, model_folder

if TYPE_CHECKING:
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    from lvm_ray.train.checkpoint import State

SCRATCH = ".ray"  # below the run folder: what Ray Train writes, removed at the end
WATCH_EVERY = 1.0  # seconds


@dataclass(frozen=True)
class Job:
    """All that a worker needs: a plain value that travels to it.

    recipe       resolved, with absolute paths
    codebook_VE  the tokenizer's, float32
    state        what a fresh run starts from; carries the fingerprints that its checkpoints must have
    weights      each task's weight in the loss; None: all weigh the same
    even         whether each task's sentences are no pairs; None: all are pairs
    """

    recipe: Recipe
    codebook_VE: NDArray[np.float32]
    codebook: str
    state: State
    weights: tuple[float, ...] | None
    even: tuple[bool, ...] | None


def train(recipe: Recipe, bar: Bar) -> Path:
    """Train a single-run recipe (its `run` is the run folder). The run folder.

    `recipe.distill.teacher` names a finished teacher's run folder. `bar` counts steps.

    Raises UserError where the recipe, the shards, the tokenizer, the teacher or a checkpoint do not fit together, and where
    the loss stops being a number.
    """
    assert recipe.teacher is None, "a pipeline recipe: split it with teacher_recipe and student_recipe"
    recipe = resolve(recipe)
    accumulation(recipe, recipe.compute.most_workers)
    shards = open_shards(recipe.shard_folder)
    place = tokenizer_folder(recipe)
    tokenizer = lvm_ray.tokenizer.load_tokenizer(place)
    shards.require_tokenizer(tokenizer.hash)
    check_teacher(recipe, tokenizer.hash)
    plan = make_plan(shards.manifest, recipe)

    from lvm_ray.train import checkpoint  # torch, only now that the cheap checks are over

    run = Path(recipe.run)
    fresh = checkpoint.State(fingerprint=config.fingerprint(recipe), plan=plan.fingerprint, precision=recipe.compute.precision)
    state = _reached(recipe, fresh)
    if not state.step:
        check_start(recipe, tokenizer)
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(config.dump(recipe), encoding="utf-8")
    pictures = shards.manifest.images_per_row
    weights = loss_weights(recipe.balance, strategy(recipe.balance, training_rows(shards.manifest, recipe), pictures))
    even = tuple(pictures[task] != PAIR for task in recipe.tasks)
    codebook_VE, weighted = np.asarray(tokenizer.codebook, np.float32), tuple(weights.values()) if weights else None
    job = Job(_absolute(recipe), codebook_VE, tokenizer.hash, fresh, weighted, even if any(even) else None)
    done = state.step == recipe.train.steps
    bar.set(state.step, note="already trained" if done else f"from step {state.step}" if state.step else "starting")
    if not done:
        with _watched(run, bar):
            _train(job)
    if not (done and (run / "model" / "model.safetensors").is_file()):
        _export(job, place)
    return run


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with its threads, its device and its precision decided for this machine, or for the cluster that it joins."""
    compute = recipe.compute
    device = compute.device if compute.device != "auto" else ("cuda" if _has_gpus(compute) else "cpu")
    threads = compute.threads or max(1, (os.cpu_count() or 1) // max(compute.most_workers, 1))
    precision = compute.precision if compute.precision != "auto" else _precision(device)
    if precision == "fp16" and device == "cpu":
        raise UserError("compute.precision: fp16 needs a GPU: set bf16 or fp32, or leave it out")
    resolved = {"threads": threads, "device": device, "precision": precision}
    return recipe.model_copy(update={"compute": compute.model_copy(update=resolved)})


def tokenizer_folder(recipe: Recipe) -> str:
    """The tokenizer of a run: that in its shards (SHARDS/tokenizer, of imported tokens), its own, its pipeline folder's, or
    that beside its shards (PIPELINE/data/shards). With shards at a URI only those at a path: raises UserError where none is."""
    pipeline = os.path.dirname(os.path.abspath(recipe.run))
    own = [recipe.tokenizer_folder, f"{pipeline}/tokenizer"]
    if is_uri(recipe.shard_folder):
        found = next((place for place in own if Path(place).is_dir()), None)
        if found is None:
            raise UserError(
                f"{redacted(recipe.shard_folder)}: tokens at a URI need their tokenizer in a folder of this machine: copy it to "
                f"{own[0]}, or for every run of a pipeline to {own[1]} (imported tokens have it in their folder `tokenizer`)"
            )
        return found
    of_shards = os.path.dirname(os.path.dirname(os.path.abspath(recipe.shard_folder)))
    places = [f"{os.path.abspath(recipe.shard_folder)}/tokenizer", *own, f"{of_shards}/tokenizer"]
    return next((place for place in places if Path(place).is_dir()), places[-1])


def _train(job: Job) -> None:
    """To the last step, here or on workers. Raises Stopped where the run was asked to leave before, and has saved."""
    recipe = job.recipe
    if recipe.compute.most_workers:
        ray_session.start(recipe)  # first: it takes SIGTERM for itself
    with workers.asked_to_leave(_scratch(recipe)) as asked:
        reached = _reached(recipe, job.state).step
        while reached < recipe.train.steps:
            _train_on_ray(job) if recipe.compute.most_workers else _train_here(job, asked)
            before, reached = reached, _reached(recipe, job.state).step
            if reached < recipe.train.steps and asked.is_set():
                raise Stopped(
                    f"saved step {reached} of {recipe.train.steps} in {recipe.run}: the same command goes on from there"
                )
            # Workers that return early have saved since Ray took a node away: they start again where there is room.
            assert reached > before, "training ended early and without a step"


def work(job: Job, batches_from: Callable[[int], Iterator[Batch]], workers: int, leader: bool, leave: Callable[[], bool]) -> None:
    """One worker's whole part of a run.

    `batches_from` gives its micro batches from a position on; `leave` says after each step whether to save and return.
    """
    import torch

    from lvm_ray.model.attention import use_causal_attention
    from lvm_ray.train import checkpoint, loop
    from lvm_ray.train.engine import Engine
    from lvm_ray.train.losses import TrainingModule

    recipe = job.recipe
    assert recipe.compute.threads is not None
    torch.set_num_threads(recipe.compute.threads)
    student, state = _model(job), job.state
    found = checkpoint.latest(recipe.run)
    if found:
        state = checkpoint.read_state(found)
        parameters, moments = checkpoint.load(found)
        student.load_state_dict(parameters, strict=True)
    else:
        _inherit(job, student)
    if leader:
        loop.cut_metrics(recipe.run, state.step)
    teacher, distill = _teacher(job), recipe.distill
    compute = recipe.compute
    if (compute.precision, compute.device, compute.attention) == ("bf16", "cpu", "auto"):
        for model in (student, *([teacher] if teacher else [])):
            use_causal_attention(model)
    module = TrainingModule(
        student,
        recipe.sentence_tokens,
        recipe.image_tokens,
        recipe.train.image_weight,
        teacher,
        distill.temperature if distill else 1.0,
        distill.weight if distill else 0.0,
        job.even is not None,
    )
    each = accumulation(recipe, workers)
    engine = Engine(module, recipe, each)
    if found:
        any_tokens = torch.zeros((recipe.train.micro_batch, recipe.sentence_tokens), dtype=torch.int64)
        engine.restore(parameters, moments, state.step, any_tokens)
    try:
        loop.train(engine, batches_from(state.rows), recipe, state, each, leader, leave, job.weights, job.even)
    finally:
        engine.close()


def _train_here(job: Job, asked: threading.Event) -> None:
    plan = make_plan(open_shards(job.recipe.shard_folder).manifest, job.recipe)
    work(job, lambda position: local_batches(job.recipe, plan, position), 1, True, asked.is_set)


def _train_on_ray(job: Job) -> None:
    recipe = job.recipe
    datasets = {"train": training_dataset(recipe, lambda: _position(job))}
    workers.run(partial(_work_on_ray, job), recipe.compute, _scratch(recipe), datasets, data_config())


def _work_on_ray(job: Job) -> None:
    import ray.train

    context = ray.train.get_context()
    shard = ray.train.get_dataset_shard("train")
    # Ray has opened the stream at the last checkpoint's position, as _position says.
    work(
        job,
        lambda position: worker_batches(shard, job.recipe.train.micro_batch),
        context.get_world_size(),
        context.get_world_rank() == 0,
        workers.must_leave(_scratch(job.recipe)),
    )


def _scratch(recipe: Recipe) -> Path:
    return Path(recipe.run) / SCRATCH


def _position(job: Job) -> int:
    """Rows consumed by the last checkpoint."""
    return _reached(job.recipe, job.state).rows


def _reached(recipe: Recipe, fresh: State) -> State:
    """The last checkpoint's state, or the fresh one. Raises UserError where it belongs to another recipe or other data."""
    from lvm_ray.train import checkpoint

    found = checkpoint.latest(recipe.run)
    if not found:
        return fresh
    state = checkpoint.read_state(found)
    checkpoint.require_same(found, state, fresh.fingerprint, fresh.plan)
    return state


def _model(job: Job) -> LlamaForCausalLM:
    """The recipe's model with fresh weights."""
    import torch

    from lvm_ray.model.llama import build

    recipe, codebook_VE = job.recipe, torch.from_numpy(job.codebook_VE)
    return build(recipe.model, codebook_VE, recipe.sentence_tokens, recipe.image_tokens, recipe.seed)


def _inherit(job: Job, student: LlamaForCausalLM) -> None:
    """Start the student from the model or from the teacher's layers that the recipe names, in fp32, or leave it as it is."""
    import torch

    from lvm_ray.model.export import load_model
    from lvm_ray.model.llama import inherit

    distill, init = job.recipe.distill, job.recipe.model.init
    if init is not None:
        model, _ = load_model(model_folder(init), torch.float32, job.codebook)
        inherit(student, model, range(job.recipe.model.layers))
    elif distill is not None and distill.teacher is not None and distill.layers is not None:
        teacher, _ = load_model(Path(distill.teacher) / "model", torch.float32, job.codebook)
        inherit(student, teacher, distill.layers)


def _teacher(job: Job) -> LlamaForCausalLM | None:
    """The frozen teacher in the run's precision, or None."""
    import torch

    from lvm_ray.model.export import load_model

    distill = job.recipe.distill
    if distill is None or distill.teacher is None:
        return None
    dtype = torch.bfloat16 if job.recipe.compute.precision == "bf16" else torch.float32
    model, _ = load_model(Path(distill.teacher) / "model", dtype, job.codebook)
    return model.requires_grad_(False)


def _export(job: Job, tokenizer: str) -> None:
    """Write RUN/model from the last checkpoint."""
    from lvm_ray.train import checkpoint

    found = checkpoint.latest(job.recipe.run)
    assert found is not None, "training ended without a checkpoint"
    write_model(job.recipe, job.codebook_VE, job.codebook, found, tokenizer, Path(job.recipe.run) / "model")


def write_model(
    recipe: Recipe, codebook_VE: NDArray[np.float32], codebook: str, found: Path, tokenizer: str, folder: Path
) -> None:
    """Write a checkpoint as a stock folder. `codebook` is the hash, and `tokenizer` the folder, of the tokenizer."""
    import torch

    from lvm_ray.model.export import export
    from lvm_ray.model.llama import build
    from lvm_ray.train import checkpoint

    model = build(recipe.model, torch.from_numpy(codebook_VE), recipe.sentence_tokens, recipe.image_tokens, recipe.seed)
    model.load_state_dict(checkpoint.load(found)[0], strict=True)
    info = {
        "kind": recipe.tokenizer.kind,
        "hash": codebook,
        "codes": len(codebook_VE),
        "patch": recipe.tokenizer.patch,
        "size": recipe.size,
        "image_tokens": recipe.image_tokens,
        "folder": os.path.relpath(tokenizer, folder),
    }
    export(model, folder, info)


def _absolute(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths: workers may stand in another folder."""
    changes: dict[str, Any] = {"run": _absolute_path(recipe.run), "shards": _absolute_path(recipe.shard_folder)}
    if recipe.distill and recipe.distill.teacher:
        changes["distill"] = recipe.distill.model_copy(update={"teacher": _absolute_path(recipe.distill.teacher)})
    if recipe.model.init:
        changes["model"] = recipe.model.model_copy(update={"init": _absolute_path(recipe.model.init)})
    return recipe.model_copy(update=changes)


def _absolute_path(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


def _has_gpus(compute: ComputeSection) -> bool:
    """Whether there is a GPU for a worker: on the cluster that a run joins, or on this machine."""
    if compute.workers and os.environ.get("RAY_ADDRESS"):
        ray_session.start(compute.most_workers)
        import ray

        return bool(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
    import torch

    return torch.cuda.is_available()


def _precision(device: str) -> Literal["bf16", "fp32"]:
    """bf16 where it is computed; on other processors it is emulated, and slower than fp32."""
    import torch

    native = device == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"


@contextmanager
def _watched(run: Path, bar: Bar) -> Iterator[None]:
    """Move the bar by the journal while the body trains: the one source that workers anywhere write to."""
    # Before the thread starts: two threads that import transformers at once see it half made.
    from lvm_ray.train.loop import read_metrics

    def show() -> None:
        lines = read_metrics(run)
        if lines:
            bar.set(lines[-1]["step"], note=f"loss {lines[-1]['loss']:.3f}")

    with watching(show):
        yield


@contextmanager
def watching(look: Callable[[], None]) -> Iterator[None]:
    """Call `look` every second while the body works, and once more when it has ended well."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(WATCH_EVERY):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    look()
