"""Loss of a student whose teacher is a cache: records come with each micro-batch, in place of a forward pass.

Legend: s sequence, b micro-batch, N = s * b tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from abkd_megatron.cache.record import RecordLayout
from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.objective import Objective
from abkd_megatron.student.head import Loss, fused_options, scaled, sum_of, weights_of_terms
from abkd_megatron.student.plan import run_pre_forward_hooks
from abkd_megatron.teacher.output_layer import OutputLayer
from abkd_megatron.vocab_parallel import (
    TeacherRecords,
    VocabShard,
    vocab_parallel_record_distillation,
    vocab_parallel_record_distillation_head,
)
from abkd_megatron.vocab_parallel.teacher_records import BUCKETED_KL, SAMPLED_KL
from abkd_megatron.vocab_parallel.terms import METRICS
from abkd_megatron.vocab_parallel.transfer import to_device


class CachedBatch(NamedTuple):
    """Records of a micro-batch."""

    records: TeacherRecords
    """Of N tokens, in the order of labels [s, b]."""
    cached: Tensor | None
    """[s, b] bool, which tokens have a record; None for all."""


@dataclass
class CachedTeacher:
    """A cache in place of a teacher."""

    layout: RecordLayout
    on_miss: str
    """``error``: every token has a record. ``lm``: tokens without one train on the cross entropy only."""
    packed: Tensor | None = None
    """[b, s, bytes per token + 1] uint8 of the next micro-batch (`RECORDS` of its samples, this rank's tokens), on the
    device of the model. Set it, or `read`, before the model runs on the last pipeline stage; its forward takes it."""
    read: Callable[[], Tensor] | None = None
    """Returns `packed`."""

    def take(self, of_all: bool = True) -> CachedBatch:
        """Return the records of the next micro-batch.

        Args:
            of_all: whether all of its sequences have this teacher. The others have no records.

        Raises:
            ConfigError: there are none.
        """
        packed = self.packed if self.read is None else self.read()
        self.packed = self.read = None
        if packed is None:
            raise ConfigError(
                "expected the teacher's records of this micro-batch on the last pipeline stage, got none; use "
                "`abkd-megatron distill`, whose forward step sets them"
            )
        by_position = packed.transpose(0, 1)
        records = self.layout.unpack(by_position[..., :-1].flatten(0, 1))
        if of_all and self.on_miss == "error":
            return CachedBatch(records, None)
        return self._filled(records, by_position[..., -1] == 1)

    def _filled(self, records: TeacherRecords, cached: Tensor) -> CachedBatch:
        """Replace missing records by the uniform distribution, since zeros are not one."""
        size, number = self.layout.vocab_size, self.layout.top_k
        here = cached.flatten()
        uniform = torch.tensor([size, size / max(size - number, 1e-30)], dtype=torch.float64).log().neg().tolist()
        ids = torch.arange(self.layout.num_ids, dtype=records.ids.dtype, device=records.ids.device)
        ids[number:] = -1
        filled = TeacherRecords(
            ids=torch.where(here.unsqueeze(-1), records.ids, ids),
            log_probs=records.log_probs.masked_fill(~here.unsqueeze(-1), uniform[0]),
            log_rest=records.log_rest.masked_fill(~here, uniform[1] if number < size else -torch.inf),
            entropy=records.entropy,
            label_log_prob=records.label_log_prob,
            draws=None if records.draws is None else records.draws * here.unsqueeze(-1),
        )
        return CachedBatch(filled, cached)


def compute_cached_loss(
    student: OutputLayer,
    batch: CachedBatch,
    objective: Objective,
    labels: Tensor,
    loss_mask: Tensor | None,
    shard: VocabShard,
    tp_group: dist.ProcessGroup,
    megatron_cross_entropy: Callable[[Tensor], Tensor],
    positions: Tensor | None = None,
    sources: Tensor | None = None,
    cp_group: dist.ProcessGroup | None = None,
    *,
    kd_weights: Tensor | None = None,
    lm_weights: Tensor | None = None,
    chunk_tokens: int | None = None,
    gradient_in_place: bool = False,
) -> Loss:
    """Compute the objective's loss from records; see `compute_loss` for the arguments.

    Metrics are 0 at tokens without a record or not selected by position.

    Collectives: those of `vocab_parallel_record_distillation`. A selection by quantile: one all-gather over `cp_group`.
    """
    records, selected, distilled, tokens = batch.records, batch.cached, None, objective.tokens
    if tokens is not None and tokens.by_position:
        assert positions is not None
        at = to_device(tokens.at(positions.cpu()).unsqueeze(-1).expand(labels.shape), labels.device)
        selected = at if selected is None else at & selected
    elif tokens is not None:
        assert records.entropy is not None
        entropy = records.entropy.view(labels.shape)
        counted = None if loss_mask is None else loss_mask != 0
        if selected is not None:
            counted = selected if counted is None else counted & selected
        distilled = tokens.ranked(entropy, counted, cp_group) if tokens.by_rank else tokens.of({_ENTROPY: entropy})
    kd_weight, lm_weight = weights_of_terms(objective, sources, (kd_weights, lm_weights), labels)
    if chunk_tokens is not None:
        run_pre_forward_hooks(student.layer)
        total, terms = vocab_parallel_record_distillation_head(
            student.whole_hidden_states(tp_group),
            student.weight,
            records,
            objective.effective_divergence,
            labels,
            shard,
            selected=selected,
            **fused_options(student, objective, (kd_weight, lm_weight), loss_mask, chunk_tokens, distilled),
        )
    else:
        logits = student.logits()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not objective.only_watches):
            terms = vocab_parallel_record_distillation(
                logits,
                records,
                objective.effective_divergence,
                labels,
                shard,
                temperature=objective.temperature,
                gradient_in_place=gradient_in_place,
                selected=selected,
            )
        if objective.only_watches:
            # Last, because Megatron's cross entropy overwrites fp32 logits.
            terms = terms._replace(cross_entropy=megatron_cross_entropy(logits))
    if distilled is not None:
        terms = terms._replace(divergence=torch.where(distilled, terms.divergence, 0.0))
        selected = distilled if selected is None else distilled & selected
    distillation = scaled(terms.divergence, objective)
    if chunk_tokens is None:
        total = sum_of((kd_weight, lm_weight), (distillation, terms.cross_entropy))
    return Loss(total, distillation, terms, {}, selected)


_ENTROPY = "teacher entropy"


def means_over(cache: CachedTeacher | None, objective: Objective, of_all: bool, is_part: bool) -> dict[str, Any]:
    """Return the fields of a `Report` with the names of the metrics that are means over some tokens only.

    Args:
        cache: the student's, if it has one.
        objective: of the step.
        of_all: whether metrics of a live teacher are of all tokens, as a diagnosis is.
        is_part: whether other sequences have a live teacher.
    """
    by_position = objective.tokens is not None and objective.tokens.by_position
    of_records = (BUCKETED_KL, SAMPLED_KL)
    if cache is None:
        return {"selected_only": METRICS if by_position and not of_all else ()}
    selected = (*METRICS, *of_records) if cache.on_miss == "lm" or by_position else ()
    return {"selected_only": selected} | (
        {"cached_only": of_records, "live_only": ("kl to teacher",)} if is_part else {}
    )
