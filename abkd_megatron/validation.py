"""Validation of numbers from users; tensors are checked in `tensors`. Does not import torch.

A number is any instance of Python's `numbers`: int, float, Fraction and NumPy scalars. A bool is not a number.
"""

import math
import numbers
import sys

from abkd_megatron.errors import ConfigError


def _real(number: object) -> float:
    """Return `number` as a float, or NaN if it is not a finite real number."""
    if not isinstance(number, numbers.Real) or isinstance(number, bool):
        return math.nan
    try:
        result = float(number)
    except OverflowError:  # an int or Fraction out of range
        return math.nan
    return result if math.isfinite(result) else math.nan


def finite_number(owner: str, name: str, number: object) -> float:
    """Return `number` as a float.

    Raises:
        ConfigError: if it is not a finite real number.
    """
    if math.isnan(result := _real(number)):
        raise ConfigError(
            f"{owner}: expected {name} to be a finite number, got {number!r}: give a plain number such as 0.5"
        )
    return result


def positive_number(owner: str, name: str, number: object, remedy: str = "give a number such as 1.0") -> float:
    """Return `number` as a float.

    Raises:
        ConfigError: if it is not a finite real number above 0.
    """
    if not (result := _real(number)) > 0.0:
        raise ConfigError(f"{owner}: expected {name} to be a finite number above 0, got {number!r}: {remedy}")
    return result


def weight_number(owner: str, name: str, number: object) -> float:
    """Return `number` as a float.

    Raises:
        ConfigError: if it is not a finite real number of at least 0.
    """
    if not (result := _real(number)) >= 0.0:
        raise ConfigError(f"{owner}: expected {name} to be a number of at least 0, got {number!r}: 0 turns it off")
    return result


def share_of_mass(owner: str, name: str, number: object) -> float:
    """Return `number` as a float.

    Raises:
        ConfigError: if it is not between 0 and 1, both excluded.
    """
    result = finite_number(owner, name, number)
    if not 0.0 < result < 1.0:
        raise ConfigError(f"{owner}: expected {name} between 0 and 1, both excluded, got {number!r}: 0.5 is a half")
    return result


def whole_number(owner: str, name: str, number: object, least: int, remedy: str = "") -> int:
    """Return `number` as an int; floats without a fractional part are accepted.

    Raises:
        ConfigError: if it is not a whole number, or below `least`.
    """
    if isinstance(number, numbers.Integral) and not isinstance(number, bool):
        whole: int | None = int(number)
    else:
        whole = int(result) if (result := _real(number)).is_integer() else None
    if whole is None or whole < least:
        end = f": {remedy}" if remedy else ""
        raise ConfigError(f"{owner}: expected {name} to be a whole number of at least {least}, got {number!r}{end}")
    return whole


def flag(owner: str, name: str, value: object) -> bool:
    """Return `value` as a bool.

    Raises:
        ConfigError: if it is not a bool; 0 and 1 are not.
    """
    numpy = sys.modules.get("numpy")  # without it there are no NumPy bools
    if isinstance(value, bool) or (numpy is not None and isinstance(value, numpy.bool_)):
        return bool(value)
    raise ConfigError(f"{owner}: expected {name} to be true or false, got {value!r}: give a bool")
