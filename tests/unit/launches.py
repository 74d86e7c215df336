"""Count what a GPU would be asked to launch: operations that write memory, Triton kernels and collectives.

Run with TRITON_INTERPRET=1, before Triton is imported. Views, allocations and operations on no elements launch nothing.
Matrix products are counted apart. What Triton's interpreter itself does with tensors is not counted.
"""

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NOTHING = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "set_", "resize_", "_unsafe_view"}
_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "matmul"}


class Launches(TorchDispatchMode):
    """Context manager; `found` counts launches by the operation's or kernel's name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.products = 0
        self._paused = False

    @property
    def total(self) -> int:
        return sum(self.found.values())

    def __enter__(self) -> "Launches":
        from triton.runtime.interpreter import GridExecutor

        self._execute = execute = GridExecutor.__call__

        def counted(executor: Any, *args: Any, **kwargs: Any) -> None:
            self.found[f"triton {executor.fn.__name__}"] += 1
            self._paused = True
            try:
                execute(executor, *args, **kwargs)
            finally:
                self._paused = False

        GridExecutor.__call__ = counted
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        from triton.runtime.interpreter import GridExecutor

        super().__exit__(*error)
        GridExecutor.__call__ = self._execute

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        # A collective returns its work, or what it wrote, and writes into its arguments.
        if self._paused or func.is_view or name in _NOTHING:
            return result
        if func.namespace != "c10d" and not any(leaf.numel() for leaf in written):
            return result
        if name in _PRODUCTS:
            self.products += 1
        else:
            self.found[name] += 1
        return result
