"""Bytes of a token's record: K ids and log-probabilities, the rest's, and what is logged of the teacher."""

from dataclasses import dataclass

import torch
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.vocab_parallel.record_passes import TeacherRecords

PRECISIONS = {"fp16": torch.float16, "fp32": torch.float32}
# log_rest, entropy and label_log_prob in fp32, in this order.
_HEAD = 12


@dataclass(frozen=True)
class RecordLayout:
    """Layout of a token's record, in little-endian bytes without padding.

        log_rest, entropy, label_log_prob fp32 | K log-probabilities fp16 or fp32 | K ids of 2, 3 or 4 bytes

    In fp16 a log-probability has a relative error of at most 2^-11: 0.0005 nats at -1, 0.004 at -8, 0.008 at -16. fp32
    keeps it as computed.
    """

    vocab_size: int
    """Tokens of the vocabulary, without padding."""
    top_k: int
    """Log-probabilities per token, 1 to `vocab_size`."""
    precision: str = "fp16"
    """One of `PRECISIONS`, of the log-probabilities."""

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.vocab_size:
            raise ConfigError(
                f"cache.top_k: expected 1 to the vocabulary's {self.vocab_size} tokens, got {self.top_k}; change it"
            )

    @classmethod
    def of_bytes(cls, vocab_size: int, num_bytes: int, precision: str = "fp16") -> "RecordLayout":
        """Return the layout with the largest K whose record has at most `num_bytes` bytes.

        Raises:
            ConfigError: not even one token fits.
        """
        one = cls(vocab_size, 1, precision)
        of_token = one.bytes_per_token - _HEAD
        if num_bytes < one.bytes_per_token:
            raise ConfigError(
                f"cache.bytes_per_token: expected {one.bytes_per_token} or more, a record of one token, got {num_bytes}"
            )
        return cls(vocab_size, min((num_bytes - _HEAD) // of_token, vocab_size), precision)

    @property
    def id_bytes(self) -> int:
        """Bytes of an id: the fewest of 2, 3 and 4 that hold the vocabulary."""
        return next(size for size in (2, 3, 4) if self.vocab_size <= 1 << (8 * size))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's record."""
        return _HEAD + self.top_k * (self._dtype.itemsize + self.id_bytes)

    @property
    def _dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    def pack(self, records: TeacherRecords) -> Tensor:
        """Return the bytes of N records, [N, bytes_per_token] uint8, on their device.

        Args:
            records: [N, K], with `entropy` and `label_log_prob`.
        """
        assert records.entropy is not None and records.label_log_prob is not None
        head = torch.stack([records.log_rest, records.entropy, records.label_log_prob], dim=-1).float()
        ids = _bytes(records.ids.to(torch.int32)).view(-1, self.top_k, 4)[..., : self.id_bytes]
        return torch.cat([_bytes(head), _bytes(records.log_probs.to(self._dtype)), ids.flatten(1)], dim=-1)

    def unpack(self, packed: Tensor) -> TeacherRecords:
        """Return the records of bytes, [N, bytes_per_token] uint8; the inverse of `pack` but for rounding."""
        values = self.top_k * self._dtype.itemsize
        head, log_probs, ids = packed.split([_HEAD, values, self.top_k * self.id_bytes], dim=-1)
        whole = torch.nn.functional.pad(ids.reshape(len(packed), self.top_k, self.id_bytes), (0, 4 - self.id_bytes))
        log_rest, entropy, label_log_prob = head.contiguous().view(torch.float32).unbind(-1)
        return TeacherRecords(
            ids=whole.contiguous().view(torch.int32).squeeze(-1),
            log_probs=log_probs.contiguous().view(self._dtype).float(),
            log_rest=log_rest,
            entropy=entropy,
            label_log_prob=label_log_prob,
        )


def _bytes(numbers: Tensor) -> Tensor:
    """[N, n] of any type -> [N, n * its size] uint8."""
    return numbers.contiguous().view(torch.uint8)
