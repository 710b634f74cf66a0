"""Tokenizers of our own: they learn, use their codes, are the same whoever trains them, and live in their folders."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvm_ray import cli, config, pipeline, tokenizer
from lvm_ray.errors import UserError
from lvm_ray.recipe_sections import TokenizerSection
from lvm_ray.threads import torch_threads
from lvm_ray.tokenizer import finite, launch, load_tokenizer, patch, training
from lvm_ray.tokenizer.vqmodel import VQTokenizer
from tests.toys import SIZE, toy_recipe

SMALL = {"patch": 8, "width": 16, "steps": 60, "batch": 16, "rate": 1e-2}
KINDS = {
    "patch": {"codes": 16, "steps": 20},
    "vq": {**SMALL, "codes": 16},
    "fsq": {**SMALL, "codes": 36, "levels": [4, 3, 3]},
}


def squares(count: int = 64, side: int = SIZE) -> np.ndarray:
    """Pictures of squares in five colours."""
    colours = np.array([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    return colours[np.random.default_rng(0).integers(0, 5, (count, side // 8, side // 8))].repeat(8, axis=1).repeat(8, axis=2)


def section_of(kind: str, **changes) -> TokenizerSection:
    return TokenizerSection.model_validate({"kind": kind, **KINDS[kind], **changes})


def learnt(kind: str, **changes) -> tuple[VQTokenizer, dict[str, float], list[str]]:
    notes: list[str] = []
    made, found = training.train(section_of(kind, **changes), squares(), 0, "fp32", lambda done, note: notes.append(note))
    return made, found, notes


def error(made, pictures: np.ndarray) -> float:
    return float(((made.decode(made.encode(pictures)).astype(float) - pictures) ** 2).mean())


# Finite scalars


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [2, 3, 4], [7]])
def test_every_code_of_a_grid_is_one_point_and_comes_back(levels: list[int]) -> None:
    points = finite.grid(levels)
    assert points.shape == (np.prod(levels), len(levels)) and points.abs().max() <= 1
    assert len(torch.unique(points, dim=0)) == len(points)
    for shift in (-0.4, 0.0, 0.4):
        steps = (points + 1) / 2 * (torch.tensor(levels) - 1) + shift
        assert torch.equal(finite.codes_of(steps, levels), torch.arange(len(points)))
        assert torch.allclose(finite.points_of(steps, levels), points, atol=1e-6)


@pytest.mark.parametrize("levels", [[8, 5], [2, 3, 4]])
def test_latents_of_any_size_fall_on_the_grid_and_reach_every_level(levels: list[int]) -> None:
    latents = torch.linspace(-9, 9, 4001)[:, None].repeat(1, len(levels)).requires_grad_()
    steps = finite.bound(latents, levels)
    points = finite.points_of(steps, levels)
    for channel, level in enumerate(levels):
        assert len(torch.unique(points[:, channel])) == level
    codes = finite.codes_of(steps, levels)
    assert torch.allclose(finite.grid(levels)[codes], points, atol=1e-6)
    points.sum().backward()
    assert latents.grad[2000].min() > 0.9  # rounding lets gradients through


# The codebook


def test_k_means_finds_clusters_and_dead_codes_start_again() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = centres.repeat(40, 1) + 0.1 * torch.randn(120, 2, generator=generator)
    codebook = training.Codebook(torch.zeros(3, 2), generator)
    codebook.start(points)
    assert torch.cdist(centres, codebook.vectors_VD).min(dim=1).values.max() < 10
    codebook.vectors_VD.copy_(torch.tensor([[0.0, 0.0], [10.0, 0.0], [500.0, 500.0]]))
    codebook.counts_V, codebook.sums_VD = torch.ones(3), codebook.vectors_VD.clone()
    for _ in range(400):
        owner = torch.cdist(points, codebook.vectors_VD).argmin(dim=1)
        codebook.follow(points, owner)
    assert codebook.revived > 0
    assert torch.cdist(centres, codebook.vectors_VD).min(dim=1).values.max() < 1


def test_use_counts_codes_and_their_perplexity() -> None:
    use = training.Use.of(torch.tensor([5.0, 5.0, 5.0, 5.0, 0.0, 0.0, 0.0, 0.0]))
    assert use.part == 0.5 and use.perplexity == pytest.approx(4)


# Training


@pytest.mark.parametrize("kind", ["vq", "fsq"])
def test_a_tokenizer_learns_uses_its_codes_and_says_so(kind: str) -> None:
    made, found, notes = learnt(kind)
    decibels = [float(note.split(" dB")[0]) for note in notes]
    assert len(notes) == 60 and np.mean(decibels[-5:]) > np.mean(decibels[:5]) + 3
    assert "of the codes used, perplexity" in notes[-1]
    assert found["use"] > 0.5 and 1 < found["perplexity"] <= made.codes
    pictures = squares(80)[64:]
    mean = squares().mean(axis=0)
    assert error(made, pictures) < 0.9 * ((pictures - mean) ** 2).mean()


@pytest.mark.parametrize("kind", ["vq", "fsq"])
def test_tokens_are_deterministic_of_any_size_and_in_raster_order(kind: str) -> None:
    made, _, _ = learnt(kind, steps=8)
    for side in (16, 40):
        pictures = squares(3, side)
        tokens = made.encode(pictures)
        assert tokens.dtype == np.uint16 and tokens.shape == (3, (side // 8) ** 2) and tokens.max() < made.codes
        assert (made.encode(pictures) == tokens).all()
        decoded = made.decode(tokens)
        assert decoded.dtype == np.uint8 and decoded.shape == pictures.shape
    # Another code at the top right changes the picture most in that quarter.
    tokens = np.repeat(made.encode(squares(1, 64)), made.codes, axis=0)
    tokens[:, 7] = np.arange(made.codes)
    spread = made.decode(tokens).astype(float).std(axis=0).sum(axis=2).reshape(2, 32, 2, 32).sum(axis=(1, 3))
    assert spread.argmax() == 1 and spread[0, 1] > 2 * spread[1].max()


def test_an_adversary_changes_what_is_learnt_and_is_off_by_default() -> None:
    plain, fooled = learnt("fsq", steps=20)[0], learnt("fsq", steps=20, adversarial=0.1)[0]
    assert plain.hash == learnt("fsq", steps=20)[0].hash != fooled.hash


def test_more_codes_than_squares_are_refused() -> None:
    with pytest.raises(UserError, match=r"tokenizer\.codes: 300 codes from 256 squares"):
        learnt("vq", codes=300)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_trains_it_once_and_its_folder_is_the_tokenizer(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = toy_recipe(tmp_path / "run", tokenizer={**KINDS[kind], "kind": kind, "pictures": 64, "steps": 6})
    assert pipeline.train(recipe, "tokenizer") == [recipe.tokenizer_folder]
    capsys.readouterr()
    pipeline.train(recipe, "tokenizer")
    assert "as before" in capsys.readouterr().out
    made = load_tokenizer(recipe.tokenizer_folder)
    content = json.loads((tmp_path / "run" / "tokenizer" / "config.json").read_text())
    assert content["kind"] == kind and content["hash"] == made.hash
    assert (content["codes"], content["patch"]) == (made.codes, made.patch) == (recipe.tokenizer.codes, 8)
    assert made.codebook.shape[0] == made.codes and made.codebook.dtype == torch.float32
    assert (made.encode(squares(2)) == load_tokenizer(recipe.tokenizer_folder).encode(squares(2))).all()
    if kind != "patch":
        assert {"use", "perplexity"} <= content.keys()
        from diffusers import VQModel

        stock = VQModel.from_pretrained(tmp_path / "run" / "tokenizer" / "network")
        assert torch.equal(stock.quantize.embedding.weight, made.codebook)
    other = "fsq" if kind != "fsq" else "vq"
    with pytest.raises(UserError, match=f"its kind is {kind}"):
        tokenizer.is_trained(toy_recipe(tmp_path / "run", tokenizer={**KINDS[other], "kind": other}))


@pytest.mark.parametrize("steps", [1, 2, 10, 11])
def test_a_patch_tokenizer_learns_in_as_few_steps_as_one_likes(steps: int) -> None:
    made = patch.train(TokenizerSection(patch=8, codes=16, width=16, steps=steps), squares(), 0, lambda done, note: None)
    assert all(values.isfinite().all() for values in made.state_dict().values())


@pytest.mark.parametrize("left", [1, 2])  # threads that something before has left to the process
def test_a_patch_tokenizer_is_made_with_the_recipes_threads(left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, with_threads = patch.train, []

    def train(*arguments: Any) -> patch.PatchTokenizer:
        with_threads.append(torch.get_num_threads())
        return made(*arguments)

    monkeypatch.setattr(patch, "train", train)
    compute = {"workers": 0, "threads": 1}
    recipe = toy_recipe(tmp_path, tokenizer={"kind": "patch", "pictures": 64, "steps": 2, **KINDS["patch"]}, compute=compute)
    with torch_threads(left):
        pipeline.train(recipe, "tokenizer")
        assert torch.get_num_threads() == left
    assert with_threads == [1]


def test_the_hash_of_a_patch_tokenizer_is_that_of_its_codebooks_bytes() -> None:
    made = patch.PatchTokenizer(8, 16, 4, 8)
    made.codebook.copy_(torch.arange(64.0).reshape(16, 4))
    assert made.hash == "21b9ca0f94efa26b"


def test_two_grids_of_equal_levels_are_told_apart_by_their_encoders() -> None:
    first, second = learnt("fsq", steps=2)[0], learnt("fsq", steps=3)[0]
    assert torch.equal(first.codebook, second.codebook) and first.hash != second.hash


def test_a_worker_of_ray_trains_the_same_tokenizer(tmp_path: Path, ray_session: None) -> None:
    pictures, made, told = squares(), {}, []
    for workers in (0, 1):
        recipe = toy_recipe(
            tmp_path / str(workers), tokenizer={**KINDS["vq"], "kind": "vq", "steps": 12}, compute={"workers": workers}
        )
        launch.train(recipe, pictures, lambda done, note: told.append((done, note)))
        made[workers] = load_tokenizer(recipe.tokenizer_folder)
        assert not (tmp_path / str(workers) / launch.SCRATCH).exists()
    assert made[0].hash == made[1].hash and told[-1] == told[11]  # the last step's note comes back from the worker
    tokens = made[0].encode(pictures)
    assert (made[0].decode(tokens) == made[1].decode(tokens)).all()


def test_a_batch_that_workers_cannot_share_is_refused_before_ray_starts(tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, tokenizer={**KINDS["vq"], "kind": "vq", "batch": 7}, compute={"workers": 2})
    with pytest.raises(UserError, match=r"tokenizer\.batch: 7 is not a multiple of compute\.workers 2"):
        launch.train(recipe, squares(), lambda done, note: None)


# The recipe


def test_defaults_follow_the_kind_and_codes_follow_the_levels() -> None:
    assert TokenizerSection().model_dump().items() >= {"patch": 8, "codes": 1024, "steps": 400, "rate": 3e-3}.items()
    published = TokenizerSection(kind="published", source="somewhere")
    assert (published.patch, published.codes) == (16, 8192)
    assert TokenizerSection(kind="fsq").codes == 1000
    grid = TokenizerSection(kind="fsq", levels=[4, 4, 4])
    assert grid.codes == 64 and TokenizerSection.model_validate(json.loads(grid.model_dump_json())) == grid


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "vqq"}, "tokenizer.kind: found 'vqq'"),
        ({"kind": ["vq"]}, "tokenizer.kind: found"),
        ({"kind": "published"}, "tokenizer.source: missing"),
        ({"kind": "vq", "source": "x"}, "tokenizer.source is for the kind published, this is vq"),
        ({"kind": "vq", "levels": [8, 8]}, "tokenizer.levels is for the kind fsq"),
        ({"adversarial": 0.1}, "tokenizer.adversarial is for the kind vq or fsq"),
        ({"kind": "vq", "patch": 6}, "tokenizer.patch 6 is not a power of two"),
        ({"kind": "fsq", "levels": [16, 1]}, "tokenizer.levels [16, 1]: name at least one channel"),
        ({"kind": "fsq", "levels": [8, 8], "codes": 1024}, "tokenizer.codes is 1024, levels [8, 8] make 64"),
        ({"kind": "fsq", "levels": [64, 64, 64]}, "tokenizer.codes: found 262144"),
        ({"kind": "published", "source": "x", "range": [1, 0]}, "tokenizer.range [1.0, 0.0]"),
    ],
)
def test_impossible_sections_are_refused_by_key(values: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"size": 48, "tasks": {"invert": {}}, "tokenizer": values}))
    with pytest.raises(UserError) as refused:
        config.load(str(path))
    assert message in str(refused.value)


# The command line


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    recipe = toy_recipe(
        tmp_path / "run", tokenizer={"kind": "fsq", **KINDS["fsq"], "steps": 2, "pictures": 64}, train={"steps": 4}
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(config.dump(recipe))
    return path


def test_only_trains_one_part(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, teacher = tmp_path / "run", ["--set", "teacher={train: {steps: 4}}"]
    assert cli.main(["train", str(recipe_file), "--only", "tokenizer"]) == 0
    assert sorted(path.name for path in run.iterdir()) == ["tokenizer"]
    assert cli.main(["tokenize", str(recipe_file)]) == 0
    for part in ("teacher", "student"):
        assert cli.main(["train", str(recipe_file), "--only", part]) == 2
        assert f"--only {part}: this recipe has no teacher section" in capsys.readouterr().err
    assert cli.main(["train", str(recipe_file), "--only", "teacher", *teacher]) == 0
    assert (run / "teacher" / "model").is_dir() and not (run / "student").exists()
    found = json.loads((run / "teacher" / "model" / "image_tokenizer.json").read_text())
    assert found["kind"] == "fsq" and found["codes"] == 36
    assert found["hash"] == load_tokenizer(str(run / "tokenizer")).hash
    assert cli.main(["train", str(recipe_file), "--only", "student", *teacher]) == 0
    assert (run / "student" / "model").is_dir()


# Of another run


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_of_another_run_is_taken_over_as_it_is(tmp_path: Path, kind: str) -> None:
    first = toy_recipe(tmp_path / "first", tokenizer={"kind": kind, "pictures": 64, **KINDS[kind]})
    pipeline.train(first, "tokenizer")
    codes = first.tokenizer.codes
    section = {"kind": "published", "source": first.tokenizer_folder, "patch": 8, "codes": codes}
    second = toy_recipe(tmp_path / "second", tokenizer=section)
    pipeline.train(second, "tokenizer")
    assert tokenizer.is_trained(second)
    made, taken = load_tokenizer(first.tokenizer_folder), load_tokenizer(second.tokenizer_folder)
    assert made.hash == taken.hash and np.array_equal(made.encode(squares()), taken.encode(squares()))
    other = toy_recipe(tmp_path / "third", tokenizer={**section, "codes": codes * 2})
    with pytest.raises(UserError, match=f"its codes is {codes}, the recipe's tokenizer.codes is {codes * 2}: set it to {codes}"):
        pipeline.train(other, "tokenizer")
    if kind != "patch":
        inner = toy_recipe(tmp_path / "fourth", tokenizer={**section, "source": f"{first.tokenizer_folder}/network"})
        with pytest.raises(UserError, match=r"its network takes 48 channels, not a picture's 3: .* name the folder above"):
            pipeline.train(inner, "tokenizer")
