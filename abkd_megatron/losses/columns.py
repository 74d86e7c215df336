"""Operations over a vocabulary that is sharded across ranks, for losses that do not separate per column.

A `LogitLoss` is written as dense code on this rank's columns [n, C]; `Columns` supplies sums, maxima and top-k over all
ranks. Each operation saves what its gradient needs, so backward has no collectives.

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
    """Both models' log-probabilities on this rank's columns, without gradient."""

    log_p: Tensor
    """[n, C], teacher."""
    log_q: Tensor
    """[n, C], student."""
    log_ratio: Tensor
    """[n, C], log p - log q, with more digits than the difference of the two; NaN where both are -inf."""
    outside: Tensor
    """[n, C] bool: -inf in both models, hence outside the vocabulary."""
    size: Tensor
    """[n] fp64: number of columns inside the vocabulary, over all ranks."""


class Columns(ABC):
    """This rank's columns of the vocabulary, with operations over all ranks.

    Tensors [n, C] are fp32 (fp64 for fp64 logits). Results over the whole vocabulary are fp64 and bitwise identical on
    all ranks. All ranks must call the same operations in the same order. A single rank has no collectives.
    """

    ids: Tensor
    """[C] int64: global ids of this rank's columns, ascending."""
    size: int
    """Number of columns over all ranks."""
    drawn: Tensor | None = None
    """[n] int64: per position the global id that the student drew; None for a loss that `estimates` nothing."""

    @abstractmethod
    def total(self, local: Tensor) -> Tensor:
        """Return the sum of an fp64 tensor over the ranks. 1 collective; not differentiable."""

    @abstractmethod
    def gather(self, local: Tensor) -> Tensor:
        """Return every rank's fp64 tensor, [R, ...]; shapes must agree. 1 collective; not differentiable."""

    @abstractmethod
    def once(self, compute: Callable[[], Tensor]) -> Tensor:
        """Return the result of `compute`, cached from forward when backward runs the loss again.

        This avoids repeating collectives in backward. `compute` is not differentiated.
        """

    def sums(self, *terms: Tensor) -> tuple[Tensor, ...]:
        """Return the sum over the vocabulary of each term [n, C], [n] fp64 each. 1 collective.

        Differentiable if the terms depend only on this rank's columns and on constants.
        """
        local = torch.stack([term.sum(dim=-1, dtype=torch.float64) for term in terms])
        total: Tensor = _Total.apply(local, self)
        return tuple(total.unbind(0))

    def pair(self, student: Tensor, teacher: Tensor) -> Pair:
        """Return both models' log-probabilities on this rank's columns. 1 collective of 5 floats per token."""
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
        """Return sums over the vocabulary of functions F(log p, log q) of both models' probabilities, [n] fp64 each.

        Differentiable in `student`: dS/ds_j = h_j - q_j H. 1 collective of 2 floats per token and term (1 for terms
        without a gradient).

        Args:
            student: [n, C] logits.
            pair: log-probabilities of these logits.
            terms: F and h = dF/dlog q, [n, C] each, both overwritten; h is None for a sum without gradient. Values
                outside the vocabulary are ignored.
        """
        for term in terms:
            for tensor in term:
                if tensor is not None:
                    tensor.masked_fill_(pair.outside, 0.0)
        values, slopes = [value for value, _ in terms], [grad_log_q for _, grad_log_q in terms]
        result: tuple[Tensor, ...] = _SoftmaxSums.apply(student, self, pair.log_q, values, slopes)
        return result

    def top_k(self, ranked: Tensor, k: int, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the columns with the k largest values of `ranked`, in descending order; ties by lowest id.

        1 collective of 4 k floats per token.

        Returns:
            Global ids, int64, and the student's and teacher's logits there, fp64; [n, min(k, V)] each.
            Differentiable in `student`.
        """
        found = self.once(lambda: self._largest(ranked.detach(), k, student.detach(), teacher))
        ids = found[1].long()
        at_student: Tensor = _Pick.apply(student, found[2], ids, self.ids)
        return ids, at_student, found[3]

    def head(self, teacher: Tensor, pair: Pair, mass: float, crossing_in_head: bool) -> Tensor:
        """Return a mask, [n, C] bool, of the teacher's most likely columns up to a cumulative probability of `mass`.

        Ties are broken by lowest id. `crossing_in_head` decides whether the column that crosses `mass` is included. The
        most likely column always is; one with logit -inf never is. A cumulative probability within 1e-12 of `mass`
        counts as equal.

        No GPU synchronization. 5 collectives, 4 of 256 floats per token and one of 4; 9 for fp64 logits.
        """

        def compute() -> Tensor:
            search = _Search(self, teacher, pair.log_p)
            bound = round(mass * _ONE) + (-_SLACK if crossing_in_head else _SLACK)
            level = search.last_below(bound, crossing_in_head)
            return torch.stack([level.double(), search.ties_within(level, bound, crossing_in_head)])

        level, ties = self.once(compute).unsqueeze(-1).unbind(0)
        level = level.to(teacher.dtype)
        tied = (teacher == level) & ~teacher.isneginf()
        return (teacher > level) | (tied & (tied.cumsum(dim=-1, dtype=torch.int32) <= ties))

    def _largest(self, ranked: Tensor, k: int, *others: Tensor) -> Tensor:
        """Return [2 + others, n, k] fp64: the k largest of `ranked`, their ids, and the values of the others there.

        Missing columns have the value -inf and an id above all valid ones.
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
        for field, descending in ((1, False), (0, True)):  # the second sort is stable
            order = every[field].argsort(dim=-1, descending=descending, stable=True)
            every = every.gather(-1, order.expand_as(every))
        return every[..., :k]


def _max_and_sum(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maximum over this rank's columns and the sum of exponentials relative to it, [n] fp64 each."""
    if logits.shape[-1] == 0:
        nothing = logits.new_zeros(len(logits), dtype=torch.float64)
        return nothing - math.inf, nothing
    maximum = logits.amax(dim=-1, keepdim=True)
    shifted = logits - maximum.masked_fill(maximum.isneginf(), 0.0)
    return maximum.squeeze(-1).double(), shifted.exp_().sum(dim=-1, dtype=torch.float64)


def _merged(records: Tensor) -> tuple[Tensor, Tensor]:
    """Return (maximum, log of the sum of exponentials relative to it), [n] each, from [R, 2, n]."""
    maximum = records[:, 0].amax(dim=0)
    finite = maximum.masked_fill(maximum.isneginf(), 0.0)
    return finite, (records[:, 1] * (records[:, 0] - finite).exp()).sum(dim=0).log()


def _top_indices(ranked: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest per row, [n, k], in descending order; ties by lowest index."""
    ranked = ranked.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    least = ranked.topk(k, dim=-1).values[:, -1:]
    above, equal = ranked > least, ranked == least
    equal &= equal.cumsum(dim=-1, dtype=torch.int32) <= k - above.sum(dim=-1, keepdim=True)
    # The index at which the j-th selected column is counted. Unlike nonzero, this has a static shape and no GPU sync.
    count = (above | equal).cumsum(dim=-1, dtype=torch.int32)
    nth = torch.arange(1, k + 1, dtype=torch.int32, device=ranked.device).expand(len(ranked), k)
    index = torch.searchsorted(count, nth.contiguous())
    order = ranked.gather(-1, index).argsort(dim=-1, descending=True, stable=True)
    return index.gather(-1, order)


# Probabilities are integer multiples of 2^-52, so that sums are exact in any order and over any number of ranks.
# torch's float cumsum is not deterministic on GPUs.
_ONE = 2**52  # probability 1
_SLACK = 2**12
_DIGIT = 8  # bits per round of the search


class _Search:
    """Search for the logit at which the teacher's most likely columns reach a mass, bit by bit.

    Columns are sorted by negated logits, most likely first.
    """

    def __init__(self, columns: Columns, teacher: Tensor, log_p: Tensor) -> None:
        self.columns = columns
        self.order = (-teacher).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        self.units = (log_p.double().exp() * _ONE).nan_to_num_(0.0).round_().long()
        self.sorted, index = self.order.sort(dim=-1)
        self.before = torch.nn.functional.pad(self.units.gather(-1, index).cumsum(dim=-1), (1, 0))
        self.integer = torch.int64 if teacher.dtype == torch.float64 else torch.int32

    def last_below(self, bound: int, strictly: bool) -> Tensor:
        """Return the least likely logit, [n], whose more likely columns have a mass below (or up to) `bound`."""
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
        """Return how many of this rank's columns tied at `level` [n] are within the bound, [n] fp64."""
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
        within = torch.where(before == 0, within.clamp_min(1), within)  # the most likely column is always within
        return (within - (counts * (firsts < first)).sum(dim=0)).clamp_min(0).double()

    def _mass_before(self, numbers: Tensor) -> Tensor:
        """Return the mass of this rank's columns before each number, [n, k] -> [n, k]."""
        return self.before.gather(-1, torch.searchsorted(self.sorted, numbers))

    def _number(self, key: Tensor) -> Tensor:
        """Map integers to floats, preserving order; values beyond infinity become infinity."""
        infinity = torch.tensor(math.inf, dtype=self.order.dtype, device="cpu").view(self.integer).item()
        key = key.clamp(-infinity - 1, infinity).to(self.integer)
        # For negative floats a larger magnitude is a smaller number.
        return torch.where(key < 0, key ^ torch.iinfo(self.integer).max, key).view(self.order.dtype)


class _Total(Function):
    """All-reduce sum; every rank has the full gradient, so backward has no collective."""

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
    """Select logits at given global ids, already communicated; the gradient is scattered to this rank's columns."""

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
            # Ids are distinct per token. Those of other ranks go to an extra column, which is dropped.
            result.scatter_(-1, index.where(own, width), gradient.to(result.dtype))
        return result[:, :width], None, None, None
