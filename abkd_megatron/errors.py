"""Exceptions, and helpers to raise them on every rank. Messages state what was expected, what was found, and a fix."""

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class AbkdError(Exception):
    """Base of all errors that this package raises on purpose; the command line prints them without a traceback."""


class ConfigError(AbkdError, ValueError):
    """Invalid setting, or invalid combination of settings."""


class CheckpointError(AbkdError):
    """Checkpoint that is missing, damaged, or does not match the configuration."""


class DataError(AbkdError):
    """Text, tokenizer or prepared data that cannot be used."""


class NumericalError(AbkdError, ArithmeticError):
    """NaN or Inf loss before Megatron's own checks."""


class HostError(AbkdError):
    """Requirement of the job that the installed Megatron or this machine lacks."""


@contextmanager
def on_every_rank() -> Iterator[None]:
    """Run the block on every rank; if it raises an `AbkdError` on any rank, raise it on all.

    This keeps the other ranks from waiting in a collective that the failed rank never enters. The block must not
    contain a collective that a failing rank could skip.

    Collectives: one all_gather_object over the whole job; none if torch.distributed is not initialized.
    """
    import torch.distributed as dist  # deferred: `env` works without torch

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
    """Return the result of `function` on rank 0, or raise its `AbkdError`, on every rank.

    Use it to read shared files once instead of on thousands of ranks.

    Collectives: one broadcast_object_list over the whole job. torch.distributed must be initialized.
    """
    import torch.distributed as dist

    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except AbkdError as error:
            outcome[1] = type(error), str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        kind, message = outcome[1]
        raise kind(message)
    result: T = outcome[0]
    return result


def check_name(name: object, known: Iterable[str], origin: str, what: str) -> None:
    """Reject an unknown name and suggest a known one.

    Args:
        name: the given name.
        known: valid names.
        origin: where it was given.
        what: kind of name, for the message.

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
    """Format a value for a message."""
    if isinstance(value, dict):
        return "a nested mapping"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    return "nothing (null)" if value is None else brief(repr(value))


def brief(text: str, most: int = 400) -> str:
    """Shorten text for a message by removing its middle, and escape it unless printable."""
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
