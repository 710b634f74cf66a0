"""The command line: quick, and bad input is one line and exit code 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lvm_ray import cli

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "lvm_ray", *arguments], capture_output=True, text=True, env=environment, check=False
    )


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a refused command prints."""
    assert cli.main(list(arguments)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def pairs_recipe(tmp_path: Path, images: int = 8, masks: int = 8) -> Path:
    """A segmentation recipe on small pictures, and the pictures."""
    for name, count, mode in (("images", images, "RGB"), ("masks", masks, "L")):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new(mode, (16, 16), i % 2 if mode == "L" else (i, 2 * i, 3 * i)).save(tmp_path / name / f"{i}.png")
    recipe = tmp_path / "recipe.yaml"
    source = f"{{images: {tmp_path}/images, masks: {tmp_path}/masks}}"
    recipe.write_text(
        f"run: {tmp_path}/run\nsize: 16\ntasks:\n  segmentation:\n    classes: [thing]\n    train: {source}\n    test: {source}\n"
        "tokenizer: {codes: 16, steps: 1, pictures: 64}\ncompute: {workers: 0, threads: 1}\n"
    )
    return recipe


def test_help_imports_neither_ray_nor_torch() -> None:
    code = (
        "import sys, lvm_ray.cli as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'ray', 'torch', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    for verb in cli.VERBS:
        assert verb in result.stdout


def test_an_unknown_verb_exits_2_and_names_the_known_ones() -> None:
    result = run("fly")
    assert result.returncode == 2
    assert "'fly'" in result.stderr and "train" in result.stderr


def test_bad_recipes_exit_2_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    demo = str(ROOT / "recipes" / "demo.yaml")
    assert "did you mean 'steps'" in refused(capsys, "train", demo, "--set", "train.stesp=3")
    assert "found 'many'" in refused(capsys, "train", demo, "--set", "train.steps=many")
    (tmp_path / "empty").mkdir()
    assert "without config.yaml" in refused(capsys, "evaluate", str(tmp_path / "empty"))
    assert "no manifest.json" in refused(capsys, "train", demo, "--run", str(tmp_path / "run"), "--set", "compute.workers=0")
    assert "cannot read the recipe" in refused(capsys, "train", str(tmp_path / "none.yaml"))


def test_bad_data_exits_2_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = pairs_recipe(tmp_path, images=2, masks=1)
    assert "2 images in" in refused(capsys, "tokenize", str(recipe))
    (tmp_path / "masks" / "0.png").unlink()
    assert "no images in" in refused(capsys, "tokenize", str(recipe))
    (tmp_path / "masks").rmdir()
    assert "no folder" in refused(capsys, "tokenize", str(recipe))


def test_a_truncated_jpeg_as_the_only_image_exits_2_and_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = pairs_recipe(tmp_path, images=0, masks=0)
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "images" / "photo.jpg")
    Image.new("L", (64, 64)).save(tmp_path / "masks" / "photo.png")
    whole = (tmp_path / "images" / "photo.jpg").read_bytes()
    (tmp_path / "images" / "photo.jpg").write_bytes(whole[: len(whole) // 2])
    line = refused(capsys, "tokenize", str(recipe))
    assert "photo.jpg" in line and "cannot be read" in line


def test_a_dry_run_prints_the_recipe_and_its_cost_and_does_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = pairs_recipe(tmp_path)
    assert cli.main(["train", str(recipe), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for words in ("parameters", "tokens a step", "GPU-hours", "GiB", "image_weight"):
        assert words in out
    assert not (tmp_path / "run").exists()


def test_a_damaged_image_among_good_ones_is_set_aside_with_its_reason(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = pairs_recipe(tmp_path, images=16, masks=16)
    (tmp_path / "images" / "5.png").write_bytes(b"not a picture")
    assert cli.main(["tokenize", str(recipe), "--set", "max_bad=0.1"]) == 0
    assert "set aside" in capsys.readouterr().out
    lines = (tmp_path / "run" / "data" / "shards" / "bad_items.jsonl").read_text().splitlines()
    assert [json.loads(line)["item"] for line in lines] == ["5", "5"]  # the same picture is a training and a test item here
    assert all("5.png" in line and "cannot be read as an image" in line for line in lines)
    manifest = json.loads((tmp_path / "run" / "data" / "shards" / "manifest.json").read_text())
    assert manifest["rows"]["train"]["segmentation"]["0"] == 15
    again = ["--run", str(tmp_path / "strict"), "--set", "max_bad=0.01"]
    line = refused(capsys, "tokenize", str(recipe), *again)
    assert "max_bad" in line and "5.png" in line


def test_a_run_of_another_codebook_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = pairs_recipe(tmp_path)
    small = ["--set", "train.steps=1", "--set", "train.batch=2", "--set", "train.micro_batch=2", "--set", "model.width=16"]
    assert cli.main(["tokenize", str(recipe)]) == 0
    assert cli.main(["train", str(recipe), *small]) == 0
    assert (
        cli.main(["predict", str(tmp_path / "run"), "--image", str(tmp_path / "images" / "1.png"), "--out", str(tmp_path)]) == 0
    )
    assert (tmp_path / "1-segmentation.png").is_file() and (tmp_path / "1-segmentation-mask.png").is_file()
    for path in (tmp_path / "run" / "tokenizer").iterdir():
        path.unlink()
    assert cli.main(["tokenize", str(recipe), "--set", "seed=1"]) == 0
    for command in (["evaluate", str(recipe), *small], ["train", str(recipe), *small, "--set", "train.steps=2"]):
        assert "codebook" in refused(capsys, *command)
