"""The YAML of configurations: keys once and with their lines, and scalars that stay text.

A plain scalar other than true, false and null stays text until the type of its field or action is known, so ``1e-4`` is
a number where one is expected, and a name such as ``1.10`` keeps its zero. Tags of other types are refused, and so is
what anchors multiply beyond any configuration.
"""

import math
import re
from dataclasses import dataclass
from itertools import chain
from typing import Any

import yaml

from abkd_megatron.errors import ConfigError, brief, shown
from abkd_megatron.losses.schedule import Schedule
from abkd_megatron.losses.selection import TokenSelection

# Of one text: values once aliases are written out, and levels. The largest file here has some hundred values, 4 levels.
_MOST_VALUES, _MOST_LEVELS = 20_000, 32


@dataclass(frozen=True, slots=True)
class Entry:
    """A value of a YAML mapping with the line of its key."""

    value: Any
    line: int


class _Loader(yaml.SafeLoader):
    """YAML with unique keys; only true, false and null are more than text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own attribute)

    def get_single_node(self) -> yaml.Node | None:
        """The document, once it is known that there is nothing in it but what a configuration is made of.

        PyYAML would construct dates, sets and the like, which fail on odd values with errors of their own, and a few
        anchors that name each other can stand for more values than there is memory.
        """
        node = super().get_single_node()
        if node is not None:
            self._measure(node, {})
        return node

    def _measure(self, node: yaml.Node, known: dict[yaml.Node, tuple[int, int] | None]) -> tuple[int, int]:
        """How many values there are within `node` once aliases are written out, and on how many levels."""
        if node in known:
            measured = known[node]
            if measured is None:
                raise yaml.MarkedYAMLError(
                    problem="an anchor stands for a value within itself", problem_mark=node.start_mark
                )
            return measured
        if node.tag not in (
            self.resolve(type(node), node.value, (True, False)),
            yaml.resolver.Resolver.DEFAULT_SCALAR_TAG,
        ):
            raise yaml.MarkedYAMLError(problem=f"the tag {shown(node.tag)}; leave it out", problem_mark=node.start_mark)
        known[node] = None
        within = []
        if not isinstance(node, yaml.ScalarNode):
            children = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
            within = [self._measure(child, known) for child in children]
        values, levels = 1 + sum(count for count, _ in within), 1 + max((level for _, level in within), default=0)
        if values > _MOST_VALUES or levels > _MOST_LEVELS:
            problem = f"more than {_MOST_VALUES} values, or {_MOST_LEVELS} within each other"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        known[node] = values, levels
        return values, levels


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise ConfigError(f"{loader.name}:{line}: expected a name as key, got {shown(plain(key))}; quote it")
        key = dashed(key)
        if key in entries:
            raise ConfigError(
                f"{loader.name}: {shown(key)} is given twice, on lines {entries[key].line} and {line}; remove one"
            )
        entries[key] = Entry(loader.construct_object(value_node, deep=True), line)
    return entries


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def load_yaml(text: str, name: str) -> Any:
    """The value that a text describes; mappings are of `Entry`.

    Raises:
        ConfigError: naming `name`, for what is no YAML and for a key given twice.
    """
    try:
        loader = _Loader(text)  # refuses control characters
        loader.name = name
        return loader.get_single_data()
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        first, *rest = [brief(line) for line in str(error).split("\n")]
        remedy = "; indent with spaces" if r"'\t'" in str(error) else ""
        raise ConfigError("\n".join([f"{name}: expected readable YAML, got: {first}", *rest]) + remedy) from error


def plain(value: Any) -> Any:
    """A value of YAML without the lines of its keys."""
    if isinstance(value, Entry):
        return plain(value.value)
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list) else value


def flow(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, Schedule | TokenSelection):
        return "{" + ", ".join(f"{key}: {flow(item)}" for key, item in value.described().items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(flow(entry) for entry in value)}]"
    style = '"' if isinstance(value, str) and not value.isprintable() else None  # on one line
    options: dict[str, Any] = {"width": math.inf, "allow_unicode": True, "sort_keys": False}
    text = yaml.safe_dump([value], default_flow_style=True, default_style=style, **options)
    return text.strip()[1:-1]


def dashed(name: str) -> str:
    """A name as Megatron's options are spelled."""
    return name.replace("_", "-")
