"""Attaching a teacher to a student that Megatron trains: one hook before its forward, one head in place of its loss."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model

from abkd_megatron.distillation.lane import Lane
from abkd_megatron.divergences import Divergence
from abkd_megatron.errors import ConfigError, HostError, on_every_rank
from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_distillation


@dataclass(frozen=True)
class Objective:
    """What the student is trained on, per token: lm_weight * CE + kd_weight * D(teacher || student).

    A `kd_weight` of 0 only watches: the student trains on Megatron's own cross entropy, bit for bit as without a
    teacher, and the divergence is reported.
    """

    divergence: Divergence
    temperature: float = 1.0
    """Divides both models' logits inside the divergence. The cross entropy and the metrics stay at 1; the divergence
    is not multiplied by temperature^2."""
    kd_weight: float = 1.0
    lm_weight: float = 1.0
    gradient_in_place: bool = False
    """Whether backward overwrites the student's logits with their gradient. Nothing of Megatron reads them again; a
    hook of the user's on the output layer might."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"temperature must be a positive number, got {self.temperature}")
        for name in ("kd_weight", "lm_weight"):
            weight = getattr(self, name)
            if not (math.isfinite(weight) and weight >= 0):
                raise ConfigError(f"{name} must be a number of at least 0, got {weight}")
        if self.kd_weight == 0 and self.lm_weight == 0:
            raise ConfigError("kd_weight and lm_weight are both 0, so there is nothing to train on; raise one of them")


def attach(
    student: torch.nn.Module | Sequence[torch.nn.Module],
    teacher: GPTModel,
    objective: Objective,
    *,
    vocab_size: int,
    pg_collection: ProcessGroupCollection,
    timeout: timedelta = timedelta(minutes=10),
) -> "Attachment":
    """Attach `teacher` to `student`; from now on the student's forward returns the distillation loss.

    Works with any forward step that calls the model with labels. The student may be wrapped (DDP, Float16Module); its
    class, state dict, parameters and gradients are left alone.

    Args:
        student: this rank's model as Megatron built it: one chunk, or a list of one.
        teacher: this rank's stage, as `build_teacher` returns it: same pipeline and tensor parallelism as the student.
        objective: divergence, temperature and weights.
        vocab_size: true vocabulary size; the padded columns beyond it take part in nothing.
        pg_collection: the student's process groups; `tp` and `pp` are used.
        timeout: for the teacher's lane between pipeline stages.

    Returns:
        The handle: `report` holds the last micro-batch's numbers, `detach()` restores the student exactly.

    Raises:
        ConfigError: on every rank: a student that has a teacher already, several model chunks (interleaved schedule),
            MTP heads, or stages that do not match.
        HostError: a student without `output_processor`: not a GPTModel of megatron-core >= 0.19.

    Collectives: one all_gather_object; at PP > 1, making the lane's groups. Per micro-batch: the teacher's own, one
    message a stage, and those of `vocab_parallel_distillation`.
    """
    # Some of it shows on the last pipeline stage alone, and the others would go on into the lane's collectives.
    with on_every_rank():
        model = _checked_student(student, teacher)
    lane = None
    if pg_collection.pp.size() > 1:
        lane = Lane(dist.get_process_group_ranks(pg_collection.pp), timeout)
    return Attachment(model, teacher, objective, vocab_size, pg_collection.tp, lane)


def _checked_student(student: torch.nn.Module | Sequence[torch.nn.Module], teacher: GPTModel) -> GPTModel:
    chunks = list(student) if isinstance(student, Sequence) else [student]
    if len(chunks) != 1:
        raise ConfigError(
            f"the interleaved pipeline schedule is not supported yet: expected 1 model chunk a rank, got "
            f"{len(chunks)}; remove num-layers-per-virtual-pipeline-stage and its kin"
        )
    (model,) = unwrap_model(chunks)
    if not isinstance(model, GPTModel) or "output_processor" not in inspect.signature(model.forward).parameters:
        raise HostError(
            f"expected a GPTModel whose forward takes `output_processor` (megatron-core >= 0.19), got "
            f"{type(model).__name__}"
        )
    if any(isinstance(getattr(hook, "__self__", None), Attachment) for hook in model._forward_pre_hooks.values()):
        raise ConfigError("this student has a teacher attached already; call `detach()` on that attachment first")
    for name, config in (("student", model.config), ("teacher", teacher.config)):
        if config.mtp_num_layers:
            raise ConfigError(f"the {name} has multi-token-prediction layers, which are not supported yet; remove them")
    if (model.pre_process, model.post_process) != (teacher.pre_process, teacher.post_process):
        raise ConfigError("student and teacher must share one pipeline layout, stage by stage")
    if model.post_process:
        ours, theirs = model.output_layer.output_size_per_partition, teacher.output_layer.output_size_per_partition
        if ours != theirs:
            raise ConfigError(
                f"student and teacher must pad the vocabulary alike: {ours} columns a rank against {theirs}; "
                "give both the same make-vocab-size-divisible-by"
            )
    return model


class Attachment:
    """A teacher attached to a student.

    Attributes:
        teacher: the frozen GPTModel stage of this rank.
        objective: what the student is trained on.
        report: per-token numbers [b, s] of the last micro-batch, by the name they are logged under; None before the
            first, and on every pipeline stage but the last.
    """

    def __init__(
        self,
        student: GPTModel,
        teacher: GPTModel,
        objective: Objective,
        vocab_size: int,
        tp_group: dist.ProcessGroup,
        lane: Lane | None,
    ) -> None:
        self.teacher = teacher
        self.objective = objective
        self.report: dict[str, torch.Tensor] | None = None
        self._vocab_size = vocab_size
        self._tp_group = tp_group
        self._lane = lane
        self._signature = inspect.signature(student.forward)
        self._hook = student.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def detach(self) -> None:
        """Take the teacher off; the student is what it was before. A second call does nothing."""
        self._hook.remove()
        if self._lane is not None:
            self._lane.drain()

    def _before_forward(
        self, student: GPTModel, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        batch = self._signature.bind_partial(*args, **kwargs).arguments
        if student.post_process and batch.get("labels") is None and self._lane is None:
            return None  # not a training step: somebody wants the student's logits
        teacher_head = self._run_teacher(student, batch)
        if not student.post_process:
            return None
        return args, {**kwargs, "output_processor": self._head, "output_processor_context": teacher_head}

    @torch.no_grad()
    def _run_teacher(self, student: GPTModel, batch: dict[str, Any]) -> Any:
        """Run this stage of the teacher on the student's micro-batch; on the last one, return its deferred logits."""
        teacher = self.teacher
        if not teacher.pre_process:
            assert self._lane is not None
            # The student's own input tells how long and how wide this micro-batch is; only the width H differs.
            like = student.decoder.input_tensor
            shape = (*like.shape[:-1], teacher.config.hidden_size)
            teacher.set_input_tensor(self._lane.receive(shape, teacher.config.params_dtype, like.device))
        output = teacher(
            batch.get("input_ids"),
            batch.get("position_ids"),
            batch.get("attention_mask"),
            packed_seq_params=batch.get("packed_seq_params"),
            padding_mask=batch.get("padding_mask"),
            output_processor=_deferred_logits,
        )
        if not teacher.post_process:
            assert self._lane is not None
            self._lane.send(output)
        return output

    def _head(
        self,
        *,
        hidden_states: torch.Tensor,
        output_layer: torch.nn.Module,
        output_weight: torch.Tensor | None,
        labels: torch.Tensor,
        context: Callable[[], torch.Tensor],
        compute_language_model_loss: Any,
        scale_logits: Any,
        **_: Any,
    ) -> torch.Tensor:
        """The student's logits, the teacher's, and the per-token loss [b, s] of both; called by GPTModel."""
        objective = self.objective
        student_logits = scale_logits(output_layer(hidden_states, weight=output_weight)[0])
        with torch.no_grad():
            teacher_logits = context()

        shard = VocabShard.megatron(student_logits.shape[-1], self._tp_group, self._vocab_size)
        watch_only = objective.kd_weight == 0
        with torch.set_grad_enabled(torch.is_grad_enabled() and not watch_only):
            terms = vocab_parallel_distillation(
                student_logits,
                teacher_logits,
                objective.divergence,
                labels.transpose(0, 1),
                shard,
                temperature=objective.temperature,
                gradient_in_place=objective.gradient_in_place,
            )
        divergence = _batch_first(terms.divergence)
        if watch_only:
            # After our reading: Megatron's cross entropy overwrites fp32 logits in place.
            cross_entropy = compute_language_model_loss(labels, student_logits)
            loss = objective.lm_weight * cross_entropy
        else:
            cross_entropy = _batch_first(terms.cross_entropy)
            loss = objective.kd_weight * divergence
            if objective.lm_weight != 0:
                loss = loss + objective.lm_weight * cross_entropy
        self.report = {
            "lm loss": cross_entropy.detach(),
            "kd loss": divergence.detach(),
            **{name: _batch_first(value) for name, value in terms.metrics.items()},
        }
        return loss


def _deferred_logits(
    *,
    hidden_states: torch.Tensor,
    output_layer: torch.nn.Module,
    output_weight: torch.Tensor | None,
    scale_logits: Any,
    **_: Any,
) -> Callable[[], torch.Tensor]:
    """The teacher's output: its logits [s, b, V/TP], not computed before the student's head asks for them."""
    return lambda: scale_logits(output_layer(hidden_states, weight=output_weight)[0])


def _batch_first(per_token: torch.Tensor) -> torch.Tensor:
    """[s, b] -> contiguous [b, s], as Megatron's loss functions expect."""
    return per_token.transpose(0, 1).contiguous()
