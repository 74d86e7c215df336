"""What a teacher cache would take and save, from the FLOPs of a job with a live teacher."""

from argparse import Namespace
from dataclasses import dataclass

from abkd_megatron.cache.record import RecordLayout
from abkd_megatron.tools.model_size import Flops

# FLOP/s per GPU at which rates are stated: 40 % of an H100's peak in bf16.
ASSUMED = 4e14


@dataclass(frozen=True)
class CacheEstimate:
    """A cache of a job's training samples."""

    layout: RecordLayout
    tokens: int
    """Tokens of the run."""
    flops: Flops
    """Per token, with a live teacher."""

    @classmethod
    def of(cls, args: Namespace, layout: RecordLayout, flops: Flops) -> "CacheEstimate":
        """Estimate the cache of a job.

        Args:
            args: Megatron's, validated, of the student.
            layout: of a record.
            flops: per token.
        """
        samples = args.train_samples or (args.train_iters or 0) * args.global_batch_size
        return cls(layout, samples * args.seq_length, flops)

    @property
    def num_bytes(self) -> int:
        """Bytes of the records."""
        return self.tokens * self.layout.bytes_per_token

    @property
    def of_teacher(self) -> float:
        """FLOPs per token of the pass that writes the cache."""
        return self.flops.teacher_share * self.flops.total

    @property
    def of_student(self) -> float:
        """FLOPs per token of a run from the cache."""
        return self.flops.total - self.of_teacher

    def read_per_gpu(self, flops_per_second: float = ASSUMED) -> float:
        """Bytes per second that a run from the cache reads per GPU."""
        return flops_per_second / self.of_student * self.layout.bytes_per_token

    def saving(self, runs: int) -> float:
        """FLOPs of that many runs with a live teacher over those of writing the cache once and as many runs from it.

        1 for one run and more than 1 from the second on.
        """
        return runs * self.flops.total / (self.of_teacher + runs * self.of_student)
