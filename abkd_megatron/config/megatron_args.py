"""Megatron's arguments of a job: parsing, checks and model configuration."""

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
    """Return the actions of the installed Megatron's options, keyed by name without leading dashes."""
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return {name.removeprefix("--"): action for name, action in parser._option_string_actions.items()}


def job_arguments(config: Config, data: Mapping[str, Value]) -> dict[str, Value]:
    """Return the student's Megatron arguments of a job, keyed as in `Config.megatron`.

    Args:
        config: `megatron` is used.
        data: arguments of the prepared data, from `data_arguments`.
    """
    # Step times for the report. Megatron measures them for its log anyway.
    return {"log-timers-to-tensorboard": True, **data, **config.megatron}


@contextmanager
def command_line(arguments: Mapping[str, Value]) -> Iterator[None]:
    """Set sys.argv, which Megatron's parser reads, to a job's arguments.

    Raises:
        ConfigError: `to_argv` or Megatron rejects an argument.
    """
    saved, sys.argv = sys.argv, [sys.argv[0], *to_argv(arguments, megatron_options())]
    try:
        with megatron_errors_as_config_error():
            yield
    finally:
        sys.argv = saved


def parse(arguments: Mapping[str, Value]) -> Namespace:
    """Parse arguments with Megatron's parser, without validation.

    Raises:
        ConfigError: see `command_line`.
        SystemExit: from argparse, which has printed the error.
    """
    with command_line(arguments):
        return parse_args()


def parse_model(arguments: Mapping[str, Value], who: str, host: str) -> Namespace:
    """Parse a model's arguments and run `check_layout`, without Megatron's validation.

    Args:
        arguments: of the model.
        who: "student" or "teacher".
        host: see `check_layout`.

    Raises:
        ConfigError: see `command_line` and `check_layout`.
        SystemExit: see `parse`.
    """
    args = parse(arguments)
    check_layout(args, who, host, megatron_options())
    return args


def checked_model_config(args: Namespace, who: str, host: str) -> ModelConfig:
    """Return the model configuration of validated arguments.

    Runs `check_layout` again, because Megatron's validation and `use-checkpoint-args` change arguments.

    Args:
        args: Megatron's validated arguments.
        who: "student" or "teacher".
        host: see `check_layout`.

    Raises:
        ConfigError: see `check_layout` and `check_stages`; also if Megatron rejects the arguments.
    """
    check_layout(args, who, host, megatron_options())
    with megatron_errors_as_config_error():
        config = model_config(args)
        check_stages(config.transformer, who, args.hybrid_layer_pattern)
    return config


@contextmanager
def megatron_errors_as_config_error() -> Iterator[None]:
    """Convert Megatron's exceptions about arguments to ConfigError.

    For other exceptions, such as a TypeError from an unexpected value, the message has the line that raised it.
    """
    try:
        yield
    except AbkdError:
        raise
    except (AssertionError, ValueError, RuntimeError) as error:
        reason = str(error) or assertion(error)
        raise ConfigError(f"Megatron rejects these arguments: {reason}") from error
    except Exception as error:
        raise ConfigError(
            f"Megatron fails with these arguments: {type(error).__name__}: {error}, in `{assertion(error)}`; remove "
            "the setting that causes it"
        ) from error


def assertion(error: BaseException) -> str:
    """Return the source line that raised, and the values in it."""
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
