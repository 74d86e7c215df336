"""Per-token numbers that a rank sends for its shard of the vocabulary, and their normalization.

A shard's sums are relative to its own maxima and are shifted to the global ones after the gather. A maximum and the log
of the sum of exponentials relative to it are kept separate. Adding them would round to a logit's precision, and so
would the log-ratio of the two models.

Legend: n tokens of a chunk, C this rank's real columns.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from abkd_megatron.losses.base import Divergence

_TILE = 128


def total(terms: Tensor) -> Tensor:
    """Sum over the last dimension, in fp64 across tiles.

    Within a tile fp32 is accurate enough. Over a whole vocabulary it is not, and fp64 throughout is many times slower.
    """
    whole = terms.shape[-1] // _TILE * _TILE
    tiles = terms[..., :whole].unflatten(-1, (-1, _TILE)) if whole else terms[..., None, :0]
    return tiles.sum(dim=-1).sum(dim=-1, dtype=torch.float64) + terms[..., whole:].sum(dim=-1, dtype=torch.float64)


class View(NamedTuple):
    """Arguments of a divergence for a chunk, [n, C] each."""

    log_p: Tensor
    log_q: Tensor
    log_ratio: Tensor
    outside: Tensor  # -inf in both models

    def sum(self, terms: Tensor) -> Tensor:
        """Sum over the local columns in fp64; overwrites terms outside the vocabulary."""
        return total(terms.masked_fill_(self.outside, 0.0))


def view(
    student: Tensor,
    teacher: Tensor,
    q: tuple[Tensor, Tensor | None],
    p: tuple[Tensor, Tensor | None],
    temperature: float,
) -> View:
    """Return log-probabilities of logits [n, C], given each model's (maximum, log of the sum relative to it), [n].

    With None for the logs, only the maxima are subtracted. The difference of the two logs is taken before rounding to
    the logits' dtype, so pass global ones in fp64.
    """

    def column(numbers: Tensor) -> Tensor:
        return numbers.to(student.dtype).unsqueeze(-1)

    y, x = student - column(q[0]), teacher - column(p[0])
    if temperature != 1.0:
        y.div_(temperature)
        x.div_(temperature)
    log_ratio = x - y
    if q[1] is not None and p[1] is not None:
        log_ratio.sub_(column(p[1] - q[1]))
        y.sub_(column(q[1]))
        x.sub_(column(p[1]))
    return View(x, y, log_ratio, (x == -math.inf) & (y == -math.inf))


def base(maximum: Tensor) -> Tensor:
    """Return the offset to subtract from logits: their maximum, or 0 where the model excludes all of them."""
    return maximum.masked_fill(maximum == -math.inf, 0.0)


class Layout:
    """Order of the fields of a record, per token.

    First the student's, then the teacher's: the maximum; the sum of exponentials relative to it, at T; with labels, the
    label's logit (-inf if on another rank), the id of the maximum and, if T is not 1, the sum at T = 1. Then the
    divergence's partial sums. Then, with labels, sum p log(p/q), sum p log p and sum q log q at T = 1.

    All fields but the maxima, label logits and ids are additive over shards with the same maxima.
    """

    def __init__(self, divergence: Divergence, has_labels: bool, temperature: float) -> None:
        self.has_labels, self.temperature = has_labels, temperature
        self.of_model = 2 + has_labels * (2 + (temperature != 1.0))
        self.student = slice(0, self.of_model)
        self.teacher = slice(self.of_model, 2 * self.of_model)
        self.sums = slice(2 * self.of_model, 2 * self.of_model + divergence.num_partial_sums)
        self.metrics = slice(self.sums.stop, self.sums.stop + 3 * has_labels)
        self.size = self.metrics.stop
        # Slices, because indexing by a list copies it to the GPU and synchronizes.
        # Each selects the student's field and the teacher's.
        self.maxima, self.masses, self.targets, self.tops, at_1 = (
            slice(first, self.of_model + first + 1, self.of_model) for first in range(5)
        )
        self.masses_at_1 = at_1 if self.of_model == 5 else self.masses
        # In the order of the record, so that both models are summed in the same order.
        self._additive = [
            slice(first + at, first + at + 1)
            for first in (0, self.of_model)
            for at in ((1, 4) if self.of_model == 5 else (1,))
        ]
        self._additive.append(slice(self.sums.start, self.size))

    def additive(self, record: Tensor) -> Tensor:
        """Return the fields of a record that are additive over shards, in their order."""
        return torch.cat([record[fields] for fields in self._additive])

    def set_additive(self, record: Tensor, sums: Tensor) -> None:
        """Write the fields that `additive` returns, in its order."""
        parts = sums.split([record[fields].shape[0] for fields in self._additive])
        for fields, part in zip(self._additive, parts, strict=True):
            record[fields] = part
