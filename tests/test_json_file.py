"""JSON objects of files: whole, or one line that says what is wrong."""

import pytest

from lvm_ray.errors import UserError
from lvm_ray.json_file import read_object


def test_an_object_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"größe": 3}', encoding="utf-8")
    assert read_object(path, "make it again") == {"größe": 3}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not valid JSON: make it again"),
        (b"[" * 100_000, "not valid JSON: make it again"),
        (b"\xff", "not valid JSON: make it again"),
        (b"[1]", "holds a list instead of an object: make it again"),
        (b"null", "holds a NoneType instead of an object: make it again"),
    ],
)
def test_what_is_no_object_is_refused(tmp_path, content, said):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_object(path, "make it again")
    assert str(error.value) == f"{path}: {said}"


def test_a_file_that_is_not_there_has_its_own_remedy(tmp_path):
    for path, said in ((tmp_path / "none.json", "no such file: begin"), (tmp_path, "cannot read: Is a directory")):
        with pytest.raises(UserError) as error:
            read_object(path, "make it again", "begin")
        assert str(error.value) == f"{path}: {said}"
