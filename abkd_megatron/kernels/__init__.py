"""How the passes over a chunk of logits are carried out: one signature, several ways.

`eager` is plain PyTorch: any device, any divergence, any floating dtype. `compiled` is the same code through
torch.compile; it needs a C++ compiler, for most of a minute in a new process. `cpp` is C++ for CPUs, built in seconds
by the same compiler, several times as fast again. `triton` is for GPUs; it has been compiled for them and run in
Triton's interpreter, not yet on one. The last two know AlphaBeta and ToDi.

`auto` takes triton for logits on a GPU and cpp for logits on a CPU where they can serve, else eager, and says which in
the log. Tensors without memory of their own (fake and meta ones, wrapper subclasses) are eager's.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.kernels import compiled, cpp, eager
from abkd_megatron.losses.alpha_beta import AlphaBeta
from abkd_megatron.losses.base import Divergence
from abkd_megatron.losses.todi import ToDi
from abkd_megatron.tensors import has_memory, is_traced

logger = logging.getLogger(__name__)


def chunk_elements(device: torch.device) -> int:
    """Return how many logits of one model PyTorch's own operations, copies of rows among them, take at a time.

    On a CPU so few that the temporaries stay in a core's cache. On a GPU so many that an operation takes ten times as
    long as its launch, 64 MiB of each fp32 temporary; there are about ten.
    """
    return 2**18 if device.type == "cpu" else 2**24


@dataclass
class Kernel:
    """One way to carry out the passes, and the chunks it likes."""

    name: str
    local_record: Callable
    """`eager.local_record` or its equal."""
    local_second_record: Callable
    """`eager.local_second_record` or its equal."""
    local_gradient: Callable
    """`eager.local_gradient` or its equal."""
    chunk_elements: int | None
    """Logits of one model per chunk; None for `chunk_elements` of the device."""
    fixed_shape: bool = False
    """Every chunk has the same number of rows; the last one may overlap the one before."""
    strided: bool = False
    """Rows may lie further apart than they are long, so that padding need not be copied away."""

    def chunks(
        self, num_tokens: int, num_columns: int, device: torch.device, copied: bool = False, overlap: bool = True
    ) -> list[slice]:
        """The rows of each chunk, every row in one.

        Args:
            num_tokens: rows in all.
            num_columns: columns of a row.
            device: where they are.
            copied: whether rows have to be copied together, so that a chunk may not be all of them.
            overlap: let the last chunk overlap the one before, to keep the shape fixed.
        """
        of_device = chunk_elements(device)
        elements = of_device if self.chunk_elements is None else self.chunk_elements
        if copied:
            elements = min(elements, of_device)
        rows = max(1, elements // max(num_columns, 1))
        if self.fixed_shape and overlap and num_tokens > rows:
            firsts = [*range(0, num_tokens - rows, rows), num_tokens - rows]
            return [slice(first, first + rows) for first in firsts]
        return [slice(first, min(first + rows, num_tokens)) for first in range(0, num_tokens, rows)]


NAMES = ("eager", "compiled", "cpp", "triton")
CHOICES = ("auto", *NAMES)

_choice = "auto"


@functools.cache
def get(name: str) -> Kernel:
    """The kernel of that name, one of `NAMES`."""

    def kernel(module: ModuleType, elements: int | None, fixed_shape: bool = False, strided: bool = False) -> Kernel:
        passes = module.local_record, module.local_second_record, module.local_gradient
        return Kernel(name, *passes, elements, fixed_shape, strided)

    everything = 2**62
    if name == "triton":
        from abkd_megatron.kernels import triton  # only here: it takes its settings from the environment then

        return kernel(triton, everything, strided=True)
    if name == "cpp":
        return kernel(cpp, everything, strided=True)
    if name == "compiled":
        return kernel(compiled, None, fixed_shape=True)
    return kernel(eager, None)


def use(choice: str) -> str:
    """Choose the kernel for this process, or leave the choice to `auto`; return the choice before.

    Raises:
        ConfigError: for a name that is none of `CHOICES`.
    """
    global _choice
    if choice not in CHOICES:
        raise ConfigError(f"expected a kernel out of {', '.join(CHOICES)}, got {choice!r}")
    before, _choice = _choice, choice
    return before


@contextmanager
def using(choice: str | None) -> Iterator[str]:
    """`use` within the block: two attachments in one process each have their own. None leaves the choice as it is.

    Yields:
        The choice within the block.
    """
    before = use(_choice if choice is None else choice)
    try:
        yield _choice
    finally:
        use(before)


def select(divergence: Divergence, student: Tensor, teacher: Tensor) -> Kernel:
    """The kernel in use for this divergence of these logits."""
    name = _choice
    if name == "auto":
        name = _automatic(divergence, student, teacher)
    _announce(name, _choice)
    return get(name)


def _automatic(divergence: Divergence, student: Tensor, teacher: Tensor) -> str:
    known = type(divergence) in (AlphaBeta, ToDi) and has_memory(student) and has_memory(teacher) and not is_traced()
    dtypes = {student.dtype, teacher.dtype}
    if student.is_cuda and known and torch.float64 not in dtypes and importlib.util.find_spec("triton"):
        return "triton"
    on_cpu = student.device.type == teacher.device.type == "cpu"
    if on_cpu and known and dtypes <= set(cpp.DTYPES) and cpp.compiler():
        return "cpp"
    return "eager"


@functools.cache
def _announce(name: str, choice: str) -> None:
    logger.info("%s kernel%s", name, " (chosen by device)" if choice == "auto" else "")
