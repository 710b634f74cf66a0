"""Whether a run can run, asked before it costs anything: small checks in the order of their cost.

Each gives the figure that it found, as text, and raises UserError with one line where the run could not go well. None leaves
anything behind. With workers, what depends on the machine is asked of every node of the cluster, by tasks that run there.

    batch      the workers can share the global batch evenly
    cluster    has the CPUs and GPUs that the run asks for
    memory     the estimate of a worker's memory fits into the machines
    storage    the run's folder is writable from every node
    shards     every file of the data set is there, whole
    teacher    belongs to the student and to the shards
    features   of a vision network: its folder holds one of its kind
    trackers   what those need that the recipe names is installed

What is left, whether one micro batch passes forward and backward, is `rehearsal`'s.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.parquet

from lvm_ray import estimate, placement, recipe_sections
from lvm_ray.config import Recipe
from lvm_ray.data.shards import read_manifest
from lvm_ray.data.stream import require_even_batch
from lvm_ray.errors import UserError
from lvm_ray.observe import trackers
from lvm_ray.recipe_sections import ModelSection
from lvm_ray.storage import is_uri, join, open_folder, read_file, redacted, write_file
from lvm_ray.train.nodes import ask_nodes, living_nodes, require_cpus

if TYPE_CHECKING:
    from lvm_ray.model.shape import Shape

# An estimate of memory is good to a quarter: only what exceeds the machine even so is refused.
SURE_PART = 0.75
READERS = 16  # threads that open shards: at a URI each waits for the network


class Check(NamedTuple):
    """A named check: `run` gives the figure found, or raises UserError."""

    name: str
    run: Callable[[], str]


def checks(recipe: Recipe, data: bool = True) -> list[Check]:
    """The checks of a resolved single run that need no model, cheapest first. `data`: whether there are shards yet."""
    asked = [("batch", check_batch), ("cluster", check_cluster), ("memory", check_memory), ("storage", check_storage)]
    if data:
        asked.append(("shards", check_shards))
    if recipe.trackers:
        asked.insert(0, ("trackers", trackers.require))
    return [Check(name, partial(check, recipe)) for name, check in asked]


def check_batch(recipe: Recipe) -> str:
    """Raises UserError where the workers, or any number of them in [min, max], cannot share the global batch evenly."""
    require_even_batch(recipe)
    section, compute = recipe.train, recipe.compute
    workers = sorted({max(1, compute.least_workers), max(1, compute.most_workers)})
    steps = " or ".join(str(section.batch // (count * section.micro_batch)) for count in workers)
    return (
        f"{section.batch} sentences = {_worker_counts(recipe)} x {steps} micro "
        f"{'batch' if steps == '1' else 'batches'} of {section.micro_batch}"
    )


def check_cluster(recipe: Recipe) -> str:
    """Raises UserError where the cluster lacks the CPUs or GPUs that the run needs at least. Starts or joins Ray for workers."""
    compute, workers = recipe.compute, recipe.compute.least_workers
    if not compute.most_workers:
        return f"this process, {compute.threads} {'thread' if compute.threads == 1 else 'threads'}{_own_gpu(recipe)}"
    from lvm_ray import ray_session

    ray_session.start(recipe)
    nodes = placement.require(recipe, "train", workers, compute.device == "cuda")
    gpus = placement.gpus_of(nodes)
    cpus = require_cpus(workers)
    if compute.device == "cuda" and workers > gpus:
        raise UserError(
            f"compute.device: cuda for {workers} workers, and the cluster has {gpus} GPUs: "
            + (f"ask for at most {gpus} workers" if gpus else "add nodes with GPUs, or set it to cpu")
        )
    chosen = f", on {len(nodes)} of its nodes" if placement.place_of(recipe, "train").chooses else ""
    return f"{cpus} CPUs and {gpus} GPUs for {_worker_counts(recipe)} and the data{chosen}"


def _worker_counts(recipe: Recipe) -> str:
    least, most = max(1, recipe.compute.least_workers), max(1, recipe.compute.most_workers)
    return f"{least}{f' to {most}' if most > least else ''} {'worker' if most == 1 else 'workers'}"


def _own_gpu(recipe: Recipe) -> str:
    if recipe.compute.device != "cuda":
        return ""
    import torch

    if not torch.cuda.is_available():
        raise UserError("compute.device: cuda, and this machine has no GPU that torch can use: set it to cpu")
    return f", {torch.cuda.get_device_name()}"


def check_memory(recipe: Recipe) -> str:
    """Raises UserError where the workers' estimated memory exceeds that of the machines by more than the estimate may err.

    On GPUs nothing is refused: there the rehearsal, which runs on them, meets their limit by itself.
    """
    need = estimate.memory(recipe, estimate.teacher_models(recipe)).total
    workers = max(1, recipe.compute.least_workers)
    figure = f"about {_gibibytes(need)} a worker"
    if recipe.compute.device == "cuda":
        return figure
    nodes = _memory_of_nodes(recipe) if recipe.compute.most_workers else [machine_memory()]
    if sum(int(node // (SURE_PART * need)) for node in nodes) < workers:
        machines = "this machine has" if len(nodes) == 1 else f"the largest of {len(nodes)} nodes has"
        raise UserError(
            f"memory: {workers} {'worker' if workers == 1 else 'workers'} of {figure.removesuffix(' a worker')} each do not fit, "
            f"{machines} {_gibibytes(max(nodes))}: {less_memory(recipe)}"
        )
    return f"{figure}, {' + '.join(_gibibytes(node) for node in nodes[:4])}{' + ...' * (len(nodes) > 4)} there"


def machine_memory() -> int:
    """Bytes of memory that processes of this machine, or of this container, may have."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # another system, or no limit
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return machine


def _memory_of_nodes(recipe: Recipe) -> list[float]:
    """Bytes of every node that may run the training's workers: what Ray gives to tasks, and to its own store."""
    resources = [node["Resources"] for node in placement.nodes_of(placement.place_of(recipe, "train"))]
    return [found.get("memory", 0) + found.get("object_store_memory", 0) for found in resources]


def less_memory(recipe: Recipe) -> str:
    """What to do where memory is short and has not been done yet."""
    section, ways = recipe.train, []
    if section.micro_batch > 1:
        ways.append("a smaller train.micro_batch")
    if not section.checkpoint_activations:
        ways.append("train.checkpoint_activations: true")
    if section.zero < 3 and recipe.compute.most_workers > 1:
        ways.append("a higher train.zero")
    return f"try {', '.join([*ways, 'a smaller model'])}"


def _gibibytes(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


def check_storage(recipe: Recipe) -> str:
    """Raises UserError where the run's folder cannot be written from every node, or is not the same folder everywhere."""
    folder = recipe.run if is_uri(recipe.run) else os.path.abspath(recipe.run)
    name, content = f".preflight-{uuid.uuid4().hex[:8]}", os.urandom(64)
    with _small_file(folder, name, content):
        if not recipe.compute.most_workers:
            _write_beside(folder, name, content)
            return f"{redacted(folder)} is writable"
        nodes = living_nodes()
        ask_nodes(nodes, _write_beside, [(folder, name, content)] * len(nodes))
    return f"{redacted(folder)} is writable from {len(nodes)} {'node' if len(nodes) == 1 else 'nodes'}"


def _write_beside(folder: str, name: str, content: bytes) -> None:
    """See the file that another process wrote into a folder, and write one of its own there."""
    if read_file(folder, name) != content:
        raise UserError(
            f"{redacted(folder)}: what another node writes there is not seen on node {os.uname().nodename}: put the run into a "
            "folder that all nodes share, or at a URI (--run s3://...)"
        )
    with _small_file(folder, f"{name}-{uuid.uuid4().hex[:8]}", content):
        pass


@contextmanager
def _small_file(folder: str, name: str, content: bytes) -> Iterator[None]:
    """A file in a folder while the block runs. It goes again, and so do folders that were made for it."""
    place = Path(folder)
    made = [] if is_uri(folder) else [path for path in (place, *place.parents) if not path.exists()]
    write_file(folder, name, content)
    try:
        yield
    finally:
        filesystem, root = open_folder(folder)
        with suppress(OSError):
            filesystem.delete_file(f"{root}/{name}")
            for path in made:
                path.rmdir()


def check_shards(recipe: Recipe) -> str:
    """Raises UserError that names the first file of the data set that is missing, cut, or of other rows than the manifest says.

    With workers every node opens a part of the files. Contents are not read: `tokenize` has verified its checksums.
    """
    folder = recipe.shard_folder if is_uri(recipe.shard_folder) else os.path.abspath(recipe.shard_folder)
    manifest = read_manifest(folder)
    files = [(path, int(entry["rows"])) for path, entry in sorted(manifest.files.items())]
    if recipe.compute.most_workers:
        nodes = living_nodes()
        ask_nodes(nodes, _open_files, [(folder, files[place :: len(nodes)] or files[:1]) for place in range(len(nodes))])
    else:
        _open_files(folder, files)
    return f"{len(files):,} files of {sum(rows for _, rows in files):,} rows are readable"


def _open_files(folder: str, files: Sequence[tuple[str, int]]) -> None:
    filesystem, root = open_folder(folder)

    def problem(file: tuple[str, int]) -> str | None:
        path, rows = file
        try:
            with filesystem.open_input_file(f"{root}/{path}") as stream:
                size, found = stream.size(), pa.parquet.read_metadata(stream)
        except (OSError, pa.ArrowInvalid) as error:
            return f"cannot be read ({redacted(str(error).splitlines()[0])})"
        if found.num_rows != rows:
            return f"has {found.num_rows} rows, the manifest says {rows}"
        if _bytes_before_footer(found) > size - found.serialized_size - 8:
            return "lacks some of its bytes"
        return None

    if len(files) == 1 or not is_uri(folder):  # local footers are read faster than threads take turns
        problems = map(problem, files)
        broken = next(((path, text) for (path, _), text in zip(files, problems, strict=True) if text), None)
    else:
        with ThreadPoolExecutor(READERS) as pool:
            broken = next(((path, text) for (path, _), text in zip(files, pool.map(problem, files), strict=True) if text), None)
    if broken:
        raise UserError(f"{join(folder, broken[0])}: {broken[1]}: run lvm-ray tokenize again")


def _bytes_before_footer(found: pa.parquet.FileMetaData) -> int:
    """Where the last column of a Parquet file ends."""
    chunks = [
        found.row_group(group).column(column) for group in range(found.num_row_groups) for column in range(found.num_columns)
    ]
    return max((int(chunk.data_page_offset + chunk.total_compressed_size) for chunk in chunks), default=0)


def check_teacher(recipe: Recipe, codebook: str) -> None:
    """Raises UserError where a teacher's model is missing or of another codebook, before anything is started."""
    from lvm_ray.model.folder import TOKENIZER_FILE, read_shape, read_tokenizer

    for name, one in recipe.teachers.items():
        if one.teacher is None:
            raise UserError(
                f"{recipe_sections.place_of_teacher(name)}: missing: name a finished teacher's run folder"
                + (", or give the recipe a teacher section" if name == recipe_sections.FIRST_TEACHER else "")
            )
        folder = Path(one.teacher) / "model"
        found = read_tokenizer(folder)
        if found["hash"] != codebook:
            raise UserError(
                f"{folder / TOKENIZER_FILE}: the teacher was trained on codebook {found['hash']}, the shards are of codebook "
                f"{codebook}: distil from a teacher of the same tokenizer"
            )
        if found["image_tokens"] != recipe.image_tokens:
            raise UserError(
                f"{folder}: the teacher's pictures have {found['image_tokens']} tokens, the recipe's {recipe.image_tokens}"
            )
        if recipe.distill and name == recipe_sections.FIRST_TEACHER and recipe.distill.layers is not None:
            _check_layers(recipe.distill.layers, recipe.model, read_shape(folder, found))


def check_features(recipe: Recipe) -> None:
    """Raises UserError where `distill.features` names no network of its kind, before anything is started."""
    section = recipe.distill.features if recipe.distill else None
    if section is None:
        return
    path, weights = Path(section.weights) / "config.json", Path(section.weights) / "model.safetensors"
    try:
        kind = json.loads(path.read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"distill.features.weights: {path}: no network's configuration: name the network's folder") from None
    if kind != section.network:
        raise UserError(f"distill.features.network: {path} is of a {kind}, the recipe says {section.network}")
    if not weights.is_file():
        raise UserError(f"distill.features.weights: {weights}: no such file: networks are read from safetensors alone")


def _check_layers(layers: list[int], section: ModelSection, teacher: Shape) -> None:
    """Raises UserError where a student cannot start from these layers of the teacher."""
    for field, wanted, found in (
        ("width", section.width, teacher.width),
        ("heads", section.heads, teacher.heads),
        ("mlp", section.mlp, teacher.mlp),
    ):
        if wanted != found:
            raise UserError(
                f"distill.layers: the student's model.{field} is {wanted}, the teacher's {found}: "
                "a student takes over layers of its own shape only"
            )
    for layer in layers:
        if not 0 <= layer < teacher.layers:
            raise UserError(f"distill.layers: no layer {layer}: the teacher has layers 0 to {teacher.layers - 1}")
