"""A loss that is backpropagated with hidden states but is not part of the model's output."""

from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from abkd_megatron.errors import ConfigError


def add_loss(hidden_states: Tensor, loss: Tensor, config: TransformerConfig, count: Tensor) -> Tensor:
    """Return the hidden states, whose backward also backpropagates a loss.

    The loss is scaled as Megatron's schedules scale the main loss of a micro-batch: divided by the same number of
    tokens, and multiplied by the scale of the gradient.

    Args:
        hidden_states: of any layer.
        loss: [], sum over this rank's counted tokens.
        config: of the model.
        count: [], number of counted tokens of this micro-batch on this context-parallel rank, as Megatron counts them.
    """
    if not config.calculate_per_token_loss:
        loss = loss / count.clamp(min=1) / get_num_microbatches()
    if config.grad_scale_func is not None:
        loss = config.grad_scale_func(loss)
    added: Tensor = _Add.apply(hidden_states, loss)
    return added


def check_scaling(config: TransformerConfig, losses: str) -> None:
    """Reject added losses that could not be scaled.

    Args:
        config: of the model.
        losses: what they are, for the message.

    Raises:
        ConfigError: Megatron does not know the number of micro-batches yet, and needs it.
    """
    if config.calculate_per_token_loss:
        return
    try:
        get_num_microbatches()
    except AttributeError as error:  # Megatron's calculator is None
        raise ConfigError(
            f"{losses} are divided by the number of micro-batches, as Megatron's loss is, and it is not known yet; "
            "call megatron.core's init_num_microbatches_calculator(), or set calculate_per_token_loss"
        ) from error


class _Add(torch.autograd.Function):
    """Double backward is correct here, but raises in the loss itself."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, loss: Tensor) -> Tensor:
        ctx.loss = loss.shape, loss.dtype, loss.device
        return hidden_states

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.loss
        return gradient, torch.ones(shape, dtype=dtype, device=device)
