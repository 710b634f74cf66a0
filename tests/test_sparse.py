"""Sparse answers: what they keep is exact, what they draw is right in the mean, and the bias at other temperatures is known."""

import pytest
import torch

from lvm_ray.data.teacher_cache import numbers_of_a_place
from lvm_ray.recipe_sections import OneTeacherSection, SparseSection
from lvm_ray.train import sparse
from lvm_ray.train.divergences import distribution, forward_kl, of_logarithms

CODES = 40


def logits(places=6, scale=2.0):
    return (scale * torch.randn(places, CODES, generator=torch.Generator().manual_seed(0))).bfloat16().float()


def kept(values, section, temperature, seed=0):
    return sparse.unpack(sparse.pack(values, section, [seed]), section, values.shape[1], temperature)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_all_tokens_kept_are_the_distribution(temperature):
    values, section = logits(), SparseSection(top=CODES - 1, tail=1)  # the last one is the rest, whatever is drawn
    assert numbers_of_a_place(OneTeacherSection(sparse=section), 1) == sparse.pack(values, section, [0]).shape[1] == 2 * CODES + 2
    wanted = (values / temperature).log_softmax(-1)
    torch.testing.assert_close(kept(values, section, temperature).exp(), wanted.exp(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_distribution_it_is_and_the_top_has_its_exact_chances_at_temperature_one(temperature):
    values, section = logits(), SparseSection(top=8, tail=4)
    found = kept(values, section, temperature).exp()
    torch.testing.assert_close(found.sum(-1), torch.ones(len(values)), rtol=1e-5, atol=0)
    assert ((found > 1e-30).sum(-1) <= 12).all()
    if temperature == 1.0:
        top = values.topk(8, dim=-1).indices
        torch.testing.assert_close(found.gather(1, top), values.softmax(-1).gather(1, top), rtol=1e-4, atol=1e-6)


def test_the_gradient_of_forward_kl_is_right_in_the_mean_and_its_bias_at_other_temperatures_small():
    values, section, draws = logits(), SparseSection(top=4, tail=8), 4000
    packed = sparse.pack(values.repeat(draws, 1), section, range(draws))
    student = torch.randn(len(values), CODES, generator=torch.Generator().manual_seed(1))
    bias = {}
    for temperature in (0.5, 1.0, 2.0):
        wanted = forward_kl(distribution(student, temperature), distribution(values, temperature))[1]
        kept = of_logarithms(sparse.unpack(packed, section, CODES, temperature))
        found = forward_kl(distribution(student.repeat(draws, 1), temperature), kept)[1]
        found = found.view(draws, *wanted.shape)
        error, noise = (found.mean(0) - wanted).abs(), found.std(0) / draws**0.5
        bias[temperature] = (error.sum(-1) / wanted.abs().sum(-1)).max().item()
        if temperature == 1.0:
            assert (error < 5 * noise + 1e-5).all()
    assert bias[1.0] < 0.03 and bias[0.5] < 0.03 and bias[2.0] < 0.1, bias


def test_draws_depend_on_a_sentences_seed_alone():
    values, section = logits(8), SparseSection(top=2, tail=4)
    both = sparse.pack(values, section, [3, 4])
    alone = [sparse.pack(values[:4], section, [3]), sparse.pack(values[4:], section, [4])]
    assert torch.equal(both.view(torch.int16), torch.cat(alone).view(torch.int16))
    assert not torch.equal(sparse.pack(values[:4], section, [5]).view(torch.int16), alone[0].view(torch.int16))


def test_no_top_token_is_drawn_again_and_large_vocabularies_fit_their_ids():
    values = torch.randn(3, 65536, generator=torch.Generator().manual_seed(2))
    values[:, -1] = 20.0
    section = SparseSection(top=4, tail=16)
    packed = sparse.pack(values, section, [0]).to(torch.int64)
    top, tail = packed[:, :4], packed[:, 8:24]
    assert (top[:, 0] == 65535).all() and not (top[:, :, None] == tail[:, None]).any()
