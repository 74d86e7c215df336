"""Samples of a job that are in a teacher cache, counted without training."""

import copy
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import numpy as np
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.training import get_train_valid_test_num_samples

from abkd_megatron.cache.dataset import Readers, reader_of
from abkd_megatron.cache.key import sample_key
from abkd_megatron.cache.store import CacheReader
from abkd_megatron.config.validation import ValidationConfig
from abkd_megatron.data.wrapped import samples_of
from abkd_megatron.hosts.batches import Packing, build_datasets

TRIED = 1024
"""Largest number of samples of a split that are looked up."""


@dataclass(frozen=True)
class Hits:
    """Samples of a split that are in a cache."""

    split: str
    number: int
    """Samples that the job reads."""
    tried: int
    """Of them, evenly spaced."""
    found: int
    first_missing: int | None
    """Number of the first sample that was tried and is not there."""

    @property
    def text(self) -> str:
        """Description."""
        of = f"of {self.tried} tried out of {self.number}" if self.tried < self.number else f"of {self.number}"
        missing = f"; the first that is missing is sample {self.first_missing}" if self.found < self.tried else ""
        return f"{self.split}: {self.found} {of} samples, {self.found / max(self.tried, 1):.1%}{missing}"


def count_hits(
    args: Namespace, readers: Readers, held_out_seed: int | None, validation: ValidationConfig
) -> Iterator[Hits]:
    """Yield the hits of train, validation and test.

    Megatron's indices of the data are built in a temporary folder.

    Args:
        args: Megatron's validated arguments.
        readers: of the cache; or by source, whose samples only are counted.
        held_out_seed: see `build_datasets`.
        validation: see `build_datasets`.
    """
    args = copy.copy(args)
    args.iteration = 0
    # The same code on these arguments: a dry run has no global ones.
    count = get_train_valid_test_num_samples
    numbers = FunctionType(count.__code__, count.__globals__ | {"get_args": lambda: args})()
    tokenizer: Any = build_tokenizer(args)
    with tempfile.TemporaryDirectory() as folder:
        args.data_cache_path = folder
        splits = build_datasets(args, tokenizer, numbers, lambda: True, held_out_seed, Packing.of(args), validation)
        numbers = (numbers[0], None, None) if validation.sets else numbers
        for name, of_split, number in zip(("train", "validation", "test"), splits, numbers, strict=True):
            for dataset in of_split if isinstance(of_split, list) else [of_split]:
                if dataset is not None and (number is None or number > 0):
                    hits = _hits(name, dataset, number, readers)
                    if hits.number or isinstance(readers, CacheReader):
                        yield hits


def _hits(name: str, dataset: Any, number: int | None, readers: Readers) -> Hits:
    number = len(dataset) if number is None else min(number, len(dataset))
    samples: Sequence[int] | np.ndarray = range(number)
    if not isinstance(readers, CacheReader):
        samples = samples_of(dataset, readers, number)
    number = len(samples)
    places = sorted({i * number // TRIED for i in range(TRIED)}) if number > TRIED else range(number)
    tried = [int(samples[place]) for place in places]
    missing = [index for index in tried if _is_missing(dataset[index], readers)]
    return Hits(name, number, len(tried), len(tried) - len(missing), missing[0] if missing else None)


def _is_missing(sample: dict[str, Any], readers: Readers) -> bool:
    reader = reader_of(readers, sample)
    return reader is not None and not reader.has(sample_key(sample)) and bool(sample["loss_mask"].any())
