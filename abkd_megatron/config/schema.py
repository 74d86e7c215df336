"""Schema of the configuration: keys, defaults and validation. Does not import megatron."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from abkd_megatron.config.cache import CacheConfig, cache_problems
from abkd_megatron.config.compare import CompareConfig, compare_problems
from abkd_megatron.config.cross_tokenizer import cross_tokenizer_problems
from abkd_megatron.config.presets import DEFAULT, PRESETS, preset_values
from abkd_megatron.config.rollouts import GenerateConfig, OnPolicy, rollout_problems
from abkd_megatron.config.teachers import TEACHER_WEIGHTS, SourceTeacher, teachers_problems
from abkd_megatron.config.validation import ValidationConfig, validation_problems
from abkd_megatron.errors import ConfigError, brief, check_name
from abkd_megatron.kernels import CHOICES
from abkd_megatron.losses import Divergence, LogitLoss, LossTerm, WeightedSum, registry
from abkd_megatron.losses.chunks import ChunkLikelihood
from abkd_megatron.losses.hidden import HiddenLoss
from abkd_megatron.losses.mixed_sequences import SequenceMix
from abkd_megatron.losses.objective import Objective, ScheduledObjective
from abkd_megatron.losses.schedule import Schedule
from abkd_megatron.losses.selection import TokenSelection
from abkd_megatron.losses.sources import SourceWeights
from abkd_megatron.vocab_parallel.execution import HEADS, Execution

type Scalar = str | int | float | bool | None
type Value = Scalar | list[Any]
Number = float | Schedule

DEVICES = ("cuda", "cpu")
# Keys of `teacher` that are not Megatron arguments.
TEACHER_KEYS = ("load", "ckpt-step", "declared", "expected-loss", "weights")
PREFLIGHT = ("teacher_checksums", "teacher_weights", "memory", "gradient", "batch", "teacher_loss", "teacher_rounding")
ON_CHANGE = ("refuse", "warn")
# Keys at the top, without keys of their own.
TOP_KEYS = ("device", "teachers")
SECTIONS = (
    *("device", "megatron", "teacher", "teachers", "distillation"),
    *("data", "validation", "cache", "generate", "compare"),
)
LEAST_VOCAB_SIZE = 300

# Limit of a message about losses, which may quote custom names.
_MOST_CHARACTERS = 2000

# Keys of `distillation` that define the divergence.
_OF_DIVERGENCE = ("divergence", "alpha", "beta", "scale", "detach", "skew", "mixture", "detach_mixture", "losses")
# Keys that define its use. Each is checked together with the ones before it.
_OF_OBJECTIVE = ("temperature", "temperature_squared", "lm_weight", "kd_weight", "shared_vocab", "tokens", "mtp_weight")
_OF_EXECUTION = ("chunk_tokens", "gradient_in_place", "diagnostics", "kernel", "head")
# Keys of `distillation` that may be a schedule.
SCHEDULED = ("alpha", "beta", "scale", "skew", "mixture", "temperature", "kd_weight", "lm_weight")

# Megatron arguments that `data.dir` sets, and that conflict with it.
_DATA_ARGUMENTS = (
    *("data-path", "train-data-path", "valid-data-path", "test-data-path", "split", "mock-data"),
    *("data-args-path", "per-split-data-args-path"),
    *("tokenizer-type", "tokenizer-model", "vocab-file", "merge-file"),
)


@dataclass(kw_only=True, slots=True)
class DistillationConfig:
    """The loss: ``kd_weight * divergence(teacher, student) + lm_weight * cross_entropy``.

    The fields in `SCHEDULED` take a number or a schedule. A field that is None has the preset's value; see `expanded`.
    """

    preset: str | None = None
    """Values of `divergence`, `alpha`, `beta`, `temperature`, `kd_weight` and `lm_weight` where they are not given:
    ``pretrain``, ``pruned``, ``annealed``, ``finetune`` or ``none``. None: ``pretrain``, or ``none`` if a divergence is
    given."""
    divergence: str | None = None
    """Name in ``abkd_megatron.losses.registry`` (logit losses use their defaults), or dotted path of a subclass of
    Divergence or LogitLoss."""
    alpha: Number | None = None
    """Alpha of the alpha-beta divergence."""
    beta: Number | None = None
    """Beta of the alpha-beta divergence."""
    scale: Number = 1.0
    """Steepness of ToDi's weight between forward and reverse KL."""
    detach: bool = True
    """Treat ToDi's weight as a constant in the gradient."""
    skew: Number = 0.1
    """Weight of the other model in the mixture of skew forward and reverse KL."""
    mixture: Number = 0.5
    """Weight of the teacher in Jensen-Shannon's mixture."""
    detach_mixture: bool = False
    """Treat skew reverse KL's mixture as a constant in the gradient."""
    losses: list[dict[str, Scalar]] = field(default_factory=list)
    """Weighted sum of losses, instead of `divergence`: each with `name`, `weight` (default 1) and parameters."""
    temperature: Number | None = None
    """Divides both models' logits in the divergence. The cross entropy always has temperature 1."""
    temperature_squared: bool = False
    """Multiply the divergence by the squared temperature, to keep the scale of its gradient."""
    kd_weight: Number | None = None
    """Weight of the divergence."""
    lm_weight: Number | None = None
    """Weight of the cross entropy with the labels."""
    mtp_weight: float = 0.0
    """Weight of the divergence of the student's multi-token predictions, a mean over the heads; 0 for none."""
    kernel: str = "auto"
    """Code of the loss: ``auto`` (by device), ``eager``, ``cpp`` or ``triton``."""
    head: str = "auto"
    """LM head: ``materialized`` logits, ``fused`` with the loss in chunks of tokens, or ``auto``."""
    chunk_tokens: int | None = None
    """Tokens per chunk of the fused head; None for an automatic size."""
    gradient_in_place: bool = False
    """Overwrite the student's logits with their gradient in backward."""
    shared_vocab: int | None = None
    """Number of leading token ids that both vocabularies share; None if the vocabularies are identical."""
    tokens: TokenSelection | None = None
    """Tokens in the divergence; None for all."""
    diagnostics: bool = False
    """Report reverse KL, calibration, ToDi's weight and gradient concentration in validation."""
    hidden_losses: list[HiddenLoss] = field(default_factory=list)
    """Losses between layers: each with `student_layer`, `teacher_layer`, `loss` (``cosine`` or ``mse``), `weight`
    (default 1) and `projector` (default true)."""
    sources: list[SourceWeights] = field(default_factory=list)
    """Weights by dataset of a blend, in place of `kd_weight` and `lm_weight`: each with `source` (its position in the
    list of datasets, from 0) or `path` (its prefix), `kd_weight` and `lm_weight`."""
    mix: SequenceMix | None = None
    """Mix the embeddings of the sequences of a micro-batch, in both models (MixKD): `alpha` of Beta(alpha, alpha)."""
    cross_tokenizer: ChunkLikelihood | None = None
    """The teacher has another tokenizer, `teacher.tokenizer-model`: the divergence is of the likelihoods of the chunks
    of text that both cut alike, at a `temperature` (default 100). None: they have one tokenizer."""
    skip_preflight: list[str] = field(default_factory=list)
    """Checks to skip before the first step: ``teacher_checksums``, ``teacher_weights``, ``memory``, ``gradient``,
    ``batch``, ``teacher_loss``, ``teacher_rounding``."""
    cache: str | None = None
    """Teacher cache to train from, in place of `teacher.load`: the `cache.dir` of the job `cache`."""
    on_policy: OnPolicy | None = None
    """Steps on the student's own text: `share`, `prompt_tokens`, `new_tokens`, `temperature`, `top_k`, `top_p`, `seed`,
    `source`, `reward`, `reward_weight` and `group`; None for none."""
    on_miss: str = "error"
    """Action for a sample that is not in the cache: ``error``, or ``lm`` to train it on the cross entropy only."""
    on_change: str = "refuse"
    """Action if a run resumes with another teacher or loss than its checkpoint: ``refuse`` or ``warn``."""

    @property
    def names_its_loss(self) -> bool:
        """True if a divergence, `losses` or a parameter is given, or a `kd_weight` that is 0 at some step."""
        plain = DistillationConfig()
        if any(getattr(self, name) != getattr(plain, name) for name in _OF_DIVERGENCE):
            return True
        return self.kd_weight is not None and Schedule.of(self.kd_weight).lowest == 0

    def expanded(self) -> "DistillationConfig":
        """Return a copy in which the preset and its values are filled in; an expanded one is returned as it is.

        With `divergence` or `losses` given, the preset's divergence and its schedules are not used; its weights and
        temperature are. An unknown preset counts as ``none`` here, and `Config.check` rejects it.
        """
        preset = self.preset or ("none" if self.names_its_loss else DEFAULT)
        own = self.divergence is None and not self.losses
        values = preset_values(preset if preset in PRESETS else "none", divergence=own)
        missing = {name: value for name, value in values.items() if getattr(self, name) is None}
        return replace(self, preset=preset, **missing)

    def make_objective(self) -> ScheduledObjective:
        """Create the objective.

        Raises:
            ConfigError: see `make_divergence` and `ScheduledObjective`.
        """
        whole = self.expanded()
        given: dict[str, Any] = {name: _first(getattr(whole, name)) for name in _OF_OBJECTIVE}
        given |= {"logit_losses": whole.make_logit_losses(), "hidden_losses": tuple(whole.hidden_losses)}
        given |= {"sources": tuple(whole.sources), "mix": whole.mix}
        given["cross_tokenizer"] = whole.cross_tokenizer
        schedules = {name: it for name in SCHEDULED if isinstance(it := getattr(whole, name), Schedule)}
        return ScheduledObjective(Objective(whole.make_divergence(), **given), schedules)

    def make_execution(self) -> Execution:
        """Create the execution settings of the objective.

        Raises:
            ConfigError: see `Execution`.
        """
        given: dict[str, Any] = {name: getattr(self, name) for name in _OF_EXECUTION}
        return Execution(**given)

    def make_divergence(self) -> Divergence | None:
        """Create the divergence, or the weighted sum of several. Schedules have their first value.

        Returns:
            None if all losses are logit losses.

        Raises:
            ConfigError: see `build` and `WeightedSum`.
        """
        terms = [(weight, term) for weight, term in self._terms() if isinstance(term, Divergence)]
        if not self.losses and terms:
            return terms[0][1]
        return WeightedSum(terms) if terms else None

    def make_logit_losses(self) -> tuple[tuple[float, LogitLoss], ...]:
        """Create the logit losses: (weight, loss) of each.

        Raises:
            ConfigError: see `build`.
        """
        return tuple((weight, term) for weight, term in self._terms() if isinstance(term, LogitLoss))

    def _terms(self) -> list[tuple[Any, LossTerm]]:
        if not self.losses:
            whole = self.expanded()
            given = {name: _first(getattr(whole, name)) for name in registry.parameters(str(whole.divergence))}
            return [(1.0, registry.build(str(whole.divergence), given))]
        terms = [{"name": "", "weight": 1.0, **term} for term in self.losses]
        return [(term.pop("weight"), registry.build(str(term.pop("name")), term)) for term in terms]


def _first(number: Any) -> Any:
    """Return a schedule's first value; other values unchanged."""
    return number.first if isinstance(number, Schedule) else number


# What a missing key means, before a preset changes it.
PLAIN = DistillationConfig(preset="none").expanded()


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Text sources and the prepared data set."""

    source: list[str] = field(default_factory=lambda: ["python"])
    """``python`` (the text that ships with Python), files, directories and globs."""
    dir: str | None = None
    """Directory of the prepared data set, which ``prepare`` writes and training reads."""
    vocab_size: int = 2048
    """Pieces of the SentencePiece model."""
    held_out: float = 0.05
    """Fraction of documents held out, half for validation and half for test."""
    seed: int | None = None
    """Chooses the validation and test samples; None for Megatron's `seed`, which orders the training samples."""


@dataclass(kw_only=True, slots=True)
class TeacherConfig:
    """The frozen teacher."""

    load: str | None = None
    """Path of its Megatron checkpoint."""
    ckpt_step: int | None = None
    """Iteration to load; None for the latest."""
    declared: bool = False
    """Declare that the settings are the teacher's, if its checkpoint has no complete description."""
    expected_loss: float | None = None
    """The teacher's cross entropy on the first step's batch, measured elsewhere, in nats per token."""
    weights: str = "device"
    """Its layers' weights: on the ``device``; there in ``int8``; or on the ``host``, copied layer by layer."""
    megatron: dict[str, Value] = field(default_factory=dict)
    """Megatron arguments in which the teacher differs from the student."""


@dataclass(kw_only=True, slots=True)
class Config:
    """A complete configuration."""

    device: str = "cuda"
    """``cuda``, or ``cpu`` for the CPU backend."""
    megatron: dict[str, Value] = field(default_factory=dict)
    """Megatron arguments, keyed by option name without leading dashes."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The ``teacher`` section."""
    teachers: list[SourceTeacher] = field(default_factory=list)
    """Teachers of some datasets of a blend; `teacher` is the teacher of the others."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """The ``distillation`` section."""
    data: DataConfig = field(default_factory=DataConfig)
    """The ``data`` section."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """The ``validation`` section."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """The ``cache`` section."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """The ``generate`` section."""
    compare: CompareConfig = field(default_factory=CompareConfig)
    """The ``compare`` section."""
    origins: dict[str, str] = field(default_factory=dict)
    """Origin of each ``section.key``: default, device: NAME, FILE:LINE or command line."""

    def check(self, job: str) -> None:
        """Raise the first of `problems`.

        Args:
            job: prepare, pretrain, cache, distill, generate, rouge or compare.

        Raises:
            ConfigError: with origin and key.
        """
        for error in self.problems(job):
            raise error

    def problems(self, job: str) -> Iterator[ConfigError]:
        """Yield an error per value that is missing, out of range or in conflict with another.

        The constructors of the losses check their own parameters. Their errors are reported with the key.

        Args:
            job: see `check`.
        """
        kd, data, loss = self.distillation.expanded(), self.data, self.teacher.expected_loss
        names = {
            "device": ([self.device], DEVICES),
            "teacher.weights": ([self.teacher.weights], TEACHER_WEIGHTS),
            "distillation.preset": ([str(kd.preset)], tuple(PRESETS)),
            "distillation.kernel": ([kd.kernel], CHOICES),
            "distillation.head": ([kd.head], HEADS),
            "distillation.skip_preflight": (kd.skip_preflight, PREFLIGHT),
            "distillation.on_change": ([kd.on_change], ON_CHANGE),
        }
        for key, (given, known) in names.items():
            for name in given:
                try:
                    check_name(name, known, self._origin(key), key)
                except ConfigError as error:
                    yield error
        on_cpu = "auto, eager or cpp on device: cpu"
        least = f"{LEAST_VOCAB_SIZE} or more (256 are bytes)"
        rules = (
            ("teacher.expected-loss", loss is None or 0 < loss < math.inf, "a finite number above 0", loss),
            ("distillation.kernel", not (self.device == "cpu" and kd.kernel == "triton"), on_cpu, kd.kernel),
            ("data.vocab_size", data.vocab_size >= LEAST_VOCAB_SIZE, least, data.vocab_size),
            ("data.held_out", 0 < data.held_out < 0.5, "a fraction between 0 and 0.5", data.held_out),
            ("data.source", bool(data.source), "at least one source", data.source),
        )
        for key, holds, expected, got in rules:
            if not holds:
                yield self._error(key, f"expected {expected}, got {brief(str(got))}")
        yield from self._problems_of_losses(job)
        if kd.mix is not None and loss is not None:
            yield self._error(
                "teacher.expected-loss",
                "expected none with distillation.mix, whose first batch is mixed; remove one of them",
            )
        if job == "rouge" and not self.megatron.get("load"):
            yield ConfigError("megatron.load: expected the student's checkpoint, got none; set megatron.load")
        rules_of_parts = (
            teachers_problems,
            validation_problems,
            compare_problems,
            rollout_problems,
            cache_problems,
            cross_tokenizer_problems,
        )
        for of_section in rules_of_parts:
            for key, text in of_section(self, job):
                yield self._error(key, text)
        if job == "prepare" and not data.dir:
            yield ConfigError("data.dir: expected an output directory, got none; set data.dir")
        if job in ("cache", "distill") and not self.teacher.load and not self.distillation.cache:
            yield ConfigError(
                "teacher.load: expected the path of the teacher's Megatron checkpoint, got none; set teacher.load, or "
                "distillation.cache to train from a cache, or use `pretrain` to train without a teacher"
            )
        twice = [name for name in _DATA_ARGUMENTS if data.dir and self.megatron.get(name) not in (None, False)]
        if twice:
            named = ", ".join(f"megatron.{name} ({self._origin(f'megatron.{name}')})" for name in twice)
            yield ConfigError(
                f"data.dir ({self._origin('data.dir')}) supplies the data and the tokenizer, and so does {named}; "
                f"remove data.dir or {', '.join(twice)}"
            )

    def _problems_of_losses(self, job: str) -> Iterator[ConfigError]:
        """Yield errors of the losses, applying one key at a time, and of parameters without effect."""
        kd, good = self.distillation.expanded(), PLAIN
        chosen, losses = ("losses", kd.losses) if kd.losses else ("divergence", [{"name": kd.divergence}])
        taken = () if kd.losses else registry.parameters(str(kd.divergence))
        keys = [chosen, *taken, *_OF_OBJECTIVE, "hidden_losses", "sources", "mix", "cross_tokenizer", *_OF_EXECUTION]
        keys = [key for key in keys if key == chosen or getattr(kd, key) != getattr(good, key)]
        if job != "distill" and any("." in str(term.get("name")) for term in losses):
            keys.remove(chosen)  # other jobs do not import custom losses
        named = {"head": kd.head in HEADS, "kernel": kd.kernel in CHOICES}  # unknown names are reported above
        keys = [key for key in keys if named.get(key, True)]
        wrong = []
        for key in keys:
            tried = replace(good, **{key: getattr(kd, key)})
            try:
                tried.make_execution().resolve(tried.make_objective())
                good = tried
            except ConfigError as error:
                wrong.append(key)
                yield self._error(f"distillation.{key}", brief(str(error), _MOST_CHARACTERS))
        other = f"divergence: {kd.divergence}, which takes {', '.join(taken) or 'no parameters'} here"
        for name in self.without_effect() if chosen not in wrong else ():
            if self.is_given(name):
                expected = f"expected no value with {'distillation.losses' if kd.losses else other}"
                yield self._error(f"distillation.{name}", f"{expected}, got {getattr(kd, name)}")

    def with_teacher(self, of: SourceTeacher) -> "Config":
        """Return the configuration with one of `teachers` as its only teacher.

        Weights and Megatron arguments that are not given are those of the section `teacher`. One with a cache has none.
        """
        if of.cache is not None:
            kd = replace(self.distillation, cache=of.cache)
            return replace(self, teacher=TeacherConfig(), teachers=[], distillation=kd)
        teacher = TeacherConfig(
            load=of.load,
            ckpt_step=of.ckpt_step,
            declared=of.declared,
            weights=of.weights or self.teacher.weights,
            megatron={**self.teacher.megatron, **of.megatron},
        )
        return replace(self, teacher=teacher, teachers=[])

    def _origin(self, key: str) -> str:
        return self.origins.get(key, "default")

    def _error(self, key: str, text: str) -> ConfigError:
        return ConfigError(f"{self._origin(key)}: {key}: {text}")

    def without_effect(self) -> list[str]:
        """Return the keys of `distillation` that the chosen divergence does not take."""
        kd = self.distillation.expanded()
        taken = {"losses"} if kd.losses else {"divergence", "losses", *registry.parameters(str(kd.divergence))}
        return [name for name in _OF_DIVERGENCE if name not in taken]

    def is_given(self, name: str) -> bool:
        """Return whether a key of `distillation` was given, or differs from its default."""
        value, default = getattr(self.distillation, name), getattr(PLAIN, name)
        return value not in (None, default) or self._origin(f"distillation.{name}") != "default"

    def forget_divergence(self) -> None:
        """Reset the divergence and its parameters to their defaults."""
        self._forget(_OF_DIVERGENCE)

    def forget_preset(self) -> None:
        """Reset the keys that a preset sets, and the other keys of a divergence, to their defaults."""
        self._forget(dict.fromkeys((*_OF_DIVERGENCE, *PRESETS["none"])))

    def expand_preset(self) -> None:
        """Fill in the values of the preset, with it as their origin; see `DistillationConfig.expanded`."""
        given, self.distillation = self.distillation, self.distillation.expanded()
        of_preset = PRESETS.get(str(self.distillation.preset), {})
        for name in PRESETS["none"]:
            value = getattr(self.distillation, name)
            if getattr(given, name) is None and value != getattr(PLAIN, name) and value == of_preset.get(name):
                self.origins[f"distillation.{name}"] = f"preset: {self.distillation.preset}"

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            setattr(self.distillation, name, getattr(DistillationConfig(), name))
            self.origins[f"distillation.{name}"] = "default"
