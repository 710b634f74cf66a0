"""What a worker needs of a recipe: a plain value, made and checked by the driver, and the models that it stands for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import lvm_ray.tokenizer
from lvm_ray import config, placement, ray_session, recipe_sections, tally, working_copy
from lvm_ray.config import Recipe
from lvm_ray.data.balance import loss_weights, strategy, training_rows
from lvm_ray.data.plan import make_plan
from lvm_ray.data.shards import PAIR, open_shards
from lvm_ray.data.teacher_cache import require_caches
from lvm_ray.errors import UserError
from lvm_ray.progress import say
from lvm_ray.recipe_sections import OneTeacherSection
from lvm_ray.storage import is_uri, redacted
from lvm_ray.train.preflight import check_features, check_teacher
from lvm_ray.train.start import check_start, model_folder

if TYPE_CHECKING:
    import torch
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    from lvm_ray.train.checkpoint import State
    from lvm_ray.train.features import Features
    from lvm_ray.train.head import Teacher
    from lvm_ray.train.losses import TrainingModule


@dataclass(frozen=True)
class Job:
    """All that a worker needs: a plain value that travels to it.

    recipe       resolved, with absolute paths
    codebook_VE  the tokenizer's, float32
    codebook     its hash
    tokenizer    its folder
    state        what a fresh run starts from; carries the fingerprints that its checkpoints must have
    weights      each task's weight in the loss; None: all weigh the same
    even         whether each task's sentences are no pairs; None: all are pairs
    """

    recipe: Recipe
    codebook_VE: NDArray[np.float32]
    codebook: str
    tokenizer: str
    state: State
    weights: tuple[float, ...] | None
    even: tuple[bool, ...] | None


def make_job(recipe: Recipe, cached: bool = True) -> Job:
    """The job of a resolved recipe. Writes nothing. `cached`: whether teachers' answers must lie in the caches that it names.

    Raises UserError where the recipe, the shards, the tokenizer, the teachers and the model to start from do not fit together.
    """
    shards = open_shards(recipe.shard_folder)
    place = tokenizer_folder(recipe)
    tokenizer = lvm_ray.tokenizer.load_tokenizer(place)
    shards.require_tokenizer(tokenizer.hash)
    check_teacher(recipe, tokenizer.hash)
    check_features(recipe)
    plan = make_plan(shards.manifest, recipe)

    from lvm_ray.train import checkpoint  # torch, only now that the cheap checks are over

    if checkpoint.latest(recipe.run) is None:  # a run on its way needs its start no more
        check_start(recipe, tokenizer)
    of_recipe = config.fingerprint(working_copy.published(recipe))
    fresh = checkpoint.State(fingerprint=of_recipe, plan=plan.fingerprint, precision=recipe.compute.precision)
    pictures = shards.manifest.images_per_row
    weights = loss_weights(recipe.balance, strategy(recipe.balance, training_rows(shards.manifest, recipe), pictures))
    even = tuple(pictures[task] != PAIR for task in recipe.tasks)
    if cached:
        require_caches(recipe, plan, any(even))
    return Job(
        recipe=absolute(recipe),
        codebook_VE=np.asarray(tokenizer.codebook, np.float32),
        codebook=tokenizer.hash,
        tokenizer=os.path.abspath(place),
        state=fresh,
        weights=tuple(weights.values()) if weights else None,
        even=even if any(even) else None,
    )


def resolve(recipe: Recipe, stage: placement.Stage = "train") -> Recipe:
    """The recipe with its threads, its device and its precision decided for this machine, or for the nodes of a stage on the
    cluster that it joins."""
    compute = recipe.compute
    device = compute.device if compute.device != "auto" else ("cuda" if _has_gpus(recipe, stage) else "cpu")
    threads = compute.threads or max(1, (os.cpu_count() or 1) // max(compute.most_workers, 1))
    bf16 = device == "cuda" or computes_bf16()
    precision = compute.precision if compute.precision != "auto" else ("bf16" if bf16 else "fp32")
    if precision == "fp16" and device == "cpu":
        raise UserError("compute.precision: fp16 needs a GPU: set bf16 or fp32, or leave it out")
    if precision == "bf16" and not bf16:
        say("warning: compute.precision: bf16 on a processor that only emulates it, hundreds of times slower: leave it out")
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


def fresh_model(job: Job) -> LlamaForCausalLM:
    """The recipe's model with fresh weights."""
    import torch

    from lvm_ray.model.llama import build

    recipe, codebook_VE = job.recipe, torch.from_numpy(job.codebook_VE)
    return build(recipe.model, codebook_VE, recipe.sentence_tokens, recipe.image_tokens, recipe.training_seed)


def inherit_weights(job: Job, student: LlamaForCausalLM) -> None:
    """Start the student from the model or from the teacher's layers that the recipe names, in fp32, or leave it as it is."""
    import torch

    from lvm_ray.model.folder import load_model
    from lvm_ray.model.llama import inherit

    distill, init = job.recipe.distill, job.recipe.model.init
    if init is not None:
        model, _ = load_model(model_folder(init), torch.float32, job.codebook)
        inherit(student, model, range(job.recipe.model.layers))
    elif distill is not None and distill.teacher is not None and distill.layers is not None:
        teacher, _ = load_model(Path(distill.teacher) / "model", torch.float32, job.codebook)
        inherit(student, teacher, distill.layers)


def modules(job: Job, student: LlamaForCausalLM) -> tuple[TrainingModule, dict[str, TrainingModule]]:
    """What is trained, and each teacher that it asks, by itself under the same loss."""
    from lvm_ray.data.teacher_cache import load_head
    from lvm_ray.train.divergences import named
    from lvm_ray.train.head import Teacher

    alone = {name: teacher_module(job, name) for name, one in job.recipe.teachers.items() if one.cache is None}
    teachers = []
    for name, one in job.recipe.teachers.items():
        model = alone[name].student if name in alone else None
        head = load_head(one.cache).to(device_of(job), _dtype(job)) if one.cache else alone[name].student.lm_head.weight
        divergence = named(one.divergence, one.beta)
        teachers.append(Teacher(model, head, recipe_sections.most_of(one.weight), one.temperature, divergence, one.sparse))
    return _module(job, student, teachers, _features(job)), alone


def _features(job: Job) -> Features | None:
    """The vision network that the recipe names, behind the decoder of the job's tokenizer."""
    from lvm_ray.train.features import Features, VisionNetwork, layer_of

    section = job.recipe.distill.features if job.recipe.distill else None
    if section is None:
        return None
    network = VisionNetwork(section, lvm_ray.tokenizer.load_tokenizer(job.tokenizer), _dtype(job), device_of(job))
    return Features(network, section.weight, layer_of(job.recipe, section))


def teacher_module(job: Job, name: str) -> TrainingModule:
    """A teacher, frozen and in the run's precision, under the run's loss without what others teach."""
    from lvm_ray.model.folder import load_model

    model, _ = load_model(Path(str(job.recipe.teachers[name].teacher)) / "model", _dtype(job), job.codebook)
    model.requires_grad_(False).to(device_of(job))  # type: ignore[arg-type]
    model.model.register_forward_hook(lambda *_: tally.count("teacher_forwards"))
    return _module(job, model)


def _module(
    job: Job, model: LlamaForCausalLM, teachers: Sequence[Teacher] = (), features: Features | None = None
) -> TrainingModule:
    from lvm_ray.train.losses import TrainingModule

    recipe = job.recipe
    use_fast_layers(model, recipe.compute)
    shape = recipe.sentence_tokens, recipe.image_tokens, recipe_sections.most_of(recipe.train.image_weight)
    return TrainingModule(model, *shape, teachers, job.even is not None, features)


def use_fast_layers(model: LlamaForCausalLM, compute: recipe_sections.ComputeSection) -> None:
    """Let a model compute with what is faster than the stock layers where a run trains, and gives the same."""
    from lvm_ray.model.attention import use_own_attention
    from lvm_ray.model.norm import use_norm_in_cache

    if compute.device == "cpu" and not compute.compile:
        use_own_attention(model, blocks=compute.precision == "bf16" and compute.attention == "auto")
        use_norm_in_cache(model)


def device_of(job: Job) -> torch.device:
    """Where a worker computes: Ray shows each worker its own card."""
    import torch

    return torch.device("cuda" if job.recipe.compute.device == "cuda" else "cpu")


def _dtype(job: Job) -> torch.dtype:
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[job.recipe.compute.precision]


def absolute(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths: workers may stand in another folder."""
    changes: dict[str, Any] = {"run": _absolute_path(recipe.run), "shards": _absolute_path(recipe.shard_folder)}
    if recipe.distill:
        also = {name: _absolute_teacher(one) for name, one in recipe.distill.also.items()}
        features = recipe.distill.features
        if features:
            features = features.model_copy(update={"weights": _absolute_path(features.weights)})
        changes["distill"] = _absolute_teacher(recipe.distill).model_copy(update={"also": also, "features": features})
    if recipe.model.init:
        changes["model"] = recipe.model.model_copy(update={"init": _absolute_path(recipe.model.init)})
    return recipe.model_copy(update=changes)


def _absolute_teacher(section: OneTeacherSection) -> OneTeacherSection:
    paths = {"teacher": section.teacher, "cache": section.cache}
    return section.model_copy(update={name: path and _absolute_path(path) for name, path in paths.items()})


def _absolute_path(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


def _has_gpus(recipe: Recipe, stage: placement.Stage) -> bool:
    """Whether there is a GPU for a worker: on a stage's nodes of the cluster that a run joins, or on this machine."""
    if recipe.compute.workers and ray_session.joined():
        ray_session.start(recipe)
        return placement.gpus_of(placement.nodes_of(placement.place_of(recipe, stage))) > 0
    import torch

    return torch.cuda.is_available()


def computes_bf16() -> bool:
    """Whether this processor multiplies matrices in bf16. Others emulate it: a product of 1,024^3 took 90 times fp32's time on
    one, and one of 2,048^3 took 340 times as long."""
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
