"""The gated norm of a Mamba-2 layer."""

import torch
from torch import Tensor
from torch.nn.functional import silu


class RMSNorm(torch.nn.Module):
    """RMSNorm over groups of columns, multiplied by silu of a gate before or after the norm."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        dtype, gate = x.dtype, silu(z.float()) if z is not None else 1.0
        x = x.float() if self.norm_before_gate else x.float() * gate
        groups = x.unflatten(-1, (-1, self.group_size or x.shape[-1]))
        normalized = groups / (groups.square().mean(-1, keepdim=True) + self.eps).sqrt()
        x = normalized.flatten(-2) * self.weight.float()
        return (x * gate if self.norm_before_gate else x).to(dtype)
