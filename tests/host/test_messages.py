"""What stages of a teacher exchange is what stages of Megatron's exchange."""

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from abkd_megatron.distillation.runner import hidden_between_stages


@pytest.mark.parametrize(("fp32_residual", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_hidden_states_have_the_dtype_of_the_residual_stream(
    fp32_residual: bool, dtype: torch.dtype, sequence_parallel: bool
) -> None:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=8,
        num_attention_heads=2,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        fp32_residual_connection=fp32_residual,
    )
    shape = (16 // (2 if sequence_parallel else 1), 3, 8)
    assert hidden_between_stages(config, 16, 3, 2) == (shape, dtype)
