"""What can go wrong before the first step, by cause. Each message says what was expected, what was got, the remedy."""

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class AbkdError(Exception):
    """The base of every error this package raises on purpose; the command line prints it without a traceback."""


class ConfigError(AbkdError, ValueError):
    """A setting, or a pair of settings, that cannot be run."""


class CheckpointError(AbkdError):
    """A checkpoint that is missing, damaged, or of another model than the configuration says."""


class DataError(AbkdError):
    """Text, tokenizer or prepared data that cannot be used as it stands."""


class NumericalError(AbkdError, ArithmeticError):
    """A loss that is NaN or infinite before Megatron's own checks have begun."""


class HostError(AbkdError):
    """The installed Megatron, or this machine, lacks what the job needs."""


@contextmanager
def on_every_rank() -> Iterator[None]:
    """Run the block on every rank of the job; if it raises an `AbkdError` on any of them, raise it on all.

    Without this the healthy ranks would go on into a collective that the failed one never joins. The block itself
    must not hold a collective that a failing rank could skip.

    Collectives: one all_gather_object over the whole job; none where torch.distributed is not initialized.
    """
    import torch.distributed as dist  # only here: `env` says what is missing even where torch is

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


def from_rank_0[T](function: Callable[[], T]) -> T:
    """What `function` returns on rank 0, on every rank of the job; so an `AbkdError` that it raises there.

    For what is read from files that all ranks see: at thousands of ranks the file system is spared.

    Collectives: one broadcast_object_list over the whole job. torch.distributed has to be initialized.
    """
    import torch.distributed as dist

    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = function()
        except AbkdError as error:
            told[1] = type(error), str(error)
    dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        kind, message = told[1]
        raise kind(message)
    result: T = told[0]
    return result


def check_name(name: object, known: Iterable[str], origin: str, what: str) -> None:
    """Refuse a name that is none of the known ones, and say which may have been meant.

    Args:
        name: as it was given.
        known: what it may be.
        origin: where it was given.
        what: the kind of thing it names.

    Raises:
        ConfigError: if it is unknown.
    """
    known = list(known)
    if name in known:
        return
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.7)
    hint = f"did you mean '{near[0]}'?" if near else ""
    if len(known) <= 16:
        hint = f"{hint} known: {', '.join(known)}".strip()
    raise ConfigError(f"{origin}: unknown {what} {shown(name)}; {hint or 'see the documentation for the names'}")


def shown(value: object) -> str:
    """A value as a message shows it."""
    if isinstance(value, dict):
        return "a nested mapping"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    return "nothing (null)" if value is None else brief(repr(value))


def brief(text: str, most: int = 400) -> str:
    """Someone's text as a message can hold it: what is too long without its middle, what is not printable escaped."""
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
