"""Files by path or URI: names of any kind come back, a query stays at the end, credentials are never shown."""

from __future__ import annotations

import resource
from pathlib import Path
from urllib.parse import quote

import pytest

from lvm_ray.errors import UserError
from lvm_ray.storage import (
    file_size,
    fill,
    has_credentials,
    is_folder,
    join,
    list_sizes,
    open_folder,
    read_bytes,
    read_file,
    redacted,
    split_name,
    write_file,
)

ODD = "a b#c%20d?e*f+ü.txt"
MINIO = "?region=us-east-1&scheme=http&endpoint_override=localhost:9000/x"


@pytest.mark.parametrize("folder", ["data", "/data/", "data/a b%20?c#d", "", "."])
def test_a_path_is_joined_byte_by_byte(folder: str) -> None:
    for name in ("a.png", ODD, "x/y", "\udcff"):
        assert join(folder, name) == f"{folder}/{name}"
        assert split_name(join(folder, name))[1] == name.rpartition("/")[2]


def test_a_name_goes_quoted_before_a_uris_query() -> None:
    assert join(f"s3://bucket/shards/{MINIO}", "train/a b#%?.x") == f"s3://bucket/shards/train/a%20b%23%25%3F.x{MINIO}"
    assert split_name(join(f"s3://bucket/a%20b{MINIO}", ODD)) == (f"s3://bucket/a%20b{MINIO}", ODD)
    assert fill(f"s3://bucket/*/blur{MINIO}", "a b") == f"s3://bucket/a%20b/blur{MINIO}"
    assert fill("clips/*/blur", "a b") == "clips/a b/blur"


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("s3://bucket/a%20b/c%3Fd/?region=us-east-1", "bucket/a b/c?d"),
        ("s3://bucket?region=us-east-1", "bucket"),
        ("s3://bucket/a b#c?region=us-east-1", "bucket/a b#c"),
        ("file:///data/x%25y?a=/b", "/data/x%y"),
        ("file:///", "/"),
    ],
)
def test_a_uri_is_a_place_in_a_file_system_that_is_made_once(uri: str, place: str) -> None:
    filesystem, found = open_folder(uri)
    assert found == place
    assert open_folder(join(uri, "other"))[0] is filesystem


@pytest.mark.parametrize("uri", [False, True])
def test_names_of_any_kind_are_written_and_read(tmp_path: Path, uri: bool) -> None:
    name = ODD
    (tmp_path / name).mkdir()
    folder = join(f"file://{quote(str(tmp_path))}?mode=x", name) if uri else join(str(tmp_path), name)
    write_file(folder, f"sub/{name}", b"content")
    assert (tmp_path / name / "sub" / name).read_bytes() == read_file(folder, f"sub/{name}") == b"content"
    place = join(join(folder, "sub"), name)
    assert read_bytes(place, 3, 2) == b"te" and file_size(place) == 7
    assert is_folder(folder) and not is_folder(place) and list_sizes(join(folder, "sub")) == {name: 7}
    assert read_file(folder, "none") is None and list_sizes(join(folder, "none")) == {}


@pytest.mark.parametrize("uri", [False, True])
def test_what_cannot_be_written_is_said_in_one_line(tmp_path: Path, uri: bool) -> None:
    (tmp_path / "file").write_text("mine")
    for folder, reason in ((f"{tmp_path}/file/below", "Not a directory"), ("/proc/nope", "No such file or directory")):
        place = f"file://{folder}" if uri else folder
        with pytest.raises(UserError) as refused:
            write_file(place, "a.txt", b"x")
        assert str(refused.value) == f"{place}/a.txt: cannot write: {reason}"


def test_a_disk_that_is_full_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"a\.txt: cannot write: File too large"):
            write_file(str(tmp_path), "a.txt", bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


SECRET = {
    "s3://u:p@b/c?region=x&token=t": "s3://***@b/c?region=x&token=***",
    "s3://KEY:sec/r:et@bucket/x": "s3://***@bucket/x",
    "abfs://box@account/x?account_key=a/b": "abfs://***@account/x?account_key=***",
}
OPEN = {
    "run: runs/demo # me@home": "run: runs/demo # me@home",
    "hdfs://host:9000/users/me@home": "hdfs://host:9000/users/me@home",
    "s3://bucket/a:b@c?region=x": "s3://bucket/a:b@c?region=x",
    "gs://anonymous@bucket/x": "gs://***@bucket/x",
}


@pytest.mark.parametrize(("text", "shown"), [*SECRET.items(), *OPEN.items()])
def test_redacted_leaves_the_rest(text: str, shown: str) -> None:
    assert redacted(text) == shown and has_credentials(text) == (text in SECRET)


@pytest.mark.parametrize(
    "uri", ["s3://reader:hunter2@bucket/x?frob=1", "s3://reader:hun/ter2@bucket/x", "ftp://a:hunter2@host/x"]
)
def test_a_uri_that_cannot_be_opened_is_named_without_its_password(uri: str) -> None:
    with pytest.raises(UserError, match=r"://\*\*\*@\w+/x.*: cannot open: ") as refused:
        open_folder(uri)
    assert "hunter2" not in str(refused.value) and "ter2" not in str(refused.value)
