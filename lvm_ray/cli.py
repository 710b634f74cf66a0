"""The command line: `lvm-ray VERB [RECIPE.yaml] [--set key.path=value ...] [--run DIR]`.

Thin: it reads arguments, calls the verb's function in `pipeline`, and turns a `UserError` into one line and exit code 2.
A failure of ours exits 1 with its traceback. `--help` imports neither Ray nor torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from lvm_ray import __version__
from lvm_ray.errors import Stopped, UserError

if TYPE_CHECKING:
    from lvm_ray.config import Recipe

VERBS = {
    "demo": "every stage in order, from nothing to the report page",
    "synth": "write the embedded data set of drawn scenes",
    "tokenize": "train the tokenizer if there is none, then turn images into token shards",
    "balance": "show what part of the training each task gets",
    "cache": "keep a teacher's answers to every sentence of the plan: training from them runs no teacher",
    "train": "train the teacher, then the student (or a single run)",
    "tune": "search the student's settings: many trainings of it from one teacher and one set of tokens",
    "evaluate": "score trained runs on held-out items",
    "study": "ask a trained run in every way that some settings make, and say what would have helped",
    "compare": "say by what two evaluated runs differ, and how sure that is",
    "report": "write the report page of a pipeline or run folder, or of several runs beside each other",
    "predict": "answer one's own pictures with a trained run",
    "import": "make token shards out of the token files of DeLVM or LVM, or a run out of one of their models",
    "export": "write token shards as the token files of DeLVM or LVM, or a run's model as a Hugging Face folder",
    "submit": "send a verb to a Ray cluster, Kubernetes or Slurm, or into the background of this machine",
    "status": "say how submitted jobs are",
    "logs": "print what a submitted job has printed",
    "stop": "have a submitted job save and leave",
}
PARTS = ("tokenizer", "teacher", "student")
TARGETS = ("local", "ray", "k8s", "slurm")
COSTLY = ("demo", "synth", "tokenize", "cache", "train", "tune", "evaluate")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit code: 0, 2 for bad input, 143 where it was asked to stop and has saved, 130 after Ctrl-C."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.verb == "submit":
        options.sent = _sent(options.parser, rest)
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return _run(options) or 0
    except (UserError, Stopped) as error:
        from lvm_ray.storage import redacted

        print(f"lvm-ray {options.verb}: {redacted(' '.join(str(error).split()))}", file=sys.stderr)
        return 143 if isinstance(error, Stopped) else 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int | None:
    from lvm_ray import pipeline
    from lvm_ray.cluster import arrival
    from lvm_ray.placement import STAGES
    from lvm_ray.storage import is_folder

    if options.verb in ("submit", "status", "logs", "stop"):
        return _elsewhere(options)
    if options.verb == "predict":
        from lvm_ray.evaluate.predict import predict

        for path in predict(options.run_folder, options.image, options.out, options.examples, options.task):
            print(path)
        return None
    if options.verb == "compare":
        pipeline.compare(options.first, options.second, options.out)
        return None
    if options.verb == "study":
        pipeline.study(options.run_folder, options.over, options.split)
        return None
    if options.verb == "import":
        _import(options)
        return None
    if options.verb == "export":
        _export(options)
        return None
    if options.verb == "report" and is_folder(options.recipe):
        pipeline.report(options.recipe, options.format, options.others)
        return None
    recipe = _recipe(options)
    if arrival.is_job():
        arrival.check_storage(recipe.run)
    if options.verb == "tune":
        pipeline.tune(recipe, options.space, options.dry_run)
        return None
    if getattr(options, "dry_run", False):
        trains, scores = options.verb in ("train", "demo"), options.verb in ("evaluate", "demo")
        stages = [stage for stage in STAGES if options.verb in (stage, "demo")]
        pipeline.dry_run(recipe, trains, getattr(options, "only", None), scores, stages)
    elif options.verb == "report":
        pipeline.report(recipe.run, options.format, options.others)
    elif options.verb == "train":
        pipeline.train(recipe, options.only)
    else:
        getattr(pipeline, options.verb)(recipe)
    return None


def _elsewhere(options: argparse.Namespace) -> int | None:
    from lvm_ray import pipeline
    from lvm_ray.cluster import verbs
    from lvm_ray.cluster.sending import submission_of
    from lvm_ray.cluster.submission import Where
    from lvm_ray.storage import is_folder

    where = Where(options.to, options.address, options.namespace)
    if options.verb == "status":
        verbs.status(where, options.name)
    elif options.verb == "stop":
        verbs.stop(where, options.name)
    elif options.verb == "logs":
        return verbs.logs(where, options.name, options.follow)
    else:
        sent = options.sent
        recipe = None if "recipe" not in sent or (sent.verb == "report" and is_folder(sent.recipe)) else _recipe(sent)
        # Made in any case: what makes no sense is said here and not there.
        costs = "" if recipe is None else pipeline.costs(recipe, getattr(sent, "only", None), getattr(sent, "space", None))
        one = submission_of(sent, recipe, options.name, options.to == "local")
        where = replace(where, image=options.image, template=options.template)
        return verbs.submit(where, one, costs, options.follow, options.dry_run)
    return None


def _import(options: argparse.Namespace) -> None:
    from lvm_ray.interchange import verbs
    from lvm_ray.interchange.models import is_model

    if not is_model(options.paths[0]):
        settings = {key: getattr(options, key) for key in ("size", "split", "pictures", "max_bad", "verify")}
        verbs.import_tokens(options.paths, options.tokenizer, options.task, options.out, **settings)
        return
    if len(options.paths) > 1 or options.task:
        found = "--task is for files of tokens" if options.task else f"{len(options.paths)} paths: models are imported one by one"
        raise UserError(f"{options.paths[0]}: a model: {found}")
    verbs.import_model(options.paths[0], options.tokenizer, options.out, options.size, options.heads, options.norm_epsilon)


def _export(options: argparse.Namespace) -> None:
    from lvm_ray.interchange import verbs

    if options.format == "hf":
        verbs.export_model(options.source, options.out, options.step)
    else:
        verbs.export_tokens(options.source, options.format, options.out, options.copies)


def _recipe(options: argparse.Namespace) -> Recipe:
    """The recipe named on the command line; a folder stands for the config.yaml in it."""
    from lvm_ray import config
    from lvm_ray.storage import file_size, is_folder, join

    path: str = options.recipe
    if is_folder(path):
        path = join(path.rstrip("/"), "config.yaml")
        if file_size(path) is None:
            raise UserError(f"{options.recipe}: a folder without config.yaml, so not a run; give a recipe or a run folder")
    init = getattr(options, "init", None)
    settings = [*options.set, f"model.init={json.dumps(init, ensure_ascii=False)}"] if init else options.set
    return config.load(path, settings, options.run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lvm-ray",
        description="Train vision models on image tokens, from a folder of images to a report.",
        epilog="Start with: lvm-ray demo recipes/demo.yaml",
    )
    parser.add_argument("--version", action="version", version=f"lvm-ray {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, purpose in VERBS.items():
        command = verbs.add_parser(verb, help=purpose, description=purpose, allow_abbrev=verb != "submit")
        command.set_defaults(parser=command)
        if verb == "predict":
            _add_predict(command)
        elif verb == "compare":
            command.add_argument("first", metavar="RUN", help="an evaluated run's folder")
            command.add_argument("second", metavar="OTHER", help="another one's; differences are its scores minus RUN's")
            command.add_argument("--out", metavar="FILE.json", help="keep the comparison as a file")
        elif verb == "study":
            _add_study(command)
        elif verb == "import":
            _add_import(command)
        elif verb == "export":
            _add_export(command)
        elif verb == "submit":
            _add_submit(command)
        elif verb in ("status", "logs", "stop"):
            _add_job(command, verb)
        else:
            command.add_argument("recipe", metavar="RECIPE.yaml", help="a recipe, or a folder with a config.yaml")
            command.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="change one value")
            command.add_argument("--run", metavar="DIR", help="folder of the run, instead of the recipe's")
        if verb == "train":
            command.add_argument("--only", choices=PARTS, help="train one part of the pipeline by itself")
            command.add_argument("--init", metavar="DIR", help="start from the weights of a run or a model (model.init)")
        if verb == "tune":
            command.add_argument(
                "--space", required=True, metavar="FILE.py", help="what is varied, as tune_spaces/kd_temperature.py"
            )
        if verb == "report":
            command.add_argument("others", nargs="*", metavar="OTHER", help="runs to set beside it: the page has all of them")
            forms = ("html", "md", "json")
            command.add_argument("--format", choices=forms, default="html", help="a page, a text with its tables, or its values")
        if verb in COSTLY:
            command.add_argument("--dry-run", action="store_true", help="show what it would do and cost, and stop")
    return parser


def _add_predict(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_folder", metavar="RUN", help="folder of a trained run")
    command.add_argument("--image", nargs="+", required=True, metavar="FILE", help="pictures to answer")
    command.add_argument("--out", default="answers", metavar="DIR", help="where the answers go (default: answers)")
    command.add_argument("--task", help="one task of the run; default: all of them")
    command.add_argument("--examples", metavar="DIR", help="1 to 3 example pairs of one's own: NAME.png and NAME_label.png")


def _add_study(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_folder", metavar="RUN", help="folder of a trained run, or of its pipeline")
    command.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="KEY.PATH=[VALUE, ...]",
        help="a setting to be crossed with the others, below evaluate or tasks (default: number and choice of examples)",
    )
    command.add_argument(
        "--split", choices=("validation", "test"), default="validation", help="whose items are asked (default: validation)"
    )


def _add_import(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "paths", nargs="+", metavar="PATH", help="token files, DeLVM's .bin or LVM's .jsonl; or the folder of a model of theirs"
    )
    command.add_argument("--tokenizer", metavar="FOLDER", help="the tokenizer that the tokens were made with")
    command.add_argument("--task", metavar="NAME", help="the task whose rows they become")
    command.add_argument("--out", metavar="DIR", help="folder of token shards, new or to be extended; of a model: a new run")
    command.add_argument("--size", type=_positive, default=256, help="side of the pictures in pixels (default: 256)")
    command.add_argument("--split", choices=("train", "validation", "test"), default="train", help="default: train")
    command.add_argument(
        "--pictures", type=_positive, metavar="K", help="pictures of a row; default: 2, or 1 where pairs do not fit"
    )
    command.add_argument("--max-bad", type=float, default=0.02, help="part of the lines that may be unusable (default: 0.02)")
    command.add_argument("--verify", action="store_true", help="decode some rows into SHARDS/verify.png")
    command.add_argument("--heads", type=_positive, metavar="N", help="of a model: heads of a layer, where its files do not tell")
    command.add_argument("--norm-epsilon", type=float, metavar="E", help="of a model: instead of its own, as 1e-5")


def _add_export(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="DIR", help="folder of token shards; for hf: of a run")
    formats = ("delvm", "lvm", "hf")
    command.add_argument("--format", choices=formats, required=True, help="whose token files to write; hf: a LlamaForCausalLM")
    command.add_argument("--out", required=True, metavar="DIR", help="where the files go")
    command.add_argument("--step", type=_positive, metavar="N", help="hf: the checkpoint of this step; default: the newest")
    command.add_argument("--copies", action="store_true", help="the augmented copies as well")


def _add_submit(command: argparse.ArgumentParser) -> None:
    command.usage = "lvm-ray submit --to {local,ray,k8s,slurm} [options] VERB RECIPE.yaml [the verb's own options]"
    _add_where(command, required=True)
    command.add_argument("--name", help="of the job, instead of its run's; small letters, digits and hyphens")
    command.add_argument("--image", help="k8s: of the cluster's containers, as cluster/Dockerfile makes it")
    command.add_argument("--template", metavar="FILE", help="k8s: a RayJob, slurm: a batch script; default: cluster/'s")
    command.add_argument("--follow", action="store_true", help="show its progress until it ends; Ctrl-C leaves it alone")
    command.add_argument("--dry-run", action="store_true", help="show all that would be sent and what it would cost, and stop")


def _add_job(command: argparse.ArgumentParser, verb: str) -> None:
    number = "?" if verb == "status" else None
    command.add_argument("name", metavar="NAME", nargs=number, help="the job's name, as submit says it; status: default: all")
    _add_where(command, required=False)
    if verb == "logs":
        command.add_argument("--follow", action="store_true", help="go on until the job ends; Ctrl-C leaves it alone")


def _add_where(command: argparse.ArgumentParser, required: bool) -> None:
    asked = "where the job runs" + ("" if required else " (default: ray)")
    command.add_argument("--to", required=required, default="ray", choices=TARGETS, help=asked)
    command.add_argument("--address", metavar="URL", help="ray: the dashboard's; default: RAY_API_SERVER_ADDRESS, or this host's")
    command.add_argument("--namespace", help="k8s: default: the template's, or kubectl's own")


def _sent(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """The options of the verb that is to be sent, read by that verb's own parser."""
    from lvm_ray.cluster.submission import SENT

    if not arguments or arguments[0] not in SENT:
        found = f"{arguments[0]!r} is none of them" if arguments else "it is missing"
        parser.error(f"name the verb to send, one of {', '.join(SENT)}: {found}")
    return _parser().parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value
