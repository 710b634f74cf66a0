"""How far a student's distribution is from a teacher's, with the gradient written out.

Each takes both distributions of some places, softened by the same temperature, and gives per place

    value     nats [C]: zero where the two are equal, positive elsewhere
    gradient  [C, V]: of the value by the student's softened logits, in memory of its own

    forward_kl  KL(teacher || student), the paper's (section 4): the student covers all that the teacher finds likely
    reverse_kl  KL(student || teacher): the student keeps to what the teacher finds likely (Gu et al. 2024)
    jsd         beta KL(teacher || M) + (1 - beta) KL(student || M) with M = beta teacher + (1 - beta) student, between the two
                (Agarwal et al. 2024, equation 1)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch


class Distribution(NamedTuple):
    """Of some places over a vocabulary: its probabilities [C, V] are exp(logits [C, V] - normaliser [C]).

    Their logarithms are never stored where a sum over them will do: what a loss costs is how often it passes over a vocabulary.
    """

    logits_CV: torch.Tensor
    probabilities_CV: torch.Tensor
    normaliser_C: torch.Tensor

    def logarithms(self) -> torch.Tensor:
        """Of the probabilities: [C, V]."""
        return self.logits_CV - self.normaliser_C[:, None]

    def entropy(self) -> torch.Tensor:
        """In nats: [C]."""
        return self.normaliser_C - _expected(self.probabilities_CV, self.logits_CV)


Divergence = Callable[[Distribution, Distribution], tuple[torch.Tensor, torch.Tensor]]


def distribution(logits_CV: torch.Tensor, temperature: float = 1.0) -> Distribution:
    """softmax(logits / temperature). At temperature 1 it keeps the logits themselves."""
    softened_CV = logits_CV if temperature == 1 else logits_CV * (1 / temperature)
    probabilities_CV = softened_CV.softmax(dim=-1)
    # The largest probability is at least 1 / V: unlike a sum of exponentials, this takes no further exponential.
    normaliser_C = softened_CV.amax(dim=-1) - probabilities_CV.amax(dim=-1).log()
    return Distribution(softened_CV, probabilities_CV, normaliser_C)


def of_logarithms(log_CV: torch.Tensor) -> Distribution:
    """The distribution whose probabilities have these logarithms."""
    return Distribution(log_CV, log_CV.exp(), log_CV.new_zeros(len(log_CV)))


def forward_kl(student: Distribution, teacher: Distribution) -> tuple[torch.Tensor, torch.Tensor]:
    likelier_CV = (teacher.logits_CV - student.logits_CV).mul_(teacher.probabilities_CV)
    value_C = likelier_CV.sum(dim=-1) - (teacher.normaliser_C - student.normaliser_C)
    # Into memory that a core's cache still holds: what is there has been summed up.
    return value_C, torch.sub(student.probabilities_CV, teacher.probabilities_CV, out=likelier_CV)


def reverse_kl(student: Distribution, teacher: Distribution) -> tuple[torch.Tensor, torch.Tensor]:
    return _of_student(student, student.logarithms().sub_(teacher.logarithms()))


def jsd(student: Distribution, teacher: Distribution, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`beta` in (0, 1). Over beta it tends to forward KL towards 0; over 1 - beta to reverse KL towards 1."""
    student_log_CV, teacher_log_CV = student.logarithms(), teacher.logarithms()
    mixture_log_CV = torch.logaddexp(teacher_log_CV + math.log(beta), student_log_CV + math.log(1 - beta))
    of_teacher_C = _expected(teacher.probabilities_CV, teacher_log_CV.sub_(mixture_log_CV))
    of_student_C, gradient_CV = _of_student(student, student_log_CV.sub_(mixture_log_CV))
    return beta * of_teacher_C + (1 - beta) * of_student_C, gradient_CV.mul_(1 - beta)


def named(name: str, beta: float) -> Divergence:
    """The divergence of a recipe's name."""
    every: dict[str, Divergence] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": partial(jsd, beta=beta)}
    return every[name]


def _of_student(student: Distribution, ratio_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of a log-ratio under the student, and student x (ratio - mean): its gradient for both divergences that use it."""
    value_C = _expected(student.probabilities_CV, ratio_CV)
    return value_C, ratio_CV.sub_(value_C[:, None]).mul_(student.probabilities_CV)


def _expected(weights_CV: torch.Tensor, values_CV: torch.Tensor) -> torch.Tensor:
    expected_C: torch.Tensor = torch.linalg.vecdot(weights_CV, values_CV)
    return expected_C
