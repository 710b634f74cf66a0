"""Features of a frozen vision network: their comparison as mathematics, reading networks, and a training with one."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from lvm_ray import tokenizer
from lvm_ray.errors import UserError
from lvm_ray.model.llama import build
from lvm_ray.progress import Bar
from lvm_ray.recipe_sections import FeaturesSection, ModelSection
from lvm_ray.train import job, launch
from lvm_ray.train.features import Features, VisionNetwork, alignment, load_network
from lvm_ray.train.losses import TrainingModule

from .toys import ToyTokenizer, journal, load_toy_tokenizer, toy_recipe

SILENT = Bar("train", None, "steps")

SMALL = {
    "convnext": transformers.ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2),
    "dinov2": transformers.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=14, image_size=28),
    "resnet": transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"),
    "vit": transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, patch_size=16, image_size=32
    ),
}


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    for kind, config in SMALL.items():
        torch.manual_seed(0)
        transformers.AutoModel.from_config(config).save_pretrained(folder / kind)
    return folder


@pytest.fixture(autouse=True)
def toy_tokenizer(monkeypatch):
    monkeypatch.setattr(tokenizer, "load_tokenizer", load_toy_tokenizer)


def test_alignment_is_one_for_turned_and_scaled_states_and_less_for_others():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 9, 5, generator=generator, dtype=torch.float64)
    turned, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))
    assert torch.allclose(alignment(states, 7 * states @ turned + 2), torch.ones(3, dtype=torch.float64))
    others = torch.randn(3, 9, 4, generator=generator, dtype=torch.float64)
    found = alignment(states, others)
    assert ((found > 0) & (found < 0.95)).all()
    for picture in range(3):  # against the definition: centred kernels, one element at a time
        centring = torch.eye(9, dtype=torch.float64) - 1 / 9
        first, second = (centring @ x[picture] @ x[picture].T @ centring for x in (states, others))
        wanted = torch.trace(first @ second) / (torch.linalg.norm(first) * torch.linalg.norm(second))
        assert found[picture] == pytest.approx(wanted.item(), abs=1e-12)


def test_alignment_has_an_exact_gradient_and_is_nothing_where_a_picture_is_flat():
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    others = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: alignment(x, others), states)
    flat = alignment(states.float(), torch.ones(2, 6, 4))
    flat.sum().backward()
    assert flat.tolist() == [0, 0] and states.grad.isfinite().all()


@pytest.mark.parametrize("kind", SMALL)
def test_a_network_gives_each_token_of_a_picture_its_features(networks, kind):
    section = FeaturesSection(network=kind, weights=str(networks / kind))
    toy = ToyTokenizer()
    network = VisionNetwork(section, toy, torch.float32, torch.device("cpu"))
    tokens = torch.randint(toy.codes, (3, 4), generator=torch.Generator().manual_seed(0))
    found = network(tokens)
    assert found.shape[:2] == (3, 4) and found.shape[2] in (12, 16)
    assert torch.allclose(network(tokens[1:2]), found[1:2], atol=1e-5) and not found.requires_grad


def test_the_term_is_about_images_alone_and_moves_only_the_layers_up_to_its_own():
    section = ModelSection(width=16, layers=2, heads=2, mlp=32)
    student = build(section, torch.randn(16, 4), 16, 4, 0)
    seen = []

    def see(tokens_PN):
        seen.append(tokens_PN)
        return nn.functional.one_hot(tokens_PN, 16).float()

    module = TrainingModule(student, 16, 4, 0.5, features=Features(see, 2.0, 0))
    tokens = torch.randint(16, (3, 16), generator=torch.Generator().manual_seed(0))
    outcome = module(tokens)
    assert 0 < outcome.features < 1 and outcome.loss.item() == pytest.approx((outcome.ce + 2 * outcome.features).item())
    assert torch.equal(seen[0], torch.stack([tokens[row, start : start + 4] for row in range(3) for start in (0, 8)]))
    (gradient,) = torch.autograd.grad(outcome.features, student.model.layers[0].mlp.down_proj.weight, retain_graph=True)
    later = torch.autograd.grad(outcome.features, student.model.layers[1].mlp.down_proj.weight, allow_unused=True)
    assert gradient.abs().sum() > 0 and later == (None,)
    assert module.eval()(tokens).features == 0 and len(seen) == 1


@pytest.mark.parametrize("zero", [1, 3])
def test_a_student_arranges_its_states_as_the_network_does(tmp_path, shards, networks, zero):
    teacher = toy_recipe(tmp_path / "teacher", shards=shards)
    launch.train(teacher, SILENT)
    reached = []
    for weight in (1e-6, 20.0):
        features = {"network": "resnet", "weights": str(networks / "resnet"), "weight": weight}
        student = toy_recipe(
            tmp_path / f"student-{weight}",
            shards=shards,
            distill={"teacher": teacher.run, "features": features},
            train={"zero": zero, "rate": 1e-2, "steps": 24},
        )
        launch.train(student, SILENT)
        reached.append(journal(student.run)[-1]["features"])
    assert reached[1] < 0.9 * reached[0]
    weights = load_file(f"{student.run}/model/model.safetensors")
    assert weights.keys() == load_file(f"{teacher.run}/model/model.safetensors").keys()


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no network's configuration"),
        (lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": "bert"})), "is of a bert"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "safetensors alone"),
    ],
)
def test_a_folder_without_such_a_network_is_refused_before_anything_starts(tmp_path, shards, networks, spoil, found):
    folder = tmp_path / "network"
    folder.mkdir()
    for path in (networks / "vit").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    spoil(folder)
    teacher = toy_recipe(tmp_path / "teacher", shards=shards)
    launch.train(teacher, SILENT)
    features = {"network": "vit", "weights": str(folder)}
    student = toy_recipe(tmp_path / "student", shards=shards, distill={"teacher": teacher.run, "features": features})
    with pytest.raises(UserError, match=found):
        job.make_job(job.resolve(student))


def test_a_network_that_lacks_a_weight_is_refused_by_name(tmp_path, networks):
    folder = tmp_path / "network"
    folder.mkdir()
    (folder / "config.json").write_bytes((networks / "vit" / "config.json").read_bytes())
    weights = load_file(networks / "vit" / "model.safetensors")
    lost = sorted(name for name in weights if "pooler" not in name)[0]
    save_file({name: value for name, value in weights.items() if name != lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks weight"):
        load_network(FeaturesSection(network="vit", weights=str(folder)))
