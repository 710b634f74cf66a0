"""A data set is its manifest: what is written comes back, what is not whole is refused."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from lvm_ray.data.shards import open_shards, read_manifest, write_part
from lvm_ray.errors import UserError
from tests.toys import make_toy_shards


def test_pairs_come_back_as_written(tmp_path):
    tokens = np.arange(24, dtype=np.uint16).reshape(3, 8) * 3000
    path, entry = write_part(str(tmp_path), "train", "pose", 2, 7, ["a", "b", "c"], ["x", "y", "y"], tokens)
    assert path == "train/pose/copy-002/part-00007.parquet" and entry["rows"] == 3
    table = pq.read_table(tmp_path / path)
    assert table["original"].to_pylist() == ["x", "y", "y"]
    assert table["tokens"][1].as_py() == tokens[1].astype("<u2").tobytes()
    assert [file.name for file in (tmp_path / path).parent.iterdir()] == ["part-00007.parquet"]


@pytest.mark.parametrize("uri", [False, True])
def test_a_data_set_is_written_to_and_opened_from_a_path_and_a_uri(tmp_path, uri):
    folder = f"file://{tmp_path}/a%20b?region=us-east-1" if uri else f"{tmp_path}/a b"
    manifest = make_toy_shards(folder)
    assert (tmp_path / "a b/manifest.json").is_file()
    shards = open_shards(folder)
    assert shards.manifest == manifest
    ids, tokens = shards.pairs("train", "swap", 1)
    assert ids[3] == "train-0003-0" and tokens.shape == (8, 8) and tokens.dtype == np.uint16
    assert (tokens[:, 4:] == (tokens[:, :4] + 15) % 64).all()
    assert shards.originals("train", "swap")[3] == "train-0003"
    shards.verify()


def test_no_manifest_no_data_set(tmp_path):
    with pytest.raises(UserError, match=r"has no manifest.json, so it is not a data set: run lvm-ray tokenize"):
        open_shards(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"schema": 1}, "schema 1, this version reads 2: run lvm-ray tokenize again"), ({"surprise": 1}, "not a manifest")],
)
def test_other_manifests_are_refused(tmp_path, change, words):
    make_toy_shards(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=words):
        read_manifest(str(tmp_path))
    path.write_text("{half")
    with pytest.raises(UserError, match="not a manifest"):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize(
    "path",
    [
        "../victim.txt",
        "/etc/passwd",
        "train/../copy-000/part-00000.parquet",
        "other/swap/copy-000/part-00000.parquet",
        "train/swap/copy-000/part-00000.parquet\n",
    ],
)
def test_a_manifest_that_names_other_files_is_refused(tmp_path, path):
    make_toy_shards(tmp_path)
    place = tmp_path / "manifest.json"
    values = json.loads(place.read_text())
    values["files"][path] = {"rows": 0, "sha256": ""}
    place.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"manifest.json: names '.*', which is no place of a shard: run lvm-ray tokenize again"):
        open_shards(str(tmp_path))


def test_damage_names_the_file(tmp_path):
    make_toy_shards(tmp_path)
    name = "train/swap/copy-001/part-00000.parquet"
    content = bytearray((tmp_path / name).read_bytes())
    content[40] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        open_shards(str(tmp_path)).verify()
    (tmp_path / name).write_bytes(content[:60])
    with pytest.raises(UserError, match=name):
        open_shards(str(tmp_path)).pairs("train", "swap", 1)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=name):
        open_shards(str(tmp_path)).pairs("train", "swap", 1)


def test_rows_that_are_not_pairs_are_no_examples(tmp_path):
    make_toy_shards(tmp_path, pictures={"swap": 8})
    shards = open_shards(str(tmp_path))
    assert shards.manifest.images_per_row == {"invert": 2, "threshold": 2, "swap": 8}
    assert shards.rows("train", "swap", 1)[1].shape == (8, 32)
    with pytest.raises(UserError, match="a row of task swap holds 8 pictures, and examples are"):
        shards.pairs("train", "swap", 1)


def test_another_codebook_is_refused(tmp_path):
    make_toy_shards(tmp_path)
    shards = open_shards(str(tmp_path))
    shards.require_tokenizer("toy-64-colours")
    with pytest.raises(UserError, match="codebook toy-64-colours, but codebook other is wanted"):
        shards.require_tokenizer("other")


def test_a_copy_that_was_not_tokenised_is_named(tmp_path):
    make_toy_shards(tmp_path)
    with pytest.raises(UserError, match="no copy 2 of task swap's train pairs"):
        open_shards(str(tmp_path)).pairs("train", "swap", 2)
