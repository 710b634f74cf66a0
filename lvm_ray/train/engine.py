"""DeepSpeed behind one small object: the only file that imports it.

`Engine` takes one step over the micro batches of a global batch, with a learning rate that we set, and hands out fp32
parameters and moments by name at any ZeRO stage: that is what checkpoints and exports are made of. All workers call
each method together.

Nothing here compiles C++: users' machines have no compiler, and a compile that is killed leaves a lock on which every later
run hangs.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lvm_ray.config import Recipe
from lvm_ray.errors import UserError
from lvm_ray.recipe_sections import TrainSection
from lvm_ray.train.losses import Losses, TrainingModule

Tensors = dict[str, torch.Tensor]

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
MUON_MOMENTS = ("momentum_buffer",)
ADAM_EPSILON = 1e-8
SCALE: dict[str, Callable[[float], float]] = {"cur_scale": float, "cur_iter": int, "last_overflow_iter": int}  # of fp16's loss


class Engine:
    """A training module under DeepSpeed.

    module        its student's parameters are trained; in place, on the device and in the precision of `recipe.compute`
    recipe        resolved; its `train` section says optimizer, ZeRO stage, clipping
    accumulation  micro batches that each worker passes in a step

    bf16 and fp16 keep fp32 master weights and moments. Raises UserError where the machine does not compute the precision.
    """

    def __init__(self, module: TrainingModule, recipe: Recipe, accumulation: int) -> None:
        section, compute = recipe.train, recipe.compute
        deepspeed = _import_deepspeed(compute.device)
        _join_process_group(compute.device)
        self._section = section
        self._stage = zero_stage(section, compute.precision)
        self._clips = _clips_itself(section, self._stage)
        self._accumulation = accumulation
        self.module, self._student = module, module.student
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if compute.device == "cuda" else torch.device("cpu")
        if section.checkpoint_activations:
            module.student.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
        if compute.compile:
            for layer in module.student.model.layers:
                layer.compile()
        parameters = sum(parameter.numel() for parameter in module.parameters())
        config = deepspeed_config(section, accumulation, compute.precision, parameters)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory use
            self._engine, *_ = deepspeed.initialize(model=module, model_parameters=parameter_groups(module), config=config)
        self._names = [(name, parameter) for name, parameter in self._student.named_parameters() if parameter.requires_grad]
        self._norm = 0.0
        self._moved, self._left_out = False, 0
        self._scaler = self._engine.optimizer.loss_scaler if compute.precision == "fp16" else None
        if self._clips:
            self._engine.basic_optimizer.register_step_pre_hook(self._clip)

    def step(
        self,
        batches_BT: Sequence[torch.Tensor],
        rate_factor: float,
        check: Callable[[Sequence[Losses]], None],
        sentences: Sequence[Tensors] | None = None,
    ) -> list[Losses]:
        """Forward and backward over each micro batch (tokens int64 [B, T]), then one update at `rate_factor` x the peak rates.

        `check` sees all losses once, before they move a weight, and may raise. (Asked before each backward, it would let a GPU
        run dry.) `sentences` is what else the module's forward takes of each micro batch, by name.
        """
        assert len(batches_BT) == self._accumulation, (len(batches_BT), self._accumulation)
        self._set_rates(rate_factor)
        self._norm = 0.0
        losses: list[Losses] = []
        for tokens_BT, extra in zip(batches_BT, sentences or [{}] * len(batches_BT), strict=True):
            on_device = {name: values.to(self.device) for name, values in extra.items()}
            outcome: Losses = self._engine(tokens_BT.to(self.device), **on_device)
            self._engine.backward(outcome.loss)
            losses.append(Losses(*(value.detach() for value in outcome)))
            if len(losses) == self._accumulation:
                check(losses)
            self._step()
        self._left_out += self.overflowed
        return losses

    def _step(self) -> None:
        try:
            self._engine.step()
        except Exception as error:
            if "loss scale" not in str(error):
                raise
            raise UserError(
                "compute.precision: fp16: gradients overflow at every scale of the loss: set bf16 or fp32, or lower train.rate"
            ) from None
        self._moved = self._moved or bool(self._engine.was_step_applied())

    @property
    def overflowed(self) -> bool:
        """Whether the last step was left out, since gradients were too large for fp16: DeepSpeed lowers the scale of the loss."""
        return self._scaler is not None and not self._engine.was_step_applied()

    @property
    def loss_scale(self) -> list[float] | None:
        """In fp16 the scale of the loss, steps, the step at which it was lowered last, and steps left out; else None."""
        if self._scaler is None:
            return None
        return [*(float(getattr(self._scaler, name)) for name in SCALE), self._left_out]

    def _set_loss_scale(self, *values: float) -> None:
        for (name, kind), value in zip(SCALE.items(), values, strict=True):
            setattr(self._scaler, name, kind(value))

    def score(self, tokens_BT: torch.Tensor, sentence: Tensors | None = None) -> torch.Tensor:
        """Mean cross-entropy of each sentence's label tokens [B], without a gradient and without the teacher.

        Between two steps; the training goes on as if nothing had been asked.
        """
        self._engine.eval()
        with torch.no_grad():
            on_device = {name: values.to(self.device) for name, values in (sentence or {}).items()}
            outcome: Losses = self._engine(tokens_BT.to(self.device), **on_device)
        self._engine.train()
        return outcome.target_B

    def draw(self, prompts_BT: torch.Tensor, tokens: int, seeds: Sequence[int]) -> torch.Tensor:
        """The student's own answers int64 [B, tokens] to prompts of tokens, drawn at temperature 1; one depends on its seed."""
        from lvm_ray.model.generate import Decoder

        with self._whole():
            decoder = Decoder.of(self._student)
            answers_BKN = decoder.draw(decoder.read(prompts_BT.to(self.device)), tokens, 1, 1.0, seeds)
        return torch.from_numpy(answers_BKN[:, 0].astype(np.int64))

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """While the body works, the student's weights are whole on every worker, whatever ZeRO shares out."""
        if self._stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self._student.parameters())):
            yield

    @property
    def gradient_norm(self) -> float:
        """Norm of the last step's gradient before clipping, over all parameters, or over AdamW's with Muon."""
        return self._norm if self._clips else float(self._engine.get_global_grad_norm())

    def parameters(self) -> Tensors:
        """Every trained parameter by its name in the student: fp32, whole, the same on all workers."""
        return {name: self._full(parameter, None) for name, parameter in self._names}

    def moments(self) -> Tensors:
        """The optimizer's moments as "moment/name": fp32, whole, the same on all workers."""
        if not self._moved:  # DeepSpeed has none before the first step that moves a weight
            shapes = {name: self._full(parameter, None).shape for name, parameter in self._names}
            return {
                f"{key}/{name}": torch.zeros(shapes[name]) for name, parameter in self._names for key in self._keys(parameter)
            }
        self._link_moments()
        return {f"{key}/{name}": self._full(parameter, key) for name, parameter in self._names for key in self._keys(parameter)}

    def restore(
        self,
        parameters: Tensors,
        moments: Tensors,
        step: int,
        tokens_BT: torch.Tensor,
        sentences: Tensors | None = None,
        loss_scale: Sequence[float] | None = None,
    ) -> None:
        """Go on from a checkpoint of `step` steps.

        The module must have been built from the same parameters. tokens_BT is any micro batch, `sentences` what goes with it:
        DeepSpeed allocates its moments in the first step, so one step at rate zero goes first, and everything that it leaves is
        overwritten.
        """
        wanted = {f"{key}/{name}" for name, parameter in self._names for key in self._keys(parameter)}
        assert parameters.keys() == {name for name, _ in self._names} and moments.keys() == wanted
        if self._scaler is not None:
            self._set_loss_scale(1.0, 0, -1)  # a step that overflows would allocate nothing
        self.step([tokens_BT] * self._accumulation, 0.0, lambda losses: None, [sentences or {}] * self._accumulation)
        if self._scaler is not None and loss_scale is not None:
            *scale, left_out = loss_scale
            self._set_loss_scale(*scale)
            self._left_out = int(left_out)
        self._link_moments()
        for name, parameter in self._names:
            self._set_full(parameter, None, parameters[name])
            for key in self._keys(parameter):
                self._set_full(parameter, key, moments[f"{key}/{name}"])
        for state in self._engine.basic_optimizer.state.values():
            if "step" in state:
                moved = step - self._left_out
                state["step"] = torch.full_like(state["step"], moved) if torch.is_tensor(state["step"]) else moved

    def close(self) -> None:
        """Free DeepSpeed's buffers and hooks. The process group stays."""
        self._engine.destroy()

    def _keys(self, parameter: nn.Parameter) -> tuple[str, ...]:
        muon = self._section.optimizer == "muon" and parameter.use_muon  # type: ignore[attr-defined]
        return MUON_MOMENTS if muon else ADAM_MOMENTS

    def _set_rates(self, factor: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = factor * (self._section.muon_rate if group.get("use_muon") else self._section.rate)

    def _clip(self, optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        """Clip the gradients of AdamW's parameters to the recipe's norm, where DeepSpeed does not do it as we want.

        With ZeRO it clips after Muon has made its update orthogonal, and would shrink that to the clip too. Such an update
        has a size of its own, so only AdamW's part is clipped. ZeRO calls the optimizer once a group, with a worker's flat part
        of it: with Muon the norm is a group's own.
        """
        groups = [group for group in optimizer.param_groups if not group.get("use_muon")]
        gradients = [parameter.grad for group in groups for parameter in group["params"] if parameter.grad is not None]
        if not gradients:
            return
        square = torch.stack([gradient.float().square().sum() for gradient in gradients]).sum()
        if self._stage:
            torch.distributed.all_reduce(square)
        norm = square.sqrt().item()
        for gradient in gradients:
            gradient.mul_(min(1.0, self._section.clip / (norm + 1e-6)))
        self._norm = math.hypot(self._norm, norm)

    def _link_moments(self) -> None:
        """Show DeepSpeed the moments of all groups: it links them after the first group's first step, when others have none."""
        zero = self._engine.optimizer
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _full(self, parameter: nn.Parameter, moment: str | None) -> torch.Tensor:
        """A parameter (moment None) or one of its moments: fp32, whole, the same on all workers."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if not self._stage:
            value = parameter if moment is None else self._engine.basic_optimizer.state[parameter][moment]
        elif moment is None:
            value = safe_get_full_fp32_param(parameter)
        elif moment in MUON_MOMENTS and self._holds_whole_momenta:
            # Several workers may hold the same matrix, with equal values: the largest is any of them.
            value = torch.full(parameter.shape, -torch.inf, device=self.device)
            for held in self._held_momenta(parameter):
                value.copy_(held)
            torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
        else:
            value = safe_get_full_optimizer_state(parameter, moment)
        return value.detach().to("cpu", torch.float32, copy=True)

    def _set_full(self, parameter: nn.Parameter, moment: str | None, value: torch.Tensor) -> None:
        """The reverse of `_full`: each worker keeps its part of the value."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if not self._stage:
            (parameter if moment is None else self._engine.basic_optimizer.state[parameter][moment]).data.copy_(value)
        elif moment is None:
            safe_set_full_fp32_param(parameter, value)
        elif moment in MUON_MOMENTS and self._holds_whole_momenta:
            for held in self._held_momenta(parameter):
                held.copy_(value)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)

    @property
    def _holds_whole_momenta(self) -> bool:
        """ZeRO 1 and 2 keep Muon's momentum as whole matrices; only its bf16 form of ZeRO 1 cuts them up like all else."""
        return hasattr(self._engine.optimizer, "params_in_partition")

    def _held_momenta(self, parameter: nn.Parameter) -> list[torch.Tensor]:
        """This worker's momentum of a matrix as a view in its shape: none where its part of the weights lacks the matrix."""
        zero = self._engine.optimizer
        held = []
        for flat, matrices in zip(zero.single_partition_of_fp32_groups, zero.params_in_partition, strict=True):
            offset = 0
            for matrix in matrices:
                if matrix is parameter:
                    buffer = zero.optimizer.state[flat]["momentum_buffer"]
                    held.append(buffer[offset : offset + matrix.numel()].view_as(matrix))
                offset += matrix.numel()
        return held


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Matrices with the recipe's weight decay, vectors (norms and biases) without."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2]},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]


def deepspeed_config(section: TrainSection, accumulation: int, precision: str, parameters: int) -> dict[str, Any]:
    """DeepSpeed's own configuration for a recipe's training. `parameters` bounds the size of its buffers."""
    muon = section.optimizer == "muon"
    stage = zero_stage(section, precision)
    optimizer = {
        "torch_adam": True,
        "fused": True,
        "betas": list(section.betas),
        "eps": ADAM_EPSILON,
        "weight_decay": section.weight_decay,
    }
    if muon:
        own = {"muon_lr": section.muon_rate, "adam_lr": section.rate, "momentum": section.muon_momentum}
    else:
        own = {"lr": section.rate}
    bucket = max(parameters, 1)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": section.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "Muon" if muon else "AdamW", "params": optimizer | own},
        "gradient_clipping": 0.0 if _clips_itself(section, stage) else section.clip,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "zero_optimization": {
            "stage": stage,
            # Muon needs whole gradients, which ZeRO-3's reduce-scatter does not leave anywhere.
            "reduce_scatter": not (muon and stage == 3),
            # DeepSpeed allocates its buckets whole, and 5e8 numbers are more than a small model is.
            "reduce_bucket_size": min(bucket, 500_000_000),
            "allgather_bucket_size": min(bucket, 500_000_000),
            "overlap_comm": False,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    if section.offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        if stage == 3:
            config["zero_optimization"]["offload_param"] = {"device": "cpu"}
    if stage:
        # Gradients of several micro batches are added in fp32. A lone micro batch's need no such copy: they stay as they come,
        # and workers send each other half the bytes.
        alone = accumulation == 1 and precision == "bf16"
        config["data_types"] = {"grad_accum_dtype": "bf16" if alone else "fp32"}
    return config


def zero_stage(section: TrainSection, precision: str) -> int:
    """The ZeRO stage that runs. Stages differ in what workers share out, not in what they compute.

    DeepSpeed's stage 0 is the exception in bf16 (its losses leave the others' at the third digit) and in fp16 (gradients of
    another scale reach our clipping), so stage 1 runs instead.
    """
    return section.zero if precision == "fp32" else max(section.zero, 1)


def _clips_itself(section: TrainSection, stage: int) -> bool:
    """Whether `Engine._clip` clips: with Muon, and with ZeRO 0, where DeepSpeed does not tell the norm."""
    return section.optimizer == "muon" or stage == 0


def _import_deepspeed(device: str) -> Any:
    """DeepSpeed, told which device to use, to compile nothing and to be quiet."""
    os.environ.setdefault("DS_ACCELERATOR", device)
    # DeepSpeed asks for what its launcher sets; Ray Train sets it, this process alone does not.
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed
    from deepspeed.runtime import compiler

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # An all-reduce through shared memory that only inference uses; building it takes a compiler and a minute. (Inside
    # deepspeed.comm the name `torch` is torch itself, so the module is looked up by its full name.)
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    # Muon's functions are wrapped in torch.compile, which needs a compiler too.
    compiler.compile = lambda: lambda function: function
    return deepspeed


def _join_process_group(device: str) -> None:
    """Ray Train has made the process group of its workers; a process by itself is a group of one, without a port."""
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
