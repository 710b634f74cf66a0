"""The losses as mathematics: against float64 references, at their edges, under temperature, in chunks."""

import math

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lvm_ray.estimate import LOGITS_AT_ONCE, PASSED_AT_ONCE
from lvm_ray.model.llama import build
from lvm_ray.recipe_sections import ModelSection
from lvm_ray.train.divergences import distribution, named
from lvm_ray.train.head import Answers, HeadLosses, Teacher, _agrees
from lvm_ray.train.losses import TrainingModule, token_weights

CODES, TOKENS, IMAGE_TOKENS = 32, 32, 4


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def model(seed=0, width=16):
    codebook = torch.randn(CODES, 5, generator=torch.Generator().manual_seed(9))
    return build(ModelSection(width=width, layers=1, heads=2, mlp=24), codebook, TOKENS, IMAGE_TOKENS, seed)


def asked(teacher, *settings):
    """A teacher that is asked in every step: strength, temperature, divergence."""
    return Teacher(teacher, teacher.lm_head.weight, *settings)


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


DIVERGENCES = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9)]


def wanted_divergence(name, beta, student, teacher):
    """Between two rows of logits, in plain Python floats."""
    s, t = probabilities(student), probabilities(teacher)

    def kl(p, q):
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    mixture = [beta * a + (1 - beta) * b for a, b in zip(t, s, strict=True)]
    return {"forward_kl": kl(t, s), "reverse_kl": kl(s, t), "jsd": beta * kl(t, mixture) + (1 - beta) * kl(s, mixture)}[name]


@pytest.mark.parametrize(("name", "beta"), DIVERGENCES)
def test_divergences_are_their_formulas_and_their_gradients_the_differences(generator, name, beta):
    student, teacher = torch.randn(2, 4, 9, generator=generator, dtype=torch.float64) * 2

    def value(student):
        return named(name, beta)(distribution(student), distribution(teacher))[0]

    wanted = [wanted_divergence(name, beta, *rows) for rows in zip(student.tolist(), teacher.tolist(), strict=True)]
    assert value(student).tolist() == pytest.approx(wanted, rel=1e-10)
    gradient = named(name, beta)(distribution(student), distribution(teacher))[1]
    for code in range(9):
        step = torch.zeros(9, dtype=torch.float64)
        step[code] = 1e-5
        difference = (value(student + step) - value(student - step)) / 2e-5
        assert gradient[:, code].tolist() == pytest.approx(difference.tolist(), rel=1e-6, abs=1e-10)


@pytest.mark.parametrize(("name", "beta"), DIVERGENCES)
def test_divergences_are_zero_for_identical_models_and_positive_for_others(generator, name, beta):
    student, teacher = map(distribution, torch.randn(2, 6, 9, generator=generator))
    value, gradient = named(name, beta)(student, student)
    assert value.abs().max() < 1e-6 and gradient.abs().max() < 1e-6
    assert named(name, beta)(student, teacher)[0].min() > 0
    certain = torch.tensor([[0.0, -200.0, -200.0]])  # probabilities that float32 cannot tell from zero
    assert all(values.isfinite().all() for values in named(name, beta)(distribution(certain), distribution(certain.flip(1))))


def test_jsd_tends_to_both_divergences_at_its_edges(generator):
    student, teacher = map(distribution, torch.randn(2, 6, 9, generator=generator, dtype=torch.float64))
    for beta, scale, edge in ((1e-6, 1e-6, "forward_kl"), (1 - 1e-6, 1e-6, "reverse_kl")):
        for found, wanted in zip(named("jsd", beta)(student, teacher), named(edge, 0.5)(student, teacher), strict=True):
            torch.testing.assert_close(found / scale, wanted, rtol=1e-4, atol=1e-5)


# Head and losses


def head_losses(hidden, weight, targets, weights, answers, differentiate=True):
    return HeadLosses.apply(hidden, weight, targets, weights, 2.5, answers, True, differentiate)


def states(generator, places=11, width=4, codes=6):
    """Random (hidden [P, D], head [V, D], targets [P], weights [P])."""
    hidden, weight = (torch.randn(size, width, generator=generator, dtype=torch.float64) for size in (places, codes))
    return hidden, weight, torch.randint(0, codes, (places,), generator=generator), torch.rand(places, generator=generator)


def two_teachers(generator, **settings):
    kinds = [(named("jsd", 0.3), 2.0, 0.5), (named("reverse_kl", 0.5), 1.0, 1.5)]
    found = []
    for kind, temperature, strength in kinds:
        hidden, head, *_ = states(generator, width=5)
        found.append(Answers(hidden, Teacher(None, head, strength, temperature, kind)))
    return found


@pytest.mark.parametrize("at_once", [1, 20, 2**22])  # one place, three, all
def test_losses_of_the_head_are_those_of_a_plain_loop(generator, monkeypatch, at_once):
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", at_once)
    monkeypatch.setattr("lvm_ray.train.head.WATCHED", 2)
    hidden, weight, targets, weights = states(generator)
    teachers = two_teachers(generator)
    loss, ce, kd, entropy, agrees = head_losses(hidden, weight, targets, weights, teachers)
    wanted_ce, wanted_kd = [], [[], []]
    logits = (hidden @ weight.T).tolist()
    for place, target in enumerate(targets.tolist()):
        wanted_ce.append(-math.log(probabilities(logits[place])[target]))
        for number, (kind, beta) in enumerate((("jsd", 0.3), ("reverse_kl", 0.5))):
            answers = teachers[number]
            temperature = answers.teacher.temperature
            of_teacher = (answers.states[place] @ answers.teacher.head.T / temperature).tolist()
            of_student = [value / temperature for value in logits[place]]
            wanted_kd[number].append(temperature**2 * wanted_divergence(kind, beta, of_student, of_teacher))
            if place % 2 == 0:
                chances = probabilities(of_teacher)
                assert entropy[number, place // 2].item() == pytest.approx(-sum(p * math.log(p) for p in chances))
                likeliest = chances.index(max(chances)) == logits[place].index(max(logits[place]))
                assert agrees[number, place // 2].item() == likeliest
    assert ce.tolist() == pytest.approx(wanted_ce, rel=1e-10)
    assert kd[0].tolist() == pytest.approx(wanted_kd[0], rel=1e-9) and kd[1].tolist() == pytest.approx(wanted_kd[1], rel=1e-9)
    wanted = sum(w * (c + 0.5 * a + 1.5 * b) for w, c, a, b in zip(weights.tolist(), wanted_ce, *wanted_kd, strict=True)) / 2.5
    assert loss.item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("at_once", [1, 20, 2**22])
def test_gradients_of_the_head_are_exact_and_teachers_get_none(generator, monkeypatch, at_once):
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", at_once)
    hidden, weight, targets, weights = states(generator)
    teachers = two_teachers(generator)
    for answers in teachers:
        answers.teacher.head.requires_grad_()

    def loss(hidden, weight):
        return head_losses(hidden, weight, targets, weights.double(), teachers)[0] ** 2  # an outer gradient that is not 1

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_()))
    loss(hidden, weight).backward()
    assert all(answers.teacher.head.grad is None for answers in teachers)


def test_a_student_agrees_where_it_finds_nothing_likelier_than_its_teacher_does():
    teacher = torch.tensor([[0.0, 3.0, 1.0]]).expand(4, 3)
    student = torch.tensor([[0.0, 2.0, 1.0], [0.0, 2.0, 2.0], [0.0, 1.0, 2.0], [0.0, torch.nan, 1.0]]).bfloat16()
    assert _agrees(student, teacher).tolist() == [True, True, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_teachers_logits_come_softened(generator, dtype):
    hidden, head, *_ = (value.to(dtype) for value in states(generator))
    found = Answers(hidden, Teacher(None, head, 1.0, 3.0)).at(slice(2, 9)).said()
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), hidden[2:9].double() @ head.double().T / 3, rtol=1e-15, atol=8 * torch.finfo(dtype).eps
    )


class Held(TorchDispatchMode):
    """Counts the most bytes that tensors made within it held at once."""

    def __init__(self):
        super().__init__()
        self._alive, self.most = [], 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        found = function(*arguments, **(keywords or {}))
        storages = [value.untyped_storage() for value in tree_leaves(found) if isinstance(value, torch.Tensor)]
        known = {reference.cdata for reference, _ in self._alive}
        new = {storage._cdata: storage for storage in storages if storage._cdata not in known}
        self._alive += [(StorageWeakRef(storage), storage.nbytes()) for storage in new.values()]
        self._alive = [(reference, size) for reference, size in self._alive if not reference.expired()]
        self.most = max(self.most, sum(size for _, size in self._alive))
        return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("teachers", [0, 2])
def test_one_chunks_logits_are_gone_before_the_next_ones_come(generator, monkeypatch, dtype, teachers):
    codes, chunk = 512, 48
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", chunk * codes)
    monkeypatch.setitem(PASSED_AT_ONCE, "cpu", codes)
    most = []
    for chunks in (1, 4):
        hidden, weight, targets, weights = states(generator, chunks * chunk, 2, codes)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        answers = [Answers(hidden, Teacher(None, weight, 1.0, 2.0))] * teachers
        with Held() as held:
            head_losses(hidden, weight, targets, weights, answers)
        most.append(held.most)
    logits = chunk * codes * dtype.itemsize
    assert most[0] > logits * (1 + teachers)
    assert most[1] < most[0] + 0.3 * logits  # by what grows with the places: losses, gradients of the states


def test_masked_places_have_neither_loss_nor_gradient(generator):
    hidden, weight, targets, weights = states(generator)
    weights[3:6] = 0
    loss = head_losses(hidden.requires_grad_(), weight, targets, weights, two_teachers(generator))[0]
    loss.backward()
    assert not hidden.grad[3:6].any() and hidden.grad[:3].any()
    other = hidden.detach().clone()
    other[3:6] += 1
    assert not torch.equal(other, hidden)


def test_code_zero_is_a_target_like_any_other():
    _, ce, *_ = head_losses(torch.zeros(1, 4), torch.zeros(8, 4), torch.tensor([0]), torch.ones(1), [])
    assert ce.item() == pytest.approx(math.log(8))


def test_distillation_does_not_vanish_at_high_temperature(generator):
    """T^2 keeps the gradient's size: in the limit it is the logits' difference over the number of codes."""
    student, teacher = torch.randn(2, 1, 9, generator=generator, dtype=torch.float64)
    student.requires_grad_()
    eye, nothing = torch.eye(9, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    answers = Answers(teacher, Teacher(None, eye, 1.0, 1e4))
    both = HeadLosses.apply(student, eye, nothing, torch.ones(1), 1.0, [answers], True, True)[0]
    without = HeadLosses.apply(student, eye, nothing, torch.ones(1), 1.0, [], True, True)[0]
    (both - without).backward()
    difference = (student - teacher).detach()
    assert torch.allclose(student.grad, (difference - difference.mean()) / 9, rtol=1e-3, atol=1e-6)


def test_of_two_teachers_each_has_its_own_temperature_and_strength(generator):
    tokens, first, second = batch(generator), asked(model(1), 0.5, 2.0), asked(model(2, width=24), 1.5, 1.0, named("jsd", 0.4))
    alone = [TrainingModule(model(), TOKENS, IMAGE_TOKENS, 0.3, [one])(tokens) for one in (first, second)]
    outcome = TrainingModule(model(), TOKENS, IMAGE_TOKENS, 0.3, [first, second])(tokens)
    assert outcome.loss.item() == pytest.approx(outcome.ce.item() + 0.5 * alone[0].kd.item() + 1.5 * alone[1].kd.item(), rel=1e-5)
    assert outcome.kd.item() == pytest.approx((0.5 * alone[0].kd.item() + 1.5 * alone[1].kd.item()) / 2, rel=1e-5)
    torch.testing.assert_close(outcome.kd_NB, torch.cat([one.kd_NB for one in alone]))
    torch.testing.assert_close(outcome.entropy_N, torch.cat([one.entropy_N for one in alone]))


@pytest.mark.parametrize("image_weight", [0.0, 0.3, 1.0])
def test_module_computes_the_weighted_mean_over_all_positions(generator, image_weight):
    student, teacher, tokens = model(0), model(1, width=24), batch(generator)
    outcome = TrainingModule(student, TOKENS, IMAGE_TOKENS, image_weight, [asked(teacher, 0.5, 2.0)])(tokens)

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
    assert outcome.kd_NB[0].tolist() == pytest.approx(kd[:, labels].mean(1).tolist(), rel=1e-4)


def test_without_image_weight_images_get_no_logits(generator):
    module, seen = TrainingModule(model(), TOKENS, IMAGE_TOKENS, 0.0), []
    module.student.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    module(batch(generator))
    assert seen == [(3 * TOKENS // 2, 16)]


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
    teachers = [asked(teacher, 0.5, 2.0)] if distilled else []
    module = TrainingModule(student, TOKENS, IMAGE_TOKENS, 0.3, teachers)
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
    module, tokens = TrainingModule(model(), TOKENS, IMAGE_TOKENS, 0.3, [asked(model(1), 0.5, 2.0)]), batch(generator, 2)
    module(tokens, torch.zeros(2)).loss.backward()
    assert all(not parameter.grad.any() for parameter in module.parameters())


def test_weights_of_one_change_no_bit(generator):
    module, tokens = TrainingModule(model(), TOKENS, IMAGE_TOKENS, 0.3), batch(generator)
    assert all(torch.equal(*pair) for pair in zip(module(tokens), module(tokens, torch.ones(3)), strict=True))


def test_all_tokens_of_a_sentence_without_labels_weigh_the_same_and_as_much_as_a_sentence_of_pairs(generator):
    for image_weight in (0.0, 0.25):
        student, teacher = model().double(), model(1).double()
        module = TrainingModule(student, TOKENS, IMAGE_TOKENS, image_weight, [asked(teacher, 0.5, 2.0)], even=True)
        tokens, even = batch(generator, 3), torch.tensor([False, True, False])
        outcome = module(tokens, None, even)
        logits = student(input_ids=tokens).logits.detach()[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        weights = token_weights(TOKENS, IMAGE_TOKENS, image_weight).double()
        pairs = TrainingModule(student, TOKENS, IMAGE_TOKENS, image_weight, [asked(teacher, 0.5, 2.0)])
        wanted = [pairs(tokens[:1]).ce, nll[1].mean(), pairs(tokens[2:]).ce]
        torch.testing.assert_close(outcome.ce, sum(wanted) / 3)
        torch.testing.assert_close(outcome.target_B[1], nll[1].mean())
        torch.testing.assert_close(outcome.target_B[0], (nll[0] * (weights == 1)).sum() / (weights == 1).sum())


@pytest.mark.parametrize("even", [None, torch.tensor([False, True, False])])
def test_weights_of_a_step_take_the_place_of_the_modules_own(generator, even):
    tokens, made = batch(generator), [asked(model(1), 0.5, 2.0), asked(model(2), 2.0)]
    module = TrainingModule(model(), TOKENS, IMAGE_TOKENS, 1.0, made, even=even is not None)
    for image_weight, strengths in ((0.25, [0.0, 1.5]), (0.0, [2.0, 0.5])):
        own = [one._replace(strength=strength) for one, strength in zip(made, strengths, strict=True)]
        wanted = TrainingModule(model(), TOKENS, IMAGE_TOKENS, image_weight, own, even=even is not None)(tokens, None, even)
        found = module(tokens, None, even, torch.tensor(image_weight), torch.tensor(strengths))
        for name in ("loss", "ce", "kd", "target_B", "kd_NB"):
            torch.testing.assert_close(getattr(found, name), getattr(wanted, name), msg=name)


def test_about_its_own_answers_a_student_learns_from_the_teacher_alone(generator):
    tokens, teacher = batch(generator), model(1, width=24)
    student = model()
    module = TrainingModule(student, TOKENS, IMAGE_TOKENS, 0.3, [asked(teacher, 0.5, 2.0)])
    outcome = module(tokens, own_answers=torch.tensor(True))
    outcome.loss.backward()
    assert outcome.loss.item() == pytest.approx(0.5 * outcome.kd.item(), rel=1e-6)
    assert outcome.ce.isnan() and outcome.target_B.isnan().all()
    logits = [llama(tokens).logits[:, -IMAGE_TOKENS - 1 : -1] / 2 for llama in (student, teacher)]
    log_s, log_t = (values.log_softmax(-1) for values in logits)
    wanted = 4 * (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    assert outcome.kd.item() == pytest.approx(wanted.item(), rel=1e-4)
    gradients = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    (0.5 * wanted).backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_kept_answers_teach_what_the_teacher_would(generator):
    teacher, tokens, other = model(1, width=24), batch(generator), torch.randint(0, CODES, (3, TOKENS), generator=generator)
    for image_weight in (0.0, 0.3):
        alone = TrainingModule(teacher, TOKENS, IMAGE_TOKENS, image_weight)
        kept = Teacher(None, teacher.lm_head.weight, 0.5, 2.0)
        module = TrainingModule(model(), TOKENS, IMAGE_TOKENS, image_weight, [asked(model(2)), kept])
        outcome = module(tokens, states_1=bits(alone.states(tokens)))
        both = TrainingModule(model(), TOKENS, IMAGE_TOKENS, image_weight, [asked(model(2)), asked(teacher, 0.5, 2.0)])
        for found, wanted in zip(outcome, both(tokens), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)  # bf16
        assert not torch.allclose(outcome.kd_NB[1], module(tokens, states_1=bits(alone.states(other))).kd_NB[1], rtol=0.05)


def bits(states):
    """States of three sentences as a cache keeps them."""
    return states.detach().bfloat16().view(torch.uint16).view(3, -1)


def test_sentences_of_another_length_are_refused(generator):
    module = TrainingModule(model(), TOKENS, IMAGE_TOKENS, 0.1)
    with pytest.raises(AssertionError, match="sum of weights"):
        module(batch(generator)[:, :16])


def test_chunks_change_neither_loss_nor_gradient(generator, monkeypatch):
    tokens, teacher, outcomes = batch(generator), model(1), []
    for at_once, passed_at_once in ((2**25, 2**25), (21 * CODES, 7 * CODES)):
        monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", at_once)
        monkeypatch.setitem(PASSED_AT_ONCE, "cpu", passed_at_once)
        student = model()
        outcome = TrainingModule(student, TOKENS, IMAGE_TOKENS, 0.3, [asked(teacher, 0.5, 2.0)])(tokens)
        outcome.loss.backward()
        outcomes.append((outcome, {name: parameter.grad for name, parameter in student.named_parameters()}))
    (whole, whole_gradients), (chunked, chunked_gradients) = outcomes
    assert chunked.loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
    assert torch.allclose(chunked.target_B, whole.target_B, rtol=1e-6)
    assert chunked.entropy_N.tolist() == pytest.approx(whole.entropy_N.tolist(), rel=1e-5)
    assert chunked.agreement_N.tolist() == whole.agreement_N.tolist()
    for name, gradient in whole_gradients.items():
        assert torch.allclose(chunked_gradients[name], gradient, rtol=1e-4, atol=1e-7), name


def test_the_teacher_is_no_part_of_the_module(generator):
    student, teacher = model(), model(1)
    module = TrainingModule(student, TOKENS, IMAGE_TOKENS, 0.3, [asked(teacher)])
    assert {id(parameter) for parameter in module.parameters()} == {id(parameter) for parameter in student.parameters()}
    module(batch(generator)).loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    module.bfloat16()
    assert teacher.lm_head.weight.dtype == torch.float32


def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it(generator):
    outcome = TrainingModule(model(), TOKENS, IMAGE_TOKENS, 0.3, [asked(model(), 1.0, 2.0)])(batch(generator))
    assert outcome.kd.abs().item() < 1e-6
    assert outcome.loss.item() == pytest.approx(outcome.ce.item(), rel=1e-6)


def test_a_teacher_is_asked_about_the_sentences_that_it_teaches_alone(generator):
    """Each sentence has the factors of its task: as if it stood alone beside teachers of those strengths."""
    tokens, first, second = batch(generator), model(1), model(2, width=24)
    seen = []
    first.model.register_forward_pre_hook(lambda module, inputs, named: seen.append(len(named["input_ids"])), with_kwargs=True)
    taught = torch.tensor([[0.0, 1.0], [2.0, 0.5], [1.0, 0.0]])
    module = TrainingModule(model(), TOKENS, IMAGE_TOKENS, 0.3, [asked(first, 0.5, 2.0), asked(second)])
    outcome = module(tokens, taught_BN=taught)
    assert seen == [2], "of three sentences one is none of its business"
    outcome.loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    total, gradients = 0.0, []
    for number, (one, other) in enumerate(taught.tolist()):
        alone = TrainingModule(model(), TOKENS, IMAGE_TOKENS, 0.3, [asked(first, 0.5 * one, 2.0), asked(second, other)])
        own = alone(tokens[number : number + 1])
        own.loss.backward()
        total += own.loss.item() / 3
        gradients.append({name: parameter.grad / 3 for name, parameter in alone.named_parameters()})
        torch.testing.assert_close(outcome.kd_NB[:, number], own.kd_NB[:, 0] * taught[number], rtol=1e-4, atol=1e-6)
    assert outcome.loss.item() == pytest.approx(total, rel=1e-5)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, sum(part[name] for part in gradients), rtol=1e-3, atol=1e-6)


def test_what_nobody_is_asked_about_costs_no_teacher(generator):
    teacher = model(1)
    teacher.model.register_forward_pre_hook(lambda *inputs: pytest.fail("asked"))
    plain, tokens = TrainingModule(model(), TOKENS, IMAGE_TOKENS, 0.3), batch(generator)
    outcome = TrainingModule(model(), TOKENS, IMAGE_TOKENS, 0.3, [asked(teacher)])(tokens, taught_BN=torch.zeros(3, 1))
    assert outcome.loss.item() == pytest.approx(plain(tokens).loss.item())
    assert outcome.kd.item() == 0 and outcome.entropy_N.isnan().all() and outcome.agreement_N.isnan().all()
