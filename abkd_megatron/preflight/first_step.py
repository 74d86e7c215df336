"""Checks of the batches and losses of the first training step."""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from abkd_megatron.errors import ConfigError

logger = logging.getLogger(__name__)

# Nats around ln V, the cross entropy of a uniform guess. Less than NEAR below it is a warning, more than BEYOND above
# it an error. Untrained logits of variance v cost v/2 more than ln V: 0.8 for Megatron's initial weights (std 0.02) at
# hidden size 4096, but almost nothing in a tiny model, so a teacher that has hardly been trained only gets a warning.
NEAR, BEYOND = 0.1, 0.5

# KL(plain teacher || teacher with rounded layers) in nats per token. Losses of students that a comparison can
# distinguish differ by about as much.
LARGEST_ROUNDING = 0.01

# Relative tolerance of the teacher's expected loss. Rounding in bf16 moves the mean over a batch by less than 0.001; a
# wrong rotary base, number of heads or norm epsilon moves it by several hundredths or more.
NEAR_EXPECTED = 0.02

# The loss per token at which one unit in the last place of fp32 is 1 nat. The rounding error of its gradient is then as
# large as the gradient of the cross entropy, which is at most 1 per logit. Where student and teacher are sure of
# different tokens, the gradient is a small difference of such numbers: measured against fp64, the gradient of Neyman's
# chi-square of 1e5 has an error of 2e-5 of its largest number, of 4e7 2e-4, of 1e9 2e-2, and of 1e22 no correct digit.
# Where both are unsure it is correct up to 1e30, so this is a warning.
LARGEST = 2.0**23

type Digest = tuple[tuple[int, ...], int]
"""The tensor-parallel ranks of a model, and the sum of `digest` over the step's micro-batches."""


@dataclass(frozen=True)
class Observed:
    """Subject of the phase `first step`: what all ranks observed."""

    student: Sequence[Digest | None]
    """Per rank, of the student's tokens; None beyond the first pipeline stage."""
    teachers: Sequence[Sequence[Digest | None]]
    """The same of each teacher, whose first stage may be on other ranks; none for a cache."""
    teacher_losses: Mapping[str, float | None]
    """By name of the teacher, its cross entropy in nats per token; None if no token of its sources counts."""
    kd_loss: float | None
    """`kd loss` per token; None if no token counts."""
    vocab_size: int
    """Number of tokens that both models know."""
    kd_weight: float
    expected_loss: float | None
    """The expected loss of the only teacher; None if it is not known."""


def when_gradients_are_done(config: TransformerConfig, conclude: Callable[[], None]) -> None:
    """Call `conclude` once, on every rank, where Megatron finalizes the gradients of the running step.

    That is after the last message of its pipeline schedule, and before the optimizer changes a weight.

    Args:
        config: of the student.
        conclude: may have collectives.
    """
    make_whole = config.finalize_model_grads_func

    def conclude_first(*args: Any, **kwargs: Any) -> None:
        config.finalize_model_grads_func = make_whole
        conclude()
        if make_whole is not None:
            make_whole(*args, **kwargs)

    config.finalize_model_grads_func = conclude_first


def digest(tokens: Tensor) -> Tensor:
    """Return a hash of token ids and their positions, [] int64. Hashes of micro-batches may be summed."""
    flat = tokens.reshape(-1).long()
    place = torch.arange(1, len(flat) + 1, device=flat.device)
    mixed = (flat + 1) * 0x2545F4914F6CDD1D + place * 0x1B873593CC9E2D51
    mixed = (mixed ^ (mixed >> 29)) * 0x3C79AC492BA7B653
    return (mixed ^ (mixed >> 32)).sum()


def sums_by_teacher(losses: Tensor, counted: Tensor, numbers: Tensor, num_teachers: int) -> Tensor:
    """Return (sum of losses, number of tokens) of each teacher's sequences, [K, 2] fp64. Does not synchronize.

    Args:
        losses: [b, s].
        counted: [b, s], 1 where a token counts, else 0.
        numbers: [b] int64, the teacher of each sequence.
        num_teachers: K.
    """
    of_tokens = torch.where(counted == 0, 0.0, counted.double() * losses)
    of_rows = torch.stack([of_tokens.sum(dim=1), counted.double().sum(dim=1)], dim=1)
    its_rows = numbers == torch.arange(num_teachers, device=numbers.device).unsqueeze(-1)
    return torch.where(its_rows.unsqueeze(-1), of_rows, 0.0).sum(dim=1)


def check_batch(student: Sequence[Digest | None], teacher: Sequence[Digest | None] | None) -> None:
    """Reject a step in which tensor-parallel ranks, or the two models, got different tokens.

    Args:
        student: see `Observed`.
        teacher: see `Observed`.

    Raises:
        ConfigError: with the ranks.
    """
    sums = []
    models = {"student": student} | ({"teacher": teacher} if teacher is not None else {})
    for who, ranks in models.items():
        groups: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for group, of in filter(None, ranks):
            groups[group].add(of)
        for group, found in groups.items():
            if len(found) > 1:
                raise ConfigError(
                    f"expected the {who}'s tensor-parallel ranks {', '.join(map(str, group))} to be given the same "
                    "tokens in the first step, got different ones; a forward step has to broadcast a batch from the "
                    "first of them, or read the same samples on each"
                )
        sums.append(sum(of for found in groups.values() for of in found) % 2**64)
    if sums[0] != sums[-1]:
        raise ConfigError(
            "expected the teacher to be given the student's tokens in the first step, got others; a forward step has "
            "to call the student once per micro-batch, with the tokens that it is trained on"
        )


def check_teacher_loss(loss: float, vocab_size: int, who: str = "the teacher") -> None:
    """Reject a teacher that is worse than a uniform guess, and warn of a teacher that is not better.

    Args:
        loss: its cross entropy on the first step's tokens, in nats per token.
        vocab_size: number of tokens that it knows.
        who: its name in messages.

    Raises:
        ConfigError: the loss is more than `BEYOND` above ln `vocab_size`.
    """
    guessing = math.log(vocab_size)
    summary = f"{who}'s cross entropy on the first step is {loss:.3f} nats, guessing costs ln {vocab_size}"
    if not loss <= guessing + BEYOND:
        raise ConfigError(
            f"expected a teacher that knows the text's tokens, got one that does not: {summary} = {guessing:.3f}; give "
            "the teacher of this tokenizer, with its own rotary base, norm and activation under `teacher:`"
        )
    if loss > guessing - NEAR:
        logger.warning("%s = %.3f: it has learned next to nothing of this tokenizer's text", summary, guessing)


def check_expected_loss(loss: float, expected: float) -> None:
    """Reject a teacher whose loss is not the expected one.

    Args:
        loss: its cross entropy on the first step's tokens, in nats per token.
        expected: the same, measured elsewhere.

    Raises:
        ConfigError: they differ by more than 2 %.
    """
    if not abs(loss - expected) <= NEAR_EXPECTED * expected:
        raise ConfigError(
            f"expected the teacher's cross entropy on the first step to be teacher.expected-loss {expected:.4f} within "
            f"{NEAR_EXPECTED:.0%}, got {loss:.4f}; the teacher is loaded with another rotary base, norm, activation or "
            "number of heads than it was trained with, or the expected loss was measured on other tokens: correct "
            "`teacher:`, or remove teacher.expected-loss"
        )
    logger.info("the teacher's cross entropy on the first step is %.4f, expected %.4f", loss, expected)


@dataclass(frozen=True)
class Rounding:
    """What rounding the layers changes in a teacher's predictions, on the tokens of some micro-batches."""

    kl: float
    """KL(plain || rounded) in nats per token."""
    agreement: float
    """Share of tokens with the same most probable token."""
    tokens: int

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.2g} nats per token to the plain teacher, the same most probable token in "
            f"{self.agreement:.2%} of {self.tokens} tokens"
        )


def check_rounding(found: Rounding) -> None:
    """Reject a teacher whose predictions are changed by rounding its layers.

    Raises:
        ConfigError: KL is more than `LARGEST_ROUNDING`.
    """
    if not found.kl <= LARGEST_ROUNDING:
        raise ConfigError(
            f"expected teacher.weights int8 to leave the teacher's predictions within {LARGEST_ROUNDING} nats per "
            f"token, got {found}; set teacher.weights to host or device"
        )


def check_fp32_range(loss: float, kd_weight: float) -> None:
    """Warn of a divergence that is too large for fp32.

    Args:
        loss: `kd loss` per token of the first step.
        kd_weight: factor of the divergence in the total loss.
    """
    if kd_weight and not abs(loss * kd_weight) <= LARGEST:
        logger.warning(
            "kd loss of the first step is %.3g per token (times kd_weight %g), more than %g: fp32 has no digit left "
            "for the lm loss, and the gradient may be rounding error only; raise the temperature, take a bounded "
            "divergence (jensen_shannon, skew_forward_kl, skew_reverse_kl, squared_hellinger), or alpha and beta of at "
            "least 0",
            *(loss, kd_weight, LARGEST),
        )
