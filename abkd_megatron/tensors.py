"""Validation of tensors from users, and the base of the autograd functions that take them.

Numbers are checked in `validation`.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from abkd_megatron.errors import ConfigError


def check_context(owner: str) -> None:
    """Reject a call from a context in which the loss cannot be differentiated or captured.

    Within torch.compile this is a graph break, or an error with `fullgraph=True`.

    Raises:
        ConfigError: within a transform of torch.func (grad, vmap, jvp, functionalize), torch.export or
            torch.jit.trace.
    """
    if torch.compiler.is_dynamo_compiling():
        torch._dynamo.graph_break(msg=f"{owner} runs outside of compiled graphs; call it without fullgraph=True")
        return
    found = {
        "torch.func": torch._C._are_functorch_transforms_active(),
        "torch.export": torch.compiler.is_exporting(),
        "torch.jit.trace": torch._C._get_tracing_state() is not None,
    }
    for what, holds in found.items():
        if holds:
            raise ConfigError(
                f"{owner}: {what} is not supported: the loss is an autograd function with collectives and native "
                "kernels; call it outside, and use torch.autograd for its gradient"
            )


def check_tensor(what: str, tensor: object, *, dtype: torch.dtype | None = None, like: Tensor | None = None) -> None:
    """Reject anything but a dense, local tensor.

    Args:
        what: name of the tensor in messages.
        tensor: the value to check.
        dtype: required dtype; None for any floating one.
        like: a tensor on the required device; None for any device.

    Raises:
        ConfigError: for a non-tensor (NumPy array, list), a DTensor, a sparse or nested tensor, another dtype or
            another device.
    """
    if not isinstance(tensor, Tensor):
        raise ConfigError(
            f"expected {what} to be a torch.Tensor, got {type(tensor).__name__}: torch.as_tensor() makes one"
        )
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(tensor, distributed.DTensor):
        raise ConfigError(
            f"expected {what} to be this rank's local tensor, got a DTensor: pass its to_local(), and the process "
            "group over which the vocabulary is sharded"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout)
        raise ConfigError(
            f"expected {what} to be a dense tensor, got a {layout} one: pass its to_dense() or padded form"
        )
    if dtype is not None and tensor.dtype != dtype:
        raise ConfigError(f"expected {what} of dtype {dtype}, got {tensor.dtype}: convert it with .to({dtype})")
    if dtype is None and not tensor.dtype.is_floating_point:
        raise ConfigError(f"expected {what} of a floating dtype, got {tensor.dtype}: pass a model's output")
    if like is not None and tensor.device != like.device:
        raise ConfigError(f"expected {what} on {like.device}, got {tensor.device}: move it with .to('{like.device}')")


def constant(tensor: Tensor) -> Tensor:
    """Return `tensor` in a form that autograd can save for backward, without gradient and without a copy.

    An inference tensor is replaced by an alias of its memory. Autograd does not track versions of inference tensors, so
    overwriting it before backward goes undetected.
    """
    tensor = tensor.detach().resolve_neg()
    if not tensor.is_inference() or torch.is_inference_mode_enabled():
        return tensor
    if not has_memory(tensor):
        return tensor.clone()
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def has_memory(tensor: Tensor) -> bool:
    """Return True if a tensor's data is where its pointer and strides say, as native code assumes.

    False for fake and meta tensors, wrappers such as DTensor, tensors within torch.func transforms, freed storages and
    lazy negations. True for empty tensors.
    """
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:  # a wrapper, such as FakeTensor
        return False
    if tensor.device.type == "meta" or tensor.is_neg() or tensor.is_conj():
        return False
    try:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
    except (NotImplementedError, RuntimeError):
        return False
    if tensor.numel() == 0:
        return True
    last = tensor.storage_offset() + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return bool(address != 0 and (last + 1) * tensor.element_size() <= size)


def is_traced() -> bool:
    """Return True if torch operations are being traced or faked, which would miss writes by native code."""
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL))


class Function(torch.autograd.Function):
    """Autograd function that is differentiable once, in reverse mode; any other derivative raises.

    torch's `once_differentiable` returns a constant gradient if no output gradient has a graph, which is the case for
    every sum of a loss. Second derivatives would then silently be 0.
    """

    title: ClassVar[str] = ""
    """Name of the result, for messages."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.backward = staticmethod(_once(cls.backward, cls.title))  # type: ignore[method-assign]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Reject forward-mode differentiation."""
        raise ConfigError(
            "forward-mode differentiation (torch.autograd.forward_ad) of the distillation losses is not supported: use "
            "torch.autograd.grad or backward()"
        )


def _once(backward: Callable[..., Any], title: str) -> Callable[..., Any]:
    @functools.wraps(backward)
    def call(ctx: Any, *gradients: Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        # With create_graph=True: attach the results to these, so that differentiating them reaches _Twice.
        depends_on = [it for it in (*gradients, *ctx.saved_tensors) if it is not None and it.requires_grad]
        with torch.no_grad():
            results = backward(ctx, *gradients)
        if isinstance(results, Tensor):
            return _twice(title, results, depends_on)
        return tuple(_twice(title, it, depends_on) if isinstance(it, Tensor) else it for it in results)

    return call


def _twice(title: str, result: Tensor, depends_on: list[Tensor]) -> Tensor:
    if not depends_on:
        result = result.detach().requires_grad_()
    found: Tensor = _Twice.apply(title, result, *depends_on)
    return found


class _Twice(torch.autograd.Function):
    """Identity on a first derivative whose derivative raises."""

    @staticmethod
    def forward(ctx: Any, title: str, result: Tensor, *depends_on: Tensor) -> Tensor:
        ctx.title = title
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise ConfigError(
            f"{ctx.title}: expected to be differentiated once, got a derivative of its gradient (create_graph=True), "
            "which is not implemented: use abkd_megatron.losses.reference, which is plain autograd"
        )
