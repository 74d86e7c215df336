"""Operations over a vocabulary that is sharded over ranks, for losses that do not separate per column.

A `LogitLoss` is written densely, on the columns [n, C] of this rank; a `Columns` supplies sums, maxima and top-k over
all ranks. Each operation stores what its gradient needs, so backward communicates nothing.

Legend: n tokens, C this rank's real columns, R ranks.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from abkd_megatron.tensors import Function


class Pair(NamedTuple):
    """Two models' distributions on this rank's columns; constants without a gradient."""

    log_p: Tensor
    """[n, C], the teacher's."""
    log_q: Tensor
    """[n, C], the student's."""
    log_ratio: Tensor
    """[n, C], log p - log q, with more digits than the difference of the two; NaN where both are -inf."""
    outside: Tensor
    """[n, C] bool: -inf in both models, so outside the vocabulary."""
    size: Tensor
    """[n] fp64: the number of columns inside, over all ranks."""


class Columns(ABC):
    """The vocabulary as one rank sees it: its own columns, and operations over everyone's.

    Tensors [n, C] are fp32 (fp64 for fp64 logits), what is of the whole vocabulary is fp64 and has the same bits on
    every rank. All ranks have to call the same operations in the same order. On one rank none communicates.
    """

    ids: Tensor
    """[C] int64: the global ids of this rank's columns, ascending."""
    size: int
    """Number of columns over all ranks."""

    @abstractmethod
    def total(self, local: Tensor) -> Tensor:
        """The sum over the ranks of an fp64 tensor. 1 collective; not differentiable."""

    @abstractmethod
    def gather(self, local: Tensor) -> Tensor:
        """Every rank's tensor, [R, ...], of fp64 and one shape on all. 1 collective; not differentiable."""

    @abstractmethod
    def once(self, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` returns; when backward runs the loss again, what it returned then.

        So the ranks need not tell each other anything twice. `compute` must not be differentiated through.
        """

    def sums(self, *terms: Tensor) -> tuple[Tensor, ...]:
        """The sums of terms [n, C] over the vocabulary, [n] each.

        Differentiable, as long as the terms are made of this rank's columns and of constants. 1 collective.
        """
        local = torch.stack([term.sum(dim=-1, dtype=torch.float64) for term in terms])
        total: Tensor = _Total.apply(local, self)
        return tuple(total.unbind(0))

    def pair(self, student: Tensor, teacher: Tensor) -> Pair:
        """Both models' log-probabilities on this rank's columns. 1 collective, of 5 floats a token."""
        with torch.no_grad():
            outside = student.isneginf() & teacher.isneginf()

            def compute() -> Tensor:
                inside = (~outside).sum(dim=-1, dtype=torch.float64)
                every = self.gather(torch.stack([*_max_and_sum(student), *_max_and_sum(teacher), inside]))
                q, p = (_merged(every[:, model]) for model in (slice(0, 2), slice(2, 4)))
                return torch.stack([*q, *p, every[:, 4].sum(dim=0)])

            q_max, log_z_q, p_max, log_z_p, size = self.once(compute)
            shifted_q, shifted_p = (
                logits - maximum.to(logits.dtype).unsqueeze(-1)
                for logits, maximum in ((student, q_max), (teacher, p_max))
            )
            log_ratio = shifted_p - shifted_q
            log_ratio.sub_((log_z_p - log_z_q).to(log_ratio.dtype).unsqueeze(-1))
            log_q, log_p = (
                shifted.sub_(log_z.to(shifted.dtype).unsqueeze(-1))
                for shifted, log_z in ((shifted_q, log_z_q), (shifted_p, log_z_p))
            )
            return Pair(log_p, log_q, log_ratio, outside, size)

    def softmax_sums(
        self, student: Tensor, pair: Pair, terms: Sequence[tuple[Tensor, Tensor | None]]
    ) -> tuple[Tensor, ...]:
        """The sums over the vocabulary of functions F(log p, log q) of both models' probabilities, [n] each.

        Differentiable in `student`, with dS/ds_j = h_j - q_j H. 1 collective, of 2 floats a token for each term (1
        without a grad_log_q).

        Args:
            student: [n, C], the logits.
            pair: of these logits.
            terms: F and h = dF/dlog q, [n, C] each and both overwritten; None for a sum without a gradient. What they
                are outside the vocabulary does not matter.
        """
        for term in terms:
            for tensor in term:
                if tensor is not None:
                    tensor.masked_fill_(pair.outside, 0.0)
        values, slopes = [value for value, _ in terms], [grad_log_q for _, grad_log_q in terms]
        result: tuple[Tensor, ...] = _SoftmaxSums.apply(student, self, pair.log_q, values, slopes)
        return result

    def top_k(self, ranked: Tensor, k: int, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The columns of the k largest of `ranked`, largest first; of equal ones that of the lowest id.

        1 collective, of 4 k floats a token.

        Returns:
            Their global ids, int64, and the student's and the teacher's logits there, fp64; [n, min(k, V)] each.
            Differentiable in `student`.
        """
        found = self.once(lambda: self._largest(ranked.detach(), k, student.detach(), teacher))
        ids = found[1].long()
        at_student: Tensor = _Pick.apply(student, found[2], ids, self.ids)
        return ids, at_student, found[3]

    def head(self, teacher: Tensor, pair: Pair, mass: float, crossing_in_head: bool) -> Tensor:
        """Return which are the teacher's likeliest columns up to a probability of `mass`, [n, C] bool.

        Of equal ones those of the lowest ids come first. The one that crosses `mass` is in the head or not, as said;
        the very first always is, and one of logit -inf never. What differs from `mass` by less than 1e-12 is equal to
        it.

        The number of operations does not depend on the data, so no GPU is waited for. 5 collectives, 4 of 256 floats
        per token and one of 4; 9 for fp64 logits.
        """

        def compute() -> Tensor:
            search = _Search(self, teacher, pair.log_p)
            bound = round(mass * _WHOLE) + (-_SLACK if crossing_in_head else _SLACK)
            level = search.last_below(bound, crossing_in_head)
            return torch.stack([level.double(), search.ties_within(level, bound, crossing_in_head)])

        level, ties = self.once(compute).unsqueeze(-1).unbind(0)
        level = level.to(teacher.dtype)
        tied = (teacher == level) & ~teacher.isneginf()
        return (teacher > level) | (tied & (tied.cumsum(dim=-1, dtype=torch.int32) <= ties))

    def _largest(self, ranked: Tensor, k: int, *others: Tensor) -> Tensor:
        """[2 + others, n, k] fp64 of the k largest of `ranked`: it, the ids, and the others there.

        Where there are fewer, the rest is -inf with an id beyond all.
        """
        k = min(k, self.size)
        record = ranked.new_full((2 + len(others), len(ranked), k), -math.inf, dtype=torch.float64)
        record[1] = self.size
        if here := min(k, ranked.shape[-1]):
            index = _top_indices(ranked, here)
            record[1, :, :here] = self.ids[index].double()
            for row, tensor in ((0, ranked), *enumerate(others, start=2)):
                record[row, :, :here] = tensor.gather(-1, index).double()
        every = self.gather(record).permute(1, 2, 0, 3).flatten(start_dim=2)
        for field, descending in ((1, False), (0, True)):  # the second sort keeps the order of the first
            order = every[field].argsort(dim=-1, descending=descending, stable=True)
            every = every.gather(-1, order.expand_as(every))
        return every[..., :k]


def _max_and_sum(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of this rank's columns, [n] fp64 each: the maximum, and the sum of exponentials relative to it."""
    if logits.shape[-1] == 0:
        nothing = logits.new_zeros(len(logits), dtype=torch.float64)
        return nothing - math.inf, nothing
    maximum = logits.amax(dim=-1, keepdim=True)
    shifted = logits - maximum.masked_fill(maximum.isneginf(), 0.0)
    return maximum.squeeze(-1).double(), shifted.exp_().sum(dim=-1, dtype=torch.float64)


def _merged(records: Tensor) -> tuple[Tensor, Tensor]:
    """(maximum, log of the sum of exponentials relative to it), [n] each, from [R, 2, n]."""
    maximum = records[:, 0].amax(dim=0)
    finite = maximum.masked_fill(maximum.isneginf(), 0.0)
    return finite, (records[:, 1] * (records[:, 0] - finite).exp()).sum(dim=0).log()


def _top_indices(ranked: Tensor, k: int) -> Tensor:
    """[n, k]: where the k largest of each row are, largest first; of equal ones the first."""
    ranked = ranked.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    least = ranked.topk(k, dim=-1).values[:, -1:]
    above, equal = ranked > least, ranked == least
    equal &= equal.cumsum(dim=-1, dtype=torch.int32) <= k - above.sum(dim=-1, keepdim=True)
    # The column at which the j-th of them is counted; unlike nonzero, nothing whose shape the host would wait for.
    count = (above | equal).cumsum(dim=-1, dtype=torch.int32)
    nth = torch.arange(1, k + 1, dtype=torch.int32, device=ranked.device).expand(len(ranked), k)
    index = torch.searchsorted(count, nth.contiguous())
    order = ranked.gather(-1, index).argsort(dim=-1, descending=True, stable=True)
    return index.gather(-1, order)


# Probabilities as whole numbers of 2^-52: their sums are exact, whatever their order and on any number of ranks, where
# torch's cumsum of floats is not sure to be the same twice on a GPU.
_WHOLE = 2**52
_SLACK = 2**12
_DIGIT = 8  # bits that a round of the search finds


class _Search:
    """Find the logit at which the teacher's likeliest columns reach a mass, digit by digit of its bits.

    Columns are ordered by their negated logits, so likelier ones come first.
    """

    def __init__(self, columns: Columns, teacher: Tensor, log_p: Tensor) -> None:
        self.columns = columns
        self.order = (-teacher).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        self.units = (log_p.double().exp() * _WHOLE).nan_to_num_(0.0).round_().long()
        self.sorted, index = self.order.sort(dim=-1)
        self.before = torch.nn.functional.pad(self.units.gather(-1, index).cumsum(dim=-1), (1, 0))
        self.integer = torch.int64 if teacher.dtype == torch.float64 else torch.int32

    def last_below(self, bound: int, strictly: bool) -> Tensor:
        """Return the last logit, [n], likelier than which are columns of a mass below `bound`, or up to it."""
        bits = torch.iinfo(self.integer).bits
        digits = torch.arange(2**_DIGIT, device=self.order.device)
        key = torch.full((len(self.order), 1), torch.iinfo(self.integer).min, device=self.order.device)
        for shift in range(bits - _DIGIT, -1, -_DIGIT):
            local = self._mass_before(self._number(key + (digits << shift)))
            reached = self.columns.total(local.double())
            within = reached < bound if strictly else reached <= bound
            key = key + ((within.sum(dim=-1, keepdim=True) - 1).clamp_min(0) << shift)
        return -self._number(key).squeeze(-1)

    def ties_within(self, level: Tensor, bound: int, strictly: bool) -> Tensor:
        """Return how many of this rank's columns of that logit [n] are still within the bound, [n] fp64."""
        number = -level.unsqueeze(-1)
        tied = self.order == number
        unit = self.units.masked_fill(~tied, 0)
        unit = unit.amax(dim=-1) if unit.shape[-1] else unit.sum(dim=-1)
        first = self.columns.ids[:1].expand(len(level)) if len(self.columns.ids) else torch.full_like(unit, 2**52)
        local = torch.stack([first, tied.sum(dim=-1), unit, self._mass_before(number).squeeze(-1)])
        firsts, counts, units, masses = self.columns.gather(local.double()).long().unbind(1)
        unit, before = units.amax(dim=0), masses.sum(dim=0)
        left = bound - before
        within = -(-left // unit.clamp_min(1)) if strictly else left // unit.clamp_min(1)
        within = within.masked_fill(unit == 0, self.columns.size)
        within = torch.where(before == 0, within.clamp_min(1), within)  # the very first one
        return (within - (counts * (firsts < first)).sum(dim=0)).clamp_min(0).double()

    def _mass_before(self, numbers: Tensor) -> Tensor:
        """[n, k] -> [n, k], of this rank's columns that come before such a number."""
        return self.before.gather(-1, torch.searchsorted(self.sorted, numbers))

    def _number(self, key: Tensor) -> Tensor:
        """The floats of integers that are in their order; what is beyond infinity is infinity."""
        infinity = torch.tensor(math.inf, dtype=self.order.dtype, device="cpu").view(self.integer).item()
        key = key.clamp(-infinity - 1, infinity).to(self.integer)
        # Of negative floats the larger magnitude is the smaller number.
        return torch.where(key < 0, key ^ torch.iinfo(self.integer).max, key).view(self.order.dtype)


class _Total(Function):
    """The sum over ranks, of which every rank knows the gradient."""

    title = "a logit loss"

    @staticmethod
    def forward(ctx: Any, local: Tensor, columns: Columns) -> Tensor:
        return columns.once(lambda: columns.total(local))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


class _SoftmaxSums(Function):
    title = "a logit loss"

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, columns: Columns, log_q: Tensor, values: list[Tensor], slopes: list[Tensor | None]
    ) -> tuple[Tensor, ...]:
        given = [grad_log_q for grad_log_q in slopes if grad_log_q is not None]

        def compute() -> Tensor:
            local = torch.stack([tensor.sum(dim=-1, dtype=torch.float64) for tensor in (*values, *given)])
            return columns.total(local)

        sums = columns.once(compute)
        ctx.log_q, ctx.slopes, ctx.slope_sums = log_q, slopes, sums[len(values) :]
        ctx.set_materialize_grads(False)
        return tuple(sums[: len(values)].clone().unbind(0))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        log_q: Tensor = ctx.log_q
        result, of_q = torch.zeros_like(log_q), log_q.new_zeros(len(log_q), dtype=torch.float64)
        slope_sums = iter(ctx.slope_sums)
        for gradient, grad_log_q in zip(gradients, ctx.slopes, strict=True):
            if grad_log_q is None:
                continue
            slope_sum = next(slope_sums)
            if gradient is not None:
                result.addcmul_(grad_log_q, gradient.to(grad_log_q.dtype).unsqueeze(-1))
                of_q += gradient * slope_sum
        result.addcmul_(log_q.exp(), of_q.to(log_q.dtype).unsqueeze(-1), value=-1.0)
        return result, None, None, None, None


class _Pick(Function):
    """A model's logits at some ids of the whole vocabulary, already known; the gradient is of this rank's columns."""

    title = "a logit loss"

    @staticmethod
    def forward(ctx: Any, logits: Tensor, picked: Tensor, ids: Tensor, own_ids: Tensor) -> Tensor:
        ctx.shape, ctx.dtype, ctx.ids, ctx.own_ids = logits.shape, logits.dtype, ids, own_ids
        return picked.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        rows, width = ctx.shape
        result = gradient.new_zeros(rows, width + 1, dtype=ctx.dtype)
        if len(ctx.own_ids):
            index = ctx.ids - ctx.own_ids[:1]
            own = (index >= 0) & (index < len(ctx.own_ids))
            # A token's ids differ; what other ranks hold goes to one more column, which is dropped.
            result.scatter_(-1, index.where(own, width), gradient.to(result.dtype))
        return result[:, :width], None, None, None
