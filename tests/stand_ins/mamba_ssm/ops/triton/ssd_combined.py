"""State-space duality of Mamba-2 as one masked matrix product over all pairs of positions.

Legend: b batch, l and m positions, h heads, p head dimension, g groups, n state dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """Return y, [b, l, h, p], of x [b, l, h, p], dt [b, l, h], A [h], B and C [b, l, g, n].

    y_l = sum over m <= l of (C_l . B_m) exp(A (dt_(m+1) + ... + dt_l)) dt_m x_m, plus D x, times silu(z).
    """
    heads, length = x.shape[2], x.shape[1]
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    of_heads = [it.float().repeat_interleave(heads // it.shape[2], dim=2) for it in (C, B)]
    decays = (dt * A).cumsum(1).transpose(1, 2)  # [b, h, l]
    past = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    between = (decays.unsqueeze(-1) - decays.unsqueeze(-2)).masked_fill(~past, -torch.inf).exp()
    weights = torch.einsum("blhn,bmhn->bhlm", *of_heads) * between * dt.transpose(1, 2).unsqueeze(-2)
    y = torch.einsum("bhlm,bmhp->blhp", weights, x.float())
    if D is not None:
        y = y + x.float() * (D if D.dim() == 2 else D.unsqueeze(-1))
    return (y if z is None else y * F.silu(z.float())).to(x.dtype)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    seq_idx: Tensor | None = None,
    *,
    return_final_states: bool = False,
    activation: str = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    **other: object,
) -> Tensor:
    """Return [b, l, h p] of the projected input, [b, l, (z, x, B, C, dt)]: causal convolution, scan and gate."""
    assert seq_idx is None and not return_final_states and rmsnorm_weight is None and outproj_weight is None
    assert activation in ("silu", "swish") and not any(value is not None for value in other.values()), other
    (channels, width), heads, length = conv1d_weight.shape, len(dt_bias), zxbcdt.shape[1]
    inner = heads * headdim if headdim is not None else D.numel()
    of_state = (channels - inner) // 2
    z, xBC, dt = zxbcdt.split([inner, channels, heads], dim=-1)
    xBC = F.conv1d(xBC.transpose(1, 2), conv1d_weight.unsqueeze(1), conv1d_bias, padding=width - 1, groups=channels)
    x, B, C = F.silu(xBC[..., :length]).transpose(1, 2).split([inner, of_state, of_state], dim=-1)
    x, z = (it.unflatten(-1, (heads, -1)) for it in (x, z))
    B, C = (it.unflatten(-1, (ngroups, -1)) for it in (B, C))
    return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=D, z=z, dt_bias=dt_bias, dt_softplus=True).flatten(
        -2
    )
