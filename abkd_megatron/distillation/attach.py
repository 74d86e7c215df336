"""Attaching a teacher to a student that Megatron trains: one hook before its forward, one head in place of its loss."""

import inspect
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model

from abkd_megatron.distillation.head import OutputLayer, compute_loss, obstacle
from abkd_megatron.distillation.lane import Lane
from abkd_megatron.distillation.objective import Objective
from abkd_megatron.errors import ConfigError, HostError, on_every_rank
from abkd_megatron.vocab_parallel import VocabShard


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
        model = _checked_student(student, teacher, objective)
    lane = None
    if pg_collection.pp.size() > 1:
        lane = Lane(dist.get_process_group_ranks(pg_collection.pp), timeout)
    return Attachment(model, teacher, objective, vocab_size, pg_collection.tp, lane)


def _checked_student(
    student: torch.nn.Module | Sequence[torch.nn.Module], teacher: GPTModel, objective: Objective
) -> GPTModel:
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
        for name, layer in (("student", model.output_layer), ("teacher", teacher.output_layer)):
            if objective.head == "fused" and (why := obstacle(layer)):
                raise ConfigError(f"head: fused is not possible ({name}: {why}); give head: materialised, or auto")
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
        """Run this stage of the teacher on the student's micro-batch; on the last one, return its output layer."""
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
            output_processor=_output_layer,
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
        loss_mask: torch.Tensor | None,
        context: OutputLayer,
        compute_language_model_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        scale_logits: Callable[[torch.Tensor], torch.Tensor],
        **_: Any,
    ) -> torch.Tensor:
        """The per-token loss [b, s] from both models' hidden states; called by GPTModel."""
        student = OutputLayer(hidden_states, output_layer, output_weight, scale_logits)
        loss = compute_loss(
            student,
            context,
            self.objective,
            labels.transpose(0, 1),
            loss_mask.transpose(0, 1) if loss_mask is not None else None,
            VocabShard.megatron(student.weight.shape[0], self._tp_group, self._vocab_size),
            self._tp_group,
            lambda logits: compute_language_model_loss(labels, logits).transpose(0, 1),
        )
        self.report = {
            "lm loss": _batch_first(loss.terms.cross_entropy.detach()),
            "kd loss": _batch_first(loss.terms.divergence.detach()),
            **{name: _batch_first(value) for name, value in loss.terms.metrics.items()},
        }
        return _batch_first(loss.total)


def _output_layer(
    *,
    hidden_states: torch.Tensor,
    output_layer: torch.nn.Module,
    output_weight: torch.Tensor | None,
    scale_logits: Callable[[torch.Tensor], torch.Tensor],
    **_: Any,
) -> OutputLayer:
    """The teacher's output: not its logits, before the student's head asks for them."""
    return OutputLayer(hidden_states, output_layer, output_weight, scale_logits)


def _batch_first(per_token: torch.Tensor) -> torch.Tensor:
    """[s, b] -> contiguous [b, s], as Megatron's loss functions expect."""
    return per_token.transpose(0, 1).contiguous()
