"""Weights of the divergence and the cross entropy by data source.

Legend: b micro-batch.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.validation import weight_number, whole_number

UNKNOWN = -1
"""Source of a sequence whose dataset is not known, such as one of a validation set that is not a blend."""


@dataclass(frozen=True)
class SourceWeights:
    """Weights of one dataset of a Megatron blend, in place of the objective's.

    Raises:
        ConfigError: for a source below 0, both a source and a path or neither, an invalid weight, or none.
    """

    source: int | None = None
    """Position of the dataset in the list of its split, from 0: `dataset_id` of Megatron's BlendedDataset."""
    kd_weight: float | None = None
    """None: the objective's."""
    lm_weight: float | None = None
    """None: the objective's."""
    path: str | None = None
    """The dataset's path prefix in the list of its split, in place of its position."""

    def __post_init__(self) -> None:
        if (self.source is None) == (self.path is None):
            got = "neither" if self.source is None else f"{self.source} and {self.path}"
            raise ConfigError(
                f"sources: expected source, the position of a dataset, or path, its prefix, got {got}; give one of them"
            )
        if self.source is not None:
            object.__setattr__(self, "source", whole_number("sources", "source", self.source, least=0))
        for name in ("kd_weight", "lm_weight"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, weight_number(f"source {self.name}", name, value))
        if self.kd_weight is None and self.lm_weight is None:
            raise ConfigError(f"source {self.name}: expected kd_weight or lm_weight, got neither; give one")

    @property
    def name(self) -> int | str:
        """The position or the path, as it was given."""
        return self.source if self.source is not None else str(self.path)

    def described(self) -> dict[str, int | float | str]:
        """Return the keys that were given, with their values."""
        return {name: value for name, value in vars(self).items() if value is not None}


def reject_duplicate_sources(sources: Sequence[SourceWeights]) -> None:
    """Reject two entries for one position, or for one path.

    Raises:
        ConfigError: with the source.
    """
    for source, count in Counter(of.name for of in sources).items():
        if count > 1:
            raise ConfigError(f"expected each source once, got {count} entries for source {source}; merge them")


def weights_by_sequence(sources: Sequence[SourceWeights], name: str, default: float, ids: Tensor) -> Tensor:
    """Return the weights [b] fp64 of sequences.

    Args:
        sources: the entries, with positions.
        name: "kd_weight" or "lm_weight".
        default: weight of the other sources.
        ids: [b] int64, source of each sequence.
    """
    weights = torch.full(ids.shape, default, dtype=torch.float64, device=ids.device)
    for of in sources:
        assert of.source is not None
        if (own := getattr(of, name)) is not None:
            weights = torch.where(ids == of.source, own, weights)
    return weights
