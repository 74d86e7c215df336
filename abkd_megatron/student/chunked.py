"""Loss of a student whose teacher has another tokenizer: chunk likelihoods, from the cross entropies of both models.

Each rank has its columns of each model's logits, and the ranks exchange a few numbers per token, as for any loss here.
The teacher's logits are freed before the student's exist.

Legend: s tokens of the student, t of the teacher, b micro-batch.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from abkd_megatron.data.aligned_text import AlignedText
from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.chunks import CUT_OFF, ChunkLosses, chunk_losses
from abkd_megatron.losses.objective import Objective
from abkd_megatron.student.head import Loss, sum_of, weights_of_terms
from abkd_megatron.teacher.output_layer import OutputLayer, TeacherOutput
from abkd_megatron.vocab_parallel import DistillationTerms, VocabShard, vocab_parallel_distillation
from abkd_megatron.vocab_parallel.head_gradients import weighted
from abkd_megatron.vocab_parallel.logits import STUDENT_ONLY

Sums = dict[str, tuple[Tensor, Tensor]]
"""{name: (sum, the number it is divided by)} of a micro-batch."""


class ChunkedBatch(NamedTuple):
    """The teacher's side of a micro-batch."""

    teacher: OutputLayer
    text: AlignedText
    shard: VocabShard
    """Of the teacher's vocabulary."""

    def named_hidden_states(self, who: str) -> dict[str, Tensor]:
        """Return the teacher's hidden states, of its own tokens, by a name that starts with `who`."""
        return self.teacher.named_hidden_states(who)


def teacher_batch(objective: Objective, text: AlignedText | None, batch: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the teacher's forward on a micro-batch.

    Args:
        objective: of the step.
        text: in the teacher's tokens, if it has its own.
        batch: arguments of the student's forward.

    Raises:
        ConfigError: there is no text.
    """
    if objective.cross_tokenizer is None:
        return batch
    if text is None:
        raise ConfigError(
            "cross_tokenizer: expected the text of this micro-batch in the teacher's tokens, got none; use "
            "`abkd-megatron distill`, or set attachment.text before the model runs"
        )
    positions = torch.arange(text.tokens.shape[1], device=text.tokens.device)
    return {"input_ids": text.tokens, "position_ids": positions.expand_as(text.tokens)}


def side_of(
    output: TeacherOutput, text: AlignedText | None, tp_group: dist.ProcessGroup, vocab_size: int | None
) -> TeacherOutput | ChunkedBatch:
    """Return the teacher's side of a micro-batch.

    Args:
        output: of the teacher.
        text: in its own tokens; None if these are the student's.
        tp_group: of its output layer.
        vocab_size: of its own tokens.
    """
    if text is None:
        return output
    assert isinstance(output, OutputLayer)  # of one teacher
    return ChunkedBatch(output, text, VocabShard.megatron(output.weight.shape[0], tp_group, vocab_size))


def compute_chunked_loss(
    student: OutputLayer, batch: ChunkedBatch, objective: Objective, given: Mapping[str, Any]
) -> tuple[Loss, Sums]:
    """Compute the objective's loss from chunks.

    Args:
        student: receives gradients.
        batch: the teacher's side.
        objective: what is trained.
        given: arguments of `compute_loss` by name: `labels`, `loss_mask`, `shard`, `megatron_cross_entropy`, `sources`,
            `kd_weights` and `lm_weights` are used.

    Returns:
        The loss, whose distillation is 0 except at a chunk's last token; and what is logged with numbers of its own:
        the teacher's cross entropy per token of a chunk, |log p(c) - log q(c)| per chunk, and the shares of the counted
        tokens' bytes that are in chunks, and that the teacher's row has no room for.

    Collectives: two times those of `vocab_parallel_distillation`.
    """
    text, labels, loss_mask, shard = batch.text, given["labels"], given["loss_mask"], given["shard"]
    of_tokens = given["kd_weights"], given["lm_weights"]
    kd_weight, lm_weight = weights_of_terms(objective, given["sources"], of_tokens, labels)
    with torch.no_grad():
        theirs = _cross_entropy(batch.teacher.logits(), text.labels.transpose(0, 1), batch.shard)
    logits = student.logits()
    mask = loss_mask.transpose(0, 1) if loss_mask is not None else None

    def of_chunks(ours: Tensor) -> ChunkLosses:
        both = ours.transpose(0, 1), theirs.transpose(0, 1)
        assert objective.divergence is not None and objective.cross_tokenizer is not None
        return chunk_losses(*both, text.chunks, mask, objective.divergence, objective.cross_tokenizer)

    if objective.only_watches:
        with torch.no_grad():
            found = of_chunks(_cross_entropy(logits, labels, shard))
        # Last, because Megatron's cross entropy overwrites fp32 logits.
        ours = given["megatron_cross_entropy"](logits)
        distillation = found.per_token.transpose(0, 1).to(ours.dtype)
        total = weighted(lm_weight, ours)
    else:
        ours = _cross_entropy(logits, labels, shard)
        found = of_chunks(ours)
        distillation = found.per_token.transpose(0, 1).to(ours.dtype)
        total = sum_of((kd_weight, lm_weight), (distillation, ours))
    terms = DistillationTerms(distillation, ours, {})
    return Loss(total, distillation, terms, {}, None), _sums(found, text, theirs.transpose(0, 1), mask)


def _cross_entropy(logits: Tensor, labels: Tensor, shard: VocabShard) -> Tensor:
    """Return the cross entropy per token, without the padding of the vocabulary, from a pass of a model with itself."""
    return vocab_parallel_distillation(logits, logits, STUDENT_ONLY, labels, shard).cross_entropy


@torch.no_grad()
def _sums(found: ChunkLosses, text: AlignedText, of_teacher: Tensor, mask: Tensor | None) -> Sums:
    """Return what is logged of chunks, see `compute_chunked_loss`."""

    def counts(ids: Tensor) -> Tensor:
        return (ids >= 0) & found.counted.gather(1, ids.clamp_min(0))

    ours, theirs = text.chunks
    counted_bytes = text.num_bytes if mask is None else text.num_bytes * (mask != 0)
    num_bytes = counted_bytes.sum()
    in_chunks = counts(theirs)
    return {
        "teacher lm loss": (torch.where(in_chunks, of_teacher, 0.0).sum(), in_chunks.sum()),
        "chunk log-ratio": (found.log_ratio.abs().sum(), found.counted.sum()),
        "aligned bytes": ((text.num_bytes * counts(ours)).sum(), num_bytes),
        "bytes cut off": ((counted_bytes * (ours == CUT_OFF)).sum(), num_bytes),
    }
