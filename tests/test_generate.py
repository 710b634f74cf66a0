"""Decoding: the tokens and losses that transformers gives, exactly as many as asked for, and honest sampling."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

import lvm_ray.model.generate as generation
from lvm_ray.model.generate import Decoder, generate

CODES, PROMPT, ANSWER = 40, 28, 12


def tiny(dtype: torch.dtype = torch.float32, **changes) -> LlamaForCausalLM:
    torch.manual_seed(3)
    values = {
        "vocab_size": CODES,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "attention_bias": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "initializer_range": 0.4,  # sharp enough that no two logits tie within fp32's error
    }
    model = LlamaForCausalLM(LlamaConfig(**(values | changes))).eval().to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):  # all zeros and ones as initialised: they would not be tested
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model


def prompts(batch: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, CODES, (batch, PROMPT))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2},
        {"attention_bias": False, "mlp_bias": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    ],
    ids=["stock", "grouped keys", "biases elsewhere", "other rope base"],
)
def test_greedy_answers_are_those_of_transformers(changes):
    model, asked = tiny(**changes), torch.from_numpy(prompts())
    expected = model.generate(asked, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False)[:, PROMPT:]
    answers = generate(model, asked.numpy(), ANSWER)
    assert answers.dtype == np.uint16 and answers.shape == (5, ANSWER)
    assert (answers == expected.numpy()).all()
    # And without any cache: every token is the likeliest after all before it.
    with torch.inference_mode():
        logits_BTV = model(torch.cat([asked, expected], dim=1)).logits
    assert (logits_BTV[:, PROMPT - 1 : -1].argmax(-1).numpy() == answers).all()


def test_losses_are_those_of_one_forward_and_leave_the_answer_alone():
    model, asked = tiny(), prompts()
    truth_BN = np.random.default_rng(1).integers(0, CODES, (5, ANSWER))
    with torch.inference_mode():
        logits_BNV = model(torch.from_numpy(np.concatenate([asked, truth_BN], axis=1))).logits[:, PROMPT - 1 : -1]
    expected_BN = F.cross_entropy(logits_BNV.transpose(1, 2), torch.from_numpy(truth_BN), reduction="none").numpy()
    decoder = Decoder.of(model)
    prompt = decoder.read(asked)
    nll_BN, correct_BN = decoder.losses(prompt, truth_BN)
    np.testing.assert_allclose(nll_BN, expected_BN, atol=1e-4)
    assert (correct_BN == (logits_BNV.argmax(-1).numpy() == truth_BN)).all()
    assert (decoder.generate(prompt, ANSWER) == generate(model, asked, ANSWER)).all()


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}], ids=["stock", "grouped keys"])
def test_prompts_read_in_blocks_give_the_same(monkeypatch, changes):
    asked = prompts()
    asked[:, :16] = asked[0, :16]
    monkeypatch.setattr(generation, "SHORTEST", 4)
    truth_BN = np.random.default_rng(1).integers(0, CODES, (5, ANSWER))
    found = []
    for in_blocks in (False, True):
        monkeypatch.setattr(generation, "_in_blocks", lambda query, answer=in_blocks: answer)
        decoder = Decoder.of(tiny(**changes))
        prompt = decoder.read(asked)
        found.append((decoder.losses(prompt, truth_BN)[0], decoder.generate(prompt, ANSWER)))
    np.testing.assert_allclose(found[1][0], found[0][0], atol=1e-4)
    assert (found[1][1] == found[0][1]).all()


def test_bf16_answers_are_as_near_to_fp32_as_those_of_transformers():
    asked, truth_BN = prompts(), np.random.default_rng(1).integers(0, CODES, (5, ANSWER))
    precise = Decoder.of(tiny())
    wanted_BN, _ = precise.losses(precise.read(asked), truth_BN)
    decoder = Decoder.of(tiny(torch.bfloat16))
    found_BN, _ = decoder.losses(decoder.read(asked), truth_BN)
    with torch.inference_mode():
        tokens_BT = torch.from_numpy(np.concatenate([asked, truth_BN], axis=1))
        logits_BNV = tiny(torch.bfloat16)(tokens_BT).logits[:, PROMPT - 1 : -1].float()
    stock_BN = F.cross_entropy(logits_BNV.transpose(1, 2), torch.from_numpy(truth_BN), reduction="none").numpy()
    ours, theirs = (np.abs(nll_BN - wanted_BN).mean() for nll_BN in (found_BN, stock_BN))
    assert 0 < ours < 1.5 * theirs, (ours, theirs)


def test_an_answer_is_its_own_best_teacher():
    decoder = Decoder.of(tiny())
    prompt = decoder.read(prompts())
    _, correct_BN = decoder.losses(prompt, decoder.generate(prompt, ANSWER))
    assert correct_BN.all()


def test_bf16_losses_are_close_to_fp32s():
    truth_BN = np.random.default_rng(1).integers(0, CODES, (5, ANSWER))
    means = []
    for dtype in (torch.float32, torch.bfloat16):
        decoder = Decoder.of(tiny(dtype, initializer_range=0.1))
        means.append(decoder.losses(decoder.read(prompts()), truth_BN)[0].mean())
    assert abs(means[0] - means[1]) < 0.02 * means[0]


def test_no_code_ends_an_answer():
    model = tiny(eos_token_id=0, pad_token_id=0)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every logit is 0, so code 0 is always the likeliest
    assert (generate(model, prompts(), ANSWER) == np.zeros((5, ANSWER))).all()


def draw(model, asked, draws, temperature, seeds):
    decoder = Decoder.of(model)
    return decoder.draw(decoder.read(asked), ANSWER, draws, temperature, seeds)


def test_a_draw_depends_on_its_own_prompt_and_seed_alone():
    model, asked = tiny(), prompts()
    answers_BKN = draw(model, asked, 3, 1.5, [7, 8, 9, 10, 11])
    assert answers_BKN.shape == (5, 3, ANSWER)
    alone_BKN = draw(model, asked[2:3], 3, 1.5, [9])
    assert (answers_BKN[2] == alone_BKN[0]).all()
    assert (draw(model, asked[2:3], 1, 1.5, [9])[0, 0] == alone_BKN[0, 0]).all()
    assert (draw(model, asked[2:3], 3, 1.5, [10])[0] != alone_BKN[0]).any()
    assert (alone_BKN[0, 0] != alone_BKN[0, 1]).any()


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}], ids=["stock", "grouped keys"])
def test_cold_draws_are_the_likeliest_answer(changes):
    model, asked = tiny(**changes), prompts()
    cold_BKN = draw(model, asked, 2, 1e-4, [7, 8, 9, 10, 11])
    assert (cold_BKN == generate(model, asked, ANSWER)[:, None]).all()


def test_draws_follow_the_distribution_at_their_temperature():
    model, draws, temperature = tiny(initializer_range=0.1), 4000, 2.0
    asked = prompts(1)
    with torch.inference_mode():
        expected_V = (model(torch.from_numpy(asked)).logits[0, -1].double() / temperature).softmax(-1).numpy()
    found_V = np.bincount(draw(model, asked, draws, temperature, [5])[0, :, 0], minlength=CODES) / draws
    assert (np.abs(found_V - expected_V) <= 5 * np.sqrt(expected_V / draws)).all()


def read_apart(monkeypatch, model, asked: np.ndarray, shortest: int):
    """A decoder and the prompts, read with a prefix apart where it has so many tokens."""
    monkeypatch.setattr(generation, "SHORTEST", shortest)
    decoder = Decoder.of(model)
    return decoder, decoder.read(asked)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}], ids=["stock", "grouped keys"])
@pytest.mark.parametrize(
    ("batch", "common", "sequences"),
    [(5, 20, [1, 5]), (5, PROMPT, [1, 5]), (5, 0, [5]), (1, PROMPT, [1])],
    ids=["examples in common", "the same prompt", "nothing in common", "one prompt"],
)
def test_what_prompts_have_in_common_is_read_once_and_changes_nothing(monkeypatch, changes, batch, common, sequences):
    model, asked = tiny(**changes), prompts(batch)
    asked[:, :common] = asked[0, :common]
    truth_BN = np.random.default_rng(1).integers(0, CODES, (batch, ANSWER))
    seeds = list(range(batch))
    decoder, alone = read_apart(monkeypatch, model, asked, PROMPT)
    assert [segment.shape[2] for segment in alone.segments] == [batch]
    _, shared = read_apart(monkeypatch, model, asked, 4)
    assert [segment.shape[2] for segment in shared.segments] == sequences
    assert sum(segment.shape[4] for segment in shared.segments) == PROMPT
    with torch.inference_mode():
        logits_BV = model(torch.from_numpy(asked)).logits[:, -1]
    for prompt in (alone, shared):
        torch.testing.assert_close(prompt.logits_BV, logits_BV, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(shared.logits_BV, alone.logits_BV, atol=1e-4, rtol=1e-5)
    for found, wanted in zip(decoder.losses(shared, truth_BN), decoder.losses(alone, truth_BN), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)
    assert (decoder.generate(shared, ANSWER) == decoder.generate(alone, ANSWER)).all()
    drawn_BKN = decoder.draw(shared, ANSWER, 3, 1.5, seeds)
    assert (drawn_BKN == decoder.draw(alone, ANSWER, 3, 1.5, seeds)).all()
    expected = model.generate(torch.from_numpy(asked), max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False)[:, PROMPT:]
    assert (decoder.generate(shared, ANSWER) == expected.numpy()).all()


@pytest.mark.parametrize("common", [0, 20], ids=["nothing in common", "examples in common"])
def test_rows_are_read_in_pieces_of_any_size(monkeypatch, common):
    model, asked = tiny(), prompts()
    asked[:, :common] = asked[0, :common]
    truth_BN = np.random.default_rng(1).integers(0, CODES, (5, ANSWER))
    decoder, whole = read_apart(monkeypatch, model, asked, 4)
    losses_BN, _ = decoder.losses(whole, truth_BN)
    for piece in (1, 2 * PROMPT):
        decoder.piece = piece
        prompt = decoder.read(asked)
        torch.testing.assert_close(prompt.logits_BV, whole.logits_BV, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(decoder.losses(prompt, truth_BN)[0], losses_BN, atol=1e-5, rtol=1e-5)
        assert (decoder.generate(prompt, ANSWER) == decoder.generate(whole, ANSWER)).all()


def test_only_a_common_beginning_counts():
    asked = torch.tensor([[1, 2, 3, 9, 5, 6], [1, 2, 4, 9, 5, 6], [1, 2, 3, 9, 5, 6]])
    assert generation._shared(asked) == 2
    assert generation._shared(asked[:1]) == 0
    assert generation._shared(asked[[0, 2]]) == 5
    assert generation._shared(asked.flip(1)) == 3
