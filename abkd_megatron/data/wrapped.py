"""A data set around one of Megatron's."""

from typing import Any

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
