"""Mixing of the sequences of a micro-batch: MixKD (Liang et al., ICLR 2021, arXiv 2011.00593).

Legend: s sequence, b micro-batch, h hidden size.
"""

from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.validation import positive_number


class Draw(NamedTuple):
    """What a micro-batch's sequences are mixed with, the same for both models."""

    partners: tuple[int, ...]
    """Of each sequence: the other one."""
    shares: tuple[float, ...]
    """Of each sequence: its own share."""

    def mix(self, embeddings: Tensor) -> Tensor:
        """Return share * sequence + (1 - share) * partner for every sequence.

        Args:
            embeddings: [s, b, h], or this rank's tokens of it.
        """
        pairs = enumerate(zip(self.partners, self.shares, strict=True))
        # Numbers of the host, so that nothing is copied to the device.
        mixed = [torch.lerp(embeddings[:, other], embeddings[:, own], share) for own, (other, share) in pairs]
        return torch.stack(mixed, dim=1)


@dataclass(frozen=True)
class SequenceMix:
    """Distillation on mixed sequences: both models see interpolated embeddings.

    Each sequence is mixed with another one of its micro-batch. Its own share is drawn from Beta(alpha, alpha) (the
    paper's lambda). Labels, loss mask and masks of attention stay those of the sequence itself.

    Raises:
        ConfigError: alpha is not above 0.
    """

    alpha: float
    """Below 1 most shares are near 0 or 1, above 1 near 1/2; 1 is uniform."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", positive_number("mix", "alpha", self.alpha))

    def draw(self, seed: int, step: int, micro_batch: int, sequences: int) -> Draw:
        """Return what a micro-batch is mixed with: a function of the arguments, on every rank and after a resume.

        Args:
            seed: of the run.
            step: training steps before this one.
            micro_batch: its number in the step, over all data-parallel ranks.
            sequences: in it.

        Raises:
            ConfigError: there is only one.
        """
        if sequences < 2:
            raise ConfigError(
                "distillation.mix needs micro-batches of at least 2 sequences to mix, got 1; raise "
                "megatron.micro-batch-size"
            )
        random = Random(f"{seed} {step} {micro_batch}")  # noqa: S311
        circle = random.sample(range(sequences), sequences)
        after = dict(zip(circle, [*circle[1:], circle[0]], strict=True))
        shares = tuple(random.betavariate(self.alpha, self.alpha) for _ in range(sequences))
        return Draw(tuple(after[own] for own in range(sequences)), shares)
