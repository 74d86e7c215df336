"""Causal depthwise convolution."""

import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **other: object
) -> tuple[Tensor, None]:
    """Return [b, l, d] of x [b, l, d] and weight [d, width], and no final state."""
    assert not any(other.values()), other
    channels, width = weight.shape
    out = F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), bias, padding=width - 1, groups=channels)
    out = out[..., : x.shape[1]].transpose(1, 2)
    return (F.silu(out) if activation in ("silu", "swish") else out), None
