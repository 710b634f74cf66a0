"""How far a student's distribution is from a teacher's, with the gradient written out.

Each takes the logarithms of both distributions over a vocabulary [C, V], softened by the same temperature, and gives per place

    value     nats [C]: zero where the two are equal, positive elsewhere
    gradient  [C, V]: of the value by the student's softened logits

    forward_kl  KL(teacher || student), the paper's (section 4): the student covers all that the teacher finds likely
    reverse_kl  KL(student || teacher): the student keeps to what the teacher finds likely (Gu et al. 2024)
    jsd         beta KL(teacher || M) + (1 - beta) KL(student || M) with M = beta teacher + (1 - beta) student, between the two
                (Agarwal et al. 2024, equation 1)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

Divergence = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def forward_kl(student_log_CV: torch.Tensor, teacher_log_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    teacher_CV = teacher_log_CV.exp()
    value_C = _expected(teacher_CV, teacher_log_CV) - _expected(teacher_CV, student_log_CV)
    return value_C, student_log_CV.exp().sub_(teacher_CV)


def reverse_kl(student_log_CV: torch.Tensor, teacher_log_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _of_student(student_log_CV, student_log_CV - teacher_log_CV)


def jsd(student_log_CV: torch.Tensor, teacher_log_CV: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`beta` in (0, 1). Over beta it tends to forward KL towards 0; over 1 - beta to reverse KL towards 1."""
    mixture_log_CV = torch.logaddexp(teacher_log_CV + math.log(beta), student_log_CV + math.log(1 - beta))
    of_teacher_C = _expected(teacher_log_CV.exp(), teacher_log_CV - mixture_log_CV)
    of_student_C, gradient_CV = _of_student(student_log_CV, student_log_CV - mixture_log_CV)
    return beta * of_teacher_C + (1 - beta) * of_student_C, gradient_CV.mul_(1 - beta)


def named(name: str, beta: float) -> Divergence:
    """The divergence of a recipe's name."""
    every: dict[str, Divergence] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": partial(jsd, beta=beta)}
    return every[name]


def _of_student(student_log_CV: torch.Tensor, ratio_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of a log-ratio under the student, and student x (ratio - mean): its gradient for both divergences that use it."""
    student_CV = student_log_CV.exp()
    value_C = _expected(student_CV, ratio_CV)
    return value_C, student_CV.mul_(ratio_CV.sub_(value_C[:, None]))


def _expected(weights_CV: torch.Tensor, values_CV: torch.Tensor) -> torch.Tensor:
    expected_C: torch.Tensor = torch.linalg.vecdot(weights_CV, values_CV)
    return expected_C
