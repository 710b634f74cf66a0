"""The losses as mathematics: against float64 references, at their edges, under temperature, in chunks."""

import math

import pytest
import torch

from lvm_ray.config import ModelSection
from lvm_ray.model.llama import build
from lvm_ray.train import losses
from lvm_ray.train.losses import TrainingModule, cross_entropy, distillation, token_weights

CODES, TOKENS, IMAGE_TOKENS = 32, 32, 4


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def model(seed=0, width=16):
    codebook = torch.randn(CODES, 5, generator=torch.Generator().manual_seed(9))
    return build(ModelSection(width=width, layers=1, heads=2, mlp=24), codebook, TOKENS, IMAGE_TOKENS, seed)


def batch(generator, size=3):
    return torch.randint(0, CODES, (size, TOKENS), generator=generator)


def probabilities(logits, temperature=1.0):
    """A softmax in plain Python floats."""
    exponents = [math.exp(value / temperature) for value in logits]
    return [value / sum(exponents) for value in exponents]


def test_weights_follow_the_pictures():
    weights = token_weights(16, 4, 0.25)
    # Predicted tokens 1..15 of image, label, image, label: the first token is predicted from nothing.
    assert weights.tolist() == [0.25] * 3 + [1.0] * 4 + [0.25] * 4 + [1.0] * 4


def test_cross_entropy_is_the_negative_log_likelihood(generator):
    logits = torch.randn(5, 7, generator=generator, dtype=torch.float64) * 3
    targets = torch.tensor([0, 6, 3, 3, 1])
    wanted = [-math.log(probabilities(row.tolist())[target]) for row, target in zip(logits, targets.tolist(), strict=True)]
    assert cross_entropy(logits, targets).tolist() == pytest.approx(wanted, rel=1e-12)
    assert cross_entropy(logits.float(), targets).tolist() == pytest.approx(wanted, rel=1e-5)


def test_code_zero_is_a_target_like_any_other(generator):
    logits = torch.zeros(1, 8)
    assert cross_entropy(logits, torch.tensor([0])).item() == pytest.approx(math.log(8))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distillation_is_the_scaled_divergence_of_softened_distributions(generator, temperature):
    student, teacher = torch.randn(2, 4, 9, generator=generator, dtype=torch.float64) * 2
    wanted = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        pairs = zip(probabilities(t, temperature), probabilities(s, temperature), strict=True)
        wanted.append(temperature**2 * sum(p * math.log(p / q) for p, q in pairs))
    assert distillation(student, teacher, temperature).tolist() == pytest.approx(wanted, rel=1e-10)


def test_distillation_is_zero_for_identical_and_positive_for_other_logits(generator):
    student, teacher = torch.randn(2, 6, 9, generator=generator)
    assert distillation(student, student, 2.0).abs().max() < 1e-6
    assert distillation(student + 5, student, 2.0).abs().max() < 1e-5  # only differences of logits count
    assert distillation(student, teacher, 2.0).min() > 0


def test_distillation_does_not_vanish_at_high_temperature(generator):
    """T^2 keeps the gradient's size: in the limit it is the logits' difference over the number of codes."""
    student, teacher = torch.randn(2, 1, 9, generator=generator, dtype=torch.float64)
    student.requires_grad_()
    distillation(student, teacher, 1e4).sum().backward()
    difference = (student - teacher).detach()
    assert torch.allclose(student.grad, (difference - difference.mean()) / 9, rtol=1e-3, atol=1e-6)


def test_gradients_are_exact_and_the_teacher_gets_none(generator):
    student, teacher = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    student.requires_grad_()
    teacher.requires_grad_()
    targets = torch.tensor([0, 4, 2])
    assert torch.autograd.gradcheck(lambda logits: cross_entropy(logits, targets), student)
    assert torch.autograd.gradcheck(lambda logits: distillation(logits, teacher, 1.7), student)
    distillation(student, teacher, 1.7).sum().backward()
    assert teacher.grad is None


@pytest.mark.parametrize("image_weight", [0.0, 0.3, 1.0])
def test_module_computes_the_weighted_mean_over_all_positions(generator, image_weight):
    student, teacher, tokens = model(0), model(1, width=24), batch(generator)
    outcome = TrainingModule(student, TOKENS, IMAGE_TOKENS, image_weight, teacher, 2.0, 0.5)(tokens)

    logits = student(tokens).logits[:, :-1].double()
    wanted_logits = teacher(tokens).logits[:, :-1].double()
    weights = token_weights(TOKENS, IMAGE_TOKENS, image_weight).double()
    ce = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    log_s, log_t = (value.div(2).log_softmax(-1) for value in (logits, wanted_logits))
    kd = 4 * (log_t.exp() * (log_t - log_s)).sum(-1)
    mean_ce, mean_kd = ((weights * value).sum() / (3 * weights.sum()) for value in (ce, kd))
    assert outcome.ce.item() == pytest.approx(mean_ce.item(), rel=1e-5)
    assert outcome.kd.item() == pytest.approx(mean_kd.item(), rel=1e-4)
    assert outcome.loss.item() == pytest.approx((mean_ce + 0.5 * mean_kd).item(), rel=1e-5)
    labels = torch.arange(1, TOKENS) // IMAGE_TOKENS % 2 == 1
    assert outcome.target_B.tolist() == pytest.approx(ce[:, labels].mean(1).tolist(), rel=1e-5)


def test_without_image_weight_images_get_no_logits(generator):
    student, seen = model(), []
    student.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    TrainingModule(student, TOKENS, IMAGE_TOKENS, 0.0)(batch(generator))
    assert seen == [(3 * TOKENS // 2, CODES)]


def test_micro_batches_average_to_the_whole_batch(generator):
    module, tokens = TrainingModule(model(), TOKENS, IMAGE_TOKENS, 0.1), batch(generator, 4)
    parts = [module(tokens[:2]).loss, module(tokens[2:]).loss]
    assert torch.stack(parts).mean().item() == pytest.approx(module(tokens).loss.item(), rel=1e-6)


@pytest.mark.parametrize("distilled", [False, True])
def test_weights_of_sentences_weigh_loss_and_gradient(generator, distilled):
    """In float64: the gradient is the sum of the sentences' own, each times its weight; the target loss stays as it was."""
    teacher = model(1).double() if distilled else None
    student = model().double()
    for part in (student.model, *student.model.layers):
        for name in [name for name, _ in part.named_children() if name.endswith("norm")]:
            setattr(part, name, torch.nn.Identity())  # transformers' own computes in float32
    module = TrainingModule(student, TOKENS, IMAGE_TOKENS, 0.3, teacher, 2.0, 0.5)
    tokens, weights = batch(generator, 4), torch.tensor([0.5, 0.0, 2.0, 1.5])

    def gradient(outcome):
        module.zero_grad()
        outcome.loss.backward()
        return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}

    alone = [gradient(module(tokens[k : k + 1])) for k in range(4)]
    weighted = module(tokens, weights)
    for name, found in gradient(weighted).items():
        wanted = sum(weight * part[name] for weight, part in zip(weights.double(), alone, strict=True)) / 4
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert torch.equal(weighted.target_B, module(tokens).target_B)
    for term in ("ce", "kd"):
        wanted = sum(weight * getattr(module(tokens[k : k + 1]), term) for k, weight in enumerate(weights.double())) / 4
        torch.testing.assert_close(getattr(weighted, term), wanted)


def test_a_weight_of_zero_leaves_a_sentence_without_gradient(generator):
    module, tokens = TrainingModule(model(), TOKENS, IMAGE_TOKENS, 0.3, model(1), 2.0, 0.5), batch(generator, 2)
    module(tokens, torch.zeros(2)).loss.backward()
    assert all(not parameter.grad.any() for parameter in module.parameters())


def test_weights_of_one_change_no_bit(generator):
    module, tokens = TrainingModule(model(), TOKENS, IMAGE_TOKENS, 0.3), batch(generator)
    assert all(torch.equal(*pair) for pair in zip(module(tokens), module(tokens, torch.ones(3)), strict=True))


def test_all_tokens_of_a_sentence_without_labels_weigh_the_same_and_as_much_as_a_sentence_of_pairs(generator):
    for image_weight in (0.0, 0.25):
        student, teacher = model().double(), model(1).double()
        module = TrainingModule(student, TOKENS, IMAGE_TOKENS, image_weight, teacher, 2.0, 0.5, even=True)
        tokens, even = batch(generator, 3), torch.tensor([False, True, False])
        outcome = module(tokens, None, even)
        logits = student(input_ids=tokens).logits.detach()[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        weights = token_weights(TOKENS, IMAGE_TOKENS, image_weight).double()
        pairs = TrainingModule(student, TOKENS, IMAGE_TOKENS, image_weight, teacher, 2.0, 0.5)
        wanted = [pairs(tokens[:1]).ce, nll[1].mean(), pairs(tokens[2:]).ce]
        torch.testing.assert_close(outcome.ce, sum(wanted) / 3)
        torch.testing.assert_close(outcome.target_B[1], nll[1].mean())
        torch.testing.assert_close(outcome.target_B[0], (nll[0] * (weights == 1)).sum() / (weights == 1).sum())


def test_sentences_of_another_length_are_refused(generator):
    module = TrainingModule(model(), TOKENS, IMAGE_TOKENS, 0.1)
    with pytest.raises(AssertionError, match="sum of weights"):
        module(batch(generator)[:, :16])


def test_chunks_change_neither_loss_nor_gradient(generator, monkeypatch):
    tokens, teacher, outcomes = batch(generator), model(1), []
    for at_once in (2**25, 7 * CODES):
        monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once)
        student = model()
        outcome = TrainingModule(student, TOKENS, IMAGE_TOKENS, 0.3, teacher, 2.0, 0.5)(tokens)
        outcome.loss.backward()
        outcomes.append((outcome, {name: parameter.grad for name, parameter in student.named_parameters()}))
    (whole, whole_gradients), (chunked, chunked_gradients) = outcomes
    assert chunked.loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
    assert torch.allclose(chunked.target_B, whole.target_B, rtol=1e-6)
    for name, gradient in whole_gradients.items():
        assert torch.allclose(chunked_gradients[name], gradient, rtol=1e-4, atol=1e-7), name


def test_the_teacher_is_no_part_of_the_module(generator):
    student, teacher = model(), model(1)
    module = TrainingModule(student, TOKENS, IMAGE_TOKENS, 0.3, teacher, 1.0, 1.0)
    assert {id(parameter) for parameter in module.parameters()} == {id(parameter) for parameter in student.parameters()}
    module(batch(generator)).loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    module.bfloat16()
    assert teacher.lm_head.weight.dtype == torch.float32


def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it(generator):
    outcome = TrainingModule(model(), TOKENS, IMAGE_TOKENS, 0.3, model(), 2.0, 1.0)(batch(generator))
    assert outcome.kd.abs().item() < 1e-6
    assert outcome.loss.item() == pytest.approx(outcome.ce.item(), rel=1e-6)
