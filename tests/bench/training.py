"""Training: our whole way, `lvm-ray train` with Ray Data's stream, beside a bare torch loop and beside the machine's limit."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from lvm_ray import config
from lvm_ray.config import Recipe
from lvm_ray.recipe_sections import ModelSection
from lvm_ray.train.job import computes_bf16
from tests.bench.data import PLACE, prepared
from tests.bench.figure import Figure

BARE = Path(__file__).with_name("bare.py")
WARM_UP = 10  # steps of each side that do not count, or as many as there are in
WARM_UP_S = 60.0  # seconds, on a processor without bf16
TIMED = 60.0  # seconds of each side that do, at least
ROUNDS = 3
SENTENCES = 16  # of a step: 8,192 tokens
CORES = 2
PRECISION = "bf16" if computes_bf16() else "fp32"  # of both sides; a processor that emulates bf16 takes minutes a step
LENGTH_80M, CODES_80M, SENTENCES_80M, STEPS_80M = 2048, 8192, 4, 5


def train_vs_torch() -> Figure:
    """Tokens a second of one worker on Ray Train, over those of a bare loop."""
    rates = _interleaved({"torch": lambda: _bare(1), "ours": lambda: _ours(1, 1)})
    how = f"{_rates(rates)}; 1 worker of {CORES} threads on Ray Train, the stream on; {PRECISION}, sdpa, fused AdamW on both"
    return Figure(_ratio(rates, "ours", "torch"), "x", ">= 0.95", how)


def zero1_vs_ddp() -> Figure:
    return _zero_vs_ddp("zero1", ">= 0.95")


def zero3_vs_ddp() -> Figure:
    return _zero_vs_ddp("zero3", ">= 0.6")


def _zero_vs_ddp(stage: str, wanted: str) -> Figure:
    rates = _distributed()
    how = f"{_rates(rates)}; 2 workers of 1 thread on Ray Train, the stream on, against torchrun's DDP in {PRECISION} over gloo"
    return Figure(_ratio(rates, stage, "ddp"), "x", wanted, how)


@lru_cache(maxsize=1)
def _distributed() -> dict[str, list[float]]:
    return _interleaved({"ddp": lambda: _bare(2), "zero1": lambda: _ours(2, 1), "zero3": lambda: _ours(2, 3)})


def first_step_s() -> Figure:
    """Seconds from `lvm-ray train` in a new process to the first line of the journal, without Ray: the demo's student."""
    run = PLACE / "first-step"
    recipe = _recipe(run, {"steps": 1, "log_every": 1, "validation": 0}, {"workers": 0, "threads": CORES})
    path = PLACE / "first-step.yaml"
    path.write_text(config.dump(recipe))
    found = []
    for _ in range(ROUNDS + 1):  # the first one fills the file cache
        shutil.rmtree(run, ignore_errors=True)
        began = time.monotonic()
        lines = _lines_of([sys.executable, "-m", "lvm_ray", "train", str(path)], run / "metrics.jsonl", 0)
        found.append(lines[0] - began)
    each = ", ".join(f"{seconds:.1f}" for seconds in found[1:])
    how = f"median of {ROUNDS} new processes ({each}), files cached, the demo's student"
    return Figure(statistics.median(found[1:]), "s", "<= 15", how)


def matmul_fraction_80m() -> Figure:
    """Credited operations of an 80m step a second, over the rate of a matrix product measured beside each step.

    Credited: 6 x parameters without the input table + 6 x layers x width x tokens, a token.
    """
    import torch

    from lvm_ray.estimate import operations_per_token
    from lvm_ray.model.llama import build
    from lvm_ray.train.engine import Engine
    from lvm_ray.train.job import use_fast_layers
    from lvm_ray.train.losses import TrainingModule

    torch.set_num_threads(CORES)
    section = ModelSection.model_validate({"size": "80m"})
    recipe = prepared().model_copy(
        update={
            "model": section,
            "train": prepared().train.model_copy(
                update={"batch": SENTENCES_80M, "micro_batch": 1, "optimizer": "adamw", "zero": 1}
            ),
            "compute": prepared().compute.model_copy(update={"precision": PRECISION, "device": "cpu"}),
        }
    )
    student = build(section, torch.randn(CODES_80M, 64), LENGTH_80M, 256, seed=0)
    use_fast_layers(student, recipe.compute)
    engine = Engine(TrainingModule(student, LENGTH_80M, 256, 1.0), recipe, SENTENCES_80M)
    operations = operations_per_token(section, CODES_80M, LENGTH_80M) * SENTENCES_80M * LENGTH_80M
    fractions, seconds = [], []
    for number in range(STEPS_80M + 1):
        batches = [torch.randint(0, CODES_80M, (1, LENGTH_80M)) for _ in range(SENTENCES_80M)]
        before, began = _matmul_rate(), time.perf_counter()
        engine.step(batches, 1.0, lambda losses: None)
        taken = time.perf_counter() - began
        if number:
            seconds.append(taken)
            fractions.append(operations / taken / statistics.mean([before, _matmul_rate()]))
    engine.close()
    each = ", ".join(f"{fraction:.2f}" for fraction in fractions)
    how = (
        f"{PRECISION}, steps of {SENTENCES_80M} x {LENGTH_80M:,} tokens, {statistics.median(seconds):.1f} s each with AdamW and "
        f"ZeRO 1, median of {STEPS_80M} ({each}); 2,048^3 product beside each"
    )
    return Figure(statistics.median(fractions), "of the matmul rate", ">= 0.60", how)


def _matmul_rate() -> float:
    """Operations a second of a product of 2,048^3."""
    import torch

    left, right = (torch.randn(2048, 2048).to(torch.bfloat16 if PRECISION == "bf16" else torch.float32) for _ in range(2))
    left @ right
    taken = []
    for _ in range(9):
        began = time.perf_counter()
        left @ right
        taken.append(time.perf_counter() - began)
    return 2 * 2048**3 / statistics.median(taken)


def _interleaved(sides: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Tokens a second of each side, round after round."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, side in sides.items():
            rates[name].append(side())
            print(f"  {name}: {rates[name][-1]:,.0f} tokens/s", flush=True)
    return rates


def _ratio(rates: dict[str, list[float]], ours: str, theirs: str) -> float:
    return statistics.median(one / other for one, other in zip(rates[ours], rates[theirs], strict=True))


def _rates(rates: dict[str, list[float]]) -> str:
    return ", ".join(f"{name} {statistics.median(found):,.0f}" for name, found in rates.items()) + " tokens/s"


def _recipe(run: Path, train: dict[str, object], compute: dict[str, object]) -> Recipe:
    """The demo's student as a single run on the bench's data, changed."""
    values = config.to_dict(config.student_recipe(prepared()))
    values |= {"run": str(run), "distill": None}
    values["train"] |= train
    values["compute"] |= compute
    return Recipe.model_validate(values)


def _ours(workers: int, zero: int) -> float:
    """Tokens a second of `lvm-ray train`, by the times at which the journal's lines appear."""
    run = PLACE / f"train-{workers}-{zero}"
    shutil.rmtree(run, ignore_errors=True)
    train = {
        "batch": SENTENCES,
        "micro_batch": SENTENCES // workers,
        "optimizer": "adamw",
        "image_weight": 1.0,
        "steps": 200,
        "zero": zero,
        "log_every": 1,
        "checkpoint_every": 200,
        "validation": 0,
    }
    compute = {"workers": workers, "threads": CORES // workers, "precision": PRECISION, "attention": "sdpa"}
    values = config.to_dict(_recipe(run, train, compute))
    values["model"] = {"size": "20m"}
    path = PLACE / f"{run.name}.yaml"
    path.write_text(config.dump(Recipe.model_validate(values)))
    times = _lines_of([sys.executable, "-m", "lvm_ray", "train", str(path)], run / "metrics.jsonl", TIMED)
    return _tokens_per_second(times)


def _bare(ranks: int) -> float:
    """Tokens a second of the bare loop, by the times at which its lines appear."""
    section = ModelSection.model_validate({"size": "20m"})
    recipe = prepared()
    model = (section.width, section.layers, section.heads, section.mlp, recipe.tokenizer.codes, recipe.sentence_tokens)
    program = [str(BARE), *map(str, model), str(SENTENCES), "10000", PRECISION]
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    journal = PLACE / "bare.txt"
    threads = {"OMP_NUM_THREADS": str(CORES // ranks)}
    return _tokens_per_second(_lines_of([sys.executable, *launcher, *program], journal, TIMED, threads, to_file=True))


def _tokens_per_second(times: Sequence[float]) -> float:
    timed = times[_warm(times) :]
    return (len(timed) - 1) * SENTENCES * prepared().sentence_tokens / (timed[-1] - timed[0])


def _warm(times: Sequence[float]) -> int:
    """The first line that counts, of those that appeared at these times: len(times) where none does yet."""
    return next((step for step, at in enumerate(times) if step + 1 >= WARM_UP or at - times[0] >= WARM_UP_S), len(times))


def _lines_of(
    command: list[str],
    path: Path,
    seconds: float,
    environment: dict[str, str] | None = None,
    to_file: bool = False,
) -> list[float]:
    """Run a program until it is warm and then so many seconds more: when each line of its file appeared. Then it is ended.

    With 0 seconds its first line is enough.
    """
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") if to_file else open(os.devnull, "w") as output, path.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(command, stdout=output, stderr=log, env={**os.environ, **(environment or {})})
        times: list[float] = []
        try:
            while not times or (seconds and (_warm(times) == len(times) or times[-1] - times[_warm(times)] < seconds)):
                assert process.poll() is None or (not seconds and path.is_file()), f"{command} ended: see {log.name}"
                there = path.read_bytes().count(b"\n") if path.is_file() else 0
                times += [time.monotonic()] * (there - len(times))
                threading.Event().wait(0.05)
        finally:
            process.terminate()
            process.wait()
    return times
