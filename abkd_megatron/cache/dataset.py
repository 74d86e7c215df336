"""Samples with their records: what a loader's workers read of a cache."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from abkd_megatron.cache.key import sample_key
from abkd_megatron.cache.manifest import Identity
from abkd_megatron.cache.store import CacheReader
from abkd_megatron.data.wrapped import WrappedDataset, samples_of
from abkd_megatron.errors import DataError

RECORDS = "teacher_records"
"""Name of a sample's records: [s, bytes per token + 1] uint8. The last byte of a token is 1 if it has a record."""

_NUM_TRIED = 8
# Log-probabilities in fp16 add up to 1 within this.
_NEAR = 0.02


def packed_records(reader: CacheReader, sample: Mapping[str, torch.Tensor], on_miss: str, name: str) -> torch.Tensor:
    """Return the records of a sample as the loss reads them, [s, bytes per token + 1] uint8, see `RECORDS`.

    Args:
        reader: of the cache.
        sample: as `sample_key` takes it, with its `loss_mask`, [s].
        on_miss: see `WithRecords`.
        name: of the sample, for the message.

    Raises:
        DataError: it has no records and `on_miss` is "error", or they are damaged.
    """
    found = reader.read(sample_key(sample))
    identity = reader.identity
    packed = torch.zeros(identity.seq_length, identity.layout.bytes_per_token + 1, dtype=torch.uint8)
    if found is not None:
        packed[:, :-1] = torch.from_numpy(found)
        packed[:, -1] = 1
    elif on_miss == "error" and sample["loss_mask"].any():
        raise DataError(
            f"expected the teacher's records of sample {name} in the cache, found none; run `abkd-megatron cache` "
            "with this job's data, seed and train-iters, or set distillation.on_miss=lm"
        )
    return packed


Readers = CacheReader | Mapping[int, CacheReader]
"""Of the cache of all samples; or by source, the position of a dataset in its blend, with one layout of records."""


def readers_of(directories: Path | Mapping[int, Path]) -> Readers:
    """Open the cache of all samples, or those of some sources, each once.

    Raises:
        DataError: see `CacheReader`.
    """
    if isinstance(directories, Path):
        return CacheReader(directories)
    opened = {directory: CacheReader(directory) for directory in set(directories.values())}
    return {source: opened[directory] for source, directory in directories.items()}


def reader_of(readers: Readers, sample: Mapping[str, Any]) -> CacheReader | None:
    """Return the reader of a sample's cache; None if its source has none, or is not known."""
    if isinstance(readers, CacheReader):
        return readers
    source = sample.get("dataset_id")
    return readers.get(int(source)) if source is not None else None


class WithRecords(WrappedDataset):
    """A data set of Megatron's whose samples also have their records.

    Args:
        dataset: of samples as `sample_key` takes them.
        readers: of the cache, or of the caches by source. Samples of other sources have zeros.
        on_miss: "error" rejects a sample without records, "lm" returns zeros for it.
    """

    def __init__(self, dataset: Any, readers: Readers, on_miss: str) -> None:
        super().__init__(dataset)
        self._readers, self._on_miss = readers, on_miss

    def __getitem__(self, index: int | None) -> dict[str, torch.Tensor]:
        """Return a sample.

        Raises:
            DataError: it has no records and `on_miss` is "error", or they are damaged.
        """
        sample = self._dataset[index]
        reader = reader_of(self._readers, sample)
        if reader is not None:
            return {**sample, RECORDS: packed_records(reader, sample, self._on_miss, str(index))}
        assert not isinstance(self._readers, CacheReader)
        identity = next(iter(self._readers.values())).identity
        shape = identity.seq_length, identity.layout.bytes_per_token + 1
        return {**sample, RECORDS: torch.zeros(shape, dtype=torch.uint8)}

    def check(self, number: int | None) -> int:
        """Try a few samples out of those that a job reads, and compare their records with the data.

        Args:
            number: of samples that the job reads; None for all.

        Returns:
            How many of those tried have records.

        Raises:
            DataError: see `__getitem__`; or records are not a distribution, or not of the samples' labels.
        """
        number = len(self) if number is None else min(number, len(self))
        samples = range(number) if isinstance(self._readers, CacheReader) else samples_of(self, self._readers, number)
        last = len(samples) - 1
        tried = sorted({i * last // max(_NUM_TRIED - 1, 1) for i in range(_NUM_TRIED)}) if len(samples) else []
        hits = 0
        for index in (int(samples[place]) for place in tried):
            sample = self[index]
            packed = sample[RECORDS]
            if packed[0, -1]:
                hits += 1
                reader = reader_of(self._readers, sample)
                assert reader is not None
                _compare(reader.identity, packed[:, :-1], sample["labels"], index)
        return hits


def _compare(identity: Identity, packed: torch.Tensor, labels: torch.Tensor, index: int) -> None:
    records = identity.layout.unpack(packed)
    assert records.label_log_prob is not None
    of_kept = records.log_probs[:, : records.num_kept]
    total = torch.cat([of_kept, records.log_rest.unsqueeze(-1)], dim=-1).logsumexp(-1)
    wrong = []
    least = torch.zeros_like(records.ids[:1])
    least[:, records.num_kept :] = -1  # draws of one id are merged
    if not bool(((records.ids >= least) & (records.ids < identity.vocab_size)).all()):
        wrong.append("ids beyond the vocabulary")
    if not bool((total.abs() < _NEAR).all()):
        wrong.append("probabilities that do not add up to 1")
    kept = records.ids == labels.unsqueeze(-1)
    if identity.temperature == 1.0:
        of_label = torch.where(kept, records.log_probs, 0.0).sum(-1)
        off = (of_label - records.label_log_prob).abs() > 2**-10 * (1 + of_label.abs())
        if bool((kept.any(-1) & off).any()):
            wrong.append("another log-probability of the label")
    if wrong:
        raise DataError(
            f"expected records of this data in the cache, got {' and '.join(wrong)} in sample {index}; write the "
            "cache again"
        )
