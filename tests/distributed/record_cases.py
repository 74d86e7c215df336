"""Teacher records of dense logits, and hard cases of them."""

from dataclasses import replace

import torch
from torch import Tensor

from abkd_megatron import AlphaBeta
from abkd_megatron.losses import Divergence, WeightedSum
from abkd_megatron.vocab_parallel import TeacherRecords
from abkd_megatron.vocab_parallel.teacher_records import merged


def records_of(
    teacher: Tensor, num_kept: int, labels: Tensor, temperature: float = 1.0, dtype: torch.dtype = torch.float32
) -> TeacherRecords:
    """The records of logits [..., V], with the `num_kept` likeliest tokens in an order of their own."""
    logits = teacher.double().flatten(0, -2)
    log_p, at_1 = (logits / temperature).log_softmax(-1), logits.log_softmax(-1)
    ids = logits.topk(num_kept, sorted=False).indices.flip(-1)
    rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
    label_log_prob = at_1.gather(-1, labels.reshape(-1, 1).clamp(0, logits.shape[-1] - 1)).squeeze(-1)
    label_log_prob = label_log_prob.masked_fill(labels.reshape(-1) >= logits.shape[-1], -torch.inf)
    entropy = -(at_1.exp() * at_1).nansum(-1)
    return TeacherRecords(ids, *(it.to(dtype) for it in (log_p.gather(-1, ids), rest, entropy, label_log_prob)))


def with_draws(records: TeacherRecords, teacher: Tensor, num_draws: int, temperature: float) -> TeacherRecords:
    """The same with independent draws of the other tokens, of which the first is also the last."""
    log_p = (teacher.double().flatten(0, -2) / temperature).log_softmax(-1)
    tail = log_p.exp().scatter(-1, records.ids.long(), 0.0)
    has_tail = records.log_rest > -torch.inf
    tail[~has_tail] = 1.0
    ids = torch.multinomial(tail, num_draws, replacement=True, generator=torch.Generator().manual_seed(5))
    ids[:, -1] = ids[:, 0]
    drawn, of_drawn, counts = merged(ids, log_p.gather(-1, ids).to(records.log_probs.dtype), has_tail)
    ids = torch.cat([records.ids, drawn.to(records.ids.dtype)], -1)
    return replace(records, ids=ids, log_probs=torch.cat([records.log_probs, of_drawn], -1), draws=counts)


def _terms(log_p: Tensor, log_q: Tensor, divergence: AlphaBeta) -> Tensor:
    """F of an alpha-beta divergence, by autograd in log q."""
    a, b = divergence.alpha, divergence.beta
    p_to, q_to = (lambda power, of=it: (power * of).exp() for it in (log_p, log_q))
    if b == 0:
        return (p_to(a) * a * (log_p - log_q) - p_to(a) + q_to(a)) / a**2
    return -(p_to(a) * q_to(b) - a / (a + b) * p_to(a + b) - b / (a + b) * q_to(a + b)) / (a * b)


def sampled_divergence(
    divergence: Divergence, student: Tensor, records: TeacherRecords, temperature: float = 1.0
) -> Tensor:
    """The estimate from kept tokens and draws, in fp64 token by token: the formula of vocab_parallel/records.py.

    Args:
        divergence: alpha-beta, or a weighted sum of such.
        student: [N, V] logits.
        records: of N tokens, with draws.
        temperature: T.
    """
    assert records.draws is not None
    if isinstance(divergence, WeightedSum):
        parts = [weight * sampled_divergence(of, student, records, temperature) for weight, of in divergence.terms]
        return torch.stack(parts).sum(0)
    assert isinstance(divergence, AlphaBeta)
    num_kept, values = records.num_kept, []
    for row in range(len(student)):
        log_q = (student[row].double() / temperature).log_softmax(-1)
        ids, log_p = records.ids[row].long(), records.log_probs[row].double()
        kept, drawn = ids[:num_kept], ids[num_kept:]
        value = _terms(log_p[:num_kept], log_q[kept], divergence).sum()
        in_tail = torch.ones_like(log_q, dtype=torch.bool).scatter(-1, kept, False)
        q_tail = log_q[in_tail].exp().sum()
        slope = (q_tail.detach() / in_tail.sum().clamp_min(1)) ** (
            divergence.alpha + divergence.beta - 1
        ) / divergence.alpha
        value = value + slope * q_tail
        for number in range(len(drawn)):
            if records.draws[row, number]:
                of = log_p[num_kept + number]
                share = int(records.draws[row, number]) / records.num_draws
                weight = share * (records.log_rest[row].double() - of).exp()
                q = log_q[drawn[number]]
                value = value + weight * (_terms(of, q, divergence) - slope * q.exp())
        values.append(value)
    return torch.stack(values)
