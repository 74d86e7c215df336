"""How the passes over a chunk of logits are carried out: one signature, several ways.

`eager` is plain PyTorch and runs everywhere. `compiled` is the same code through torch.compile: several times as fast
on a CPU, after most of a minute for the compiler in a new process; it needs a C++ compiler there. `triton` reads the
logits where they lie and is for GPUs; it has been compiled for them and run in Triton's interpreter, not yet on one.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

from abkd_megatron.errors import ConfigError
from abkd_megatron.kernels import compiled, eager

logger = logging.getLogger(__name__)

# Logits of one model in a chunk that is worth a call and whose temporaries stay in a core's cache.
SMALL_CHUNK = 2**18


@dataclass
class Kernel:
    """One way to carry out both passes, and the chunks it likes."""

    name: str
    local_record: Callable
    """`eager.local_record` or its equal."""
    local_gradient: Callable
    """`eager.local_gradient` or its equal."""
    chunk_elements: int
    """Logits of one model a chunk: large enough to be worth a call, small beside the whole."""
    fixed_shape: bool
    """Every chunk has the same number of rows; the last one may overlap the one before."""
    strided: bool = False
    """Rows may lie further apart than they are long, so that padding need not be copied away."""

    def chunks(self, num_tokens: int, num_columns: int, small: bool = False) -> list[slice]:
        """The rows of each chunk, every row in one; small chunks if plain PyTorch has to work on them."""
        elements = min(self.chunk_elements, SMALL_CHUNK) if small else self.chunk_elements
        rows = max(1, elements // max(num_columns, 1))
        if self.fixed_shape and num_tokens > rows:
            firsts = [*range(0, num_tokens - rows, rows), num_tokens - rows]
            return [slice(first, first + rows) for first in firsts]
        return [slice(first, min(first + rows, num_tokens)) for first in range(0, num_tokens, rows)]


NAMES = ("eager", "compiled", "triton")


@functools.cache
def _kernel(name: str) -> Kernel:
    if name == "triton":
        from abkd_megatron.kernels import triton  # only here: it takes its settings from the environment then

        return Kernel(name, triton.local_record, triton.local_gradient, 2**62, fixed_shape=False, strided=True)
    if name == "compiled":
        return Kernel(name, compiled.local_record, compiled.local_gradient, SMALL_CHUNK, fixed_shape=True)
    return Kernel(name, eager.local_record, eager.local_gradient, SMALL_CHUNK, fixed_shape=False)


_current = _kernel("eager")


def use(name: str) -> None:
    """Choose the kernel for this process.

    Raises:
        ConfigError: for a name that is none of `NAMES`.
    """
    global _current
    if name not in NAMES:
        raise ConfigError(f"expected a kernel out of {', '.join(NAMES)}, got {name!r}")
    if name != _current.name:
        logger.info("abkd_megatron: %s kernel", name)
    _current = _kernel(name)


def current() -> Kernel:
    """The kernel in use."""
    return _current
