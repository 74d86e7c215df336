"""What can go wrong before the first step, by cause. Each message says what was expected, what was got, the remedy."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


class AbkdError(Exception):
    """The base of every error this package raises on purpose; the command line prints it without a traceback."""


class ConfigError(AbkdError, ValueError):
    """A setting, or a pair of settings, that cannot be run."""


class CheckpointError(AbkdError):
    """A checkpoint that is missing, damaged, or of another model than the configuration says."""


class DataError(AbkdError):
    """Text, tokenizer or prepared data that cannot be used as it stands."""


class HostError(AbkdError):
    """The installed Megatron, or this machine, lacks what the job needs."""


@contextmanager
def on_every_rank() -> Iterator[None]:
    """Run the block on every rank of the job; if it raises an `AbkdError` on any of them, raise it on all.

    Without this the healthy ranks would go on into a collective that the failed one never joins. The block itself
    must not hold a collective that a failing rank could skip.

    Collectives: one all_gather_object over the whole job; none where torch.distributed is not initialised.
    """
    error: AbkdError | None = None
    try:
        yield
    except AbkdError as caught:
        error = caught
    if not dist.is_initialized():
        if error is not None:
            raise error
        return
    errors: list[tuple[type[AbkdError], str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, (type(error), str(error)) if error is not None else None)
    first = next(((rank, found) for rank, found in enumerate(errors) if found is not None), None)
    if error is not None:
        raise error
    if first is not None:
        rank, (kind, message) = first
        raise kind(f"{message} (found on rank {rank})")
