"""Attachment of a teacher to a student: a hook before the student's forward, and a head in place of its loss."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection

from abkd_megatron import kernels
from abkd_megatron.data.aligned_text import AlignedText
from abkd_megatron.errors import ConfigError, on_every_rank
from abkd_megatron.losses.objective import Objective, ScheduledObjective
from abkd_megatron.losses.schedule import Progress
from abkd_megatron.student.ahead import AheadLosses
from abkd_megatron.student.cached import CachedBatch, CachedTeacher, means_over
from abkd_megatron.student.chunked import Sums, side_of, teacher_batch
from abkd_megatron.student.head import batch_first, positions_of
from abkd_megatron.student.hidden import HiddenLosses, Layers, check_pairs, layers_of_stages
from abkd_megatron.student.mixing import Mixing
from abkd_megatron.student.partly_cached import PartlyCachedBatch
from abkd_megatron.student.plan import Plan, agree, propose_plan
from abkd_megatron.student.planned import PlannedForward, is_planned
from abkd_megatron.student.report import LossChecks, Report, StepObserver, ValidationSets, masked_loss
from abkd_megatron.student.sides import TeacherSide, compute_loss_of, numbers_of
from abkd_megatron.student.supported import (
    check_cacheable,
    check_own_vocabulary,
    check_partly_cached,
    check_positions,
    check_predictions_ahead,
    check_several_teachers,
    check_shared_vocab,
    check_sources_given,
    check_text,
    check_tokens,
    checked_student,
    log_restrictions,
    warn_of_mtp_losses,
)
from abkd_megatron.student.teacher_passes import TeacherPasses
from abkd_megatron.teacher.build import Teacher
from abkd_megatron.teacher.model import Model, process_output
from abkd_megatron.teacher.output_layer import OutputLayer
from abkd_megatron.teacher.teachers import Teachers
from abkd_megatron.vocab_parallel import VocabShard
from abkd_megatron.vocab_parallel.execution import Execution


def attach(
    student: torch.nn.Module | Sequence[torch.nn.Module],
    teacher: Teacher | Teachers | CachedTeacher,
    objective: Objective | ScheduledObjective,
    *,
    vocab_size: int,
    pg_collection: ProcessGroupCollection,
    timeout: timedelta = timedelta(minutes=10),
    execution: Execution | None = None,
    tokens: int | None = None,
    seed: int = 0,
    cache: CachedTeacher | None = None,
) -> "Attachment":
    """Attach `teacher` to `student`, whose forward then returns the distillation loss.

    Works with any forward step that calls the model with labels. The student may be wrapped (DDP, Float16Module); its
    class, state dict, parameters and gradients are left alone.

    Args:
        student: this rank's model as Megatron built it: one chunk, or the list of its virtual pipeline stages.
        teacher: this rank's share, as `build_teacher` returns it; several of them by data source; or a cache.
        objective: what is trained. A scheduled one needs `Attachment.on_step` before every step.
        vocab_size: the student's vocabulary size without padding. Padded columns are excluded from the loss.
        pg_collection: the student's process groups. `tp` is used; `cp` for tokens selected by position; `pp` for
            hidden losses.
        timeout: of the teacher's messages between ranks.
        execution: how the loss is computed; None for `Execution()`.
        tokens: s * b of a micro-batch on this rank, by which ``head: auto`` is decided. None: fused where possible.
        seed: of mixed sequences.
        cache: of the sequences of `Teachers.cached`.

    Returns:
        The handle. Call its `on_step` before each step, return its `loss_func` from the forward step, and give the
        model `labels` and `loss_mask`. With a part of a vocabulary shared, the last pipeline stage needs the input ids
        too; with hidden losses, every stage that holds one needs the loss mask.

    Raises:
        ConfigError: on every rank, for a student that already has a teacher, an unsupported feature, vocabularies
            padded differently, gathered logits (``parallel_output=False``), a `shared_vocab` that is not supported
            here, hidden losses without their layers or projectors, or what does not go with several teachers. At the
            first micro-batch, for a stage with a hidden loss and no loss mask.
        HostError: a student that is neither a GPTModel nor a HybridModel of megatron-core >= 0.19.

    Collectives: three all_gather_object (five with hidden losses), and those that create the groups for messages. Per
    micro-batch: the teacher's own, its messages, and those of `vocab_parallel_distillation`, of each logit loss and of
    `HiddenLosses`.
    """
    scheduled = objective if isinstance(objective, ScheduledObjective) else ScheduledObjective(objective, {})
    objective = scheduled.objective
    teachers = Teachers(teacher) if isinstance(teacher, Teacher) else teacher
    # Some errors occur only on the last pipeline stage; the other ranks must not go on to create groups.
    with on_every_rank():
        check_shared_vocab(objective, vocab_size, pg_collection.cp.size())
        check_tokens(objective, vocab_size)
        check_own_vocabulary(objective, teachers)
        execution = (execution or Execution()).resolve(scheduled)
        if isinstance(teachers, CachedTeacher):
            check_cacheable(scheduled, teachers.layout.draws)
        else:
            check_several_teachers(objective, teachers.count)
            check_partly_cached(scheduled, teachers, cache, execution, pg_collection.cp.size())
        chunks = checked_student(student, teachers, objective, pg_collection)
        hooks = [hook for model in chunks for hook in model._forward_pre_hooks.values()]
        if any(isinstance(getattr(hook, "__self__", None), Attachment) for hook in hooks):
            raise ConfigError("this student has a teacher attached already; call `detach()` on that attachment first")
        check_predictions_ahead(objective, chunks[0].config)
        check_positions(objective)
    stages = {}
    if objective.hidden_losses:
        assert isinstance(teachers, Teachers)
        stages = layers_of_stages(chunks, teachers.default, pg_collection)
        with on_every_rank():
            check_pairs(chunks, teachers.default, objective.hidden_losses, stages)
    warn_of_mtp_losses(chunks[0].config, getattr(pg_collection, "dp_cp", None))
    log_restrictions(objective, vocab_size)
    proposed = None
    with on_every_rank():
        if (last := chunks[-1]).post_process:
            weight = last.output_layer.weight
            if last.share_embeddings_and_output_weights:
                weight = last.shared_embedding_or_output_weight()
            shard = VocabShard.megatron(weight.shape[0], pg_collection.tp, vocab_size)
            heads = [of.head for of in teachers.distinct] if isinstance(teachers, Teachers) else []
            proposed = propose_plan(last.output_layer, heads, weight, objective, execution, shard, tokens=tokens)
    return Attachment(
        *(chunks, teachers, scheduled, execution, vocab_size, pg_collection, timeout, stages, seed, cache),
        plan=agree(proposed),
    )


class Attachment:
    """A teacher attached to a student.

    Attributes:
        teacher: the frozen teacher's share of this rank, or a cache; of several teachers the default.
        teachers: all of them; None with a cache only.
        cache: the cache, of all sequences or of `Teachers.cached`; None without one.
        passes: of the teachers; None with a cache only.
        plan: how the loss is computed, the same on every rank of the job.
        objective: what the student is trained on, in the current step.
        execution: how the loss is computed.
        scheduled: scheduled numbers of the current step, by name.
        progress: of the current training step; None before the first.
        is_own_text: whether the current step is on the student's own text.
        observers: called at every training step and micro-batch; preflight adds one.
        needs_input_ids: whether the last pipeline stage needs the input ids.
        report: per-token numbers [b, s] of the last micro-batch, by logged name; only on the last pipeline stage.
        loss_mask: [b, s] of the last micro-batch, on the last pipeline stage; None if the model got none.
        sources: [b] int64, dataset of each sequence of the next micro-batch, on the last stage. If `needs_sources`, set
            it before the model runs, which takes it.
        validation_sets: of the rows of the last micro-batch, for its report; None for none.
        text: of the next micro-batch, in the tokens of a teacher with another tokenizer. Set it before the model runs.
        lm_weights, kd_weights: [b, s] of the next micro-batch, by which its tokens' terms are multiplied; taken alike.
    """

    def __init__(
        self,
        chunks: Sequence[Model],
        teachers: Teachers | CachedTeacher,
        objective: ScheduledObjective,
        execution: Execution,
        vocab_size: int,
        pg_collection: ProcessGroupCollection,
        timeout: timedelta,
        stages: Mapping[int, Layers],
        seed: int,
        cache: CachedTeacher | None,
        plan: Plan | None,
    ) -> None:
        self.teacher: Teacher | CachedTeacher = teachers.default if isinstance(teachers, Teachers) else teachers
        self.teachers = teachers if isinstance(teachers, Teachers) else None
        self.cache = teachers if isinstance(teachers, CachedTeacher) else cache
        self.plan = plan
        self.objective = self._of_data = objective.objective
        self.execution = execution
        self.is_own_text = self._is_paused = False
        self.observers: list[StepObserver] = []
        self.scheduled: dict[str, float] = {}
        self.progress: Progress | None = None
        self._scheduled_objective = objective
        self.needs_input_ids = self.objective.shares_part_of(vocab_size)
        self.report: dict[str, torch.Tensor] | None = None
        self.loss_mask: torch.Tensor | None = None
        self.sources: torch.Tensor | None = None
        self.validation_sets: ValidationSets | None = None
        self.text: AlignedText | None = None
        self.lm_weights: torch.Tensor | None = None
        self.kd_weights: torch.Tensor | None = None
        self._tensors: dict[str, torch.Tensor] = {}
        self._sums: Sums = {}
        self._vocab_size = vocab_size
        self._tp_group = pg_collection.tp
        self._cp_group: dist.ProcessGroup | None = getattr(pg_collection, "cp", None)
        self.passes = TeacherPasses(chunks, teachers, timeout) if isinstance(teachers, Teachers) else None
        self._is_single_stage = chunks[0].pre_process and chunks[0].post_process
        self._signature = inspect.signature(chunks[0].forward)
        # The first chunk sees its micro-batches in order, and so does the last one; other chunks may run in between.
        self._hooks = [chunks[0].register_forward_pre_hook(self._run_teacher, with_kwargs=True)]
        if chunks[-1].post_process:
            self._hooks += process_output(chunks[-1], self._head_context, self._head)
        if is_planned(chunks[0]):
            self._hooks.append(PlannedForward(chunks[0], self._run_teacher, self._head_context, self._head))
        self._mixing = None
        if self.objective.mix is not None:
            assert isinstance(teachers, Teachers)
            self._mixing = Mixing(chunks[0], teachers.default.layout, self.objective.mix, seed)
            self._hooks += self._mixing.hooks
        self._ahead = None
        if self.objective.mtp_weight and chunks[-1].post_process:
            self._ahead = AheadLosses(chunks[-1])
            self._hooks.append(self._ahead.hook)
        self._hidden = None
        if losses := self.objective.hidden_losses:
            assert isinstance(teachers, Teachers)
            self._hidden = HiddenLosses(
                chunks, teachers.default, losses, stages, pg_collection.tp, self._logits_are_wanted, timeout
            )

    def on_step(self, progress: Progress, *, training: bool = True, own_lm_weight: float | None = None) -> None:
        """Begin a step: call it on every rank before the step's first micro-batch; more calls within a step do nothing.

        Args:
            progress: what was trained on before this step, the same on every rank. Schedules take their values from it.
            training: False for validation, which keeps the values of the training step before it, if there was one.
            own_lm_weight: `lm_weight` of a step on text of the student, whose labels are its own; None: on data.

        Raises:
            ConfigError: a training step on data, with a loss that estimates a divergence from own text.
        """
        if training:
            check_text(self._of_data, is_own=own_lm_weight is not None)
            for observer in self.observers:
                observer.begin(is_first=progress.iteration == progress.samples == 0)
        is_new = progress != self.progress and (training or self.progress is None)
        if is_new:
            for of in (self.passes, self._hidden):
                if of is not None:
                    of.drain()
            if self._mixing is not None:
                self._mixing.begin(progress.iteration)
            if self.passes is not None:
                self.passes.num_steps += training
            self.progress = progress
            self._of_data = self._scheduled_objective.at(progress)
            self.scheduled = self._scheduled_objective.values(progress)
        if is_new or (own_lm_weight is not None) != self.is_own_text:
            self.is_own_text = own_lm_weight is not None
            of_step = self._of_data
            self.objective = of_step.on_data() if own_lm_weight is None else replace(of_step, lm_weight=own_lm_weight)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run the student in this block as if no teacher were attached, on any pipeline stage."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def run_teacher_again(self, batch: Mapping[str, Any], number: int = 0) -> torch.Tensor | None:
        """Return a teacher's hidden states of the last micro-batch, which had these arguments here; see `again`."""
        assert self.passes is not None
        with torch.no_grad(), self._hidden.untouched() if self._hidden is not None else nullcontext():
            return self.passes.again(batch, number)

    def detach(self) -> None:
        """Detach the teacher, with projectors, and restore the student. Idempotent.

        A Megatron optimizer that was built with projectors cannot continue.
        """
        for hook in self._hooks:
            hook.remove()
        if self._hidden is not None:
            self._hidden.remove()
        if self.passes is not None:
            self.passes.close()

    def loss_func(
        self, loss_mask: torch.Tensor, output_tensor: torch.Tensor, checks: LossChecks | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Return what Megatron's schedules expect of a loss function, for the last micro-batch; see `masked_loss`.

        A forward step returns ``output, partial(attachment.loss_func, loss_mask)``.

        Args:
            loss_mask: [b, s], 1 where a token counts.
            output_tensor: [b, s], the loss per token as the student returned it.
            checks: of the losses; None for `LossChecks()`.
        """
        assert self.report is not None
        of_all = self.execution.diagnostics and not torch.is_grad_enabled()
        report = Report(
            self.report,
            sums=self._sums,
            hidden=self.hidden or {},
            scheduled=self.scheduled,
            teacher_seconds=self.passes.pop_seconds if self.passes is not None else lambda: None,
            tensors=self._pop_tensors(),
            **means_over(self.cache, self.objective, of_all, self.teachers is not None),
        )
        loss, num_tokens, logged = masked_loss(loss_mask, output_tensor, report, checks, self.validation_sets)
        for observer in self.observers if not self.is_own_text else ():
            observer.note_losses(logged)
        return loss, num_tokens, logged

    def _pop_tensors(self) -> dict[str, torch.Tensor]:
        """Return both models' last hidden states of the last micro-batch, and forget them.

        [s, b, h] each, or this rank's [s/TP, b, h]. Statistics of them are written where a loss is not finite.
        """
        tensors, self._tensors = self._tensors, {}
        return tensors

    @property
    def needs_sources(self) -> bool:
        """Whether the last pipeline stage needs `sources`: for weights by source, or for several teachers."""
        return bool(self.objective.sources) or (self.teachers is not None and self.teachers.count > 1)

    @property
    def max_queued_microbatches(self) -> int:
        """Peak of micro-batches whose teacher hidden states waited here: 1, or a group of virtual pipeline stages."""
        return self.passes.max_queued_microbatches if self.passes is not None else 0

    @property
    def max_queued_bytes(self) -> int:
        """Peak of their bytes; of a teacher s * b * H / (TP if sequence parallel) numbers per micro-batch."""
        return self.passes.max_queued_bytes if self.passes is not None else 0

    @property
    def num_in_flight(self) -> int:
        """Number of the teacher's messages that this rank has started and that are not known to have arrived."""
        return sum(of.num_in_flight for of in (self.passes, self._hidden) if of is not None)

    @property
    def hidden(self) -> dict[str, tuple[float, torch.Tensor]] | None:
        """{name: (weight, sum over counted tokens)} of the last micro-batch's added losses, on the last stage."""
        reports = [of.report for of in (self._hidden, self._ahead) if of is not None and of.report is not None]
        return reports[0] | reports[-1] if reports else None

    @property
    def needs_loss_mask(self) -> set[int | None]:
        """Virtual stages of this rank (None: its only one) that need the loss mask for hidden losses."""
        return self._hidden.stages_with_mask if self._hidden is not None else set()

    @property
    def max_queued_layer_outputs(self) -> int:
        """Peak number of micro-batches whose outputs of a teacher layer waited for the student's layer."""
        return self._hidden.max_queued_microbatches if self._hidden is not None else 0

    def _run_teacher(self, student: Model, args: tuple, kwargs: dict[str, Any]) -> None:
        batch = self._signature.bind_partial(*args, **kwargs).arguments
        if self._logits_are_wanted(batch):
            return
        if (self._scheduled_objective.schedules or self._mixing is not None) and self.progress is None:
            raise ConfigError(
                "schedules and mixed sequences need the training progress: call attachment.on_step() before each step"
            )
        if self.passes is not None:
            batch = teacher_batch(self.objective, self.text, batch)
            self.passes.run(batch, self._mixing.next(batch) if self._mixing is not None else None)

    def _head_context(self, args: tuple, kwargs: dict[str, Any]) -> TeacherSide | None:
        """Return the teacher's side of the next micro-batch's loss; None where the model was called for logits."""
        if self._logits_are_wanted(self._signature.bind_partial(*args, **kwargs).arguments):
            return None
        if isinstance(self.teacher, CachedTeacher):
            return self.teacher.take()
        assert self.passes is not None and self.teachers is not None
        output = self.passes.take(self.sources)
        if self.cache is not None:
            assert self.passes.numbers is not None
            is_cached = self.passes.numbers == len(self.teachers.distinct)
            return PartlyCachedBatch.take(output, self.cache, is_cached, self.passes.any_cached)
        text, self.text = self.text, None
        assert output is not None
        return side_of(output, text, self._tp_group, self.teacher.vocab_size)

    def _logits_are_wanted(self, batch: dict[str, Any]) -> bool:
        """Return whether the model was called for logits: a single pipeline stage without labels, or `paused`."""
        return self._is_paused or (self._is_single_stage and batch.get("labels") is None)

    def _head(
        self,
        *,
        hidden_states: torch.Tensor,
        output_layer: torch.nn.Module,
        output_weight: torch.Tensor | None,
        labels: torch.Tensor,
        loss_mask: torch.Tensor | None,
        input_ids: torch.Tensor | None,
        context: TeacherSide,
        compute_language_model_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        scale_logits: Callable[[torch.Tensor], torch.Tensor],
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Compute the per-token loss [b, s] from both models' hidden states; see `process_output`."""
        self.loss_mask = loss_mask
        self._tensors = {"student hidden states": hidden_states.detach()}
        if not isinstance(context, CachedBatch):
            self._tensors |= context.named_hidden_states("teacher")
        student = OutputLayer(hidden_states, output_layer, output_weight, scale_logits)
        sources, self.sources = self.sources, None
        own_weights = [it.transpose(0, 1) if it is not None else None for it in (self.kd_weights, self.lm_weights)]
        self.kd_weights = self.lm_weights = None
        check_sources_given(self.objective, sources)
        sequence_group = (packed_seq_params is not None and packed_seq_params.cp_group) or self._cp_group
        assert self.plan is not None
        of_tokens: dict[str, Any] = {
            "labels": labels.transpose(0, 1),
            "loss_mask": loss_mask.transpose(0, 1) if loss_mask is not None else None,
            "shard": VocabShard.megatron(student.weight.shape[0], self._tp_group, self._vocab_size),
            "tp_group": self._tp_group,
            "megatron_cross_entropy": lambda logits: compute_language_model_loss(labels, logits).transpose(0, 1),
            "positions": positions_of(self.objective.tokens, labels.shape[1], packed_seq_params, sequence_group),
            "sources": sources,
            "cp_group": sequence_group,
            **dict(zip(("kd_weights", "lm_weights"), own_weights, strict=True)),
            "chunk_tokens": self.plan.chunk_tokens,
            "gradient_in_place": self.execution.gradient_in_place,
        }
        with kernels.using(self.plan.choice):
            if self._ahead is not None:
                assert isinstance(context, OutputLayer)
                student = self._ahead.add(student, context, self.objective, packed_seq_params, of_tokens)
            of_live = {"diagnostics": self.execution.diagnostics, "is_drawn": self.is_own_text}
            read = input_ids.transpose(0, 1) if input_ids is not None else None
            loss, self._sums = compute_loss_of(student, context, self.objective, of_tokens, input_ids=read, **of_live)
        self.report = numbers_of(loss, context, self.objective, of_tokens["labels"])
        return batch_first(loss.total)
