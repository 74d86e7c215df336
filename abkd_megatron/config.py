"""The configuration: YAML and ``section.key=value`` overrides, and the way on to Megatron's command line.

Megatron's arguments keep Megatron's names and are checked against the actions of Megatron's own parser, which
the caller hands in: importing this module does not import megatron. A plain YAML scalar other than true,
false and null stays text until the type of its field or action is known, so ``1e-4`` is a number where one is
expected, and a name such as ``1.10`` keeps its zero.
"""

import argparse
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from decimal import Decimal
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from abkd_megatron.divergences import Divergence, Sum, registry
from abkd_megatron.divergences.base import finite_number
from abkd_megatron.errors import ConfigError
from abkd_megatron.hidden_loss import HiddenLoss, refuse_twins
from abkd_megatron.logit_losses import LogitLoss
from abkd_megatron.logit_losses.registry import build
from abkd_megatron.schedule import COUNTS, KINDS, Progress, Schedule, both_zero
from abkd_megatron.selection import KEYS, TokenSelection

type Scalar = str | int | float | bool | None
type Value = Scalar | list[Any]
type Options = Mapping[str, argparse.Action]
Number = float | Schedule

DEVICES = ("cuda", "cpu")
HEADS = ("auto", "fused", "materialised")
KERNELS = ("auto", "eager", "compiled", "cpp", "triton")
SECTIONS = ("device", "megatron", "teacher", "distillation", "data", "compare")

# The keys of `distillation` that say which divergence and not how it is used.
_OF_DIVERGENCE = ("divergence", "alpha", "beta", "scale", "detach", "skew", "mixture", "losses")

# What of `distillation` may be a schedule, and what a kernel has compiled in.
SCHEDULED = ("alpha", "beta", "scale", "skew", "mixture", "temperature", "kd_weight", "lm_weight")
_COMPILED_IN = {"triton": ("alpha", "beta", "scale"), "compiled": SCHEDULED[:6]}

# The keys of each kind of schedule, and those that may be left out.
_RAMP = ("from", "to", "start", "end", "by")
_SCHEDULE_KEYS = {"constant": ("value",), "linear": _RAMP, "cosine": _RAMP, "piecewise": ("points", "by")}
_OPTIONAL = ("start", "by")

# What `data.dir` supplies; beside it each of these would be a second answer to the same question.
_DATA_ARGUMENTS = (
    *("data-path", "train-data-path", "valid-data-path", "test-data-path", "split", "mock-data"),
    *("data-args-path", "per-split-data-args-path"),
    *("tokenizer-type", "tokenizer-model", "vocab-file", "merge-file"),
)


@dataclass(kw_only=True, slots=True)
class DistillationConfig:
    """The loss: ``kd_weight * divergence(teacher, student) + lm_weight * cross-entropy``.

    Each of `SCHEDULED` is a number or a schedule of one.
    """

    divergence: str = "alpha_beta"
    """A name of ``abkd_megatron.divergences.registry``, or of ``abkd_megatron.logit_losses.registry`` (with its
    defaults), or the dotted path of a subclass of Divergence or LogitLoss."""
    alpha: Number = 0.2
    """Alpha of the alpha-beta divergence."""
    beta: Number = 0.7
    """Beta of the alpha-beta divergence."""
    scale: Number = 1.0
    """Steepness of ToDi's weight between forward and reverse KL."""
    detach: bool = True
    """Take ToDi's weight as a constant in the gradient."""
    skew: Number = 0.1
    """Share of the other model in the mixture that skew forward and reverse KL compare with."""
    mixture: Number = 0.5
    """Share of the teacher in Jensen-Shannon's mixture."""
    losses: list[dict[str, Scalar]] = field(default_factory=list)
    """In place of `divergence`, terms to add up: each a `name`, a `weight` (1 if left out) and its parameters."""
    temperature: Number = 1.0
    """Divides both models' logits in the divergence; the cross-entropy stays at 1."""
    kd_weight: Number = 1.0
    """Weight of the divergence."""
    lm_weight: Number = 1.0
    """Weight of the cross-entropy with the data."""
    kernel: str = "auto"
    """How the loss is computed: ``auto`` (by device), ``eager``, ``compiled`` (torch.compile), ``cpp``, ``triton``."""
    head: str = "auto"
    """How logits are made: ``materialised``, ``fused`` with the loss a chunk of tokens at a time, or ``auto``."""
    chunk_tokens: int | None = None
    """Tokens of a chunk of the fused head; None sizes it to the device."""
    gradient_in_place: bool = False
    """Whether backward overwrites the student's logits with their gradient."""
    shared_vocab: int | None = None
    """Number of first token ids that mean the same to both models, whose vocabularies differ; None: they are one."""
    tokens: TokenSelection | None = None
    """The tokens whose divergence is trained; None: all of them."""
    diagnostics: bool = False
    """Whether validation also reports reverse KL, calibration, ToDi's weight and where the loss pushes."""
    hidden_losses: list[dict[str, Scalar]] = field(default_factory=list)
    """Losses between layers: each a `student_layer`, a `teacher_layer`, a `loss` (``cosine`` or ``mse``), a `weight` (1
    if left out) and `projector` (true if left out)."""

    def make_divergence(self) -> Divergence | None:
        """The divergence that these settings describe, of several terms their sum; with schedules, at their beginning.

        None if there are logit losses alone.

        Raises:
            ConfigError: as `build` and `Sum`.
        """
        terms = [(weight, term) for weight, term in self._terms() if isinstance(term, Divergence)]
        if not self.losses and terms:
            return terms[0][1]
        return Sum(terms) if terms else None

    def make_logit_losses(self) -> tuple[tuple[float, LogitLoss], ...]:
        """The logit losses that these settings describe, and their weights.

        Raises:
            ConfigError: as `build`, and for a weight that is not a finite number above 0.
        """
        found = []
        for given, term in self._terms():
            if isinstance(term, LogitLoss):
                weight = finite_number(term.name, "weight", given)
                if weight <= 0.0:
                    raise ConfigError(f"{term.name}: expected a weight above 0, got {weight}: leave a term of 0 out")
                found.append((weight, term))
        return tuple(found)

    def _terms(self) -> list[tuple[Any, Divergence | LogitLoss]]:
        if not self.losses:
            given = {name: getattr(self, name) for name in registry.parameters(self.divergence)}
            first = {name: it(Progress()) if isinstance(it, Schedule) else it for name, it in given.items()}
            return [(1.0, build(self.divergence, first))]
        terms: list[tuple[Any, Divergence | LogitLoss]] = []
        for term in self.losses:
            settings = {"weight": 1.0, **term}
            name, weight = settings.pop("name", ""), settings.pop("weight")
            terms.append((weight, build(str(name), settings)))
        return terms

    def make_hidden_losses(self) -> tuple[HiddenLoss, ...]:
        """The losses between layers.

        Raises:
            ConfigError: for an unknown or missing key, a value that `HiddenLoss` refuses, or a pair given twice.
        """
        known = {item.name: item.default is MISSING for item in fields(HiddenLoss)}
        losses = []
        for number, term in enumerate(self.hidden_losses, 1):
            for key in term:
                _check_name(key, known, f"entry {number}", "key")
            if missing := [key for key, needed in known.items() if needed and key not in term]:
                raise ConfigError(f"entry {number}: expected {', '.join(missing)} as well")
            # A whole number reads as a float here, where nothing says what it is for.
            whole = {key: int(of) for key, of in term.items() if isinstance(of, float) and of.is_integer()}
            given: dict[str, Any] = {**term, **{key: of for key, of in whole.items() if key.endswith("layer")}}
            try:
                losses.append(HiddenLoss(**given))
            except ConfigError as error:
                raise ConfigError(f"entry {number}: {error}") from error
        refuse_twins(losses)
        return tuple(losses)

    def gliding(self, kernel: str) -> list[str]:
        """What `kernel` would have to be compiled anew for at every step."""
        names = _COMPILED_IN.get(kernel, ())
        return [name for name in names if Schedule.of(getattr(self, name)).glides]


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Text, and where it stands once prepared."""

    source: list[str] = field(default_factory=lambda: ["python"])
    """``python`` (the text that ships with Python), files, directories and globs."""
    dir: str | None = None
    """The prepared data set: ``prepare`` writes it, training reads it."""
    vocab_size: int = 2048
    """Pieces of the SentencePiece model."""
    held_out: float = 0.05
    """Share of the documents kept from training, half for validation and half for test."""


@dataclass(kw_only=True, slots=True)
class TeacherConfig:
    """The frozen teacher."""

    load: str | None = None
    """Its Megatron checkpoint."""
    ckpt_step: int | None = None
    """The iteration to load; None takes the checkpoint's latest."""
    megatron: dict[str, Value] = field(default_factory=dict)
    """Megatron arguments in which the teacher differs from the student."""


# The comparison that is made if none is described: settings in which a run differs, as on the command line.
_COMPARED = {
    "CE only": ["distillation.kd_weight=0", "distillation.lm_weight=1"],
    "forward KL": ["distillation.divergence=forward_kl"],
    "reverse KL": ["distillation.divergence=reverse_kl"],
    "Jensen-Shannon": ["distillation.divergence=jensen_shannon"],
    "skew reverse KL": ["distillation.divergence=skew_reverse_kl"],
    "alpha-beta 0.2, 0.7": ["distillation.divergence=alpha_beta", "distillation.alpha=0.2", "distillation.beta=0.7"],
    "alpha-beta 0.5, 0.5": ["distillation.divergence=alpha_beta", "distillation.alpha=0.5", "distillation.beta=0.5"],
    "alpha-beta 0.8, 0.3": ["distillation.divergence=alpha_beta", "distillation.alpha=0.8", "distillation.beta=0.3"],
    "ToDi": ["distillation.divergence=todi"],
}


@dataclass(kw_only=True, slots=True)
class CompareConfig:
    """Which students `compare` trains, and where."""

    out: str = "runs/compare"
    """The directory of all runs and of the results."""
    losses: dict[str, list[str]] = field(default_factory=lambda: dict(_COMPARED))
    """By name, in what a run differs: keys of `distillation`, or `section.key`."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    """`megatron.seed` of each run of a loss: initial weights and the order of batches."""
    at_once: int = 1
    """How many runs at a time."""
    launch: str | None = None
    """What starts a run's processes, such as `torchrun --standalone --nproc-per-node 8`; None: one process."""


@dataclass(kw_only=True, slots=True)
class Config:
    """One whole configuration."""

    device: str = "cuda"
    """``cuda``, or ``cpu`` for the stand-in."""
    megatron: dict[str, Value] = field(default_factory=dict)
    """Megatron arguments, keyed by option name without the leading dashes."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The ``teacher`` section."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """The ``distillation`` section."""
    data: DataConfig = field(default_factory=DataConfig)
    """The ``data`` section."""
    compare: CompareConfig = field(default_factory=CompareConfig)
    """The ``compare`` section."""
    origins: dict[str, str] = field(default_factory=dict)
    """Where each ``section.key`` came from: default, device: NAME, FILE:LINE or command line."""

    def check(self, job: str) -> None:
        """Check what no single value shows.

        Args:
            job: what the configuration is for: prepare, pretrain, distill or compare.

        Raises:
            ConfigError: a value out of range, a missing one, or two that exclude each other.
        """
        kd, data = self.distillation, self.data

        def require(holds: bool, key: str, expected: str, got: object) -> None:
            if not holds:
                origin = self.origins.get(key, "default")
                raise ConfigError(f"{origin}: {key}: expected {expected}, got {got}")

        _check_name(self.device, DEVICES, self.origins.get("device", "default"), "device")
        for section, values in (("distillation", kd), ("data", data)):
            for item in fields(values):
                value = getattr(values, item.name)
                finite = not isinstance(value, float) or math.isfinite(value)
                require(finite, f"{section}.{item.name}", "a finite number", value)
        origin = self.origins.get("distillation.kernel", "default")
        _check_name(kd.kernel, KERNELS, origin, "distillation.kernel")
        _check_name(kd.head, HEADS, self.origins.get("distillation.head", "default"), "distillation.head")
        require(
            kd.chunk_tokens is None or kd.chunk_tokens >= 1, "distillation.chunk_tokens", "1 or more", kd.chunk_tokens
        )
        require(
            kd.shared_vocab is None or kd.shared_vocab >= 1, "distillation.shared_vocab", "1 or more", kd.shared_vocab
        )
        number = {name: Schedule.of(getattr(kd, name)) for name in SCHEDULED}
        require(
            kd.head != "fused" or number["kd_weight"].lowest != 0,
            "distillation.head",
            "auto or materialised with kd_weight 0, which trains on Megatron's own cross entropy",
            kd.head,
        )
        require(
            self.device != "cpu" or kd.kernel in ("auto", "eager", "cpp"),
            "distillation.kernel",
            "auto, eager or cpp on device: cpu (compilers of Python cannot look through the stand-in)",
            kd.kernel,
        )
        gliding = ", ".join(kd.gliding(kd.kernel))
        require(
            not gliding,
            "distillation.kernel",
            f"auto, eager or cpp while {gliding} glides: it would be compiled at every step (a piecewise one may jump)",
            kd.kernel,
        )
        require(number["temperature"].lowest > 0, "distillation.temperature", "a number above 0", kd.temperature)
        for name in ("scale", "kd_weight", "lm_weight"):
            require(number[name].lowest >= 0, f"distillation.{name}", "a number not below 0", getattr(kd, name))
        for name in ("skew", "mixture"):
            within = all(0 < value < 1 for _, value in number[name].points)
            require(within, f"distillation.{name}", "a share between 0 and 1, both excluded", getattr(kd, name))
        chosen = "losses" if kd.losses else "divergence"
        names = [term.get("name") for term in kd.losses] or [kd.divergence]
        if job == "distill" or not any("." in str(name) for name in names):  # no other job imports someone's own
            try:
                kd.make_divergence()
                logit_losses = kd.make_logit_losses()
            except ConfigError as error:
                origin = self.origins.get(f"distillation.{chosen}", "default")
                raise ConfigError(f"{origin}: distillation.{chosen}: {error}") from error
            require(
                kd.head != "fused" or not logit_losses,
                "distillation.head",
                f"auto or materialised with {', '.join(loss.name for _, loss in logit_losses)}, a loss of logits that "
                "exist",
                kd.head,
            )
        try:
            kd.make_hidden_losses()
        except ConfigError as error:
            origin = self.origins.get("distillation.hidden_losses", "default")
            raise ConfigError(f"{origin}: distillation.hidden_losses: {error}") from error
        for name in self._without_effect():
            taken = ", ".join(registry.parameters(kd.divergence)) or "no parameters"
            beside = "distillation.losses" if kd.losses else f"divergence: {kd.divergence}, which takes {taken} here"
            require(not self._given(name), f"distillation.{name}", f"no value beside {beside}", getattr(kd, name))
        nothing = both_zero(number["kd_weight"], number["lm_weight"])
        require(nothing is None, "distillation.kd_weight", "kd_weight or lm_weight above 0", f"0 for both {nothing}")
        require(data.vocab_size >= 300, "data.vocab_size", "300 or more (256 of them bytes)", data.vocab_size)
        require(0 < data.held_out < 0.5, "data.held_out", "a share between 0 and 0.5", data.held_out)
        require(bool(data.source), "data.source", "at least one source", data.source)

        for name in ("seeds", "losses"):
            require(bool(getattr(self.compare, name)), f"compare.{name}", "at least one", "none")
        once = len(set(self.compare.seeds)) == len(self.compare.seeds)
        require(once, "compare.seeds", "each seed once", self.compare.seeds)
        require(self.compare.at_once >= 1, "compare.at_once", "1 or more", self.compare.at_once)

        if job == "prepare" and not data.dir:
            raise ConfigError("data.dir: expected the directory to write, got nothing; set data.dir")
        if job == "distill" and not self.teacher.load:
            raise ConfigError(
                "teacher.load: expected the path of the teacher's Megatron checkpoint, got nothing; "
                "set teacher.load, or use `pretrain` to train without a teacher"
            )
        if data.dir:
            twice = [name for name in _DATA_ARGUMENTS if self.megatron.get(name) not in (None, False)]
            if twice:
                named = ", ".join(f"megatron.{n} ({self.origins.get(f'megatron.{n}', '?')})" for n in twice)
                raise ConfigError(
                    f"data.dir ({self.origins.get('data.dir', '?')}) supplies the data and the tokenizer, "
                    f"and so does {named}; remove data.dir or remove {', '.join(twice)}"
                )

    def _without_effect(self) -> list[str]:
        """The keys of `distillation` that the chosen divergence does not take."""
        kd = self.distillation
        taken = {"losses"} if kd.losses else {"divergence", "losses", *registry.parameters(kd.divergence)}
        return [name for name in _OF_DIVERGENCE if name not in taken]

    def _given(self, name: str) -> bool:
        value, default = getattr(self.distillation, name), getattr(DistillationConfig(), name)
        return value != default or self.origins.get(f"distillation.{name}", "default") != "default"

    def _forget_divergence(self) -> None:
        for name in _OF_DIVERGENCE:
            setattr(self.distillation, name, getattr(DistillationConfig(), name))
            self.origins[f"distillation.{name}"] = "default"


# Reading ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Given:
    """One setting as it was written."""

    section: str
    key: str
    value: Any
    origin: str

    @property
    def name(self) -> str:
        return f"{self.section}.{self.key}" if self.key else self.section

    @classmethod
    def spelt(cls, section: str, key: str, value: Any, origin: str) -> "_Given":
        """With the key as its section spells it: our fields have underscores, Megatron's options dashes."""
        key = key.replace("-", "_") if section in ("distillation", "data", "compare") else _dashed(key)
        return cls(section, key, value, origin)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A value of a YAML mapping with the line of its key."""

    value: Any
    line: int


class _Loader(yaml.SafeLoader):
    """YAML with unique keys; only true, false and null are more than text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own attribute)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise ConfigError(f"{loader.name}:{line}: expected a name as key, got {key!r}; quote it")
        key = _dashed(key)
        if key in entries:
            raise ConfigError(
                f"{loader.name}: '{key}' is given twice, on lines {entries[key].line} and {line}; remove one"
            )
        entries[key] = _Entry(loader.construct_object(value_node, deep=True), line)
    return entries


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def _load_yaml(text: str, name: str) -> Any:
    try:
        loader = _Loader(text)  # refuses control characters
        loader.name = name
        return loader.get_single_data()
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: expected readable YAML, got: {error}") from error


def _read_file(path: Path) -> list[_Given]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{path}: expected a readable YAML file, got: {error}; check --config") from error
    top = _load_yaml(text, path.name)
    if not isinstance(top, dict):
        got = "an empty file" if top is None else f"a {type(top).__name__}"
        raise ConfigError(f"{path}: expected the sections {', '.join(SECTIONS)}, got {got}")
    given = []
    for section, entry in top.items():
        origin = f"{path.name}:{entry.line}"
        _check_name(section, SECTIONS, origin, "section")
        if section == "device":
            given.append(_Given(section, "", entry.value, origin))
        elif isinstance(entry.value, dict):
            given += [_Given.spelt(section, k, e.value, f"{path.name}:{e.line}") for k, e in entry.value.items()]
        elif entry.value is not None:
            raise ConfigError(f"{origin}: {section}: expected `key: value` lines, got {entry.value!r}")
    return given


def _read_override(text: str) -> _Given:
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or (bool(dot and key) == (section == "device")):
        raise ConfigError(
            f"command line: expected section.key=value or device=NAME, got {text!r}; for example megatron.num-layers=4"
        )
    _check_name(section, SECTIONS, "command line", "section")
    return _Given.spelt(section, key, _load_yaml(value, f"command line: {name}"), "command line")


def load_config(
    path: Path | None,
    overrides: Sequence[str],
    megatron_options: Options,
    device_defaults: Callable[[str], Mapping[str, Value]] = lambda device: {},
) -> Config:
    """Read a configuration: defaults, then what the device implies, then the YAML file, then the overrides.

    Args:
        path: the YAML file; None for none.
        overrides: ``section.key=value`` (or ``device=NAME``), the value a YAML scalar or list; of two for
            the same key the last one counts.
        megatron_options: the action of each Megatron option, keyed by its spelling without leading dashes.
        device_defaults: the Megatron arguments that a device implies.

    Returns:
        The configuration, each value of its field's or action's type; `Config.check` is left to the caller.

    Raises:
        ConfigError: anything unknown, given twice or of the wrong type.
    """
    from_file = _read_file(path) if path is not None else []
    from_command_line = [_read_override(text) for text in overrides]

    config = Config()
    origins = config.origins
    origins["device"] = "default"
    for item in (*from_file, *from_command_line):
        if item.section == "device":
            config.device, origins["device"] = item.value, item.origin
            _check_name(config.device, DEVICES, item.origin, "device")
    implied = [
        _Given.spelt("megatron", key, value, f"device: {config.device}")
        for key, value in device_defaults(config.device).items()
    ]
    kinds = {"distillation": DistillationConfig, "data": DataConfig, "compare": CompareConfig}
    for section, kind in kinds.items():
        origins.update({f"{section}.{item.name}": "default" for item in fields(kind)})
    origins.update({"teacher.load": "default", "teacher.ckpt-step": "default"})

    options = _Options(megatron_options)
    for layer in (implied, from_file, from_command_line):
        spelt: dict[tuple[str, str], _Given] = {}
        # Another divergence than a file's comes with its own parameters; the file's cannot be taken out of it.
        kd, given = config.distillation, {item.key: item.value for item in layer if item.section == "distillation"}
        if given.get("losses") or ("divergence" in given and (kd.losses or given["divergence"] != kd.divergence)):
            config._forget_divergence()
        for item in layer:
            if item.section == "device":
                continue
            if item.section == "distillation":
                _set_field(config, config.distillation, item)
            elif item.section == "data":
                _set_field(config, config.data, item)
            elif item.section == "compare":
                _set_field(config, config.compare, item)
            elif item.section == "teacher" and item.key in ("load", "ckpt-step"):
                _set_field(config, config.teacher, item)
            else:
                arguments = config.megatron if item.section == "megatron" else config.teacher.megatron
                _, action = options.find(item.key, item.origin)
                twin = spelt.setdefault((item.section, action.dest), item)
                if twin.key != item.key:
                    raise ConfigError(
                        f"{item.origin}: '{item.key}' and '{twin.key}' ({twin.origin}) are two spellings "
                        "of one Megatron argument; remove one"
                    )
                # A later layer may spell the argument otherwise; it replaces it all the same.
                for key in [key for key in arguments if key != item.key and options.dest(key) == action.dest]:
                    del arguments[key], origins[f"{item.section}.{key}"]
                arguments[item.key] = _option_value(item, action)
                origins[item.name] = item.origin
    return config


def _set_field(config: Config, target: Any, item: _Given) -> None:
    types, name = get_type_hints(type(target)), item.key.replace("-", "_")
    _check_name(name, types, item.origin, f"key of {item.section}")
    setattr(target, name, _field_value(item, types[name]))
    config.origins[item.name] = item.origin


# Types --------------------------------------------------------------------------------------------


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _check_name(name: object, known: Iterable[str], origin: str, what: str) -> None:
    known = list(known)
    if name in known:
        return
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.7)
    hint = f"did you mean '{near[0]}'?" if near else ""
    if len(known) <= 16:
        hint = f"{hint} known: {', '.join(known)}".strip()
    raise ConfigError(f"{origin}: unknown {what} {_shown(name)}; {hint or 'see the documentation for the names'}")


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "a nested mapping"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    return "nothing (null)" if value is None else repr(value)


def _wrong(item: _Given, expected: str, value: object, remedy: str = "") -> ConfigError:
    end = f"; {remedy}" if remedy else ""
    return ConfigError(f"{item.origin}: {item.name}: expected {expected}, got {_shown(value)}{end}")


def _boolean(item: _Given, value: object) -> bool:
    if isinstance(value, bool):
        return value
    remedy = "write true or false, unquoted" if isinstance(value, str) else ""
    raise _wrong(item, "true or false", value, remedy)


def _integer(item: _Given, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(_\d+)*", value):
        return int(value)
    raise _wrong(item, "a whole number", value, "write it in digits" if isinstance(value, str) else "")


def _number(item: _Given, value: object, finite: bool) -> float:
    number = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    elif isinstance(value, str):
        try:
            number = float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", value.lower()))
        except ValueError:
            number = None
    if number is None or (finite and not math.isfinite(number)):
        raise _wrong(item, "a finite number" if finite else "a number", value)
    return number


def _text(item: _Given, value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise _wrong(item, "text", value, "quote it" if isinstance(value, bool) else "")


def _schedule(item: _Given) -> Schedule:
    """The schedule that a mapping describes."""
    file = item.origin.rpartition(":")[0]
    given = {
        key: _Given(item.section, f"{item.key}.{key}", e.value, f"{file}:{e.line}" if file else item.origin)
        for key, e in item.value.items()
    }
    if "schedule" not in given:
        raise _wrong(item, "a number, or a mapping with a `schedule`", item.value, f"known: {', '.join(KINDS)}")
    kind = given.pop("schedule")
    _check_name(kind.value, KINDS, kind.origin, f"{item.name}.schedule")
    known = _SCHEDULE_KEYS[kind.value]
    for key, of in given.items():
        _check_name(key, known, of.origin, f"key of {item.name}, a {kind.value} schedule,")
    if missing := [key for key in known if key not in given and key not in _OPTIONAL]:
        raise ConfigError(f"{item.origin}: {item.name}: a {kind.value} schedule needs {', '.join(missing)} as well")
    by = COUNTS[0]
    if "by" in given:
        by = given["by"].value
        _check_name(by, COUNTS, given["by"].origin, f"{item.name}.by")
    number = {key: _number(of, of.value, finite=True) for key, of in given.items() if key in ("value", "from", "to")}
    count = {key: _integer(of, of.value) for key, of in given.items() if key in ("start", "end")}
    points = []
    if kind.value == "constant":
        points = [(0, number["value"])]
    elif kind.value == "piecewise":
        of = given["points"]
        pairs = of.value if isinstance(of.value, list) else [of.value]
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise _wrong(of, f"pairs [{by}, value]", of.value)
        points = [(_integer(of, at), _number(of, value, finite=True)) for at, value in pairs]
    else:
        points = [(count.get("start", 0), number["from"]), (count["end"], number["to"])]
    try:
        return Schedule(kind.value, tuple(points), by)
    except ConfigError as error:
        raise ConfigError(f"{item.origin}: {item.name}: {error}") from error


def _selection(item: _Given) -> TokenSelection:
    """The selection of tokens that a mapping describes."""
    remedy = "for example {select: every, n: 4}; leave it out to distil on every token"
    if not isinstance(item.value, dict) or "select" not in item.value:
        raise _wrong(item, "a mapping with a `select`", item.value, remedy)
    file = item.origin.rpartition(":")[0]
    given = {
        name: _Given(item.section, f"{item.key}.{name}", e.value, f"{file}:{e.line}" if file else item.origin)
        for name, e in ((key.replace("-", "_"), e) for key, e in item.value.items())
    }
    kind = given.pop("select")
    _check_name(kind.value, KEYS, kind.origin, f"{item.name}.select")
    for name, of in given.items():
        _check_name(name, KEYS[kind.value], of.origin, f"key of {item.name}, which selects {kind.value},")
    numbers: dict[str, Any] = {
        name: _integer(of, of.value) if name == "n" else _number(of, of.value, finite=True)
        for name, of in given.items()
    }
    try:
        return TokenSelection(kind.value, **numbers)
    except ConfigError as error:
        raise ConfigError(f"{item.origin}: {item.name}: {error}") from error


def _field_value(item: _Given, kind: Any) -> Value | Schedule | TokenSelection | dict[str, list[str]]:
    """The value in its dataclass field's type."""
    value = item.value
    if kind == TokenSelection | None:
        return None if value is None else _selection(item)
    if kind in (str | None, int | None):
        if value is None:
            return None
        kind = str if kind == str | None else int
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


def _term(item: _Given, entry: object) -> dict[str, Scalar]:
    """One of a list of losses: what reads as a number is one, for only the loss knows what its parameters are."""
    if not isinstance(entry, dict):
        hidden = item.key == "hidden_losses"
        keys = "student_layer: ..., teacher_layer: ..., loss: ..." if hidden else "name: ..., weight: ..., parameters"
        raise _wrong(item, f"a list of {{{keys}}}", entry)
    term: dict[str, Scalar] = {}
    for key, value in ((key.replace("-", "_"), one.value) for key, one in entry.items()):
        if isinstance(value, dict | list):
            raise _wrong(item, f"a plain value of {key}", value)
        try:
            term[key] = value if isinstance(value, bool | None) or key == "name" else _number(item, value, finite=True)
        except ConfigError:
            term[key] = value
    return term


def _settings(item: _Given) -> dict[str, list[str]]:
    """Of `compare.losses`, what each differs in, as overrides; that their values are right shows when they are used."""
    if not isinstance(item.value, dict):
        raise _wrong(item, "a mapping of names to what they differ in, such as {ToDi: {divergence: todi}}", item.value)
    settings: dict[str, list[str]] = {}
    for name, entry in item.value.items():
        if not isinstance(entry.value, dict):
            raise _wrong(item, f"{name} to be a mapping such as {{divergence: todi}}", entry.value)
        settings[name] = []
        for key, one in entry.value.items():
            section, _, rest = key.rpartition(".")
            spelt = _Given.spelt(section or "distillation", rest, _plain(one), item.origin)
            plain = isinstance(spelt.value, str) and _load_yaml(spelt.value, name) == spelt.value
            settings[name].append(f"{spelt.name}={spelt.value if plain else _yaml(spelt.value)}")
    return settings


def _plain(value: Any) -> Any:
    """A value of YAML without the lines of its keys."""
    if isinstance(value, _Entry):
        return _plain(value.value)
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


class _Options:
    """Megatron's options by name, dashes and underscores alike."""

    def __init__(self, options: Options) -> None:
        self._options = options
        # Sorted, so that where both spellings exist the dashed one (first in ASCII) is the one kept.
        self._spellings = {_dashed(name): name for name in sorted(options, reverse=True)}

    def find(self, key: str, origin: str) -> tuple[str, argparse.Action]:
        """Megatron's spelling and the action."""
        _check_name(_dashed(key), self._spellings, origin, "Megatron argument")
        spelling = self._spellings[_dashed(key)]
        return spelling, self._options[spelling]

    def dest(self, key: str) -> str:
        return self.find(key, "")[1].dest


def _option_value(item: _Given, action: argparse.Action) -> Value:
    """The value in the type that the action's command line would give it; text for the action's own types."""
    value, nargs = item.value, action.nargs
    if value is None:
        return None
    if nargs == 0 or action.type is bool:
        return _boolean(item, value)
    if nargs is None or nargs == "?":
        if isinstance(value, list):
            raise _wrong(item, "one value", value, "write it as quoted text, as on Megatron's command line")
        return _option_item(item, value, action)
    values = [_option_item(item, entry, action) for entry in (value if isinstance(value, list) else [value])]
    if (nargs == "+" and not values) or (isinstance(nargs, int) and len(values) != nargs):
        raise _wrong(item, "at least one value" if nargs == "+" else f"{nargs} values", value)
    return values


def _option_item(item: _Given, value: object, action: argparse.Action) -> Scalar:
    result: Scalar
    if isinstance(value, bool | None | dict | list):
        raise _wrong(item, "a value", value, "quote it" if isinstance(value, bool) else "")
    if action.type is int:
        result = _integer(item, value)
    elif action.type is float:
        result = _number(item, value, finite=False)
    else:
        result = _text(item, value)
    if action.choices is not None and result not in action.choices:
        names = [str(getattr(choice, "name", choice)) for choice in action.choices]
        _check_name(str(result), names, item.origin, f"choice for {item.name}")
    return result


# Writing ------------------------------------------------------------------------------------------


def to_argv(values: Mapping[str, Value], megatron_options: Options) -> list[str]:
    """Megatron's command line for these arguments.

    Args:
        values: Megatron arguments, keyed by option name without the leading dashes. None, and false for a
            plain flag, leave the argument out.
        megatron_options: as in `load_config`.

    Returns:
        The words of the command line.

    Raises:
        ConfigError: an unknown argument, or a value that its action does not take.
    """
    options = _Options(megatron_options)
    argv: list[str] = []
    for key, given in values.items():
        spelling, action = options.find(key, "megatron")
        item = _Given("megatron", key, given, "Megatron's command line")
        value = _option_value(item, action)
        flag = f"--{spelling}"
        if value is None:
            continue
        if isinstance(action, argparse.BooleanOptionalAction):
            opposite = f"--{spelling.removeprefix('no-')}" if spelling.startswith("no-") else f"--no-{spelling}"
            argv.append(flag if value else opposite)
        elif action.nargs == 0:
            argv += [flag] if value else []
        elif action.type is bool:
            # argparse calls bool() on the text: only the empty one is false.
            argv.append(f"{flag}={value or ''}")
        elif isinstance(value, list):
            argv += [flag, *(_word(item, entry) for entry in value)]
        else:
            text = str(value)
            argv += [f"{flag}={text}"] if text.startswith("-") or not text else [flag, text]
    return argv


def _word(item: _Given, value: Scalar) -> str:
    """One of several values; argparse takes a leading dash only from plain decimals."""
    if isinstance(value, float) and value < 0:
        return format(Decimal(repr(value)), "f")
    text = str(value)
    if text.startswith("-") and not isinstance(value, int):
        raise _wrong(item, "values without a leading dash", text)
    return text


def render(config: Config, shown: Sequence[str] = SECTIONS, origins: bool = True) -> str:
    """The configuration as YAML, each value with its origin as a comment; it loads again as the same one.

    Args:
        config: what `load_config` returned.
        shown: the sections that are wanted.
        origins: whether to say where each value comes from.

    Returns:
        The text, ending in a newline.
    """
    teacher = {"load": config.teacher.load, "ckpt-step": config.teacher.ckpt_step, **config.teacher.megatron}
    sections: dict[str, dict[str, Any]] = {"megatron": config.megatron, "teacher": teacher}
    for section in ("distillation", "data", "compare"):
        values = getattr(config, section)
        sections[section] = {item.name: getattr(values, item.name) for item in fields(values)}
    sections["compare"]["losses"] = {
        name: {key: _plain(_load_yaml(value, name)) for key, value in (setting.split("=", 1) for setting in settings)}
        for name, settings in config.compare.losses.items()
    }
    for name in config._without_effect():
        if not config._given(name):  # what was given and has none is shown, and refused by `check`
            del sections["distillation"][name]
    rows = [(f"device: {_yaml(config.device)}", config.origins.get("device", ""))]
    for section, items in ((name, items) for name, items in sections.items() if name in shown):
        rows.append((f"{section}:" if items else f"{section}: {{}}", ""))
        for key, value in items.items():
            origin = config.origins.get(f"{section}.{key}", "")
            nested = isinstance(value, dict)
            rows.append((f"  {key}:" if nested else f"  {key}: {_yaml(value)}", origin))
            rows += [(f"    {_yaml(name)}: {_yaml(one)}", "") for name, one in value.items()] if nested else []
    width = max(len(text) for text, _ in rows if len(text) <= 60)  # a long path does not push all others
    lines = (f"{text:<{width}}  # {origin}" if origin and origins else text for text, origin in rows)
    return "\n".join(lines) + "\n"


def _yaml(value: Value | Schedule | TokenSelection) -> str:
    if isinstance(value, Schedule | TokenSelection):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.described().items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(_yaml(entry) for entry in value)}]"
    style = '"' if isinstance(value, str) and not value.isprintable() else None  # on one line
    options: dict[str, Any] = {"width": math.inf, "allow_unicode": True, "sort_keys": False}
    text = yaml.safe_dump([value], default_flow_style=True, default_style=style, **options)
    return text.strip()[1:-1]
