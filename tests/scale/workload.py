"""The work that docs/scale.md is about: 100 million images tokenised, a 1B teacher and an 80M student, on 8, 64 and 512 GPUs.

Every figure of the page is a function of this package, of the inputs (`inputs.py`), of the shipped recipe and of the project's
own estimates (`lvm_ray/estimate.py`, constants of `lvm_ray`), so that the page cannot say what the code does not do. `changed` is
False for the code as it is and True for the changes that the page names.
"""

from __future__ import annotations

from functools import lru_cache

from lvm_ray import config, estimate
from lvm_ray.config import Recipe
from lvm_ray.model.sizes import SIZES
from lvm_ray.recipe_sections import ModelSection
from tests.scale.inputs import ROOT, value

GPUS = (8, 64, 512)
HOUR = 3600.0

IMAGES = 100_000_000
PICTURES = 2  # of an image: itself and its label
PAIRS = 4  # of a sentence
SENTENCES = IMAGES // PAIRS
BATCH = 1024  # sentences of a step: the reading of the paper's table 9
STEPS = SENTENCES // BATCH  # each image is seen once
SIZE = 256


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
