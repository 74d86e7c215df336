"""Records of a teacher from its vocabulary-sharded logits: the K largest log-probabilities, the rest's mass, draws.

Legend: N tokens, C this rank's real columns, R ranks, D draws per token.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.vocab_parallel.passes import all_gather
from abkd_megatron.vocab_parallel.shard import VocabShard
from abkd_megatron.vocab_parallel.teacher_records import TeacherRecords, merged

# Tokens that are computed together: a chunk takes a few copies of its logits in fp32.
_CHUNK = 1024
# The same with draws, which take two more of 8 bytes.
_CHUNK_OF_DRAWS = 256
# Bits of the sum of a tail's masses, which are whole numbers: their sums do not depend on the order of ranks and
# columns, and are exact in fp64. Of 2^18 tokens those with less than 2^-35 of the largest are never drawn.
_MASS_BITS = 52

# Per token and rank, with the candidates: log-sum-exp at T and at 1, entropy of the rank's own columns at 1, and the
# label's logit.
_NUM_STATS = 4


@torch.no_grad()
def truncate(
    logits: Tensor,
    labels: Tensor,
    shard: VocabShard,
    top_k: int,
    temperature: float = 1.0,
    places: Tensor | None = None,
) -> TeacherRecords:
    """Return the records of a teacher's distributions.

    The rest is the log-sum-exp of the other columns, not 1 - the sum of the kept ones, which would cancel.

    Args:
        logits: [N, W], any floating dtype, this rank's columns, W >= C.
        labels: [N] int64, global ids.
        shard: of the vocabulary.
        top_k: K, 1 to `shard.size`.
        temperature: of `log_probs` and `log_rest`.
        places: [N, D] fp64, 0 to 1: a draw is the token at which the cumulative mass of the tail, in the order of ranks
            and their columns, exceeds this part of it. None: no draws.

    Returns:
        The records, bitwise identical on every rank; sorted by probability, equal ones by rank. fp32.

    Raises:
        ConfigError: K is larger than the vocabulary, or W does not fit the shard.

    Collectives: per chunk of 1024 tokens 2 all-gathers of fp64, of 2 K + 4 and of 1 number per token. With draws per
        chunk of 256 tokens 3, of 2 K + 6, 2 and 2 D. None on one rank.
    """
    if not 1 <= top_k <= shard.size:
        raise ConfigError(f"expected top_k in 1 .. {shard.size}, the size of the vocabulary, got {top_k}; lower it")
    shard.check_width("logits", logits.shape[-1])
    size = _CHUNK if places is None else _CHUNK_OF_DRAWS
    split = logits.split(size), labels.split(size), *([] if places is None else [places.split(size)])
    parts = [
        _truncate(part[:, : shard.num_columns], of, shard, top_k, temperature, *at)
        for part, of, *at in zip(*split, strict=True)
    ]
    return TeacherRecords(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _truncate(
    logits: Tensor, labels: Tensor, shard: VocabShard, top_k: int, temperature: float, places: Tensor | None = None
) -> list[Tensor]:
    # One candidate more has the largest of the tail.
    candidates = top_k + (places is not None)
    columns = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scaled = columns / temperature
    own = min(candidates, shard.num_columns)
    values, index = scaled.topk(own, dim=-1)
    missing = (0, candidates - own)
    values = torch.nn.functional.pad(values.double(), missing, value=-torch.inf)
    ids = torch.nn.functional.pad(index.double() + shard.start, missing, value=-1.0)
    everywhere = _gathered(torch.cat([values, ids, _stats(columns, scaled, labels, shard)], dim=-1), shard)
    values, ids, stats = everywhere.split([candidates, candidates, _NUM_STATS], dim=-1)
    # A real column comes before what a rank lacks, even if the teacher excludes it. Stable, so that ranks agree.
    order = values.clamp_min(torch.finfo(torch.float64).min).masked_fill(ids < 0, -torch.inf)
    _, at = order.transpose(0, 1).flatten(1).sort(dim=-1, descending=True, stable=True)
    kept, chosen = (it.transpose(0, 1).flatten(1).gather(-1, at[:, :top_k]) for it in (values, ids))
    log_z, log_z_at_1 = stats[..., 0].logsumexp(0), stats[..., 1].logsumexp(0)
    log_share = stats[..., 1] - log_z_at_1
    entropy = torch.where(log_share > -torch.inf, log_share.exp() * (stats[..., 2] - log_share), 0.0).sum(0)
    label = stats[..., 3].amax(0) - log_z_at_1
    others = _others(scaled, chosen.long() - shard.start)
    of_rest = [others.logsumexp(-1, keepdim=True).double()]
    if places is not None:
        largest = values.transpose(0, 1).flatten(1).gather(-1, at[:, top_k:candidates])
        masses = _masses(others, largest, shard)
        of_rest.append(masses[:, -1:].double())
    found = _gathered(torch.cat(of_rest, dim=-1), shard)
    rest = found[..., 0].logsumexp(0)
    per_token = [(rest - log_z).float(), entropy.float(), label.float()]
    draws = []
    if places is not None:
        drawn, of_drawn = _drawn(others, masses, found[..., 1].t().long(), places, shard)
        drawn, of_drawn, count = merged(drawn, of_drawn, rest > -torch.inf)
        chosen, kept = torch.cat([chosen, drawn], dim=-1), torch.cat([kept, of_drawn], dim=-1)
        draws = [count]
    return [chosen.to(torch.int32), (kept - log_z.unsqueeze(-1)).float(), *per_token, *draws]


def _stats(columns: Tensor, scaled: Tensor, labels: Tensor, shard: VocabShard) -> Tensor:
    """Return [N, _NUM_STATS] fp64; of a rank without columns -inf, -inf, 0 and -inf."""
    log_z = columns.logsumexp(-1)
    log_p = columns - log_z.unsqueeze(-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    at = labels - shard.start
    is_here = (at >= 0) & (at < shard.num_columns)
    padded = torch.nn.functional.pad(columns, (0, 1), value=-torch.inf)
    of_label = padded.gather(-1, torch.where(is_here, at, shard.num_columns).unsqueeze(-1)).squeeze(-1)
    return torch.stack([scaled.logsumexp(-1), log_z, entropy, of_label], dim=-1).double()


def _others(scaled: Tensor, kept: Tensor) -> Tensor:
    """Return this rank's columns with -inf at those that are kept, and -inf after the last, [N, C + 1].

    Args:
        scaled: [N, C].
        kept: [N, K], local columns; those of other ranks are out of range.
    """
    num_columns = scaled.shape[-1]
    at = torch.where((kept >= 0) & (kept < num_columns), kept, num_columns)
    return torch.nn.functional.pad(scaled, (0, 1), value=-torch.inf).scatter_(-1, at, -torch.inf)


def _masses(others: Tensor, largest: Tensor, shard: VocabShard) -> Tensor:
    """Return the cumulative masses of this rank's tail, [N, C + 1] int64.

    Args:
        others: see `_others`.
        largest: [N, 1] fp64, of the whole tail.
        shard: of the vocabulary.
    """
    bits = _MASS_BITS - (shard.size - 1).bit_length()
    relative = others.double() - torch.where(largest > -torch.inf, largest, 0.0)
    return relative.exp_().mul_(2.0**bits).round_().long().cumsum(-1)


def _drawn(
    others: Tensor, masses: Tensor, of_ranks: Tensor, places: Tensor, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """Return the draws, [N, D] fp64 ids and logits, the same on every rank; arbitrary where there is no tail.

    Args:
        others: see `_others`.
        masses: see `_masses`.
        of_ranks: [N, R] int64, the ranks' totals.
        places: see `truncate`.
        shard: of the vocabulary.
    """
    up_to = of_ranks.cumsum(-1)
    total = up_to[:, -1:]
    target = torch.minimum((places * total).long(), total - 1)
    rank = dist.get_rank(shard.group) if shard.num_ranks > 1 else 0
    own = target - (up_to[:, rank : rank + 1] - of_ranks[:, rank : rank + 1])
    is_here = (own >= 0) & (own < of_ranks[:, rank : rank + 1])
    at = torch.searchsorted(masses, own, right=True).clamp_max(others.shape[-1] - 1)
    found = torch.cat([(at + shard.start).double(), others.gather(-1, at).double()], dim=-1)
    found = torch.where(is_here.repeat(1, 2), found, 0.0)
    ids, logits = _gathered(found, shard).sum(0).chunk(2, dim=-1)
    return ids, logits


def _gathered(record: Tensor, shard: VocabShard) -> Tensor:
    """Return the records [N, fields] of all ranks, [R, N, fields]."""
    if shard.num_ranks == 1:
        return record.unsqueeze(0)
    found, _ = all_gather(record.t().contiguous(), shard, async_op=False)
    return found.transpose(1, 2)
