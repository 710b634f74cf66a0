"""How far the one model is from networks devoted to one task each, at 1/8, 1/4, 1/2 and all of the pairs.

A row trains the small model on the demo's three tasks, then a U-Net for each of them (`lvm_ray/reference`): on the same pairs in
the same copies, at the same picture size, in the same core-seconds. The model learns three tasks at once, so each network gets
a third of its seconds, which are those of its training steps on one thread (its tokenizer, and making views or tokens, count for
nobody). Fewer pairs are the first of the many, and nothing else is known of the others: the tokenizer learns from the same pairs.

Rates have three trials each, for both sides, on a seed of their own whose validation scenes stand in place of its test scenes.
The first rows are these; `table` names the best, CHOSEN takes them, and the other rows follow.
"""

from __future__ import annotations

import html
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lvm_ray import config
from lvm_ray.config import Recipe
from lvm_ray.data.shards import open_shards
from lvm_ray.evaluate.statistics import rounded
from lvm_ray.evaluate.units import test_items
from lvm_ray.reference.run import score_reference, train_reference
from lvm_ray.report import charts, mixture
from lvm_ray.train.meter import read_metrics
from tests.studies import scenes
from tests.studies.summary import mean, spread

SEEDS = (71, 72, 73)
TUNING_SEED = 70
FACTORS = (0.5, 1.0, 2.0)  # of the rates, tried on the tuning seed
OURS = "the one model"
CHOSEN = {OURS: 2.0, "segmentation": 0.5, "pose": 1.0, "derain": 2.0}  # of the factors, by the tuning rows: those of `best`
PAIRS = (150, 300, 600, 1200)  # of each task
COPIES = 4
STEPS = 160
DIGITS = {"miou": 3, "pck": 3, "psnr_y": 2}


def recipes(place: Path) -> Iterator[tuple[str, Recipe]]:
    for factor in FACTORS:
        yield f"rates x {factor:g}, seed {TUNING_SEED}", _arm(_base(place, TUNING_SEED, PAIRS[-1]), factor)
    for seed in SEEDS:
        for pairs in PAIRS:
            yield f"{pairs} pairs, seed {seed}", _arm(_base(place, seed, pairs), CHOSEN[OURS])


def run(recipe: Recipe) -> dict[str, Any]:
    place, pairs = Path(recipe.run).parent.parent, recipe.synth["train"][scenes.TASKS[0]]
    scenes.prepare(_base(place, recipe.seed, pairs))
    shutil.rmtree(recipe.run, ignore_errors=True)  # in one go, or else nobody knows its core-seconds
    row = scenes.row_of(recipe)
    steps_part = read_metrics(recipe.run)[-1]["seconds"] / row["seconds"]["train"]  # without start, validation and export
    seconds = round(steps_part * row["seconds"]["core"], 1)
    factor = recipe.train.rate / scenes.FRESH["rate"]
    factors = dict.fromkeys(scenes.TASKS, factor) if recipe.seed == TUNING_SEED else CHOSEN
    references, shards = {}, open_shards(recipe.shard_folder)
    for task, items in test_items(recipe).items():
        head, trained, how = train_reference(recipe, task, shards, seconds / len(scenes.TASKS), factors[task])
        references[task] = {"how": how, "rate": factors[task] * head.rate}
        references[task]["scores"] = score_reference(recipe, task, head, trained.network, items, "test")
    return {**row, "pairs": pairs, "core_seconds": seconds, "references": rounded(references)}


def table(rows: list[dict[str, Any]]) -> str:
    """Scores by task and pairs, then the trials of rates."""
    if not rows:
        return ""
    lines = ["![Scores by pairs](results/references.svg)", ""]
    lines += ["| task | pairs | seeds | floor | ceiling of its tokens | the one model | devoted network |", "|---" * 7 + "|"]
    for task, metric in scenes.METRICS:
        for pairs in PAIRS:
            mine = _rows_of(rows, pairs)
            if mine:
                known = {key: [row["tasks"][task][metric][key] for row in mine] for key in ("floor", "ceiling")}
                cells = [f"{task} {metric}", f"{pairs:,}", str(len(mine))]
                cells += [f"{mean(known[key]):.{DIGITS[metric]}f}" for key in ("floor", "ceiling")]
                cells += [spread(values, DIGITS[metric]) for values in _both(mine, task, metric)]
                lines.append(f"| {' | '.join(cells)} |")
    if not _trials(rows):
        return "\n".join(lines)
    names = [f"{task} {metric}" for task, metric in scenes.METRICS]
    lines += ["", f"| rates on seed {TUNING_SEED} | who | loss | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
    for factor, row in _trials(rows).items():
        both = [_both([row], task, metric) for task, metric in scenes.METRICS]
        for who, loss, number in ((OURS, f"{_loss(row):.3f}", 0), ("devoted network", "", 1)):
            cells = [f"{one[number][0]:.{DIGITS[metric]}f}" for one, (_, metric) in zip(both, scenes.METRICS, strict=True)]
            lines.append(f"| x {factor:g} | {who} | {loss} | {' | '.join(cells)} |")
    found = ", ".join(f"{who} x {factor:g}" for who, factor in best(rows).items())
    return "\n".join([*lines, "", f"Best of the trials: {found}."])


def best(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The factors of the trials that did best on validation scenes: the model by its loss, each network by its task's metric."""
    trials = _trials(rows)
    if not trials:
        return {}
    of_tasks = {
        task: max(trials, key=lambda factor: trials[factor]["references"][task]["scores"][metric]["value"])
        for task, metric in scenes.METRICS
    }
    return {OURS: min(trials, key=lambda factor: _loss(trials[factor])), **of_tasks}


def picture(rows: list[dict[str, Any]]) -> str:
    """Both curves of every task as an SVG file, with the floor and the ceiling of the tokens as dashed lines."""
    width, height, gap = 320, 250, 26
    known = [pairs for pairs in PAIRS if _rows_of(rows, pairs)]
    panels = [_panel(rows, task, metric, known, width, height) for task, metric in scenes.METRICS] if known else []
    placed = "".join(
        f'<svg x="{gap + k * (width + gap)}" y="46" overflow="visible">{panel}</svg>' for k, panel in enumerate(panels)
    )
    whole = gap + len(scenes.METRICS) * (width + gap), height + 66
    style = (
        ".ours{stroke:#1f6feb}.devoted{stroke:#b4690e}.line{fill:none;stroke-width:2}.bar{stroke-width:1.5}"
        "@media(prefers-color-scheme:dark){.ours{stroke:#6cabff}.devoted{stroke:#e0a04a}}"
        ".dashed{stroke:var(--quiet);stroke-dasharray:4 4}text{font-size:12px;fill:var(--quiet)}"
        ".name{fill:var(--text);font-size:14px}"
    )
    words = {"ours": f"{OURS}, three tasks", "devoted": "a U-Net for each task", "dashed": "floor, and ceiling of the tokens"}
    keys = "".join(
        f'<line class="line {role}" x1="{x}" x2="{x + 24}" y1="22" y2="22"/><text x="{x + 32}" y="26">{said}</text>'
        for x, (role, said) in zip(range(gap, whole[0], 230), words.items(), strict=False)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole[0]} {whole[1]}" width="{whole[0]}" height="{whole[1]}" '
        f'role="img" aria-label="Scores of the one model and of devoted networks by training pairs"><style>{mixture.colours()}'
        f'{style}</style><rect class="paper" width="{whole[0]}" height="{whole[1]}"/>{keys}{placed}</svg>\n'
    )


def _panel(rows: list[dict[str, Any]], task: str, metric: str, known: list[int], width: int, height: int) -> str:
    by_pairs = {pairs: _rows_of(rows, pairs) for pairs in known}
    ends = [mean([row["tasks"][task][metric][key] for row in by_pairs[known[-1]]]) for key in ("floor", "ceiling")]
    values = [value for mine in by_pairs.values() for one in _both(mine, task, metric) for value in one]
    marks = charts.ticks(min(*values, *ends), max(*values, *ends), 4)
    left, top, bottom = 38, 18, 40

    def x(pairs: int) -> float:
        return left + 14 + (width - left - 28) * PAIRS.index(pairs) / (len(PAIRS) - 1)

    def y(value: float) -> float:
        return top + (height - top - bottom) * (marks[-1] - value) / (marks[-1] - marks[0])

    parts = [f'<text class="name" x="0" y="4">{html.escape(task)}: {html.escape(metric)}</text>']
    parts += [f'<text x="{left - 6}" y="{y(mark) + 4:.1f}" text-anchor="end">{mark:g}</text>' for mark in marks]
    parts += [f'<text x="{x(pairs):.1f}" y="{height - bottom + 20}" text-anchor="middle">{pairs:,}</text>' for pairs in PAIRS]
    parts.append(f'<text x="{width}" y="{height - 4}" text-anchor="end">training pairs</text>')
    parts += [f'<line class="dashed" x1="{left}" x2="{width}" y1="{y(end):.1f}" y2="{y(end):.1f}"/>' for end in ends]
    for number, role in enumerate(("ours", "devoted")):
        places = [(x(pairs), _both(mine, task, metric)[number]) for pairs, mine in by_pairs.items()]
        points = " ".join(f"{place:.1f},{y(mean(one)):.1f}" for place, one in places)
        parts.append(f'<polyline class="line {role}" points="{points}"/>')
        for place, one in places:  # from the worst to the best seed
            parts.append(
                f'<line class="bar {role}" x1="{place:.1f}" x2="{place:.1f}" y1="{y(min(one)):.1f}" y2="{y(max(one)):.1f}"/>'
            )
    return "".join(parts)


def _trials(rows: list[dict[str, Any]]) -> dict[float, dict[str, Any]]:
    by_label = {row["label"]: row for row in rows}
    labels = {factor: f"rates x {factor:g}, seed {TUNING_SEED}" for factor in FACTORS}
    return {factor: by_label[label] for factor, label in labels.items() if label in by_label}


def _loss(row: dict[str, Any]) -> float:
    """The mean over tasks of the model's loss on validation scenes, in nats a label token."""
    return mean(row["validation"].values())


def _rows_of(rows: list[dict[str, Any]], pairs: int) -> list[dict[str, Any]]:
    return list(scenes.by_seed(rows, f"{pairs} pairs").values())


def _both(rows: list[dict[str, Any]], task: str, metric: str) -> tuple[list[float], list[float]]:
    """The model's scores and the network's, by seed."""
    return (
        [row["tasks"][task][metric]["value"] for row in rows],
        [row["references"][task]["scores"][metric]["value"] for row in rows],
    )


def _arm(base: Recipe, factor: float) -> Recipe:
    rates = {key: rate * factor for key, rate in scenes.FRESH.items()}
    return scenes.arm(base, f"rates {factor:g}", {"train": rates, "model": scenes.SMALL})


def _base(place: Path, seed: int, pairs: int) -> Recipe:
    settings = [
        *(f"tasks.{task}.copies={COPIES}" for task in scenes.TASKS),
        "tokenizer.steps=200",
        f"train.steps={STEPS}",
        "train.checkpoint_every=1000",
        "evaluate={items: 64, draws: {pose: 8}}",
    ]
    recipe = scenes.base(place / f"references-{pairs}-{seed}", seed, dict.fromkeys(scenes.TASKS, pairs), *settings)
    if seed != TUNING_SEED:
        return recipe
    values = config.to_dict(recipe)  # what is chosen here is chosen without a look at test scenes
    for section in values["tasks"].values():
        section["test"] = section["validation"]
    return Recipe.model_validate(values)
