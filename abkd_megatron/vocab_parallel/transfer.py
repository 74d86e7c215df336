"""Copies between the host and a GPU."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device`; the host does not wait for the GPU's queue, as `Tensor.to` would have it."""
    if tensor.device.type == "cpu" and device.type != "cpu":
        # Contiguous, for a tensor that was expanded cannot be pinned as it is.
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
