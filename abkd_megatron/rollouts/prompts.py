"""Prompts of a step on own text, from the step's samples of the data.

Legend: n rows of S tokens, P tokens of the longest prompt.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Batch = Mapping[str, Tensor]


def of_beginnings(batches: Sequence[Batch], length: int) -> Tensor:
    """Return the first `length` tokens of each row.

    Args:
        batches: micro-batches of the data with `tokens`, [b, S].
        length: P.

    Returns:
        [n, P + 1] int64: a prompt's tokens, and in the last column their number.
    """
    tokens = torch.cat([batch["tokens"] for batch in batches])[:, :length]
    return torch.nn.functional.pad(tokens, (0, 1), value=length)


def of_conversations(batches: Sequence[Batch], longest: int) -> Tensor:
    """Return what precedes the first token that counts, in the conversation of that token: one prompt per row.

    Args:
        batches: micro-batches of packed data with `tokens` and `loss_mask`, [b, S], and `cu_seqlens`, [b, S + 1].
        longest: P. Longer prompts are left out.

    Returns:
        [n, P + 1] int64: a prompt's tokens, and in the last column their number: 0 for a row without a prompt.

    On a device the host waits for the sizes.
    """
    tokens, mask, ends = (torch.cat([it[name] for it in batches]) for name in ("tokens", "loss_mask", "cu_seqlens"))
    counts, at = mask > 0, torch.arange(tokens.shape[1], device=tokens.device)
    label = counts.int().argmax(-1, keepdim=True)  # the mask is at the token before
    begin = ends.masked_fill(ends > label, 0).amax(-1, keepdim=True)
    length = label + 1 - begin
    length = length.masked_fill(~counts.any(-1, keepdim=True) | (length > longest), 0)
    wanted = at[:longest]
    found = tokens.gather(1, (begin + wanted).clamp_max(tokens.shape[1] - 1)).masked_fill(wanted >= length, 0)
    found = torch.nn.functional.pad(found, (0, longest - found.shape[1]))
    return torch.cat([found, length], 1)
