"""Column range of the vocabulary on a rank."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist

from abkd_megatron.errors import ConfigError
from abkd_megatron.validation import whole_number


@dataclass(frozen=True)
class VocabShard:
    """This rank's real columns [start, stop) of a vocabulary of `size` real tokens.

    They come first in the local logits; any further local columns are padding with probability 0. The shards of a group
    may differ in width and may be empty.

    Args:
        start: global id of the first column.
        stop: one past the global id of the last real column.
        size: number of real tokens over all ranks.
        group: ranks that share the vocabulary; None for a single rank (not the default group).
        width: columns of the local logits, padding included; logits of another width are rejected. None if unknown.

    Raises:
        ConfigError: unless 0 <= start <= stop <= size and size >= 1, `width` >= stop - start, and this rank is in the
            group.
    """

    start: int
    stop: int
    size: int
    group: dist.ProcessGroup | None = None
    width: int | None = field(default=None, compare=False)
    num_ranks: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("start", "stop", "size"):
            object.__setattr__(self, name, _whole(name, getattr(self, name)))
        if self.width is not None:
            object.__setattr__(self, "width", _whole("width", self.width))
        if not (0 <= self.start <= self.stop <= self.size and self.size >= 1):
            raise ConfigError(
                "VocabShard: expected 0 <= start <= stop <= size and size >= 1, got "
                f"start {self.start}, stop {self.stop}, size {self.size}: give the ids of "
                "this rank's real columns"
            )
        if self.width is not None and self.width < self.num_columns:
            raise ConfigError(
                f"VocabShard: expected a width of at least {self.num_columns}, the columns [{self.start}, "
                f"{self.stop}), got {self.width}: give the width of one rank's logits"
            )
        object.__setattr__(self, "num_ranks", _rank_and_size(self.group)[1])

    @property
    def num_columns(self) -> int:
        """Number of real columns on this rank."""
        return self.stop - self.start

    def check_width(self, what: str, width: int) -> None:
        """Reject a tensor that cannot have this shard's columns.

        Args:
            what: name of the tensor in the message.
            width: its number of columns.

        Raises:
            ConfigError: for fewer columns than the real ones or other than `width`; without a `width`, also for the
                whole vocabulary if this rank holds only a part.
        """
        columns = f"the shard's [{self.start}, {self.stop})"
        if width < self.num_columns:
            raise ConfigError(
                f"expected {what} of at least {self.num_columns} columns ({columns}), got {width}: build the shard "
                "from their width"
            )
        if self.width is not None and width != self.width:
            raise ConfigError(
                f"expected {what} of {self.width} columns, one of {self.num_ranks} ranks' width, got {width}: pass "
                "this rank's columns, not gathered ones (parallel_output=True), or build the shard from their width"
            )
        if self.width is None and self.num_ranks > 1 and self.num_columns < self.size == width:
            raise ConfigError(
                f"expected {what} of one of {self.num_ranks} ranks ({columns}), got {width} columns, the whole "
                f"vocabulary: pass this rank's columns; if the others are padding, give the shard width={width}"
            )

    @classmethod
    def megatron(cls, width: int, group: dist.ProcessGroup | None = None, vocab_size: int | None = None) -> VocabShard:
        """Build a shard in Megatron's layout: rank r has columns from r * width on, with padding at the very end.

        Args:
            width: columns of the local logits, padding included.
            group: tensor-parallel group; None for one rank.
            vocab_size: number of real tokens; None if no column is padding.

        Raises:
            ConfigError: for a number that is not whole, a vocab_size not in 1 .. width * number of ranks, or a group
                without this rank.
        """
        rank, num_ranks = _rank_and_size(group)
        width = _whole("width", width)
        padded_size = width * num_ranks
        vocab_size = padded_size if vocab_size is None else _whole("vocab_size", vocab_size)
        if not 1 <= vocab_size <= padded_size:
            raise ConfigError(
                f"expected vocab_size in 1 .. {padded_size} ({num_ranks} ranks of {width} columns), got "
                f"{vocab_size} on rank {rank}: give the tokenizer's size, before padding, and "
                "the width of one rank's logits"
            )
        start = min(rank * width, vocab_size)
        return cls(start, min((rank + 1) * width, vocab_size), vocab_size, group, width)


def _whole(name: str, number: object) -> int:
    return whole_number("VocabShard", name, number, least=0)


def _rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    if group is None:
        return 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        raise ConfigError(
            "VocabShard: expected a group that contains this rank, got one that does not: pass this rank's "
            "tensor-parallel group"
        )
    return rank, dist.get_world_size(group)
