"""How the passes over a chunk of logits are carried out: one signature, several ways.

`eager` is plain PyTorch and runs everywhere. `compiled` is the same code through torch.compile: several times as fast
on a CPU, after most of a minute for the compiler in a new process; it needs a C++ compiler there.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from abkd_megatron.errors import ConfigError
from abkd_megatron.kernels import compiled, eager

logger = logging.getLogger(__name__)


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

    def chunks(self, num_tokens: int, num_columns: int) -> list[slice]:
        """The rows of each chunk; all of 0 .. num_tokens - 1 are in one."""
        rows = max(1, self.chunk_elements // max(num_columns, 1))
        if self.fixed_shape and num_tokens > rows:
            firsts = [*range(0, num_tokens - rows, rows), num_tokens - rows]
            return [slice(first, first + rows) for first in firsts]
        return [slice(first, min(first + rows, num_tokens)) for first in range(0, num_tokens, rows)]


_KERNELS = {
    "eager": Kernel("eager", eager.local_record, eager.local_gradient, 2**18, fixed_shape=False),
    "compiled": Kernel("compiled", compiled.local_record, compiled.local_gradient, 2**18, fixed_shape=True),
}
NAMES = tuple(_KERNELS)

_current = _KERNELS["eager"]


def use(name: str) -> None:
    """Choose the kernel for this process.

    Raises:
        ConfigError: for a name that is none of `NAMES`.
    """
    global _current
    if name not in _KERNELS:
        raise ConfigError(f"expected a kernel out of {', '.join(NAMES)}, got {name!r}")
    if name != _current.name:
        logger.info("abkd_megatron: %s kernel", name)
    _current = _KERNELS[name]


def current() -> Kernel:
    """The kernel in use."""
    return _current
