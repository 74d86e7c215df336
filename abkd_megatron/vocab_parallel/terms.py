"""Per-token results of a pass: what is trained and what is logged.

Legend: N tokens of a pass, M tokens of the result.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from abkd_megatron.vocab_parallel.stats import GlobalStats

METRICS = (
    *("teacher lm loss", "kl to teacher", "teacher entropy", "student entropy"),
    *("top-1 agreement", "top-1 accuracy", "student confidence"),
)
NUM_TERMS = 2 + len(METRICS)
"""Rows of the terms of labeled tokens: divergence, cross entropy, `METRICS`. Without labels there is only the first."""


@dataclass(frozen=True)
class Terms:
    """Where a pass writes its results."""

    terms: Tensor
    """[NUM_TERMS, M] with labels, else [1, M]; rows are contiguous. fp32, or fp64 for fp64 logits."""
    rows: Tensor | None = None
    """[N] int64, columns of `terms` and `loss`; None for 0 .. N - 1."""
    compared: bool = True
    """False writes 0 in place of the divergence and the metrics, for tokens without a teacher."""
    loss: Tensor | None = None
    """[M], receives weights[0] * divergence + weights[1] * cross entropy."""
    weights: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def empty(cls, num_tokens: int, has_labels: bool, like: Tensor, dtype: torch.dtype) -> "Terms":
        """Allocate the results of `num_tokens` tokens on the device of `like`."""
        return cls(like.new_empty(NUM_TERMS if has_labels else 1, num_tokens, dtype=dtype))

    def write(self, value: Tensor, global_stats: GlobalStats, labels: Tensor | None) -> None:
        """Write the divergence `value`, and what labels [N] determine."""
        of_pass = value.to(self.terms.dtype).unsqueeze(0)
        if labels is not None:
            of_pass = torch.cat([of_pass, _labeled_terms(global_stats, labels).to(self.terms.dtype)])
        self.write_rows(of_pass)

    def write_rows(self, of_pass: Tensor) -> None:
        """Write the rows of `terms`, [rows, N], overwriting them where not compared."""
        at = slice(None) if self.rows is None else self.rows
        if not self.compared:
            of_pass[0], of_pass[2:] = 0.0, 0.0
        self.terms[:, at] = of_pass
        if self.loss is not None:
            self.loss[at] = self.weights[0] * of_pass[0] + self.weights[1] * of_pass[1]


def _labeled_terms(global_stats: GlobalStats, labels: Tensor) -> Tensor:
    """Return the student's cross entropy and the metrics, [NUM_TERMS - 1, N] fp64."""
    q, p = global_stats.q, global_stats.p
    assert p.top is not None and q.top is not None
    agreement = (p.top == q.top) & p.top.isfinite()
    accuracy, confidence = q.top == labels, (-q.log_z_at_1).exp()
    of_student, of_teacher = (side.cross_entropy().masked_fill_(labels < 0, 0.0) for side in (q, p))
    metrics = [of_teacher, *global_stats.metrics, agreement.double(), accuracy.double(), confidence]
    return torch.stack([of_student, *metrics])
