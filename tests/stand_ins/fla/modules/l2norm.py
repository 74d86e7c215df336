"""L2 normalization of the last dimension."""

from torch import Tensor


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    return (x.float() / (x.float().square().sum(-1, keepdim=True) + eps).sqrt()).to(x.dtype)
