"""Token files of DeLVM and LVM: what goes in comes out, byte by byte, and what is broken is said and set aside."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml
from PIL import Image

from lvm_ray import cli
from lvm_ray.data.sentences import sentences
from lvm_ray.data.shards import open_shards, read_manifest
from lvm_ray.data.tokenize import tokenize
from lvm_ray.errors import UserError
from lvm_ray.interchange import importer, lines
from lvm_ray.interchange.exporter import export_tokens
from lvm_ray.interchange.importer import Imported, import_tokens
from lvm_ray.progress import Bar
from lvm_ray.recipe_sections import TokenizerSection
from lvm_ray.storage import open_file
from lvm_ray.tasks import TASKS
from lvm_ray.tokenizer import patch
from tests.toys import Plain, load_toy_tokenizer, make_toy_shards, toy_recipe

SIZE, N, CODES = 16, 4, 64  # pictures of 4 tokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a small patch tokenizer."""
    folder = tmp_path_factory.mktemp("pipeline") / "tokenizer"
    pictures = np.random.default_rng(0).integers(0, 256, (64, SIZE, SIZE, 3), dtype=np.uint8)
    section = TokenizerSection(patch=8, codes=CODES, width=8, steps=0)
    patch.save(patch.train(section, pictures, 0, lambda note: None), str(folder))
    return str(folder)


def samples(pictures: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Lines of so many pictures each, code 0 among them."""
    rng = np.random.default_rng(seed)
    made = [rng.integers(0, CODES, count * N).tolist() for count in pictures]
    for line in made:
        line[1] = 0
    return made


def delvm(tokens: Sequence[Any]) -> bytes:
    return "".join(json.dumps({"tokens": line}) + "\n" for line in tokens).encode()


def lvm(tokens: Sequence[Any]) -> bytes:
    texts = [base64.b64encode(np.array(line, np.int32).tobytes()).decode() for line in tokens]
    return "".join(json.dumps({"tokens": text}) + "\n" for text in texts).encode()


def write_delvm(path: Path, tokens: Sequence[Sequence[int]]) -> str:
    """A .bin with its .meta, as the official scripts write them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(delvm(tokens))
    sizes = [len(delvm([line])) for line in tokens]
    starts = [0, *itertools.accumulate(sizes)][:-1]
    with open(f"{path}.meta", "wb") as file:
        np.save(file, np.array([[start, len(line)] for start, line in zip(starts, tokens, strict=True)], np.int64))
    return str(path)


def run_import(paths: Sequence[str], tokenizer: str, out: Path, task: str = "swap", **options: Any) -> Imported:
    return import_tokens(paths, tokenizer, task, str(out), Bar("import", None, "lines"), size=SIZE, **options)


def run_export(folder: Path | str, form: Any, out: Path, **options: Any) -> list[Any]:
    return export_tokens(str(folder), form, str(out), Bar("export", None, "tokens"), **options)


class Frames(Plain):
    """Pictures that belong together, as many as the recipe says."""

    name: ClassVar[str] = "frames"
    pictures: ClassVar[int] = 8


@pytest.mark.parametrize(
    ("task", "pictures", "per_row"),
    [
        ("swap", [2] * 9, 2),
        ("swap", [12, 2, 4, 6, 2], 2),
        ("plain", [2] * 4, 1),
        ("frames", [2] * 4, 2),
        ("frames", [4, 2, 2, 4, 3, 1], 1),  # found odd after a part of pairs was written
    ],
)
def test_delvm_files_come_back_byte_by_byte(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch, task: str, pictures: list[int], per_row: int
) -> None:
    monkeypatch.setattr(importer, "PART_ROWS", 3)  # lines lie across parts
    monkeypatch.setitem(TASKS, "frames", Frames)
    path = write_delvm(tmp_path / "data/set/train.bin", samples(pictures))
    done = run_import([path], tokenizer, tmp_path / "shards", task)
    assert done.remarks == [] and done.manifest.bad == {task: 0}
    assert done.manifest.images_per_row == {task: per_row}
    assert done.manifest.rows == {"train": {task: {0: sum(pictures) // per_row}}}
    assert {str(file.relative_to(tmp_path / "shards")) for file in (tmp_path / "shards").rglob("*.parquet")} == set(
        done.manifest.files
    )
    run_export(tmp_path / "shards", "delvm", tmp_path / "out")
    for suffix in ("", ".meta"):
        assert Path(f"{tmp_path}/out/vision/{task}/train.bin{suffix}").read_bytes() == Path(path + suffix).read_bytes()


def test_lvm_files_come_back_byte_by_byte_and_through_delvms_format(tmp_path: Path, tokenizer: str) -> None:
    tokens = samples([16, 16, 2, 8])
    (tmp_path / "mix.jsonl").write_bytes(lvm(tokens))
    run_import([str(tmp_path / "mix.jsonl")], tokenizer, tmp_path / "shards")
    run_export(tmp_path / "shards", "lvm", tmp_path / "out")
    assert (tmp_path / "out/swap.jsonl").read_bytes() == lvm(tokens)
    (written,) = run_export(tmp_path / "shards", "delvm", tmp_path / "delvm")
    assert (written.lines, written.tokens) == (4, 42 * N)
    run_import([written.path], tokenizer, tmp_path / "again")
    run_export(tmp_path / "again", "lvm", tmp_path / "back")
    assert (tmp_path / "back/swap.jsonl").read_bytes() == lvm(tokens)
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["swap.jsonl"]


def test_tokenised_rows_are_a_line_each_and_come_back(tmp_path: Path, tokenizer: str) -> None:
    recipe = toy_recipe(tmp_path, tasks={"swap": {"people": 2, "copies": 2}})
    tokenize(recipe, Bar("", None, ""), load_toy_tokenizer)
    ids, pairs = open_shards(recipe.shard_folder).pairs("train", "swap", 0)
    (written,) = run_export(recipe.shard_folder, "delvm", tmp_path / "out")
    assert written.lines == len(ids) == 16  # both rows of an original stay lines of their own
    back = run_import([written.path], tokenizer, tmp_path / "back")
    assert back.remarks == []
    assert (open_shards(str(tmp_path / "back")).pairs("train", "swap", 0)[1] == pairs).all()
    (both,) = run_export(recipe.shard_folder, "delvm", tmp_path / "both", copies=True)
    assert both.lines == 32
    assert Path(both.path).read_bytes().startswith(Path(written.path).read_bytes())


def test_an_export_that_fails_leaves_no_half_file(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importer, "PART_ROWS", 3)
    done = run_import([write_delvm(tmp_path / "train.bin", samples([2] * 9))], tokenizer, tmp_path / "shards")
    last = tmp_path / "shards" / max(done.manifest.files)
    last.write_bytes(last.read_bytes()[:50])
    with pytest.raises(UserError, match=last.name):
        run_export(tmp_path / "shards", "delvm", tmp_path / "out")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_several_files_are_one_task_in_their_order(tmp_path: Path, tokenizer: str) -> None:
    paths = [write_delvm(tmp_path / name / "train.bin", samples([2, 4], seed)) for seed, name in enumerate("ab")]
    run_import(paths, tokenizer, tmp_path / "shards")
    run_export(tmp_path / "shards", "delvm", tmp_path / "out")
    whole = b"".join(Path(path).read_bytes() for path in paths)
    assert (tmp_path / "out/vision/swap/train.bin").read_bytes() == whole
    assert len(set(open_shards(str(tmp_path / "shards")).originals("train", "swap"))) == 4


def test_lines_longer_than_a_pair_make_sentences_without_a_line_twice(tmp_path: Path, tokenizer: str) -> None:
    for number in (4, 5, 30):
        path = write_delvm(tmp_path / f"{number}/train.bin", samples([12] * number))
        run_import([path], tokenizer, tmp_path / f"shards{number}")
        originals = open_shards(str(tmp_path / f"shards{number}")).originals("train", "swap")
        for grouping in range(5):
            rows = sentences(len(originals), 4, 0, "swap", 0, grouping, originals)
            assert set(rows.ravel()) == set(range(6 * number))
            assert all(len({originals[row] for row in sentence}) == 4 for sentence in rows)


def test_whole_lines_can_be_rows(tmp_path: Path, tokenizer: str) -> None:
    tokens = samples([8, 16, 8])
    (tmp_path / "clips.jsonl").write_bytes(lvm(tokens))
    done = run_import([str(tmp_path / "clips.jsonl")], tokenizer, tmp_path / "shards", pictures=8)
    assert done.manifest.images_per_row == {"swap": 8} and done.manifest.rows["train"]["swap"] == {0: 4}
    run_export(tmp_path / "shards", "lvm", tmp_path / "out")
    assert (tmp_path / "out/swap.jsonl").read_bytes() == lvm(tokens)


def test_offsets_that_start_again_are_said_and_not_followed(tmp_path: Path, tokenizer: str) -> None:
    tokens = samples([2] * 12)
    path = Path(write_delvm(tmp_path / "train.bin", tokens))
    meta = np.load(f"{path}.meta")
    meta[:, 0] = np.tile(meta[:4, 0], 3)
    np.save(tmp_path / "broken.npy", meta)
    (tmp_path / "broken.npy").rename(f"{path}.meta")
    (remark,) = run_import([str(path)], tokenizer, tmp_path / "shards").remarks
    assert remark.startswith(f"{path}.meta: 8 of 12 entries are not those of the file's lines")
    assert open_shards(str(tmp_path / "shards")).pairs("train", "swap", 0)[1].tolist() == tokens
    np.save(tmp_path / "long.npy", np.concatenate([np.load(f"{path}.meta")[:4], meta[:3]]))
    (tmp_path / "long.npy").rename(f"{path}.meta")
    path.write_bytes(delvm(tokens[:4]))
    (remark,) = run_import([str(path)], tokenizer, tmp_path / "other").remarks
    assert "3 of 7 entries" in remark
    (tmp_path / "train.bin.meta").unlink()
    assert run_import([str(path)], tokenizer, tmp_path / "without").remarks == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (np.array([[0, {"a": 1}]], object), "holds pickled objects, which are never read"),
        (np.zeros((3, 2)), r"holds float64 \[3, 2\], and a .meta is int64 \[lines, 2\]"),
        (np.zeros(3, np.int64), r"holds int64 \[3\]"),
        (b"some text", "not an npy file"),
        (b"\x93NUMPY\x01\x00\x08\x00(((    \n", "not an npy file"),
    ],
)
def test_a_meta_of_another_kind_is_refused(tmp_path: Path, tokenizer: str, content: Any, reason: str) -> None:
    path = write_delvm(tmp_path / "train.bin", samples([2] * 4))
    if isinstance(content, bytes):
        Path(f"{path}.meta").write_bytes(content)
    else:
        with open(f"{path}.meta", "wb") as file:
            np.save(file, content, allow_pickle=True)
    with pytest.raises(UserError, match=rf"train\.bin\.meta: {reason}"):
        run_import([path], tokenizer, tmp_path / "shards")
    assert not (tmp_path / "shards/manifest.json").exists() and not list(tmp_path.glob("shards/**/*.parquet"))


@pytest.mark.parametrize(
    "header", ["(((", "{'descr': '<i8', 'shape': (3, 2)", "(" * 5000, "\u00e9", "{1: 2, 'a': 3}", "  x\n y", ""]
)
def test_a_meta_whose_header_is_broken_is_refused_in_one_line_and_closed(
    tmp_path: Path, header: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = header.encode("latin1")
    (tmp_path / "train.bin.meta").write_bytes(b"\x93NUMPY\x01\x00" + len(content).to_bytes(2, "little") + content)
    opened: list[Any] = []

    def opening(path: str) -> Any:
        opened.append(open_file(path))
        return opened[-1]

    monkeypatch.setattr(lines, "open_file", opening)
    with pytest.raises(UserError, match=r"train\.bin\.meta: not an npy file") as caught:
        lines.read_meta(f"{tmp_path}/train.bin")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 and caught.value.__suppress_context__
    assert [stream.closed for stream in opened] == [True]


BROKEN = {
    b"garbage\n": "not JSON",
    b"[" * 5000 + b"\n": "not JSON",
    b"\xff\xfe\n": "not JSON",
    b"[1, 2]\n": 'holds no "tokens"',
    b'{"text": "hello"}\n': 'holds no "tokens"',
    b'{"tokens": [1, 2.5, 3, 4]}\n': 'holds no "tokens"',
    b'{"tokens": [true, false, true, true]}\n': 'holds no "tokens"',
    b'{"tokens": "not base64!"}\n': 'its "tokens" are no codes',
    b'{"tokens": "AAAA"}\n': 'its "tokens" are no codes',
    b'{"tokens": [99999999999999999999]}\n': 'its "tokens" are no codes',
    b'{"tokens": []}\n': "holds no tokens",
    delvm([[0, 1, 2, CODES] * 2]): "holds code 64, and the tokenizer has codes 0 to 63",
    delvm([[0, 1, 2, -1] * 2]): "holds code -1, and",
    delvm([[0] * 9]): "9 tokens are no whole number of pictures of 4 tokens",
    delvm([[0] * 12]): "3 pictures are no whole number of rows of 2 pictures",
    delvm([[0] * 3000]): "longer than 2,000 bytes",
}


def test_broken_lines_are_set_aside_with_number_and_reason(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "LONGEST_LINE", 2000)
    broken = {text if text[:1] != b"[" or text[1:2] != b"[" else b"[" * 1900 + b"\n": reason for text, reason in BROKEN.items()}
    tokens = samples([2] * (len(broken) + 1))
    content = b"".join(delvm([line]) + b"\n" + bad for line, bad in zip(tokens, broken, strict=False))
    path = tmp_path / "train.bin"
    path.write_bytes(content + delvm(tokens[-1:]) + delvm([[0] * 8])[:-5])
    with pytest.raises(UserError, match=r"train\.bin: 17 of 34 lines cannot be used, for example train\.bin, line 3: not JSON"):
        run_import([str(path)], tokenizer, tmp_path / "shards")
    assert not (tmp_path / "shards/manifest.json").exists() and not list(tmp_path.glob("shards/**/*.parquet"))
    done = run_import([str(path)], tokenizer, tmp_path / "shards", max_bad=0.5)
    entries = [json.loads(line) for line in (tmp_path / "shards/bad_items.jsonl").read_text().splitlines()]
    assert done.manifest.bad == {"swap": 17} and len(entries) == 17
    for number, (reason, entry) in enumerate(zip([*broken.values(), "not JSON: the file is cut off"], entries, strict=True)):
        line = 3 * number + 3 if number < 16 else 3 * 16 + 2
        assert f"train.bin, line {line}: {reason}" in entry["reason"], entry
        assert entry["item"] == f"train-0000-{line:08d}" and entry["task"] == "swap" and entry["paths"] == ["train.bin"]
    assert open_shards(str(tmp_path / "shards")).pairs("train", "swap", 0)[1].tolist() == tokens


def test_a_huge_line_is_never_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "LONGEST_LINE", 100)
    (tmp_path / "train.bin").write_bytes(b"first\n" + b"9" * 5_000_000 + b"\nlast")
    found = list(lines.read_lines(str(tmp_path / "train.bin")))
    assert [(line.number, line.offset, line.content) for line in found] == [
        (1, 0, b"first\n"),
        (2, 6, None),
        (3, 5_000_007, b"last"),
    ]


def test_a_file_without_a_usable_line_is_refused(tmp_path: Path, tokenizer: str) -> None:
    for content, words in (
        (b"", "holds no usable line: name"),
        (b"x\n", "no usable line, for example empty.bin, line 1: not JSON"),
    ):
        (tmp_path / "empty.bin").write_bytes(content)
        with pytest.raises(UserError, match=words):
            run_import([str(tmp_path / "empty.bin")], tokenizer, tmp_path / "shards", max_bad=1.0)


def test_a_data_set_grows_by_tasks_and_splits_and_keeps_what_it_had(tmp_path: Path, tokenizer: str) -> None:
    out = tmp_path / "shards"
    first = write_delvm(tmp_path / "a.bin", samples([2] * 4))
    (tmp_path / "b.bin").write_bytes(delvm(samples([1, 2], 1)) + b"broken\n")
    run_import([first], tokenizer, out)
    run_import([str(tmp_path / "b.bin")], tokenizer, out, task="plain", max_bad=0.5)
    done = run_import([write_delvm(tmp_path / "c.bin", samples([2] * 2, 2))], tokenizer, out, split="test")
    assert done.manifest == read_manifest(str(out))
    assert done.manifest.rows == {"train": {"swap": {0: 4}, "plain": {0: 3}}, "test": {"swap": {0: 2}}}
    assert done.manifest.images_per_row == {"swap": 2, "plain": 1} and done.manifest.bad == {"swap": 0, "plain": 1}
    assert "line 3" in (out / "bad_items.jsonl").read_text()
    shards = open_shards(str(out))
    shards.verify()
    assert not set(shards.originals("train", "swap")) & set(shards.originals("test", "swap"))
    before = (out / "manifest.json").read_bytes()
    assert run_import([first], tokenizer, out).manifest == done.manifest  # the same command again does nothing
    for path, options, words in (
        (tmp_path / "c.bin", {}, "holds train rows of task swap already"),
        (
            tmp_path / "b.bin",
            {"split": "test", "pictures": 2, "task": "plain"},
            "--pictures 2: the rows of task plain here hold 1",
        ),
    ):
        with pytest.raises(UserError, match=words):
            run_import([str(path)], tokenizer, out, **options)
    with pytest.raises(UserError, match="holds tokens of pictures of size 16, not 32"):
        import_tokens([first], tokenizer, "invert", str(out), Bar("", None, ""), size=32)
    with pytest.raises(UserError, match=r"holds tokens of codebook \w+, --tokenizer is of toy-64"):
        run_import([first], tokenizer, out, task="invert", load=load_toy_tokenizer)
    assert (out / "manifest.json").read_bytes() == before


def test_tokenizing_never_removes_imported_tokens(tmp_path: Path, tokenizer: str) -> None:
    recipe = toy_recipe(tmp_path, tasks={"invert": {}})
    path = write_delvm(tmp_path / "train.bin", samples([2] * 4))
    run_import([path], tokenizer, Path(recipe.shard_folder))
    with pytest.raises(UserError, match="holds imported tokens, which tokenizing would remove"):
        tokenize(recipe, Bar("", None, ""), load_toy_tokenizer)
    open_shards(recipe.shard_folder).verify()


def test_verify_shows_rows_as_pictures(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importer, "PART_ROWS", 3)
    tokens = samples([2] * 20)
    done = run_import([write_delvm(tmp_path / "train.bin", tokens)], tokenizer, tmp_path / "shards", verify=True)
    assert done.sheet == f"{tmp_path}/shards/verify.png"
    sheet = np.array(Image.open(done.sheet))
    shown = [0, 2, 5, 8, 10, 13, 16, 19]
    pictures = patch.load(tokenizer, json.loads(Path(f"{tokenizer}/config.json").read_text())).decode(
        np.array([tokens[row] for row in shown]).reshape(-1, N)
    )
    for place, picture in enumerate(pictures):
        top, left = place // 2 * 34 + 14, 4 + place % 2 * 20
        assert (sheet[top : top + SIZE, left : left + SIZE] == picture).all()


def test_the_command_line_imports_trains_and_exports(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_delvm(tmp_path / "rain/train.bin", samples([4] * 10))
    arguments = ["--tokenizer", tokenizer, "--size", str(SIZE), "--out", str(tmp_path / "tokens")]
    assert cli.main(["import", path, "--task", "derain", *arguments, "--verify"]) == 0
    assert cli.main(["import", path, "--task", "segmentation", *arguments]) == 0
    out = capsys.readouterr().out
    assert "20 train rows of task derain, 2 pictures each" in out and "verify.png" in out
    recipe = {
        "run": str(tmp_path / "run"),
        "size": SIZE,
        "tasks": {"derain": {}, "segmentation": {"classes": ["thing"]}},
        "tokenizer": {"patch": 8, "codes": CODES},
        "model": {"width": 16, "layers": 1, "heads": 2, "mlp": 16},
        "train": {"steps": 3, "batch": 4, "micro_batch": 4},
        "compute": {"workers": 0, "threads": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.main(["train", str(tmp_path / "recipe.yaml"), "--set", f"shards={tmp_path}/tokens"]) == 0
    info = json.loads((tmp_path / "run/model/image_tokenizer.json").read_text())
    assert (tmp_path / "run/model" / info["folder"]).resolve() == (tmp_path / "tokens/tokenizer").resolve()
    capsys.readouterr()
    assert cli.main(["export", str(tmp_path / "tokens"), "--format", "delvm", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/out/vision/derain/train.bin: 10 lines, 160 tokens" in out and "fewer than 32,768 tokens" in out
    assert (tmp_path / "out/vision/derain/train.bin").read_bytes() == Path(path).read_bytes()


def test_bad_commands_exit_2_in_one_line(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_delvm(tmp_path / "train.bin", samples([2] * 4))
    (tmp_path / "weights.bin").write_bytes(b"PK\x03\x04 and so on")
    make_toy_shards(tmp_path / "toys")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("run: here\n")
    whole = ["--tokenizer", tokenizer, "--task", "derain", "--out", str(tmp_path / "shards"), "--size", str(SIZE)]
    for arguments, words in (
        (["import", str(tmp_path / "none.bin"), *whole], "none.bin: no such file"),
        (["import", str(tmp_path), *whole], "a folder: name the .bin or .jsonl files"),
        (["import", path, tokenizer, *whole], "a folder of a model or a tokenizer: name files of tokens, or one model's folder"),
        (["import", str(tmp_path / "weights.bin"), *whole], "weights.bin: a zip or PyTorch file"),
        (["import", f"{path}.meta", *whole], "a .meta or other npy file"),
        (["import", path], "--tokenizer: missing"),
        (["import", path, *whole, "--task", "nonsense"], "--task nonsense: no task is called so: there are segmentation"),
        (["import", path, *whole, "--size", "20"], "--size 20: not a multiple of 8"),
        (["import", path, *whole, "--max-bad", "-1"], "--max-bad -1: a part of the lines"),
        (["import", path, *whole, "--tokenizer", str(tmp_path)], "no tokenizer here"),
        (["export", str(tmp_path / "none"), "--format", "lvm", "--out", str(tmp_path / "out")], "no manifest.json"),
        (["export", str(tmp_path / "run"), "--format", "lvm", "--out", str(tmp_path / "out")], "its model with --format hf"),
    ):
        assert cli.main(arguments) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert words in line, line
    assert not (tmp_path / "shards").exists() and not (tmp_path / "out").exists()


def test_tokens_go_to_and_come_from_a_uri_with_a_query(tmp_path: Path, tokenizer: str) -> None:
    place, query = f"file://{tmp_path}/odd%20%23names", "?region=us-east-1"
    path = Path(write_delvm(tmp_path / "odd #names/train.bin", samples([2] * 4)))
    done = run_import([f"{place}/train.bin{query}"], tokenizer, f"{place}/shards{query}")  # type: ignore[arg-type]
    (source,) = done.manifest.imported["train"]["swap"]
    assert source["name"] == "train.bin" and (tmp_path / "odd #names/shards/tokenizer/config.json").is_file()
    (written,) = run_export(f"{place}/shards{query}", "delvm", f"{place}/out{query}")  # type: ignore[arg-type]
    assert written.path == f"{place}/out/vision/swap/train.bin{query}"
    for suffix in ("", ".meta"):
        back = tmp_path / f"odd #names/out/vision/swap/train.bin{suffix}"
        assert back.read_bytes() == Path(f"{path}{suffix}").read_bytes()
    Path(f"{path}.meta").write_bytes(b"some text")
    with pytest.raises(UserError, match=rf"train\.bin\.meta\{query}: not an npy file"):
        run_import([f"{place}/train.bin{query}"], tokenizer, tmp_path / "other")


def test_what_cannot_be_written_ends_in_one_line(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_delvm(tmp_path / "train.bin", samples([2] * 4))
    run_import([path], tokenizer, tmp_path / "shards")
    importing = ["import", path, "--tokenizer", tokenizer, "--task", "swap", "--size", str(SIZE)]
    for command in (importing, ["export", str(tmp_path / "shards"), "--format", "lvm"]):
        assert cli.main([*command, "--out", "/proc/nope"]) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith(f"lvm-ray {command[0]}: /proc/nope/") and "cannot write: No such file" in message
