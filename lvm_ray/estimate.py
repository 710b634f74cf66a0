"""What a recipe would cost: parameters, tokens, epochs, memory, disk, hours. For `--dry-run`, and for the check of memory.

All of it is arithmetic but for one measurement of this machine's matrix product. A step computes 6 floating-point operations a
parameter and token, and 6 x layers x width x length for attention. Of the memory, weights and what belongs to them are counted,
and activations are estimated from what the decoder keeps for its gradients; measured peaks lie within a quarter of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from lvm_ray import config, recipe_sections
from lvm_ray.config import Recipe
from lvm_ray.errors import UserError
from lvm_ray.json_file import read_object
from lvm_ray.recipe_sections import ModelSection

GPU_RATE = 312e12  # bf16 operations a second of an A100, the paper's card
GPU_SHARE = 0.4  # of that rate, which such a training commonly reaches
CPU_SHARE = 0.4  # of the measured rate of the matrix product
LIBRARIES = 0.45 * 2**30  # bytes that a worker's libraries take by themselves
HEAP = 1.85  # activations' share of a process's memory over their own size: a heap has holes
BUCKET = 500_000_000  # numbers of DeepSpeed's largest bucket, as in `engine`
SHORT = 1024  # tokens of the longest sentences whose attention keeps its probabilities
# Logits of each model, held and passed over at once by device: `train/head.py` works in such pieces, and `model/norm.py` passes
# over as many states.
LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**26}
PASSED_AT_ONCE = {"cpu": 2**18, "cuda": 2**26}
LOGIT_BYTES, TEACHER_LOGIT_BYTES = 8, 24  # of what is computed from a logit that is passed over, and from its teacher's


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker.

    weights      of the student, and of its teachers beside it
    gradients    the weights' own and what ZeRO gathers of them
    masters      fp32 copies of the weights that the optimizer moves
    moments      the optimizer's
    buffers      DeepSpeed's bucket of gradients, and what the optimizer computes a step in
    activations  what the layers keep of a micro batch for their gradients
    logits       of the positions that are computed at once, and of their gradients
    libraries    what a process needs before it holds any number
    """

    weights: float
    gradients: float
    masters: float
    moments: float
    buffers: float
    activations: float
    logits: float
    libraries: float = LIBRARIES

    @property
    def total(self) -> float:
        return sum((getattr(self, field.name) for field in fields(self)), 0.0)


def parameters(model: ModelSection, codes: int) -> int:
    """Parameters of the decoder with its head, without the input table: attention with bias, SwiGLU without."""
    width = model.width
    layer = 4 * (width * width + width) + 3 * width * model.mlp + 2 * width
    return model.layers * layer + width + width * codes


def table_parameters(model: ModelSection, codes: int) -> int:
    """Parameters of the input table. With `embedding: codebook` it is folded from far fewer, for the exported model alone."""
    return model.width * codes


def operations_per_token(model: ModelSection, codes: int, length: int, teachers: Sequence[ModelSection] = ()) -> float:
    """Floating-point operations of forward and backward for one token of a sentence of `length` tokens, and of the forward of
    `teachers` that are asked about it, a third of as much."""
    own = 6 * parameters(model, codes) + 6 * model.layers * model.width * length
    return own + sum(operations_per_token(teacher, codes, length) for teacher in teachers) / 3


def trained_parameters(model: ModelSection, codes: int) -> int:
    """Parameters that the optimizer moves, but for the codebook's projection, whose size only the tokenizer knows."""
    return parameters(model, codes) + table_parameters(model, codes) * (model.embedding == "table")


def memory(recipe: Recipe, teachers: Sequence[ModelSection] = ()) -> Memory:
    """What one worker of a single run needs at the least number of workers. `teachers`: whose weights lie there as well."""
    codes, section, workers = recipe.tokenizer.codes, recipe.train, max(1, recipe.compute.least_workers)
    number = _number_bytes(recipe.compute.precision)
    trained = trained_parameters(recipe.model, codes)
    frozen = sum(parameters(teacher, codes) + table_parameters(teacher, codes) for teacher in teachers)
    owned = trained / workers  # what ZeRO leaves to one worker
    stage = section.zero if recipe.compute.precision == "fp32" else max(section.zero, 1)
    return Memory(
        weights=number * ((owned if stage == 3 else trained) + frozen),
        gradients=number * trained + (4 * (owned if stage >= 2 else trained) if stage else 0),
        masters=4 * owned if stage else 0,
        moments=8 * (owned if stage else trained),
        buffers=(number * min(trained, BUCKET) if stage else 0) + 4 * (owned if stage else trained),
        activations=_activations(recipe),
        logits=_logits(recipe),
    )


def _number_bytes(precision: str) -> int:
    return 4 if precision == "fp32" else 2


def _activations(recipe: Recipe) -> float:
    """Bytes that the layers keep of a micro batch: norms, queries, keys and values, attention's, and the SwiGLU's four."""
    model, length, tokens = recipe.model, recipe.sentence_tokens, recipe.train.micro_batch * recipe.sentence_tokens
    fp32 = recipe.compute.precision == "fp32"
    # In bf16 and short sentences `causal_attention` keeps the probabilities of half of all places.
    attention = model.heads * (1 if fp32 or length > SHORT else (length + 128) / 2)
    in_cache = recipe.compute.device != "cuda" and not recipe.compute.compile  # `model/norm.py` keeps no fp32 copies
    layer = (8 if in_cache else 10 if fp32 else 12) * model.width + 4 * model.mlp + attention
    kept = layer + model.layers * model.width if recipe.train.checkpoint_activations else model.layers * layer
    return HEAP * tokens * kept * _number_bytes(recipe.compute.precision)


def _logits(recipe: Recipe) -> float:
    """Bytes of the logits that are held at once, whose place their gradient takes, and of the teachers', asked or from a cache,
    and of what is computed where some of them are passed over: probabilities, differences, a gradient for each teacher."""
    section, tokens = recipe.train, recipe.sentence_tokens
    positions = section.micro_batch * (tokens - 1 if recipe_sections.most_of(section.image_weight) else tokens // 2)
    device = "cuda" if recipe.compute.device == "cuda" else "cpu"
    made, passed = (min(positions * recipe.tokenizer.codes, limit[device]) for limit in (LOGITS_AT_ONCE, PASSED_AT_ONCE))
    kept, teachers = _number_bytes(recipe.compute.precision), len(recipe.teachers)
    computed = LOGIT_BYTES + (TEACHER_LOGIT_BYTES + 4 * (teachers - 1) if teachers else 0)  # one after another
    return made * kept * (1 + teachers) + passed * computed


def checkpoint_bytes(recipe: Recipe) -> int:
    """A checkpoint on disk: weights and moments in fp32, two moments of AdamW's parameters and one of Muon's."""
    model = recipe.model
    trained = trained_parameters(model, recipe.tokenizer.codes)
    hidden = model.layers * (4 * model.width**2 + 3 * model.width * model.mlp)
    return 4 * (3 * trained - (hidden if recipe.train.optimizer == "muon" else 0))


def describe(recipe: Recipe, runs: Mapping[str, Recipe], trains: bool = False, elsewhere: bool = False) -> str:
    """The resolved recipe and the estimates of its single runs, as text. `trains`: also what only training needs: the hours
    on this machine, for which it measures 0.3 s, and DeepSpeed's configuration. `elsewhere`: without a look at the shards."""
    lines = [config.dump(recipe).rstrip(), ""]
    rates: dict[str, float] = {}
    for name, run in runs.items():
        codes, length = run.tokenizer.codes, run.sentence_tokens
        tokens = run.train.batch * length
        total = tokens * run.train.steps
        asked = teacher_models(run, runs)
        operations = total * operations_per_token(run.model, codes, length, asked)
        count, kept = parameters(run.model, codes), run.train.keep_checkpoints + run.train.keep_best
        saved = checkpoint_bytes(run)
        lines += [
            f"{name}: {count:,} parameters, {count + table_parameters(run.model, codes):,} with the input table",
            f"  {tokens:,} tokens a step x {run.train.steps:,} steps = {total:,} tokens",
            *([] if elsewhere else (f"  {line}" for line in _balance(run))),
            *(f"  {line}" for line in _memory_lines(run, asked)),
            *(f"  {line}" for line in _cache_lines(run, runs)),
            f"  {size_text(saved)} a checkpoint on disk, up to {size_text(kept * saved)} for {kept} kept",
            f"  {operations / (GPU_RATE * GPU_SHARE) / 3600:.3g} GPU-hours on an A100 at {GPU_SHARE:.0%} of its bf16 rate",
        ]
        if trains:
            precision = run.compute.precision
            rates[precision] = rates.get(precision) or matmul_rate(precision)
            seconds = operations / (rates[precision] * CPU_SHARE)
            measured = f"{rates[precision] / 1e9:,.0f} GFLOP/s that its {os.cpu_count()} cores multiply {precision} matrices with"
            lines += [f"  {seconds / 3600:.3g} hours of this machine at {CPU_SHARE:.0%} of the {measured}", *_deepspeed(run)]
    return "\n".join(lines)


def matmul_rate(precision: str, side: int = 1024, seconds: float = 0.3) -> float:
    """Operations a second of this machine's matrix product, measured on all of its cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    left, right = torch.ones(2, side, side, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision))
    left @ right  # the first product prepares the others
    started, products = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < seconds:
        left @ right
        products += 1
    torch.set_num_threads(threads)
    return 2 * side**3 * products / passed


def _memory_lines(run: Recipe, teachers: Sequence[ModelSection]) -> list[str]:
    need = memory(run, teachers)
    parts = ", ".join(f"{field.name} {size_text(getattr(need, field.name))}" for field in fields(need))
    workers = max(1, run.compute.least_workers)
    lines = [f"{size_text(need.total)} of memory a worker, of {workers} with ZeRO {run.train.zero}: {parts}"]
    if not run.train.checkpoint_activations:
        less = memory(run.model_copy(update={"train": run.train.model_copy(update={"checkpoint_activations": True})}), teachers)
        lines.append(f"activations would be {size_text(less.activations)} with train.checkpoint_activations")
    return lines


def _cache_lines(run: Recipe, runs: Mapping[str, Recipe]) -> list[str]:
    """What the caches of a run's teachers take at the most: a plan names many a sentence more than once."""
    from lvm_ray.data.teacher_cache import numbers_of_a_place, only_labels_count

    lines = []
    for name, one in run.teachers.items():
        model = _model_of(one.teacher, runs)
        if one.cache is None or model is None:
            continue
        places = run.sentence_tokens // 2 if only_labels_count(run, even=False) else run.sentence_tokens - 1
        size, rows = 2 * places * numbers_of_a_place(one, model.width), run.train.steps * run.train.batch
        lines.append(
            f"answers of {name}: {size_text(size)} a sentence, up to {size_text(size * rows)} for {rows:,} in {one.cache}"
        )
    return lines


def teacher_models(run: Recipe, runs: Mapping[str, Recipe] | None = None) -> list[ModelSection]:
    """The models of the teachers that a run asks: of a run of the same pipeline (`runs`), or of a finished one. Without those
    that nobody knows."""
    found = [_model_of(one.teacher, runs or {}) for one in run.teachers.values() if one.cache is None]
    return [model for model in found if model is not None]


def _model_of(folder: str | None, runs: Mapping[str, Recipe]) -> ModelSection | None:
    """The shape of a teacher's model, of one of these runs or of a finished one; None where it cannot be read: another check will
    say why."""
    of_pipeline = next((run.model for run in runs.values() if run.run == folder), None)
    if folder is None or of_pipeline:
        return of_pipeline
    try:
        found = read_object(Path(folder) / "model" / "config.json", "")
        shape = {
            "width": "hidden_size",
            "layers": "num_hidden_layers",
            "heads": "num_attention_heads",
            "mlp": "intermediate_size",
        }
        return ModelSection(**{field: found[key] for field, key in shape.items()})
    except (UserError, ValueError, KeyError):
        return None


def _deepspeed(run: Recipe) -> list[str]:
    """DeepSpeed's configuration for a run's least number of workers, under its heading."""
    from lvm_ray.train.engine import deepspeed_config

    workers = max(1, run.compute.least_workers)
    accumulation = max(1, run.train.batch // (workers * run.train.micro_batch))
    trained = trained_parameters(run.model, run.tokenizer.codes)
    values = deepspeed_config(run.train, accumulation, run.compute.precision, trained)
    return ["  DeepSpeed's configuration:", *(f"    {line}" for line in yaml.safe_dump(values, sort_keys=False).splitlines())]


def size_text(size: float) -> str:
    """Bytes for people: 512 KiB, 128 MiB, 1.50 GiB."""
    if size >= 2**30:
        return f"{size / 2**30:,.2f} GiB"
    return f"{size / 2**20:,.0f} MiB" if size >= 2**20 else f"{size / 2**10:,.0f} KiB"


def _balance(recipe: Recipe) -> list[str]:
    """Each task's share and how often the plan goes over it, where the shards exist already, and what is repeated too often."""
    from lvm_ray.data.balance import balance_table, warnings
    from lvm_ray.data.shards import open_shards

    try:
        rows = balance_table(open_shards(recipe.shard_folder).manifest, recipe)
    except UserError:
        return [f"balance {recipe.balance.strategy}: shares and epochs are known once the data is tokenised"]
    shares = (
        f"{row['task']} {row['share_after']:.1%} in {row['epochs']:.2f} epochs of {row['copies']:.3g} copies" for row in rows
    )
    return [f"balance {recipe.balance.strategy}: {', '.join(shares)}", *(f"warning: {line}" for line in warnings(rows))]
