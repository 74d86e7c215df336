"""Gradients of hidden states and LM head, accumulated per chunk of tokens."""

import functools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Operands:
    """Hidden states and LM head weights of all models, and labels, for all tokens; no teacher's with records."""

    student_hidden: Tensor
    student_weight: Tensor
    labels: Tensor
    teachers: tuple[Tensor, ...] = ()
    """Hidden states and weight of each teacher, one after another."""


class Gradients:
    """Gradients of hidden states [N, h] and weight [W, h], accumulated over chunks; the weight's in at least fp32."""

    def __init__(self, operands: Operands, of_hidden: bool, of_weight: bool) -> None:
        self.operands = operands
        hidden, weight = operands.student_hidden, operands.student_weight
        self.of_hidden = torch.empty_like(hidden) if of_hidden else None
        accumulated = torch.promote_types(weight.dtype, torch.float32)
        self.of_weight = torch.zeros_like(weight, dtype=accumulated) if of_weight else None

    def add(self, chunk: slice, of_logits: Tensor) -> None:
        """Accumulate the gradient of a chunk's logits."""
        if self.of_hidden is not None:
            torch.mm(of_logits, self.operands.student_weight, out=self.of_hidden[chunk])
        if self.of_weight is not None:
            add_product(self.of_weight, of_logits.t(), self.operands.student_hidden[chunk])


def sum_of_logits(hidden_states: Sequence[Tensor], weights: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """Compute the sum of scale * hidden @ weight^T, [n, W], over teachers."""
    logits = hidden_states[0] @ weights[0].t()
    if scales[0] != 1.0:
        logits.mul_(scales[0])
    for hidden, weight, scale in zip(hidden_states[1:], weights[1:], scales[1:], strict=True):
        logits.addmm_(hidden, weight.t(), alpha=scale)
    return logits


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`, accumulating in the dtype of `total`."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.device.type == "cpu":
        total.addmm_(left.to(total.dtype), right.to(total.dtype))  # products of bf16 are exact in fp32
    elif _accumulates_in_place(total.device, total.dtype, left.dtype):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(left, right, out_dtype=total.dtype)


@functools.cache
def _accumulates_in_place(device: torch.device, of_sum: torch.dtype, of_factors: torch.dtype) -> bool:
    """Return True if this torch version supports addmm with an output dtype other than the factors'."""
    total = torch.zeros(16, 16, device=device, dtype=of_sum)
    factor = torch.zeros(16, 16, device=device, dtype=of_factors)
    try:
        torch.addmm(total, factor, factor, out_dtype=of_sum, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def weighted(weight: float | Tensor, per_token: Tensor, chunk: slice = slice(None)) -> Tensor:
    """Return weight * per_token; a weight per token is sliced, and gives 0 where it is 0, even of NaN."""
    if not isinstance(weight, Tensor):
        return weight * per_token
    own = weight[chunk].to(per_token.dtype)
    return torch.where(own == 0, 0.0, own * per_token)


def factor_of(of_loss: Tensor, token_weights: Tensor) -> Tensor:
    """Return c in of_loss = c * token_weights; NaN, on a GPU, if there is none."""
    weights = token_weights.to(of_loss.dtype)
    if not weights.numel():
        return weights.sum()
    at = weights.abs().argmax(dim=0, keepdim=True)  # of the largest; keepdim, as indexing by a scalar synchronizes
    largest = weights.gather(0, at)
    factor = torch.where(largest != 0, of_loss.gather(0, at) / largest, 0.0).squeeze(0)
    off = (of_loss - factor * weights).abs().amax()
    is_off = off > 1e-5 * of_loss.abs().amax()
    token_weight_check.watch(is_off)
    return torch.where(is_off, torch.nan, factor)


class TokenWeightCheck:
    """Check that backward weights each token's loss by the token weights of forward.

    On CPU the check is immediate. On GPU only the first check synchronizes, which finds a script that is always wrong.
    Later results are copied to the host asynchronously and raised once available.
    """

    def __init__(self) -> None:
        self._has_waited = False
        self._awaited: deque[tuple[Tensor, Any]] = deque()

    def watch(self, is_off: Tensor) -> None:
        """Raise if `is_off`, a bool on any device, is known to be true."""
        if is_off.device.type == "cpu":
            self._raise_if(is_off)
        elif is_off.is_cuda:
            found = torch.empty((), dtype=torch.bool, pin_memory=True, device="cpu")
            found.copy_(is_off, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(is_off.device))
            self.expect(found, arrived)

    def expect(self, found: Tensor, arrived: Any) -> None:
        """Check `found` once the event `arrived` has completed; the first call waits for it."""
        self._awaited.append((found, arrived))
        if not self._has_waited:
            self._has_waited = True
            arrived.synchronize()
        self.raise_if_known()

    def raise_if_known(self) -> None:
        """Raise if a completed check failed; do not wait for pending ones."""
        while self._awaited and self._awaited[0][1].query():
            self._raise_if(self._awaited.popleft()[0])

    def _raise_if(self, is_off: Tensor) -> None:
        if bool(is_off):
            self._awaited.clear()
            raise RuntimeError(
                "vocab_parallel_distillation_head: the gradients computed in forward are invalid, because the loss per "
                "token was not multiplied by its token weight times one factor for all tokens: pass the applied loss "
                "mask as token_weights, or None"
            )


token_weight_check = TokenWeightCheck()
