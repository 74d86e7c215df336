"""Weights of the teacher's layers that are not on the device as they were loaded: in 8 bits, or in the host's memory.

A layer's weights are made right before it runs, and dropped after it. Embedding, norms, routers and the output layer
stay. Nothing of a layer's class is changed, so Megatron's local layers and TransformerEngine's are treated alike.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.transformer.moe.router import Router
from torch import Tensor

from abkd_megatron.config.teachers import TEACHER_WEIGHTS
from abkd_megatron.teacher.build import Teacher

DEVICE, INT8, HOST = TEACHER_WEIGHTS
_ALIGNMENT = 256
_ROWS = 1024


class Stored(NamedTuple):
    """What `store_weights` did on this rank."""

    original: int
    """Bytes of the layers' weights as they were loaded."""
    kept: int
    """Bytes on the device all the time in their place."""
    at_a_time: int
    """Bytes of weights on the device while a layer runs, at most; 0 if these are among `kept`."""
    error: float
    """Norm of all changes of weights over the norm of all weights; 0 for `HOST`."""
    rounded: "Int8Layers | None" = None
    """With `keep_plain`: the layers, which can also run with the weights as they were loaded."""

    def __str__(self) -> str:
        sizes = self.original, self.kept, self.at_a_time
        original, kept, at_a_time = (f"{size / 2**20:.1f} MiB" for size in sizes)
        of_one = f", and {at_a_time} while a layer runs" if self.at_a_time else ""
        changed = f"; relative change of the weights {self.error:.2g}" if self.error else ""
        return f"teacher's layers: {kept} on this device in place of {original}{of_one}{changed}"


def store_weights(teacher: Teacher, how: str, *, keep_plain: bool = False) -> Stored:
    """Store the weights of a loaded teacher's layers in another way.

    With ``int8`` a weight has one scale per row, max |w| / 127 in fp32, and is rounded to the nearest multiple of it.
    A layer's weights are multiplied out in fp32 and rounded to their dtype whenever it runs. Its other parameters
    are left as they are: vectors, and a router's, whose choices depend on the last bits.

    With ``host`` weights are in page-locked memory of the host, and copied while the layer before runs, into one of two
    buffers of the size of the largest layer. The host waits for nothing.

    Args:
        teacher: loaded and frozen; its layers get hooks, and `Teacher.stored` the tensors on the device.
        how: ``int8`` or ``host``.
        keep_plain: with ``int8``, keep the weights as they were loaded in the host's memory, to measure what rounding
            changes; see `Int8Layers.plain`.

    Collectives: none.
    """
    layers = [_weights(layer) for layer in teacher.model.decoder.layers]
    if not any(layers):  # a pipeline stage of the embedding only
        return Stored(0, 0, 0, 0.0)
    store = Int8Layers(layers, keep_plain) if how == INT8 else _Host(layers)
    teacher.stored.extend(store.tensors())
    sizes = [sum(weight.nbytes for weight in weights) for weights in layers]
    for number, (layer, weights) in enumerate(zip(teacher.model.decoder.layers, layers, strict=True)):
        empty = [weight.new_empty(0) for weight in weights]
        _set(weights, empty)
        layer.register_forward_pre_hook(_before(store, number, weights))
        layer.register_forward_hook(_after(store, weights, empty))
    kept = sum(tensor.nbytes for tensor in store.tensors())
    rounded = store if isinstance(store, Int8Layers) and keep_plain else None
    return Stored(sum(sizes), kept, max(sizes, default=0) if how == INT8 else 0, store.error, rounded)


def _weights(layer: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the layer's matrices."""
    of_routers = {id(it) for module in layer.modules() if isinstance(module, Router) for it in module.parameters()}
    return [it for it in layer.parameters() if it.dim() > 1 and it.is_floating_point() and id(it) not in of_routers]


def _set(weights: Sequence[torch.nn.Parameter], values: Sequence[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.data = value


def _before(store: "Int8Layers | _Host", number: int, weights: Sequence[torch.nn.Parameter]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        _set(weights, store.begin(number))

    return hook


def _after(
    store: "Int8Layers | _Host", weights: Sequence[torch.nn.Parameter], empty: list[Tensor]
) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        _set(weights, empty)
        store.end()

    return hook


class Int8Layers:
    """Weights as whole numbers and a scale per row."""

    def __init__(self, layers: Sequence[Sequence[Tensor]], keep_plain: bool) -> None:
        self._kept = [[weight.detach().cpu() for weight in weights] for weights in layers] if keep_plain else []
        self._is_plain = False
        self._layers = [[self._rounded(weight) for weight in weights] for weights in layers]
        changes, norms = zip(*(_squares(*pair) for pair in self._pairs(layers)), strict=True)
        change, norm = sum(changes), sum(norms)
        self.error = math.nan if norm.is_meta else math.sqrt(change.item() / max(norm.item(), math.ulp(0.0)))

    def tensors(self) -> list[Tensor]:
        """Return what is on the device."""
        return [tensor for layer in self._layers for stored in layer for tensor in stored[:2]]

    def begin(self, number: int) -> list[Tensor]:
        """Return the weights of a layer that is about to run."""
        stored = self._layers[number]
        if self._is_plain:
            return [kept.to(numbers.device) for kept, (numbers, *_) in zip(self._kept[number], stored, strict=True)]
        return [self._made(*of_weight) for of_weight in stored]

    @contextlib.contextmanager
    def plain(self) -> Iterator[None]:
        """Run layers in this block with the weights as they were loaded, copied from the host one layer at a time."""
        self._is_plain = True
        try:
            yield
        finally:
            self._is_plain = False

    def forget_plain(self) -> None:
        """Free the weights as they were loaded."""
        self._kept = []

    def end(self) -> None:
        """Do nothing: the weights are freed with their last use."""

    def _pairs(self, layers: Sequence[Sequence[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        for weights, stored in zip(layers, self._layers, strict=True):
            for weight, of_weight in zip(weights, stored, strict=True):
                yield weight, self._made(*of_weight)

    @staticmethod
    def _rounded(weight: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
        scale = weight.new_empty(weight.shape[0], *[1] * (weight.dim() - 1), dtype=torch.float32)
        numbers = torch.empty_like(weight, dtype=torch.int8)
        for first in range(0, len(weight), _ROWS):  # so that there is no copy of the weight in fp32
            rows = slice(first, first + _ROWS)
            part = weight[rows].float()
            scale[rows] = part.abs().amax(dim=tuple(range(1, part.dim())), keepdim=True) / 127
            # A row of zeros has the scale 0.
            numbers[rows] = (part / scale[rows].clamp_min(torch.finfo(torch.float32).tiny)).round_().to(torch.int8)
        return numbers, scale, weight.dtype

    @staticmethod
    def _made(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.mul(numbers, scale, out=torch.empty_like(numbers, dtype=dtype))


class _Host:
    """Weights in the host's memory, and two buffers on the device: of the layer that runs, and of the next one."""

    error = 0.0

    def __init__(self, layers: Sequence[Sequence[Tensor]]) -> None:
        self._layers = [[_on_host(weight) for weight in weights] for weights in layers]
        self._shapes = [[(weight.shape, weight.dtype, weight.nbytes) for weight in weights] for weights in layers]
        size = max((sum(_aligned(nbytes) for _, _, nbytes in shapes) for shapes in self._shapes), default=0)
        like = next(weight for weights in layers for weight in weights)
        self._buffers = [like.new_empty(size, dtype=torch.uint8) for _ in range(2)]
        self._copies = torch.cuda.Stream(like.device) if like.is_cuda else None
        if self._copies is not None:  # the buffers' memory may still be in use by what was freed there
            self._copies.wait_stream(torch.cuda.current_stream())
        self._copied, self._used = ([torch.cuda.Event() for _ in range(2)] if like.is_cuda else [] for _ in range(2))
        self._buffer, self._ahead = 0, -1  # where the layer `_ahead` is, or is being copied to

    def tensors(self) -> list[Tensor]:
        return self._buffers

    def begin(self, number: int) -> list[Tensor]:
        if self._ahead != number:
            self._copy(number)
        self._running = self._buffer
        if self._copies is not None:
            torch.cuda.current_stream().wait_event(self._copied[self._running])
        views = self._views(number)
        self._copy((number + 1) % len(self._layers))
        return views

    def end(self) -> None:
        if self._copies is not None:
            self._used[self._running].record()

    def _copy(self, number: int) -> None:
        """Start to copy a layer into the buffer that is not in use, once the layer that was in it has run."""
        self._buffer, self._ahead = 1 - self._buffer, number
        with torch.cuda.stream(self._copies) if self._copies is not None else contextlib.nullcontext():
            if self._copies is not None:
                self._copies.wait_event(self._used[self._buffer])
            for view, host in zip(self._views(number), self._layers[number], strict=True):
                if host is not None:
                    view.copy_(host, non_blocking=True)
            if self._copies is not None:
                self._copied[self._buffer].record()

    def _views(self, number: int) -> list[Tensor]:
        views, first = [], 0
        for shape, dtype, nbytes in self._shapes[number]:
            views.append(self._buffers[self._buffer][first : first + nbytes].view(dtype).view(shape))
            first += _aligned(nbytes)
        return views


def _on_host(weight: Tensor) -> Tensor | None:
    """Return a copy in page-locked memory; None of a tensor without data, of which `estimate` counts the device's."""
    if weight.is_meta:
        return None
    return torch.empty_like(weight, device="cpu", pin_memory=weight.is_cuda).copy_(weight)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _squares(weight: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of squares of a weight's change and of the weight, fp64."""
    of_rows = zip(weight.split(_ROWS), made.split(_ROWS), strict=True)
    norms = [torch.stack([(part.float() - other).norm(), part.float().norm()]).double() for part, other in of_rows]
    change, norm = torch.stack(norms).square().sum(dim=0)
    return change, norm
