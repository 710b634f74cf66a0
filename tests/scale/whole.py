"""All stages together: hours and dollars."""

from __future__ import annotations

from dataclasses import dataclass

from lvm_ray import estimate
from tests.scale.data import tokenizing
from tests.scale.inputs import value
from tests.scale.training import training
from tests.scale.workload import HOUR, gpu_rate, operations, runs

TEST_ITEMS = 30_000  # three tasks


def evaluation_hours(gpus: int) -> float:
    """Answers of 256 tokens to prompts of 1,792, `evaluate.batch` at once: products while it reads, memory while it writes."""
    teacher, student = runs(8)
    seconds = 0.0
    for run in (teacher, student):
        prompt = run.sentence_tokens - run.image_tokens
        read = prompt * operations(run) / 3 / gpu_rate()
        weights = 2 * estimate.trained_parameters(run.model, run.tokenizer.codes)
        cache = 2 * 2 * run.model.layers * run.model.width * run.sentence_tokens * run.evaluate.batch
        write = run.image_tokens * (weights + cache) / (value("gpu_memory_rate") * 0.5) / run.evaluate.batch
        seconds += TEST_ITEMS * (read + write)
    return seconds / gpus / HOUR


def dollars(hours: float, gpus: int) -> float:
    return hours * gpus * value("gpu_hour")


@dataclass(frozen=True)
class Plan:
    """Hours of each stage on so many GPUs."""

    tokenize: float
    teacher: float
    student: float
    evaluate: float

    @property
    def total(self) -> float:
        return self.tokenize + self.teacher + self.student + self.evaluate


def whole(gpus: int, changed: bool) -> Plan:
    teacher, student = runs(gpus)
    return Plan(
        tokenize=tokenizing(gpus, changed).total,
        teacher=training(teacher, gpus, changed=changed).total,
        student=training(student, gpus, teacher, changed=changed).total,
        evaluate=evaluation_hours(gpus),
    )
