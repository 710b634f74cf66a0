"""Seconds of a training step: without a teacher, with one that is asked, with its kept answers; and of the teacher's forward.

    python -m tests.bench.steps ROUNDS plain|online|cached|teacher ...

Those that are named, one after another, each round beginning with the next of them, since a machine's speed drifts: a line of
JSON a round.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

from lvm_ray.model.llama import build
from lvm_ray.recipe_sections import ModelSection
from lvm_ray.train import memory
from lvm_ray.train.engine import Engine
from lvm_ray.train.head import Teacher
from lvm_ray.train.job import use_fast_layers
from lvm_ray.train.losses import TrainingModule
from tests.bench.data import prepared
from tests.bench.training import CORES, PRECISION

STUDENT, TEACHER = "20m", "80m"
SENTENCES, LENGTH, IMAGE_TOKENS, CODES = 4, 512, 256, 8192  # of a step: 2,048 tokens


def main() -> None:
    _, rounds, *names = sys.argv
    memory.keep()
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
        use_fast_layers(made, recipe.compute)
        return made

    teacher = model(TEACHER).to(dtype).requires_grad_(False).eval()
    asked, kept = (Teacher(one, teacher.lm_head.weight, 1.0, 2.0) for one in (teacher, None))
    shape = LENGTH, IMAGE_TOKENS, 1.0
    alone = TrainingModule(teacher, *shape)
    kinds = {"plain": [], "online": [asked], "cached": [kept]}
    engines = {name: Engine(TrainingModule(model(STUDENT), *shape, kinds[name]), recipe, 1) for name in names if name in kinds}

    def seconds(name: str, tokens_BT: torch.Tensor, states: dict[str, torch.Tensor]) -> float:
        began = time.perf_counter()
        if name == "teacher":
            with torch.no_grad():
                teacher(input_ids=tokens_BT, use_cache=False)
        else:
            engines[name].step([tokens_BT], 1.0, lambda losses: None, [states if name == "cached" else {}])
        return time.perf_counter() - began

    for number in range(int(rounds) + 1):
        tokens_BT = torch.randint(0, CODES, (SENTENCES, LENGTH))
        states = {}
        if "cached" in names:
            with torch.no_grad():
                states = {"states_0": alone.states(tokens_BT).bfloat16().view(SENTENCES, -1)}
        first = number % len(names)
        found = {name: seconds(name, tokens_BT, states) for name in names[first:] + names[:first]}
        if number:  # the first round does not count
            print(json.dumps(found), flush=True)
    for engine in engines.values():
        engine.close()


if __name__ == "__main__":
    main()
