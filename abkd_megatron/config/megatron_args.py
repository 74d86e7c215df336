"""The way from a job to Megatron's arguments: its parser, what it rejects of them, and the model that they describe."""

import argparse
import functools
import linecache
import re
import sys
import traceback
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from megatron.training.arguments import add_megatron_arguments, parse_args

from abkd_megatron.config.load import to_argv
from abkd_megatron.config.model_config import ModelConfig, model_config
from abkd_megatron.config.schema import Config, Value
from abkd_megatron.config.stages import check_stages
from abkd_megatron.config.unsupported import check_layout
from abkd_megatron.errors import AbkdError, ConfigError


@functools.cache
def megatron_options() -> Mapping[str, argparse.Action]:
    """Return every option of the installed Megatron, by its spelling without the leading dashes."""
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return {name.removeprefix("--"): action for name, action in parser._option_string_actions.items()}


def job_arguments(config: Config, data: Mapping[str, Value]) -> dict[str, Value]:
    """Return the student's Megatron arguments of a job, keyed as in `Config.megatron`.

    Args:
        config: `megatron` is used.
        data: arguments of the prepared data, as `data_arguments` returns them.
    """
    # The time of a step, for the report: Megatron measures it for its log in any case.
    return {"log-timers-to-tensorboard": True, **data, **config.megatron}


@contextmanager
def command_line(arguments: Mapping[str, Value]) -> Iterator[None]:
    """Put a job's arguments where Megatron's parser reads them, in sys.argv, and name what Megatron rejects.

    Raises:
        ConfigError: what `to_argv` or Megatron rejects.
    """
    saved, sys.argv = sys.argv, [sys.argv[0], *to_argv(arguments, megatron_options())]
    try:
        with megatron_refusals_named():
            yield
    finally:
        sys.argv = saved


def parse(arguments: Mapping[str, Value]) -> Namespace:
    """Return arguments as Megatron's parser has them, not validated.

    Raises:
        ConfigError: as `command_line`.
        SystemExit: from argparse, which has printed why.
    """
    with command_line(arguments):
        return parse_args()


def parse_model(arguments: Mapping[str, Value], who: str, host: str) -> Namespace:
    """Return arguments as Megatron's parser has them, after `check_layout`; not validated.

    Args:
        arguments: of the model.
        who: "student" or "teacher".
        host: as `check_layout` takes it.

    Raises:
        ConfigError: as `command_line` and `check_layout`.
        SystemExit: as `parse`.
    """
    args = parse(arguments)
    check_layout(args, who, host, megatron_options())
    return args


def checked_model_config(args: Namespace, who: str, host: str) -> ModelConfig:
    """Return the model configuration of validated arguments.

    The arguments are checked once more: Megatron's validation, and `use-checkpoint-args`, rewrite some of them.

    Args:
        args: Megatron's, validated.
        who: "student" or "teacher".
        host: as `check_layout` takes it.

    Raises:
        ConfigError: as `check_layout` and `check_stages`, and what Megatron rejects of them.
    """
    check_layout(args, who, host, megatron_options())
    with megatron_refusals_named():
        config = model_config(args)
        check_stages(config.transformer, who, args.hybrid_layer_pattern)
    return config


@contextmanager
def megatron_refusals_named() -> Iterator[None]:
    """Raise what Megatron rejects as a ConfigError, whichever of Python's exceptions it does it with.

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
    """Return the line of an assertion without a message, and the values that it compares."""
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
