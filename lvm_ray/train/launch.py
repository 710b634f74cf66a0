"""From a recipe to a trained run folder: checks, then the loop here or on Ray Train's workers, then the export.

    RUN/config.yaml   the resolved recipe: running it again is the same run
    RUN/metrics.jsonl RUN/checkpoints/  written while it trains
    RUN/model/        written when it is done

`compute.workers: 0` trains in this process without Ray; 1 and more are Ray Train's. Both read the same rows and write the same
folder. A run that was interrupted goes on from, in this order: 1. its finished model: nothing is left to do; 2. its last
checkpoint; 3. the start.
"""

from __future__ import annotations

import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import lvm_ray.tokenizer
from lvm_ray import config
from lvm_ray.config import Recipe
from lvm_ray.data.balance import loss_weights, strategy, training_rows
from lvm_ray.data.plan import make_plan
from lvm_ray.data.shards import PAIR, open_shards
from lvm_ray.data.stream import Batch, accumulation, data_config, local_batches, read_rows, training_dataset, worker_batches
from lvm_ray.errors import UserError
from lvm_ray.progress import Bar, duration
from lvm_ray.storage import is_uri, redacted
from lvm_ray.train.preflight import check_batch, check_teacher, checks

if TYPE_CHECKING:
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    from lvm_ray.train.checkpoint import State
    from lvm_ray.train.losses import TrainingModule

# Crashed workers are started again this often, from the last checkpoint.
RESTARTS = 2
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
    check_batch(recipe)
    job, place = make_job(recipe)
    run, state = Path(recipe.run), _reached(recipe, job.state)
    done = state.step == recipe.train.steps
    if not done:
        for check in checks(recipe):
            check.run()
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(config.dump(recipe), encoding="utf-8")
    bar.set(state.step, note="already trained" if done else f"from step {state.step}" if state.step else "starting")
    if not done:
        with _watched(run, bar):
            _train_on_ray(job) if recipe.compute.most_workers else _train_here(job)
    if not (done and (run / "model" / "model.safetensors").is_file()):
        _export(job, place)
    return run


def make_job(recipe: Recipe) -> tuple[Job, str]:
    """What workers need of a resolved recipe, and the folder of its tokenizer. Writes nothing.

    Raises UserError where the recipe, the shards, the tokenizer and the teacher do not fit together.
    """
    shards = open_shards(recipe.shard_folder)
    place = tokenizer_folder(recipe)
    tokenizer = lvm_ray.tokenizer.load_tokenizer(place)
    shards.require_tokenizer(tokenizer.hash)
    check_teacher(recipe, tokenizer.hash)
    plan = make_plan(shards.manifest, recipe)

    from lvm_ray.train import checkpoint  # torch, only now that the cheap checks are over

    fresh = checkpoint.State(fingerprint=config.fingerprint(recipe), plan=plan.fingerprint, precision=recipe.compute.precision)
    pictures = shards.manifest.images_per_row
    weights = loss_weights(recipe.balance, strategy(recipe.balance, training_rows(shards.manifest, recipe), pictures))
    even = tuple(pictures[task] != PAIR for task in recipe.tasks)
    codebook_VE, weighted = np.asarray(tokenizer.codebook, np.float32), tuple(weights.values()) if weights else None
    return Job(_absolute(recipe), codebook_VE, tokenizer.hash, fresh, weighted, even if any(even) else None), place


def rehearse(recipe: Recipe) -> str:
    """Pass the first micro batch of a resolved recipe forward and backward, on a worker's resources, and nothing more: what it
    found, as text. Raises UserError as `train` would in its first step."""
    job, _ = make_job(recipe)
    if not recipe.compute.most_workers:
        return _rehearse_alone(job)
    from lvm_ray import ray_session
    from lvm_ray.train.preflight import ask_a_worker

    ray_session.start(recipe)
    return str(ask_a_worker(_rehearse_alone, job, gpu=recipe.compute.device == "cuda"))


def _rehearse_alone(job: Job) -> str:
    import torch

    recipe = job.recipe
    assert recipe.compute.threads is not None
    torch.set_num_threads(recipe.compute.threads)
    student = _model(job)
    _inherit(job, student)
    plan = make_plan(open_shards(recipe.shard_folder).manifest, recipe)
    started = time.perf_counter()
    loss = _rehearse(job, *_modules(job, student), read_rows(recipe, plan, 0, recipe.train.micro_batch), 0)
    seconds = time.perf_counter() - started
    return f"a micro batch passes in {duration(seconds)}, loss {loss:.3f}"


def _rehearse(job: Job, module: TrainingModule, teacher: TrainingModule | None, batch: Batch, step: int) -> float:
    """A micro batch before the step after `step`, as the loop will pass it: its loss."""
    import torch

    from lvm_ray.train import rehearsal

    tokens_BT = torch.from_numpy(batch["tokens"].astype(np.int64))
    of_tasks = {name: values for name, values in (("weights_B", job.weights), ("even_B", job.even)) if values is not None}
    sentences = {name: torch.tensor(values)[batch["task"]] for name, values in of_tasks.items()}
    where = f"step {step + 1} (rows {batch['row'].min()} to {batch['row'].max()} of the plan)"
    if teacher is not None:
        rehearsal.check_teacher_loss(teacher, tokens_BT, job.recipe, sentences)
    return rehearsal.rehearse(module, tokens_BT, job.recipe, sentences, where)


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with its threads and its precision decided for this machine."""
    compute = recipe.compute
    threads = compute.threads or max(1, (os.cpu_count() or 1) // max(compute.most_workers, 1))
    precision = compute.precision if compute.precision != "auto" else ("bf16" if _computes_bf16() else "fp32")
    return recipe.model_copy(update={"compute": compute.model_copy(update={"threads": threads, "precision": precision})})


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


def work(job: Job, batches_from: Callable[[int], Iterator[Batch]], workers: int, leader: bool) -> None:
    """One worker's whole part of a run. `batches_from` gives its micro batches from a position on."""
    import torch

    from lvm_ray.train import checkpoint, loop
    from lvm_ray.train.engine import Engine

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
    module, teacher = _modules(job, student)
    each = accumulation(recipe, workers)
    batches = batches_from(state.rows)
    first = next(batches, None)  # a plan that is used up has none
    if first is not None:
        _rehearse(job, module, teacher, first, state.step)
        batches = itertools.chain([first], batches)
    engine = Engine(module, recipe.train, each, recipe.compute.precision)
    if found:
        any_tokens = torch.zeros((recipe.train.micro_batch, recipe.sentence_tokens), dtype=torch.int64)
        engine.restore(parameters, moments, state.step, any_tokens)
    try:
        loop.train(engine, batches, recipe, state, each, leader, job.weights, job.even)
    finally:
        engine.close()


def _modules(job: Job, student: LlamaForCausalLM) -> tuple[TrainingModule, TrainingModule | None]:
    """What is trained, and the teacher by itself under the same loss."""
    from lvm_ray.model.llama import use_causal_blocks
    from lvm_ray.train.losses import TrainingModule

    recipe, teacher, distill = job.recipe, _teacher(job), job.recipe.distill
    if recipe.compute.precision == "bf16":
        for model in (student, *([teacher] if teacher else [])):
            use_causal_blocks(model)
    shape, even = (recipe.sentence_tokens, recipe.image_tokens, recipe.train.image_weight), job.even is not None
    temperature, strength = (distill.temperature, distill.weight) if distill else (1.0, 0.0)
    module = TrainingModule(student, *shape, teacher, temperature, strength, even)
    return module, TrainingModule(teacher, *shape, even=even) if teacher else None


def _train_here(job: Job) -> None:
    plan = make_plan(open_shards(job.recipe.shard_folder).manifest, job.recipe)
    work(job, lambda position: local_batches(job.recipe, plan, position), workers=1, leader=True)


def _train_on_ray(job: Job) -> None:
    from lvm_ray import ray_session

    workers = job.recipe.compute.most_workers
    ray_session.start(workers)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    scratch = Path(job.recipe.run) / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name="train", storage_path=str(scratch), failure_config=FailureConfig(max_failures=RESTARTS)),
        datasets={"train": training_dataset(job.recipe, lambda: _position(job))},
        dataset_config=data_config(),
    )
    complaint = scratch / "complaint.txt"
    try:
        trainer.fit()
    except Exception:
        if not complaint.is_file():
            raise
    if complaint.is_file():
        raise UserError(complaint.read_text(encoding="utf-8"))
    shutil.rmtree(scratch, ignore_errors=True)


def _ray_worker(arguments: dict[str, Any]) -> None:
    import ray.train

    job: Job = arguments["job"]
    complaint = Path(job.recipe.run) / SCRATCH / "complaint.txt"
    if complaint.is_file():
        return  # bad input stays bad: a restart would only fail again
    context = ray.train.get_context()
    shard = ray.train.get_dataset_shard("train")
    try:
        # Ray has opened the stream at the last checkpoint's position, as _position says.
        work(
            job,
            lambda position: worker_batches(shard, job.recipe.train.micro_batch),
            workers=context.get_world_size(),
            leader=context.get_world_rank() == 0,
        )
    except UserError as error:
        # By way of a file: Ray hands the driver a wrapped exception, and after its restarts.
        complaint.with_suffix(".new").write_text(str(error), encoding="utf-8")
        os.replace(complaint.with_suffix(".new"), complaint)
        raise


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
    """Start the student from the teacher's layers that the recipe names, in fp32, or leave it as it is."""
    import torch

    from lvm_ray.model.export import load_model
    from lvm_ray.model.llama import inherit

    distill = job.recipe.distill
    if distill is not None and distill.teacher is not None and distill.layers is not None:
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
    from lvm_ray.model.export import export
    from lvm_ray.train import checkpoint

    recipe = job.recipe
    found = checkpoint.latest(recipe.run)
    assert found is not None, "training ended without a checkpoint"
    model = _model(job)
    model.load_state_dict(checkpoint.load(found)[0], strict=True)
    folder = Path(recipe.run) / "model"
    info = {
        "kind": recipe.tokenizer.kind,
        "hash": job.codebook,
        "codes": len(job.codebook_VE),
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
    return recipe.model_copy(update=changes)


def _absolute_path(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


def _computes_bf16() -> bool:
    """Whether the processor multiplies bf16 by itself; elsewhere it is emulated, and slower than fp32."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


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
