"""The verbs `import` and `export`: tokens and models of other programs in and out, with what is said about them.

What they do stands in the other files of this package; they are imported inside, after the arguments were looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lvm_ray.errors import UserError
from lvm_ray.progress import say, stage

if TYPE_CHECKING:
    from lvm_ray.interchange.lines import Format
    from lvm_ray.tasks import Split


def import_tokens(
    paths: Sequence[str],
    tokenizer_folder: str | None,
    task: str | None,
    out: str | None,
    *,
    size: int,
    split: Split,
    pictures: int | None,
    max_bad: float,
    verify: bool,
) -> None:
    """Make or extend token shards out of token files of DeLVM or LVM; `interchange.importer` says how."""
    from lvm_ray.interchange import importer

    for path in paths:
        importer.refuse_other_files(path)
    if not (tokenizer_folder and task and out):
        missing = "--tokenizer" if not tokenizer_folder else "--task" if not task else "--out"
        raise UserError(f"{missing}: missing: token files need the --tokenizer they were made with, a --task and an --out")
    with stage("import", unit="lines") as bar:
        done = importer.import_tokens(
            paths,
            tokenizer_folder,
            task,
            out,
            bar,
            size=size,
            split=split,
            pictures=pictures,
            max_bad=max_bad,
            verify=verify,
        )
    for remark in done.remarks:
        say(remark)
    rows, per_row = done.manifest.rows[split][task][0], done.manifest.images_per_row[task]
    say(f"{out}: {rows:,} {split} rows of task {task}, {per_row} {'picture' if per_row == 1 else 'pictures'} each")
    if done.sheet:
        say(f"look whether these are pictures: {done.sheet}")


def import_model(
    path: str, tokenizer_folder: str | None, out: str | None, size: int, heads: int | None, norm_epsilon: float | None
) -> None:
    """Make a run folder out of a model of DeLVM or LVM; `interchange.models` says how."""
    from lvm_ray.interchange import models

    if not (tokenizer_folder and out):
        missing = "--out" if tokenizer_folder else "--tokenizer"
        raise UserError(f"{missing}: missing: a model needs the --tokenizer of its tokens, and a run folder as --out")
    with stage("import", total=1, unit="models") as bar:
        remarks = models.import_model(path, tokenizer_folder, out, size=size, heads=heads, norm_epsilon=norm_epsilon)
        bar.set(1)
    for remark in remarks:
        say(remark)
    say(f"name it in a recipe as distill.teacher or model.init: {out}")


def export_model(run: str, out: str, step: int | None) -> None:
    """Write a checkpoint of a run as a stock Hugging Face folder."""
    from lvm_ray.interchange import stock

    with stage("export", total=1, unit="models") as bar:
        found = stock.export_model(run, out, step)
        bar.set(1, note=found.name)
    say(f"{out}: {found.name} of {run} as a LlamaForCausalLM")


def export_tokens(folder: str, form: Format, out: str, copies: bool) -> None:
    """Write the training rows of token shards as token files of DeLVM or LVM."""
    from lvm_ray.interchange import exporter

    with stage("export", unit="tokens") as bar:
        written = exporter.export_tokens(folder, form, out, bar, copies)
    for file in written:
        say(f"{file.path}: {file.lines:,} lines, {file.tokens:,} tokens")
        if form == "delvm" and file.tokens < exporter.LOADER_PACK:
            least = f"{exporter.LOADER_PACK:,} tokens"
            say(f"{file.path}: DeLVM's loader drops files of fewer than {least} without a word: give it more rows")
