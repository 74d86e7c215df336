"""Records of a teacher from its vocabulary-sharded logits: the K largest log-probabilities and the rest of the mass.

Legend: N tokens, C this rank's real columns, R ranks.
"""

import torch
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.vocab_parallel.passes import all_gather
from abkd_megatron.vocab_parallel.record_passes import TeacherRecords
from abkd_megatron.vocab_parallel.shard import VocabShard

# Tokens that are computed together: a chunk takes a few copies of its logits in fp32.
_CHUNK = 1024

# Per token and rank, with the candidates: log-sum-exp at T and at 1, entropy of the rank's own columns at 1, and the
# label's logit.
_NUM_STATS = 4


@torch.no_grad()
def truncate(logits: Tensor, labels: Tensor, shard: VocabShard, top_k: int, temperature: float = 1.0) -> TeacherRecords:
    """Return the records of a teacher's distributions.

    The rest is the log-sum-exp of the other columns, not 1 - the sum of the kept ones, which would cancel.

    Args:
        logits: [N, W], any floating dtype, this rank's columns, W >= C.
        labels: [N] int64, global ids.
        shard: of the vocabulary.
        top_k: K, 1 to `shard.size`.
        temperature: of `log_probs` and `log_rest`.

    Returns:
        The records, bitwise identical on every rank; sorted by probability, equal ones by rank. fp32.

    Raises:
        ConfigError: K is larger than the vocabulary, or W does not fit the shard.

    Collectives: per chunk of 1024 tokens 2 all-gathers of fp64, of 2 K + 4 and of 1 number per token; none on one rank.
    """
    if not 1 <= top_k <= shard.size:
        raise ConfigError(f"expected top_k in 1 .. {shard.size}, the size of the vocabulary, got {top_k}; lower it")
    shard.check_width("logits", logits.shape[-1])
    chunks = zip(logits.split(_CHUNK), labels.split(_CHUNK), strict=True)
    parts = [_truncate(part[:, : shard.num_columns], of, shard, top_k, temperature) for part, of in chunks]
    return TeacherRecords(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _truncate(logits: Tensor, labels: Tensor, shard: VocabShard, top_k: int, temperature: float) -> list[Tensor]:
    columns = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scaled = columns / temperature
    own = min(top_k, shard.num_columns)
    values, index = scaled.topk(own, dim=-1)
    missing = (0, top_k - own)
    values = torch.nn.functional.pad(values.double(), missing, value=-torch.inf)
    ids = torch.nn.functional.pad(index.double() + shard.start, missing, value=-1.0)
    everywhere = _gathered(torch.cat([values, ids, _stats(columns, scaled, labels, shard)], dim=-1), shard)
    values, ids, stats = everywhere.split([top_k, top_k, _NUM_STATS], dim=-1)
    # A real column comes before what a rank lacks, even if the teacher excludes it. Stable, so that ranks agree.
    order = values.clamp_min(torch.finfo(torch.float64).min).masked_fill(ids < 0, -torch.inf)
    _, at = order.transpose(0, 1).flatten(1).sort(dim=-1, descending=True, stable=True)
    kept, chosen = (it.transpose(0, 1).flatten(1).gather(-1, at[:, :top_k]) for it in (values, ids))
    log_z, log_z_at_1 = stats[..., 0].logsumexp(0), stats[..., 1].logsumexp(0)
    log_share = stats[..., 1] - log_z_at_1
    entropy = torch.where(log_share > -torch.inf, log_share.exp() * (stats[..., 2] - log_share), 0.0).sum(0)
    label = stats[..., 3].amax(0) - log_z_at_1
    rest = _gathered(_log_sum_of_others(scaled, chosen.long() - shard.start), shard)[..., 0].logsumexp(0)
    return [
        chosen.to(torch.int32),
        (kept - log_z.unsqueeze(-1)).float(),
        (rest - log_z).float(),
        entropy.float(),
        label.float(),
    ]


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


def _log_sum_of_others(scaled: Tensor, kept: Tensor) -> Tensor:
    """Return the log-sum-exp of this rank's columns that are not kept, [N, 1] fp64.

    Args:
        scaled: [N, C].
        kept: [N, K], local columns; those of other ranks are out of range.
    """
    num_columns = scaled.shape[-1]
    at = torch.where((kept >= 0) & (kept < num_columns), kept, num_columns)
    others = torch.nn.functional.pad(scaled, (0, 1), value=-torch.inf).scatter_(-1, at, -torch.inf)
    return others.logsumexp(-1, keepdim=True).double()


def _gathered(record: Tensor, shard: VocabShard) -> Tensor:
    """Return the records [N, fields] of all ranks, [R, N, fields]."""
    if shard.num_ranks == 1:
        return record.unsqueeze(0)
    found, _ = all_gather(record.t().contiguous(), shard, async_op=False)
    return found.transpose(1, 2)
