"""A data set around one of Megatron's."""

from collections.abc import Collection
from typing import Any

import numpy as np
from torch.utils.data import Dataset


class WrappedDataset(Dataset):
    """Has the length and the attributes of the data set inside; a subclass gives the samples.

    Args:
        dataset: of Megatron, or a wrapped one.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._dataset, name)  # such as the split, by which Megatron chooses a sampler


def samples_of(dataset: Any, sources: Collection[int], number: int) -> np.ndarray:
    """Return the samples of some datasets of a blend among its first `number`, [n] int64; none if it is no blend.

    Args:
        dataset: a BlendedDataset of Megatron, another one, or a wrapped one.
        sources: positions in the blend.
        number: of samples that are read.
    """
    if not hasattr(dataset, "dataset_index") or not number:
        return np.empty(0, dtype=np.int64)
    if dataset.dataset_index is None:  # Megatron may map the file at the first sample
        dataset[0]
    return np.flatnonzero(np.isin(dataset.dataset_index[:number], list(sources)))
