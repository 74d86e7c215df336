"""Memory of a run on the meta device, by purpose."""

import contextlib
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

META = torch.device("meta")

# Parts of memory. Other storages that live across steps, such as sequence parallelism's gather buffers, count as
# optimizer state.
PARAMETERS = "student's parameters"
GRADIENTS = "gradient buffers"
OPTIMIZER = "optimizer's state and buffers"
TEACHER = "teacher's parameters"
ACTIVATIONS = "activations kept for backward"
BACKWARD = "backward's own"
TEACHER_PASS = "teacher's forward pass"
WAITING = "teacher's hidden states waiting"
HEADS = "LM heads and loss"
STEP = "optimizer's step"
PARTS = (PARAMETERS, GRADIENTS, OPTIMIZER, TEACHER, ACTIVATIONS, BACKWARD, TEACHER_PASS, WAITING, HEADS, STEP)


def _without_data(tensor: Tensor) -> Tensor:
    if tensor.device == META:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)


class MemoryTracker(TorchDispatchMode):
    """Dispatch mode that moves every tensor to `meta` and tracks live storages by part.

    A new storage belongs to the part of the enclosing `belongs_to`. Otherwise it belongs to `BACKWARD` during backward,
    `ACTIVATIONS` if gradients are enabled, or `STEP`.

    Args:
        one_in: one in `one_in` tokens is selected by position.
    """

    def __init__(self, one_in: int = 1) -> None:
        super().__init__()
        self._one_in = one_in
        self._part: str | None = None
        self._alive: dict[int, tuple[str, int]] = {}
        self._held: Counter[str] = Counter()
        self._complements: set[int] = set()
        self.total = 0
        self.restart()

    def restart(self) -> None:
        """Restart the search for the peak."""
        self._most = -1
        self.peak: dict[str, int] = {}
        self._look()

    @property
    def held(self) -> dict[str, int]:
        """Bytes alive now, by part."""
        return dict(self._held)

    @contextlib.contextmanager
    def belongs_to(self, part: str) -> Iterator[None]:
        """Assign storages created in the block to a part."""
        before, self._part = self._part, part
        try:
            yield
        finally:
            self._part = before

    def assign(self, tensors: Iterable[Tensor], part: str) -> None:
        """Move the storages of `tensors` to a part."""
        for tensor in tensors:
            self._move(tensor.untyped_storage()._cdata, part)

    def assign_rest(self, part: str, kept: Collection[str]) -> None:
        """Move all live storages that are not in the parts `kept` to a part."""
        for key in [key for key, (old, _) in self._alive.items() if old not in kept]:
            self._move(key, part)

    def _move(self, key: int, part: str) -> None:
        old, size = self._alive[key]
        self._alive[key] = part, size
        self._held[old] -= size
        self._held[part] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        if func.namespace == "c10d":  # complete at once
            results = [FakeWork().boxed() if "Work" in str(it.type) else args[0] for it in func._schema.returns]
            return tuple(results) if len(results) > 1 else results[0] if results else None
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = META
        args, kwargs = tree_map_only(Tensor, _without_data, (args, kwargs))
        if func is torch.ops.aten.nonzero.default:  # the count depends on data; called for the selection and complement
            rows = args[0].numel() // self._one_in
            if args[0].untyped_storage()._cdata in self._complements:
                rows = args[0].numel() - rows
            result = torch.empty(rows, args[0].dim(), dtype=torch.int64, device=META)
        else:
            result = func(*args, **kwargs)
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._enter(tensor.untyped_storage())
        if func is torch.ops.aten.bitwise_not.default:
            self._complements.add(result.untyped_storage()._cdata)
        return result

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        part = self._part
        if torch._C._current_graph_task_id() != -1:
            part = BACKWARD
        elif part is None:
            part = ACTIVATIONS if torch.is_grad_enabled() else STEP
        self._alive[key] = part, size
        weakref.finalize(storage, self._leave, key)
        self._held[part] += size
        self.total += size
        self._look()

    def _leave(self, key: int) -> None:
        part, size = self._alive.pop(key)
        self._complements.discard(key)
        self._held[part] -= size
        self.total -= size

    def _look(self) -> None:
        if self.total > self._most:
            self._most, self.peak = self.total, dict(self._held)
