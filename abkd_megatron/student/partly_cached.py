"""Loss of a micro-batch of which some sequences have a live teacher and others a cache.

One loss per token, from the token's own form of its teacher. Where the host knows that all sequences have one form, the
loss is that form's.

Legend: s sequence, b micro-batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from abkd_megatron.losses.objective import Objective
from abkd_megatron.student.cached import CachedBatch, CachedTeacher, compute_cached_loss
from abkd_megatron.student.head import (
    Loss,
    compute_loss,
    fused_options,
    scaled,
    sum_of,
    teacher_entropy,
    weights_of_terms,
)
from abkd_megatron.student.plan import run_pre_forward_hooks
from abkd_megatron.teacher.output_layer import OutputLayer, TeacherOutput
from abkd_megatron.vocab_parallel import (
    DistillationTerms,
    VocabShard,
    vocab_parallel_distillation,
    vocab_parallel_distillation_head,
    vocab_parallel_record_distillation,
)
from abkd_megatron.vocab_parallel.mixed_passes import merged_terms
from abkd_megatron.vocab_parallel.teacher_records import BUCKETED_KL, SAMPLED_KL
from abkd_megatron.vocab_parallel.terms import METRICS
from abkd_megatron.vocab_parallel.transfer import to_device


class PartlyCachedBatch(NamedTuple):
    """The teachers' side of a micro-batch."""

    teacher: TeacherOutput | None
    """Of the live teachers; None where all sequences are known to have a cache."""
    cached: CachedBatch | None
    """Records; None where no sequence is known to have a cache."""
    is_cached: Tensor
    """[b] bool, the sequences whose teacher is a cache."""
    cache: CachedTeacher

    @classmethod
    def take(
        cls, teacher: TeacherOutput | None, cache: CachedTeacher, is_cached: Tensor, any_cached: bool
    ) -> "PartlyCachedBatch":
        """Build it from the outputs of the live teachers, and the records of the next micro-batch.

        Raises:
            ConfigError: there are no records.
        """
        records = cache.take(of_all=teacher is None)
        return cls(teacher, records if any_cached else None, is_cached, cache)

    def named_hidden_states(self, who: str) -> dict[str, Tensor]:
        """Return the live teachers' hidden states by a name that starts with `who`."""
        return self.teacher.named_hidden_states(who) if self.teacher is not None else {}

    def has_record(self, labels: Tensor) -> Tensor:
        """Return [s, b] bool, the tokens that train from a record.

        Args:
            labels: [s, b].
        """
        whole = self.is_cached.expand(labels.shape)
        if self.cached is None or self.cached.cached is None:
            return whole
        return whole & self.cached.cached


def compute_partly_cached_loss(
    student: OutputLayer,
    batch: PartlyCachedBatch,
    objective: Objective,
    labels: Tensor,
    loss_mask: Tensor | None,
    shard: VocabShard,
    tp_group: dist.ProcessGroup,
    megatron_cross_entropy: Callable[[Tensor], Tensor],
    positions: Tensor | None = None,
    sources: Tensor | None = None,
    cp_group: dist.ProcessGroup | None = None,
    **options: Any,
) -> Loss:
    """Compute the objective's loss; see `compute_loss` for the arguments.

    Metrics that compare with a teacher, or are its own, are of each token's own teacher. ``kl to teacher`` is 0 at
    tokens of a cache, ``bucketed kl to teacher`` (with draws ``sampled kl to teacher``) at tokens of a live teacher.
    All are 0 at tokens that are not selected by position, or whose record is missing.

    Collectives: those of `compute_loss`, then those of `compute_cached_loss`; only one of them where the host knows
    that all sequences have one form of a teacher.
    """
    given = (labels, loss_mask, shard, tp_group, megatron_cross_entropy)
    if batch.cached is None:
        assert batch.teacher is not None
        loss = compute_loss(student, batch.teacher, objective, *given, None, positions, sources, cp_group, **options)
    elif batch.teacher is None:
        loss = compute_cached_loss(student, batch.cached, objective, *given, positions, sources, cp_group, **options)
    else:
        loss = _of_both(student, batch, objective, *given, positions, sources, cp_group, **options)
    return _complete(loss, batch.cache, objective)


def _of_both(
    student: OutputLayer,
    batch: PartlyCachedBatch,
    objective: Objective,
    labels: Tensor,
    loss_mask: Tensor | None,
    shard: VocabShard,
    tp_group: dist.ProcessGroup,
    megatron_cross_entropy: Callable[[Tensor], Tensor],
    positions: Tensor | None,
    sources: Tensor | None,
    cp_group: dist.ProcessGroup | None,
    *,
    kd_weights: Tensor | None,
    lm_weights: Tensor | None,
    chunk_tokens: int | None,
    gradient_in_place: bool,
) -> Loss:
    """Compute the loss of a micro-batch that may have sequences of both forms."""
    assert batch.teacher is not None and batch.cached is not None
    tokens, records, is_cached = objective.tokens, batch.cached.records, batch.is_cached.expand(labels.shape)
    # Tokens with a distribution to compare with; None for all.
    taught = batch.has_record(labels) | ~is_cached if batch.cache.on_miss == "lm" else None
    if tokens is not None and tokens.by_position:
        assert positions is not None
        at = to_device(tokens.at(positions.cpu()).unsqueeze(-1).expand(labels.shape), labels.device)
        taught = at if taught is None else at & taught
    counted = loss_mask != 0 if loss_mask is not None else None
    if taught is not None:
        counted = taught if counted is None else taught & counted
    kd_weight, lm_weight = weights_of_terms(objective, sources, (kd_weights, lm_weights), labels)
    by_rank = tokens is not None and tokens.by_rank
    distilled = taught
    if chunk_tokens is not None:
        run_pre_forward_hooks(student.layer)
        operands = batch.teacher.operands(tp_group)
        if by_rank:
            assert tokens is not None and records.entropy is not None
            entropy = teacher_entropy(operands, labels, shard, chunk_tokens)
            entropy = torch.where(is_cached, records.entropy.view(labels.shape).to(entropy.dtype), entropy)
            distilled = tokens.ranked(entropy, counted, cp_group)
        (teacher_hidden, teacher_weight, teacher_scale), *more = operands
        total, terms = vocab_parallel_distillation_head(
            student.whole_hidden_states(tp_group),
            student.weight,
            teacher_hidden,
            teacher_weight,
            objective.effective_divergence,
            labels,
            shard,
            teacher_scale=teacher_scale,
            more_teachers=more,
            records=(records, is_cached),
            select=tokens.of if tokens is not None and not (tokens.by_position or by_rank) else None,
            **fused_options(student, objective, (kd_weight, lm_weight), loss_mask, chunk_tokens, distilled),
        )
    else:
        logits = student.logits()
        with torch.no_grad():
            teacher_logits = batch.teacher.logits()
        compared = (objective.effective_divergence, labels, shard, objective.temperature)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not objective.only_watches):
            live = vocab_parallel_distillation(logits, teacher_logits, *compared, gradient_in_place)
            # Second, so that its backward comes first: the other one may overwrite the logits.
            terms = merged_terms(live, vocab_parallel_record_distillation(logits, records, *compared), is_cached)
        if by_rank:
            assert tokens is not None
            distilled = tokens.ranked(terms.metrics["teacher entropy"], counted, cp_group)
        if objective.only_watches:
            # Last, because Megatron's cross entropy overwrites fp32 logits.
            terms = terms._replace(cross_entropy=megatron_cross_entropy(logits))
    if tokens is not None and not (tokens.by_position or by_rank):
        chosen = tokens.of(terms.metrics)
        distilled = chosen if taught is None else chosen & taught
    terms = _only(terms, distilled, taught)
    distillation = scaled(terms.divergence, objective)
    if chunk_tokens is None:
        total = sum_of((kd_weight, lm_weight), (distillation, terms.cross_entropy))
    return Loss(total, distillation, terms, {}, distilled)


def _only(terms: DistillationTerms, distilled: Tensor | None, taught: Tensor | None) -> DistillationTerms:
    """Return the terms with a divergence of the `distilled` tokens only, and metrics of the `taught` ones."""
    value, metrics = terms.divergence, dict(terms.metrics)
    if distilled is not None:
        value = torch.where(distilled, value, 0.0)
    if taught is not None:
        metrics = {name: torch.where(taught, it, 0.0) for name, it in metrics.items()}
    return DistillationTerms(value, terms.cross_entropy, metrics)


def _complete(loss: Loss, cache: CachedTeacher, objective: Objective) -> Loss:
    """Return the loss with the names of both forms, in one order, which Megatron reduces them in on every rank."""
    names = [*METRICS]
    if objective.temperature == 1.0:
        names.append(SAMPLED_KL if cache.layout.draws else BUCKETED_KL)
    nothing = torch.zeros_like(loss.terms.cross_entropy.detach())
    metrics = {name: loss.terms.metrics.get(name, nothing) for name in names}
    selected = loss.selected
    if selected is None and cache.on_miss == "lm":
        selected = torch.ones_like(nothing, dtype=torch.bool)
    return loss._replace(terms=loss.terms._replace(metrics=metrics), selected=selected)
