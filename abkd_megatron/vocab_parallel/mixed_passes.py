"""Passes over a batch whose tokens have teacher logits or teacher records: those of both, merged by token.

Each of them sees all tokens, since which ones are its own is known on the device only; what it computes of the others
is not used, and gets no gradient.

Legend: N tokens of a batch, W width of a rank's logits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from abkd_megatron.vocab_parallel.logits import DistillationTerms
from abkd_megatron.vocab_parallel.passes import Batch, Passes, PendingRecord, TokenStats
from abkd_megatron.vocab_parallel.record_passes import BucketStats, PendingBuckets, RecordBatch, RecordPasses
from abkd_megatron.vocab_parallel.shard import VocabShard
from abkd_megatron.vocab_parallel.teacher_records import BUCKETED_KL, SAMPLED_KL, TeacherRecords
from abkd_megatron.vocab_parallel.terms import METRICS, Terms

_OF_RECORDS = (BUCKETED_KL, SAMPLED_KL)
_OF_TEACHER = ("teacher lm loss", "teacher entropy", "top-1 agreement")


class MixedTeacher(NamedTuple):
    """The teacher's side of N tokens."""

    logits: Tensor
    """[N, W]; finite at all tokens."""
    records: TeacherRecords
    """Of N tokens; at the others any distribution."""
    recorded: Tensor
    """[N] bool: the token has a record."""


class MixedBatch(NamedTuple):
    """Student logits [N, W] with the two forms of their teacher."""

    live: Batch
    of_records: RecordBatch
    recorded: Tensor

    @property
    def student(self) -> object:
        """Rows of the student's logits."""
        return self.live.student


@dataclass(frozen=True)
class MixedPasses:
    """Both passes, one after another, with the collectives of both."""

    live: Passes
    of_records: RecordPasses
    """With logits that are not disposable."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic on logits."""
        return self.live.dtype

    @property
    def shard(self) -> VocabShard:
        """Columns of the logits."""
        return self.live.shard

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics: the live ones, and the KL divergence from records."""
        return (*METRICS, *(name for name in self.of_records.metrics if name in _OF_RECORDS))

    def batch(self, student: Tensor, teacher: MixedTeacher, labels: Tensor) -> MixedBatch:
        """Build a batch of [N, W] logits, and labels [N]."""
        logits, records, recorded = teacher
        of_records = self.of_records.batch(student, records, labels)
        return MixedBatch(self.live.batch(student, logits, labels), of_records, recorded)

    def start(self, batch: MixedBatch, async_op: bool = False) -> tuple[PendingRecord, PendingBuckets]:
        """Run both first passes and start their exchanges."""
        live = self.live.start(batch.live, async_op)
        return live, self.of_records.start(batch.of_records, async_op)

    def conclude(
        self, batch: MixedBatch, pending_record: tuple[PendingRecord, PendingBuckets], needs_gradient: bool, out: Terms
    ) -> "tuple[TokenStats, BucketStats | None]":
        """Write the terms after waiting for the exchanges; return what the gradient needs."""
        live, recorded = (
            out.terms.new_empty(2 + len(passes.metrics), len(batch.recorded)) for passes in (self.live, self.of_records)
        )
        of_live, of_records = pending_record
        stats = self.live.conclude(batch.live, of_live, needs_gradient, Terms(live))
        bucket_stats = self.of_records.conclude(batch.of_records, of_records, needs_gradient, Terms(recorded))
        merged = merged_terms(
            _named(live, self.live.metrics), _named(recorded, self.of_records.metrics), batch.recorded
        )
        out.write_rows(torch.stack([merged.divergence, merged.cross_entropy, *merged.metrics.values()]))
        return stats, bucket_stats

    def write_gradient(
        self,
        out: Tensor,
        batch: MixedBatch,
        token_stats: "tuple[TokenStats, BucketStats]",
        of_divergence: Tensor | None,
        of_cross_entropy: Tensor | None,
    ) -> None:
        """Write the gradient of the student's logits into `out`, contiguous [N, W], without the padding.

        `out` may be the student's logits. One more [N, W] exists meanwhile.
        """
        of_live, of_records = token_stats
        if of_divergence is None:
            self.live.write_gradient(out, batch.live, of_live, None, of_cross_entropy)
            return
        here = of_divergence.reshape(-1)
        gradient = torch.empty_like(out)
        own = torch.where(batch.recorded, here, 0.0)
        self.of_records.write_gradient(gradient, batch.of_records, of_records, own, None)
        # Last, since it may overwrite the logits.
        self.live.write_gradient(out, batch.live, of_live, torch.where(batch.recorded, 0.0, here), of_cross_entropy)
        columns = slice(0, self.shard.num_columns)
        out.view(len(batch.recorded), -1)[:, columns] += gradient.view(len(batch.recorded), -1)[:, columns]

    def clear_padding(self, out: Tensor) -> None:
        """Write 0 into the columns of `out`, contiguous [N, W], beyond the vocabulary."""
        self.live.clear_padding(out)


def _named(terms: Tensor, metrics: Sequence[str]) -> DistillationTerms:
    value, cross_entropy, *others = terms.unbind(0)
    return DistillationTerms(value, cross_entropy, dict(zip(metrics, others, strict=True)))


def merged_terms(live: DistillationTerms, of_records: DistillationTerms, recorded: Tensor) -> DistillationTerms:
    """Return the terms of each token from its own form of the teacher.

    The cross entropy and the student's metrics are the live ones, of which both forms compute the same. The KL
    divergences, which are not comparable, keep their names and are 0 at the tokens of the other form.

    Args:
        live: of logits, [...] each.
        of_records: of records, with `METRICS` or the names of `TeacherRecords.metrics`.
        recorded: [...] bool, which tokens have records.
    """
    metrics: dict[str, Tensor] = {}
    theirs: Mapping[str, Tensor] = of_records.metrics
    for name, value in live.metrics.items():
        if name == "kl to teacher":
            metrics[name] = torch.where(recorded, 0.0, value)
        else:
            metrics[name] = torch.where(recorded, theirs[name], value) if name in _OF_TEACHER else value
    metrics |= {name: torch.where(recorded, theirs[name], 0.0) for name in _OF_RECORDS if name in theirs}
    value = torch.where(recorded, of_records.divergence, live.divergence)
    return DistillationTerms(value, live.cross_entropy, metrics)
