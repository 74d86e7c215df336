"""Samples with their records: what a loader's workers read of a cache."""

from collections.abc import Mapping
from typing import Any

import torch

from abkd_megatron.cache.key import sample_key
from abkd_megatron.cache.store import CacheReader
from abkd_megatron.data.wrapped import WrappedDataset
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


class WithRecords(WrappedDataset):
    """A data set of Megatron's whose samples also have their records.

    Args:
        dataset: of samples as `sample_key` takes them.
        reader: of the cache.
        on_miss: "error" rejects a sample without records, "lm" returns zeros for it.
    """

    def __init__(self, dataset: Any, reader: CacheReader, on_miss: str) -> None:
        super().__init__(dataset)
        self._reader, self._on_miss = reader, on_miss

    def __getitem__(self, index: int | None) -> dict[str, torch.Tensor]:
        """Return a sample.

        Raises:
            DataError: it has no records and `on_miss` is "error", or they are damaged.
        """
        sample = self._dataset[index]
        return {**sample, RECORDS: packed_records(self._reader, sample, self._on_miss, str(index))}

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
        tried = sorted({i * (number - 1) // max(_NUM_TRIED - 1, 1) for i in range(_NUM_TRIED)}) if number else []
        hits = 0
        for index in tried:
            sample = self[index]
            packed = sample[RECORDS]
            if packed[0, -1]:
                hits += 1
                self._compare(packed[:, :-1], sample["labels"], index)
        return hits

    def _compare(self, packed: torch.Tensor, labels: torch.Tensor, index: int) -> None:
        identity = self._reader.identity
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
