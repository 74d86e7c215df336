"""Values as they were written, in the type of their field or of Megatron's action."""

import argparse
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from abkd_megatron.config.schema import Number, Scalar, Value
from abkd_megatron.config.yaml import dashed, flow, load_yaml, plain
from abkd_megatron.errors import ConfigError, brief, check_name, shown
from abkd_megatron.losses.schedule import COUNTS, KINDS, Schedule
from abkd_megatron.losses.selection import KEYS, TokenSelection

_MOST_DIGITS = 100  # of a whole number; Python itself reads no more than some thousand

type Options = Mapping[str, argparse.Action]

# The keys of each kind of schedule, and those that may be left out.
_RAMP = ("from", "to", "start", "end", "by")
_SCHEDULE_KEYS = {"constant": ("value",), "linear": _RAMP, "cosine": _RAMP, "piecewise": ("points", "by")}
_OPTIONAL = ("start", "by")


@dataclass(frozen=True, slots=True)
class Given:
    """One setting as it was written, and where."""

    section: str
    key: str
    value: Any
    origin: str

    @property
    def name(self) -> str:
        """``section.key``."""
        return f"{self.section}.{self.key}" if self.key else self.section

    @classmethod
    def spelled(cls, section: str, key: str, value: Any, origin: str) -> "Given":
        """With the key as its section spells it: our fields have underscores, Megatron's options dashes."""
        key = key.replace("-", "_") if section in ("distillation", "data", "compare") else dashed(key)
        return cls(section, key, value, origin)


def wrong(item: Given, expected: str, value: object, remedy: str = "") -> ConfigError:
    """The error of a value that is of no use."""
    end = f"; {remedy}" if remedy else ""
    return ConfigError(f"{item.origin}: {item.name}: expected {expected}, got {shown(plain(value))}{end}")


def _boolean(item: Given, value: object) -> bool:
    if isinstance(value, bool):
        return value
    remedy = "write true or false, unquoted" if isinstance(value, str) else ""
    raise wrong(item, "true or false", value, remedy)


def _integer(item: Given, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and len(value) <= _MOST_DIGITS and re.fullmatch(r"[-+]?\d+(_\d+)*", value):
        return int(value)
    raise wrong(item, "a whole number", value, "write it in digits" if isinstance(value, str) else "")


def _number(item: Given, value: object, finite: bool) -> float:
    number = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    elif isinstance(value, str):
        try:
            number = float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", value.lower()))
        except ValueError:
            number = None
    if number is None or (finite and not math.isfinite(number)):
        raise wrong(item, "a finite number" if finite else "a number", value)
    return number


def _text(item: Given, value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise wrong(item, "text", value, "quote it" if isinstance(value, bool) else "")


def _schedule(item: Given) -> Schedule:
    """The schedule that a mapping describes."""
    file = item.origin.rpartition(":")[0]
    given = {
        key: Given(item.section, f"{item.key}.{key}", e.value, f"{file}:{e.line}" if file else item.origin)
        for key, e in item.value.items()
    }
    if "schedule" not in given:
        raise wrong(item, "a number, or a mapping with a `schedule`", item.value, f"known: {', '.join(KINDS)}")
    kind = given.pop("schedule")
    check_name(kind.value, KINDS, kind.origin, f"{item.name}.schedule")
    known = _SCHEDULE_KEYS[kind.value]
    for key, of in given.items():
        check_name(key, known, of.origin, f"key of {item.name}, a {kind.value} schedule,")
    if missing := [key for key in known if key not in given and key not in _OPTIONAL]:
        raise ConfigError(f"{item.origin}: {item.name}: a {kind.value} schedule needs {', '.join(missing)} as well")
    by = COUNTS[0]
    if "by" in given:
        by = given["by"].value
        check_name(by, COUNTS, given["by"].origin, f"{item.name}.by")
    number = {key: _number(of, of.value, finite=True) for key, of in given.items() if key in ("value", "from", "to")}
    count = {key: _integer(of, of.value) for key, of in given.items() if key in ("start", "end")}
    points = []
    if kind.value == "constant":
        points = [(0, number["value"])]
    elif kind.value == "piecewise":
        of = given["points"]
        pairs = of.value if isinstance(of.value, list) else [of.value]
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise wrong(of, f"pairs [{by}, value]", of.value)
        points = [(_integer(of, at), _number(of, value, finite=True)) for at, value in pairs]
    else:
        points = [(count.get("start", 0), number["from"]), (count["end"], number["to"])]
    try:
        return Schedule(kind.value, tuple(points), by)
    except ConfigError as error:
        raise ConfigError(f"{item.origin}: {item.name}: {error}") from error


def _selection(item: Given) -> TokenSelection:
    """The selection of tokens that a mapping describes."""
    remedy = "for example {select: every, n: 4}; leave it out to distill on every token"
    if not isinstance(item.value, dict) or "select" not in item.value:
        raise wrong(item, "a mapping with a `select`", item.value, remedy)
    file = item.origin.rpartition(":")[0]
    given = {
        name: Given(item.section, f"{item.key}.{name}", e.value, f"{file}:{e.line}" if file else item.origin)
        for name, e in ((key.replace("-", "_"), e) for key, e in item.value.items())
    }
    kind = given.pop("select")
    check_name(kind.value, KEYS, kind.origin, f"{item.name}.select")
    for name, of in given.items():
        check_name(name, KEYS[kind.value], of.origin, f"key of {item.name}, which selects {kind.value},")
    numbers: dict[str, Any] = {
        name: _integer(of, of.value) if name == "n" else _number(of, of.value, finite=True)
        for name, of in given.items()
    }
    try:
        return TokenSelection(kind.value, **numbers)
    except ConfigError as error:
        raise ConfigError(f"{item.origin}: {item.name}: {error}") from error


def field_value(item: Given, kind: Any) -> Value | Schedule | TokenSelection | dict[str, list[str]]:
    """The value in its dataclass field's type."""
    value = item.value
    if kind == TokenSelection | None:
        return None if value is None else _selection(item)
    if kind in (str | None, int | None, float | None):
        if value is None:
            return None
        kind = {str | None: str, int | None: int, float | None: float}[kind]
    if kind is bool:
        return _boolean(item, value)
    if kind is int:
        return _integer(item, value)
    if kind is float:
        return _number(item, value, finite=True)
    if kind == list[dict[str, Scalar]]:
        return [_term(item, entry) for entry in (value if isinstance(value, list) else [value])]
    if kind == Number:
        return _schedule(item) if isinstance(value, dict) else _number(item, value, finite=True)
    if kind == list[int]:
        return [_integer(item, entry) for entry in (value if isinstance(value, list) else [value])]
    if kind == dict[str, list[str]]:
        return _settings(item)
    if kind == list[str]:
        return [_text(item, entry) for entry in (value if isinstance(value, list) else [value])]
    return _text(item, value)


def _term(item: Given, entry: object) -> dict[str, Scalar]:
    """One of a list of losses: what reads as a number is one, for only the loss knows what its parameters are."""
    if not isinstance(entry, dict):
        hidden = item.key == "hidden_losses"
        keys = "student_layer: ..., teacher_layer: ..., loss: ..." if hidden else "name: ..., weight: ..., parameters"
        raise wrong(item, f"a list of {{{keys}}}", entry)
    term: dict[str, Scalar] = {}
    for key, value in ((key.replace("-", "_"), one.value) for key, one in entry.items()):
        if isinstance(value, dict | list):
            raise wrong(item, f"a plain value of {brief(key)}", value)
        try:
            term[key] = value if isinstance(value, bool | None) or key == "name" else _number(item, value, finite=True)
        except ConfigError:
            term[key] = value
    return term


def _settings(item: Given) -> dict[str, list[str]]:
    """Of `compare.losses`, what each differs in, as overrides; that their values are right shows when they are used."""
    if not isinstance(item.value, dict):
        raise wrong(item, "a mapping of names to what they differ in, such as {ToDi: {divergence: todi}}", item.value)
    settings: dict[str, list[str]] = {}
    for name, entry in item.value.items():
        if not isinstance(entry.value, dict):
            raise wrong(item, f"{brief(name)} to be a mapping such as {{divergence: todi}}", entry.value)
        settings[name] = []
        for key, one in entry.value.items():
            section, _, rest = key.rpartition(".")
            spelled = Given.spelled(section or "distillation", rest, plain(one), item.origin)
            as_it_is = isinstance(spelled.value, str) and load_yaml(spelled.value, name) == spelled.value
            settings[name].append(f"{spelled.name}={spelled.value if as_it_is else flow(spelled.value)}")
    return settings


class MegatronOptions:
    """Megatron's options by name, dashes and underscores alike."""

    def __init__(self, options: Options) -> None:
        self._options = options
        # Sorted, so that where both spellings exist the dashed one (first in ASCII) is the one kept.
        self._spellings = {dashed(name): name for name in sorted(options, reverse=True)}

    def find(self, key: str, origin: str) -> tuple[str, argparse.Action]:
        """Megatron's spelling and the action."""
        check_name(dashed(key), self._spellings, origin, "Megatron argument")
        spelling = self._spellings[dashed(key)]
        return spelling, self._options[spelling]

    def dest(self, key: str) -> str:
        """Where Megatron's parser puts it, whatever its spelling."""
        return self.find(key, "")[1].dest


def option_value(item: Given, action: argparse.Action) -> Value:
    """The value in the type that the action's command line would give it; text for the action's own types."""
    value, nargs = item.value, action.nargs
    if value is None:
        return None
    if nargs == 0 or action.type is bool:
        return _boolean(item, value)
    if nargs is None or nargs == "?":
        if isinstance(value, list):
            raise wrong(item, "one value", value, "write it as quoted text, as on Megatron's command line")
        return _option_item(item, value, action)
    values = [_option_item(item, entry, action) for entry in (value if isinstance(value, list) else [value])]
    if (nargs == "+" and not values) or (isinstance(nargs, int) and len(values) != nargs):
        raise wrong(item, "at least one value" if nargs == "+" else f"{nargs} values", value)
    return values


def _option_item(item: Given, value: object, action: argparse.Action) -> Scalar:
    result: Scalar
    if isinstance(value, bool | None | dict | list):
        raise wrong(item, "a value", value, "quote it" if isinstance(value, bool) else "")
    if action.type is int:
        result = _integer(item, value)
    elif action.type is float:
        result = _number(item, value, finite=False)
    else:
        result = _text(item, value)
    if action.choices is not None and result not in action.choices:
        names = [str(getattr(choice, "name", choice)) for choice in action.choices]
        check_name(str(result), names, item.origin, f"choice for {item.name}")
    return result
