"""Published tokenizers: open-muse's checkpoints give the same codes and pixels after conversion, and nothing of them is run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lvm_ray import pipeline, tokenizer
from lvm_ray.errors import UserError
from lvm_ray.tokenizer import load_tokenizer
from lvm_ray.tokenizer.vqmodel import VQTokenizer, save
from tests.toys import toy_recipe

CONFIG = {
    "_class_name": "VQGANModel",
    "resolution": 16,
    "num_channels": 3,
    "hidden_channels": 32,
    "channel_mult": [1, 2, 2],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "no_attn_mid_block": True,
    "z_channels": 8,
    "num_embeddings": 48,
    "quantized_embed_dim": 6,
    "dropout": 0.0,
    "resample_with_conv": True,
    "commitment_cost": 0.25,
}


# The published architecture in plain torch, by the names of its weights.


class Block(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, before, eps=1e-6), nn.GroupNorm(32, after, eps=1e-6)
        self.conv1, self.conv2 = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Halve(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Double(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def level(blocks: list[Block], **more: nn.Module) -> nn.Module:
    module = nn.Module()
    module.block = nn.ModuleList(blocks)
    for name, part in more.items():
        setattr(module, name, part)
    return module


class Half(nn.Module):
    """An encoder or a decoder: what both are made of."""

    def __init__(self, first: int, inner: int, last: int, out: int, middle: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(first, inner, 3, padding=1)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.block_2 = Block(middle, middle), Block(middle, middle)
        self.norm_out, self.conv_out = nn.GroupNorm(32, last, eps=1e-6), nn.Conv2d(last, out, 3, padding=1)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.mid.block_2(self.mid.block_1(x))

    def end(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_out(F.silu(self.norm_out(x)))


class Muse(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        widths = [config["hidden_channels"] * factor for factor in config["channel_mult"]]
        top, z, each = len(widths) - 1, config["z_channels"], config["num_res_blocks"]
        self.encoder = Half(3, widths[0], widths[-1], z, widths[-1])
        befores = [widths[0], *widths[:-1]]
        self.encoder.down = nn.ModuleList(
            level(
                [Block(befores[i] if j == 0 else widths[i], widths[i]) for j in range(each)],
                **({"downsample": Halve(widths[i])} if i < top else {}),
            )
            for i in range(top + 1)
        )
        self.decoder = Half(z, widths[-1], widths[0], 3, widths[-1])
        afters = [*widths[1:], widths[-1]]
        self.decoder.up = nn.ModuleList(
            level(
                [Block(afters[i] if j == 0 else widths[i], widths[i]) for j in range(each + 1)],
                **({"upsample": Double(widths[i])} if i else {}),
            )
            for i in range(top + 1)
        )
        self.quant_conv = nn.Conv2d(z, config["quantized_embed_dim"], 1)
        self.post_quant_conv = nn.Conv2d(config["quantized_embed_dim"], z, 1)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(config["num_embeddings"], config["quantized_embed_dim"])

    def latents(self, x: torch.Tensor) -> torch.Tensor:
        x = self.encoder.conv_in(x)
        for part in self.encoder.down:
            for block in part.block:
                x = block(x)
            x = part.downsample(x) if hasattr(part, "downsample") else x
        return self.quant_conv(self.encoder.end(self.encoder.middle(x)))

    def distances(self, x: torch.Tensor) -> torch.Tensor:
        """[B x N, V], squared."""
        points = self.latents(x).permute(0, 2, 3, 1).flatten(0, 2)
        codes = self.quantize.embedding.weight
        return points.pow(2).sum(1, keepdim=True) + codes.pow(2).sum(1) - 2 * points @ codes.T

    def pixels(self, tokens: torch.Tensor, side: int) -> torch.Tensor:
        x = self.quantize.embedding(tokens).reshape(len(tokens), side, side, -1).permute(0, 3, 1, 2)
        x = self.decoder.middle(self.decoder.conv_in(self.post_quant_conv(x)))
        for part in reversed(self.decoder.up):
            for block in part.block:
                x = block(x)
            x = part.upsample(x) if hasattr(part, "upsample") else x
        return self.decoder.end(x)


@pytest.fixture(scope="module")
def muse() -> Muse:
    torch.manual_seed(3)
    model = Muse(CONFIG).eval().requires_grad_(False)
    for name, value in model.named_parameters():
        if "norm" in name:  # at one and zero a norm's place would not matter
            value.add_(0.3 * torch.randn_like(value))
    # Codes among the latents, so that many of them are used, and pixels that reach over both ends of 0..1.
    points = model.latents(torch.rand(8, 3, 24, 24)).permute(0, 2, 3, 1).flatten(0, 2)
    model.quantize.embedding.weight.copy_(points[torch.randperm(len(points))[:48]] + 0.05 * points.std() * torch.randn(48, 6))
    model.decoder.conv_out.bias.add_(0.5)
    return model


@pytest.fixture
def folder(muse: Muse, tmp_path: Path) -> Path:
    place = tmp_path / "muse"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(CONFIG))
    torch.save(muse.state_dict(), place / "pytorch_model.bin")
    return place


def recipe_of(tmp_path: Path, source: Path | str, **changes: object):
    section = {"kind": "published", "source": str(source), "patch": 4, "codes": 48, **changes}
    return toy_recipe(tmp_path / "run", tokenizer=section)


def make(recipe) -> VQTokenizer:
    pipeline.train(recipe, "tokenizer")
    return load_tokenizer(recipe.tokenizer_folder)


def pictures(count: int = 6, side: int = 16) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


@pytest.mark.parametrize("side", [16, 24])
def test_a_converted_muse_checkpoint_gives_the_same_codes_and_pixels(muse: Muse, folder: Path, tmp_path: Path, side: int) -> None:
    ours = make(recipe_of(tmp_path, folder))
    shown = pictures(side=side)
    distances = muse.distances(torch.from_numpy(shown).permute(0, 3, 1, 2).float() / 255)
    best = distances.topk(2, dim=1, largest=False)
    decided = ((best.values[:, 1] - best.values[:, 0]) > 1e-4).reshape(len(shown), -1).numpy()
    tokens = ours.encode(shown)
    assert tokens.dtype == np.uint16 and tokens.shape == (len(shown), (side // 4) ** 2)
    assert decided.mean() > 0.95 and (tokens == best.indices[:, 0].reshape(len(shown), -1).numpy())[decided].all()
    assert len(np.unique(tokens)) > 16
    wanted = muse.pixels(torch.from_numpy(tokens.astype(np.int64)), side // 4)
    assert wanted.min() < 0 and wanted.max() > 1
    exact = (wanted.clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours.decode(tokens) - exact).max() < 0.501  # rounded, not cut off


def test_the_tokenizer_folder_stands_by_itself_and_holds_the_published_codebook(muse: Muse, folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, folder)
    before = make(recipe)
    for path in folder.iterdir():
        path.unlink()
    pipeline.train(recipe, "tokenizer")  # as before: the source is not looked at again
    ours = load_tokenizer(recipe.tokenizer_folder)
    config = json.loads(Path(recipe.tokenizer_folder, "config.json").read_text())
    assert config["kind"] == "published" and config["range"] == [0, 1] and config["hash"] == ours.hash == before.hash
    assert (ours.patch, ours.codes) == (config["patch"], config["codes"]) == (4, 48)
    assert torch.equal(ours.codebook, muse.quantize.embedding.weight) and ours.codebook.dtype == torch.float32
    files = {
        str(path.relative_to(recipe.tokenizer_folder)) for path in Path(recipe.tokenizer_folder).rglob("*") if path.is_file()
    }
    assert files == {"config.json", "network/config.json", "network/diffusion_pytorch_model.safetensors"}


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_would_run_code_is_refused_and_runs_nothing(folder: Path, tmp_path: Path, zipped: bool) -> None:
    mark = tmp_path / "ran"
    torch.save({"encoder.conv_in.weight": Evil(mark)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: refused: it holds more than tensors") as refused:
        make(recipe_of(tmp_path, folder))
    assert "\n" not in str(refused.value) and not mark.exists()
    assert not (tmp_path / "run" / "tokenizer" / "config.json").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # the checkpoint does run code where it is let
    assert mark.exists()


def changed(**changes: object):
    def change(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))

    return change


def reweighted(change):
    def write(folder: Path) -> None:
        weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
        change(weights)
        torch.save(weights, folder / "pytorch_model.bin")

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (reweighted(lambda w: w.pop("decoder.up.1.upsample.conv.bias")), "up_blocks.1.upsamplers.0.conv.bias is missing from"),
        (reweighted(lambda w: w.update({"loss.weight": torch.ones(1)})), "loss.weight is left over in"),
        (reweighted(lambda w: w.update({"quant_conv.bias": torch.ones(7)})), r"quant_conv.bias has shape \[7\]"),
        (changed(num_embeddings=64), r"embedding.weight has shape \[48, 6\], its config.json asks for \[64, 6\]"),
        (changed(attn_resolutions=[4]), "only networks without can be read"),
        (changed(_class_name="UNet2DModel"), "names no VQModel or VQGANModel"),
        (changed(num_embeddings="many"), "describes no VQModel"),
        (changed(channel_mult=2), "channel_mult is 2, expected a list of whole numbers"),
        (lambda folder: (folder / "config.json").write_text('{"_class_name": "VQGANModel"}'), "hidden_channels is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "pytorch_model.bin").unlink(), "no such file"),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut off"), "pytorch_model.bin: refused"),
        (lambda folder: torch.save([1, 2], folder / "pytorch_model.bin"), "not a dictionary of tensors"),
    ],
)
def test_a_damaged_source_is_refused_in_one_line_that_names_it(folder: Path, tmp_path: Path, damage, message: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message) as refused:
        make(recipe_of(tmp_path, folder))
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(("field", "value"), [("patch", 8), ("codes", 64)])
def test_another_patch_or_number_of_codes_than_the_recipes_is_refused(
    folder: Path, tmp_path: Path, field: str, value: int
) -> None:
    with pytest.raises(UserError, match=rf"its {field} is \d+, the recipe's tokenizer.{field} is {value}"):
        make(recipe_of(tmp_path, folder, **{field: value}))


def test_diffusers_folders_are_read_also_below_vqvae_and_keep_their_range(muse: Muse, folder: Path, tmp_path: Path) -> None:
    first = make(recipe_of(tmp_path, folder))
    whole = tmp_path / "amused"
    first.network.save_pretrained(whole / "vqvae", safe_serialization=True)
    (whole / "model_index.json").write_text("{}")
    amused = make(recipe_of(tmp_path / "amused-run", whole))
    assert amused.hash == first.hash and (amused.encode(pictures()) == first.encode(pictures())).all()
    signed = make(recipe_of(tmp_path / "signed-run", whole / "vqvae", range=[-1, 1]))
    assert signed.span == (-1, 1) and signed.hash != first.hash
    old = json.loads((whole / "vqvae" / "config.json").read_text())
    (whole / "vqvae" / "config.json").write_text(json.dumps({**old, "lookup_from_codebook": False}))
    assert make(recipe_of(tmp_path / "old-run", whole)).span == (-1, 1)
    (whole / "vqvae" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x10")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        make(recipe_of(tmp_path / "cut-run", whole))


def test_a_source_that_is_nowhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such folder, and no name of a hub"):
        make(recipe_of(tmp_path, tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="nobody/nothing: no such folder, and the hub cannot give it") as refused:
        make(recipe_of(tmp_path, "nobody/nothing"))
    assert "\n" not in str(refused.value)


def test_the_hash_sees_the_encoder_and_the_codes_but_not_the_decoder(muse: Muse, folder: Path, tmp_path: Path) -> None:
    hashes = {"": make(recipe_of(tmp_path, folder)).hash}
    for name in ("encoder.conv_in.bias", "quantize.embedding.weight", "decoder.conv_in.bias"):
        reweighted(lambda weights, name=name: weights[name].add_(0.01))(folder)
        hashes[name] = make(recipe_of(tmp_path / name, folder)).hash
    start, encoder, codes, decoder = hashes.values()
    assert len({start, encoder, codes}) == 3 and decoder == codes


def test_a_folder_whose_weights_were_exchanged_is_refused(muse: Muse, folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, folder)
    ours = make(recipe)
    ours.network.encoder.conv_in.bias.add_(0.01)
    ours.network.save_pretrained(Path(recipe.tokenizer_folder) / "network", safe_serialization=True)
    with pytest.raises(UserError, match=r"its network has hash [0-9a-f]{16}, config.json says"):
        load_tokenizer(recipe.tokenizer_folder)
    save(VQTokenizer(ours.network, ours.span), recipe.tokenizer_folder, "published", {"source": "elsewhere"})
    with pytest.raises(UserError, match="its source is elsewhere"):
        tokenizer.is_trained(recipe)
