"""Seconds of a training step: without a teacher, with one that is asked, with its kept answers; and of the teacher's forward.

    python -m tests.bench.steps ROUNDS

All of them in turn, round after round: {"plain", "online", "cached", "teacher"}, a line a round.
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
    engines = {name: Engine(TrainingModule(model(STUDENT), *shape, teachers), recipe, 1) for name, teachers in kinds.items()}
    for number in range(int(sys.argv[1]) + 1):
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
        if number:  # the first round does not count
            print(json.dumps(seconds), flush=True)
    for engine in engines.values():
        engine.close()


if __name__ == "__main__":
    main()
