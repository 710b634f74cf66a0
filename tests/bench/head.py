"""Cross-entropy and distillation from hidden states, forward and backward, one way: our chunked function or the naive one.

    python -m tests.bench.head ours|naive bf16|fp32 THREADS

The naive way holds all logits of both models: a linear layer each, cross_entropy, kl_div of log_softmax, autograd for the rest.
Prints {"seconds": of each of 3 times after a first, "bytes": most memory beyond the inputs}.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from lvm_ray.train.head import Answers, HeadLosses, Teacher

PLACES, CODES, WIDTH, TEMPERATURE = 32_768, 8_192, 768, 2.0


def main() -> None:
    way, precision, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    student_PD, teacher_PD = (torch.randn(PLACES, WIDTH).to(dtype) for _ in range(2))
    student_VD, teacher_VD = ((torch.randn(CODES, WIDTH) / WIDTH**0.5).to(dtype) for _ in range(2))
    targets_P, weights_P = torch.randint(0, CODES, (PLACES,)), torch.ones(PLACES)
    student_PD.requires_grad_()
    student_VD.requires_grad_()
    answers = [Answers(teacher_PD, Teacher(None, teacher_VD, 1.0, TEMPERATURE))]

    def ours() -> torch.Tensor:
        loss: torch.Tensor = HeadLosses.apply(student_PD, student_VD, targets_P, weights_P, PLACES, answers, True, True)[0]
        return loss

    def naive() -> torch.Tensor:
        student_PV = (student_PD @ student_VD.T).float()
        with torch.no_grad():
            teacher_PV = (teacher_PD @ teacher_VD.T).float()
        softened = ((logits_PV / TEMPERATURE).log_softmax(dim=-1) for logits_PV in (student_PV, teacher_PV))
        kd = TEMPERATURE**2 * F.kl_div(*softened, reduction="batchmean", log_target=True)
        return F.cross_entropy(student_PV, targets_P) + kd

    function: Callable[[], torch.Tensor] = {"ours": ours, "naive": naive}[way]
    before, seconds = _peak(), []
    for _ in range(4):
        student_PD.grad = student_VD.grad = None
        began = time.perf_counter()
        loss = function()
        loss.backward()  # type: ignore[no-untyped-call]
        seconds.append(time.perf_counter() - began)
    print(json.dumps({"seconds": seconds[1:], "bytes": _peak() - before, "loss": loss.item()}))


def _peak() -> int:
    """The most memory that this process ever held, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found.group(1))


if __name__ == "__main__":
    main()
