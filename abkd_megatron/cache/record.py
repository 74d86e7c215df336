"""Bytes of a token's record: K ids and log-probabilities, the rest's, R draws, and what is logged of the teacher."""

from dataclasses import dataclass

import torch
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.vocab_parallel.teacher_records import TeacherRecords, merged

PRECISIONS = {"fp16": torch.float16, "fp32": torch.float32}
# log_rest, entropy and label_log_prob in fp32, in this order.
_HEAD = 12


@dataclass(frozen=True)
class RecordLayout:
    """Layout of a token's record, in little-endian bytes without padding.

        log_rest, entropy, label_log_prob fp32 | K + R log-probabilities fp16 or fp32 | K + R ids of 2, 3 or 4 bytes

    In fp16 a log-probability has a relative error of at most 2^-11: 0.0005 nats at -1, 0.004 at -8, 0.008 at -16. fp32
    keeps it as computed.
    """

    vocab_size: int
    """Tokens of the vocabulary, without padding."""
    top_k: int
    """Log-probabilities per token, 1 to `vocab_size`."""
    precision: str = "fp16"
    """One of `PRECISIONS`, of the log-probabilities."""
    draws: int = 0
    """R, tokens drawn from those that are not kept, the last of a record; 0 if all are kept."""

    def __post_init__(self) -> None:
        if self.top_k == self.vocab_size:
            object.__setattr__(self, "draws", 0)
        if not 1 <= self.top_k <= self.vocab_size:
            raise ConfigError(
                f"cache.top_k: expected 1 to the vocabulary's {self.vocab_size} tokens, got {self.top_k}; change it"
            )

    @classmethod
    def of_bytes(cls, vocab_size: int, num_bytes: int, precision: str = "fp16", draws: int = 0) -> "RecordLayout":
        """Return the layout with the largest K whose record, with that many draws, has at most `num_bytes` bytes.

        Raises:
            ConfigError: not even one token fits.
        """
        one = cls(vocab_size, 1, precision, draws)
        of_token = (one.bytes_per_token - _HEAD) // one.num_ids
        if num_bytes < one.bytes_per_token:
            raise ConfigError(
                f"cache.bytes_per_token: expected {one.bytes_per_token} or more, a record of one token"
                f"{f' and {draws} draws' if draws else ''}, got {num_bytes}"
            )
        return cls(vocab_size, min((num_bytes - _HEAD) // of_token - one.draws, vocab_size), precision, draws)

    @property
    def form(self) -> str:
        """Description: K, and R if there are draws."""
        return f"{self.top_k} log-probabilities" + (f" and {self.draws} draws" if self.draws else "")

    @property
    def num_ids(self) -> int:
        """K + R."""
        return self.top_k + self.draws

    @property
    def id_bytes(self) -> int:
        """Bytes of an id: the fewest of 2, 3 and 4 that hold the vocabulary."""
        return next(size for size in (2, 3, 4) if self.vocab_size <= 1 << (8 * size))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's record."""
        return _HEAD + self.num_ids * (self._dtype.itemsize + self.id_bytes)

    @property
    def _dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    def pack(self, records: TeacherRecords) -> Tensor:
        """Return the bytes of N records, [N, bytes_per_token] uint8, on their device.

        Args:
            records: [N, K + R], with `entropy` and `label_log_prob`.
        """
        assert records.entropy is not None and records.label_log_prob is not None
        head = torch.stack([records.log_rest, records.entropy, records.label_log_prob], dim=-1).float()
        ids, log_probs = records.ids.to(torch.int32), records.log_probs.to(self._dtype)
        if records.draws is not None:  # written as often as they were drawn
            last = records.draws.cumsum(-1)
            number = torch.arange(self.draws, device=last.device).expand_as(last).contiguous()
            at = torch.searchsorted(last, number, right=True).clamp_max(self.draws - 1) + self.top_k
            ids, log_probs = (torch.cat([it[:, : self.top_k], it.gather(-1, at)], dim=-1) for it in (ids, log_probs))
        of_ids = _bytes(ids).view(-1, self.num_ids, 4)[..., : self.id_bytes]
        return torch.cat([_bytes(head), _bytes(log_probs), of_ids.flatten(1)], dim=-1)

    def unpack(self, packed: Tensor) -> TeacherRecords:
        """Return the records of bytes, [N, bytes_per_token] uint8; the inverse of `pack` but for rounding."""
        values = self.num_ids * self._dtype.itemsize
        head, of_values, of_ids = packed.split([_HEAD, values, self.num_ids * self.id_bytes], dim=-1)
        of_ids = of_ids.reshape(len(packed), self.num_ids, self.id_bytes)
        whole = torch.nn.functional.pad(of_ids, (0, 4 - self.id_bytes))
        log_rest, entropy, label_log_prob = head.contiguous().view(torch.float32).unbind(-1)
        ids = whole.contiguous().view(torch.int32).squeeze(-1)
        log_probs = of_values.contiguous().view(self._dtype).float()
        draws = None
        if self.draws:
            drawn, of_drawn, draws = merged(ids[:, self.top_k :], log_probs[:, self.top_k :], log_rest > -torch.inf)
            ids = torch.cat([ids[:, : self.top_k], drawn], dim=-1)
            log_probs = torch.cat([log_probs[:, : self.top_k], of_drawn], dim=-1)
        return TeacherRecords(ids, log_probs, log_rest, entropy, label_log_prob, draws)


def _bytes(numbers: Tensor) -> Tensor:
    """[N, n] of any type -> [N, n * its size] uint8."""
    return numbers.contiguous().view(torch.uint8)
