"""Named validation sets, of which each validation reads every row once."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset

from abkd_megatron.errors import DataError
from abkd_megatron.losses.sources import UNKNOWN

# Key of a sample: the position of its set, int64; `UNKNOWN` where a batch is filled up.
SET = "validation_set"

# Megatron's sequential sampler reads on from one validation to the next.
_MANY = 2**32


class HeldOut(Dataset):
    """The rows of all sets in their order, filled up to whole batches with rows of which no token counts."""

    split = Split.valid  # by which Megatron chooses the sizes of batches

    def __init__(self, sets: Sequence[Dataset], rows: Sequence[int], batch: int, repeats: bool) -> None:
        """Join sets.

        Args:
            sets: with a length each.
            rows: of each set.
            batch: rows of a batch of validation, `eval-global-batch-size`.
            repeats: whether the sampler ends with the data set, or begins anew by itself.
        """
        self._sets, self._ends = sets, list(accumulate(rows))
        self.number = number_of_rows(rows, batch)
        self._length = self.number * (_MANY if repeats else 1)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a sample, with its set."""
        row = index % self.number
        is_filled_up = row >= self._ends[-1]
        row = 0 if is_filled_up else row
        position = bisect_right(self._ends, row)
        sample = self._sets[position][row - (self._ends[position - 1] if position else 0)]
        if is_filled_up:
            sample = {**sample, "loss_mask": torch.zeros_like(sample["loss_mask"])}
        return {**sample, SET: torch.tensor(UNKNOWN if is_filled_up else position)}


def number_of_rows(rows: Sequence[int], batch: int) -> int:
    """Return the number of rows of a validation, in whole batches."""
    return -(-sum(rows) // batch) * batch


def check_rows(sets: Mapping[str, str], rows: Sequence[int]) -> None:
    """Check that there is something to validate on.

    Args:
        sets: {name: prefix}.
        rows: of each set.

    Raises:
        DataError: a set is shorter than a row.
    """
    for (name, prefix), number in zip(sets.items(), rows, strict=True):
        if number < 1:
            raise DataError(
                f"validation.sets: expected a row of megatron.seq-length tokens or more in {name}, got fewer tokens in "
                f"{prefix}; leave the set out, or make rows shorter"
            )
