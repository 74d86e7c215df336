"""Rearrangements of einops that Megatron uses in MambaMixer and for the meshes of Megatron FSDP.

Only ranks of tests import it, from their PYTHONPATH.
"""

import math
import re

from torch import Tensor


def rearrange(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """Return `x` with its axes in another order, such as ``l b d -> b l d``, ``d 1 w -> d w`` or ``(a b) -> b a``."""
    given, wanted = ([it.strip("()").split() for it in re.findall(r"\([^)]*\)|\S+", it)] for it in pattern.split("->"))
    names = [name for axis in given for name in axis]
    shape = []
    for axis, size in zip(given, x.shape, strict=True):
        known = [sizes.get(name, 1 if name == "1" else 0) for name in axis]
        shape += [it or size // math.prod(filter(None, known)) for it in known] if len(axis) > 1 else [size]
    kept = [name for name in names if name != "1"]
    order = [name for axis in wanted for name in axis]
    assert sorted(kept) == sorted(order), f"{pattern}: not one of this stand-in's"
    x = x.reshape([size for name, size in zip(names, shape, strict=True) if name != "1"])
    x = x.permute([kept.index(name) for name in order])
    found = iter(x.shape)
    return x.reshape([math.prod(next(found) for _ in axis) for axis in wanted])


def repeat(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    raise NotImplementedError(f"{pattern}: not one of this stand-in's")
