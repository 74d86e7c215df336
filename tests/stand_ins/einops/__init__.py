"""Rearrangements of einops that Megatron's MambaMixer uses in training: axes permuted, and axes of 1 removed.

Only ranks of tests import it, from their PYTHONPATH.
"""

from torch import Tensor


def rearrange(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """Return `x` with its axes in another order, such as ``l b d -> b l d`` or ``d 1 w -> d w``."""
    given, wanted = (side.split() for side in pattern.split("->"))
    kept = [axis for axis in given if axis != "1"]
    assert sorted(kept) == sorted(wanted) and not sizes, f"{pattern}: not one of this stand-in's"
    for axis in reversed(range(len(given))):
        x = x.squeeze(axis) if given[axis] == "1" else x
    return x.permute([kept.index(axis) for axis in wanted])


def repeat(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    raise NotImplementedError(f"{pattern}: not one of this stand-in's")
