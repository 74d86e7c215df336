"""Teacher records of dense logits, and hard cases of them."""

import torch
from torch import Tensor

from abkd_megatron.vocab_parallel import TeacherRecords


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
