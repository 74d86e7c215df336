"""Random numbers by hash: the same in every layout, and without a generator whose state a checkpoint would need."""

import torch
from torch import Tensor


def signed(number: int) -> int:
    """Return an unsigned 64-bit number as int64 has it."""
    return (number + 2**63) % 2**64 - 2**63


STEP = signed(0x9E3779B97F4A7C15)
"""Distance of the numbers of a row before they are hashed, 2^64 over the golden ratio."""


def mixed(numbers: Tensor) -> Tensor:
    """Hash int64 numbers with the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers = (numbers ^ ((numbers >> shift) & (2 ** (64 - shift) - 1))) * signed(factor)
    return numbers ^ ((numbers >> 31) & (2**33 - 1))


def mixed_number(number: int) -> int:
    """Hash a number."""
    return int(mixed(torch.tensor(signed(number), device="cpu")))


def uniform(bits: Tensor) -> Tensor:
    """Map hashes, int64, to fp64 numbers above 0 and at most 1; 1 has a probability of 2^-53."""
    return (((bits >> 11) & (2**53 - 1)).double() + 0.5) * 2.0**-53


def places_in_tail(labels: Tensor, num_draws: int) -> Tensor:
    """Return where in the teacher's tail each draw falls: r/R to (r + 1)/R of its mass for draw r.

    One draw of each R-th of the mass has the mean of R independent ones, and at most their variance. A hash of all
    labels of the sample, of the position and of r.

    Args:
        labels: [b, s] int64, a sample per row.
        num_draws: R.

    Returns:
        [b * s, R] fp64, from 0 to 1.
    """
    positions = torch.arange(labels.shape[-1], device=labels.device)
    sample = mixed(labels + positions * STEP).sum(-1, keepdim=True)  # int64 wraps around in any order
    draws = torch.arange(num_draws, device=labels.device)
    row = mixed(mixed(sample) + positions).flatten().unsqueeze(-1)
    return (draws + uniform(mixed(row + draws * STEP))) / num_draws
