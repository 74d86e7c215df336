"""Truncated distributions of a teacher: the K largest log-probabilities of a token, and the rest of the mass."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TeacherRecords:
    """A teacher's distribution over K tokens and the rest, of N tokens."""

    ids: Tensor
    """[N, K] int, global ids."""
    log_probs: Tensor
    """[N, K] fp32, at the temperature of the divergence."""
    log_rest: Tensor
    """[N] fp32, the log of all other tokens' probability at that temperature; -inf if there are none."""
    entropy: Tensor | None = None
    """[N] fp32, of the whole distribution at temperature 1, in nats."""
    label_log_prob: Tensor | None = None
    """[N] fp32, of the labels at temperature 1."""
