"""Kernels: interchangeable implementations of the passes over a chunk of logits.

- `eager`: plain PyTorch; any device, divergence and floating dtype.
- `cpp`: C++ for CPUs, built in seconds; every built-in divergence, and sums of up to 8.
- `triton`: for GPUs; every built-in divergence, and sums of up to 4. Compiled for GPUs and run in Triton's interpreter,
  not yet on a GPU.

`auto` selects triton for logits on a GPU and cpp for logits on a CPU where they apply, else eager, and logs its choice.
Tensors without data (fake and meta tensors, wrapper subclasses) use eager.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.kernels import cpp, eager
from abkd_megatron.kernels.parts import MAX_PARTS, weighted_parts
from abkd_megatron.losses.base import Divergence
from abkd_megatron.tensors import has_memory, is_traced

logger = logging.getLogger(__name__)


def chunk_elements(device: torch.device) -> int:
    """Return the number of logits per model and chunk for PyTorch's own operations, row copies included.

    On CPU the temporaries then fit in a core's cache. On GPU an operation then takes ten times its launch overhead,
    with about ten fp32 temporaries of 64 MiB.
    """
    return 2**18 if device.type == "cpu" else 2**24


@dataclass
class Kernel:
    """Implementation of the passes, with its preferred chunks."""

    name: str
    local_record: Callable
    """Same signature as `eager.local_record`."""
    local_second_record: Callable
    """Same signature as `eager.local_second_record`."""
    local_gradient: Callable
    """Same signature as `eager.local_gradient`."""
    chunk_elements: int | None
    """Logits of one model per chunk; None for `chunk_elements` of the device."""
    strided: bool = False
    """Accepts a row stride above the row length, so that padding need not be copied away."""
    indexed: bool = False
    """Accepts an index of rows, `rows` and `teacher_rows`, so that a selection need not be copied."""
    merge: ModuleType | None = None
    """Module with `can_merge`, `conclude` and `finish`, which merge the records of all ranks; None for `stats`."""
    records: ModuleType | None = None
    """Module with `rest_record` and `write_columns`, for teacher records; None for PyTorch's operations."""

    def chunks(self, num_tokens: int, num_columns: int, device: torch.device, copied: bool = False) -> list[slice]:
        """Return the rows of each chunk.

        Args:
            num_tokens: number of rows.
            num_columns: columns per row.
            device: of the logits.
            copied: rows have to be copied into the chunk, which limits its size.
        """
        of_device = chunk_elements(device)
        elements = of_device if self.chunk_elements is None else self.chunk_elements
        if copied:
            elements = min(elements, of_device)
        rows = max(1, elements // max(num_columns, 1))
        return [slice(first, min(first + rows, num_tokens)) for first in range(0, num_tokens, rows)]


NAMES = ("eager", "cpp", "triton")
CHOICES = ("auto", *NAMES)

_choice = "auto"


@functools.cache
def get(name: str) -> Kernel:
    """Return the kernel of that name, one of `NAMES`."""

    def kernel(module: ModuleType, elements: int | None, **how: Any) -> Kernel:
        passes = module.local_record, module.local_second_record, module.local_gradient
        return Kernel(name, *passes, elements, **how)

    everything = 2**62
    if name == "triton":
        from abkd_megatron.kernels import triton, triton_merge  # deferred: reads the environment on import

        return kernel(triton, everything, strided=True, indexed=True, merge=triton_merge)
    if name == "cpp":
        return kernel(cpp, everything, strided=True, records=cpp)
    return kernel(eager, None)


def use(choice: str) -> str:
    """Set the kernel of this process; return the previous choice.

    Raises:
        ConfigError: for a name not in `CHOICES`.
    """
    global _choice
    if choice not in CHOICES:
        raise ConfigError(f"expected a kernel out of {', '.join(CHOICES)}, got {choice!r}")
    before, _choice = _choice, choice
    return before


@contextmanager
def using(choice: str | None) -> Iterator[str]:
    """Set the kernel within the block, for several attachments in one process. None keeps the current choice.

    Yields:
        The choice within the block.
    """
    before = use(_choice if choice is None else choice)
    try:
        yield _choice
    finally:
        use(before)


def select(divergence: Divergence, student: Tensor, teacher: Tensor) -> Kernel:
    """Return the kernel for this divergence and these logits."""
    name = _choice
    if name == "auto":
        name = _automatic(divergence, student, teacher)
    _announce(name, _choice)
    return get(name)


def _automatic(divergence: Divergence, student: Tensor, teacher: Tensor) -> str:
    if not (has_memory(student) and has_memory(teacher)) or is_traced():
        return "eager"
    dtypes = {student.dtype, teacher.dtype}
    if student.is_cuda and torch.float64 not in dtypes and importlib.util.find_spec("triton"):
        parts = len(weighted_parts(divergence))
        if 0 < parts <= MAX_PARTS:
            return "triton"
        if parts > MAX_PARTS:
            _warn_of_parts("triton", MAX_PARTS, parts)
    on_cpu = student.device.type == teacher.device.type == "cpu"
    if on_cpu and dtypes <= set(cpp.DTYPES) and cpp.compiler():
        if cpp.supports(divergence):
            return "cpp"
        if (parts := len(weighted_parts(divergence))) > cpp.MAX_PARTS:
            _warn_of_parts("cpp", cpp.MAX_PARTS, parts)
    return "eager"


@functools.cache
def _warn_of_parts(kernel: str, most: int, parts: int) -> None:
    logger.warning(
        "eager kernel, which is several times slower: the %s kernel sums at most %d divergences, got %d",
        kernel,
        most,
        parts,
    )


@functools.cache
def _announce(name: str, choice: str) -> None:
    logger.info("%s kernel%s", name, " (chosen by device)" if choice == "auto" else "")
