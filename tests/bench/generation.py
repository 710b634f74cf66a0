"""Answers: our decoder beside transformers' own `generate` and the official demo's way, and an evaluation by two workers."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lvm_ray.config import Recipe
from lvm_ray.progress import Bar
from tests.bench.data import PLACE, prepared
from tests.bench.figure import Figure
from tests.bench.training import CORES, PRECISION

if TYPE_CHECKING:
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

MODEL, CODES, IMAGE_TOKENS = "80m", 8192, 256
BATCH, SHARED, PROMPT = 32, 6 * IMAGE_TOKENS, 7 * IMAGE_TOKENS  # three pairs in common, and a query each
# Of an answer, those that transformers is timed for at a full batch. Without bf16 an answer takes it many minutes.
TIMED = IMAGE_TOKENS if PRECISION == "bf16" else 17
ROUNDS = 2  # of minutes each
EVALUATION = PLACE / "evaluate"
# Workers, the model that they ask, test items of a task, and rounds: of a minute and a half each
WORKERS, EVALUATED, ITEMS, EVALUATION_ROUNDS = 2, "20m", 128, 3


def generate_vs_transformers() -> Figure:
    """Answer pictures a second over those of transformers' `generate` on the same prompts: greedy, at the same batch."""
    how = f"{_rates('ours', 'transformers')}; batch {BATCH}, {_setting()}"
    if TIMED < IMAGE_TOKENS:
        how += (
            f"; transformers timed to its token {TIMED}, each later one counted like the median of those: they read more, "
            "so this favours it"
        )
    return Figure(_ratio("ours", "transformers"), "x", ">= 5", how)


def generate_vs_demo() -> Figure:
    """The same over the official demo's way: transformers' `generate` with plain attention, one query at a time."""
    how = f"{_rates('ours', 'demo')}; ours at batch {BATCH}, theirs one query at a time with eager attention, {_setting()}"
    return Figure(_ratio("ours", "demo"), "x", ">= 10", how)


def _setting() -> str:
    return (
        f"{MODEL} in {PRECISION}, {CORES} threads, sdpa elsewhere, {SHARED:,} tokens in common and {PROMPT - SHARED} of a query, "
        f"{IMAGE_TOKENS} of an answer, all greedy, {ROUNDS} rounds in turn"
    )


def _ratio(ours: str, theirs: str) -> float:
    return statistics.median(one[theirs] / one[ours] for one in _answers())


def _rates(*ways: str) -> str:
    return ", ".join(f"{way} {1 / statistics.median(one[way] for one in _answers()):.3g}" for way in ways) + " pictures/s"


@lru_cache(maxsize=1)
def _answers() -> list[dict[str, float]]:
    """Seconds of an answer in each way, round after round."""
    from lvm_ray.model.generate import generate
    from lvm_ray.model.llama import build
    from lvm_ray.recipe_sections import ModelSection

    torch.set_num_threads(CORES)
    # A table, as in a stock model: a codebook that is projected anew for each token would slow transformers alone.
    section = ModelSection.model_validate({"size": MODEL, "embedding": "table"})
    model = build(section, torch.randn(CODES, 64), PROMPT + IMAGE_TOKENS, IMAGE_TOKENS, seed=0).eval()
    model = model.to(torch.bfloat16 if PRECISION == "bf16" else torch.float32)
    rounds = []
    for _ in range(ROUNDS):
        prompts_BT = torch.randint(0, CODES, (BATCH, PROMPT))
        prompts_BT[:, :SHARED] = prompts_BT[0, :SHARED]
        began = time.perf_counter()
        generate(model, prompts_BT, IMAGE_TOKENS)
        seconds = {"ours": (time.perf_counter() - began) / BATCH}
        seconds["transformers"] = _transformers(model, prompts_BT, "sdpa", TIMED) / BATCH
        seconds["demo"] = _transformers(model, prompts_BT[:1], "eager", IMAGE_TOKENS)
        print(f"  an answer: {', '.join(f'{way} {taken:.2f} s' for way, taken in seconds.items())}", flush=True)
        rounds.append(seconds)
    return rounds


def _transformers(model: LlamaForCausalLM, prompts_BT: torch.Tensor, attention: str, timed: int) -> float:
    """Seconds of transformers' answers to prompts, with the tokens after the first `timed` at the median of those before."""
    from transformers.generation.stopping_criteria import StoppingCriteriaList

    times = [time.perf_counter()]

    def note(tokens_BT: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        times.append(time.perf_counter())
        return torch.zeros(len(tokens_BT), dtype=torch.bool)

    model.set_attn_implementation(attention)
    tokens_BT: Any = model.generate(
        prompts_BT,  # type: ignore[arg-type]
        attention_mask=torch.ones_like(prompts_BT),
        do_sample=False,
        max_new_tokens=timed,
        stopping_criteria=StoppingCriteriaList([note]),  # type: ignore[list-item]
    )
    assert tokens_BT.shape[1] - prompts_BT.shape[1] == timed == len(times) - 1
    steps = [later - earlier for earlier, later in pairwise(times[1:])]
    return times[-1] - times[0] + (IMAGE_TOKENS - timed) * statistics.median(steps)


def evaluate_2_workers() -> Figure:
    """Seconds of an evaluation by two workers of one thread over those by one, which needs no Ray."""
    from lvm_ray import ray_session

    recipe = _evaluation()
    rounds, starts = [], []
    for _ in range(EVALUATION_ROUNDS):
        alone, one = _evaluate(recipe, 1)
        began = time.perf_counter()
        ray_session.start(WORKERS)
        starts.append(time.perf_counter() - began)
        together, two = _evaluate(recipe, WORKERS)
        ray_session.shutdown()
        assert one == two
        print(f"  1 worker {alone:.1f} s, {WORKERS} workers {together:.1f} s, Ray's start {starts[-1]:.1f} s", flush=True)
        rounds.append((together, alone))
    seconds = [statistics.median(side) for side in zip(*rounds, strict=True)]
    items = sum(next(iter(entries.values()))["n"] for entries in one["tasks"].values())
    how = (
        f"{seconds[0]:.1f} s against {seconds[1]:.1f} s of one in the command's own process, the same scores; {EVALUATED} in "
        f"{PRECISION}, {items} greedy answers of {len(recipe.tasks)} tasks in units of {recipe.evaluate.batch}, {len(rounds)} "
        f"rounds in turn; Ray runs already (its start takes {statistics.median(starts):.1f} s), its workers start and "
        "load within the time"
    )
    return Figure(statistics.median(together / alone for together, alone in rounds), "x", "<= 0.6", how)


def _evaluation() -> Recipe:
    """The bench's data with its training pairs as test items, and a fresh model to ask: what the scores are is all one."""
    from lvm_ray.model.export import export
    from lvm_ray.model.llama import build
    from lvm_ray.recipe_sections import ModelSection
    from lvm_ray.tokenizer import load_tokenizer

    recipe = prepared()
    tokenizer = load_tokenizer(recipe.tokenizer_folder)
    section = ModelSection.model_validate({"size": EVALUATED})
    codebook_VE = tokenizer.codebook
    model = build(section, codebook_VE, recipe.sentence_tokens, recipe.image_tokens, seed=0)
    described = {
        "kind": recipe.tokenizer.kind,
        "hash": tokenizer.hash,
        "codes": len(codebook_VE),
        "patch": recipe.tokenizer.patch,
        "size": recipe.size,
        "image_tokens": recipe.image_tokens,
        "folder": os.path.relpath(recipe.tokenizer_folder, EVALUATION / "model"),
    }
    export(model, EVALUATION / "model", described)
    tasks = {name: task.model_copy(update={"test": task.train}) for name, task in recipe.tasks.items()}
    changes = {"items": ITEMS, "draws": {}}
    return recipe.model_copy(update={"tasks": tasks, "evaluate": recipe.evaluate.model_copy(update=changes)})


def _evaluate(recipe: Recipe, workers: int) -> tuple[float, dict[str, Any]]:
    """Seconds of an evaluation that nothing is kept of yet, and what it found."""
    from lvm_ray.evaluate import floors, kept
    from lvm_ray.evaluate.run import evaluate_runs

    shutil.rmtree(EVALUATION / kept.FOLDER, ignore_errors=True)
    Path(recipe.shard_folder).with_name(floors.CACHE).unlink(missing_ok=True)
    compute = recipe.compute.model_copy(update={"workers": workers, "threads": 1})
    began = time.perf_counter()
    (found,) = evaluate_runs([str(EVALUATION)], recipe.model_copy(update={"compute": compute}), Bar("evaluate", None, ""))
    return time.perf_counter() - began, found
