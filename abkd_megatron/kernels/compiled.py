"""The eager passes under torch.compile, which fuses a chunk's operations into one loop."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from abkd_megatron.kernels import eager

# Divergence, labels, dtypes and shape are compile-time constants. Torch's limit of 8 variants would send the ninth back
# to eager.
_MAX_VARIANTS = 256


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False, fullgraph=True)


def _call(function: Callable, *args: Any) -> Any:
    with torch._dynamo.config.patch(recompile_limit=_MAX_VARIANTS, accumulated_recompile_limit=_MAX_VARIANTS):
        return _compiled(function)(*args)


local_record = functools.partial(_call, eager.local_record)
local_second_record = functools.partial(_call, eager.local_second_record)
local_gradient = functools.partial(_call, eager.local_gradient)
