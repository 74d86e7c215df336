"""The gated delta rule in Megatron's own form in plain torch, which it uses with deterministic-mode."""

from typing import Any


def chunk_gated_delta_rule(*args: Any, **kwargs: Any) -> Any:
    from megatron.core.ssm.gated_delta_net.common import torch_chunk_gated_delta_rule

    return torch_chunk_gated_delta_rule(*args, **kwargs)
