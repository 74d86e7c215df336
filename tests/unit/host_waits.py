"""Find where the host would wait for a GPU, without one.

Tensors on torch's `meta` device stand for a GPU's; they hold no data, so whatever needs their values shows. Tensors on
the CPU are the host's and are computed with. In a training step the host enqueues work far ahead of the GPU, and each
of these waits until the queue is empty:

- reading a number: item(), bool(), float(), a Tensor as a Python index;
- an operation whose result's shape depends on data: nonzero, masked_select, indexing by a mask;
- a copy to the host; a copy from the host, unless from pinned memory and non_blocking;
- indexing by a list or by an index on the CPU, which is such a copy.
"""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import abkd_megatron

GPU = torch.device("meta")

_PACKAGE = str(Path(abkd_megatron.__file__).parent)
_SHAPE_IS_DATA = {
    *("nonzero", "nonzero_numpy", "argwhere", "masked_select", "_unique", "_unique2", "unique_dim"),
    *("unique_consecutive", "unique_dim_consecutive", "bincount", "equal", "is_nonzero", "item"),
}
# Raise on a GPU in deterministic mode, by one or another version of torch (torch.use_deterministic_algorithms), or
# differ from run to run without it.
_ORDER_IS_CHANCE = {"put_", "histc", "kthvalue", "cumsum", "cumprod", "scatter_add", "scatter_add_", "index_add_"}


class HostWaits:
    """Context manager; afterward `found` says where the host waited, and `launches` how many operations ran."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.by_chance: list[str] = []
        """Operations on floats whose order of summation is left to chance, or that raise in deterministic mode."""
        self.launches = 0

    def __enter__(self) -> "HostWaits":
        self._modes = _Functions(self), _Operations(self)
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def note(self, what: str) -> None:
        self.found.append(f"{what} in {_where()}")


def host_waits(function: Callable[[], Any]) -> HostWaits:
    """Where the host waits in `function`. If it fails after a wait, for want of data, what was found until then."""
    waits = HostWaits()
    try:
        with waits:
            function()
    except Exception:
        if not waits.found:
            raise
    return waits


def _where() -> str:
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(_PACKAGE)]
    return f"{frames[-1].filename.removeprefix(_PACKAGE)}:{frames[-1].lineno}" if frames else "the test"


def _on_gpu(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(value))


class _Functions(TorchFunctionMode):
    """What becomes a copy before a dispatch mode is asked."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__getitem__", "__setitem__") and _on_gpu(args[0]):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list) for part in index):
                self.waits.note("indexing by a list")
        elif name in ("tensor", "as_tensor", "asarray") and torch.device(kwargs.get("device") or "cpu") == GPU:
            self.waits.note(f"torch.{name} on the GPU")
        elif name in ("new_tensor", "unravel_index") and _on_gpu(args[0]):
            self.waits.note(name)
        elif name == "is_pinned":
            return getattr(args[0], "pinned", False)
        elif name == "pin_memory":
            pinned = args[0].clone()
            pinned.pinned = True
            return pinned
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if not _on_gpu((args, kwargs)):
            if kwargs.get("device") is not None and torch.device(kwargs["device"]) == GPU:
                self.waits.launches += 1
                if name == "_to_copy" and not (kwargs.get("non_blocking") and getattr(args[0], "pinned", False)):
                    self.waits.note("copy to the GPU")
            return func(*args, **kwargs)
        self.waits.launches += not func.is_view
        if name == "_local_scalar_dense":
            self.waits.note("reading a number")
            return False if args[0].dtype == torch.bool else 0.0 if args[0].is_floating_point() else 0
        if name in _SHAPE_IS_DATA:
            self.waits.note(name)
        if name in ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    self.waits.note("indexing by a mask")
                elif index is not None and not index.is_meta:
                    self.waits.note("indexing by an index on the CPU")
        if name == "_to_copy" and kwargs.get("device") is not None and torch.device(kwargs["device"]) != GPU:
            self.waits.note("copy to the host")
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name in ("copy_", "copy") and args[0].is_meta != args[1].is_meta:
            # 0-dim numbers too: only Python's own are arguments of a launch.
            if not (len(args) > 2 and args[2] and getattr(args[1] if args[0].is_meta else args[0], "pinned", False)):
                self.waits.note("copy between host and GPU")
            return args[0]
        if name in _ORDER_IS_CHANCE and args[0].is_floating_point():
            self.waits.by_chance.append(f"{name} in {_where()}")
        return func(*args, **kwargs)
