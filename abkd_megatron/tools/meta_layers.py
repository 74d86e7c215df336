"""Attention and norm that save the same tensors for backward as fused GPU kernels."""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.training.models import GPTModelConfig
from torch import Tensor


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


def layers_of_a_gpu(config: GPTModelConfig) -> ModuleSpec:
    """Return Megatron's local layer spec with `Attention` and `Norm`, for Megatron's argument `spec`."""
    spec = get_gpt_layer_local_spec(qk_layernorm=config.transformer.qk_layernorm, normalization=config.normalization)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = Norm
    attention.core_attention = Attention
    if config.transformer.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = Norm
    return spec
