"""Copies from host to GPU."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to `device` without waiting for the GPU's queue, unlike `Tensor.to`."""
    if tensor.device.type == "cpu" and device.type != "cpu":
        # Contiguous, because an expanded tensor cannot be pinned.
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
