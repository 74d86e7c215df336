"""Layers that save the same tensors for backward as fused GPU kernels, of meta tensors."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import LNImpl, get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.training.models import GPTModelConfig
from torch import Tensor

from abkd_megatron.local_hybrid_spec import local_hybrid_stack_spec


class _NormFunction(torch.autograd.Function):
    """Saves its input and one (RMSNorm) or two (LayerNorm) fp32 numbers per row."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_rows = inputs.new_empty(1 + (bias is not None), *inputs.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(inputs, weight, of_rows)
        ctx.has_bias = bias is not None
        return torch.empty_like(inputs)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, _rows = ctx.saved_tensors
        of_weight = torch.empty_like(weight)
        return torch.empty_like(inputs), of_weight, torch.empty_like(weight) if ctx.has_bias else None


class Norm(torch.nn.Module):
    """Module with the memory of a fused LayerNorm or RMSNorm."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [..., h] to [..., h]."""
        output: Tensor = _NormFunction.apply(inputs, self.weight, self.bias)
        return output


class _AttentionFunction(torch.autograd.Function):
    """Saves query, key, value, output and one fp32 number per query and head. No [s, s] tensor exists."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length, size, heads, _ = query.shape
        output = query.new_empty(length, size, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(size, heads, length, dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty(it.shape, dtype=it.dtype, device=it.device) for it in ctx.saved_tensors[:3])


class Attention(torch.nn.Module):
    """Module with the memory of flash attention over one rank's part of a sequence."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Map query, key and value [s, b, heads, d] to [s, b, heads * d]."""
        output: Tensor = _AttentionFunction.apply(query, key, value)
        return output.flatten(2)


class _MambaFunction(torch.autograd.Function):
    """Saves its input, the scan's output, and parameters: the kernel repeats convolution and states in its backward."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, inner: int, *parameters: Tensor) -> Tensor:
        output = projected.new_empty(*projected.shape[:-1], inner)
        ctx.save_for_backward(projected, torch.empty_like(output), *parameters)
        return output

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        projected, _output, *parameters = ctx.saved_tensors
        return torch.empty_like(projected), None, *map(torch.empty_like, parameters)


def mamba_scan(
    projected: Tensor,
    weight: Tensor,
    bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    headdim: int | None,
    **_: Any,
) -> Tensor:
    """Map the projected input [b, s, (z, x, B, C, dt)] to [b, s, inner], as `mamba_split_conv1d_scan_combined`."""
    inner = D.numel() if headdim is None else len(dt_bias) * headdim
    output: Tensor = _MambaFunction.apply(projected, inner, weight, bias, dt_bias, A, D)
    return output


class GatedNorm(torch.nn.Module):
    """Module with the memory of mamba-ssm's gated norm, without a gate."""

    def __init__(self, hidden_size: int, dtype: torch.dtype | None = None, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [..., h] to [..., h]."""
        output: Tensor = _NormFunction.apply(inputs, self.weight, None)
        return output


def rearrange(inputs: Tensor, pattern: str, **_: int) -> Tensor:
    """Return `inputs` as einops does for the patterns of Megatron's MambaMixer in training."""
    return inputs.transpose(0, 1) if pattern.count("l") else inputs.squeeze(1)


class _DeltaFunction(torch.autograd.Function):
    """Saves query, key, value, gates, and the inverse within chunks of 64 positions."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        inverse = key.new_empty(*value.shape[:-1], 64)
        ctx.save_for_backward(query, key, value, torch.empty_like(g), beta, inverse)
        return torch.empty_like(value)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors[:5]))


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, **_: Any
) -> tuple[Tensor, None]:
    """Map [b, s, heads, d] to [b, s, heads, d], as flash-linear-attention's `chunk_gated_delta_rule`."""
    return _DeltaFunction.apply(query, key, value, g, beta), None


class _ConvolutionFunction(torch.autograd.Function):
    """Saves its input and parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty(it.shape, dtype=it.dtype, device=it.device) for it in ctx.saved_tensors)


def causal_convolution(x: Tensor, weight: Tensor, **_: Any) -> tuple[Tensor, None]:
    """Map [b, s, d] to [b, s, d], as flash-linear-attention's `causal_conv1d`."""
    return _ConvolutionFunction.apply(x, weight), None


class _L2NormFunction(torch.autograd.Function):
    """Saves its output and one fp32 number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        output = torch.empty_like(x)
        ctx.save_for_backward(output, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


def l2_norm(x: Tensor, **_: Any) -> Tensor:
    """Map [..., d] to [..., d], as flash-linear-attention's `l2norm`."""
    output: Tensor = _L2NormFunction.apply(x)
    return output


_FUSED: dict[Any, type] = {WrappedTorchNorm: Norm, LNImpl: Norm, DotProductAttention: Attention}


def _fused(spec: Any) -> Any:
    """Return a layer spec with the classes of this module."""
    if isinstance(spec, ModuleSpec):
        return ModuleSpec(_fused(spec.module), spec.params, _fused(spec.submodules))
    if is_dataclass(spec) and not isinstance(spec, type):
        return replace(spec, **{of.name: _fused(getattr(spec, of.name)) for of in fields(spec) if of.init})
    if isinstance(spec, list):
        return [_fused(of) for of in spec]
    return _FUSED.get(spec, spec) if isinstance(spec, type) else spec


def layers_of_a_gpu(config: GPTModelConfig, vp_stage: int | None = None) -> Any:
    """Return Megatron's local layers of a GPTModel with `Attention` and `Norm`, for Megatron's argument `spec`."""
    model, normalization = config.transformer, config.normalization
    if model.num_moe_experts:
        return _fused(get_gpt_decoder_block_spec(model, False, normalization, vp_stage=vp_stage))
    return _fused(get_gpt_layer_local_spec(qk_layernorm=model.qk_layernorm, normalization=normalization))


hybrid_layers_of_a_gpu = _fused(local_hybrid_stack_spec)
"""The same of a HybridModel."""
