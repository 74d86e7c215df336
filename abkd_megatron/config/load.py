"""Loading of configurations from YAML and ``section.key=value`` overrides, and conversion to Megatron's command line.

Megatron's arguments keep their names and are checked against the actions of Megatron's parser, which the caller passes.
Importing this module does not import megatron.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from decimal import Decimal
from pathlib import Path
from typing import Any, get_type_hints

from abkd_megatron.config.schema import DEVICES, PLAIN, SECTIONS, TEACHER_KEYS, TOP_KEYS, Config, Scalar, Value
from abkd_megatron.config.teachers import ENTRY_KEYS, SourceTeacher
from abkd_megatron.config.values import Given, MegatronOptions, Options, field_value, option_value, wrong
from abkd_megatron.config.yaml import LineMapping, flow, load_yaml
from abkd_megatron.errors import ConfigError, brief, check_name, shown

# Sections whose keys are dataclass fields.
_FIELDS = ("distillation", "data", "validation", "cache", "generate", "compare")
# Tag of a job's configuration in TensorBoard.
CONFIG_TEXT = "abkd_megatron/config"


def _read_file(path: Path) -> list[Given]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or an invalid path
        raise ConfigError(
            f"{path}: expected a readable YAML file in UTF-8, got: {getattr(error, 'strerror', None) or error}; check "
            "the path or the encoding (a setting is section.key=value, without spaces)"
        ) from error
    top = load_yaml(text, path.name)
    if not isinstance(top, LineMapping):
        got = "an empty file" if top is None else f"a {'list' if isinstance(top, list) else 'single value'}"
        raise ConfigError(
            f"{path}: expected the sections {', '.join(SECTIONS)}, got {got}; write `section:` followed by "
            "indented lines `key: value`"
        )
    given = []
    for section, value in top.items():
        origin = f"{path.name}:{top.lines[section]}"
        check_name(section, SECTIONS, origin, "section")
        if section in TOP_KEYS:
            given.append(Given(section, "", value, origin))
        elif isinstance(value, LineMapping):
            given += [Given.spelled(section, key, of, f"{path.name}:{value.lines[key]}") for key, of in value.items()]
        elif value is not None:
            raise ConfigError(f"{origin}: {section}: expected `key: value` lines, got {shown(value)}")
    return given


def _read_override(text: str) -> Given:
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or (bool(dot and key) == (section in TOP_KEYS)) or not name.isprintable():
        raise ConfigError(
            f"command line: expected section.key=value or device=NAME, got {shown(text)}; for example "
            "megatron.num-layers=4"
        )
    check_name(section, SECTIONS, "command line", "section")
    # A value that starts with * would be an alias, of an anchor that a single value cannot have: a layer pattern.
    read = value if value.startswith("*") and value.isprintable() else load_yaml(value, f"command line: {brief(name)}")
    return Given.spelled(section, key, read, "command line")


def load_config(
    path: Path | None,
    overrides: Sequence[str],
    megatron_options: Options,
    device_defaults: Callable[[str], Mapping[str, Value]] = lambda device: {},
) -> Config:
    """Load a configuration. Later layers override earlier ones: defaults, device defaults, YAML file, overrides.

    Keys that a preset sets and no layer gives have its values.

    Args:
        path: the YAML file, or None.
        overrides: ``section.key=value`` or ``device=NAME``, where the value is YAML. The last one of a key counts.
        megatron_options: the action of each Megatron option, keyed by its name without leading dashes.
        device_defaults: returns the Megatron arguments that a device implies.

    Returns:
        The configuration, with values in the types of their fields or actions. The caller calls `Config.check`.

    Raises:
        ConfigError: a key is unknown or given twice, or a value has the wrong type.
    """
    from_file = _read_file(path) if path is not None else []
    from_command_line = [_read_override(text) for text in overrides]
    config = Config()
    names = [f"{section}.{key}" for section, items in _sections(config).items() for key in items]
    config.origins |= dict.fromkeys((*TOP_KEYS, *names), "default")
    for item in (*from_file, *from_command_line):
        if item.section == "device":
            check_name(item.value, DEVICES, item.origin, "device")
            config.device, config.origins["device"] = item.value, item.origin
    implied = [
        Given.spelled("megatron", key, value, f"device: {config.device}")
        for key, value in device_defaults(config.device).items()
    ]
    options = MegatronOptions(megatron_options)
    for layer in (implied, from_file, from_command_line):
        given = {item.key: item.value for item in layer if item.section == "distillation"}
        # A preset stands for its keys: it replaces those of earlier layers.
        if "preset" in given:
            config.forget_preset()
        # An override of the divergence drops the parameters of the file's divergence.
        kd = config.distillation
        before = kd.divergence or PLAIN.divergence
        if given.get("losses") or ("divergence" in given and (kd.losses or given["divergence"] != before)):
            config.forget_divergence()
        twins: dict[tuple[str, str], Given] = {}
        for item in layer:
            if item.section in _FIELDS or (item.section == "teacher" and item.key in TEACHER_KEYS):
                target, name = getattr(config, item.section), item.key.replace("-", "_")
                types = get_type_hints(type(target))
                check_name(name, types, item.origin, f"key of {item.section}")
                setattr(target, name, field_value(item, types[name]))
                config.origins[item.name] = item.origin
            elif item.section == "teachers":
                config.teachers, config.origins["teachers"] = _teachers(item, options), item.origin
            elif item.section != "device":
                _set_option(config, item, options, twins)
    config.expand_preset()
    return config


def _set_option(config: Config, item: Given, options: MegatronOptions, twins: dict[tuple[str, str], Given]) -> None:
    arguments = config.megatron if item.section == "megatron" else config.teacher.megatron
    _, action = options.find(item.key, item.origin)
    twin = twins.setdefault((item.section, action.dest), item)
    if twin.key != item.key:
        raise ConfigError(
            f"{item.origin}: '{item.key}' and '{twin.key}' ({twin.origin}) are two spellings of one Megatron argument; "
            "remove one"
        )
    # A later layer replaces an argument even with another spelling.
    for key in [key for key in arguments if key != item.key and options.dest(key) == action.dest]:
        del arguments[key], config.origins[f"{item.section}.{key}"]
    arguments[item.key] = option_value(item, action)
    config.origins[item.name] = item.origin


def _teachers(item: Given, options: MegatronOptions) -> list[SourceTeacher]:
    """Convert the list `teachers`."""
    entries = item.value if isinstance(item.value, list) else [item.value] if item.value is not None else []
    found = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, LineMapping):
            raise wrong(item, "a list of {sources: [...], load: ..., Megatron arguments}", entry)
        file = item.origin.rpartition(":")[0]
        values: dict[str, Any] = {}
        megatron: dict[str, Value] = {}
        spelled: dict[str, Given] = {}
        for key, value in entry.items():
            of = Given("teachers", f"{number}.{key}", value, f"{file}:{entry.lines[key]}" if file else item.origin)
            if key == "sources":
                texts = field_value(of, list[str])
                values[key] = tuple(int(text) if text.isdecimal() else text for text in texts)
            elif key in ENTRY_KEYS:
                name = key.replace("-", "_")
                values[name] = field_value(of, get_type_hints(SourceTeacher, localns={"Value": Value})[name])
            else:
                _, action = options.find(key, of.origin)
                twin = spelled.setdefault(action.dest, of)
                if twin is not of:
                    raise ConfigError(f"{of.origin}: {of.name} and {twin.name} are one Megatron argument; remove one")
                megatron[key] = option_value(of, action)
        found.append(SourceTeacher(**values, megatron=megatron))
    return found


def _sections(config: Config) -> dict[str, dict[str, Any]]:
    """Return {section: {key: value}}, without the device."""
    teacher = {key: getattr(config.teacher, key.replace("-", "_")) for key in TEACHER_KEYS} | config.teacher.megatron
    ours = {name: getattr(config, name) for name in _FIELDS}
    ours = {name: {item.name: getattr(values, item.name) for item in fields(values)} for name, values in ours.items()}
    return {"megatron": config.megatron, "teacher": teacher, **ours}


def to_argv(values: Mapping[str, Value], megatron_options: Options) -> list[str]:
    """Convert arguments to a Megatron command line.

    Args:
        values: Megatron arguments, keyed by option name without leading dashes. None, and false for a plain flag, omit
            the argument.
        megatron_options: see `load_config`.

    Returns:
        The words of the command line.

    Raises:
        ConfigError: an argument is unknown, or its action rejects the value.
    """
    options = MegatronOptions(megatron_options)
    argv: list[str] = []
    for key, given in values.items():
        spelling, action = options.find(key, "megatron")
        item = Given("megatron", key, given, "Megatron's command line")
        value = option_value(item, action)
        flag = f"--{spelling}"
        if value is None:
            continue
        if isinstance(action, argparse.BooleanOptionalAction):
            opposite = f"--{spelling.removeprefix('no-')}" if spelling.startswith("no-") else f"--no-{spelling}"
            argv.append(flag if value else opposite)
        elif action.nargs == 0:
            argv += [flag] if value else []
        elif action.type is bool:
            # argparse calls bool() on the text, so only the empty text is false.
            argv.append(f"{flag}={value or ''}")
        elif isinstance(value, list):
            argv += [flag, *(_word(item, entry) for entry in value)]
        else:
            text = str(value)
            argv += [f"{flag}={text}"] if text.startswith("-") or not text else [flag, text]
    return argv


def from_argv(argv: Sequence[str], megatron_options: Options) -> dict[str, Value]:
    """Convert a valid Megatron command line to arguments; the inverse of `to_argv`.

    Args:
        argv: the words. Options unknown to Megatron are skipped with their values.
        megatron_options: see `load_config`.

    Returns:
        The arguments, keyed by their spelling without leading dashes. The last one counts if an argument is repeated.
        Values are text, lists of text, or true for a plain flag; `to_argv` converts them to their types.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for action in {id(action): action for action in megatron_options.values()}.values():
        parser.add_argument(*action.option_strings, dest=action.dest, nargs=action.nargs, action=_Record)
    given: dict[str, tuple[str, Any]] = parser.parse_known_args(argv)[0].__dict__.get(_RECORDED, {})
    return {name: bool(value) if megatron_options[name].type is bool else value for name, value in given.values()}


_RECORDED = "what was given"


class _Record(argparse.Action):
    """Records the last spelling and words of each argument."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        given = namespace.__dict__.setdefault(_RECORDED, {})
        given[self.dest] = (option or "").removeprefix("--"), True if self.nargs == 0 else values


def _word(item: Given, value: Scalar) -> str:
    """Return one of several values as a word. With a leading dash, argparse accepts plain decimals only."""
    if isinstance(value, float) and value < 0:
        return format(Decimal(repr(value)), "f")
    text = str(value)
    if text.startswith("-") and not isinstance(value, int):
        raise wrong(item, "values without a leading dash", text)
    return text


def render(config: Config, shown: Sequence[str] = SECTIONS, origins: bool = True) -> str:
    """Return the configuration as YAML that `load_config` can load again.

    Args:
        config: from `load_config`.
        shown: sections to include.
        origins: whether to add each value's origin as a comment.

    Returns:
        The text, ending in a newline.
    """
    sections = _sections(config)
    sections["compare"]["losses"] = {
        name: {key: load_yaml(value, name) for key, value in (setting.split("=", 1) for setting in settings)}
        for name, settings in config.compare.losses.items()
    }
    for name in config.without_effect():
        if not config.is_given(name):  # a given parameter without effect is kept, so that `check` rejects it
            del sections["distillation"][name]
    rows = [(f"device: {flow(config.device)}", config.origins.get("device", ""))]
    if "teachers" in shown:
        rows.append((f"teachers: {flow(config.teachers)}", config.origins.get("teachers", "")))
    for section, items in ((name, items) for name, items in sections.items() if name in shown):
        rows.append((f"{section}:" if items else f"{section}: {{}}", ""))
        for key, value in items.items():
            origin = config.origins.get(f"{section}.{key}", "")
            nested = isinstance(value, dict) and bool(value)
            rows.append((f"  {key}:" if nested else f"  {key}: {flow(value)}", origin))
            rows += [(f"    {flow(name)}: {flow(one)}", "") for name, one in value.items()] if nested else []
    width = max(len(text) for text, _ in rows if len(text) <= 60)  # long paths do not widen the column
    lines = (f"{text:<{width}}  # {origin}" if origin and origins else text for text, origin in rows)
    return "\n".join(lines) + "\n"
