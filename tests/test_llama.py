"""The model: its start, its embedding, its aligned heads, and its way through a folder."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from lvm_ray.errors import UserError
from lvm_ray.estimate import PASSED_AT_ONCE
from lvm_ray.model import attention
from lvm_ray.model.attention import rotate, use_own_attention
from lvm_ray.model.export import export
from lvm_ray.model.folder import load_model, read_model, read_tokenizer
from lvm_ray.model.generate import Decoder
from lvm_ray.model.llama import aligned_offsets, build, inherit, projection_of
from lvm_ray.model.norm import RMSNorm, _RMSNorm, use_norm_in_cache
from lvm_ray.model.shape import of_config
from lvm_ray.recipe_sections import ModelSection

CODES, TOKENS, IMAGE_TOKENS = 64, 128, 16
TOKENIZER = {
    "kind": "patch",
    "hash": "0123456789abcdef",
    "codes": CODES,
    "patch": 8,
    "size": 32,
    "image_tokens": IMAGE_TOKENS,
    "folder": "../../tokenizer",
}


def codebook(scale=1.0):
    return scale * torch.randn(CODES, 12, generator=torch.Generator().manual_seed(5))


def model(seed=0, scale=1.0, **changes):
    section = ModelSection(**{"width": 32, "layers": 2, "heads": 4, "mlp": 48} | changes)
    return build(section, codebook(scale), TOKENS, IMAGE_TOKENS, seed)


def tokens(batch=2):
    return torch.randint(0, CODES, (batch, TOKENS), generator=torch.Generator().manual_seed(1))


def test_the_same_seed_gives_the_same_model_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    first, second, other = model(0), model(0), model(1)
    assert torch.equal(torch.get_rng_state(), before)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("embedding", ["codebook", "table"])
def test_a_fresh_model_knows_nothing(embedding):
    fresh = model(embedding=embedding)
    logits = fresh(tokens()).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, tokens()[:, 1:].flatten()).item()
    assert loss == pytest.approx(torch.tensor(float(CODES)).log().item(), abs=0.35)


@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0])
def test_codebook_vectors_enter_with_unit_variance_whatever_their_scale(scale):
    vectors = model(scale=scale, width=256).model.embed_tokens.table()
    assert vectors.var().item() == pytest.approx(1, rel=0.15)


def test_the_codebook_is_frozen_and_its_projection_escapes_muon_by_name():
    names = {name for name, _ in model().named_parameters()}
    assert "model.embed_tokens.embed_projection.weight" in names
    assert not any("codebook" in name for name in names)


def test_no_code_is_special():
    config = model().config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)
    assert model().model.embed_tokens(torch.tensor([[0]])).abs().sum() > 0


def test_aligned_heads_look_beneath_around_and_above_the_next_answer_token():
    section = {"width": 128, "layers": 2, "heads": 8, "aligned_heads": True}
    fresh = model(**section)
    fresh.config._attn_implementation = "eager"
    with torch.no_grad():
        for layer in fresh.model.layers:  # the biases alone: random contents blur the pattern
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.k_proj.weight.zero_()
        attentions = fresh(tokens(), output_attentions=True).attentions
    offsets = aligned_offsets(IMAGE_TOKENS)
    assert offsets == [15, 14, 16, 11, 19, 3, 10, 12, 18, 20, 4, 2]
    start = TOKENS - IMAGE_TOKENS  # of the last answer: its token p is predicted at start + p - 1
    for layer, attention_BHTT in enumerate(attentions):
        for head in range(8):
            row_TT = attention_BHTT[:, head].mean(dim=0)
            offset = offsets[(6 * layer + head) % len(offsets)]
            for p in (1, 7, 12):
                position = start + p - 1
                peak = row_TT[position].argmax().item()
                if head < 6:
                    assert peak == position - offset, (layer, head, p)
                    assert row_TT[position, peak] > 1.5 * max(row_TT[position, peak - 1], row_TT[position, peak + 1])
                else:
                    assert row_TT[position, peak] < 0.05
    beneath = offsets[0]
    assert (start + 7 - 1) - beneath == start - IMAGE_TOKENS + 7, "answer token 7 lies over query token 7"


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("block", [None, 48, 128])
def test_our_attention_is_the_stock_attention(monkeypatch, block, key_heads):
    monkeypatch.setattr(attention, "BLOCK", block)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    stock = LlamaForCausalLM(LlamaConfig(vocab_size=CODES, num_key_value_heads=key_heads, attention_bias=True, **shape))
    ours = copy.deepcopy(stock)
    use_own_attention(ours, blocks=block is not None)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in stock.named_parameters()]
    found = []
    for each in (stock, ours):
        logits = each(tokens(), use_cache=False).logits
        logits.logsumexp(-1).square().mean().backward()
        found.append((logits.detach(), {name: parameter.grad for name, parameter in each.named_parameters()}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("blocks", [True, False])
def test_our_attention_is_as_near_to_the_truth_in_bf16_as_the_stock_one(blocks):
    exact, stock, ours = model().double(), model().bfloat16(), model().bfloat16()
    use_own_attention(ours, blocks)
    wanted, theirs, mine = (each(tokens(8), use_cache=False).logits.double() for each in (exact, stock, ours))
    assert (mine - wanted).square().mean() <= 1.05 * (theirs - wanted).square().mean()


def test_places_turn_as_in_the_stock_layer_and_their_gradient_turns_back():
    torch.manual_seed(0)
    states = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    angles = torch.rand(1, 5, 4, dtype=torch.float64).repeat(1, 1, 2)
    cosine, sine = angles.cos(), angles.sin()
    torch.testing.assert_close(rotate(states, cosine, sine), apply_rotary_pos_emb(states, states, cosine, sine)[0])
    assert torch.autograd.gradcheck(lambda states: rotate(states, cosine, sine), states)


@pytest.mark.parametrize("at_once", [1, 10 * 32, 2**20])  # one row, ten, all
def test_the_norm_in_cache_is_the_stock_norm(monkeypatch, at_once):
    monkeypatch.setitem(PASSED_AT_ONCE, "cpu", at_once)
    stock, ours = model().double(), model().double()
    names = [name for name, _ in stock.named_parameters()]
    use_norm_in_cache(ours)
    assert [name for name, _ in ours.named_parameters()] == names
    assert not any(isinstance(module, LlamaRMSNorm) for module in ours.modules())
    found = []
    for each in (stock, ours):
        logits = each(tokens()).logits
        logits.logsumexp(-1).square().mean().backward()
        found.append((logits.detach(), {name: parameter.grad for name, parameter in each.named_parameters()}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)  # the stock norm computes in fp32 whatever comes


def test_the_norm_in_cache_is_as_near_to_the_truth_in_bf16_as_the_stock_one():
    torch.manual_seed(0)
    exact, by_normed, weight = (torch.randn(*shape).bfloat16().double() for shape in ((3, 7, 64), (3, 7, 64), (64,)))

    def of(norm, kind):
        states = exact.to(kind, copy=True).requires_grad_()
        norm.to(kind).weight.data.copy_(weight)
        normed = norm(states)
        normed.backward(by_normed.to(kind))
        return [each.double() for each in (normed.detach(), states.grad, norm.weight.grad)]

    truth = of(RMSNorm(torch.nn.Parameter(torch.ones(64)), 1e-6), torch.float64)
    stock, ours = (
        of(norm, torch.bfloat16) for norm in (LlamaRMSNorm(64, 1e-6), RMSNorm(torch.nn.Parameter(torch.ones(64)), 1e-6))
    )
    for wanted, theirs, mine in zip(truth, stock, ours, strict=True):
        assert (mine - wanted).abs().max() <= 1.01 * (theirs - wanted).abs().max()


def test_the_gradient_of_the_norm_in_cache_is_that_of_its_function():
    torch.manual_seed(0)
    states, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (5,)))
    assert torch.autograd.gradcheck(lambda states, weight: _RMSNorm.apply(states, weight, 1e-5), (states, weight))


@pytest.mark.parametrize("blocks", [True, False])
def test_a_model_with_our_layers_exports_as_stock(tmp_path, blocks):
    trained = model()
    use_own_attention(trained, blocks)
    use_norm_in_cache(trained)
    export(trained, tmp_path / "model", TOKENIZER)
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert stock.config._attn_implementation == "sdpa"
    torch.testing.assert_close(trained(tokens(), use_cache=False).logits, stock(tokens()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("embedding", ["codebook", "table"])
def test_a_student_of_all_layers_starts_as_its_exported_teacher(tmp_path, embedding):
    teacher, student = model(seed=1, embedding=embedding), model(seed=2, embedding=embedding)
    export(teacher, tmp_path, TOKENIZER)
    loaded, _ = load_model(tmp_path)
    inherit(student, loaded, range(student.config.num_hidden_layers))
    torch.testing.assert_close(student(tokens()).logits, teacher(tokens()).logits, rtol=1e-3, atol=1e-4)


def test_the_projection_is_found_again_the_same_to_the_bit():
    """A memory of its own for every call: the solver of torch.linalg.lstsq gives other last bits in about every one."""
    generator = torch.Generator().manual_seed(0)
    codebook, layer = torch.randn(256, 24, generator=generator), torch.randn(24, 32, generator=generator)
    codebook[:, 20:] = 0  # no rank: nothing can be said of these
    table, kept, found = codebook @ layer, [], []
    for size in range(12):
        kept.append(torch.empty(1 + 977 * size))
        kept += [codebook.clone(), table.clone()]
        found.append(projection_of(*kept[-2:]))
    assert all(torch.equal(projection, found[0]) for projection in found)
    torch.testing.assert_close(found[0].T[:20], layer[:20], rtol=0, atol=1e-5)
    assert found[0].T[20:].abs().max() < 1e-6


def test_a_student_takes_the_layers_that_are_named(tmp_path):
    teacher, student = model(seed=1, layers=3), model(seed=2, layers=2)
    export(teacher, tmp_path, TOKENIZER)
    inherit(student, load_model(tmp_path)[0], [0, 2])
    for own, layer in ((0, 0), (1, 2)):
        for name, weight in student.model.layers[own].state_dict().items():
            assert (weight == teacher.model.layers[layer].state_dict()[name]).all(), name


@pytest.mark.parametrize("embedding", ["codebook", "table"])
def test_an_exported_model_is_stock_and_answers_alike(tmp_path, embedding):
    trained = model(embedding=embedding)
    export(trained, tmp_path / "model", TOKENIZER)
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    ours, tokenizer = load_model(tmp_path / "model")
    with torch.no_grad():
        wanted = trained(tokens()).logits
        assert torch.allclose(stock(tokens()).logits, wanted, atol=1e-5)
        assert torch.equal(ours(tokens()).logits, stock(tokens()).logits)
    assert tokenizer == TOKENIZER == read_tokenizer(tmp_path / "model")
    assert all(tensor.dtype == torch.float32 for tensor in load_file(tmp_path / "model" / "model.safetensors").values())
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert (config.attention_bias, config.mlp_bias, config.tie_word_embeddings) == (True, False, False)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)
    assert (config.vocab_size, config.max_position_embeddings) == (CODES, TOKENS)


def test_a_model_loads_in_bf16(tmp_path):
    export(model(), tmp_path / "model", TOKENIZER)
    loaded, _ = load_model(tmp_path / "model", torch.bfloat16)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert not loaded.training
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model().model.rotary_emb.inv_freq), "positions keep their precision"


def test_a_folder_answers_as_the_stock_model_does(tmp_path):
    export(model(embedding="codebook"), tmp_path / "model", TOKENIZER)
    shape, weights, tokenizer = read_model(tmp_path / "model")
    assert tokenizer == TOKENIZER
    decoder, asked, truth = Decoder(shape, weights), tokens()[:, :96].numpy(), tokens()[:, 96:112].numpy()
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(tmp_path / "model")(tokens()[:, :111]).logits[:, 95:]
    wanted = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens()[:, 96:112], reduction="none")
    torch.testing.assert_close(torch.from_numpy(decoder.losses(decoder.read(asked), truth)[0]).float(), wanted, rtol=0, atol=1e-5)


def test_in_bf16_a_folder_answers_as_its_model_does(tmp_path):
    export(model(), tmp_path / "model", TOKENIZER)
    shape, weights, _ = read_model(tmp_path / "model", torch.bfloat16)
    decoders = Decoder(shape, weights), Decoder.of(load_model(tmp_path / "model", torch.bfloat16)[0])
    asked, truth = tokens()[:, :96].numpy(), tokens()[:, 96:112].numpy()
    (losses, _), (wanted, _) = (decoder.losses(decoder.read(asked), truth) for decoder in decoders)
    assert (losses == wanted).all()


def test_answers_need_no_transformers(tmp_path):
    """Its import takes longer than many an evaluation's share of a worker."""
    export(model(), tmp_path / "model", TOKENIZER)
    script = """
import sys, numpy, lvm_ray.evaluate.score
from lvm_ray.model.folder import read_model
from lvm_ray.model.generate import Decoder
shape, weights, _ = read_model(sys.argv[1])
decoder = Decoder(shape, weights)
print(decoder.generate(decoder.read(numpy.zeros((2, 40), int)), 3).shape, "transformers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "model")], capture_output=True, text=True, check=True)
    assert done.stdout == "(2, 3) False\n"


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 2}, {"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 16}, {"rms_norm_eps": 1e-5}],
)
def test_the_shape_of_a_config_names_the_weights_of_its_model(changes):
    values = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**(values | changes))
    with torch.device("meta"):
        stock = LlamaForCausalLM(config)
    for content in (config.to_dict(), values | changes):
        shape = of_config(content, "config.json")
        assert shape.weights() == {name: tuple(tensor.shape) for name, tensor in stock.state_dict().items()}
        assert (shape.norm_epsilon, shape.rope_base) == (config.rms_norm_eps, config.rope_parameters["rope_theta"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected a whole number from 1 to 1,048,576"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, more than the folder has weights"),
        ({"hidden_size": "32"}, 'hidden_size is "32", expected a whole number'),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu", only "silu" is known'),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "only the default rotary positions are known"),
        ({"rope_parameters": {"type": ["default"]}}, "only the default rotary positions are known"),
        ({"rope_parameters": {"type": "linear"}}, 'rope_parameters is {"type": "linear"}, only the default'),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "only the default rotary positions"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "only null is known"),
        ({"rope_parameters": "default"}, 'rope_parameters is "default", only the default'),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta is -1.0, expected a number above 0"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true, only false is known"),
        ({"num_key_value_heads": 3}, "4 heads do not share num_key_value_heads 3 evenly"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0, expected a whole number"),
        ({"num_attention_heads": 3}, "3 heads do not share out a width of 32 in even parts"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"head_dim": False}, "head_dim is false, expected a whole number"),
        ({"rms_norm_eps": 10**400}, "expected a number above 0"),
        ({"attention_bias": 1}, "attention_bias is 1, expected true or false"),
        ({"max_position_embeddings": 2048.5}, "max_position_embeddings is 2048.5, expected a whole number"),
        ({"model_type": "mistral"}, "model_type is 'mistral'; only llama is known"),
    ],
)
def test_a_config_of_another_model_is_refused_in_one_line(tmp_path, changes, message):
    export(model(), tmp_path / "model", TOKENIZER)
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"head_dim": None} | changes))
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / "model")
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_disk_without_room_for_the_model_is_one_line_and_leaves_the_model_before(tmp_path, monkeypatch):
    export(model(), tmp_path / "model", TOKENIZER)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("lvm_ray.model.export.save_file", full)
    with pytest.raises(UserError, match=r"cannot write the model .*No space left on device.*: free space on that disk"):
        export(model(), tmp_path / "model", TOKENIZER)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_exporting_again_replaces_the_model(tmp_path):
    export(model(0), tmp_path / "model", TOKENIZER)
    export(model(1), tmp_path / "model", TOKENIZER)
    loaded, _ = load_model(tmp_path / "model")
    assert torch.equal(loaded.lm_head.weight, model(1).lm_head.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def damage_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "not a finished model"),
        (lambda folder: (folder / "image_tokenizer.json").unlink(), "not a finished model"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "not valid JSON"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x08garbage"), "not a whole safetensors file"),
        (lambda folder: damage_weights(folder, lambda weights: weights.pop("lm_head.weight")), "lacks the weight lm_head.weight"),
        (
            lambda folder: damage_weights(folder, lambda weights: weights.update(extra=torch.zeros(1))),
            "unknown weight extra",
        ),
        (
            lambda folder: damage_weights(folder, lambda weights: weights.update({"lm_head.weight": torch.zeros(2, 2)})),
            r"lm_head.weight has shape \[2, 2\]",
        ),
        (
            lambda folder: (folder / "image_tokenizer.json").write_text(json.dumps(TOKENIZER | {"codes": 7})),
            "64 codes",
        ),
        (lambda folder: (folder / "image_tokenizer.json").write_text('{"kind": "patch"}'), "lacks 'hash'"),
    ],
)
def test_a_damaged_model_is_refused_in_one_line(tmp_path, damage, message):
    export(model(), tmp_path / "model", TOKENIZER)
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=message) as caught:
        load_model(tmp_path / "model")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_of_another_codebook_is_refused(tmp_path):
    export(model(), tmp_path / "model", TOKENIZER)
    load_model(tmp_path / "model", codebook="0123456789abcdef")
    with pytest.raises(UserError, match="codebook 0123456789abcdef, not on fedcba"):
        load_model(tmp_path / "model", codebook="fedcba")
