"""Megatron's command line: its options, and what it says when it rejects them."""

import argparse
import functools
import linecache
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from megatron.training.arguments import add_megatron_arguments

from abkd_megatron.errors import AbkdError, ConfigError


@functools.cache
def megatron_options() -> Mapping[str, argparse.Action]:
    """Every argument of the installed Megatron, by its spelling without the leading dashes."""
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return {name.removeprefix("--"): action for name, action in parser._option_string_actions.items()}


@contextmanager
def command_line(argv: Sequence[str]) -> Iterator[None]:
    """Megatron's parser reads sys.argv and nothing else."""
    saved, sys.argv = sys.argv, [sys.argv[0], *argv]
    try:
        yield
    finally:
        sys.argv = saved


@contextmanager
def megatron_refusals_named() -> Iterator[None]:
    """Pass on why Megatron rejects arguments, without the traceback, whichever of Python's exceptions it does it with.

    An exception that is no rejection, such as the TypeError of a setting that Megatron's validation does not expect,
    is named together with the line that raised it.
    """
    try:
        yield
    except AbkdError:
        raise
    except (AssertionError, ValueError, RuntimeError) as error:
        reason = str(error) or assertion(error)
        raise ConfigError(f"Megatron refuses these arguments: {reason}") from error
    except Exception as error:
        raise ConfigError(
            f"Megatron cannot take these arguments, its own code fails: {type(error).__name__}: {error}, in "
            f"`{assertion(error)}`; remove the setting that leads there"
        ) from error


def assertion(error: BaseException) -> str:
    """The line of an assertion that says no word, and the numbers and names that it compares."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    last = traceback.extract_tb(error.__traceback__)[-1]
    numbers = range(last.lineno or 0, (last.end_lineno or last.lineno or 0) + 1)
    line = " ".join(filter(None, (linecache.getline(last.filename, number).strip() for number in numbers)))
    given = []
    for holder, name in dict.fromkeys(re.findall(r"\b(\w+)\.(\w+)\b(?!\()", line)):
        value = getattr(frame.f_locals.get(holder), name, ...)
        if value is None or isinstance(value, bool | int | float | str):
            given.append(f"{name.replace('_', '-') if holder == 'args' else name} is {value}")
    line = line or type(error).__name__
    return f"{line} ({', '.join(given)})" if given else line
