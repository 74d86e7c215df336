"""Conversion of YAML values to the types of dataclass fields and Megatron's options."""

import argparse
import contextlib
import functools
import math
import operator
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from types import NoneType
from typing import Any

from abkd_megatron.config.schema import Number, Scalar, Value
from abkd_megatron.config.yaml import dashed, flow, load_yaml
from abkd_megatron.errors import ConfigError, brief, check_name, shown
from abkd_megatron.losses.schedule import COUNTS, Schedule

_MOST_DIGITS = 100  # of an integer; Python's int() has a limit of several thousand

# {type: (expected value, type that YAML may give instead, remedy for it)}.
_EXPECTED: dict[type, tuple[str, type, str]] = {
    bool: ("true or false", str, "write true or false, unquoted"),
    int: ("a whole number", str, "write it in digits"),
    float: ("a finite number", NoneType, ""),
    str: ("text", bool, "quote it"),
}

type Options = Mapping[str, argparse.Action]

# Keys of each kind of schedule with their types, and the optional ones.
_RAMP: dict[str, Any] = {"from": float, "to": float, "start": None, "end": None, "by": str}
_SCHEDULES = {"constant": {"value": float}, "linear": _RAMP, "cosine": _RAMP, "piecewise": {"points": None, "by": str}}
_OPTIONAL = ("start", "by")


@dataclass(frozen=True, slots=True)
class Given:
    """One setting with its origin."""

    section: str
    key: str
    value: Any
    origin: str

    @property
    def name(self) -> str:
        """``section.key``, or the section without a key."""
        return f"{self.section}.{self.key}" if self.key else self.section

    @classmethod
    def spelled(cls, section: str, key: str, value: Any, origin: str) -> "Given":
        """Create it with the section's spelling of the key: underscores for fields, dashes for Megatron's options."""
        key = (
            key.replace("-", "_")
            if section in ("distillation", "data", "cache", "generate", "compare")
            else dashed(key)
        )
        return cls(section, key, value, origin)

    def within(self) -> dict[str, "Given"]:
        """Return the entries of a mapping; in files each with its line."""
        file = self.origin.rpartition(":")[0]
        lines = {key: f"{file}:{line}" if file else self.origin for key, line in self.value.lines.items()}
        given = ((key.replace("-", "_"), value, lines[key]) for key, value in self.value.items())
        return {key: replace(self, key=f"{self.key}.{key}", value=value, origin=of) for key, value, of in given}


def wrong(item: Given, expected: str, value: object, remedy: str = "") -> ConfigError:
    """Return the error for an invalid value."""
    end = f"; {remedy}" if remedy else ""
    return ConfigError(f"{item.origin}: {item.name}: expected {expected}, got {shown(value)}{end}")


def _scalar(item: Given, value: object, kind: type, finite: bool = True) -> Any:
    """Convert a value to bool, int, float or str."""
    text = str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and text is not None:
        return text
    if kind is int and text is not None and len(text) <= _MOST_DIGITS and re.fullmatch(r"[-+]?\d+(_\d+)*", text):
        return int(text)
    if kind is float and text is not None:
        with contextlib.suppress(ValueError):
            number = float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", text.lower()))
            if math.isfinite(number) or not finite:
                return number
    expected, misread, remedy = _EXPECTED[kind]
    expected = expected if finite else expected.replace("finite ", "")
    raise wrong(item, expected, value, remedy if isinstance(value, misread) else "")


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


@contextlib.contextmanager
def _named(item: Given) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{item.origin}: {item.name}: {error}") from error


def _typed(
    item: Given, given: Mapping[str, Given], types: Mapping[str, Any], required: Sequence[str]
) -> dict[str, Any]:
    """Convert the values of a mapping to their types; reject unknown and missing keys."""
    for key, of in given.items():
        check_name(key, types, of.origin, f"key of {item.name}")
    if missing := [key for key in required if key not in given]:
        raise ConfigError(f"{item.origin}: {item.name}: expected {', '.join(missing)} as well")
    return {key: field_value(of, types[key]) if types[key] else of.value for key, of in given.items()}


def _record(item: Given, kind: Any) -> Any:
    """Convert a mapping to a dataclass."""
    types = typing.get_type_hints(kind)
    if not isinstance(item.value, dict):
        raise wrong(item, f"a mapping of {', '.join(types)}", item.value)
    values = _typed(item, item.within(), types, [of.name for of in fields(kind) if of.default is MISSING])
    with _named(item):
        return kind(**values)


def _schedule(item: Given) -> Schedule:
    """Convert a mapping to a schedule."""
    given = item.within()
    if "schedule" not in given:
        raise wrong(item, "a number, or a mapping with a `schedule`", item.value, f"known: {', '.join(_SCHEDULES)}")
    kind = given.pop("schedule")
    check_name(kind.value, _SCHEDULES, kind.origin, f"{item.name}.schedule")
    types = _SCHEDULES[kind.value]
    values = _typed(item, given, types, [key for key in types if key not in _OPTIONAL])
    by = values.get("by", COUNTS[0])
    check_name(by, COUNTS, given.get("by", item).origin, f"{item.name}.by")
    count: type = float if by == "fraction" else int
    points: list[tuple[float, float]] = [(0, values.get("value", 0.0))]
    if kind.value == "piecewise":
        of = given["points"]
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in _list(of.value)):
            raise wrong(of, f"pairs [{by}, value]", of.value)
        points = [(_scalar(of, at, count), _scalar(of, value, float)) for at, value in of.value]
    elif kind.value != "constant":
        start, end = (_scalar(given[key], given[key].value, count) if key in given else 0 for key in ("start", "end"))
        points = [(start, values["from"]), (end, values["to"])]
    with _named(item):
        return Schedule(kind.value, tuple(points), by)


def _term(item: Given) -> dict[str, Scalar]:
    """Convert an entry of `losses`. Text that is a number becomes one, because only the loss knows its types."""
    if not isinstance(item.value, dict):
        raise wrong(item, "a list of {name: ..., weight: ..., parameters}", item.value)
    term: dict[str, Scalar] = {}
    for key, value in ((key.replace("-", "_"), value) for key, value in item.value.items()):
        if isinstance(value, dict | list):
            raise wrong(item, f"a scalar for {brief(key)}", value)
        term[key] = value
        if isinstance(value, str) and key != "name":
            with contextlib.suppress(ConfigError):
                term[key] = _scalar(item, value, float)
    return term


def _texts(item: Given) -> dict[str, str]:
    """Convert a mapping of names to text."""
    if not isinstance(item.value, dict):
        raise wrong(item, "a mapping of names to paths, such as {books: data/books}", item.value)
    return {str(name): _scalar(item, value, str) for name, value in item.value.items()}


def _settings(item: Given) -> dict[str, list[str]]:
    """Convert `compare.losses` to overrides per loss. Their values are checked when they are used."""
    if not isinstance(item.value, dict):
        raise wrong(item, "a mapping of names to settings, such as {ToDi: {divergence: todi}}", item.value)
    settings: dict[str, list[str]] = {}
    for name, entry in item.value.items():
        if not isinstance(entry, dict):
            raise wrong(item, f"{brief(name)} to be a mapping such as {{divergence: todi}}", entry)
        settings[name] = []
        for key, value in entry.items():
            section, _, rest = key.rpartition(".")
            as_it_is = isinstance(value, str) and load_yaml(value, name) == value
            spelled = Given.spelled(section or "distillation", rest, value, item.origin)
            settings[name].append(f"{spelled.name}={value if as_it_is else flow(value)}")
    return settings


def field_value(item: Given, kind: Any) -> Any:
    """Convert a value to the type of its dataclass field."""
    value, kinds = item.value, typing.get_args(kind)
    if NoneType in kinds:
        others = functools.reduce(operator.or_, (one for one in kinds if one is not NoneType))
        return None if value is None else field_value(item, others)
    if typing.get_origin(kind) is list:
        return [field_value(replace(item, value=of), kinds[0]) for of in _list(value)]
    if kind == dict[str, list[str]]:
        return _settings(item)
    if kind == dict[str, Scalar]:
        return _term(item)
    if kind == dict[str, str]:
        return _texts(item)
    if is_dataclass(kind):
        return _record(item, kind)
    if kind == Number:
        return _schedule(item) if isinstance(value, dict) else _scalar(item, value, float)
    return _scalar(item, value, kind)


class MegatronOptions:
    """Megatron's options by name, with dashes or underscores."""

    def __init__(self, options: Options) -> None:
        self._options = options
        # If both spellings exist, this order keeps the one with dashes, the first in ASCII.
        self._spellings = {dashed(name): name for name in sorted(options, reverse=True)}

    def find(self, key: str, origin: str) -> tuple[str, argparse.Action]:
        """Return Megatron's spelling of an option, and its action."""
        check_name(dashed(key), self._spellings, origin, "Megatron argument")
        spelling = self._spellings[dashed(key)]
        return spelling, self._options[spelling]

    def dest(self, key: str) -> str:
        """Return the destination of an option in Megatron's parser."""
        return self.find(key, "")[1].dest


def option_value(item: Given, action: argparse.Action) -> Value:
    """Convert a value to the type that argparse would give it; text if the action has a custom type."""
    value, nargs = item.value, action.nargs
    if value is None:
        return None
    if nargs == 0 or action.type is bool:
        return bool(_scalar(item, value, bool))
    if nargs is None or nargs == "?":
        if isinstance(value, list):
            raise wrong(item, "one value", value, "write it as quoted text, as on Megatron's command line")
        return _option_item(item, value, action)
    values = [_option_item(item, entry, action) for entry in _list(value)]
    if (nargs == "+" and not values) or (isinstance(nargs, int) and len(values) != nargs):
        raise wrong(item, "at least one value" if nargs == "+" else f"{nargs} values", value)
    return values


def _option_item(item: Given, value: object, action: argparse.Action) -> Scalar:
    if isinstance(value, bool | None | dict | list):
        raise wrong(item, "a value", value, "quote it" if isinstance(value, bool) else "")
    result: Scalar = _scalar(item, value, action.type if action.type in (int, float) else str, finite=False)
    if action.choices is not None and result not in action.choices:
        names = [str(getattr(choice, "name", choice)) for choice in action.choices]
        check_name(str(result), names, item.origin, f"choice for {item.name}")
    return result
