"""Choice of the next token from sharded logits, the same in every layout.

Legend: n rows, V/TP vocabulary columns of a rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from abkd_megatron.config.rollouts import Sampling
from abkd_megatron.vocab_parallel import VocabShard
from abkd_megatron.vocab_parallel.noise import STEP, mixed, mixed_number, uniform

# Masses of the nucleus are whole numbers, whose sums do not depend on the order of ranks and columns.
_MASS_BITS = 40
_DIGIT_BITS = 8
_KEY_BITS = 32


def next_tokens(logits: Tensor, shard: VocabShard, sampling: Sampling, samples: Tensor, position: int) -> Tensor:
    """Choose a token per row; padded columns are never chosen.

    A token is the largest of logit / temperature + Gumbel noise (Maddison et al., 2014, arXiv:1411.0030), where the
    noise is a hash of (seed, number of the sample, position, vocabulary id). Ties go to the smallest id.

    Args:
        logits: [n, V/TP], this rank's columns.
        shard: of the vocabulary.
        sampling: how to draw.
        samples: [n] int64, numbers of the samples in the run.
        position: of the chosen token in its text.

    Returns:
        [n] int64, global ids, the same on every rank of the shard's group.

    Collectives: one all-gather of [n, 2] fp64; with `top_k` one of [n, k]; with `top_p` five all-reduces, of [n] and of
    [n, 256] int64. None on one rank. The host never waits.
    """
    width, device = logits.shape[-1], logits.device
    columns = torch.arange(width, device=device)
    scores = logits.float().masked_fill(columns >= shard.num_columns, -torch.inf)
    if sampling.temperature > 0:
        scores = scores / sampling.temperature
        kept = _kept(scores, shard, sampling)
        noise = gumbel(samples, position, columns + shard.start, sampling.seed)
        scores = (scores.double() + noise).masked_fill(~kept, -torch.inf)
    best = scores.amax(-1, keepdim=True)
    # No logit equals NaN; such a step ends at its loss, which says so.
    first = torch.where(scores == best, columns + shard.start, shard.size).amin(-1).clamp_max(shard.size - 1)
    if shard.num_ranks == 1:
        return first
    found = _gathered(torch.stack([best.squeeze(-1).double(), first.double()], -1), shard)  # ids are exact in fp64
    values, ids = found.unbind(-1)
    return torch.where(values == values.amax(0), ids, float(shard.size)).amin(0).long().clamp_max(shard.size - 1)


def gumbel(samples: Tensor, position: int, ids: Tensor, seed: int) -> Tensor:
    """Return Gumbel noise, [n, len(ids)] fp64, a function of (seed, samples, position, ids) alone."""
    row = mixed(mixed(samples + mixed_number(seed)) + position)
    return -(-uniform(mixed(row.unsqueeze(-1) + ids * STEP)).log()).log()


def coin(seed: int, number: int) -> float:
    """Return a number in [0, 1), a function of (seed, number) alone."""
    bits = mixed_number(mixed_number(seed) ^ number)
    return ((bits >> 11) & (2**53 - 1)) * 2.0**-53


def _kept(scores: Tensor, shard: VocabShard, sampling: Sampling) -> Tensor:
    """Return the columns to draw from, [n, V/TP] bool."""
    kept = torch.ones_like(scores, dtype=torch.bool)
    if sampling.top_k is not None and sampling.top_k < shard.size:
        largest = scores.topk(min(sampling.top_k, scores.shape[-1]), -1).values
        if shard.num_ranks > 1:
            largest = _gathered(largest, shard).transpose(0, 1).flatten(1).topk(sampling.top_k, -1).values
        kept = scores >= largest[:, -1:]
    if sampling.top_p is not None and sampling.top_p < 1:
        kept &= _in_nucleus(scores, kept, shard, sampling.top_p)
    return kept


def _in_nucleus(scores: Tensor, kept: Tensor, shard: VocabShard, top_p: float) -> Tensor:
    """Return the columns not below the largest threshold at which those above have mass `top_p`, [n, V/TP] bool.

    The threshold is found digit by digit in the order of fp32 numbers, from one histogram of masses per digit.
    """
    top = scores.amax(-1, keepdim=True)
    _reduce(top, dist.ReduceOp.MAX, shard)
    mass = ((scores - top).double().exp() * 2.0**_MASS_BITS).round().long() * kept
    bits = scores.contiguous().view(torch.int32).long() & (2**_KEY_BITS - 1)
    sign = 2 ** (_KEY_BITS - 1)
    key = torch.where(bits >= sign, bits ^ (2**_KEY_BITS - 1), bits ^ sign)  # ordered as the scores are
    prefix = key.new_zeros(len(key), 1)
    above = target = torch.zeros_like(prefix)
    for shift in range(_KEY_BITS - _DIGIT_BITS, -1, -_DIGIT_BITS):
        open_still = (key >> (shift + _DIGIT_BITS)) == prefix
        histogram = mass.new_zeros(len(key), 2**_DIGIT_BITS)
        histogram.scatter_add_(-1, (key >> shift) & (2**_DIGIT_BITS - 1), mass * open_still)
        _reduce(histogram, dist.ReduceOp.SUM, shard)
        from_here = histogram.flip(-1).cumsum(-1).flip(-1)  # masses of this digit and of larger ones
        if shift == _KEY_BITS - _DIGIT_BITS:
            target = (from_here[:, :1].double() * top_p).ceil().long()
        digit = (((above + from_here) >= target).sum(-1, keepdim=True) - 1).clamp_min(0)
        above = above + from_here.gather(-1, digit) - histogram.gather(-1, digit)
        prefix = (prefix << _DIGIT_BITS) | digit
    return key >= prefix


def _gathered(local: Tensor, shard: VocabShard) -> Tensor:
    """Return [TP, *local.shape]."""
    found = local.new_empty(shard.num_ranks * len(local), *local.shape[1:])
    dist.all_gather_into_tensor(found, local.contiguous(), group=shard.group)
    return found.view(shard.num_ranks, *local.shape)


def _reduce(local: Tensor, operation: dist.ReduceOp.RedOpType, shard: VocabShard) -> None:
    if shard.num_ranks > 1:
        dist.all_reduce(local, operation, group=shard.group)
