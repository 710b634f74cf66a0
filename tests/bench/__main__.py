"""Speed, measured side by side in one run: `make bench [ONLY=name]`.

Each figure is a ratio of two ways of doing the same on the same machine, the median of several rounds in turn. Merges into
`runs/bench.json` as {name: {"value", "unit", "how"}} and into the table of `docs/benchmarks.md`, a row each with command,
machine and date.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from tests.bench import data, distillation, generation, sweep, training
from tests.bench.figure import Figure, merge

FIGURES: dict[str, Callable[[], Figure]] = {
    "bytes_per_token": data.bytes_per_token,
    "read_vs_official": data.read_vs_official,
    "stream_vs_train": data.stream_vs_train,
    "tokenize_vs_loop": data.tokenize_vs_loop,
    "memory_10x": data.memory_10x,
    "train_vs_torch": training.train_vs_torch,
    "zero1_vs_ddp": training.zero1_vs_ddp,
    "zero3_vs_ddp": training.zero3_vs_ddp,
    "matmul_fraction_80m": training.matmul_fraction_80m,
    "first_step_s": training.first_step_s,
    "distill_online_vs_parts": distillation.distill_online_vs_parts,
    "distill_cached_vs_plain": distillation.distill_cached_vs_plain,
    "loss_memory_vs_naive": distillation.loss_memory_vs_naive,
    "loss_time_vs_naive": distillation.loss_time_vs_naive,
    "generate_vs_transformers": generation.generate_vs_transformers,
    "generate_vs_demo": generation.generate_vs_demo,
    "evaluate_2_workers": generation.evaluate_2_workers,
    "sweep_vs_bare": sweep.sweep_vs_bare,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", choices=[*FIGURES, []], help="names of figures; default: all")
    for name in parser.parse_args().only or FIGURES:
        began = time.monotonic()
        figure = FIGURES[name]()
        print(f"{name}: {figure.value:.4g} {figure.unit}  ({figure.how}; {time.monotonic() - began:.0f} s)", flush=True)
        merge(name, figure, f"make bench ONLY={name}")


if __name__ == "__main__":
    main()
