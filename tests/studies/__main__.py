"""Comparisons that learn something, row by row: `make study [ONLY=name]`.

A row is one recipe with one seed, at most 20 minutes. Rows that stand in `docs/results/NAME.jsonl` already, keyed by recipe hash
and seed, are not run again; the table that sums them up is written into `docs/results.md`, between the marks of its name. Ratios
stand with those of `make bench`.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

from lvm_ray import config, pipeline
from lvm_ray.config import Recipe
from tests.bench.figure import merge
from tests.studies import balancing, continual, distillation, more_data, optimizers, references, single_task, tokenizers

STUDIES = {
    "tokenizers": tokenizers,
    "distillation": distillation,
    "single_task": single_task,
    "balancing": balancing,
    "more_data": more_data,
    "continual": continual,
    "optimizers": optimizers,
    "references": references,
}
ROWS = Path("docs/results")
PAGE = Path("docs/results.md")
RUNS = Path("runs/studies")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", choices=[*STUDIES, []], help="names of studies; default: all")
    for name in parser.parse_args().only or STUDIES:
        study, path = STUDIES[name], ROWS / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        known = {(row["recipe"], row["seed"]) for row in rows}
        for label, recipe in study.recipes(RUNS):
            if (config.fingerprint(recipe), recipe.seed) not in known:
                print(f"== {name}: {label}", flush=True)
                rows.append({"label": label, **getattr(study, "run", run)(recipe)})
                path.parent.mkdir(exist_ok=True)
                with path.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
        _write_table(name, study.table(rows))
        if rows and hasattr(study, "picture"):
            (ROWS / f"{name}.svg").write_text(study.picture(rows), encoding="utf-8")
        for figure, found in getattr(study, "figures", lambda rows: {})(rows).items():
            merge(figure, found, f"make study ONLY={name}")


def run(recipe: Recipe) -> dict[str, Any]:
    """From nothing to scores; seconds of each stage beside them."""
    seconds = {}
    for verb, stage in (("synth", pipeline.synth), ("tokenizer", _tokenizer), ("tokenize", pipeline.tokenize)):
        seconds[verb] = _seconds(stage, recipe)
    for verb, stage in (("train", pipeline.train), ("evaluate", pipeline.evaluate)):
        seconds[verb] = _seconds(stage, recipe)
    scores = json.loads((Path(recipe.run) / "evaluation.json").read_text())["tasks"]
    return {"recipe": config.fingerprint(recipe), "seed": recipe.seed, "seconds": seconds, "tasks": scores}


def _tokenizer(recipe: Recipe) -> None:
    pipeline.train(recipe, "tokenizer")


def _seconds(stage: Any, recipe: Recipe) -> float:
    began = time.monotonic()
    stage(recipe)
    return round(time.monotonic() - began, 1)


def _write_table(name: str, table: str) -> None:
    text = PAGE.read_text()
    marks = f"<!-- study {name} -->", f"<!-- end of study {name} -->"
    pattern = re.compile(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}", re.S)
    assert pattern.search(text), f"{PAGE} has no place for the table: write {marks[0]} and {marks[1]} where it should stand"
    PAGE.write_text(pattern.sub(lambda _: f"{marks[0]}\n{table}\n{marks[1]}", text))


if __name__ == "__main__":
    main()
