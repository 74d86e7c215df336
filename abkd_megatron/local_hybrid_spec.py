"""Layers of a HybridModel without TransformerEngine, from Megatron's own modules.

HybridModel takes TransformerEngine's layers whatever `transformer-impl` is. Jobs of this package use these with
``transformer-impl local``, as on a CPU; a script gives ``--spec abkd_megatron.local_hybrid_spec
local_hybrid_stack_spec``. Mamba layers still need mamba-ssm and einops, gated delta nets flash-linear-attention.

Names of weights in checkpoints are TransformerEngine's, except for the norm of experts: there GPTModel's local layers
have another name, and their checkpoints can be read here.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.ssm.gated_delta_net.common import GatedDeltaNetSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)


class LocalHybridStack(HybridStack):
    """Megatron's stack with torch's final norm, in place of TransformerEngine's."""

    def __init__(self, *args: Any, post_layer_norm: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            config = self.config
            self.final_norm = WrappedTorchNorm(config, config.hidden_size, eps=config.layernorm_epsilon)


class LocalSelfAttention(SelfAttention):
    """Megatron's attention with torch's norms of queries and keys, in place of TransformerEngine's."""

    def __init__(self, config: TransformerConfig, submodules: SelfAttentionSubmodules, *args: Any, **kwargs: Any):
        if config.qk_layernorm:
            submodules = replace(submodules, q_layernorm=WrappedTorchNorm, k_layernorm=WrappedTorchNorm)
        super().__init__(config, submodules, *args, **kwargs)


def _renamed(norm: str, linear: str) -> dict[str, str]:
    """Return the map of names in checkpoints: TransformerEngine keeps a norm within the linear layer after it."""
    return {f"{norm}.": f"{linear}.layer_norm_"}


_MAMBA = ModuleSpec(
    module=MambaLayer,
    submodules=MambaLayerSubmodules(
        norm=WrappedTorchNorm,
        mixer=ModuleSpec(
            module=MambaMixer,
            submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
        ),
        mamba_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=_renamed("norm", "mixer.in_proj"),
    ),
)
_GATED_DELTA_NET = ModuleSpec(
    module=TransformerLayer,
    submodules=TransformerLayerSubmodules(
        input_layernorm=WrappedTorchNorm,
        self_attention=ModuleSpec(
            module=GatedDeltaNet,
            submodules=GatedDeltaNetSubmodules(
                in_proj=ColumnParallelLinear, out_norm=WrappedTorchNorm, out_proj=RowParallelLinear
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=_renamed("input_layernorm", "self_attention.in_proj"),
    ),
)
_ATTENTION = ModuleSpec(
    module=TransformerLayer,
    submodules=TransformerLayerSubmodules(
        input_layernorm=WrappedTorchNorm,
        self_attention=ModuleSpec(
            module=LocalSelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=ColumnParallelLinear,
                core_attention=DotProductAttention,
                linear_proj=RowParallelLinear,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=_renamed("input_layernorm", "self_attention.linear_qkv"),
    ),
)
_MLP = ModuleSpec(
    module=MLPLayer,
    submodules=TransformerLayerSubmodules(
        pre_mlp_layernorm=WrappedTorchNorm,
        mlp=partial(
            MLP.as_mlp_submodule,
            submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        ),
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=_renamed("pre_mlp_layernorm", "mlp.linear_fc1"),
    ),
)
_EXPERTS = ModuleSpec(
    module=MoETransformerLayer,
    submodules=TransformerLayerSubmodules(
        pre_mlp_layernorm=WrappedTorchNorm,
        # The number of experts is the configuration's; this one only asks for a mixture.
        mlp=get_moe_module_spec(use_te=False, num_experts=2, moe_grouped_gemm=False),
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=_renamed("pre_mlp_layernorm", "mlp.linear_fc1"),
    ),
)
_MULTI_TOKEN_PREDICTION = ModuleSpec(
    module=MultiTokenPredictionBlock,
    submodules=MultiTokenPredictionBlockSubmodules(
        layer_specs=[
            ModuleSpec(
                module=MultiTokenPredictionLayer,
                submodules=MultiTokenPredictionLayerSubmodules(
                    enorm=WrappedTorchNorm,
                    hnorm=WrappedTorchNorm,
                    eh_proj=ColumnParallelLinear,
                    mtp_model_layer=None,
                    layer_norm=WrappedTorchNorm,
                ),
            )
        ]
    ),
)

local_hybrid_stack_spec = ModuleSpec(
    module=LocalHybridStack,
    submodules=HybridStackSubmodules(
        mamba_layer=_MAMBA,
        gdn_layer=_GATED_DELTA_NET,
        attention_layer=_ATTENTION,
        mlp_layer=_MLP,
        moe_layer=_EXPERTS,
        mtp_block_spec=_MULTI_TOKEN_PREDICTION,
    ),
)
