"""Teacher records: what a cache has of a teacher's next-token distributions, in place of its logits.

Legend: N tokens, K kept ids per token, R draws per token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.base import Divergence, LogitLoss
from abkd_megatron.tensors import check_tensor, constant
from abkd_megatron.vocab_parallel.logits import check_divergence
from abkd_megatron.vocab_parallel.terms import METRICS

BUCKETED_KL = "bucketed kl to teacher"
"""Metric: KL(teacher || student) of the K + 1 buckets, a lower bound of the live ``kl to teacher``; at T = 1 only."""
SAMPLED_KL = "sampled kl to teacher"
"""Metric: an estimate of the live ``kl to teacher`` from kept tokens and draws, at T = 1 only. Its mean over draws is
the live one; of one token it may be below 0."""


@dataclass(frozen=True, eq=False)
class TeacherRecords:
    """A teacher's next-token distributions at a temperature T: K tokens each, the mass of all others, R draws of them.

    The log-probabilities and `log_rest` belong to softmax(logits / T) with the T of the loss, `entropy` and
    `label_log_prob` to T = 1. They are used as they are; a record does not know its temperature.
    """

    ids: Tensor
    """[N, K + R] int32 or int64, global token ids, distinct per token, K >= 1; the draws are the last R. Negative ids
    are padding, for tokens with fewer ids. An id beyond the vocabulary makes the token's results NaN."""
    log_probs: Tensor
    """[N, K + R] fp32 (or fp64), log-probabilities of `ids`; not read for padding."""
    log_rest: Tensor
    """[N] fp32 (or fp64), log of the other tokens' probability, from their own logsumexp; -inf if there are none."""
    entropy: Tensor | None = None
    """[N], in nats at T = 1; for metrics."""
    label_log_prob: Tensor | None = None
    """[N], log-probability of the label at T = 1; for metrics."""
    draws: Tensor | None = None
    """[N, R] int32, how often each of the last R ids was drawn, 0 for padding; R per token, or 0 without a rest. From
    the teacher's distribution over the tokens that are not kept. None: R = 0."""

    @property
    def num_draws(self) -> int:
        """R."""
        return 0 if self.draws is None else self.draws.shape[-1]

    @property
    def num_kept(self) -> int:
        """K."""
        return self.ids.shape[-1] - self.num_draws

    def __getitem__(self, tokens: slice) -> "TeacherRecords":
        """Return the records of some tokens."""
        return self._map(lambda it: it[tokens])

    def _map(self, function: Callable[[Tensor], Tensor]) -> "TeacherRecords":
        given = (self.entropy, self.label_log_prob, self.draws)
        entropy, label_log_prob, draws = (None if it is None else function(it) for it in given)
        ids, log_probs, log_rest = function(self.ids), function(self.log_probs), function(self.log_rest)
        return TeacherRecords(ids, log_probs, log_rest, entropy, label_log_prob, draws)

    def check(self, labels: Tensor) -> "TeacherRecords":
        """Return the records as constants.

        Raises:
            ConfigError: for another number of tokens than the labels', another device, shape or dtype, or K = 0.
        """
        num_tokens = labels.numel()
        check_tensor("a record's log_probs", self.log_probs, like=labels)
        wide = isinstance(self.ids, Tensor) and self.ids.dtype == torch.int64
        check_tensor("a record's ids", self.ids, dtype=torch.int64 if wide else torch.int32, like=labels)
        if self.ids.dim() != 2 or self.ids.shape != self.log_probs.shape or not self.ids.shape[-1]:
            raise ConfigError(
                "expected a record's ids and log_probs of one shape [N, K] with K >= 1, got "
                f"{list(self.ids.shape)} and {list(self.log_probs.shape)}: pad tokens with fewer ids with -1"
            )
        if self.draws is not None:
            check_tensor("a record's draws", self.draws, dtype=torch.int32, like=labels)
            most = self.ids.shape[-1] - 1
            if self.draws.dim() != 2 or len(self.draws) != num_tokens or not 1 <= self.num_draws <= most:
                raise ConfigError(
                    f"expected a record's draws of shape [{num_tokens}, R] with R in 1 .. {most}, got "
                    f"{list(self.draws.shape)}: `ids` has K + R columns"
                )
        per_token = {"log_rest": self.log_rest, "entropy": self.entropy, "label_log_prob": self.label_log_prob}
        found = {"ids": self.ids.shape[0]}
        for name, it in per_token.items():
            if it is not None or name == "log_rest":
                check_tensor(f"a record's {name}", it, like=labels)
                assert it is not None
                found[name] = it.shape[0] if it.dim() == 1 else -1
        if wrong := [name for name, number in found.items() if number != num_tokens]:
            raise ConfigError(
                f"expected records of {num_tokens} tokens, one per label, got another shape of {', '.join(wrong)}: "
                "pass the records of this micro-batch, in the order of its flattened labels"
            )
        return self._map(constant)

    def metrics(self, temperature: float) -> tuple[str, ...]:
        """Return the names of the metrics that the records determine, in their order."""
        kl, entropy, lm_loss = temperature == 1.0, self.entropy is not None, self.label_log_prob is not None
        known = {"teacher lm loss": lm_loss, "kl to teacher": kl, "teacher entropy": entropy}
        of_kl = BUCKETED_KL if self.draws is None else SAMPLED_KL
        return tuple(of_kl if name == "kl to teacher" else name for name in METRICS if known.get(name, True))


def merged(ids: Tensor, log_probs: Tensor, is_drawn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge draws of one id.

    Args:
        ids: [N, R], of draws, in any order.
        log_probs: [N, R].
        is_drawn: [N] bool; False for tokens without draws.

    Returns:
        `ids`, sorted, -1 where it repeats; `log_probs` in their order; how often each was drawn, int32.
    """
    ids, order = ids.masked_fill(~is_drawn.unsqueeze(-1), -1).sort(dim=-1)
    ends, begins = (torch.searchsorted(ids, ids, side=side) for side in ("right", "left"))
    is_first = torch.arange(ids.shape[-1], device=ids.device) == begins
    is_first &= ids >= 0
    draws = torch.where(is_first, ends - begins, 0).to(torch.int32)
    return ids.masked_fill(~is_first, -1), log_probs.gather(-1, order), draws


def check_recorded(divergence: object, num_draws: int) -> None:
    """Raise ConfigError unless `divergence` is a Divergence, and one that draws estimate well if there are any."""
    check_bucketed(divergence)
    if num_draws and isinstance(divergence, Divergence) and not divergence.suits_draws:
        raise ConfigError(
            f"expected a divergence that draws of the teacher's tail estimate, got {divergence}, whose estimates would "
            "be mostly noise; use forward_kl or alpha_beta with beta 0 to 0.3 and alpha + beta 1 to 1.1, or a cache "
            "with cache.draws=0"
        )


def check_bucketed(divergence: object) -> None:
    """Raise ConfigError unless `divergence` is a Divergence, which buckets have a value of."""
    if isinstance(divergence, LogitLoss):
        raise ConfigError(
            f"expected a divergence, got {divergence.name}, which needs all of the teacher's logits, of which records "
            "have K: use one of abkd_megatron.losses.registry.DIVERGENCES, or a live teacher"
        )
    check_divergence(divergence)
