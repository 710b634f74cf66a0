"""The README's file tree is true: every module stands in it, and everything in it exists."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def tree() -> set[str]:
    """The paths of the README's tree."""
    block = (ROOT / "README.md").read_text().split("<!-- tree -->")[1].split("```")[1]
    folders: list[str] = []
    paths = set()
    for line in block.strip("\n").splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        paths.add("".join([*folders[:depth], name]))
        if name.endswith("/"):
            folders = [*folders[:depth], name]
    return paths


def test_the_tree_names_every_module_and_nothing_else() -> None:
    named = {path for path in tree() if path.endswith(".py")}
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "lvm_ray").rglob("*.py")}
    assert named == {path for path in there if not path.endswith(("__init__.py", "__main__.py"))}


def test_every_folder_of_the_tree_exists() -> None:
    assert all((ROOT / path).exists() for path in tree())


def test_every_line_of_the_tree_says_what_it_is_for() -> None:
    block = (ROOT / "README.md").read_text().split("<!-- tree -->")[1].split("```")[1]
    assert all(len(line.split()) > 1 or line.strip() == "lvm_ray/" for line in block.strip("\n").splitlines())
