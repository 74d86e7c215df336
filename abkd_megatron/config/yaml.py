"""YAML of configurations: unique keys with line numbers, and scalars as text.

A plain scalar other than true, false and null stays text until the type of its field or action is known. So ``1e-4`` is
read as a number where one is expected, and a name such as ``1.10`` keeps its zero. Tags of other types are rejected,
and so are anchors that expand to too many values.
"""

import math
import re
from itertools import chain
from typing import Any

import yaml

from abkd_megatron.config.rollouts import OnPolicy
from abkd_megatron.config.teachers import SourceTeacher
from abkd_megatron.errors import ConfigError, brief, shown
from abkd_megatron.losses.chunks import ChunkLikelihood
from abkd_megatron.losses.hidden import HiddenLoss
from abkd_megatron.losses.mixed_sequences import SequenceMix
from abkd_megatron.losses.schedule import Schedule
from abkd_megatron.losses.selection import TokenSelection
from abkd_megatron.losses.sources import SourceWeights

# Limits per text: values after expansion of aliases, and nesting. Real files have some hundred values and 4 levels.
_MOST_VALUES, _MOST_LEVELS = 20_000, 32
_CONSTANTS = {"true": True, "false": False, "null": None, "~": None, "": None}
_TAG = "tag:yaml.org,2002:"


class LineMapping(dict[str, Any]):
    """Mapping with the line of each key."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}


class _Loader(yaml.SafeLoader):
    """Loader for unique keys. Scalars other than true, false and null are text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own attribute)
    yaml_constructors = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (None, f"{_TAG}str", f"{_TAG}seq")}  # noqa: RUF012

    def constant(self, node: yaml.Node) -> bool | None:
        text = str(node.value).lower()
        return _CONSTANTS[text] if text in _CONSTANTS else self.construct_undefined(node)

    def mapping(self, node: yaml.Node) -> LineMapping:
        found = LineMapping()
        for key_node, value_node in (
            node.value if isinstance(node, yaml.MappingNode) else self.construct_undefined(node)
        ):
            line, key = key_node.start_mark.line + 1, self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConfigError(f"{self.name}:{line}: expected a name as key, got {shown(key)}; quote it")
            if (key := dashed(key)) in found:
                lines = f"{found.lines[key]} and {line}"
                raise ConfigError(f"{self.name}: {shown(key)} is given twice, on lines {lines}; remove one")
            found[key], found.lines[key] = self.construct_object(value_node, deep=True), line
        return found


_Loader.add_implicit_resolver(f"{_TAG}bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(f"{_TAG}null", re.compile("^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_constructor(f"{_TAG}bool", _Loader.constant)
_Loader.add_constructor(f"{_TAG}null", _Loader.constant)
_Loader.add_constructor(f"{_TAG}map", _Loader.mapping)


def load_yaml(text: str, name: str) -> Any:
    """Parse YAML; mappings become `LineMapping`.

    Raises:
        ConfigError: the text is not valid YAML, or a key is given twice. The message starts with `name`.
    """
    try:
        loader = _Loader(text)  # rejects control characters
        loader.name = name
        if (node := loader.get_single_node()) is None:
            return None
        values, levels = _extent(node, {})
        if values > _MOST_VALUES or levels > _MOST_LEVELS:
            raise ValueError(f"more than {_MOST_VALUES} values or {_MOST_LEVELS} levels")
        return loader.construct_document(node)
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        first, *rest = [brief(line) for line in str(error).split("\n")]
        remedy = "; indent with spaces" if r"'\t'" in str(error) else ""
        if "alias" in str(error):
            remedy = """; put a value that starts with * in quotes, such as "*-*-\""""
        raise ConfigError("\n".join([f"{name}: expected readable YAML, got: {first}", *rest]) + remedy) from error


def _extent(node: yaml.Node, known: dict[yaml.Node, tuple[float, float]]) -> tuple[float, float]:
    """Return the number of values and levels of a node after expansion of its aliases."""
    if node not in known:
        known[node] = math.inf, math.inf  # for a node that contains itself
        children = () if isinstance(node, yaml.ScalarNode) else node.value
        children = chain.from_iterable(children) if isinstance(node, yaml.MappingNode) else children
        within = [_extent(child, known) for child in children]
        known[node] = 1 + sum(values for values, _ in within), 1 + max((levels for _, levels in within), default=0)
    return known[node]


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, _: object) -> bool:
        return True


_Dumper.add_representer(LineMapping, yaml.SafeDumper.represent_dict)
_Dumper.add_representer(Schedule, lambda dumper, it: dumper.represent_dict(it.described()))
_Dumper.add_representer(HiddenLoss, lambda dumper, it: dumper.represent_dict(vars(it)))
_Dumper.add_representer(SourceWeights, lambda dumper, it: dumper.represent_dict(it.described()))
_Dumper.add_representer(SourceTeacher, lambda dumper, it: dumper.represent_dict(it.described()))
_Dumper.add_representer(SequenceMix, lambda dumper, it: dumper.represent_dict(vars(it)))
_Dumper.add_representer(ChunkLikelihood, lambda dumper, it: dumper.represent_dict(vars(it)))
_Dumper.add_representer(OnPolicy, lambda dumper, it: dumper.represent_dict(it.described()))
_Dumper.add_representer(TokenSelection, lambda dumper, it: dumper.represent_dict(it.described()))
_Dumper.add_representer(  # on one line
    str, lambda dumper, text: dumper.represent_scalar(f"{_TAG}str", text, style=None if text.isprintable() else '"')
)


def flow(value: Any) -> str:
    """Format a value as YAML on one line."""
    options: dict[str, Any] = {"width": math.inf, "allow_unicode": True, "sort_keys": False}
    return str(yaml.dump([value], Dumper=_Dumper, default_flow_style=True, **options)).strip()[1:-1]


def dashed(name: str) -> str:
    """Replace underscores by dashes, as in Megatron's options."""
    return name.replace("_", "-")
