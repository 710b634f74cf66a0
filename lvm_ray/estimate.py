"""What a recipe would cost, on paper: parameters, tokens, epochs, memory, GPU-hours. For `--dry-run`.

Nothing is measured. A step computes 6 floating-point operations a parameter and token, and 6 x layers x width x length
for attention; the time assumes a stated part of a stated GPU's rate.
"""

from __future__ import annotations

from lvm_ray import config
from lvm_ray.config import ModelSection, Recipe
from lvm_ray.errors import UserError

GPU_RATE = 312e12  # bf16 operations a second of an A100, the paper's card
GPU_SHARE = 0.4  # of that rate, which such a training commonly reaches


def parameters(model: ModelSection, codes: int) -> int:
    """Parameters of the decoder with its head, without the input table: attention with bias, SwiGLU without."""
    width = model.width
    layer = 4 * (width * width + width) + 3 * width * model.mlp + 2 * width
    return model.layers * layer + width + width * codes


def operations_per_token(model: ModelSection, codes: int, length: int) -> float:
    """Floating-point operations of forward and backward for one token of a sentence of `length` tokens."""
    return 6 * parameters(model, codes) + 6 * model.layers * model.width * length


def memory_bytes(model: ModelSection, codes: int, precision: str) -> int:
    """Weights, gradients, fp32 masters and two moments of a training without sharding; activations come on top."""
    return parameters(model, codes) * (2 + 4 + 4 + 8 if precision != "fp32" else 4 + 4 + 8)


def describe(recipe: Recipe) -> str:
    """The resolved recipe and its estimates, as text."""
    runs = {"run": recipe}
    if recipe.teacher:
        runs = {"teacher": config.teacher_recipe(recipe), "student": config.student_recipe(recipe)}
    lines = [config.dump(recipe).rstrip(), ""]
    for name, run in runs.items():
        codes, length = run.tokenizer.codes, run.sentence_tokens
        tokens = run.train.batch * length
        total = tokens * run.train.steps
        seconds = total * operations_per_token(run.model, codes, length) / (GPU_RATE * GPU_SHARE)
        gibibytes = memory_bytes(run.model, codes, run.compute.precision) / 2**30
        lines += [
            f"{name}: {parameters(run.model, codes):,} parameters (without the input table)",
            f"  {tokens:,} tokens a step x {run.train.steps:,} steps = {total:,} tokens",
            *(f"  {line}" for line in _balance(run)),
            f"  {gibibytes:.2f} GiB for weights, gradients and moments; activations come on top",
            f"  {seconds / 3600:.3g} GPU-hours on an A100 at {GPU_SHARE:.0%} of its bf16 rate",
        ]
    return "\n".join(lines)


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
