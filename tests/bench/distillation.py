"""Distillation: the loss beside the naive way, and a distilled step beside its parts."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from functools import lru_cache
from typing import Any

from tests.bench.data import prepared
from tests.bench.figure import Figure
from tests.bench.training import CORES, PRECISION, ROUNDS

STUDENT, TEACHER = "20m", "80m"
SENTENCES, LENGTH, IMAGE_TOKENS, CODES = 4, 512, 256, 8192  # of a step: 2,048 tokens


def loss_memory_vs_naive() -> Figure:
    """Most memory of our cross-entropy and distillation beyond their inputs, over that of the naive way."""
    found = _losses()
    ours, naive = (max(one["bytes"] for one in found[way]) for way in ("ours", "naive"))
    how = f"{ours / 2**20:,.0f} MiB against {naive / 2**20:,.0f} MiB; {_shape()}"
    return Figure(ours / naive, "x", "<= 0.125", how)


def loss_time_vs_naive() -> Figure:
    """Seconds of the same, forward and backward."""
    found = _losses()
    pairs = zip(found["ours"], found["naive"], strict=True)
    ratio = statistics.median(statistics.median(ours["seconds"]) / statistics.median(naive["seconds"]) for ours, naive in pairs)
    seconds = {way: statistics.median(statistics.median(one["seconds"]) for one in rounds) for way, rounds in found.items()}
    how = f"{seconds['ours']:.2f} s against {seconds['naive']:.2f} s, forward and backward; {_shape()}"
    return Figure(ratio, "x", "<= 1.0", how)


def _shape() -> str:
    return (
        f"cross-entropy and forward KL at 32,768 x 8,192 from {PRECISION} states of width 768, {CORES} threads, {ROUNDS} rounds"
    )


@lru_cache(maxsize=1)
def _losses() -> dict[str, list[dict[str, Any]]]:
    """What `head.py` prints, round after round of both ways."""
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "naive": []}
    for _ in range(ROUNDS):
        for way, rounds in found.items():
            command = [sys.executable, "-m", "tests.bench.head", way, PRECISION, str(CORES)]
            rounds.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            print(f"  {way}: {rounds[-1]}", flush=True)
    return found


def distill_online_vs_parts() -> Figure:
    """Seconds of a distilled step over those of the student's step and the teacher's forward, measured apart."""
    rounds = _steps()
    ratio = statistics.median(one["online"] / (one["plain"] + one["teacher"]) for one in rounds)
    how = f"{_medians(rounds, 'online', 'plain', 'teacher')}; {_models()}"
    return Figure(ratio, "x", "<= 1.05", how)


def distill_cached_vs_plain() -> Figure:
    """Seconds of a step that learns from kept answers over those of one that learns from none."""
    rounds = _steps()
    ratio = statistics.median(one["cached"] / one["plain"] for one in rounds)
    return Figure(ratio, "x", "<= 1.10", f"{_medians(rounds, 'cached', 'plain')}; {_models()}")


def _models() -> str:
    return (
        f"student {STUDENT}, teacher {TEACHER}, {SENTENCES} x {LENGTH} tokens of {CODES:,} codes, all places, {PRECISION}, "
        f"{CORES} threads, AdamW and ZeRO 1, medians of {ROUNDS} rounds in turn"
    )


def _medians(rounds: list[dict[str, float]], *names: str) -> str:
    return ", ".join(f"{name} {statistics.median(one[name] for one in rounds):.2f} s" for name in names)


@lru_cache(maxsize=1)
def _steps() -> list[dict[str, float]]:
    """Seconds of a step of each kind and of the teacher's forward, round after round, after one that does not count."""
    import torch

    from lvm_ray.model.attention import use_causal_attention
    from lvm_ray.model.llama import build
    from lvm_ray.recipe_sections import ModelSection
    from lvm_ray.train.engine import Engine
    from lvm_ray.train.losses import Teacher, TrainingModule

    torch.set_num_threads(CORES)
    dtype = torch.bfloat16 if PRECISION == "bf16" else torch.float32
    recipe = prepared()
    recipe = recipe.model_copy(
        update={
            "train": recipe.train.model_copy(
                update={"batch": SENTENCES, "micro_batch": SENTENCES, "optimizer": "adamw", "zero": 1}
            ),
            "compute": recipe.compute.model_copy(update={"precision": PRECISION, "device": "cpu"}),
        }
    )

    def model(size: str) -> Any:
        made = build(ModelSection.model_validate({"size": size}), torch.randn(CODES, 64), LENGTH, IMAGE_TOKENS, seed=0)
        if PRECISION == "bf16":
            use_causal_attention(made)
        return made

    teacher = model(TEACHER).to(dtype).requires_grad_(False).eval()
    asked, kept = (Teacher(one, teacher.lm_head.weight, 1.0, 2.0) for one in (teacher, None))
    shape = LENGTH, IMAGE_TOKENS, 1.0
    alone = TrainingModule(teacher, *shape)
    kinds = {"plain": [], "online": [asked], "cached": [kept]}
    engines = {name: Engine(TrainingModule(model(STUDENT), *shape, teachers), recipe, 1) for name, teachers in kinds.items()}
    rounds = []
    for _ in range(ROUNDS + 1):
        tokens_BT = torch.randint(0, CODES, (SENTENCES, LENGTH))
        with torch.no_grad():
            states = {"states_0": alone.states(tokens_BT).bfloat16().view(SENTENCES, -1)}
        seconds = {}
        for name, engine in engines.items():
            began = time.perf_counter()
            engine.step([tokens_BT], 1.0, lambda losses: None, [states if name == "cached" else {}])
            seconds[name] = time.perf_counter() - began
        with torch.no_grad():
            began = time.perf_counter()
            teacher(input_ids=tokens_BT, use_cache=False)
            seconds["teacher"] = time.perf_counter() - began
        print(f"  {', '.join(f'{name} {taken:.2f} s' for name, taken in seconds.items())}", flush=True)
        rounds.append(seconds)
    for engine in engines.values():
        engine.close()
    return rounds[1:]
