"""Whatever a file or a command line says: a configuration or a short message, and no code of the file's is run.

What `show-config` prints of a configuration reads back as the same one.
"""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config import OPTIONS

from abkd_megatron.config.cache import CacheConfig
from abkd_megatron.config.load import load_config, render
from abkd_megatron.config.rollouts import GenerateConfig
from abkd_megatron.config.schema import CompareConfig, Config, DataConfig, DistillationConfig
from abkd_megatron.config.validation import ValidationConfig
from abkd_megatron.errors import AbkdError, ConfigError

EXAMPLE = (Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml").read_text()
JOBS = ("prepare", "pretrain", "cache", "distill", "generate", "compare")
few = settings(max_examples=60, deadline=None, derandomize=True)


def is_readable(message: str) -> bool:
    """A few lines of a few thousand characters at most, on any terminal."""
    lines = message.split("\n")
    return len(lines) <= 12 and len(message) <= 3000 and all(line.isprintable() for line in lines)


def load(file: Path, content: bytes | str | None, *overrides: str) -> Config | None:
    """What becomes of it; None for a refusal, which is looked at."""
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        config = load_config(file if content is not None else None, overrides, OPTIONS)
    except AbkdError as error:
        assert is_readable(str(error)), str(error)
        return None
    names = [config.distillation.divergence, *(str(term.get("name")) for term in config.distillation.losses)]
    for job in JOBS:
        if job == "distill" and any("." in name for name in names):
            continue  # someone's own, which is imported
        for problem in config.problems(job):
            assert isinstance(problem, ConfigError) and is_readable(str(problem)), str(problem)
    return config


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "run.yaml"


def comes_back(file: Path, config: Config) -> None:
    file.write_text(render(config), encoding="utf-8")
    again = load_config(file, [], OPTIONS)
    # As text, in which a NaN equals itself.
    assert render(again, origins=False) == render(config, origins=False)
    assert "nan" in str(config) or replace(again, origins={}) == replace(config, origins={})


YAMLS = [
    "",
    " ",
    "null",
    "~",
    "true",
    "yes",
    "1e-4",
    "1_000",
    "0x10",
    "1.10",
    "=",
    "<<",
    "- a",
    "a: b",
    "#",
    "2020-01-01",
]
SIGNS = ["\x00", "\ud800", "\u2028", "\x85", "\ufeff", "'", '"', "9" * 5000, "[" * 500, "!!python/name:os.system", "*a"]
odd_text = st.text() | st.sampled_from([*YAMLS, *SIGNS])
numbers = st.integers() | st.floats() | st.sampled_from([10**400, -1, 0, 1, 2, 0.5, 1e308, -0.0, 5e-324])
scalars = st.none() | st.booleans() | numbers | odd_text
schedules = st.fixed_dictionaries(
    {"schedule": st.sampled_from(["constant", "linear", "cosine", "piecewise", "odd"])},
    optional={
        **dict.fromkeys(("value", "from", "to"), numbers | scalars),
        **{key: st.integers(-2, 10**12) | scalars for key in ("start", "end")},
        "points": st.lists(st.lists(st.integers(0, 9) | numbers, min_size=2, max_size=2), max_size=4) | scalars,
        "by": st.sampled_from(["iteration", "samples", "tokens", "odd"]) | scalars,
    },
)
terms = st.dictionaries(
    st.sampled_from(["name", "weight", "alpha", "student_layer", "teacher_layer", "loss", "projector", "select", "n"]),
    st.sampled_from(["alpha_beta", "todi", "akl", "cosine", "every"]) | st.integers(1, 9) | scalars,
)
values = st.one_of(
    scalars,
    schedules,
    terms,
    st.lists(terms, max_size=3),
    st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(odd_text, inner, max_size=3)),
)
fields_of = {
    "distillation": DistillationConfig,
    "data": DataConfig,
    "validation": ValidationConfig,
    "cache": CacheConfig,
    "generate": GenerateConfig,
    "compare": CompareConfig,
}
shares = st.floats(0.01, 0.99) | st.floats(0.01, 0.99).map(lambda share: {"schedule": "constant", "value": share})
ramps = st.builds(
    lambda first, last, start, more, by: {
        "schedule": "cosine",
        "from": first,
        "to": last,
        "start": start,
        "end": start + more,
        "by": by,
    },
    *[st.floats(0.01, 0.99), st.floats(0.01, 0.99), st.integers(0, 99), st.integers(1, 10**12)],
    st.sampled_from(["iteration", "samples", "tokens"]),
)
losses = st.lists(
    st.builds(lambda weight: {"name": "todi", "weight": weight}, st.floats(0.1, 9)), min_size=1, max_size=2
)
differences = st.dictionaries(odd_text, st.dictionaries(odd_text, values, max_size=2), min_size=1, max_size=2)


def fitting(section: str, key: str) -> st.SearchStrategy:
    """Values that this key may have, or nearly."""
    if section in fields_of:
        kind = str(get_type_hints(fields_of[section])[key])
        if "Schedule" in kind:
            return shares | ramps
        known = {"bool": st.booleans(), "list[dict": losses, "dict[str, list": differences, "list[int": st.lists(seeds)}
        known |= {"list[str": st.lists(odd_text, min_size=1), "int": seeds, "float": st.floats(0.01, 0.4)}
        return next((one for name, one in known.items() if name in kind), odd_text)
    action = OPTIONS.get(key)
    if action is None or action.type not in (int, float, bool, None):
        return odd_text | seeds
    one = {int: seeds, float: numbers, bool: st.booleans()}.get(action.type, odd_text)
    one = st.booleans() if action.nargs == 0 else st.sampled_from(action.choices) if action.choices else one
    return st.lists(one, min_size=3, max_size=3) if action.nargs not in (None, 0, "?") else one


seeds = st.integers(300, 10**9)
known = {
    **{"megatron": sorted(OPTIONS), "teacher": ["load", "ckpt-step", *sorted(OPTIONS)]},
    **{name: [field.name for field in fields(kind)] for name, kind in fields_of.items()},
}


@st.composite
def sections(draw, section: str) -> dict:
    """A few keys, most of them real, and values, most of them fitting."""
    content = {}
    for key in draw(st.lists(st.sampled_from(known[section]), max_size=4, unique=True)):
        content[key] = draw(st.one_of(*[fitting(section, key)] * 5, values))
    return content if draw(st.integers(0, 9)) else draw(st.dictionaries(odd_text, values, max_size=2) | scalars)


documents = st.fixed_dictionaries(
    {}, optional={"device": st.sampled_from(["cpu", "cuda"] * 4) | values, **{name: sections(name) for name in known}}
)


@st.composite
def settings_of(draw) -> str:
    section = draw(st.sampled_from(sorted(known)))
    key = draw(st.sampled_from(known[section]))
    value = draw(st.one_of(*[fitting(section, key)] * 3, values))
    if not draw(st.integers(0, 9)):
        section, key = draw(odd_text), draw(odd_text)
    return f"{section}.{key}={value if isinstance(value, str) else json.dumps(value)}"


@few
@given(st.text() | st.binary(), st.lists(st.text(), max_size=2))
def test_any_text(file, content, overrides):
    load(file, content, *overrides)


@few
@given(st.data())
def test_a_file_with_changes(file, data):
    text = EXAMPLE
    for _ in range(data.draw(st.integers(1, 2))):
        first = data.draw(st.integers(0, len(text)))
        last = data.draw(st.integers(first, min(first + 6, len(text))))
        text = text[:first] + data.draw(st.sampled_from(["", "1", "0", "  "]) | odd_text) + text[last:]
    if (config := load(file, text)) is not None:
        comes_back(file, config)


@settings(few, max_examples=120)
@given(documents, st.lists(settings_of() | odd_text, max_size=2))
def test_any_values_of_the_real_keys(file, document, overrides):
    # JSON is YAML, but for its NaN and Infinity: names here.
    if (config := load(file, json.dumps(document), *overrides)) is not None:
        comes_back(file, config)


@settings(few, max_examples=120)
@given(settings_of())
def test_one_setting(file, setting):
    if (config := load(file, None, setting)) is not None:
        comes_back(file, config)


LAUGHS = "\n".join(["a0: &a0 [lol]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30))])
REFUSED = {
    "aliases that multiply": (f"compare:\n  losses: {{{LAUGHS.replace(chr(10), ', ')}}}\n", "more than 20000 values"),
    "a list within itself": ("data:\n  source: &a [*a]\n", "more than 20000 values"),
    "a mapping within itself": ("compare:\n  losses: &a {x: *a}\n", "more than 20000 values"),
    "lists within lists": (f"data:\n  source: {'[' * 60}{']' * 60}\n", "or 32 levels"),
    "very many lists within lists": (
        f"data:\n  source: {'[' * 10_000}",
        "expected readable YAML, got: maximum recurs",
    ),
    "a tag of Python's": ("device: !!python/object/apply:os.mkdir [{trap}]\n", "the tag 'tag:yaml.org,2002:python/obj"),
    "a name of Python's": ("device: !!python/name:os.system\n", "the tag 'tag:yaml.org,2002:python/name:os.system'"),
    "a tag of no one's": ("device: !mine cpu\n", "the tag '!mine'"),
    "a date that is none": ("data: {dir: !!timestamp soon}\n", "the tag 'tag:yaml.org,2002:timestamp'"),
    "a number that is none": ("data: {dir: !!int ''}\n", "the tag 'tag:yaml.org,2002:int'"),
    "a truth that is none": ("data: {dir: !!bool maybe}\n", "the tag 'tag:yaml.org,2002:bool'"),
    "a set": ("data: {source: !!set {a, b}}\n", "the tag 'tag:yaml.org,2002:set'"),
    "a mapping that is none": ("data: !!map [[a, b]]\n", "the tag 'tag:yaml.org,2002:map'"),
    "a key twice": (
        "data: {dir: a, vocab_size: 400, vocab-size: 500}\n",
        "'vocab-size' is given twice, on lines 1 and",
    ),
    "a long key twice": (f"data: {{{'k' * 900}: a, {'k' * 900}: b}}\n", "kkk ... kkk"),
    "no character": ("device: \x00\n", "special characters are not allowed"),
    "half a character": ("device: \ud800\n", "expected a readable YAML file in UTF-8, got: 'utf-8' codec"),
    "half a character, escaped": ('device: "\\ud800"\n', r"unknown device '\ud800'"),
    "a number of too many digits": (f"data: {{vocab_size: {'9' * 5000}}}\n", "expected a whole number, got '999"),
    "a very long value": (f"data: {{vocab_size: {'x' * 100_000}}}\n", "expected a whole number, got 'xxx"),
    "two documents": ("device: cpu\n---\ndevice: cuda\n", "expected a single document"),
    "an infinite number": ("distillation: {alpha: 1e999}\n", "expected a finite number, got '1e999'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_few_words(tmp_path, name):
    text, message = REFUSED[name]
    file, trap = tmp_path / "run.yaml", tmp_path / "trap"
    file.write_bytes(text.replace("{trap}", str(trap)).encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError) as caught:
        load_config(file, [], OPTIONS)
    assert message in str(caught.value) and is_readable(str(caught.value)), str(caught.value)
    assert not trap.exists()


def test_anchors_and_plain_tags_are_fine(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("megatron: {lr: &lr 0.1, min-lr: *lr, exp-name: !!str 12, swiglu: !!bool true}\n")
    assert load_config(file, [], OPTIONS).megatron == {"lr": 0.1, "min-lr": 0.1, "exp-name": "12", "swiglu": True}


@pytest.mark.parametrize(
    "name", [".a.b", "a..b", "a.", ".", "..", "a\0.b", "no such.module", "builtins.dict", "math.pi"]
)
def test_paths_that_are_none(file, name):
    config = Config(distillation=DistillationConfig(divergence=name))
    (problem,) = (problem for problem in config.problems("distill") if "distillation.divergence" in str(problem))
    assert is_readable(str(problem))
