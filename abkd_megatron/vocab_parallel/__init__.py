"""Losses over a vocabulary that is sharded across a tensor-parallel group."""

from abkd_megatron.vocab_parallel.fused_head import vocab_parallel_distillation_head
from abkd_megatron.vocab_parallel.logit_loss import vocab_parallel_logit_loss
from abkd_megatron.vocab_parallel.logits import (
    DistillationTerms,
    vocab_parallel_distillation,
    vocab_parallel_divergence,
)
from abkd_megatron.vocab_parallel.records import (
    vocab_parallel_record_distillation,
    vocab_parallel_record_distillation_head,
)
from abkd_megatron.vocab_parallel.shard import VocabShard
from abkd_megatron.vocab_parallel.teacher_records import TeacherRecords

__all__ = [
    "DistillationTerms",
    "TeacherRecords",
    "VocabShard",
    "vocab_parallel_distillation",
    "vocab_parallel_distillation_head",
    "vocab_parallel_divergence",
    "vocab_parallel_logit_loss",
    "vocab_parallel_record_distillation",
    "vocab_parallel_record_distillation_head",
]
