"""Models of others become runs, and ours stock folders: the same logits, nothing lacking, nothing executed. And named sizes."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import lvm_ray.tokenizer
from lvm_ray import cli, config
from lvm_ray.errors import UserError
from lvm_ray.estimate import parameters
from lvm_ray.interchange import stock
from lvm_ray.interchange.models import import_model, is_model
from lvm_ray.model.folder import load_model, read_tokenizer
from lvm_ray.model.llama import CodebookEmbedding, shape_of
from lvm_ray.model.sizes import SIZES
from lvm_ray.recipe_sections import ModelSection, TokenizerSection
from lvm_ray.tokenizer import patch
from lvm_ray.train import job, launch, rehearsal, work

from .test_train import Silent
from .toys import CODES, SIZE, ToyTokenizer, load_toy_tokenizer, make_toy_shards, toy_recipe

ROOT = Path(__file__).resolve().parents[1]
WIDTH, LAYERS, HEADS, MLP, UNUSED = 32, 3, 4, 48, 100
SHAPE = {"width": WIDTH, "layers": LAYERS, "heads": HEADS, "mlp": MLP}


@pytest.fixture(autouse=True)
def toy_tokenizer(monkeypatch):
    monkeypatch.setattr(lvm_ray.tokenizer, "load_tokenizer", load_toy_tokenizer)


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "config.json").write_text('{"kind": "published"}')
    return str(tmp_path / "tokenizer")


def tokens():
    return torch.randint(0, CODES, (2, 24), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model(tokens(), use_cache=False).logits  # which a training's attention does not keep


def drawn(shapes, dtype=torch.float16):
    """Random weights by name; norms around 1, so that a forgotten one is seen."""
    generator = torch.Generator().manual_seed(7)
    made = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator) * 0.2
        made[name] = (values + ("norm" in name and len(shape) == 1)).to(dtype)
    return made


def import_toy(folder, tokenizer, out, **options):
    return import_model(str(folder), tokenizer, str(out), size=SIZE, load=load_toy_tokenizer, **options)


def refusal(folder, tokenizer, out, **options):
    with pytest.raises(UserError) as caught:
        import_toy(folder, tokenizer, out, **options)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    return str(caught.value)


# Hugging Face folders, by the names that DeLVM and LVM published


def published_weights(codes, biases):
    shapes = {"model.embed_tokens.weight": (codes, WIDTH), "model.norm.weight": (WIDTH,), "lm_head.weight": (codes, WIDTH)}
    for n in range(LAYERS):
        for part in "qkvo":
            shapes[f"model.layers.{n}.self_attn.{part}_proj.weight"] = (WIDTH, WIDTH)
            if biases:
                shapes[f"model.layers.{n}.self_attn.{part}_proj.bias"] = (WIDTH,)
        shapes[f"model.layers.{n}.mlp.gate_proj.weight"] = (MLP, WIDTH)
        shapes[f"model.layers.{n}.mlp.up_proj.weight"] = (MLP, WIDTH)
        shapes[f"model.layers.{n}.mlp.down_proj.weight"] = (WIDTH, MLP)
        shapes[f"model.layers.{n}.input_layernorm.weight"] = (WIDTH,)
        shapes[f"model.layers.{n}.post_attention_layernorm.weight"] = (WIDTH,)
    return drawn(shapes)


def published_config(codes, **changes):
    return {
        "vocab_size": codes,
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **changes,
    }


def write_delvm(folder, weights=None, form="bin", **changes):
    weights = dict(published_weights(CODES, biases=True) if weights is None else weights)
    for n in range(LAYERS):
        weights[f"model.layers.{n}.self_attn.rotary_emb.inv_freq"] = torch.ones(WIDTH // HEADS // 2)
    write_folder(folder, weights, form)
    extra = {"model_type": "internlm", "bias": True, "auto_map": {"AutoModel": "modeling_internlm.InternLMForCausalLM"}}
    (folder / "config.json").write_text(json.dumps(published_config(CODES, **extra) | changes))
    return folder


def write_lvm(folder, **changes):
    write_folder(folder, published_weights(CODES + UNUSED, biases=False), "bin shards")
    extra = {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2, "rope_scaling": None, "pretraining_tp": 1}
    (folder / "config.json").write_text(json.dumps(published_config(CODES + UNUSED, **extra) | changes))
    return folder


def write_folder(folder, weights, form):
    folder.mkdir()
    ending = "bin" if form.startswith("bin") else "safetensors"
    stem = "pytorch_model" if ending == "bin" else "model"
    if not form.endswith("shards"):
        parts = {f"{stem}.{ending}": weights}
    else:
        names = sorted(weights)
        parts = {f"{stem}-0000{k + 1}-of-00002.{ending}": {name: weights[name] for name in names[k::2]} for k in range(2)}
        places = {name: part for part, held in parts.items() for name in held}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for name, held in parts.items():
        torch.save(held, folder / name) if ending == "bin" else save_file(held, folder / name)


def plain(weights, codes, biases, epsilon=1e-6):
    """Plain transformers on the published weights, in fp32."""
    given = published_config(codes, rms_norm_eps=epsilon)
    model = LlamaForCausalLM(LlamaConfig(**given, attention_bias=biases, bos_token_id=None, eos_token_id=None))
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=True)
    return model.eval()


@pytest.mark.parametrize("form", ["bin", "bin shards", "safetensors", "safetensors shards"])
def test_delvms_released_folder_gives_the_same_logits(tmp_path, tokenizer, form):
    folder = write_delvm(tmp_path / "released", form=form)
    (remark,) = import_toy(folder, tokenizer, tmp_path / "run")
    assert "3 layers, 4 heads" in remark and "norm epsilon 1e-06" in remark and "with biases" in remark
    wanted = logits(plain(published_weights(CODES, True), CODES, biases=True))
    ours, described = load_model(tmp_path / "run" / "model", codebook=ToyTokenizer.hash)
    for model in (ours, LlamaForCausalLM.from_pretrained(tmp_path / "run" / "model")):
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)
        assert (model.config.rms_norm_eps, model.config.attention_bias, model.config.eos_token_id) == (1e-6, True, None)
    assert described == {
        **{"kind": "published", "hash": ToyTokenizer.hash, "codes": CODES, "patch": 8, "size": SIZE, "image_tokens": 4},
        "folder": "../../tokenizer",
    }


def test_the_norms_epsilon_can_be_that_of_the_training(tmp_path, tokenizer):
    import_toy(write_delvm(tmp_path / "released"), tokenizer, tmp_path / "run", norm_epsilon=1e-2)
    wanted = plain(published_weights(CODES, True), CODES, biases=True, epsilon=1e-2)
    torch.testing.assert_close(logits(load_model(tmp_path / "run" / "model")[0]), logits(wanted), rtol=0, atol=1e-5)
    assert "a small number above 0" in refusal(tmp_path / "released", tokenizer, tmp_path / "other", norm_epsilon=-1.0)


def test_lvms_folder_loses_its_unused_rows_and_keeps_its_logits(tmp_path, tokenizer):
    remarks = import_toy(write_lvm(tmp_path / "lvm"), tokenizer, tmp_path / "run")
    assert "of 164 rows of its vocabulary the last 100 are no codes" in remarks[0] and "without biases" in remarks[1]
    wanted = logits(plain(published_weights(CODES + UNUSED, False), CODES + UNUSED, biases=False))
    model = LlamaForCausalLM.from_pretrained(tmp_path / "run" / "model")
    torch.testing.assert_close(logits(model), wanted[:, :, :CODES], rtol=0, atol=1e-5)
    assert (model.config.vocab_size, model.config.attention_bias, model.config.eos_token_id) == (CODES, False, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral': models of internlm and llama"),
        ({"num_hidden_layers": "3"}, 'num_hidden_layers is "3"'),
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers is 1000000, more than the folder has weights"),
        ({"hidden_size": 2**40}, "expected a whole number from 1 to 1,048,576"),
        ({"num_attention_heads": 5}, "5 heads do not share out a width of 32"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu", only "silu" is known'),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            'rope_scaling is {"type": "linear", "factor": 2.0}, only null is known',
        ),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"vocab_size": 8192}, "a vocabulary of 8192, but --tokenizer"),
        ({"intermediate_size": 64}, "mlp.gate_proj.weight has shape [48, 32], expected [64, 32]"),
        ({"num_hidden_layers": 4}, "lacks the weight model.layers.3.input_layernorm.weight (13 such)"),
        ({"bias": False}, "has an unknown weight model.layers.0.self_attn.k_proj.bias (12 such)"),
    ],
)
def test_a_config_that_is_not_the_weights_is_refused(tmp_path, tokenizer, changes, message):
    assert message in refusal(write_delvm(tmp_path / "released", **changes), tokenizer, tmp_path / "run")


def test_a_weight_that_lacks_or_is_left_over_is_named(tmp_path, tokenizer):
    whole = published_weights(CODES, biases=True)
    name = "model.layers.1.mlp.up_proj.weight"
    lacking = write_delvm(tmp_path / "lacking", {key: value for key, value in whole.items() if key != name})
    assert f"lacks the weight {name} (1 such)" in refusal(lacking, tokenizer, tmp_path / "run")
    counted = write_delvm(tmp_path / "counted", whole | {"model.norm.weight": torch.ones(WIDTH, dtype=torch.int64)})
    assert "model.norm.weight holds numbers of torch.int64" in refusal(counted, tokenizer, tmp_path / "run")
    extra = write_delvm(tmp_path / "extra", whole | {"model.extra.inv_freq": torch.ones(1)})
    assert "has an unknown weight model.extra.inv_freq (1 such)" in refusal(extra, tokenizer, tmp_path / "run")


def test_files_that_are_missing_damaged_or_outside_are_refused(tmp_path, tokenizer):
    folder = write_delvm(tmp_path / "released", form="bin shards")
    index = folder / "pytorch_model.bin.index.json"
    places = json.loads(index.read_text())
    (folder / "pytorch_model-00002-of-00002.bin").write_bytes(b"PK\x03\x04")
    assert "00002.bin: refused" in refusal(folder, tokenizer, tmp_path / "run")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    assert "00002.bin: no such file" in refusal(folder, tokenizer, tmp_path / "run")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(places["weight_map"], "../../other.bin")}))
    assert "'../../other.bin', which is no name in its folder" in refusal(folder, tokenizer, tmp_path / "run")
    index.unlink()
    assert "holds none of model.safetensors, pytorch_model.bin" in refusal(folder, tokenizer, tmp_path / "run")
    (folder / "model.safetensors").write_bytes(b"\x08garbage")
    assert "not a whole safetensors file" in refusal(folder, tokenizer, tmp_path / "run")


def test_a_model_that_is_there_is_never_overwritten(tmp_path, tokenizer):
    folder = write_delvm(tmp_path / "released")
    import_toy(folder, tokenizer, tmp_path / "run")
    before = (tmp_path / "run/model/model.safetensors").read_bytes()
    with pytest.raises(UserError, match="there is a run already"):
        import_toy(folder, tokenizer, tmp_path / "run", norm_epsilon=1e-5)
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == before


class Evil:
    """What would create a file, were it unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


# DeLVM's own checkpoints


def native_weights(stages, dtype=torch.float16):
    """{file: weights} of LAYERS layers cut into stages of so many each."""
    files = {}
    for number, count in enumerate(stages):
        shapes = {}
        if number == 0:
            shapes["model.embedding.embed_proj.weight"] = (WIDTH, 3)
        for n in range(count):
            block = f"model.blocks.{n}."
            shapes |= {f"{block}mixer.Wqkv.weight": (3 * WIDTH, WIDTH), f"{block}mixer.Wqkv.bias": (3 * WIDTH,)}
            shapes |= {f"{block}mixer.out_proj.weight": (WIDTH, WIDTH), f"{block}mixer.out_proj.bias": (WIDTH,)}
            shapes |= {f"{block}mlp.w1.weight": (MLP, WIDTH), f"{block}mlp.w2.weight": (MLP, WIDTH)}
            shapes |= {f"{block}mlp.w3.weight": (WIDTH, MLP)}
            shapes |= {f"{block}norm1.weight": (WIDTH,), f"{block}norm2.weight": (WIDTH,)}
        if number == len(stages) - 1:
            shapes |= {"model.norm.weight": (WIDTH,), "model.head.weight": (CODES, WIDTH)}
        weights = {name: tensor + 0.01 * number for name, tensor in drawn(shapes, dtype).items()}
        if number == 0:
            weights["model.embedding.vq_model.encoder.conv_in.weight"] = torch.ones(2, 3, 3, 3, dtype=dtype)
            weights["model.embedding.vq_model.quantize.embedding.weight"] = ToyTokenizer().codebook.to(dtype)
            weights["model.embedding.vq_model.decoder.conv_out.bias"] = torch.ones(3, dtype=dtype)
        files[f"model_tp0_pp{number}.pt"] = weights
    return files


def write_native(folder, files):
    folder.mkdir()
    for name, weights in files.items():
        torch.save(weights, folder / name)
    return folder


def native_logits(files):
    """The published architecture, read plainly: fused queries, keys and values, rotary halves, SwiGLU of w1, w2, w3."""
    stages = [{name: tensor.float() for name, tensor in files[name].items()} for name in sorted(files)]
    first, last = stages[0], stages[-1]
    codebook = first["model.embedding.vq_model.quantize.embedding.weight"]
    x = F.linear(F.embedding(tokens(), codebook), first["model.embedding.embed_proj.weight"])
    length, half = x.shape[1], WIDTH // HEADS // 2
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angles.cos(), angles.sin()

    def norm(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight

    def turned(x):
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    for weights in stages:
        for n in range(sum(name.endswith("mlp.w1.weight") for name in weights)):
            get = {name.removeprefix(f"model.blocks.{n}."): tensor for name, tensor in weights.items()}
            joined = F.linear(norm(x, get["norm1.weight"]), get["mixer.Wqkv.weight"], get["mixer.Wqkv.bias"])
            q, k, v = joined.view(2, length, 3, HEADS, 2 * half).permute(2, 0, 3, 1, 4)
            scores = turned(q) @ turned(k).transpose(-1, -2) / (2 * half) ** 0.5
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
            mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + F.linear(mixed, get["mixer.out_proj.weight"], get["mixer.out_proj.bias"])
            inner = norm(x, get["norm2.weight"])
            gated = F.silu(F.linear(inner, get["mlp.w1.weight"])) * F.linear(inner, get["mlp.w2.weight"])
            x = x + F.linear(gated, get["mlp.w3.weight"])
    return F.linear(norm(x, last["model.norm.weight"]), last["model.head.weight"])


@pytest.mark.parametrize(("stages", "dtype"), [((3,), torch.float16), ((2, 1), torch.float32), ((1, 1, 1), torch.bfloat16)])
def test_delvms_own_checkpoint_gives_the_same_logits(tmp_path, tokenizer, stages, dtype):
    files = native_weights(stages, dtype)
    folder = write_native(tmp_path / "native", files)
    for name in ("model_config.pt", "context.pt", "optimizer_tp0_pp0_zo0.pt"):  # what stands beside it is not read
        torch.save(Evil(tmp_path / "executed"), folder / name)
    import_toy(folder, tokenizer, tmp_path / "run", heads=HEADS)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "run" / "model")
    torch.testing.assert_close(logits(model), native_logits(files), rtol=0, atol=1e-5)
    assert model.config.rms_norm_eps == 1e-5
    assert not (tmp_path / "executed").exists()


def test_heads_come_from_the_named_size_or_from_the_user(tmp_path, tokenizer, monkeypatch):
    folder = write_native(tmp_path / "native", native_weights((3,)))
    assert "say it with --heads" in refusal(folder, tokenizer, tmp_path / "run")
    assert "3 heads do not share out a width of 32" in refusal(folder, tokenizer, tmp_path / "run", heads=3)
    monkeypatch.setitem(SIZES, "toy", {"width": WIDTH, "layers": LAYERS, "heads": 8, "mlp": 1})
    import_toy(folder, tokenizer, tmp_path / "run")
    assert load_model(tmp_path / "run" / "model")[0].config.num_attention_heads == 8
    message = refusal(write_delvm(tmp_path / "released"), tokenizer, tmp_path / "other", heads=8)
    assert "--heads 8" in message and "says 4" in message


def test_another_codebook_than_the_tokenizers_is_refused(tmp_path, tokenizer):
    files = native_weights((3,))
    files["model_tp0_pp0.pt"]["model.embedding.vq_model.quantize.embedding.weight"][5, 1] += 0.01
    message = refusal(write_native(tmp_path / "native", files), tokenizer, tmp_path / "run", heads=HEADS)
    assert "is not that of --tokenizer" in message and tokenizer in message


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda files: files["model_tp0_pp1.pt"].pop("model.head.weight"), "pp1.pt: lacks the weight model.head.weight (1 such)"),
        (lambda files: files["model_tp0_pp0.pt"].pop("model.blocks.0.mlp.w2.weight"), "lacks the weight model.blocks.0.mlp.w2"),
        (
            lambda files: files["model_tp0_pp0.pt"].update({"model.head.weight": torch.ones(1)}),
            "pp0.pt: has an unknown weight model.head.weight",
        ),
        (
            lambda files: files["model_tp0_pp1.pt"].update({"model.norm.weight": torch.ones(5)}),
            "model.norm.weight has shape [5], expected [32]",
        ),
        (
            lambda files: files["model_tp0_pp0.pt"].pop("model.embedding.vq_model.quantize.embedding.weight"),
            "lacks the weight model.embedding.vq_model.quantize.embedding.weight",
        ),
        (lambda files: files.update({"model_tp0_pp3.pt": {}}), "lacks model_tp0_pp2.pt"),
        (lambda files: files.update({"model_tp1_pp0.pt": {}}), "model_tp1_pp0.pt: a model whose layers are cut over several"),
        (lambda files: files.update({"model_tp0_pp1.pt": [1]}), "pp1.pt: refused: not a dictionary of tensors"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_by_name(tmp_path, tokenizer, damage, message):
    files = native_weights((2, 1))
    damage(files)
    assert message in refusal(write_native(tmp_path / "native", files), tokenizer, tmp_path / "run", heads=HEADS)


def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path, tokenizer):
    mark = tmp_path / "executed"
    native = native_weights((3,))
    native["model_tp0_pp0.pt"]["model.norm.weight"] = Evil(mark)
    weights = published_weights(CODES, biases=True) | {"model.norm.weight": Evil(mark)}
    for folder in (write_native(tmp_path / "native", native), write_delvm(tmp_path / "released", weights)):
        assert "refused: it holds more than tensors" in refusal(folder, tokenizer, tmp_path / "run", heads=HEADS)
    assert not mark.exists()


# As teachers and as starting points


@pytest.fixture
def shards(tmp_path):
    make_toy_shards(tmp_path / "shards")
    return str(tmp_path / "shards")


def train(folder, shards, **changes):
    return launch.train(toy_recipe(folder, **({"shards": shards} | changes)), Silent())


def test_imported_models_teach_and_are_started_from(tmp_path, tokenizer, shards, monkeypatch):
    monkeypatch.setattr(rehearsal, "check_teacher_loss", lambda *arguments: None)  # random weights know nothing
    still = {"train": {"steps": 1, "rate": 1e-12, "log_every": 1, "checkpoint_every": 1}}
    import_toy(write_native(tmp_path / "native", native_weights((2, 1))), tokenizer, tmp_path / "delvm", heads=HEADS)
    import_toy(write_lvm(tmp_path / "lvm-folder"), tokenizer, tmp_path / "lvm")
    for name, init, section, near in (
        ("delvm", tmp_path / "delvm", {"norm_epsilon": 1e-5}, 5e-3),  # its codebook and its table are fp16's
        ("lvm", tmp_path / "lvm/model", {"norm_epsilon": 1e-6, "embedding": "table"}, 1e-5),
    ):
        model, distill = SHAPE | section, {"teacher": str(tmp_path / name)}
        run = train(tmp_path / f"from-{name}", shards, model=model | {"init": str(init)}, distill=distill, **still)
        line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        assert line["kd"] == pytest.approx(0, abs=1e-6), "it starts where its teacher is"
        imported, trained = (load_model(place / "model")[0] for place in (tmp_path / name, run))
        torch.testing.assert_close(logits(trained), logits(imported), rtol=0, atol=near)
        heirs = {"teacher": str(tmp_path / name), "layers": [0, 2]}
        train(tmp_path / f"heir-{name}", shards, model=model | {"layers": 2}, distill=heirs, **still)


def test_a_model_that_does_not_fit_is_no_start(tmp_path, tokenizer, shards):
    import_toy(write_lvm(tmp_path / "folder"), tokenizer, tmp_path / "lvm")
    start = SHAPE | {"init": str(tmp_path / "lvm"), "norm_epsilon": 1e-6, "embedding": "table"}
    for change, message in (
        ({"width": 48}, "has width 32, the recipe's model.width is 48: set it to 32"),
        ({"layers": 2}, "has layers 3"),
        ({"heads": 2}, "has heads 4"),
        ({"mlp": 64}, "has mlp 48"),
        ({"rope_base": 100.0}, "has rope_base 10000"),
        ({"norm_epsilon": 1e-5}, "has norm_epsilon 1e-06"),
        ({"embedding": "codebook"}, "its embedding is a free table"),
        ({"init": str(tmp_path / "none")}, "not a finished model"),
    ):
        with pytest.raises(UserError) as caught:
            train(tmp_path / "run", shards, model=start | change)
        assert message in str(caught.value)
    info = tmp_path / "lvm/model/image_tokenizer.json"
    info.write_text(json.dumps(read_tokenizer(info.parent) | {"hash": "another"}))
    with pytest.raises(UserError, match="trained on codebook another"):
        train(tmp_path / "run", shards, model=start)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"model\.init and distill\.layers both say"):
        toy_recipe(tmp_path / "run", model={"init": "x"}, distill={"layers": [0, 1]})


def test_a_run_on_its_way_needs_its_start_no_more(tmp_path, shards):
    start = train(tmp_path / "start", shards)
    model = {"init": str(start)}
    run = train(tmp_path / "run", shards, model=model)
    start.rename(tmp_path / "gone")
    assert train(tmp_path / "run", shards, model=model) == run
    with pytest.raises(UserError, match="not a finished model"):
        train(tmp_path / "other", shards, model=model)


# Ours, as stock folders


def test_the_projection_alone_is_trained_and_folds_into_the_same_logits(tmp_path, shards, monkeypatch):
    kept, make = [], job.fresh_model
    monkeypatch.setattr(work, "fresh_model", lambda job: kept.append(make(job)) or kept[-1])
    run = train(tmp_path / "run", shards, train={"steps": 8, "rate": 1e-2, "checkpoint_every": 4})
    monkeypatch.setattr(lvm_ray.tokenizer, "load_tokenizer", load_toy_tokenizer)
    trained, embedding = kept[0], kept[0].model.embed_tokens
    assert isinstance(embedding, CodebookEmbedding)
    assert torch.equal(embedding.codebook_VE, ToyTokenizer().codebook), "to the bit"
    names = set(load_file(run / "checkpoints/step-000008/model.safetensors"))
    assert {name for name in names if "embed" in name} == {"model.embed_tokens.embed_projection.weight"}
    first, last = (load_file(run / f"checkpoints/step-{step}/model.safetensors") for step in ("000004", "000008"))
    assert not torch.equal(*(weights["model.embed_tokens.embed_projection.weight"] for weights in (first, last)))

    found = stock.export_model(str(run), str(tmp_path / "newest"))
    assert found.name == "step-000008"
    assert stock.export_model(str(run), str(tmp_path / "earlier"), step=4).name == "step-000004"
    for folder in (tmp_path / "newest", run / "model"):
        exported = LlamaForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(logits(exported), logits(trained.eval()), rtol=0, atol=1e-5)
        described = read_tokenizer(folder)
        assert (folder / described["folder"]).resolve() == Path(job.tokenizer_folder(toy_recipe(run, shards=shards))).resolve()
    earlier = LlamaForCausalLM.from_pretrained(tmp_path / "earlier")
    trained.load_state_dict(first, strict=True)
    torch.testing.assert_close(logits(earlier), logits(trained), rtol=0, atol=1e-5)


def test_what_cannot_be_exported_is_refused(tmp_path, shards):
    run = train(tmp_path / "run", shards)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").write_text("kept")
    with pytest.raises(UserError, match="is there already: name a new folder"):
        stock.export_model(str(run), str(tmp_path / "full"))
    assert (tmp_path / "full/precious").read_text() == "kept"
    with pytest.raises(UserError, match="step-000005: no such checkpoint"):
        stock.export_model(str(run), str(tmp_path / "out"), step=5)
    with pytest.raises(UserError, match=r"no config\.yaml here"):
        stock.export_model(str(tmp_path), str(tmp_path / "out"))
    info = run / "model/image_tokenizer.json"
    info.write_text(json.dumps(read_tokenizer(run / "model") | {"hash": "another"}))
    with pytest.raises(UserError, match="was trained on another"):
        stock.export_model(str(run), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_import_train_and_export_by_command(tmp_path, capsys, monkeypatch):
    monkeypatch.undo()
    tokenizer = str(tmp_path / "tokenizer")
    pictures = np.random.default_rng(0).integers(0, 256, (64, SIZE, SIZE, 3), dtype=np.uint8)
    patch.save(patch.train(TokenizerSection(patch=8, codes=CODES, width=8, steps=0), pictures, 0, lambda *_: None), tokenizer)
    made = lvm_ray.tokenizer.load_tokenizer(tokenizer)
    make_toy_shards(tmp_path / "shards", {"derain": (8, 1)}, tokenizer=made.hash)
    folder = write_delvm(tmp_path / "released")
    options = ["--tokenizer", tokenizer, "--size", str(SIZE)]
    assert is_model(str(folder)) and is_model(str(folder / "pytorch_model.bin")) and not is_model(str(tmp_path / "train.bin"))
    assert cli.main(["import", str(folder / "pytorch_model.bin"), *options, "--out", str(tmp_path / "start")]) == 0
    (tmp_path / "pairs").mkdir()
    for name in ("a", "a_label"):
        Image.fromarray(pictures[0]).save(tmp_path / "pairs" / f"{name}.png")
    asked = ["predict", str(tmp_path / "start"), "--image", str(tmp_path / "pairs/a.png"), "--out", str(tmp_path / "answers")]
    assert cli.main([*asked, "--examples", str(tmp_path / "pairs")]) == 0
    assert Image.open(tmp_path / "answers/a-answer.png").size == (SIZE, SIZE)
    recipe = toy_recipe(tmp_path / "run", tasks={"derain": {}}, shards=str(tmp_path / "shards"))
    model = {"embedding": "table", "norm_epsilon": 1e-6, **SHAPE}
    recipe = recipe.model_copy(update={"model": ModelSection(**model)})
    (tmp_path / "recipe.yaml").write_text(config.dump(recipe))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/tokenizer").symlink_to(tokenizer)
    assert cli.main(["train", str(tmp_path / "recipe.yaml"), "--init", str(tmp_path / "start")]) == 0
    assert config.load(str(tmp_path / "run/config.yaml")).model.init == str(tmp_path / "start")
    assert cli.main(["export", str(tmp_path / "run"), "--format", "hf", "--out", str(tmp_path / "out"), "--step", "4"]) == 0
    assert "step-000004 of" in capsys.readouterr().out
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").config.rms_norm_eps == 1e-6
    for arguments, words in (
        ([str(folder), *options], "--out: missing: a model needs"),
        ([str(folder), "--out", "x"], "--tokenizer: missing"),
        ([str(folder), *options, "--out", "x", "--task", "derain"], "a model: --task is for files of tokens"),
        ([str(folder), str(folder), *options, "--out", "x"], "2 paths: models are imported one by one"),
        ([tokenizer, *options, "--out", str(tmp_path / "x")], "model_type is None"),
    ):
        assert cli.main(["import", *arguments]) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]


# Named sizes


def test_sizes_have_the_parameters_that_the_facts_count():
    codes, channels = 8192, 64
    for name, folded, trainable in (("300m", 299_504_640, 291_181_568), ("1b", 1_164_191_744, 1_147_545_600)):
        section = ModelSection(size=name)
        assert parameters(section, codes) + channels * section.width == trainable
        with torch.device("meta"):
            model = LlamaForCausalLM(shape_of(section, codes, 2048).config())
        assert sum(parameter.numel() for parameter in model.parameters()) == folded
    assert round(parameters(ModelSection(size="80m"), codes) / 1e6) == 91
    assert ModelSection(size="tiny").model_copy(update={"size": None}) == ModelSection()


def test_a_size_fills_in_what_is_not_given_and_stays_in_the_resolved_recipe(tmp_path):
    recipe = toy_recipe(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(config.dump(recipe).replace("model:\n  size: null\n", "model:\n  size: 80m\n"))
    assert config.load(str(path)).model.width == 32, "a number that is given stays"
    values = config.to_dict(recipe)
    values["model"] = {"size": "300m", "layers": 2}
    values["teacher"] = {"model": {"size": "1b", "mlp": 5504}, "train": {"micro_batch": 2}}
    sized = config.Recipe.model_validate(values)
    assert [getattr(sized.model, key) for key in ("width", "layers", "heads", "mlp")] == [1024, 2, 8, 2816]
    teacher = config.teacher_recipe(sized)
    assert [getattr(teacher.model, key) for key in ("width", "layers", "heads", "mlp")] == [2048, 22, 16, 5504]
    for each in (sized, teacher):
        path.write_text(config.dump(each))
        assert config.load(str(path)) == each
    assert "size: 300m" in config.dump(sized)
    named, spelt = ({**values, "model": model} for model in ({"size": "20m"}, SIZES["20m"]))
    assert len({config.fingerprint(config.Recipe.model_validate(each)) for each in (named, spelt)}) == 1


@pytest.mark.parametrize("key", ["model.size", "teacher.model.size"])
def test_an_unknown_size_is_refused_with_the_list(key):
    with pytest.raises(UserError, match=r"model\.size: no size is called '80M': there are tiny, 20m, 80m, 300m, 1b, 3b, 7b"):
        config.load(str(ROOT / "recipes/demo.yaml"), [f"{key}=80M"])


def test_a_teacher_does_not_start_from_what_its_student_starts_from(tmp_path):
    recipe = toy_recipe(tmp_path, model={"init": "mine"}, teacher={"model": {"layers": 3}}, distill={})
    assert config.teacher_recipe(recipe).model.init is None
    assert config.student_recipe(recipe).model.init == "mine"


@pytest.mark.parametrize(("name", "counts"), [("80m", [1147, 91]), ("300m", [1147, 291]), ("1b", [1147])])
def test_the_papers_recipes_estimate_their_cost(capsys, name, counts):
    # `tokenize` checks no run: whether this machine could train it is another question.
    assert cli.main(["tokenize", str(ROOT / f"recipes/{name}.yaml"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[1].replace(",", "")) // 10**6 for line in lines if " parameters, " in line] == counts
    assert all("262,144 tokens a step x 40,000 steps" in line for line in lines if "tokens a step" in line)
